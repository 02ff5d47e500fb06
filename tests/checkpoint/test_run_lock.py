"""One run at a time: held, and refused by name (processes that die: tests/slow)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

import rlhf.checkpoint.run_lock
from rlhf.checkpoint.run_lock import RunLock
from rlhf.config import ConfigError
from tests.support.held_directory import left_behind, without_flock


@pytest.fixture(params=["flock", "without_flock"])
def mechanism(request, monkeypatch) -> str:
    if request.param == "without_flock":
        without_flock(monkeypatch)
    return request.param


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


LOOKING = """
import fcntl, os, sys, time
path = sys.argv[1]
print(flush=True)
while True:
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    time.sleep(0.02)
    os.close(descriptor)
    time.sleep(0.005)
"""
"""Somebody who looks who holds a lock nearly all the time."""


@pytest.mark.parametrize("left", ["", "by a process that died"])
def test_one_that_starts_is_not_refused_by_one_that_looks(left, tmp_path):
    lock = tmp_path / ".lock"
    lock.touch()
    if left:
        left_behind(tmp_path, birth="1")
    looking = subprocess.Popen([sys.executable, "-c", LOOKING, str(lock)], stdout=subprocess.PIPE)
    try:
        looking.stdout.readline()
        for _ in range(10):
            time.sleep(0.03)
            with RunLock(tmp_path):
                pass
    finally:
        looking.kill()
        looking.communicate()


def test_a_lock_that_stays_taken_by_somebody_unnamed_is_refused_after_a_moment(tmp_path):
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open("r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        started = time.monotonic()
        with pytest.raises(ConfigError, match="one that has not written its name yet"), RunLock(tmp_path):
            pass
    assert time.monotonic() - started < 5


def test_only_rank_0_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf.checkpoint.run_lock, "is_main", lambda: False)
    with RunLock(tmp_path), RunLock(tmp_path):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json", '{"pid": 1}', "\udcff"])
def test_a_lock_file_that_says_nothing_is_free(content, mechanism, tmp_path):
    (tmp_path / ".lock").write_text(content, encoding="utf-8", errors="surrogateescape")
    with RunLock(tmp_path):
        pass


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


def test_of_two_that_find_it_free_at_once_the_last_to_write_has_it(monkeypatch, tmp_path):
    without_flock(monkeypatch)
    waited = []

    def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        left_behind(tmp_path, pid=os.getppid())

    monkeypatch.setattr("rlhf.checkpoint.run_lock.time.sleep", meanwhile)
    with pytest.raises(ConfigError, match=f"in use by another run.*{os.getppid()}"), RunLock(tmp_path):
        pass
    assert waited and json.loads((tmp_path / ".lock").read_text())["pid"] == os.getppid(), "the other one's is left"
