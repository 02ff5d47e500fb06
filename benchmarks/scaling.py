"""How time and memory of ours grow, one thing at a time: rollout batch, lengths, vocabulary, model size, ranks.

python benchmarks/scaling.py [--quick] [--sweeps batch response ...] [--device cuda --dtype bf16]

Every point is a process of its own (`sides/rlhf_scaling.py`) with random weights and random tokens. Of a sweep of
lengths or batches the report fits seconds against *real* tokens: an exponent (slope of the logarithms) and the r2 of a
straight line, beside the r2 against padded tokens (rows times the longest row). `skew` holds the same number of real
tokens in a few long rows and many short ones. One rank has two threads, two ranks one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure

BENCHMARKS = measure.BENCHMARKS


@dataclass(frozen=True)
class Point:
    """One process. `lengths` are the tokens of each prompt (PPO) or row (SFT); PPO samples up to `response` tokens
    more, each of which ends the response with probability `end_rate` (0: never)."""

    stage: Literal["ppo", "sft"] = "ppo"
    lengths: tuple[int, ...] = (64,) * 16
    response: int = 48
    end_rate: float = 0.0
    vocabulary: int = 8000
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    micro_batch_size: int = 8
    ranks: int = 1
    warm_up: int = 1
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "fp32"


def skewed(lengths: Sequence[int], *, share: int = 8, short: int = 3) -> tuple[int, ...]:
    """As many rows with as many tokens in all: one row in `share` is long, the others are 1 / `short` of the mean."""
    total, rows = sum(lengths), len(lengths)
    few = max(1, rows // share)
    low = max(2, total // rows // short)
    rest, extra = divmod(total - low * (rows - few), few)
    return (*(rest + (place < extra) for place in range(few)), *(low,) * (rows - few))


PPO = Point()
SFT = Point(stage="sft", lengths=(96,) * 32)


def sweeps(ppo: Point = PPO, sft: Point = SFT) -> dict[str, list[Point]]:
    """The points of each sweep; a point of two sweeps is measured once."""

    def batch(point: Point, rows: int) -> Point:
        return replace(point, lengths=(point.lengths[0],) * rows)

    def length(point: Point, tokens: int) -> Point:
        return replace(point, lengths=(tokens,) * len(point.lengths))

    rows, prompt, row = len(ppo.lengths), ppo.lengths[0], sft.lengths[0]
    twice, four_times = batch(ppo, 2 * rows), batch(ppo, 4 * rows)
    wide = 4 * ppo.vocabulary
    return {
        "batch": [batch(ppo, rows // 2), ppo, twice, four_times],
        "response": [replace(ppo, response=ppo.response // 2), ppo, replace(ppo, response=2 * ppo.response)],
        "skew": [
            ppo,
            replace(ppo, lengths=skewed(ppo.lengths)),
            replace(ppo, response=4 * ppo.response, end_rate=1 / ppo.response),
        ],
        # smaller batches would not fill a scoring pass, and then the batch does show
        "vocabulary": [twice, four_times, replace(twice, vocabulary=wide), replace(four_times, vocabulary=wide)],
        "model": [
            replace(ppo, hidden=ppo.hidden // 2, layers=ppo.layers // 2),
            ppo,
            replace(ppo, hidden=ppo.hidden * 3 // 2, layers=ppo.layers * 3 // 2),
        ],
        "ranks": [ppo, twice, replace(ppo, ranks=2), replace(twice, ranks=2)],
        "sft": [length(sft, row // 2), sft, length(sft, 2 * row), replace(sft, lengths=skewed(sft.lengths))],
        "sft vocabulary": [sft, replace(sft, vocabulary=wide)],
        "sft ranks": [sft, replace(sft, ranks=2)],
        "prompt": [length(ppo, prompt // 2), ppo, length(ppo, 2 * prompt)],
    }


DEFAULT_SWEEPS = ("batch", "response", "skew", "vocabulary", "model", "ranks", "sft", "sft vocabulary", "sft ranks")
QUICK_SWEEPS = ("skew", "sft")
TOKEN_SWEEPS = ("batch", "response", "skew", "prompt", "sft")
"""Sweeps of one model, whose seconds are fitted against tokens."""
PHASES = {"ppo": ("generation", "scoring", "update"), "sft": ("step",)}


# ------------------------------------------------------------------------------------------------------- fits


def exponent(tokens: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Slope of log(seconds) over log(tokens) by least squares: 1 is linear. None for one number of tokens."""
    return _slope([math.log(x) for x in tokens], [math.log(y) for y in seconds])


