"""Training on rows that are there beside TRL's trainers: what `sft.py`, `reward.py`, `dpo.py` and `kto.py` share.

Tokens are made once. Each side then trains on the same rows from the same weights in a process of its own, in
interleaved rounds. The rows of step s are those of our trainer's step s; TRL gets them in an order shuffled within the
step, so that its sampler has the padding it would have. Seconds of a step are the time between the ends of two
optimizer steps (collation included), the median over the rounds; tokens are real ones, padding is never counted. The
CPU seconds of all threads stand beside them: where the two disagree between sides, the machine was not quiet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
from offline_workloads import MAX_TOKENS, SEED, SIZES, Run, Task, data_specs, prepare, step_tokens

BENCHMARKS = measure.BENCHMARKS

LEARNING_RATE = 1e-4
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}
"""How far the first losses of the two sides may lie apart; 16-bit sides round differently."""
OURS = "ours"


def parse(task: Task, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Run]:
    """The options of a script and the run they mean."""
    parser = argparse.ArgumentParser(description=f"{task.name}: real tokens per second and memory, ours beside TRL's")
    parser.add_argument("--quick", action="store_true", help="about a minute: one round of three steps, two settings")
    parser.add_argument("--steps", type=int, help="optimizer steps of a process, the warm-up included")
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--rounds", type=int, help="processes per side, interleaved")
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--size", choices=sorted(SIZES), default="9m")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="*", choices=sorted(task.peers), help="settings of TRL; none: ours only")
    parser.add_argument("--out-dir", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    device, dtype = measure.device_and_dtype(options)
    names = {value: name for name, value in measure.PRECISIONS.items()}
    defaults = (3, 1, 1) if options.quick else (10, 2, 3)
    steps, warm_up, rounds = (
        value if value is not None else default
        for value, default in zip((options.steps, options.warm_up, options.rounds), defaults, strict=True)
    )
    if options.peers is None:
        options.peers = list(task.peers)[:2] if options.quick else list(task.peers)
    torch.set_num_threads(options.threads)
    return options, Run(
        steps,
        warm_up,
        rounds,
        options.global_batch_size,
        options.micro_batch_size,
        options.size,
        device.type,
        names[dtype],
        options.threads,
    )


# ----------------------------------------------------------------------------------------------------- running


def run_side(task: Task, run: Run, work: Path, name: str) -> dict[str, Any]:
    """One side in a fresh process; what it measured, or {"error"} with the end of its output for a peer's setting."""
    script = BENCHMARKS / ("sides/rlhf_offline.py" if name == OURS else "peers/trl_offline.py")
    result = work / "result.json"
    result.unlink(missing_ok=True)
    job = {
        "kind": task.kind,
        "algorithm": task.algorithm,
        "run": asdict(run),
        "work": str(work),
        "result": str(result),
        "seed": SEED,
    }
    job.update(learning_rate=LEARNING_RATE, max_tokens=MAX_TOKENS)
    if name != OURS:
        job["arguments"] = dict(task.peers[name].arguments)
    environment = measure.worker_environment(run.threads)
    if run.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0 and result.is_file():
        return dict(json.loads(result.read_text()))
    if name == OURS:
        raise SystemExit(f"our side failed (exit status {done.returncode}):\n{done.stdout[-4000:]}")
    return {"error": done.stdout.strip()[-1500:] or f"exit status {done.returncode}"}


def summary(rounds: Sequence[Mapping[str, Any]], run: Run, tokens: Sequence[int]) -> dict[str, Any]:
    """What the rounds of one side come to. `tokens` are the real ones of each step, of a side that took our batches;
    a side with other batches counts its own."""
    counts = rounds[0].get("step_tokens") or list(tokens)
    seconds = [statistics.median(times) for times in zip(*(one["step_seconds"] for one in rounds), strict=True)]
    cpu_seconds = [statistics.median(times) for times in zip(*(one["step_cpu_seconds"] for one in rounds), strict=True)]
    measured = slice(run.warm_up, None)
    rate = sum(counts[measured]) / sum(seconds[measured])
    per_round = [sum(counts[measured]) / sum(one["step_seconds"][measured]) for one in rounds]
    return {
        "tokens_per_second": rate,
        "tokens_per_second_by_round": per_round,
        "tokens_per_cpu_second": sum(counts[measured]) / sum(cpu_seconds[measured]),
        "step_seconds": seconds,
        "step_tokens": counts,
        "measured_tokens": sum(counts[measured]),
        "peak_bytes": statistics.median(one["peak_bytes"] for one in rounds),
        "peak_above_imports_bytes": statistics.median(one["peak_bytes"] - one["imported_bytes"] for one in rounds),
        "first_loss": rounds[0]["first_loss"],
        "mean_loss_after_first": rounds[0]["mean_loss_after_first"],
    }


