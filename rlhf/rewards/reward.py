"""The `Reward` protocol: an object that scores responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from rlhf.types import Responses, RewardOutput


class RewardError(ValueError):
    """A reward that gives no score: names the reward, the prompt and what came in its place.

    `rows` are those of the call that have none (None: all); `output` holds what the others got, if any did.
    """

    def __init__(self, message: str, *, rows: Sequence[int] | None = None, output: RewardOutput | None = None) -> None:
        super().__init__(message)
        self.rows = rows
        self.output = output


Score = float | list[float]
"""Of a response: one number, or one for each of its tokens, the end included."""


def reward_output(rows: Sequence[Score], responses: Responses) -> RewardOutput:
    """`rows`, the score of each response, as tensors: all are numbers, or all are lists of as many as there are tokens.

    Of lists the scores are 0, and the part `tokens` is their sum.
    """
    import torch

    from rlhf.types import RewardOutput

    response_ids = responses.rollout.response_ids
    if not any(isinstance(each, list) for each in rows):
        return RewardOutput(torch.tensor(rows, dtype=torch.float32, device=response_ids.device))
    per_token = torch.zeros(response_ids.shape, dtype=torch.float32, device=response_ids.device)
    for row, each in enumerate(rows):
        assert isinstance(each, list)
        per_token[row, : len(each)] = torch.tensor(each, dtype=torch.float32, device=response_ids.device)
    return RewardOutput(torch.zeros(len(rows), device=response_ids.device), per_token, {"tokens": per_token.sum(1)})


class Reward(Protocol):
    """Scores this rank's responses. Every rank calls `score` equally often, with its own rows.

    A reward names the same parts in every call and on every rank. Beside what stands here it may have
    `check(prompts)`, which raises ConfigError, before any model is loaded, for prompts that it could not score; a
    `fingerprint`, by which a run that is resumed knows it again; and `prefetch(responses, more=...)`, where
    others compute the scores: it returns at once, and `score` is soon asked for each of these rows. It is told of
    responses while others, `more`, are still sampled.
    """

    def score(self, responses: Responses) -> RewardOutput:
        """Scores of B responses."""

    @property
    def training_range(self) -> dict[str, Any] | None:
        """How far scores reached in the reward's own training ("minimum", "maximum", "responses"); None if unknown."""


@dataclass(frozen=True)
class RewardSources:
    """What a reward may be built from.

    `engine` is the frozen reward model (None where no reward of the run needs one) and `reward_tokenizer` its
    tokenizer; `tokenizer` is the actor's, `eos_ids` the ids that end its responses. `chat`: the actor's prompts are
    rendered with the chat template of its tokenizer.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]
    engine: Any = None
    reward_tokenizer: Any = None
    chat: bool = False


Normalize = Literal["running", "fixed"]
"""Mean and standard deviation of all rollouts so far, or for ever those of the first responses that were scored."""


@dataclass(frozen=True)
class RewardPart:
    """One of several rewards that are added: its name among the parts, its weight, how its scores are normalised."""

    name: str
    weight: float
    normalize: Normalize | None = None


def prefetch(reward: Reward, responses: Responses, *, more: bool) -> None:
    """Tell a reward of responses whose scores it will be asked for, where it wants to know."""
    if prefetches(reward):
        reward.prefetch(responses, more=more)  # type: ignore[attr-defined]


def prefetches(reward: Reward) -> bool:
    """Whether a reward, or one that it is made of, wants to know of responses early."""
    return bool(getattr(reward, "prefetches", hasattr(reward, "prefetch")))
