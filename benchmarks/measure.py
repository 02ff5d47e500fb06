"""What the benchmarks share: memory, the machine's matrix-multiply rate, repeats, reports, peer environments.

Scripts run as `python benchmarks/NAME.py` import it as `measure`. It needs only the standard library and torch, so
that a peer's script, which runs in the peer's own environment, can use it too (`worker_environment` puts it on the
path of a child process).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
ENVIRONMENTS = BENCHMARKS / ".envs"
RESULTS = BENCHMARKS / "results"
CPU_TORCH = "torch==2.13.0"
"""The torch of a peer's environment on a machine without a GPU."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------------ memory


def peak_rss_bytes(device: torch.device | str = "cpu") -> int:
    """Highest memory since the start or the last `reset_peak_rss`: the process's resident set (VmHWM of
    /proc/self/status), or on a GPU what torch allocated there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def current_rss_bytes(device: torch.device | str = "cpu") -> int:
    """Memory held now, measured as `peak_rss_bytes` measures it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def reset_peak_rss(device: torch.device | str = "cpu") -> None:
    """Let the peak start again from the memory held now (5 written to /proc/self/clear_refs; proc(5))."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        raise RuntimeError(f"{status} is not there: memory is measured on Linux only")
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no field {field}")


# -------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Repeats:
    """Seconds of repeated runs, the warm-up left out."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("no repeat is left after the warm-up; repeat more often")

    @classmethod
    def after_warm_up(cls, seconds: Sequence[float], warm_up: int) -> Repeats:
        """Of the seconds of all runs in order, those after the first `warm_up`."""
        return cls(tuple(seconds[warm_up:]))

    @classmethod
    def of(cls, function: Callable[[], Any], *, repeats: int, warm_up: int, device: Any = "cpu") -> Repeats:
        """Time `function` `warm_up + repeats` times and keep the last `repeats`."""
        seconds = []
        for _ in range(warm_up + repeats):
            synchronise(device)
            started = time.perf_counter()
            function()
            synchronise(device)
            seconds.append(time.perf_counter() - started)
        return cls.after_warm_up(seconds, warm_up)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """{"median", "min", "max", "seconds"}, for a report."""
        return {"median": self.median, "min": self.min, "max": self.max, "seconds": list(self.seconds)}


def synchronise(device: Any) -> None:
    """Wait for the work queued on a GPU; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(dtype: torch.dtype, device: torch.device | str, size: int | None = None, *, repeats: int = 9) -> float:
    """FLOP/s of a square matrix product of `size` measured now, with torch's current threads: the median of several.

    2 size^3 operations each. The default size is 2048 on a CPU and 8192 on a GPU, large enough for the full rate.
    """
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    taken = Repeats.of(lambda: torch.mm(left, right, out=out), repeats=repeats, warm_up=3, device=device)
    return 2.0 * size**3 / taken.median


def device_and_dtype(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that `--device` (auto, cpu, cuda) and `--dtype` (auto, fp32, bf16, fp16) mean here.

    `auto` is the GPU when there is one, and bf16 on it, fp32 on a CPU. Raises SystemExit for `cuda` without a GPU.
    """
    wanted = getattr(arguments, "device", "auto") or "auto"
    if wanted not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"--device {wanted}: choose auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU on this machine; use --device cpu")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    precision = getattr(arguments, "dtype", "auto") or "auto"
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise SystemExit(f"--dtype {precision}: choose one of auto, {', '.join(PRECISIONS)}")
    return device, PRECISIONS[precision]


# ----------------------------------------------------------------------------------------------------- reports


def machine_facts() -> dict[str, Any]:
    """What a figure depends on: processor, cores, threads, versions, commit; "unknown" where it cannot be told."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "commit": _commit(),
        **{name: _version(name) for name in ("torch", "deepspeed", "transformers", "trl", "peft")},
    }


def write_report(
    name: str, payload: Mapping[str, Any], table_rows: Sequence[Mapping[str, Any]], out_dir: Path | str = RESULTS
) -> tuple[Path, Path]:
    """Write `<out_dir>/<name>.json` and, beside it, `<name>.md` with one table; returns both paths.

    `payload` goes into the JSON as it is, beside "machine" (`machine_facts`) and "table" (`table_rows`). The columns
    of the table are the keys of the rows in order of first appearance; a missing or None cell is a dash.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    machine = machine_facts()
    content = {"name": name, "machine": machine, **payload, "table": [dict(row) for row in table_rows]}
    json_path, markdown_path = directory / f"{name}.json", directory / f"{name}.md"
    json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if value is not None)
    markdown_path.write_text(f"{markdown_table(table_rows)}\n\n{facts}\n", encoding="utf-8")
    return json_path, markdown_path


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; floats with three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# ----------------------------------------------------------------------------------------------- environments


def peer_environment(name: str, requirements: Sequence[str]) -> Path:
    """The Python of `benchmarks/.envs/<name>`: a virtual environment with `requirements` and a torch like ours.

    Made with pip on first use (minutes, needs the package registry) and again when the requirements change: a marker
    file holds what was installed. Without a GPU torch is `CPU_TORCH`; with one it is the version that runs here.
    """
    torch_here = CPU_TORCH
    if torch.cuda.is_available():
        torch_here = f"torch=={torch.__version__.split('+')[0]}"
    wanted = [torch_here, *requirements]
    directory = ENVIRONMENTS / name
    python, marker = directory / "bin" / "python", directory / "installed.txt"
    content = "\n".join(wanted) + "\n"
    if python.exists() and marker.is_file() and marker.read_text() == content:
        return python
    print(f"making the environment {directory} with {', '.join(wanted)} (once)", file=sys.stderr, flush=True)
    venv.create(directory, with_pip=True, clear=marker.is_file())
    done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted])
    if done.returncode != 0:
        raise SystemExit(
            f"pip could not install {', '.join(wanted)} into {directory} (exit status {done.returncode}): "
            "see its message above; the package registry must be reachable"
        )
    marker.write_text(content)
    return python


def worker_environment(threads: int | None = None) -> dict[str, str]:
    """Environment variables of a measured child process: `measure` and the library on its path, nothing downloaded,
    `threads` OpenMP threads (None leaves them as they are)."""
    added = [str(BENCHMARKS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(added), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):  # the child is a world of its own
        environment.pop(name, None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    return environment
