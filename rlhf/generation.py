"""Sample responses from an actor: PromptBatch -> Rollout.

Each row draws from its own stream of random numbers, keyed by (seed, iteration, row id). What a prompt's
response is therefore depends neither on the rank that computes it nor on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf.distributed import all_reduce_sum
from rlhf.forward import innermost, model_arguments
from rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `top_k` 0 and `top_p` 1 are off; `greedy` takes the likeliest token.

    Raises ValueError for a temperature that is not positive, a negative top_k, or a top_p outside (0, 1].
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; for the likeliest token use greedy=True")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k} must be >= 0 (0 is off) and top_p={self.top_p} in (0, 1] (1 is off)")

    @property
    def filtered(self) -> bool:
        """True when tokens are drawn from another distribution than softmax(logits / temperature)."""
        return self.greedy or self.top_k > 0 or self.top_p < 1


def row_uniforms(seed: int, iteration: int, row_ids: Sequence[int], steps: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for every row and step: float64 [B, steps], a counter-based stream per row."""
    keys = [(seed % 2**64, (iteration % 2**32) << 32 | (row % 2**32)) for row in row_ids]
    # without a dtype numpy makes float64 of integers above 2**63, and rows would share a stream
    streams = [np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64))) for key in keys]
    return torch.from_numpy(np.stack([stream.random(steps) for stream in streams]))


def filter_logits(logits: torch.Tensor, *, top_k: int, top_p: float) -> torch.Tensor:
    """Set logits [B, V] outside the top-k, then outside the nucleus of mass top_p (Holtzman et al. 2020), to -inf."""
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return logits


def draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sample of one token per row from log-probabilities [B, V] with uniforms [B]: [B].

    The cumulative sum runs in float64, so that its rounding is far below any token's probability.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    likeliest_last = (
        (logprobs > -torch.inf).long().mul(torch.arange(logprobs.shape[1], device=logprobs.device)).amax(-1)
    )
    return torch.minimum(token, likeliest_last)  # a threshold at the very end must not fall on an impossible token


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: PromptBatch,
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int = 0,
    iteration: int = 0,
    synchronised: bool = False,
) -> Rollout:
    """Sample one response per prompt with a key/value cache.

    `logprobs` of the rollout are captured while sampling, from the distribution that was sampled. A response
    ends with an end-of-sequence token (inside its mask) or at `max_new_tokens`. T is the longest response.
    `synchronised` keeps every rank stepping until all are done, as ZeRO-3 needs: its forward is a collective.
    The model's training mode is the caller's business; dropout must be off.
    """
    device = prompts.input_ids.device
    uniforms = row_uniforms(seed, iteration, prompts.row_ids.tolist(), sampling.max_new_tokens).to(device)
    eos = torch.tensor(list(eos_token_ids), device=device)
    attention = prompts.attention_mask.bool()
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    step_ids = prompts.input_ids
    cache: Any = None
    tokens, masks, logprobs = [], [], []
    for step in range(sampling.max_new_tokens):
        logits, cache = _next_logits(model, step_ids, attention, cache)
        token, logprob = _sample(logits, sampling, uniforms[:, step])
        tokens.append(torch.where(alive, token, torch.full_like(token, pad_token_id)))
        masks.append(alive)
        logprobs.append(torch.where(alive, logprob, torch.zeros_like(logprob)))
        attention = torch.cat([attention, alive.unsqueeze(1)], dim=1)
        alive = alive & ~torch.isin(token, eos)
        remaining = alive.sum().float()
        if synchronised:
            remaining = all_reduce_sum(remaining)
        if remaining == 0:
            break
        step_ids = tokens[-1].unsqueeze(1)
    return Rollout(
        prompt_ids=prompts.input_ids,
        prompt_mask=prompts.attention_mask.bool(),
        response_ids=torch.stack(tokens, dim=1),
        response_mask=torch.stack(masks, dim=1),
        logprobs=torch.stack(logprobs, dim=1),
    )


def _next_logits(model: nn.Module, ids: torch.Tensor, attention: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    if cache is None:
        from transformers import DynamicCache

        config: Any = innermost(model).config
        cache = DynamicCache(config=config)
    arguments = model_arguments(model, attention, use_cache=True, past_key_values=cache, logits_to_keep=1)
    if "position_ids" in arguments:
        arguments["position_ids"] = arguments["position_ids"][:, -ids.shape[1] :]
    output = model(input_ids=ids, **arguments)
    return output.logits[:, -1].float(), output.past_key_values


def _sample(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits = filter_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    logprobs = logits.log_softmax(-1)
    token = logprobs.argmax(-1) if sampling.greedy else draw(logprobs, uniforms)
    return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
