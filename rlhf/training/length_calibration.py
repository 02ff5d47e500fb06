"""How a score follows length among the actor's own responses, and taking that off."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.numerics.local_regression import Curve, within_groups
from rlhf.numerics.statistics import correlation, without_group_means

SPAN = 0.2
"""Share of the responses that each place of the curve is fitted to. A reward model's score may turn sharply where
responses become short, or reach the limit and no longer end; a wide window would smooth that away."""


@dataclass(frozen=True)
class LengthCalibration:
    """A length curve of the actor's responses before training, and the correlation within prompts without and with it.

    With the curve taken off those responses have a mean score of 0.
    """

    curve: Curve
    before: float
    after: float

    @classmethod
    def of(cls, scores: torch.Tensor, tokens: torch.Tensor, *, copies: int) -> LengthCalibration:
        """From scores and lengths in tokens [B] of `copies` responses to each prompt, one prompt after the other.

        Huang et al. (arXiv 2409.17407) fit r - E[r | length] to the responses that are to be scored; here each prompt
        has a level of its own beside, so that prompts that call for longer answers are not punished for it. No
        response counts less for being an outlier: PPO finds those.
        """
        scores, tokens = scores.cpu().double(), tokens.cpu().double()
        groups = torch.arange(len(scores)) // copies
        found = within_groups(tokens, scores, groups, span=SPAN, robust_passes=0)
        mean = float((scores - found.at(tokens).double()).mean())
        curve = Curve(found.places, tuple(value + mean for value in found.values))
        left = scores - curve.at(tokens).double()
        return cls(curve, within_prompts(scores, tokens, groups), within_prompts(left, tokens, groups))


def within_prompts(scores: torch.Tensor, tokens: torch.Tensor, prompts: torch.Tensor) -> float:
    """Correlation of scores and lengths [B] less the means of their prompt, which `prompts` [B] numbers from 0."""
    return correlation(without_group_means(scores, prompts), without_group_means(tokens, prompts))
