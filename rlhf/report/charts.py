"""Curves of a run's metrics as SVG pictures, drawn by matplotlib."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import groupby
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Drawn = TypeVar("Drawn")
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
MOST_POINTS = 400
"""Of a line in a picture: of more points neighbours are drawn as their mean."""
EVALUATION = "eval_"
WIDTH, HEIGHT = 4.6, 2.5
"""Of a picture, in inches of 72 points."""


def _plainly(draw: Callable[Given, Drawn]) -> Callable[Given, Drawn]:
    """Whatever a name holds is text: matplotlib would take what stands between dollar signs for a formula."""

    @wraps(draw)
    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Drawn:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "report"}):
            return draw(*args, **kwargs)

    return drawn


@dataclass(frozen=True)
class Chart:
    """A picture of some metrics of a stage over its steps, or over the metric `along`.

    `metrics` are names without `eval_`: lines are what training measured, points with a dashed line the evaluations.
    One that ends with a slash stands for all that begin with it, which are parts. `level` is a value to compare with.
    `varying`: there is no picture of what stays as it is.
    """

    title: str
    metrics: tuple[str, ...]
    along: str = ""
    level: float | None = None
    logarithmic: bool = False
    varying: bool = False


@dataclass(frozen=True)
class Curve:
    """Points of one metric of one run."""

    name: str
    evaluated: bool
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """What is drawn of a run: the lines of its metrics, and at which steps something was found."""

    run: str
    metrics: Sequence[Mapping[str, Any]]
    findings: Sequence[tuple[int, str]] = ()
    """(step, check)."""


def curves(chart: Chart, metrics: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The metrics of `chart` that there are, each as it was trained and as it was evaluated."""
    found: list[Curve] = []
    for wanted in chart.metrics:
        for evaluated in (False, True):
            prefix = EVALUATION if evaluated else ""
            names = _parts(metrics, prefix + wanted) if wanted.endswith("/") else [prefix + wanted]
            for name in names:
                points = thinned(list(_points(metrics, name, prefix + chart.along if chart.along else "step")))
                if points:
                    found.append(Curve(name.removeprefix(EVALUATION), evaluated, points))
    return found


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: the means of as many neighbours as it takes."""
    together = -(-len(points) // MOST_POINTS) if points else 1
    if together == 1:
        return list(points)
    parts = [points[start : start + together] for start in range(0, len(points), together)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


@_plainly
def picture(chart: Chart, lines: Sequence[Line], *, unit: str) -> str | None:
    """`chart` for one run or for several over one another, as a data URI of an SVG; None where nothing was measured.

    Of one run each metric has a colour, and findings are marked where they began; of several each run has one.
    """
    drawn = [(line, curves(chart, line.metrics)) for line in lines]
    everything = [curve for _, found in drawn for curve in found]
    if chart.along and any(curve.evaluated for curve in everything):  # steps of training go to and fro
        drawn = [(line, [curve for curve in found if curve.evaluated]) for line, found in drawn]
        everything = [curve for _, found in drawn for curve in found]
    if not everything or (chart.varying and len({y for curve in everything for _, y in curve.points}) == 1):
        return None
    mixed = len({curve.evaluated for curve in everything}) > 1
    figure, axes = _figure()
    names = list(dict.fromkeys(curve.name for _, found in drawn for curve in found))
    together = len(lines) > 1
    for number, (line, found) in enumerate(drawn):
        for curve in found:
            colour = COLOURS[(number if together else names.index(curve.name)) % len(COLOURS)]
            shown = curve.name.rpartition("/")[2].replace("_", " ")
            label = f"{line.run} {shown}" if together and len(names) > 1 else line.run if together else shown
            label += ", held out" if curve.evaluated and mixed else ""
            xs, ys = zip(*curve.points, strict=True)
            if curve.evaluated:
                axes.plot(xs, ys, "o--", color=colour, label=label, linewidth=0.8, markersize=3.5)
            else:
                axes.plot(xs, ys, "-", color=colour, label=label, linewidth=1.2)
    if chart.level is not None:
        axes.axhline(chart.level, color="#94a3b8", linewidth=0.8, linestyle=":")
    if not together and not chart.along:
        for step, names_of in groupby(sorted(lines[0].findings), key=lambda each: each[0]):
            axes.axvline(step, color="#dc2626", linewidth=0.8, alpha=0.6)
            told = ", ".join(name for _, name in names_of)
            axes.annotate(told, (step, 1.0), xycoords=("data", "axes fraction"), fontsize=5.5, color="#dc2626",
                          rotation=90, va="top", ha="right")  # fmt: skip
    if chart.logarithmic and all(y > 0 for _, found in drawn for curve in found for _, y in curve.points):
        axes.set_yscale("log")
    axes.set_xlabel(f"{chart.along.replace('_', ' ')}" if chart.along else unit, fontsize=7)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) > 1 or together:
        axes.legend(fontsize=5.5, frameon=False, ncols=2 if len(labels) > 4 else 1)
    return _data_uri(figure)


@_plainly
def bars(groups: Sequence[str], series: Mapping[str, Sequence[float | None]], *, level: float | None = None,
         errors: Mapping[str, Sequence[tuple[float, float]]] | None = None) -> str:  # fmt: skip
    """Bars side by side for each of `groups`, one colour for each of `series`; `errors`: (low, high) of each bar."""
    figure, axes = _figure()
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(groups))]
        heights = [math.nan if value is None else value for value in values]
        axes.bar(places, heights, width * 0.92, color=COLOURS[number % len(COLOURS)], label=name)
        if errors and name in errors:
            low = [max(0.0, height - each[0]) for height, each in zip(heights, errors[name], strict=True)]
            high = [max(0.0, each[1] - height) for height, each in zip(heights, errors[name], strict=True)]
            axes.errorbar(places, heights, yerr=[low, high], fmt="none", ecolor="#0f172a", elinewidth=0.8, capsize=2)
    if level is not None:
        axes.axhline(level, color="#94a3b8", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(groups)), groups, fontsize=6, rotation=20 if len(groups) > 4 else 0)
    axes.legend(fontsize=6, frameon=False)
    return _data_uri(figure)


@_plainly
def histogram(edges: Sequence[float], series: Mapping[str, Sequence[float]], *, label: str) -> str:
    """Counts between `edges`, the series over one another."""
    figure, axes = _figure()
    for number, (name, counts) in enumerate(series.items()):
        axes.stairs(counts, edges, fill=True, alpha=0.45, color=COLOURS[number % len(COLOURS)], label=name)
    axes.set_xlabel(label, fontsize=7)
    axes.legend(fontsize=6, frameon=False)
    return _data_uri(figure)


@_plainly
def reliability(bins: Sequence[Mapping[str, float]]) -> str:
    """How often a reward model is right against how sure it says it is."""
    figure, axes = _figure()
    axes.plot([0.5, 1.0], [0.5, 1.0], ":", color="#94a3b8", linewidth=0.8)
    sure, right = [each["confidence"] for each in bins], [each["accuracy"] for each in bins]
    axes.plot(sure, right, "o-", color=COLOURS[0], linewidth=1.0, markersize=3.5)
    for each in bins:
        axes.annotate(f"{each['pairs']:.0f}", (each["confidence"], each["accuracy"]), fontsize=5.5, color="#64748b",
                      xytext=(3, -8), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("confidence: sigmoid of the margin", fontsize=7)
    axes.set_ylabel("share that is right", fontsize=7)
    return _data_uri(figure)


def _parts(metrics: Iterable[Mapping[str, Any]], prefix: str) -> list[str]:
    found = dict.fromkeys(name for line in metrics for name in line if name.startswith(prefix))
    return [name for name in found if "/" not in name.removeprefix(prefix)]


def _points(metrics: Iterable[Mapping[str, Any]], name: str, along: str) -> Iterator[tuple[float, float]]:
    for line in metrics:
        x, y = line.get(along), line.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(x) and math.isfinite(y):
            yield float(x), float(y)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=6)
    axes.grid(visible=True, color="#e2e8f0", linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _data_uri(figure: Any) -> str:
    """The figure as an SVG in which letters are text, which whoever shows it draws in a font that it has."""
    content = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # matplotlib's own font has no Hangul
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", content.getvalue(), flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode("ascii")
