"""A run's history and what checks ask of it: its first lines, its last lines, how long a figure has been bad.

A history is a list of dicts, one for each line of `metrics.jsonl`, with "step" and numbers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from rlhf.doctor.findings import Finding, Severity, finding
from rlhf.doctor.limits import KEPT_FIRST, KEPT_LAST

Line = Mapping[str, float]
History = Sequence[Line]
Point = tuple[int, float]


def series(history: History, name: str) -> list[Point]:
    """(step, value) of every line that has the metric `name`."""
    return [(int(line["step"]), float(line[name])) for line in history if name in line]


def condensed(history: History) -> list[Line]:
    """The lines that checks look at, in order: the first and the last of training and of evaluation, and that of the
    model that is kept."""
    models = (best_evaluation(history), kept_evaluation(history))
    kept = {index for index, line in enumerate(history) if any(line is one for one in models)}
    for evaluation in (False, True):
        places = [index for index, line in enumerate(history) if _is_evaluation(line) == evaluation]
        kept.update(places[:KEPT_FIRST], places[-KEPT_LAST:])
    return [line for index, line in enumerate(history) if index in kept]


def best_evaluation(history: History) -> Line | None:
    """The evaluation after training began whose loss is the lowest: that of the model that is kept. None before one."""
    lines = [line for line in history if line["step"] > 0 and math.isfinite(line.get("eval_loss", math.nan))]
    return min(lines, key=lambda line: line["eval_loss"], default=None)


def kept_evaluation(history: History) -> Line | None:
    """The evaluation of the actor that an on-policy run keeps; None before one. An earlier release kept the last."""
    lines = [line for line in history if "eval_score" in line]
    if not lines:
        return None
    step = lines[-1].get("eval_kept_step", lines[-1]["step"])
    return next((line for line in lines if line["step"] == step), lines[-1])


def mean_value(points: Sequence[Point]) -> float:
    """The mean of the values."""
    return statistics.fmean(value for _, value in points)


def bad_end(points: Sequence[Point], bad: Callable[[float], bool]) -> list[Point]:
    """The points at the end that are all bad."""
    start = len(points)
    while start and bad(points[start - 1][1]):
        start -= 1
    return list(points[start:])


def lasting(
    name: str, points: Sequence[Point], bad: Callable[[float], bool], lines: int, severity: Severity,
    message: Callable[[float], str], badness: Callable[[float], float],
) -> list[Finding]:  # fmt: skip
    """A finding when the last `lines` points are bad."""
    run = bad_end(points, bad)
    if len(run) < lines:
        return []
    last_step, value = run[-1]
    return [finding(name, severity, run[0][0], last_step, message(value), badness(value))]


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two lists of values; 0 where one does not vary or is not finite."""
    if len(set(first)) < 2 or len(set(second)) < 2 or not all(map(math.isfinite, [*first, *second])):
        return 0.0
    return statistics.correlation(first, second)


def _is_evaluation(line: Line) -> bool:
    return any(name.startswith("eval_") for name in line)
