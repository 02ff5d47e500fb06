"""Does PPO learn what it should: gold and score against KL over training, beside TRL's PPO, on the embedded world.

python benchmarks/learning.py [--sections A,C,B,E,D] [--seeds 1,2,3] [--kl_coefs 0.1,0.02] [--quick] [--peer none]

Everything runs with training_scripts/configs/default.yaml. A seed has an SFT model and a reward model of its own, made
by the stages' scripts. Gold is the world's judge (docs/world.md), on held-out prompts; training never sees it.

A  ours (step3_ppo/main.py) beside TRL (trl==0.24.0 with transformers==4.57.*, in an environment made on first use),
   with the same models, prompts, settings and optimizer steps, at each KL coefficient. The policies of both are
   evaluated by the same code (sides/rlhf_judge.py): gold at equal KL, training seconds to `--target_gold`.
B  A with a reward model taught by a length-biased annotator.
C  reward models of 250, 1000 and 4000 rankings at a low KL coefficient: where gold turns while the score rises, how
   that fits Gao et al. (arXiv 2210.10760), and what the doctor had said by then.
D  variants of the default, each against it: `--variants NAME=VALUE[,NAME=VALUE] ...`.

Every run is kept in `--work_dir`: a benchmark that was stopped goes on where it was, and `--report` makes the tables
and plots of what is there. Seconds are those of sampling, scoring and optimizer steps; the two sides' runs take turns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from learning_curves import at_first, equal_kl, fit_overoptimisation, turning_point
from learning_workloads import REWARD_DATA, Run, Workplace
from measure import ENVIRONMENTS, RESULTS, markdown_table, peer_environment, write_report

PEER_REQUIREMENTS = ["trl==0.24.0", "transformers==4.57.*"]
VARIANTS = ("critic_warmup_iterations=2", "learning_rate=1e-4", "learning_rate=6e-4", "whiten_rewards=true",
            "ppo_epochs=1", "ppo_epochs=4", "global_batch_size=16", "global_batch_size=64", "score_clip=0",
            "critic_init=reward,critic_learning_rate=3e-4,max_grad_norm=0")  # fmt: skip
SIZES = ("default", "rankings-1000", "rankings-250")
CONTROLS = ("default", "length-biased", "length-balance", "length-calibrate", "length-odin")
CURVES = {(): "no", ("length_calibration_prompts=128",): "of the first actor",
          ("length_calibration_prompts=64", "length_calibration_every=4"): "every 4 iterations"}  # fmt: skip
"""Of E: the length curves of PPO itself, the last two beside each of `CURVED`."""
CURVED = ("length-biased", "length-calibrate")

Results = dict[Run, dict[str, Any]]
Row = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="A,C,B,E,D", help="comma-separated, in the order in which they run")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--kl_coefs", default="0.1,0.02,0.3,0.05", help="of A and B")
    parser.add_argument("--iterations", type=int, default=40, help="of A, B and D (default.yaml: 40)")
    parser.add_argument("--eval_every_steps", type=int, default=4, help="iterations between points of a curve")
    parser.add_argument("--target_gold", type=float, default=0.8, help="gold to whose first reach seconds are counted")
    parser.add_argument("--low_kl_coef", type=float, default=0.01, help="of C")
    parser.add_argument("--long_iterations", type=int, default=60, help="of C")
    parser.add_argument(
        "--variants", nargs="*", default=list(VARIANTS), help="of D: fields of step 3, NAME=VALUE[,NAME=VALUE]"
    )
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of either side")
    parser.add_argument("--peer", choices=("trl", "none"), default="trl")
    parser.add_argument("--base_model", default="default", help="what the stages start from: the embedded base")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/.cache"), help="where the embedded base is kept")
    parser.add_argument("--quick", action="store_true", help="a few tiny steps of everything, to see whether it runs")
    parser.add_argument(
        "--report", action="store_true", help="run nothing: tables and plots of the runs that are there"
    )
    parser.add_argument("--plots", type=Path, help="write SVG plots into this directory (needs matplotlib)")
    parser.add_argument(
        "--work_dir", type=Path, default=ENVIRONMENTS / "learning", help="models and runs are kept here"
    )
    parser.add_argument("--out_dir", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    arguments.sections = arguments.sections.split(",")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    arguments.kl_coefs = [float(coef) for coef in arguments.kl_coefs.split(",")]
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"--sections {','.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if wrong := [variant for variant in arguments.variants if "=" not in variant]:
        parser.error(f"--variants {' '.join(wrong)}: needed is NAME=VALUE, a field of step3_ppo/main.py and its value")
    if arguments.quick:
        arguments.iterations, arguments.long_iterations, arguments.eval_every_steps = 2, 3, 1
        arguments.seeds, arguments.kl_coefs = arguments.seeds[:1], arguments.kl_coefs[:1]
    return arguments


# ------------------------------------------------------------------------------------------------ what is run


def compared(arguments: argparse.Namespace, reward: str) -> Iterator[Run]:
    """Ours and the peer's, taking turns: every coefficient of a seed, then the next seed."""
    sides = ("ours", "trl") if arguments.peer == "trl" else ("ours",)
    for seed in arguments.seeds:
        for coef in arguments.kl_coefs:
            for side in sides:
                yield Run(side, seed, coef, arguments.iterations, reward)


