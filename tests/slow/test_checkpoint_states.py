"""Training states are whole or absent: real kills at every moment, real full disks, two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.checkpoint.state_directory import StateDirectory
from tests.support.launch import ROOT, run_ranks
from tests.support.state_directory_worker import check_whole, names, save, steps

WORKER = ROOT / "tests" / "support" / "state_directory_worker.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
for launched in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    ENVIRONMENT.pop(launched, None)


@pytest.mark.parametrize(
    ("mode", "least"),
    [
        ("killed_at_every_operation", 100),
        ("failing_at_every_operation", 60),
        ("killed_at_random", 40),
        ("two_ranks_killed_at_random", 16),
    ],
)
def test_a_state_is_whole_or_absent(mode, least, tmp_path):
    done = subprocess.run(
        [sys.executable, str(WORKER), mode, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["trials"] >= least  # or the operations are no longer seen


def in_small_tmpfs(commands: str, tmp_path: Path) -> str:
    """Run shell commands with a file system of 1 MiB at tmp_path/disk, seen by them alone; returns what they print."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    isolated = ["unshare", "--mount", "--map-root-user", "sh", "-ec"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, mount], capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a tmpfs")
    done = subprocess.run(
        [*isolated, f"{mount}\nworker() {{ {sys.executable} {WORKER} $1 {disk}; }}\n{commands.format(disk=disk)}"],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_full_disk(tmp_path):
    log = in_small_tmpfs("worker disk_full", tmp_path)
    assert log.count("No space left on device") == 3 and log.count("the one of step 1 stays") == 3


def test_a_disk_gone_read_only(tmp_path):
    commands = "export PHASE=before\nworker read_only\nmount -o remount,ro {disk}\nexport PHASE=after\nworker read_only"
    log = in_small_tmpfs(commands, tmp_path)
    assert "step 2 was NOT saved" in log and "Read-only file system" in log and "cannot be removed" in log


TWO_RANKS = """
import json, logging, random, resource, sys
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
from rlhf.distributed.place import rank
from rlhf.distributed.world import close_world, init_world
from rlhf.checkpoint.random_state import load_rng, save_rng
from rlhf.checkpoint.state_directory import StateDirectory
from tests.support.state_directory_worker import check_whole, save, writers

logging.basicConfig(level=logging.WARNING)
init_world()
here = Path(sys.argv[-1])
store = StateDirectory(here / "states", keep_last=1)
assert save(store, 1, rank())
check_whole(store.newest(), world=2)

def only_the_first():
    if rank() == 0:  # which cleans up, and may have begun the next one when rank 1 looks
        assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]

def gathering(part):  # as an engine's state does: a collective, then files
    dist.all_reduce(torch.ones(3))
    (part / f"gathered-{rank()}").write_bytes(bytes(50_000))

for victim in (0, 1):
    if rank() == victim:  # a real limit of one process: File too large
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    assert store.save(2, {}, gathering, *writers(2, rank()), gathering) is False
    only_the_first()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_whole(store.newest(), world=2)

def bug(part):
    dist.all_reduce(torch.ones(3))
    if rank() == 1:
        raise ValueError("a bug of rank 1")

try:
    store.save(2, {}, bug, gathering)
    raise SystemExit("no error was raised")
except (ValueError, RuntimeError) as error:
    assert type(error) is (RuntimeError, ValueError)[rank()], error
    assert "a bug of rank 1" in str(error)
only_the_first()

store.keep_last = 2
assert save(store, 2, rank())
if rank() == 1:  # the second largest file, which rank 1 verifies
    data = store.directory / "step-00000002" / "rank-1.bin"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
dist.barrier()
saved = store.newest()
assert saved.step == 1
check_whole(saved, world=2)

random.seed(rank()), np.random.seed(rank()), torch.manual_seed(rank())
assert store.save(3, {}, lambda part: save_rng(part, rank()))
drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
assert load_rng(store.newest().path, rank(), seed=1, step=3)
assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == drawn
(here / f"drawn-{rank()}.json").write_text(json.dumps(drawn))
close_world()
"""


def test_two_ranks_refused_mistaken_and_damaged(tmp_path):
    done = run_ranks(TWO_RANKS, 2, tmp_path, [str(tmp_path)])
    assert done.returncode == 0, done.stdout[-4000:]
    for victim in (0, 1):
        assert f"NOT saved in {tmp_path / 'states'}: rank {victim}: OSError: [Errno 27] File too large" in done.stdout
    assert "rank-1.bin does not hold the bytes that were saved" in done.stdout
    drawn = [json.loads((tmp_path / f"drawn-{rank}.json").read_text()) for rank in (0, 1)]
    assert drawn[0] != drawn[1]


KILLED = """
import sys
from pathlib import Path
from rlhf.distributed.place import rank
from rlhf.distributed.world import init_world
from rlhf.checkpoint.state_directory import StateDirectory
from tests.support.state_directory_worker import kill_self, on_operation, save

init_world()
store = StateDirectory(Path(sys.argv[-3]), keep_last=1)
assert save(store, 1, rank())
if rank() == int(sys.argv[-2]):
    on_operation(int(sys.argv[-1]), kill_self)
for step in range(2, 50):
    assert save(store, step, rank())
"""


@pytest.mark.parametrize(("victim", "operation"), [(0, 150), (1, 31)])
def test_a_rank_under_the_launcher_is_killed_in_a_save(victim, operation, tmp_path):
    done = run_ranks(KILLED, 2, tmp_path, [str(tmp_path / "states"), str(victim), str(operation)], timeout=120)
    assert done.returncode != 0
    left = names(tmp_path / "states")
    store = StateDirectory(tmp_path / "states", keep_last=1)
    saved = store.newest()
    check_whole(saved, world=2)
    assert 1 <= saved.step < 49
    assert names(tmp_path / "states") == steps(saved.step) or len(left) > 1
    assert save(store, 60) and names(tmp_path / "states") == steps(60)
