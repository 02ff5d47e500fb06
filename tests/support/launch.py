"""Run a python file on several CPU ranks: through the real `deepspeed` launcher, or forked (see rank_server.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
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
    path = _program(script, tmp_path)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
    command += ["--master_port", str(port or free_port()), str(path), *map(str, args)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=_environment(world),
        start_new_session=True,
    )


def launch_ranks(
    script: str | Path, world: int, tmp_path: Path, args: Sequence[str] = (), *, timeout: float = 300.0, port: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `script` to its end through the launcher; see `start_ranks`.

    Returns the finished process with its output; fails with the output when it takes longer than `timeout` seconds.
    """
    process = start_ranks(script, world, tmp_path, args, port=port)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and every rank it started
        output, _ = process.communicate()
        raise AssertionError(_late(script, world, timeout, output)) from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def run_ranks(
    script: str | Path, world: int, tmp_path: Path, args: Sequence[str] = (), *, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """What `launch_ranks` gives, by ranks that are forked from one process with everything imported."""
    path, output = _program(script, tmp_path), tmp_path / "ranks.log"
    output.unlink(missing_ok=True)
    environment = {**_environment(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = {"script": str(path), "world": world, "arguments": list(map(str, args)), "directory": str(tmp_path)}
    job |= {"environment": environment, "output": str(output), "timeout": timeout}
    server = _rank_server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps(job), file=server.stdin, flush=True)
    ended = json.loads(server.stdout.readline())
    text = output.read_text(encoding="utf-8", errors="replace")
    if ended["late"]:
        raise AssertionError(_late(script, world, timeout, text))
    return subprocess.CompletedProcess([str(path)], ended["returncode"], text, "")


@cache
def _rank_server() -> subprocess.Popen[str]:
    """The process that ranks are forked from: one for all tests of this process, with which its input ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=_environment(1),
    )


def _program(script: str | Path, tmp_path: Path) -> Path:
    tmp_path.mkdir(parents=True, exist_ok=True)
    if "\n" not in str(script):
        return Path(script)
    path = tmp_path / "ranks.py"
    path.write_text(f"{script}{LEAVE}", encoding="utf-8")
    return path


def _environment(world: int) -> dict[str, str]:
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
    return environment


def _late(script: str | Path, world: int, timeout: float, output: str) -> str:
    return f"{script} on {world} ranks took more than {timeout:.0f} s:\n{output[-4000:]}"
