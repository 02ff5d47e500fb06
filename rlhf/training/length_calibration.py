"""How a score follows length among the actor's own responses, and taking that off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.numerics.local_regression import Curve, within_groups
from rlhf.numerics.statistics import correlation, without_group_means

SPAN = 0.2
"""Share of the responses that each place of the curve is fitted to. A reward model's score may turn sharply where
responses become short, or reach the limit and no longer end; a wide window would smooth that away."""


@dataclass(frozen=True)
class LengthCalibration:
    """A length curve of the actor's own responses, and the correlation within prompts without and with it.

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
        return cls.told(scores, tokens, curve, copies=copies)

    @classmethod
    def told(cls, scores: torch.Tensor, tokens: torch.Tensor, curve: Curve, *, copies: int) -> LengthCalibration:
        """What `curve` does to these responses."""
        scores, tokens = scores.cpu().double(), tokens.cpu().double()
        groups = torch.arange(len(scores)) // copies
        left = scores - curve.at(tokens).double()
        return cls(curve, within_prompts(scores, tokens, groups), within_prompts(left, tokens, groups))


class LengthCurves:
    """The curves of a run: `first`, of the actor as it starts, by which evaluations can be compared, and `last`, which
    training takes off. Each is fitted to all responses so far; None before the first of them."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.tokens: list[float] = []
        self.first: Curve | None = None
        self.last: Curve | None = None

    def add(self, scores: torch.Tensor, tokens: torch.Tensor, *, copies: int) -> LengthCalibration:
        """Fit to these responses, see `LengthCalibration.of`, beside the earlier ones; what it tells is of these."""
        self.scores += scores.tolist()
        self.tokens += tokens.tolist()
        found = LengthCalibration.of(torch.tensor(self.scores), torch.tensor(self.tokens), copies=copies)
        self.last = found.curve
        self.first = self.first or found.curve
        return LengthCalibration.told(scores, tokens, found.curve, copies=copies)

    def state(self) -> dict[str, Any]:
        """What `load_state` restores, as JSON."""
        curves = {"first": self.first, "last": self.last}
        contents = {name: None if curve is None else curve.content() for name, curve in curves.items()}
        return {"scores": self.scores, "tokens": self.tokens, **contents}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.scores, self.tokens = list(state["scores"]), list(state["tokens"])
        self.first, self.last = (
            None if state[name] is None else Curve.read(state[name]) for name in ("first", "last")
        )  # fmt: skip


def within_prompts(scores: torch.Tensor, tokens: torch.Tensor, prompts: torch.Tensor) -> float:
    """Correlation of scores and lengths [B] less the means of their prompt, which `prompts` [B] numbers from 0."""
    return correlation(without_group_means(scores, prompts), without_group_means(tokens, prompts))