def overoptimised(arguments: argparse.Namespace) -> Iterator[Run]:
    """Ours with a low KL coefficient, on reward models of three sizes of data; all sizes of a seed, then the next."""
    for seed in arguments.seeds:
        for reward in SIZES[-1:] if arguments.quick else SIZES:
            yield Run("ours", seed, arguments.low_kl_coef, arguments.long_iterations, reward)


def controlled(arguments: argparse.Namespace) -> Iterator[Run]:
    """The default's KL coefficient on reward models with and without length control; all of a seed, then the next."""
    for seed in arguments.seeds:
        for reward in CONTROLS[1:2] if arguments.quick else CONTROLS:
            yield Run("ours", seed, 0.1, arguments.iterations, reward)
        for reward, changes in itertools.product(() if arguments.quick else CURVED, list(CURVES)[1:]):
            yield Run("ours", seed, 0.1, arguments.iterations, reward, changes=changes)


def varied(arguments: argparse.Namespace) -> Iterator[Run]:
    """The default of default.yaml and each variant, seed by seed of a variant."""
    for change in ("", *arguments.variants):
        for seed in arguments.seeds:
            yield Run("ours", seed, 0.1, arguments.iterations, changes=tuple(change.split(",")) if change else ())


# ---------------------------------------------------------------------------------------------------- tables


def compare_row(ours: Run, results: Results, target: float) -> Row:
    """One seed and coefficient: where both sides end, gold at equal KL, seconds."""
    curve = results[ours]["points"]
    row: Row = {"kl_coef": ours.kl_coef, "seed": ours.seed, "gold before": curve[0]["gold"]}
    peer = results.get(Run("trl", ours.seed, ours.kl_coef, ours.steps, ours.reward))
    for name, result in (("", results[ours]), ("TRL ", peer)):
        if result is not None:
            end = result["points"][-1]
            row |= {f"{name}{key}": end[key] for key in ("gold", "score", "kl", "eos_rate", "tokens")}
            row[f"{name}best gold"] = max(point["gold"] for point in result["points"])
            row[f"{name}s/iteration"] = fmean(result["iteration_seconds"])
            row[f"{name}s to {target:g}"] = at_first(result["points"], "gold", target, "seconds")
    if peer is not None:
        row |= {f"gold at equal KL, {name}": value for name, value in equal_kl(curve, peer["points"]).items()}
        seconds = [row[f"{name}s to {target:g}"] for name in ("", "TRL ")]
        row["seconds, ours / TRL"] = seconds[0] / seconds[1] if None not in seconds else None
    return row


def compare_rows(runs: Sequence[Run], results: Results, arguments: argparse.Namespace) -> list[Row]:
    """A row for each run of ours."""
    return [compare_row(run, results, arguments.target_gold) for run in runs if run.side == "ours"]


def turning_rows(runs: Sequence[Run], results: Results, arguments: argparse.Namespace) -> list[Row]:
    """Where gold turns, Gao et al.'s fits, and the doctor's findings with the iteration at which each was told."""
    rows = []
    for run in runs:
        result, data = results[run], REWARD_DATA[run.reward]
        turn = turning_point(result["points"])
        peak, end = turn["peak"], turn["end"]
        row: Row = {"rankings": data.rankings, "reward accuracy": result["reward_accuracy"], "seed": run.seed}
        row["gold before"] = result["points"][0]["gold"]
        row |= {"turned": "yes" if turn["turned"] else "no", "peak at iteration": peak["iteration"]}
        row |= {"peak KL": peak["kl"], "peak gold": peak["gold"], "score there": peak["score"]}
        row |= {"end KL": end["kl"], "end gold": end["gold"], "score at the end": end["score"]}
        for form in ("rl", "bon"):
            fit = fit_overoptimisation(result["points"], form)  # type: ignore[arg-type]
            row |= {f"{form} {name}": value for name, value in (fit or {}).items()}
        told = [f"{found['check']} ({found['at']})" for found in result["findings"]]
        rows.append({**row, "doctor (told at iteration)": ", ".join(told) or None})
    return rows


