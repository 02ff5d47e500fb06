"""Which algorithm makes answers better: all of them from the same SFT model on the embedded world, by gold.

python benchmarks/algorithms.py [--methods ppo,grpo,dpo] [--seeds 1,2,3] [--rates 3e-5,3e-4] [--report] [--quick]

A seed has an SFT model and a reward model, made by the stages' scripts with training_scripts/configs/default.yaml.
What samples as it learns gets 40 iterations of 64 responses; what learns from the model's own responses, sampled once,
gets as many of them; what learns from the world's rankings trains for `--offline_seconds`, about what PPO takes. All
are evaluated by the same code (sides/rlhf_judge.py): gold (docs/world.md), the reward model's score, KL, on held-out
prompts, the same random numbers every time.

Every run is kept in `--work_dir`: a benchmark that was stopped goes on where it was. `--report` runs nothing and makes
the table and the plot of what is there. `--rates` runs the named methods at other learning rates in place of theirs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from algorithms_workloads import ALL_METHODS, METHODS, AlignmentPlace, Trial
from measure import ENVIRONMENTS, RESULTS, markdown_table, write_report

Results = Mapping[Trial, Mapping[str, Any]]
Row = dict[str, Any]
GIB = 2**30


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(name for name in METHODS), help="comma-separated")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rates", default="", help="learning rates to try instead, comma-separated")
    parser.add_argument("--offline_seconds", type=float, default=100.0, help="of a run on the world's rankings")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads")
    parser.add_argument("--base_model", default="default", help="what the stages start from: the embedded base")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/.cache"), help="where the embedded base is kept")
    parser.add_argument("--quick", action="store_true", help="a few tiny steps of everything, to see whether it runs")
    parser.add_argument("--report", action="store_true", help="run nothing: the table and plot of what is there")
    parser.add_argument("--plots", type=Path, help="write the SVG plot into this directory (needs matplotlib)")
    parser.add_argument("--work_dir", type=Path, default=ENVIRONMENTS / "algorithms", help="models and runs")
    parser.add_argument("--out_dir", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    arguments.methods = arguments.methods.split(",")
    if unknown := [name for name in arguments.methods if name not in ALL_METHODS]:
        parser.error(f"--methods {','.join(unknown)}: choose from {', '.join(ALL_METHODS)}")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.rates = arguments.rates.split(",") if arguments.rates else [""]
    return arguments


def trials(arguments: argparse.Namespace) -> list[Trial]:
    """Every method of a seed, then the next seed."""
    return [
        Trial(name, seed, rate) for seed in arguments.seeds for name in arguments.methods for rate in arguments.rates
    ]


def win_rate(start: Mapping[str, Any], end: Mapping[str, Any]) -> float:
    """The share of held-out prompts whose responses have the higher mean gold at the end; a tie counts half."""
    pairs = zip(start["gold_by_prompt"], end["gold_by_prompt"], strict=True)
    return fmean((new > old) + 0.5 * (new == old) for old, new in pairs)


def table_rows(results: Results) -> list[Row]:
    """A row for each method and learning rate: means over its seeds, gold of the worst one too."""
    rows = []
    for method, rate in dict.fromkeys((trial.method, trial.learning_rate) for trial in results):
        found = [result for trial, result in results.items() if (trial.method, trial.learning_rate) == (method, rate)]
        ends = [result["end"] for result in found]
        row: Row = {"algorithm": method, "learns from": ALL_METHODS[method].source, "seeds": len(found)}
        if rate:
            row["learning rate"] = rate
        row["gold before"] = fmean(result["start"]["gold"] for result in found)
        row["gold"] = fmean(end["gold"] for end in ends)
        row["worst seed"] = min(end["gold"] for end in ends)
        row["better than SFT"] = fmean(win_rate(result["start"], result["end"]) for result in found)
        row["score gained"] = fmean(result["end"]["score"] - result["start"]["score"] for result in found)
        row |= {title: fmean(end[name] for end in ends) for title, name in FIGURES.items()}
        row |= {name: fmean(result[name] for result in found) for name in ("steps", "seconds")}
        row["peak GiB"] = max(result["peak_bytes"] for result in found) / GIB
        rows.append(row)
    return rows


FIGURES = {"KL": "kl_per_response", "well formed": "well_formed_responses", "eos rate": "eos_rate",
           "tokens": "response_tokens"}  # fmt: skip


def plot(results: Results, path: Path) -> None:
    """Gold against the square root of the KL: a curve for each run that was judged on the way, a mark where it ends.

    The right panel shows what four of five runs end within.
    """
    from learning_plots import plt, save

    figure, axes = plt.subplots(1, 2, figsize=(9.0, 4.0), sharey=True, width_ratios=(1, 2))
    reached = []
    for number, method in enumerate(dict.fromkeys(trial.method for trial in results)):
        colour, label = plt.get_cmap("tab20")(number % 20), method
        for result in (result for trial, result in results.items() if trial.method == method):
            ends = [result["start"], result["end"]]
            line = result["points"] or [{"kl": each["kl_per_response"], "gold": each["gold"]} for each in ends]
            along = [math.sqrt(max(0.0, point["kl"])) for point in line]
            reached.append(along[-1])
            for axis in axes:
                style = "-" if result["points"] else ":"
                axis.plot(along, [point["gold"] for point in line], style, color=colour, linewidth=0.7, alpha=0.6)
                axis.plot(along[-1:], [line[-1]["gold"]], "o", markersize=5, color=colour, label=label)
                label = None
    axes[1].set_xlim(0, 1.2 * sorted(reached)[4 * (len(reached) - 1) // 5] + 0.1)
    figure.supxlabel("square root of the KL to the SFT model, nats per response", fontsize=8)
    axes[0].set_ylabel("gold")
    figure.legend(fontsize=6, loc="outside right upper")
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    place = AlignmentPlace(
        directory=arguments.work_dir.resolve() / ("quick" if arguments.quick else ""),
        threads=arguments.threads,
        base_model=arguments.base_model,
        cache_dir=arguments.cache_dir.resolve(),
        eval_every_steps=1 if arguments.quick else 4,
        quick=arguments.quick,
        peer_python=None,
        offline_seconds=arguments.offline_seconds,
    )
    wanted = [trial for trial in trials(arguments) if not arguments.report or place.file(trial).is_file()]
    results = {trial: place.trial(trial) for trial in wanted}
    rows = table_rows(results)
    print(markdown_table(rows))
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        plot(results, arguments.plots / "algorithms-kl.svg")
    command = " ".join(sys.argv if argv is None else ["benchmarks/algorithms.py", *argv])
    runs = [dict(result) for result in results.values()]
    paths = write_report("algorithms-quick" if arguments.quick else "algorithms", {"command": command, "runs": runs},
                         rows, arguments.out_dir)  # fmt: skip
    print("\n" + "\n".join(map(str, paths)))
    return {"runs": runs, "table": rows}


if __name__ == "__main__":
    main()
