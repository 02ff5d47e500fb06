"""Sampling with DeepSpeed's own rollout engine (`deepspeed.runtime.rollout`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.generation.token_sampling import Sampling
from rlhf.models.forward import forward_logits
from rlhf.models.inner_model import innermost
from rlhf.types import OnEnded, PromptBatch, Rollout

CHECKED_PROMPTS, CHECKED_TOKENS = 4, 16
"""Size of the greedy sample that is checked before the engine is trusted."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""How far below the largest logit a greedy token may lie: that much one forward pass differs from another."""


@dataclass(frozen=True)
class _TokenIds:
    """All that the rollout engine reads of a tokenizer. Without an end it keeps every token: ends are found here."""

    pad_token_id: int
    eos_token_id: int | None = None


class DeepSpeedBackend:
    """See `rlhf.generation.backend.Backend`; samples with the HybridEngineRollout of a DeepSpeed engine.

    It captures no log-probabilities (they must be recomputed) and decodes every row to the limit; a sample depends
    on the rows beside it. Before the first rollout its greedy tokens are compared with a forward pass of ours. The
    model's generation settings suppress ids beyond the vocabulary while it samples.
    Under ZeRO-3 the actor's weights are gathered once per rollout.
    """

    captures_logprobs = False

    def __init__(self, actor: Any, *, eos_ids: Sequence[int], pad_token_id: int, seed: int, slots: int = 0) -> None:
        from deepspeed.runtime.rollout import HybridEngineRollout

        self.actor = actor
        self.rollout = HybridEngineRollout(actor, _TokenIds(pad_token_id))
        self.eos_ids = list(eos_ids)
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.slots = slots
        self.trusted = False

    def sync(self) -> None:
        """Nothing to take over: the actor's weights are read where they are."""

    def generate(
        self, prompts: PromptBatch, sampling: Sampling, *, iteration: int, on_ended: OnEnded | None = None
    ) -> Rollout:
        """See `Backend.generate`. `logprobs` of the result are 0: none are captured; `on_ended` is told of each batch.

        Raises ConfigError when the engine's greedy tokens are not the likeliest ones of a plain forward pass.
        """
        from rlhf.engine import whole_weights_of  # loads transformers, which the mathematics of PPO must not

        with whole_weights_of(self.actor):
            if not self.trusted:
                self._check(prompts.rows(slice(0, CHECKED_PROMPTS)), sampling)
                self.trusted = True
            parts: list[Rollout] = []
            for part in prompts.split(self.slots or len(prompts)):
                first = sum(map(len, parts))
                parts.append(self._sample(part, sampling, iteration))
                if on_ended is not None:
                    on_ended(range(first, first + len(part)), parts[-1])
        longest = max(part.response_ids.shape[1] for part in parts)
        wide = [part.widened(longest, self.pad_token_id) for part in parts]
        return Rollout(*(torch.cat([getattr(part, item.name) for part in wide]) for item in fields(Rollout)))

    def _sample(self, prompts: PromptBatch, sampling: Sampling, iteration: int) -> Rollout:
        """Responses to prompts that are decoded side by side."""
        device = prompts.input_ids.device
        first = int(prompts.row_ids[0])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(((self.seed * 1_000_003 + iteration) * 1_000_003 + first) % 2**63)
            return self._decode(prompts, sampling)

    @torch.no_grad()
    def _decode(self, prompts: PromptBatch, sampling: Sampling) -> Rollout:
        from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

        with self._spare_ids_suppressed(sampling.vocabulary_size):
            found = self.rollout.generate(
                RolloutRequest(prompts.input_ids, prompts.attention_mask.long()),
                SamplingConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=0.0 if sampling.greedy else sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                ),
            )
        ids = found.input_ids[:, prompts.input_ids.shape[1] :]
        is_eos = torch.isin(ids, torch.tensor(self.eos_ids, device=ids.device)).long()
        mask = is_eos.cumsum(-1) - is_eos == 0  # up to the first end-of-sequence token, which counts
        width = int(mask.sum(1).max())
        ids, mask = ids[:, :width].masked_fill(~mask[:, :width], self.pad_token_id), mask[:, :width]
        return Rollout(
            prompt_ids=prompts.input_ids,
            prompt_mask=prompts.attention_mask.bool(),
            response_ids=ids,
            response_mask=mask,
            logprobs=torch.zeros(ids.shape, device=ids.device),
        )

    @contextmanager
    def _spare_ids_suppressed(self, vocabulary_size: int | None) -> Iterator[None]:
        """Within the block the model's `generate` gives ids at or beyond `vocabulary_size` probability 0."""
        model: Any = innermost(self.actor)
        spare = range(vocabulary_size or model.config.vocab_size, model.config.vocab_size)
        settings = model.generation_config
        before = settings.suppress_tokens
        settings.suppress_tokens = [*(before or []), *spare] or None
        try:
            yield
        finally:
            settings.suppress_tokens = before

    @torch.no_grad()
    def _check(self, prompts: PromptBatch, sampling: Sampling) -> None:
        tokens = min(sampling.max_new_tokens, CHECKED_TOKENS)
        greedy = self._decode(prompts, replace(sampling, max_new_tokens=tokens, greedy=True))
        ids, mask = greedy.sequences()
        raw = forward_logits(self.actor, ids, mask, last=greedy.response_ids.shape[1] + 1)[:, :-1]
        logits = raw.float()[..., : sampling.vocabulary_size]
        chosen = logits.gather(-1, greedy.response_ids.unsqueeze(-1)).squeeze(-1)
        behind = float(((logits.amax(-1) - chosen) * greedy.response_mask).max())
        allowed = ROUNDING.get(raw.dtype, 0.25)
        if not behind <= allowed:
            raise ConfigError(
                f"DeepSpeed's rollout engine does not sample this model: a greedy token of its lies {behind:.3g} below "
                f"the largest logit of a forward pass (allowed: {allowed} in {raw.dtype}); use generation_backend=own"
            )
