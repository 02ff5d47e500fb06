"""What a stage runs on, written down at each of its starts: versions, devices, command line, revision of the code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlhf import __version__
from rlhf.distributed.log import logger
from rlhf.distributed.place import world_size
from rlhf.pipeline.stages import PROJECT
from rlhf.report.run_record import STARTS_FILE

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy")


def note_start(directory: Path, *, step: int) -> None:
    """Add this start after `step` to `STARTS_FILE`; one at step 0 takes the place of all earlier ones. Rank 0 calls.

    A disk that cannot be written stops no run.
    """
    path = directory / STARTS_FILE
    try:
        with path.open("a" if step else "w", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **surroundings()}) + "\n")  # ASCII: arguments may be of any encoding
    except OSError as error:
        logger.error("%s cannot be written: %s", path, error.strerror or error)


def surroundings() -> dict[str, Any]:
    """What this process runs on. What cannot be found out is null."""
    on_gpu = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "rlhf": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "host": platform.node(),
        "processes": world_size(),
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str | None:
    """The commit of the code, with a plus where files differ from it; None outside a checkout."""
    found = []
    for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode != 0:
            return None
        found.append(done.stdout.strip())
    return found[0] + ("+" if found[1] else "")