def control_rows(runs: Sequence[Run], results: Results, arguments: argparse.Namespace) -> list[Row]:
    """What each reward model's score follows on held-out pairs of who taught it, and where PPO with it ends."""
    rows = []
    for run in runs:
        result, data = results[run], REWARD_DATA[run.reward]
        start, end, length = result["points"][0], result["points"][-1], result["shortcuts"]["length"]
        rows.append({
            "length bias": data.length_bias,
            "length_control": data.length_control,
            "curve of PPO": CURVES[run.changes],
            "seed": run.seed,
            "reward accuracy": result["reward_accuracy"],
            "of like length": length["matched"]["accuracy"],
            "shorter chosen": length["chosen_less"]["accuracy"],
            "longer chosen": length["chosen_more"]["accuracy"],
            "score and length, within prompts": length["correlation_within"]["value"],
            "gold before": start["gold"],
            "gold": end["gold"],
            "best gold": max(point["gold"] for point in result["points"]),
            "tokens before": start["tokens"],
            "tokens": end["tokens"],
            "eos_rate": end["eos_rate"],
            "KL": end["kl"],
        })  # fmt: skip
    return rows


def variant_rows(runs: Sequence[Run], results: Results, arguments: argparse.Namespace) -> list[Row]:
    """Mean over the seeds and the worst seed; gold is also given as the difference to the default of the same seed."""
    rows = []
    for change in dict.fromkeys(run.changes for run in runs):
        found = {run.seed: results[run] for run in runs if run.changes == change}
        ends = {seed: result["points"][-1] for seed, result in found.items()}
        default = {run.seed: results[run]["points"][-1] for run in runs if not run.changes}
        gains = [end["gold"] - default[seed]["gold"] for seed, end in ends.items() if seed in default]
        best = [max(point["gold"] for point in result["points"]) for result in found.values()]
        rows.append({
            "variant": " ".join(change) or "default",
            "seeds": len(found),
            "gold": fmean(end["gold"] for end in ends.values()),
            "worst gold": min(end["gold"] for end in ends.values()),
            "gold less default's": fmean(gains) if gains and change else None,
            "lowest": min(gains) if gains and change else None,
            "highest": max(gains) if gains and change else None,
            "best gold": fmean(best),
            "score": fmean(end["score"] for end in ends.values()),
            "KL": fmean(end["kl"] for end in ends.values()),
            "well formed": fmean(end["well_formed"] for end in ends.values()),
            "seconds": fmean(end["seconds"] for end in ends.values()),
        })  # fmt: skip
    return rows


SECTIONS = {
    "A": ("ours and TRL", lambda arguments: compared(arguments, "default"), compare_rows),
    "B": ("length-biased annotator", lambda arguments: compared(arguments, "length-biased"), compare_rows),
    "C": ("over-optimisation", overoptimised, turning_rows),
    "E": ("length control", controlled, control_rows),
    "D": ("variants", varied, variant_rows),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    wants_peer = arguments.peer == "trl" and not arguments.report and {"A", "B"} & set(arguments.sections)
    workplace = Workplace(
        directory=arguments.work_dir.resolve() / ("quick" if arguments.quick else ""),
        threads=arguments.threads,
        base_model=arguments.base_model,
        cache_dir=arguments.cache_dir.resolve(),
        eval_every_steps=arguments.eval_every_steps,
        quick=arguments.quick,
        peer_python=peer_environment("trl-0.24", PEER_REQUIREMENTS) if wants_peer else None,
    )
    sections, rows = {}, []
    for name in arguments.sections:
        title, runs_of, rows_of = SECTIONS[name]
        wanted = [run for run in runs_of(arguments) if not arguments.report or workplace.has(run)]
        results = {run: workplace.result(run) for run in wanted}
        table = rows_of(wanted, results, arguments)
        print(f"\n{name}: {title}\n\n{markdown_table(table)}" if table else f"\n{name}: {title}: no run is there")
        sections[name] = {"title": title, "table": table, "runs": list(results.values())}
        rows += [{"section": name, **row} for row in table]
        if arguments.plots:
            from learning_plots import plot_section

            plot_section(name, results, arguments.plots)
    command = " ".join(sys.argv if argv is None else ["benchmarks/learning.py", *argv])
    payload = {"command": command, "sections": sections}
    paths = write_report("learning-quick" if arguments.quick else "learning", payload, rows, arguments.out_dir)
    print("\n" + "\n".join(map(str, paths)))
    return payload


if __name__ == "__main__":
    main()
