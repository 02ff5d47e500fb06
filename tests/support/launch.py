"""Start a python file on several CPU ranks through the real `deepspeed` launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.distributed.place import free_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Set by tests that made a world of one in this process, and not for a process of their own."""


LEAVE = """
from rlhf.distributed.world import close_world
close_world()
"""
"""The end of every program given as text: a rank that only exits may be aborted by gloo's threads (PyTorch #190489)."""


def start_ranks(
    script: str | Path, world: int, tmp_path: Path, args: Sequence[str] = (), *, port: int = 0
) -> subprocess.Popen[str]:
    """Start `script` (a path, or the text of a python program) on `world` ranks over gloo; `port` 0 takes a free one.

    The launcher and every rank are in a session of their own: `os.killpg(process.pid, ...)` reaches all of them.
    """
    tmp_path.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "ranks.py"
    if "\n" in str(script):
        path.write_text(f"{script}{LEAVE}", encoding="utf-8")
    else:
        path = Path(script)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "LOCAL_SIZE": str(world),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    for name in LAUNCHER_VARIABLES:
        environment.pop(name, None)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
    command += ["--master_port", str(port or free_port()), str(path), *map(str, args)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    )


def run_ranks(
    script: str | Path, world: int, tmp_path: Path, args: Sequence[str] = (), *, timeout: float = 300.0, port: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `script` to its end; see `start_ranks`.

    Returns the finished process with its output; fails with the output when it takes longer than `timeout` seconds.
    """
    process = start_ranks(script, world, tmp_path, args, port=port)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and every rank it started
        output, _ = process.communicate()
        message = f"{script} on {world} ranks took more than {timeout:.0f} s:\n{output[-4000:]}"
        raise AssertionError(message) from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")
