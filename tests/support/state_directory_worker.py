"""Processes that save training states and are killed, or whose disk fails, at every moment of it.

`python state_directory_worker.py MODE DIRECTORY` runs one of the functions of MODES and fails with a traceback when a
state is ever neither whole nor absent. Every trial is a process of its own, forked once everything is imported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf.checkpoint.manifest import damages, read_manifest
from rlhf.checkpoint.state_directory import SavedState, StateDirectory

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}" for number in numbers]


def bytes_of(step: int, rank: int, size: int = 100_000) -> bytes:
    return (hashlib.sha256(f"{step} {rank}".encode()).digest() * (size // 32 + 1))[:size]


def writers(step: int, rank: int, size: int = 100_000) -> list[Callable[[Path], None]]:
    """Two writers of one rank; the second one puts its file into a directory."""

    def tensors(part: Path) -> None:
        (part / "engine").mkdir(exist_ok=True)
        save_file({"step": torch.full((50,), float(step))}, part / "engine" / f"rank-{rank}.safetensors")

    return [lambda part: (part / f"rank-{rank}.bin").write_bytes(bytes_of(step, rank, size)) and None, tensors]


def save(store: StateDirectory, step: int, rank: int = 0) -> bool:
    return store.save(step, {"step": step, "loss": 0.1 + step, "note": "가"}, *writers(step, rank))


def check_whole(saved: SavedState, world: int = 1) -> None:
    assert saved.content == {"step": saved.step, "loss": 0.1 + saved.step, "note": "가"}
    assert saved.world_size == world
    files = sorted(str(path.relative_to(saved.path)) for path in saved.path.rglob("*") if path.is_file())
    expected = [name for rank in range(world) for name in (f"rank-{rank}.bin", f"engine/rank-{rank}.safetensors")]
    assert files == sorted([*expected, "manifest.json", "state.json"]), files
    for rank in range(world):
        assert (saved.path / f"rank-{rank}.bin").read_bytes() == bytes_of(saved.step, rank)
        assert load_file(saved.path / "engine" / f"rank-{rank}.safetensors")["step"].eq(saved.step).all()


def on_operation(number: int, act: Callable[[], None], *, also_later: bool = False) -> None:
    """Call `act` before the file operation `number` of this process (`also_later`: and before all after it)."""
    seen = 0

    def hook(event: str, _: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == number or (also_later and seen > number):
                act()

    sys.addaudithook(hook)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def without_syncing() -> None:
    """A kill loses nothing that a process has written, and thousands of syncs would take minutes on a busy disk."""
    os.fsync = lambda _: None  # type: ignore[assignment]


def forked(work: Callable[[Callable[[int], None]], None]) -> tuple[int, int]:
    """Pid of a child that runs `work(report)`, and the pipe with a byte for every report."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receive)
            work(lambda number: os.write(send, bytes([number])) and None)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    os.close(send)
    return child, receive


def reported(receive: int) -> list[int]:
    found = b""
    while block := os.read(receive, 4096):
        found += block
    os.close(receive)
    return list(found)


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def killed_at_every_operation(root: Path) -> int:
    """Saves of 1, 2, 2 again and 4, killed before each operation in turn."""
    without_syncing()
    for number in range(1, 10_000):
        directory = root / str(number)
        store = StateDirectory(directory, keep_last=1)

        def work(
            report: Callable[[int], None],
            store: StateDirectory = store,
            number: int = number,
        ) -> None:
            on_operation(number, kill_self)
            for step in (1, 2, 2, 4):
                assert save(store, step)
                report(step)

        child, receive = forked(work)
        done = reported(receive)
        status = os.waitpid(child, 0)[1]
        saved = StateDirectory(directory, keep_last=1).newest()
        assert (saved is not None) or not done, f"operation {number}: {done} were saved and nothing is there"
        if saved is not None:
            check_whole(saved)
            assert saved.step >= max(done, default=0), f"operation {number}: {done} were saved, {saved.step} is there"
            for path in directory.iterdir():  # the older ones, too
                assert not damages(path, read_manifest(path)["files"]), path
        assert not directory.exists() or not hidden(directory), hidden(directory)
        assert save(store, 5) and [path.name for path in directory.iterdir()] == ["step-00000005"]
        if status == 0:
            return number - 1
    raise AssertionError("the saves never ended")


def failing_at_every_operation(root: Path) -> int:
    """An OSError of each operation in turn, once and from then on: False and the old state, or True and the new.

    Only where the state has its name already and its directory cannot be synced is the new one there after False.
    """
    without_syncing()
    trials, in_place = 0, 0
    for also_later in (False, True):
        for number in range(1, 10_000):
            directory = root / f"{also_later}-{number}"
            store = StateDirectory(directory, keep_last=1)
            assert save(store, 1)

            def work(
                report: Callable[[int], None],
                store: StateDirectory = store,
                number: int = number,
                also_later: bool = also_later,
            ) -> None:
                failures: list[str] = []

                def fail() -> None:
                    failures.append("once")
                    raise OSError(errno.EIO, os.strerror(errno.EIO))

                on_operation(number, fail, also_later=also_later)
                report(int(save(store, 2)))
                report(int(bool(failures)))

            child, receive = forked(work)
            done, broken = reported(receive)
            assert os.waitpid(child, 0)[1] == 0
            found = StateDirectory(directory).newest()
            assert found is not None and (found.step == 2 or not done), (also_later, number)
            check_whole(found)
            in_place += bool(found.step == 2 and not done)
            assert not hidden(directory)
            assert save(store, 3) and [path.name for path in directory.iterdir()] == ["step-00000003"]
            trials += 1
            if not broken:
                break
    assert in_place == 2, in_place
    return trials


