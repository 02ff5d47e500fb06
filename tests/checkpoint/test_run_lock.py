"""One run at a time: held, refused by name, and taken over from the dead."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf.checkpoint.run_lock
from rlhf.checkpoint.run_lock import RunLock
from rlhf.config import ConfigError

ROOT = Path(__file__).parents[2]
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


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)


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


def test_a_worker_that_ends_does_not_free_it(tmp_path):
    with RunLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match="this process already holds"), RunLock(tmp_path):
            pass


def test_a_started_program_does_not_inherit_it(tmp_path):
    with RunLock(tmp_path):
        sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with RunLock(tmp_path):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()


def test_entering_twice(mechanism, tmp_path):
    lock = RunLock(tmp_path)
    with lock:
        open_files = len(os.listdir("/proc/self/fd"))
        for second in (lock, RunLock(tmp_path)):
            with pytest.raises(ConfigError, match="this process already holds"), second:
                pass
        with pytest.raises(ConfigError), RunLock(tmp_path):  # the refused ones have not freed it
            pass
        assert len(os.listdir("/proc/self/fd")) == open_files
    with lock:
        pass


def test_only_rank_0_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.checkpoint.run_lock, "is_main", lambda: False)
    with RunLock(tmp_path), RunLock(tmp_path):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json", '{"pid": 1}', "\udcff"])
def test_a_lock_file_that_says_nothing_is_free(content, mechanism, tmp_path):
    (tmp_path / ".lock").write_text(content, encoding="utf-8", errors="surrogateescape")
    with RunLock(tmp_path):
        pass


def left_behind(tmp_path: Path, **facts: object) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "then", "command": "python", "birth": None}
    (tmp_path / ".lock").write_text(json.dumps({**holder, **facts}))


def test_without_flock_another_machine_is_believed_until_the_file_is_removed(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    left_behind(tmp_path, host="elsewhere", pid=5)
    with pytest.raises(ConfigError, match=r"process 5 on elsewhere.* if that run is dead, remove .*\.lock"):
        RunLock(tmp_path).__enter__()
    (tmp_path / ".lock").unlink()
    with RunLock(tmp_path):
        pass


def test_without_flock_a_later_process_of_the_same_number_holds_nothing(tmp_path, monkeypatch, caplog):
    without_flock(monkeypatch)
    other = subprocess.Popen(["sleep", "60"])
    try:
        left_behind(tmp_path, pid=other.pid)
        with pytest.raises(ConfigError, match=f"process {other.pid} on"):
            RunLock(tmp_path).__enter__()
        left_behind(tmp_path, pid=other.pid, birth="1")
        with RunLock(tmp_path):
            pass
        assert "taking it over" in caplog.text
    finally:
        other.kill()
        other.wait()


def test_a_place_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file/\.lock cannot be locked: File exists.*--output_dir"):
        RunLock(tmp_path / "file").__enter__()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match="Is a directory"):
        RunLock(tmp_path / "run").__enter__()


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


@pytest.mark.skipif(shutil.which("sleep") is None, reason="needs a POSIX system")
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
