"""How one token is drawn from a row of logits, with a random stream of the row's own.

The streams are keyed by (seed, iteration, row id). The response to a prompt therefore depends neither on the rank
that samples it nor on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 128
"""Tokens of the vocabulary that are summed before the cumulative sum: it then runs over V / 128 blocks, not over V."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `top_k` 0 and `top_p` 1 are off; `greedy` takes the likeliest token.

    Ids at or beyond `vocabulary_size` (None: none are) have probability 0. They are rows of the embedding that the
    tokenizer has no token for: Polyglot-ko has 30,003 tokens in 30,080 rows.
    Raises ValueError for a temperature or vocabulary_size that is not positive, a negative top_k, or a top_p outside
    (0, 1].
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    vocabulary_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; for the likeliest token use greedy=True")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k} must be >= 0 (0 is off) and top_p={self.top_p} in (0, 1] (1 is off)")
        if self.vocabulary_size is not None and self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size={self.vocabulary_size} must be at least 1, or None for every row")


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


def sample_tokens(
    logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token per row of logits [B, V] with uniforms [B], and its log-probability under what was sampled: [B], [B].

    The log-probability is logit - logsumexp(logits) at the drawn token: the log-softmax of the other V - 1 tokens is
    never formed, and the sum of the draw serves for both.
    """
    logits = logits[:, : sampling.vocabulary_size]
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits = filter_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p)
    if sampling.greedy:
        token = logits.argmax(-1)
        total = logits.logsumexp(-1)
        return token, logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - total
    peak = logits.amax(-1, keepdim=True)
    token, total = _inverse_cdf((logits - peak).exp_(), uniforms)
    chosen = logits.gather(-1, token.unsqueeze(-1)) - peak
    return token, chosen.squeeze(-1) - total.log().float()


def _inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token whose cumulative weight exceeds uniform * total: tokens [B], totals float64 [B].

    Sums run in float64, so that their rounding is far below any token's probability. The search is in two levels,
    first for the block of tokens, then inside it: a cumulative sum over all V tokens would cost more than the head.
    """
    rows, vocabulary = weights.shape
    blocks, rest = divmod(vocabulary, BLOCK)
    sums = weights[:, : blocks * BLOCK].reshape(rows, blocks, BLOCK).sum(-1, dtype=torch.float64)
    if rest:
        sums = torch.cat([sums, weights[:, blocks * BLOCK :].sum(-1, keepdim=True, dtype=torch.float64)], dim=1)
    cumulative = sums.cumsum(-1)
    threshold = uniforms.unsqueeze(-1).double() * cumulative[:, -1:]
    block = _first_above(cumulative, threshold)
    inside = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    members = weights.gather(-1, inside.clamp(max=vocabulary - 1)).double()
    if rest:
        members = members.masked_fill(inside >= vocabulary, 0.0)
    before = cumulative.gather(-1, block) - sums.gather(-1, block)
    token = block * BLOCK + _first_above(members.cumsum(-1), threshold - before)
    return token.squeeze(-1), cumulative[:, -1]


def _first_above(cumulative: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Index [B, 1] of the first entry of `cumulative` [B, n] above `threshold` [B, 1].

    A threshold at or beyond the end (by rounding) is brought below it, so that an entry without weight of its own,
    a token that cannot be drawn, is never found.
    """
    last = cumulative[:, -1:]
    below_the_end = torch.nextafter(last, torch.zeros_like(last))
    return torch.searchsorted(cumulative, torch.minimum(threshold, below_the_end), right=True)
