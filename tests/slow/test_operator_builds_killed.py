"""A run that is killed while DeepSpeed's operators are compiled does not make the next one wait for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.launch import LAUNCHER_VARIABLES

ROOT = Path(__file__).parents[2]
START = "from rlhf.distributed.world import init_world, close_world; init_world(); print('started'); close_world()"


def start(extensions: Path) -> subprocess.Popen[str]:
    """A process that makes a world of one, for which DeepSpeed compiles its all-reduce on a CPU first."""
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for name in LAUNCHER_VARIABLES:
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", START],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def killed_build(extensions: Path, *, compiler_too: bool) -> Path:
    """Start a build and kill it while it compiles; the lock that it leaves."""
    process = start(extensions)
    until = time.monotonic() + 300
    while not compiles(process.pid):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL) if compiler_too else process.kill()
    process.wait()
    (lock,) = extensions.glob("*/lock")
    assert not list(lock.parent.glob("*.so")), "the build was not killed half-way"
    return lock


def compiles(pid: int) -> bool:
    """Whether a compiler is at work below the process `pid`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(child.name() == "cc1plus" for child in psutil.Process(pid).children(recursive=True))
    return False


def test_the_next_run_takes_over_the_lock_of_a_killed_build(tmp_path):
    killed_build(tmp_path, compiler_too=True)
    lock = killed_build(tmp_path, compiler_too=False)  # it compiles: it has taken over the first one's lock
    process = start(tmp_path)
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"it waits for {lock}: {process.communicate()[0]}") from None
    assert process.returncode == 0 and output.splitlines()[-1] == "started", output
    assert f"{lock} was left by a process that is gone: taking it over" in output
    assert not lock.exists() and list(lock.parent.glob("*.so"))
    assert "built successfully" not in output
