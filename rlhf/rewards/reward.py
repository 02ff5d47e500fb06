"""The `Reward` protocol: an object that scores responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from rlhf.types import Responses, RewardOutput


class RewardError(ValueError):
    """A reward that gives no score: names the reward, the prompt and what came in its place.

    `rows` are those of the call that have none (None: all); `scores` [B] hold what the others got, if any did.
    """

    def __init__(
        self, message: str, *, rows: Sequence[int] | None = None, scores: Sequence[float] | None = None
    ) -> None:
        super().__init__(message)
        self.rows = rows
        self.scores = scores


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
