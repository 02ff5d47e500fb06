"""Several different responses to a prompt without chance: diverse beam search, whose groups hold a beam each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf.generation.token_sampling import Sampling
from rlhf.types import PromptBatch, Rollout


class DiverseBeams:
    """Diverse beam search (Vijayakumar et al., arXiv 1610.02424, algorithm 1) with groups of one beam, as RRHF's
    candidates were made (arXiv 2304.05302: 4 groups, penalty 1).

    In every step the groups of a prompt choose one after another, each the likeliest token after `penalty` nats have
    been taken off a token for every earlier group that chose it in this step (the paper's Hamming diversity).
    """

    def __init__(
        self, model: nn.Module, *, eos_ids: Sequence[int], pad_token_id: int, groups: int, penalty: float
    ) -> None:
        self.model = model
        self.eos_ids = torch.tensor(list(eos_ids))
        self.pad_token_id = pad_token_id
        self.groups = groups
        self.penalty = penalty

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, sampling: Sampling, **_: Any) -> Rollout:
        """A response for each row; rows [g * groups, (g + 1) * groups) are those of one prompt. Of `sampling` count
        `max_new_tokens` and `vocabulary_size`. The log-probabilities are the model's, without the penalty."""
        rows, device = len(prompts), prompts.input_ids.device
        mask = prompts.attention_mask.bool()
        ids, cache, ended = prompts.input_ids, None, torch.zeros(rows, dtype=torch.bool, device=device)
        tokens, logprobs, counted = [], [], []
        for _step in range(sampling.max_new_tokens):
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            said = self.model(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = said.past_key_values
            likely = said.logits[:, -1, : sampling.vocabulary_size].float().log_softmax(-1)
            chosen = self._choose(likely, ended)
            tokens.append(torch.where(ended, self.pad_token_id, chosen))
            logprobs.append(likely.gather(1, chosen.unsqueeze(1)).squeeze(1).masked_fill(ended, 0.0))
            counted.append(~ended)
            ended = ended | torch.isin(chosen, self.eos_ids.to(device))
            if bool(ended.all()):
                break
            ids, mask = tokens[-1].unsqueeze(1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return Rollout(
            prompts.input_ids,
            prompts.attention_mask.bool(),
            torch.stack(tokens, dim=1),
            torch.stack(counted, dim=1),
            torch.stack(logprobs, dim=1),
        )

    def _choose(self, likely: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """The token of each row [B] by log-probabilities [B, V]; groups that have ended choose nothing that counts."""
        by_prompt = likely.view(-1, self.groups, likely.shape[-1])
        taken = torch.zeros_like(by_prompt[:, 0])
        chosen = []
        for group in range(self.groups):
            token = (by_prompt[:, group] - self.penalty * taken).argmax(-1, keepdim=True)
            running = (~ended.view(-1, self.groups)[:, group]).to(taken).unsqueeze(1)
            taken.scatter_add_(1, token, running)
            chosen.append(token)
        return torch.cat(chosen, dim=1).flatten()
