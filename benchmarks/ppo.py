"""Whole PPO iterations of this project beside TRL's PPOTrainer: speed, phases, memory, share of the machine's rate.

python benchmarks/ppo.py [--workloads W1,W2,W3,W4] [--dtype bf16] [--device cuda --size 1.3b] [--quick] [--peer none]

Both sides get the same weights, prompts (token ids), sampling (temperature 1, no filter, the same stop token),
response limit, rollout size, micro-batch size, optimizer steps and threads. Every measurement is a fresh process, so
that peak memory is its own; processes of the two sides take turns, for `--rounds` rounds of `--iterations` iterations
after `--warmup` ones. The peer is trl==0.24.0 with transformers==4.57.* (the last that have this trainer), in an
environment that the benchmark makes on first use.

W1 32 prompts of 16 to 96 tokens (`--prompts skewed`: log-normal, median 24, at most 96), 64 new tokens, 1 PPO epoch,
micro-batch 8; W2 192 new tokens; W3 W2 with a model trained to end its answers; W4 W1 with 4 PPO epochs. In the others
the models practically never end an answer, so that every response has the full length on both sides. What is counted
as necessary is said in `flops.py`. With `--advantage grpo` or `rloo` the rollouts have four responses to each of a
quarter of the prompts, there is no critic, and the peer is that trainer of TRL 1.x in this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flops import Shape, necessary_flops
from measure import (
    BENCHMARKS,
    ENVIRONMENTS,
    PRECISIONS,
    RESULTS,
    Repeats,
    device_and_dtype,
    markdown_table,
    matmul_rate,
    peer_environment,
    worker_environment,
    write_report,
)
from ppo_workloads import QUICK, SIZES, WORKLOADS, length_statistics, make_job, write_job

PEER_REQUIREMENTS = ["trl==0.24.0", "transformers==4.57.*"]
GROUPED = ("grpo", "rloo")
SAMPLES_PER_PROMPT = 4
"""Of the estimators that compare the responses to a prompt."""
PHASES = ("generation", "scoring", "update")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W1,W2,W3,W4", help="comma-separated")
    parser.add_argument("--size", choices=sorted(SIZES), default="9m")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help=f"auto (fp32 on a CPU, bf16 on a GPU), {', '.join(PRECISIONS)}")
    parser.add_argument("--threads", type=int, default=2, help="OpenMP threads of either side")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, taking turns")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each process")
    parser.add_argument("--warmup", type=int, default=1, help="iterations of each process that do not count")
    parser.add_argument("--advantage", choices=("gae", *GROUPED), default="gae", help="gae: PPO with a critic")
    parser.add_argument("--peer", choices=("trl", "none"), default="trl")
    parser.add_argument(
        "--peer_rollout_batch", type=int, default=32, help="TRL's local_rollout_forward_batch_size (its default: 64)"
    )
    parser.add_argument(
        "--peer_bf16_weights", action="store_true", help="with bf16, load TRL's models in bf16 beside its autocast"
    )
    parser.add_argument(
        "--peer_gradient_checkpointing", action="store_true", help="TRL's default; it is faster without, as here"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", choices=("uniform", "skewed"), default="uniform", help="their lengths")
    parser.add_argument("--quick", action="store_true", help="tiny models, for a look at whether it runs")
    parser.add_argument("--work_dir", type=Path, default=ENVIRONMENTS / "ppo_models", help="built models are kept here")
    parser.add_argument("--out_dir", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    known = QUICK if arguments.quick else WORKLOADS
    if arguments.quick:
        arguments.size = "tiny"
        if arguments.workloads == parser.get_default("workloads"):
            arguments.workloads = ",".join(known)
    if arguments.advantage in GROUPED:
        if arguments.workloads == parser.get_default("workloads"):
            arguments.workloads = "W1,W2,W3"
        if any(name in known and known[name].ppo_epochs > 1 for name in arguments.workloads.split(",")):
            parser.error(f"--advantage {arguments.advantage} measures one pass over a rollout: leave W4 out")
    unknown = set(arguments.workloads.split(",")) - set(known)
    if unknown:
        parser.error(f"--workloads {','.join(sorted(unknown))}: choose from {', '.join(known)}")
    return arguments


def run_process(python: Path | str, script: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What one side measured on `job` in a fresh process; SystemExit with its last lines if it fails."""
    environment = worker_environment(job["threads"])
    if job["device"] == "cpu":
        environment.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory() as directory:
        job_file, out_file = write_job(job, Path(directory) / "job.json"), Path(directory) / "out.json"
        done = subprocess.run(
            [str(python), str(script), str(job_file), str(out_file)],
            env=environment,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0 or not out_file.is_file():
            tail = "\n".join(done.stdout.splitlines()[-30:])
            raise SystemExit(f"{script.name} ended with status {done.returncode} on {job['workload']['name']}:\n{tail}")
        measured: dict[str, Any] = json.loads(out_file.read_text(encoding="utf-8"))
        return measured


def median_phase(iterations: list[dict[str, Any]], phase: str) -> float | None:
    """Median seconds of a phase, None where the side does not tell it apart."""
    seconds = [item[phase] for item in iterations if item.get(phase) is not None]
    return statistics.median(seconds) if seconds else None


def summarise_side(runs: list[dict[str, Any]], job: dict[str, Any]) -> dict[str, Any]:
    """What one side's processes measured together, the warm-up left out."""
    warmup = job["warmup"]
    kept = [item for run in runs for item in run["iterations"][warmup:]]
    seconds = Repeats.after_warm_up([item["total"] for item in kept], 0)
    lengths = [length for run in runs for row in run["response_tokens"][warmup:] for length in row]
    return {
        "samples_per_second": job["workload"]["prompts"] / seconds.median,
        "seconds": seconds.as_dict(),
        "phase_seconds": {phase: median_phase(kept, phase) for phase in (*PHASES, "experience")},
        "cpu_seconds": statistics.median(item["cpu"] for item in kept),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "bytes_after_imports": max(run["bytes_after_imports"] for run in runs),
        "response_tokens": length_statistics(lengths, job["workload"]["max_new_tokens"]),
        "facts": {key: runs[0].get(key) for key in ("versions", "threads", "fingerprint", "optimizer", "attention")},
    }


def rate_shares(runs: list[dict[str, Any]], side: dict[str, Any], job: dict[str, Any], rate: float) -> dict[str, Any]:
    """Necessary operations of an iteration of ours (mean), and the share of `rate` (FLOP/s) they reach in its median
    seconds; for each phase that is told apart as well."""
    shape, epochs = Shape(**job["shape"]), job["workload"]["ppo_epochs"]
    counts = [
        necessary_flops(shape, zip(prompts, responses, strict=True), epochs)
        for run in runs
        for prompts, responses in list(zip(run["prompt_tokens"], run["response_tokens"], strict=True))[job["warmup"] :]
    ]
    flops = {name: statistics.fmean(count[name] for count in counts) for name in counts[0]}
    seconds = {**side["phase_seconds"], "total": side["seconds"]["median"]}
    return {
        "necessary_flops": flops,
        "share_of_matmul_rate": {
            name: flops[name] / (seconds[name] * rate) for name in flops if seconds[name] is not None
        },
    }


def measure_workload(name: str, arguments: argparse.Namespace, peer_python: Path | None) -> dict[str, Any]:
    """Both sides on one workload, taking turns."""
    device, dtype = device_and_dtype(arguments)
    precision = next(key for key, value in PRECISIONS.items() if value == dtype)
    workload = (QUICK if arguments.quick else WORKLOADS)[name]
    if arguments.prompts == "skewed":
        workload = replace(workload, skewed_prompts=True)
    job = {
        **make_job(workload, arguments.size, arguments.work_dir, seed=arguments.seed, quick=arguments.quick),
        "advantage": arguments.advantage,
        "samples_per_prompt": SAMPLES_PER_PROMPT if arguments.advantage in GROUPED else 1,
        "device": device.type,
        "dtype": precision,
        "threads": arguments.threads,
        "warmup": arguments.warmup,
        "iterations": arguments.iterations,
        "peer_rollout_batch": min(arguments.peer_rollout_batch, workload.prompts),
        "peer_bf16_weights": arguments.peer_bf16_weights,
        "peer_gradient_checkpointing": arguments.peer_gradient_checkpointing,
    }
    peer_script = "trl_groups.py" if arguments.advantage in GROUPED else "trl_ppo.py"
    ours, peer, rates = [], [], []
    for turn in range(1, arguments.rounds + 1):
        rates.append(matmul_rate(dtype, device))
        ours.append(run_process(sys.executable, BENCHMARKS / "sides" / "rlhf_ppo.py", job))
        progress(name, turn, "ours", ours[-1])
        if peer_python is not None:
            peer.append(run_process(peer_python, BENCHMARKS / "peers" / peer_script, job))
            progress(name, turn, "trl", peer[-1])
            check_same_model(ours[-1], peer[-1], precision)
    rate = statistics.median(rates)
    our_summary = summarise_side(ours, job)
    result = {
        "name": name,
        "job": {key: value for key, value in job.items() if key not in ("prompts", "actor", "reward")},
        "prompt_tokens": [len(ids) for ids in job["prompts"]],
        "matmul_flops_per_second": {"median": rate, "measured": rates},
        "ours": our_summary
        if arguments.advantage in GROUPED
        else {**our_summary, **rate_shares(ours, our_summary, job, rate)},
    }
    if peer:
        result["peer"] = summarise_side(peer, job)
        result["speed_ratio"] = result["ours"]["samples_per_second"] / result["peer"]["samples_per_second"]
        result["memory_ratio"] = result["ours"]["peak_bytes"] / result["peer"]["peak_bytes"]
    return result


def check_same_model(ours: dict[str, Any], peer: dict[str, Any], precision: str) -> None:
    """SystemExit unless both sides loaded the same weights: the log-sum-exp of the first prompt's last logits."""
    tolerance = 1e-3 if precision == "fp32" else 0.05
    if abs(ours["fingerprint"] - peer["fingerprint"]) > tolerance:
        raise SystemExit(
            f"the two sides do not run the same model: {ours['fingerprint']} and {peer['fingerprint']} differ by more "
            f"than {tolerance}; remove --work_dir and run again"
        )


def progress(name: str, turn: int, side: str, run: dict[str, Any]) -> None:
    seconds = " ".join(f"{item['total']:.2f}" for item in run["iterations"])
    print(f"{name} round {turn} {side}: {seconds} s, {run['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)


def table_row(result: dict[str, Any]) -> dict[str, Any]:
    """One workload as a row: speed, phases, memory, lengths."""
    ours, peer = result["ours"], result.get("peer")
    row: dict[str, Any] = {"workload": result["name"], "dtype": result["job"]["dtype"]}
    row["samples/s"] = ours["samples_per_second"]
    if peer:
        row["TRL samples/s"], row["ratio"] = peer["samples_per_second"], result["speed_ratio"]
    row["s/iteration"] = ours["seconds"]["median"]
    for label, side in (("", ours), ("TRL ", peer)):
        if side and side["phase_seconds"]["update"] is not None:
            phases = side["phase_seconds"]
            first = phases["generation"], phases["scoring"]
            together = f"({phases['experience']:.2f})" if None in first else " + ".join(f"{part:.2f}" for part in first)
            row[f"{label}generation + scoring + update, s"] = f"{together} + {phases['update']:.2f}"
    row["peak GB"] = ours["peak_bytes"] / 1e9
    if peer:
        row["TRL peak GB"], row["memory ratio"] = peer["peak_bytes"] / 1e9, result["memory_ratio"]
    row["response tokens"] = ours["response_tokens"]["mean"]
    if peer:
        row["TRL response tokens"] = peer["response_tokens"]["mean"]
    row["median / limit"] = ours["response_tokens"]["median_share_of_maximum"]
    if "share_of_matmul_rate" in ours:
        row["share of matmul rate"] = f"{ours['share_of_matmul_rate']['total']:.0%}"
    row["matmul GFLOP/s"] = result["matmul_flops_per_second"]["median"] / 1e9
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    device, dtype = device_and_dtype(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(arguments.threads)
    if os.getloadavg()[0] > 0.5:
        print(
            f"load average {os.getloadavg()[0]:.1f}: others use this machine too. Spinning threads lose far more to "
            "that than their share; cpu_seconds in the JSON of a run with --threads 1 are the more reliable figure",
            file=sys.stderr,
        )
    peer_python = None
    if arguments.peer == "trl":
        grouped = arguments.advantage in GROUPED
        peer_python = Path(sys.executable) if grouped else peer_environment("trl-0.24", PEER_REQUIREMENTS)
    results = [measure_workload(name, arguments, peer_python) for name in arguments.workloads.split(",")]
    rows = [table_row(result) for result in results]
    payload = {
        "command": " ".join(sys.argv if argv is None else ["benchmarks/ppo.py", *argv]),
        "size": arguments.size,
        "parameters": SIZES[arguments.size].parameters,
        "flops_counted": sys.modules["flops"].__doc__,
        "workloads": results,
    }
    task = "ppo" if arguments.advantage == "gae" else arguments.advantage
    name = f"{task}-{arguments.size}-{device.type}-{str(dtype).removeprefix('torch.')}"
    if arguments.peer_bf16_weights:
        name += "-peer-bf16"
    if arguments.peer_gradient_checkpointing:
        name += "-peer-checkpointing"
    if arguments.prompts != "uniform":
        name += f"-{arguments.prompts}"
    json_path, markdown_path = write_report(name, payload, rows, arguments.out_dir)
    print(markdown_table(rows))
    print(f"\n{json_path}\n{markdown_path}")
    return payload


if __name__ == "__main__":
    main()
