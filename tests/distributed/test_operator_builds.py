"""The lock of an operator's build: whose it is, who takes it over, and what is said meanwhile."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from torch.utils import cpp_extension, file_baton

from rlhf.distributed import operator_builds
from rlhf.distributed.operator_builds import Owner, PatientBaton, holder_of, watch_operator_builds
from rlhf.distributed.processes import process_stat

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
from rlhf.distributed.operator_builds import PatientBaton
kind = {"plain": FileBaton, "ours": PatientBaton}[sys.argv[1]]
baton = kind(sys.argv[2])
print(baton.try_acquire(), flush=True)
time.sleep(float(sys.argv[3]))
baton.release()
"""
RANK = """
import sys, time
from pathlib import Path
from rlhf.distributed import operator_builds
operator_builds.LOOK_SECONDS = 0.05
lock, directory, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
(directory / f"ready-{number}").touch()
while not (directory / "go").exists():
    time.sleep(0.01)
baton = operator_builds.PatientBaton(lock)
if baton.try_acquire():
    time.sleep(2)
    (directory / "built").open("a").write("x")
    baton.release()
else:
    baton.wait()
    print((directory / "built").read_text())
"""


@pytest.fixture
def lock(tmp_path) -> Path:
    """The lock of an operator that is compiled already."""
    (tmp_path / "operator.so").touch()
    return tmp_path / "lock"


@pytest.fixture
def hold(lock):
    """Start a process that takes the lock and keeps it for so long."""
    started = []

    def start(kind: str, seconds: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, kind, str(lock), str(seconds)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def age(lock: Path, minutes: float) -> None:
    then = time.time() - minutes * 60
    for file in (lock, *lock.parent.iterdir()):
        os.utime(file, (then, then))


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(operator_builds, "LOOK_SECONDS", 0.05)


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_a_lock_is_held_while_its_owner_lives(lock, hold, kind):
    process = hold(kind, 600)
    assert f"process {process.pid}" in holder_of(lock)
    kill(process)
    assert lock.exists() and holder_of(lock) is None


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_the_lock_of_a_killed_process_is_taken_over_and_said(lock, hold, kind, no_patience, capsys):
    kill(hold(kind, 600))
    baton = PatientBaton(str(lock))
    assert baton.try_acquire(), "torch would wait for ever"
    assert f"{lock} was left by a process that is gone: taking it over" in capsys.readouterr().err
    assert Owner.read(lock) == Owner.this_process() and f"process {os.getpid()}" in holder_of(lock)
    baton.release()
    assert not lock.exists()


def test_one_of_many_takes_it_over_and_the_others_wait_for_its_build(lock, hold, tmp_path):
    kill(hold("ours", 600))
    command = [sys.executable, "-c", RANK, str(lock), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    ranks = [subprocess.Popen([*command, str(number)], env=environment, **pipes) for number in range(4)]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, outputs
    assert (tmp_path / "built").read_text() == "x", "one of them built"
    assert sorted(out for out, _ in outputs) == [b"", b"x\n", b"x\n", b"x\n"], "the others saw what it built"
    assert sum(b"taking it over" in err for _, err in outputs) == 1


def test_who_waits_for_a_living_owner_says_so_and_does_not_build(lock, hold, no_patience, monkeypatch, capsys):
    monkeypatch.setattr(operator_builds, "FIRST_WORD_SECONDS", 0.2)
    process = hold("ours", 1.5)
    assert not PatientBaton(str(lock)).try_acquire()
    said = capsys.readouterr().err
    assert said.count("waiting for ") == 1, "once, and again a minute later"
    assert f"process {process.pid} on {socket.gethostname()}, which compiles the operator; the lock is {lock}" in said


def test_only_one_rank_of_a_machine_says_that_it_waits(lock, hold, no_patience, monkeypatch, capsys):
    monkeypatch.setattr(operator_builds, "FIRST_WORD_SECONDS", 0.2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    hold("ours", 1.0)
    assert not PatientBaton(str(lock)).try_acquire() and capsys.readouterr().err == ""


def test_a_pid_that_was_given_to_another_process_is_not_the_owner(lock):
    mine = Owner.this_process()
    lock.write_text(json.dumps(dataclasses.asdict(mine)), encoding="utf-8")
    assert f"process {os.getpid()}" in holder_of(lock)
    lock.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(mine, started=mine.started - 1))))
    assert holder_of(lock) is None
    assert process_stat(os.getpid()).started == mine.started


