"""What a reward model is trained with: losses of pairs and of rankings of K responses, as pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F

from rlhf.config import ConfigError
from rlhf.numerics.intervals import effective_number

COMPARED_AT_ONCE = 4096
"""Candidates that are compared with one another in one matrix."""
BUCKETS, RARER_SIDE = 10, 0.05
"""Buckets of length differences at most, and the least share of a bucket's pairs that its rarer side has."""


def ranked_pairs(groups: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (better, worse) of every pair of one prompt whose ranks differ: two index tensors [pairs].

    `groups`, `ranks` [N]. Ties make no pair.
    """
    if len(groups) <= COMPARED_AT_ONCE or bool((groups[1:] < groups[:-1]).any()):
        return _pairs_of(groups, ranks)
    # Some whole prompts at a time, which gives the same pairs in the same order: all at once take N^2 places.
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    start = end = 0
    for size in [*groups.unique_consecutive(return_counts=True)[1].tolist(), COMPARED_AT_ONCE]:
        if end > start and end + size - start > COMPARED_AT_ONCE:
            first, second = _pairs_of(groups[start:end], ranks[start:end])
            found.append((first + start, second + start))
            start = end
        end += size
    return torch.cat([first for first, _ in found]), torch.cat([second for _, second in found])


def _pairs_of(groups: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    same_prompt = groups.unsqueeze(1) == groups.unsqueeze(0)
    better = ranks.unsqueeze(1) < ranks.unsqueeze(0)
    first, second = (same_prompt & better).nonzero(as_tuple=True)
    return first, second


def ranking_loss(
    scores: torch.Tensor,
    groups: torch.Tensor,
    ranks: torch.Tensor,
    margins: torch.Tensor,
    *,
    centering_coef: float = 0.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bradley-Terry loss of rankings, summed over prompts; every prompt weighs the same.

    Per prompt the mean over its pairs (i better than j) of -log sigmoid(s_i - s_j - margin): InstructGPT
    (arXiv 2203.02155) eq. 1 with 1 / C(K, 2), ties left out; the margin as in Llama 2 (arXiv 2307.09288) eq. 2.
    `centering_coef` adds the mean of (s_i + s_j)^2, which keeps scores near 0 (Eisenstein et al., arXiv 2312.09244).
    `scores`, `groups`, `ranks`, `margins` [N]; 0 when no pair differs in rank. `weights` [pairs] weigh the pairs, in
    the order of `ranked_pairs` (None: alike); the mean over a prompt's pairs is still divided by their number.
    """
    better, worse = ranked_pairs(groups, ranks)
    if better.numel() == 0:
        return scores.sum() * 0.0
    loss = -F.logsigmoid(scores[better] - scores[worse] - margins[better])
    if centering_coef:
        loss = loss + centering_coef * (scores[better] + scores[worse]) ** 2
    if weights is not None:
        loss = weights * loss
    pairs_per_prompt = torch.bincount(groups[better], minlength=int(groups.max()) + 1)
    return (loss / pairs_per_prompt[groups[better]]).sum()


# ------------------------------------------------------------------------------------- length_control: balance


@dataclass(frozen=True)
class LengthBalance:
    """Weights under which the longer response is the chosen one as often as the shorter one.

    A pair (i better than j) has the length difference d = tokens_i - tokens_j and, in `ranking_loss`, the share
    m = 1 / (pairs of its ranking). Pairs with d != 0 lie in buckets of |d|, ends included: (0, e_1], (e_1, e_2], ...,
    with edges at equal shares of the pairs. In a bucket let M+ be the sum of m where the longer one is chosen (d > 0)
    and M- where the shorter one is. A pair of side s weighs (M+ + M-) / (2 M_s): each side then has half of the
    bucket's loss, and the bucket what it had. Pairs of equal length weigh 1. Where a side would have less than
    `RARER_SIDE` of a bucket, buckets are joined; no pair is left out.

    `edges` [buckets], the last one infinite; `longer`, `shorter` the weights of the two sides by bucket; `counts` the
    pairs of either.
    """

    edges: tuple[float, ...]
    longer: tuple[float, ...]
    shorter: tuple[float, ...]
    counts: tuple[tuple[int, int], ...]
    equal: int

    @classmethod
    def of(cls, differences: torch.Tensor, shares: torch.Tensor) -> Self:
        """The weights for pairs with length differences [pairs] in tokens and `shares` [pairs] of the loss.

        Raises ConfigError when one side has no pair, or neither: nothing can be balanced then.
        """
        unlike = differences != 0
        size, share = differences[unlike].abs().double(), shares[unlike].double()
        longer = differences[unlike] > 0
        if len(size) == 0:
            raise ConfigError(
                f"length_control=balance: all {len(differences)} training pairs are of equal length (in tokens, cut to "
                "max_response_tokens), so there is nothing to balance; use length_control=none"
            )
        if not longer.any() or longer.all():
            side = "longer" if longer.any() else "shorter"
            raise ConfigError(
                f"length_control=balance: the {side} response is the chosen one in all {len(size)} pairs that differ "
                "in length, so that no weights make both sides equal; use length_control=calibrate or odin, or other "
                "data"
            )
        quantiles = torch.quantile(size, torch.linspace(0, 1, BUCKETS + 1, dtype=torch.float64)[1:-1])
        edges = [*quantiles.floor().unique().tolist(), math.inf]
        masses = _side_masses(size, share, longer, edges)
        edges, masses = _joined(edges, masses)
        counts = _side_masses(size, torch.ones_like(share), longer, edges)
        return cls(
            edges=tuple(edges),
            longer=tuple((more + less) / (2 * more) for more, less in masses),
            shorter=tuple((more + less) / (2 * less) for more, less in masses),
            counts=tuple((round(more), round(less)) for more, less in counts),
            equal=int((~unlike).sum()),
        )

    def weights(self, differences: torch.Tensor) -> torch.Tensor:
        """The weight of each pair by its length difference [pairs] in tokens: [pairs] float32."""
        table = torch.tensor([self.longer, self.shorter], device=differences.device)
        edges = torch.tensor(self.edges[:-1], dtype=torch.float64, device=differences.device)
        bucket = torch.searchsorted(edges, differences.abs().double())
        weights = table[(differences < 0).long(), bucket]
        return torch.where(differences == 0, torch.ones_like(weights), weights)

    def lines(self) -> list[str]:
        """What was counted, and how the sides are weighed."""
        more, less = (sum(pair[side] for pair in self.counts) for side in (0, 1))
        each = [
            weight
            for up, down, pair in zip(self.longer, self.shorter, self.counts, strict=True)
            for weight, count in zip((up, down), pair, strict=True)
            for _ in range(count)
        ]
        worth = effective_number(torch.tensor(each))
        lines = [
            f"length_control=balance: {more + less} pairs differ in length and {self.equal} do not; the longer "
            f"response is chosen in {more} and the shorter one in {less}; weighted they tell as much as {worth:.0f} "
            "pairs"
        ]
        start = 0.0
        for edge, (longer, shorter), up, down in zip(self.edges, self.counts, self.longer, self.shorter, strict=True):
            end = "more" if math.isinf(edge) else f"{edge:.0f}"
            lines.append(
                f"  {start + 1:.0f} to {end} tokens apart: {longer} longer x {up:.2f}, {shorter} shorter x {down:.2f}"
            )
            start = edge
        return lines


def _side_masses(
    size: torch.Tensor, share: torch.Tensor, longer: torch.Tensor, edges: list[float]
) -> list[tuple[float, float]]:
    """The shares of the pairs of each bucket, of those where the longer one is chosen and of the others."""
    bucket = torch.searchsorted(torch.tensor(edges[:-1], dtype=torch.float64), size)
    sums = torch.zeros(len(edges), 2, dtype=torch.float64)
    sums.index_put_((bucket, (~longer).long()), share.double(), accumulate=True)
    return [(more, less) for more, less in sums.tolist()]


def _joined(edges: list[float], masses: list[tuple[float, float]]) -> tuple[list[float], list[tuple[float, float]]]:
    """Neighbouring buckets joined, from the smallest differences up, until each has enough of both sides."""

    def enough(pair: tuple[float, float]) -> bool:
        return min(pair) > 0 and min(pair) >= RARER_SIDE * sum(pair)

    kept: list[tuple[float, tuple[float, float]]] = []
    waiting = (0.0, 0.0)
    for edge, mass in zip(edges, masses, strict=True):
        waiting = (waiting[0] + mass[0], waiting[1] + mass[1])
        if enough(waiting):
            kept.append((edge, waiting))
            waiting = (0.0, 0.0)
    while sum(waiting) > 0 and not enough(waiting) and kept:
        _, before = kept.pop()
        waiting = (waiting[0] + before[0], waiting[1] + before[1])
    if sum(waiting) > 0:
        kept.append((math.inf, waiting))
    kept[-1] = (math.inf, kept[-1][1])
    return [edge for edge, _ in kept], [mass for _, mass in kept]