def judge(task: Task, run: Run, sides: Mapping[str, dict[str, Any]]) -> None:
    """Write into each peer whether it did our job, and stop when the plain one did not."""
    tolerance = LOSS_TOLERANCE[run.dtype]
    for name, setting in task.peers.items():
        side = sides.get(name)
        if side is None or "error" in side:
            continue
        side["first_loss_difference"] = abs(side["first_loss"] - sides[OURS]["first_loss"])
        same_tokens = side["step_tokens"] == sides[OURS]["step_tokens"]
        alike = side["first_loss_difference"] <= tolerance
        if task.algorithm:  # an actor that is its own reference has one first loss, whatever it is given
            one_batch = run.micro_batch_size == run.global_batch_size
            allowed = tolerance if one_batch else max(tolerance, task.split_tolerance)
            later = abs(side["mean_loss_after_first"] - sides[OURS]["mean_loss_after_first"])
            alike, side["later_loss_difference"] = alike and later <= allowed, later
        side["same_result"] = setting.same_batches and same_tokens and alike
        if name == next(iter(task.peers)) and not side["same_result"]:
            raise SystemExit(
                f"{task.name}: the two sides do not do the same job: first loss {sides[OURS]['first_loss']:.6f} here "
                f"and {side['first_loss']:.6f} with TRL ({name}), allowed difference {tolerance}; later ones differ by "
                f"{side.get('later_loss_difference', 0.0):.6f} on average; tokens of the first step "
                f"{sides[OURS]['step_tokens'][0]} and {side['step_tokens'][0]}"
            )


def compare(task: Task, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything, print the table, write `<out-dir>/<name>.json` and `.md`; returns the payload."""
    options, run = parse(task, argv)
    work = prepare(task, run, options.out_dir)
    rows, order = json.loads((work / "rows.json").read_text()), json.loads((work / "order.json").read_text())
    tokens = step_tokens(rows, order)
    names = [OURS, *options.peers]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(run.rounds):
        for name in names:
            if any("error" in one for one in results[name]):
                continue
            print(f"round {number + 1} of {run.rounds}: {name}", file=sys.stderr, flush=True)
            results[name].append(run_side(task, run, work, name))
    sides = {
        name: {"error": found[-1]["error"]} if "error" in found[-1] else summary(found, run, tokens)
        for name, found in results.items()
    }
    judge(task, run, sides)
    rates = {name: side["tokens_per_second"] for name, side in sides.items() if side.get("same_result")}
    fastest = max(rates, key=rates.__getitem__, default=None)
    ours = sides[OURS]
    lengths = [len(ids) for row in rows for ids, _ in row["candidates"]]
    payload = {
        "task": task.name,
        "data": data_specs(task),
        "run": asdict(run),
        "model": asdict(SIZES[run.size]),
        "rows": len(rows),
        "lengths": {"mean": statistics.mean(lengths), "deciles": statistics.quantiles(lengths, n=10)},
        "sides": sides,
        "peer_settings": {name: {**asdict(task.peers[name])} for name in options.peers},
        "fastest_peer_with_our_result": fastest,
        "ratio": ours["tokens_per_second"] / rates[fastest] if fastest else None,
        "memory_ratio": ours["peak_bytes"] / sides[fastest]["peak_bytes"] if fastest else None,
    }
    table = [_table_row(name, side, ours, fastest, task) for name, side in sides.items()]
    paths = measure.write_report(task.name, payload, table, options.out_dir)
    print(f"{measure.markdown_table(table)}\n\nwritten: {', '.join(map(str, paths))}")
    return payload


def _table_row(name: str, side: Mapping[str, Any], ours: Mapping[str, Any], best: str | None, task: Task) -> dict:
    row: dict[str, Any] = {"side": name if name == OURS else f"TRL: {name}" + (" (headline)" if name == best else "")}
    if "error" in side:
        last = side["error"].splitlines()[-1]
        return {**row, "note": f"does not run: {last[:120]}"}
    row.update({
        "real tokens/s": side["tokens_per_second"],
        "per CPU s": side["tokens_per_cpu_second"],
        "ours / it": ours["tokens_per_second"] / side["tokens_per_second"],
        "peak MB": side["peak_bytes"] / 1e6,
        "above imports MB": side["peak_above_imports_bytes"] / 1e6,
        "first loss": f"{side['first_loss']:.5f}",
        "mean loss after": f"{side['mean_loss_after_first']:.4f}",
        "same result": None if name == OURS else "yes" if side["same_result"] else "no",
        "note": task.peers[name].note if name in task.peers else "",
    })  # fmt: skip
    return row
