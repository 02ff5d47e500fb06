"""The `Reward` protocol: an object that scores responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rlhf.types import Responses, RewardOutput


class RewardError(ValueError):
    """A reward that gives no score: names the reward, the prompt and what came in its place."""


class Reward(Protocol):
    """Scores this rank's responses. Every rank calls `score` equally often, with its own rows.

    A reward names the same parts in every call and on every rank. Beside what stands here it may have
    `check(prompts)`, which raises ConfigError, before any model is loaded, for prompts that it could not score; and a
    `fingerprint`, by which a run that is resumed knows it again.
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
