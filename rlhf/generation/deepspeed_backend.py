"""DeepSpeed's own rollout engine (`deepspeed.runtime.rollout`) behind the interface of `rlhf.generation.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.config import ConfigError
from rlhf.models.forward import forward_logits
from rlhf.types import PromptBatch, Rollout

CHECKED_PROMPTS, CHECKED_TOKENS = 4, 16
"""Size of the greedy sample that is checked before the engine is trusted."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""How far below the largest logit a greedy token may lie: that much one forward pass differs from another."""


class DeepSpeedRollout:
    """Samples with the HybridEngineRollout of a DeepSpeed engine.

    It captures no log-probabilities (they must be recomputed) and decodes every row to the limit; a sample depends
    on the rows beside it. Before the first rollout its greedy tokens are compared with a forward pass of ours.
    """

    def __init__(self, engine: Any, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        from deepspeed.runtime.rollout import HybridEngineRollout

        self.engine = engine
        self.rollout = HybridEngineRollout(engine, tokenizer)
        self.eos_ids = list(eos_ids)
        self.pad_token_id = tokenizer.pad_token_id
        self.trusted = False

    def generate(self, prompts: PromptBatch, *, max_new_tokens: int, temperature: float, seed: int) -> Rollout:
        """One response per prompt; `temperature` 0 is greedy. `logprobs` of the result are 0: none are captured.

        Raises ConfigError when the engine's greedy tokens are not the likeliest ones of a plain forward pass.
        """
        if not self.trusted:
            self._check(prompts.rows(slice(0, CHECKED_PROMPTS)), min(max_new_tokens, CHECKED_TOKENS))
            self.trusted = True
        device = prompts.input_ids.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._generate(prompts, max_new_tokens, temperature)

    @torch.no_grad()
    def _generate(self, prompts: PromptBatch, max_new_tokens: int, temperature: float) -> Rollout:
        from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig

        found = self.rollout.generate(
            RolloutRequest(prompts.input_ids, prompts.attention_mask.long()),
            SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature),
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

    @torch.no_grad()
    def _check(self, prompts: PromptBatch, max_new_tokens: int) -> None:
        greedy = self._generate(prompts, max_new_tokens, 0.0)
        ids = torch.cat([greedy.prompt_ids, greedy.response_ids], dim=1)
        mask = torch.cat([greedy.prompt_mask, greedy.response_mask], dim=1)
        raw = forward_logits(self.engine, ids, mask, last=greedy.response_ids.shape[1] + 1)[:, :-1]
        logits = raw.float()
        chosen = logits.gather(-1, greedy.response_ids.unsqueeze(-1)).squeeze(-1)
        behind = float(((logits.amax(-1) - chosen) * greedy.response_mask).max())
        allowed = ROUNDING.get(raw.dtype, 0.25)
        if not behind <= allowed:
            raise ConfigError(
                f"DeepSpeed's rollout engine does not sample this model: a greedy token of its lies {behind:.3g} below "
                f"the largest logit of a forward pass (allowed: {allowed} in {raw.dtype}); use generation_backend=own"
            )
