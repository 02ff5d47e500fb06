"""The responses of a run's rollouts that were kept for reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.doctor.report import read_lines
from rlhf.training.rollout_samples import ROLLOUTS_FILE


class NoRolloutsError(ValueError):
    """A run without kept responses, or without such as were asked for; says what there is."""


Order = Literal["worst", "best", "last"]


@dataclass(frozen=True)
class KeptResponses:
    """The lines of `rollouts.jsonl`, see `rlhf.training.rollout_samples.rollout_lines`, and what could not be read."""

    path: Path
    lines: Sequence[dict[str, Any]]
    notes: Sequence[str] = ()

    @classmethod
    def read(cls, directory: Path) -> KeptResponses:
        """Of a run, or of its on-policy stage. NoRolloutsError where there are none."""
        places = [directory / ROLLOUTS_FILE, *sorted(directory.glob(f"*/{ROLLOUTS_FILE}"))]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise NoRolloutsError(
                f"{directory} has no {ROLLOUTS_FILE}: step 3 writes it as it samples, where keep_samples is above 0"
            )
        entries, notes = read_lines(path)
        needed = {"iteration", "prompt", "response", "score"}
        lines = [entry for entry in entries if needed <= entry.keys()]
        if not lines:
            raise NoRolloutsError(f"{path} has no line yet: the first comes with the first rollout")
        return cls(path, lines, notes)

    def chosen(
        self,
        *,
        iteration: int | None = None,
        order: Order = "last",
        contains: str = "",
        count: int = 5,
    ) -> list[dict[str, Any]]:
        """`count` of them: of one `iteration` or all, whose texts hold `contains`, the lowest or the highest scores
        first, or the newest. NoRolloutsError where there is no such iteration."""
        found = list(self.lines)
        if iteration is not None:
            found = [line for line in found if line["iteration"] == iteration]
            if not found:
                there = sorted({line["iteration"] for line in self.lines})
                raise NoRolloutsError(f"{self.path} has no iteration {iteration}: it has {there[0]} to {there[-1]}")
        found = [line for line in found if contains in line["prompt"] or contains in line["response"]]
        if order == "last":
            return list(reversed(found))[:count]
        return sorted(found, key=lambda line: line["score"], reverse=order == "best")[:count]
