"""Scores of single rewards brought to mean 0 and variance 1, over whole rollouts of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.rewards.reward import RewardPart

SMALLEST_STD = 1e-6
"""Scores that spread by less are all the same but for rounding: their mean is taken off, and they are not divided."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of the scores so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_more(self, scores: torch.Tensor) -> Moments:
        """With `scores` [B] too (Chan et al. 1979, eq. 1.5)."""
        values = scores.detach().double().cpu()
        count, mean = len(values), float(values.mean())
        total, apart = self.count + count, mean - self.mean
        squares = self.squares + float(((values - mean) ** 2).sum()) + apart**2 * self.count * count / total
        return Moments(total, self.mean + apart * count / total, squares)

    def normalized(self, scores: torch.Tensor) -> torch.Tensor:
        """(scores - mean) / std, with the standard deviation of the population."""
        std = (self.squares / self.count) ** 0.5
        return (scores - self.mean) / (std if std > SMALLEST_STD else 1.0)


class ScoreNormalization:
    """Which parts of a score are normalised, and by which moments.

    Of the `parts` those that say how: `fixed` takes the moments of the first responses that were scored in
    the run (those of the evaluation before training, where there is one), `running` those of these and of all rollouts
    so far. Evaluations take the first ones always, so that they can be compared.
    """

    def __init__(self, parts: Sequence[RewardPart]) -> None:
        self.parts = [part for part in parts if part.normalize is not None]
        self.first: dict[str, Moments] = {}
        self.all: dict[str, Moments] = {}

    def apply(
        self, scores: torch.Tensor, part_scores: torch.Tensor, names: Sequence[str], *, evaluation: bool
    ) -> torch.Tensor:
        """`scores` [B] with the normalised parts in the place of the raw ones; `part_scores` [B, N] by `names`.

        The moments of a rollout include its own scores.
        """
        for part in self.parts:
            name, raw = part.name, part_scores[:, names.index(part.name)]
            if name not in self.first:
                self.first[name] = self.all[name] = Moments().with_more(raw)
            elif not evaluation:
                self.all[name] = self.all[name].with_more(raw)
            moments = self.first[name] if evaluation or part.normalize == "fixed" else self.all[name]
            scores = scores + part.weight * (moments.normalized(raw) - raw)
        return scores

    def state(self) -> dict[str, Any]:
        """What `load_state` restores, as JSON."""
        return {
            which: {name: [each.count, each.mean, each.squares] for name, each in moments.items()}
            for which, moments in (("first", self.first), ("all", self.all))
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.first, self.all = (
            {name: Moments(*each) for name, each in state[which].items()} for which in ("first", "all")
        )
