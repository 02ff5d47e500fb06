"""Sampling with the actor's own weights, in the training process, by `rlhf.generation.continuous_batching`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from rlhf.generation.continuous_batching import generate
from rlhf.generation.token_sampling import Sampling
from rlhf.types import OnEnded, PromptBatch, Rollout


class ActorBackend:
    """See `rlhf.generation.backend.Backend`; `actor` is a DeepSpeed engine, a peft model or a plain one.

    Under ZeRO-3 the actor's weights are gathered once per rollout: every rank then holds a whole copy, and ranks take
    as many steps as their own responses need.
    """

    captures_logprobs = True

    def __init__(
        self, actor: nn.Module, *, eos_ids: Sequence[int], pad_token_id: int, seed: int, slots: int = 0
    ) -> None:
        self.actor = actor
        self.eos_ids = list(eos_ids)
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.slots = slots

    def sync(self) -> None:
        """Nothing to take over: the actor's weights are read where they are."""

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, *, iteration: int, on_ended: OnEnded | None = None
    ) -> Rollout:
        """See `Backend.generate`. Raises ValueError for a prompt without a token."""
        from rlhf.engine import whole_weights_of  # loads transformers, which the mathematics of PPO must not

        with whole_weights_of(self.actor):
            return generate(
                self.actor,
                prompts,
                sampling,
                eos_token_ids=self.eos_ids,
                pad_token_id=self.pad_token_id,
                seed=self.seed,
                iteration=iteration,
                slots=self.slots,
                on_ended=on_ended,
            )