@pytest.mark.parametrize("other", [{"host": "node-2"}, {"boot": "earlier"}, {"pid_namespace": "pid:[1]"}])
def test_the_lock_of_an_owner_that_cannot_be_seen_waits_until_all_is_still(lock, other):
    owner = dataclasses.replace(Owner.this_process(), pid=1, started=-1, **other)
    lock.write_text(json.dumps(dataclasses.asdict(owner)), encoding="utf-8")
    assert f"process 1 on {owner.host}, which cannot be seen from here" in holder_of(lock)
    age(lock, 29)
    assert holder_of(lock) is not None
    age(lock, 31)
    assert holder_of(lock) is None
    (lock.parent / "kernel.o").touch()
    assert holder_of(lock) is not None, "it compiles"


def test_a_lock_without_a_name_on_a_shared_disk_may_be_another_machines(lock, monkeypatch):
    lock.touch()
    assert holder_of(lock) is None
    monkeypatch.setattr(operator_builds, "_is_shared", lambda directory: True)
    assert "another machine or container" in holder_of(lock)
    age(lock, 31)
    assert holder_of(lock) is None


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw
24 23 0:41 / /home/me/my\\040disk rw - xfs /dev/vdb rw
25 22 0:42 / /scratch rw - lustre nodes:/s rw
26 22 0:43 / /over rw - overlay overlay rw
"""


def test_disks_that_others_may_write_to(monkeypatch):
    def shared(path):
        return operator_builds._is_shared(Path(path), MOUNTS)

    machine = operator_builds._MACHINES_OWN_PIDS
    monkeypatch.setattr(operator_builds, "pid_namespace", lambda: machine)
    assert [shared(path) for path in ("/root/x", "/home/me", "/home/me/my disk/x", "/scratch", "/over")] == [
        False, True, False, True, False,
    ]  # fmt: skip
    monkeypatch.setattr(operator_builds, "pid_namespace", lambda: "pid:[4026532000]")  # in a container
    assert shared("/root/x") and not shared("/over"), "its own layer is nobody else's"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user and give files away")
def test_root_sees_that_nobody_holds_the_lock_of_another_user(lock):
    lock.touch()
    os.chown(lock, 12345, 12345)
    assert holder_of(lock) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user and give files away")
def test_the_lock_of_another_user_is_left_alone():
    look = (
        "import os, sys; from pathlib import Path\n"
        "from rlhf.distributed.operator_builds import holder_of\n"
        "os.setuid(23456); print(holder_of(Path(sys.argv[1])))"
    )
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to other users
        os.chmod(directory, 0o755)
        lock = Path(directory) / "lock"
        lock.touch()
        os.chown(lock, 12345, 12345)
        command = [sys.executable, "-c", look, str(lock)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "a process of user 12345, if it lives, which cannot be seen" in done.stdout, done.stderr


def test_a_compiler_that_outlives_its_process_is_waited_for(lock, tmp_path_factory):
    owner = dataclasses.replace(Owner.this_process(), started=0)
    lock.write_text(json.dumps(dataclasses.asdict(owner)), encoding="utf-8")
    ninja = tmp_path_factory.mktemp("bin") / "ninja"
    ninja.write_bytes(Path("/bin/cat").read_bytes())
    ninja.chmod(0o755)
    process = subprocess.Popen([ninja], cwd=lock.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"it runs\n")
        process.stdin.flush()
        process.stdout.readline()  # Popen returns before the kernel gives the process its program's name
        assert f"the compiler that a killed process left (process {process.pid})" == holder_of(lock)
    finally:
        process.kill()
        process.communicate()
    assert holder_of(lock) is None


def test_the_first_build_is_announced(tmp_path, capsys):
    baton = PatientBaton(str(tmp_path / "cpu_adam" / "lock"))
    (tmp_path / "cpu_adam").mkdir()
    assert baton.try_acquire()
    baton.release()
    assert "compiling DeepSpeed's operator cpu_adam: once" in capsys.readouterr().err
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert baton.try_acquire() and capsys.readouterr().err == ""
    baton.release()


def test_torch_uses_it_whichever_is_imported_first(monkeypatch):
    for module in (file_baton, cpp_extension):
        monkeypatch.setattr(module, "FileBaton", file_baton.FileBaton)
    watch_operator_builds()
    assert cpp_extension.FileBaton is PatientBaton and file_baton.FileBaton is PatientBaton
