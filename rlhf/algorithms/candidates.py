"""What an offline loss is given: the candidate responses of some prompts, which is better, and how likely they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from rlhf.algorithms.config import OfflineConfig
from rlhf.algorithms.ranking_losses import ranked_pairs


@dataclass(frozen=True)
class Candidates:
    """N responses to G prompts. `logprobs`, `ref_logprobs` [N] are sums of log pi over the response, its end included,
    of the actor and of the reference (0 where a loss needs none); `tokens` [N] counts what they are sums over.
    `groups` [N] is the prompt (0 .. G-1) of each row, `ranks` [N], 0 is best."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    tokens: torch.Tensor
    groups: torch.Tensor
    ranks: torch.Tensor

    @cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (better, worse) of every pair of one prompt whose ranks differ: [M] each."""
        return ranked_pairs(self.groups, self.ranks)

    @cached_property
    def pair_weights(self) -> torch.Tensor:
        """1 / pairs of its prompt, for each pair [M]: every prompt weighs the same."""
        prompt = self.groups[self.pairs[0]]
        return 1.0 / torch.bincount(prompt, minlength=int(self.groups.max()) + 1)[prompt]

    def rows(self, kept: torch.Tensor) -> Candidates:
        """Those of the mask `kept` [N]."""
        return Candidates(*(getattr(self, item.name)[kept] for item in fields(self)))

    @property
    def prompts(self) -> float:
        """Prompts that have a pair."""
        return float(self.groups[self.pairs[0]].unique().numel())

    @cached_property
    def best(self) -> torch.Tensor:
        """The first of the best responses of each prompt that has a pair: rows [prompts]."""
        paired = torch.zeros_like(self.groups, dtype=torch.bool)
        paired[self.pairs[0]] = True
        rows = (paired & (self.ranks == 0)).nonzero().flatten()
        groups = self.groups[rows]
        first = torch.ones_like(groups, dtype=torch.bool)
        first[1:] = groups[1:] != groups[:-1]
        return rows[first]

    def mean_over_pairs(self, per_pair: torch.Tensor) -> torch.Tensor:
        """`per_pair` [M] as its mean over the pairs of a prompt, summed over prompts."""
        return (per_pair * self.pair_weights).sum()

    def imitation(self) -> torch.Tensor:
        """-log pi of the best response by token, summed over prompts: SFT in which prompts weigh alike."""
        return -(self.logprobs[self.best] / self.tokens[self.best]).sum()


Loss = Callable[[Candidates, OfflineConfig], torch.Tensor]
"""The loss summed over the prompts that have a pair."""
Margin = Callable[[Candidates, OfflineConfig], torch.Tensor]
"""By how much the better response of each pair is preferred [M]: what `accuracy` and `margin` are told of."""


@dataclass(frozen=True)
class OfflineLoss:
    """A row of `OFFLINE_LOSSES`; which constants it has stands in `rlhf.algorithms.config.OFFLINE_CONSTANTS`."""

    loss: Loss
    margin: Margin
    needs_reference: bool
