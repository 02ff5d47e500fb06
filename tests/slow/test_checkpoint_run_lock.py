"""One run at a time: processes that hold a directory, die, and come all at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.checkpoint.run_lock import RunLock
from rlhf.config import ConfigError
from tests.support.held_directory import left_behind, without_flock
from tests.support.launch import ROOT

HOLD = """
import fcntl, os, sys, time
from rlhf.checkpoint.run_lock import RunLock
if "without_flock" in sys.argv:
    def flock(*_):
        raise OSError(37, "No locks available")
    fcntl.flock = flock
with RunLock(sys.argv[1]):
    worker = os.fork() if "fork" in sys.argv else 1
    if worker == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    sys.stdin.readline()
"""


def holder(directory: Path, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A process that holds `directory` until a line or a kill, and the pid of its worker where it forked one."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"},
    )
    return process, int(process.stdout.readline())


def end(process: subprocess.Popen[str], *, kill: bool) -> None:
    if kill:
        process.kill()
    process.communicate("\n" if not kill else None, timeout=60)


@pytest.fixture(params=["flock", "without_flock"])
def mechanism(request, monkeypatch) -> str:
    if request.param == "without_flock":
        without_flock(monkeypatch)
    return request.param


@pytest.mark.parametrize("kill", [False, True])
def test_held_refused_and_free_again(mechanism, kill, tmp_path, caplog):
    process, _ = holder(tmp_path / "run", mechanism)
    try:
        with pytest.raises(ConfigError) as raised, RunLock(tmp_path / "run"):
            pass
        text = str(raised.value)
        assert f"process {process.pid} on {socket.gethostname()}, since 20" in text
        assert str(tmp_path / "run") in text and f"kill {process.pid}" in text and "--output_dir" in text
        assert mechanism in text  # its command line
        with RunLock(tmp_path / "other"):
            pass
    finally:
        end(process, kill=kill)
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert (f"process {process.pid} on" in caplog.text and "died" in caplog.text) == kill
    caplog.clear()
    with RunLock(tmp_path / "run"):
        pass
    assert not caplog.text  # nobody died holding it this time


def test_a_worker_that_outlives_its_run_does_not_hold_it(tmp_path):
    process, worker = holder(tmp_path, "fork")
    try:
        end(process, kill=True)
        os.kill(worker, 0)  # alive
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


RACE = """
import os, sys, time
from rlhf.config import ConfigError
from rlhf.checkpoint.run_lock import RunLock
go = time.time() + 0.3
children = []
for number in range(12):
    child = os.fork()
    if child == 0:
        time.sleep(max(0, go - time.time()))
        try:
            with RunLock(sys.argv[1]):
                time.sleep(1.0)
        except ConfigError:
            os._exit(1)
        os._exit(0)
    children.append(child)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_of_twelve_at_once_one_gets_in(tmp_path):
    (tmp_path / "run").mkdir()
    left_behind(tmp_path / "run", pid=2**22 + 1)  # stale: all of them would like to take over
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"},
    )
    assert done.stdout.strip() == str([0] + [1] * 11), done.stderr[-2000:]
