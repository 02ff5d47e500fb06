"""What samples a rollout: the `Backend` protocol, and its implementations by name.

A new backend is a file beside this one and a row of `BACKENDS`, which loads it on use;
tests/generation/test_backends.py compares every row with `generate` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.config import ConfigError

if TYPE_CHECKING:
    from rlhf.generation.token_sampling import Sampling
    from rlhf.types import OnEnded, PromptBatch, Rollout


class Backend(Protocol):
    """Samples responses with the actor's policy.

    `captures_logprobs`: whether the rollout's log-probabilities are those of the sampled distribution (else 0).
    """

    captures_logprobs: bool

    def sync(self) -> None:
        """Take over the actor's weights. Every rank calls this before the rollouts that follow an update."""

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, *, iteration: int, on_ended: OnEnded | None = None
    ) -> Rollout:
        """Sample one response to each of this rank's prompts. Every rank calls this, with its own prompts.

        `iteration` and the prompts' row ids choose the random numbers: the same again give the same responses. A
        backend that knows them earlier tells `on_ended` of responses that are whole while it samples the others.
        """


def _own(actor: Any, **settings: Any) -> Backend:
    from rlhf.generation.actor_backend import ActorBackend

    return ActorBackend(actor, **settings)


def _deepspeed(actor: Any, **settings: Any) -> Backend:
    from rlhf.generation.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(actor, **settings)


BACKENDS: dict[str, Callable[..., Backend]] = {"own": _own, "deepspeed": _deepspeed}


def make_backend(
    name: str, actor: Any, *, eos_ids: Sequence[int], pad_token_id: int, seed: int, slots: int = 0
) -> Backend:
    """The backend of that name for an actor's engine; it decodes `slots` prompts side by side (0: all of them).

    Raises ConfigError for a name that is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ConfigError(f"generation_backend={name!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[name](actor, eos_ids=eos_ids, pad_token_id=pad_token_id, seed=seed, slots=slots)