def linear_r2(tokens: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Share of the variance of `seconds` that a straight line over `tokens` explains. None for one number of tokens."""
    slope = _slope(tokens, seconds)
    if slope is None:
        return None
    mean_x, mean_y = sum(tokens) / len(tokens), sum(seconds) / len(seconds)
    total = sum((y - mean_y) ** 2 for y in seconds)
    left = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(tokens, seconds, strict=True))
    return 1.0 - left / total if total else None


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread <= 1e-9 * (1 + mean_x**2):
        return None
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def fits(results: Sequence[Mapping[str, Any]], phase: str) -> dict[str, Any]:
    """Exponent and r2 of the seconds of one phase, against real and against padded tokens."""
    seconds = [result["seconds"][phase] for result in results]
    real = [result["real_tokens"] for result in results]
    return {
        "exponent_real_tokens": exponent(real, seconds),
        "r2_real_tokens": linear_r2(real, seconds),
        "r2_padded_tokens": linear_r2([result["padded_tokens"] for result in results], seconds),
        "seconds_per_1000_real_tokens": [1000 * y / x for x, y in zip(real, seconds, strict=True)],
    }


def scoring_memory(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Memory that scoring adds over the vocabulary x batch grid, beside the float32 logits of the whole batch, and the
    largest over the smallest of it (at least a megabyte: less is noise)."""
    grid = [
        {
            "vocabulary": result["point"]["vocabulary"],
            "batch": len(result["point"]["lengths"]),
            "scoring_bytes": result["phase_bytes"]["scoring"],
            "logits_bytes": 4
            * result["point"]["vocabulary"]
            * (result["real_tokens"] - sum(result["point"]["lengths"])),
        }
        for result in results
    ]
    found = [cell["scoring_bytes"] for cell in grid]
    return {"grid": grid, "largest_over_smallest": max(found) / max(1e6, min(found))}


# ---------------------------------------------------------------------------------------------------- running


def run_point(point: Point, work: Path) -> dict[str, Any]:
    """Measure one point in a fresh process, or with two ranks in two under the launcher; its result."""
    from sides.rlhf_scaling import save_base

    shape = [point.vocabulary, point.hidden, point.layers, point.heads, point.end_rate]
    base = work / f"base-{'-'.join(map(str, shape))}"
    if not base.is_dir():  # made here: making it must not show in the memory of the measured process
        (base / "run").mkdir(parents=True)
        save_base(asdict(point), base)
    result = work / "result.json"
    for old in work.glob("result.json.rank*"):
        old.unlink()
    job = json.dumps({"point": asdict(point), "work": str(base), "result": str(result)})
    script = str(BENCHMARKS / "sides" / "rlhf_scaling.py")
    threads = torch.get_num_threads()
    environment = measure.worker_environment(max(1, threads // point.ranks))
    if point.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, script]
    if point.ranks > 1:
        from rlhf.distributed.place import free_port

        environment["LOCAL_SIZE"] = str(point.ranks)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(point.ranks)]
        command += ["--master_port", str(free_port()), script]
    (work / "job.json").write_text(job)
    done = subprocess.run(
        [*command, str(work / "job.json")], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    parts = sorted(work.glob("result.json.rank*"))
    if done.returncode != 0 or len(parts) != point.ranks:
        raise SystemExit(f"{point} failed (exit status {done.returncode}):\n{done.stdout[-4000:]}")
    return merge([json.loads(part.read_text()) for part in parts])


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks: the seconds of the slowest and the memory of the largest, phase by phase."""
    merged = dict(parts[0])
    for name in ("seconds", "phase_bytes"):
        merged[name] = {phase: max(part[name][phase] for part in parts) for phase in parts[0][name]}
    merged["peak_above_imports_bytes"] = max(part["peak_above_imports_bytes"] for part in parts)
    return merged


def table_rows(sweep: str, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per point."""
    rows = []
    for result in results:
        point = result["point"]
        row = {
            "sweep": sweep,
            "rows": len(point["lengths"]),
            "response": point["response"] if point["stage"] == "ppo" else None,
            "vocabulary": point["vocabulary"],
            "hidden x layers": f"{point['hidden']} x {point['layers']}",
            "ranks": point["ranks"],
            "real tokens": result["real_tokens"],
            "padded tokens": result["padded_tokens"],
        }
        for phase, seconds in result["seconds"].items():
            row[f"{phase} s"] = seconds
            row[f"{phase} tokens/s"] = result["real_tokens"] / seconds
        row["peak above imports MB"] = result["peak_above_imports_bytes"] / 1e6
        for phase, held in result["phase_bytes"].items():
            row[f"{phase} adds MB"] = held / 1e6
        rows.append(row)
    return rows


def measure_sweeps(
    chosen: Sequence[str], points: Mapping[str, Sequence[Point]], out_dir: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All points of the chosen sweeps, each once; payload and table rows."""
    seen: dict[Point, dict[str, Any]] = {}
    payload: dict[str, Any] = {"sweeps": {}}
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for sweep in chosen:
            for point in points[sweep]:
                if point not in seen:
                    print(f"{sweep}: {point}", file=sys.stderr, flush=True)
                    seen[point] = run_point(point, Path(directory))
            results = [seen[point] for point in points[sweep]]
            found: dict[str, Any] = {"points": results}
            if sweep in TOKEN_SWEEPS:
                found["fits"] = {phase: fits(results, phase) for phase in PHASES[points[sweep][0].stage]}
            if sweep == "vocabulary":
                found["scoring_memory"] = scoring_memory(results)
            payload["sweeps"][sweep] = found
            table += table_rows(sweep, results)
    return payload, table


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    points = sweeps()
    parser = argparse.ArgumentParser(description="how time and memory of ours grow")
    parser.add_argument("--quick", action="store_true", help=f"the sweeps {', '.join(QUICK_SWEEPS)}, one repeat")
    parser.add_argument("--sweeps", nargs="+", choices=sorted(points))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16, fp16")
    parser.add_argument("--threads", type=int, default=2, help="of one rank; two ranks share them")
    parser.add_argument("--out-dir", type=Path, default=measure.RESULTS)
    options = parser.parse_args(argv)
    device, dtype = measure.device_and_dtype(options)
    names = {value: name for name, value in measure.PRECISIONS.items()}
    torch.set_num_threads(options.threads)
    repeats = options.repeats or (1 if options.quick else 3)
    common: dict[str, Any] = {"device": device.type, "dtype": names[dtype], "repeats": repeats}
    points = sweeps(replace(PPO, **common), replace(SFT, **common))
    chosen = options.sweeps or (QUICK_SWEEPS if options.quick else DEFAULT_SWEEPS)
    payload, table = measure_sweeps(chosen, points, options.out_dir)
    paths = measure.write_report("scaling", payload, table, options.out_dir)
    print(f"{measure.markdown_table(table)}\n")
    for sweep, found in payload["sweeps"].items():
        for phase, fit in found.get("fits", {}).items():
            print(f"{sweep}, {phase}: " + ", ".join(f"{name} {_shown(value)}" for name, value in fit.items()))
        if "scoring_memory" in found:
            print(f"scoring memory, largest over smallest: {found['scoring_memory']['largest_over_smallest']:.2f}")
    print(f"written: {', '.join(map(str, paths))}")
    return payload


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{entry:.3g}" for entry in value) + "]"
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
