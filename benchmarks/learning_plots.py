"""The curves of `learning.py` as small SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from learning_curves import fit_overoptimisation, with_distance
from learning_workloads import REWARD_DATA, Run

try:
    from matplotlib import pyplot as plt
except ImportError:
    raise SystemExit("--plots needs matplotlib: `pip install matplotlib`, or leave --plots out") from None

LOOK = {
    "svg.fonttype": "none",  # text stays text: smaller files
    "svg.hashsalt": "learning",
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "figure.constrained_layout.use": True,
}
plt.rcParams.update(LOOK)

STYLES = {"ours": "-", "trl": "--"}
LABELS = {"ours": "ours", "trl": "TRL"}
TITLES = {"A": "learning", "B": "length-biased"}

Results = Mapping[Run, Mapping[str, Any]]


def plot_section(section: str, results: Results, directory: Path) -> None:
    """The plots of a section of `learning.py` from its runs; none for one that has no runs, or for the variants."""
    directory.mkdir(parents=True, exist_ok=True)
    if not results:
        return
    if section in TITLES:
        against_kl(results, directory / f"{TITLES[section]}-kl.svg")
        against_seconds(results, directory / f"{TITLES[section]}-seconds.svg")
    elif section == "C":
        overoptimisation(results, directory / "overoptimisation.svg")
    elif section == "E":
        length_control(results, directory / "length-control.svg")


def save(figure: Any, path: Path) -> None:
    """Write a small file, the same bytes for the same figure."""
    for axis in figure.axes:
        axis.locator_params(nbins=4)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def colours(values: Sequence[Any]) -> dict[Any, Any]:
    """A colour for each value, in their order."""
    return {value: f"C{place}" for place, value in enumerate(sorted(set(values)))}


def draw(axis: Any, run: Run, result: Mapping[str, Any], along: str, of: str, colour: str) -> None:
    """One curve of one run; a name for the legend comes from its side and coefficient."""
    points = with_distance(result["points"])
    values = [[point[name] for point in points] for name in (along, of)]
    axis.plot(*values, STYLES[run.side], color=colour, label=f"{LABELS[run.side]}, {run.kl_coef:g}")


def zoom(axes: Any, results: Results) -> None:
    """Show as far as our curves go and a quarter further: a peer's that runs away leaves the picture."""
    shown = [point for run, result in results.items() for point in with_distance(result["points"])
             if run.side == "ours"]  # fmt: skip
    for row, of in enumerate(("gold", "score")):
        lowest, highest = (find(point[of] for point in shown) for find in (min, max))
        margin = 0.3 * (highest - lowest)
        axes[row][0].set_ylim(lowest - margin, highest + margin)
    axes[0][0].set_xlim(0, 1.25 * max(point["d"] for point in shown))


def against_kl(results: Results, path: Path) -> None:
    """Gold above, score below, against d; a column for each seed."""
    seeds, by_coef = sorted({run.seed for run in results}), colours([run.kl_coef for run in results])
    figure, axes = plt.subplots(
        2, len(seeds), figsize=(3.2 * len(seeds), 4.6), sharex=True, sharey="row", squeeze=False
    )
    for run, result in results.items():
        for row, of in enumerate(("gold", "score")):
            draw(axes[row][seeds.index(run.seed)], run, result, "d", of, by_coef[run.kl_coef])
    for column, seed in enumerate(seeds):
        axes[0][column].set_title(f"seed {seed}")
        axes[1][column].set_xlabel("square root of the KL, nats per response")
    axes[0][0].set_ylabel("gold")
    axes[1][0].set_ylabel("score of the reward model")
    zoom(axes, results)
    axes[0][0].legend(fontsize=6, ncols=2, loc="lower right")
    save(figure, path)


def against_seconds(results: Results, path: Path) -> None:
    """Gold against seconds of training, a panel for each coefficient."""
    coefs, by_seed = sorted({run.kl_coef for run in results}), colours([run.seed for run in results])
    figure, axes = plt.subplots(1, len(coefs), figsize=(2.6 * len(coefs), 2.5), sharey=True, squeeze=False)
    for run, result in results.items():
        draw(axes[0][coefs.index(run.kl_coef)], run, result, "seconds", "gold", by_seed[run.seed])
    for column, coef in enumerate(coefs):
        axes[0][column].set_title(f"kl_coef {coef:g}")
        axes[0][column].set_xlabel("training seconds")
    axes[0][0].set_ylabel("gold")
    handles = [plt.Line2D([], [], color="k", linestyle=style, label=LABELS[side]) for side, style in STYLES.items()]
    handles += [plt.Line2D([], [], color=colour, label=f"seed {seed}") for seed, colour in by_seed.items()]
    axes[0][-1].legend(handles=handles, fontsize=6)
    save(figure, path)


def overoptimisation(results: Results, path: Path) -> None:
    """Gold and score against d for each size of reward data, with the fit of gold for RL."""
    by_size = colours([REWARD_DATA[run.reward].rankings for run in results])
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0))
    for run, result in results.items():
        size = REWARD_DATA[run.reward].rankings
        points = with_distance(result["points"])
        distances = [point["d"] for point in points]
        for axis, of in zip(axes, ("gold", "score"), strict=True):
            label = f"{size} rankings" if run.seed == min(one.seed for one in results) else None
            axis.plot(distances, [point[of] for point in points], ".-", markersize=3, color=by_size[size], label=label)
        fit = fit_overoptimisation(result["points"], "rl")
        if fit is None:
            continue
        places = [max(distances) * place / 60 for place in range(1, 61)]
        fitted = [points[0]["gold"] + d * (fit["alpha"] - fit["beta"] * math.log(d)) for d in places]
        axes[0].plot(places, fitted, ":", color=by_size[size], linewidth=0.9)
    for axis, title in zip(axes, ("gold (dotted: the fit)", "score of the reward model"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("square root of the KL, nats per response")
    axes[1].legend(fontsize=7)
    save(figure, path)


def length_control(results: Results, path: Path) -> None:
    """Gold as the mean of the seeds and response tokens of each over the iterations, a colour for each control."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 4.2))
    for number, kind in enumerate(dict.fromkeys((run.reward, run.changes) for run in results)):
        data, curves = REWARD_DATA[kind[0]], [
            result["points"] for run, result in results.items() if (run.reward, run.changes) == kind
        ]  # fmt: skip
        taught = f"{data.length_control}, length-biased" if data.length_bias else "unbiased annotator"
        taught += " + PPO's curve" * len(kind[1][:1]) + ", refitted" * len(kind[1][1:])
        iterations = [point["iteration"] for point in curves[0]]
        gold = [fmean(point["gold"] for point in points) for points in zip(*curves, strict=True)]
        axes[0].plot(iterations, gold, color=f"C{number}", label=taught)
        for curve in curves:
            axes[1].plot(iterations, [point["tokens"] for point in curve], color=f"C{number}")
    for axis, title in zip(axes, ("gold, mean of the seeds", "response tokens"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("iteration")
    figure.legend(fontsize=6, loc="outside lower center", ncols=3)
    save(figure, path)
