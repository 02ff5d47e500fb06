"""RewardBench 2's scoring of a reward model (Malik et al., arXiv 2506.01937): best of four, and ties.

Own code after their paper, section 3 and appendix; in words: a prompt of the other subsets has one right response
among four. One of `Ties` has many, and comes in two forms: `ref:N` with a single right one, `tied:N` with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from rlhf.data.spec import DataError, Row
from rlhf.numerics.intervals import bootstrap_interval

TIES = "ties"
COLUMNS = ("prompt", "chosen", "rejected", "subset", "id")


@dataclass(frozen=True)
class BenchRow:
    """A prompt with its right responses and its wrong ones."""

    id: str
    subset: str
    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def responses(self) -> tuple[str, ...]:
        """The right ones, then the wrong ones."""
        return (*self.right, *self.wrong)


def has_bench_shape(values: Mapping[str, Any]) -> bool:
    """Whether a row has the columns of RewardBench 2, lists of responses among them."""
    return all(name in values for name in COLUMNS) and all(
        isinstance(values[name], list) for name in ("chosen", "rejected")
    )


def bench_row(row: Row) -> BenchRow:
    """A row of a file of that shape. DataError for one that is not."""
    values = row.values
    if not has_bench_shape(values):
        raise DataError(
            f"{row.file}:{row.line}: a row of RewardBench 2's shape has {', '.join(COLUMNS)}, with lists of responses "
            f"as chosen and rejected; this one has {', '.join(values)}"
        )
    right, wrong = tuple(map(str, values["chosen"])), tuple(map(str, values["rejected"]))
    if not right or not wrong:
        raise DataError(
            f"{row.file}:{row.line}: {len(right)} chosen and {len(wrong)} rejected: at least one of each is needed"
        )
    return BenchRow(str(values["id"]), str(values["subset"]), str(values["prompt"]), right, wrong)


def bench_scores(rows: Sequence[BenchRow], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The score of each subset and their mean, "score", by which models are ranked; `scores` as `BenchRow.responses`.

    Of `Ties` also its parts. The other subsets have the 95% interval "low", "high" over prompts (bootstrap).
    DataError for a subset with several right responses, which is not called Ties.
    """
    by_subset: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_subset.setdefault(row.subset, []).append(index)
    subsets: dict[str, dict[str, Any]] = {}
    for name, indices in by_subset.items():
        if name.lower() == TIES:
            subsets[name] = {**ties_score([rows[index] for index in indices], [scores[index] for index in indices])}
        else:
            credits = torch.tensor([best_of(rows[index], scores[index]) for index in indices])
            low, high = bootstrap_interval(credits, torch.arange(len(indices)))
            subsets[name] = {"score": float(credits.mean()), "low": low, "high": high}
        subsets[name]["prompts"] = len(indices)
    return {"score": fmean(subset["score"] for subset in subsets.values()), "subsets": subsets}


def best_of(row: BenchRow, scores: Sequence[float]) -> float:
    """1 where the right response has the highest score alone; where it shares it with others one of their number."""
    if len(row.right) != 1:
        raise DataError(f"row {row.id!r} of subset {row.subset!r} has {len(row.right)} right responses: only Ties may")
    best = max(scores)
    return 1 / sum(score == best for score in scores) if scores[0] == best else 0.0


def ties_score(rows: Sequence[BenchRow], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """The weighted sum of `Ties` and its parts.

    Accuracy, 0.3 each over `ref` and over `tied` rows: every right response has more than every wrong one. Over prompts
    that have both: 0.2 for those whose tied right ones lie closer together than the worst of them to the best wrong
    one, 0.2 for those of which that also holds with the single right one, and 0.01 for tanh(margin / spread - 1).
    DataError for an id that begins with neither.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for row, numbers in zip(rows, scores, strict=True):
        kind, _, prompt = row.id.partition(":")
        if kind not in found or not prompt:
            raise DataError(f"row {row.id!r} of subset {row.subset!r}: an id there is ref:N or tied:N")
        right, wrong = numbers[: len(row.right)], numbers[len(row.right) :]
        found[kind][prompt] = (max(right) - min(right), min(right) - max(wrong))
    accuracy = {
        kind: fmean(float(margin > 0) for _, margin in each.values()) if each else 0.0 for kind, each in found.items()
    }
    both = [prompt for prompt in found["tied"] if prompt in found["ref"]]
    spread = [found["tied"][prompt][0] for prompt in both]
    tied = [found["tied"][prompt][1] for prompt in both]
    hard = [min(found["tied"][prompt][1], found["ref"][prompt][1]) for prompt in both]
    parts = {
        "tied_accuracy": accuracy["tied"],
        "ref_accuracy": accuracy["ref"],
        "preferred": _mean(float(margin > width) for margin, width in zip(tied, spread, strict=True)),
        "preferred_hard": _mean(float(margin > width) for margin, width in zip(hard, spread, strict=True)),
        "margin": _mean(_relative(margin, width) for margin, width in zip(hard, spread, strict=True)),
    }
    weights = {"tied_accuracy": 0.3, "ref_accuracy": 0.3, "preferred": 0.2, "preferred_hard": 0.2, "margin": 0.01}
    return {"score": sum(weight * parts[name] for name, weight in weights.items()), **parts}


def _mean(values: Any) -> float:
    found = list(values)
    return fmean(found) if found else 0.0


def _relative(margin: float, spread: float) -> float:
    """tanh(margin / spread - 1); where there is no spread its limit, and 0 for 0 / 0."""
    if spread == 0:
        return math.copysign(1.0, margin) if margin else 0.0
    return math.tanh(margin / spread - 1)