def killed_at_random(root: Path) -> int:
    """One run that is killed again and again and goes on from what it finds."""
    rng = random.Random(5)
    store = StateDirectory(root / "states", keep_last=2, keep_every=7)
    acknowledged, kills, interrupted = 0, 0, 0
    while kills < 40:

        def work(report: Callable[[int], None], first: int = acknowledged + 1) -> None:
            for step in range(first, first + 100):
                assert save(store, step)
                report(step % 256)

        child, receive = forked(work)
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        acknowledged += len(reported(receive))
        interrupted += bool((root / "states").exists() and hidden(root / "states"))
        saved = store.newest()
        if saved is None:
            assert acknowledged == 0
            continue
        check_whole(saved)
        assert acknowledged <= saved.step <= acknowledged + 1, (acknowledged, saved.step)
        acknowledged = saved.step
        steps = store.steps()
        assert set(steps) >= {step for step in range(7, saved.step + 1, 7)}, steps
        assert not hidden(root / "states")
    assert interrupted > 5, f"only {interrupted} kills fell into a save"
    return kills


def two_ranks_killed_at_random(root: Path) -> int:
    """The same with two ranks; one of them or both are killed, and what is left of them must not hang."""
    rng = random.Random(6)
    directory = root / "states"
    store = StateDirectory(directory, keep_last=2)
    acknowledged, kills = 0, 0
    while kills < 16:
        meeting = root / f"meeting-{kills}"

        def ranks(rank: int, first: int = acknowledged + 1, meeting: Path = meeting) -> tuple[int, int]:
            def work(report: Callable[[int], None]) -> None:
                # one that is killed before the first collective is only missed when the other gives up connecting
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(str(meeting), 2),
                    rank=rank,
                    world_size=2,
                    timeout=timedelta(seconds=20),
                )
                report(0)
                for step in range(first, first + 100):
                    assert save(store, step, rank)
                    report(step % 256)

            return forked(work)

        children = [ranks(0), ranks(1)]
        for _, receive in children:
            assert os.read(receive, 1) == b"\0", "a rank did not join"
        time.sleep(rng.uniform(0.0, 0.2))
        victims = rng.choice([[0], [1], [0, 1]])
        for victim in victims:
            os.kill(children[victim][0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        for child, _ in children:
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    raise AssertionError(f"a rank hung after {victims} were killed")
                time.sleep(0.01)
        kills += 1
        acknowledged += max(len(reported(receive)) for _, receive in children)
        saved = store.newest()
        if saved is None:
            assert acknowledged == 0
            continue
        check_whole(saved, world=2)
        assert acknowledged <= saved.step <= acknowledged + 1, (acknowledged, saved.step)
        acknowledged = saved.step
        assert not hidden(directory)
    assert acknowledged > 0, "no save was ever finished"
    return kills


def disk_full(directory: Path) -> int:
    """`directory` lies on a file system of 1 MiB."""
    store = StateDirectory(directory / "states", keep_last=1)
    assert save(store, 1)
    free = os.statvfs(directory).f_bavail
    too_large = writers(2, 0, 2_000_000)[0]
    assert store.save(2, {}, too_large) is False
    assert store.save(2, {}, lambda part: save_file({"a": torch.zeros(500_000)}, part / "a.safetensors")) is False
    assert os.statvfs(directory).f_bavail == free, "the part of the state that was written takes its space still"
    filler = directory / "filler"
    try:
        filler.write_bytes(b"0" * 2**20)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    assert save(store, 2) is False
    saved = store.newest()
    assert saved is not None and saved.step == 1
    check_whole(saved)
    filler.unlink()
    assert save(store, 3) and store.steps() == [3]
    return 3


def read_only(directory: Path) -> int:
    """`directory` has become read-only after the save of step 1."""
    store = StateDirectory(directory / "states", keep_last=1)
    if os.environ["PHASE"] == "before":
        assert save(store, 1)
        return 1
    assert save(store, 2) is False
    assert store.clear(keep_permanent=False) is False
    saved = store.newest()
    assert saved is not None and saved.step == 1
    check_whole(saved)
    return 1


MODES = {
    name: function
    for name, function in list(globals().items())
    if name.startswith(("killed", "failing", "two_ranks", "disk", "read_only"))
}

if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    started = time.monotonic()
    count = MODES[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"trials": count, "seconds": round(time.monotonic() - started, 1)}))
