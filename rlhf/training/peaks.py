"""The best evaluation so far by each measure that may choose a model, and how far the newest one is below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlhf.numerics.intervals import standard_error

UNSEEN = ("gold", "held_out_score")
"""Measures of an evaluation that training never sees: what the optimised score can be held against."""


@dataclass
class Peak:
    """The best evaluation by one measure. `score` is what was optimised, `since` the evaluations after it."""

    iteration: int
    value: float
    score: float
    prompt_values: list[float]
    since: int = 0


class Peaks:
    """The peaks of a run by measure: those of UNSEEN, and the "reward" that is optimised."""

    def __init__(self) -> None:
        self.found: dict[str, Peak] = {}

    def look(self, iteration: int, evaluation: Mapping[str, Any]) -> dict[str, float]:
        """Take in an evaluation; how far it is below the peaks of UNSEEN, each over the same prompts.

        "NAME_fall" is the peak less the newest value, "NAME_fall_error" its standard error over prompts,
        "NAME_fall_since" the peak's iteration and "NAME_fall_score" the rise of the optimised score since then. At a
        peak, and of fewer than two prompts, which have no error, nothing is said.
        """
        numbers: dict[str, float] = {}
        for name in (*UNSEEN, "reward"):
            if name not in evaluation:
                continue
            values = evaluation.get("prompt_measures", {}).get(name, [])
            now = Peak(iteration, evaluation[name], evaluation["score"], values)
            peak = self.found.get(name)
            if peak is None or now.value > peak.value:
                self.found[name] = now
                continue
            peak.since += 1
            if name in UNSEEN and len(values) > 1:
                falls = torch.tensor(peak.prompt_values) - torch.tensor(values)
                numbers |= {
                    f"{name}_fall": float(falls.mean()),
                    f"{name}_fall_error": standard_error(falls),
                    f"{name}_fall_since": float(peak.iteration),
                    f"{name}_fall_score": now.score - peak.score,
                }
        return numbers

    def state(self) -> dict[str, Any]:
        """What `load_state` restores."""
        return {name: asdict(peak) for name, peak in self.found.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        self.found = {name: Peak(**entry) for name, entry in state.items()}
