"""A directory of small files in which the ranks of a stage tell one another that they are alive, and how far they are.

rank_00001.json   who rank 1 is, and its last sign of life; overwritten in place, so a full disk does not stop it
rank_00001.crash  what Python's fault handler said when a library crashed
verdict           why the job ends: made by one rank only, which alone prints it
stop              made by anybody (its content may name a signal): every rank stops after its step
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf.distributed.processes import pid_namespace, process_stat

_RECORD_BYTES = 4096
_LONGEST_TEXT = 160


@dataclass(frozen=True)
class RankRecord:
    """One rank's sign of life."""

    rank: int
    pid: int
    process_started: int
    """See `ProcessStat.started`."""
    host: str
    pid_namespace: str
    """Containers of one host name may count processes each for itself."""
    pulse: int = 0
    """Grows as long as the process runs, whatever its main thread does."""
    beats: int = 0
    beat: str = ""
    """What the main thread was last heard to have done, such as `step 12`; empty before training has begun."""
    still_seconds: float = 0.0
    """How long the main thread has shown no progress."""
    place: str = ""
    in_collective: bool = False
    finished: bool = False

    @property
    def name(self) -> str:
        """`rank 1 (pid 4711 on node-2)`."""
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def progress(self) -> str:
        """`after step 12`; a rank that has not been heard to train yet is at its start."""
        return f"after {self.beat}" if self.beat else "at its start"


class RankBoard:
    """The files of one stage's ranks; every rank of every machine sees the same directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def clear(self) -> None:
        """Make the directory anew, without what an earlier run left in it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, record: RankRecord) -> None:
        """Replace this rank's sign of life; raises OSError where the disk does not take it."""
        short = {name: getattr(record, name)[:_LONGEST_TEXT] for name in ("beat", "place")}
        text = json.dumps({**dataclasses.asdict(record), **short})
        handle = os.open(self._file(record.rank), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, text.encode().ljust(_RECORD_BYTES), 0)
        finally:
            os.close(handle)  # opened anew each time: network disks carry a file over when it is closed

    def read(self, rank: int) -> RankRecord | None:
        """The last sign of life of `rank`; None where there is none, or it is just being written."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return RankRecord(**json.loads(self._file(rank).read_bytes()))
        return None

    def claim_verdict(self, code: int) -> bool:
        """True for the one rank that is to say why the job ends; every rank leaves with `code`."""
        try:
            handle = os.open(self.directory / "verdict", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except OSError:
            return True  # said twice is better than not at all
        with contextlib.suppress(OSError), os.fdopen(handle, "w") as file:
            file.write(str(code))
        return True

    def verdict(self, default: int) -> int | None:
        """The exit code of a job that ends, None while it runs; `default` where the code itself was not written."""
        path = self.directory / "verdict"
        for _ in range(5):
            try:
                return int(path.read_text())
            except ValueError:
                time.sleep(0.05)
            except OSError:
                return None
        return default

    def stop_request(self) -> int:
        """The signal that the file `stop` names (SIGTERM if none), 0 where there is no such file."""
        try:
            name = (self.directory / "stop").read_text().strip()
        except (OSError, ValueError):
            return 0
        return int(getattr(signal, name, signal.SIGTERM)) if name.startswith("SIG") else int(signal.SIGTERM)

    def crash_file(self, rank: int) -> Path:
        """Where the fault handler of `rank` writes."""
        return self.directory / f"rank_{rank:05d}.crash"

    def crash(self, rank: int) -> str:
        """What crashed `rank`, such as `Segmentation fault`; empty where nothing was written."""
        with contextlib.suppress(OSError, ValueError):
            first = self.crash_file(rank).read_text().partition("\n")[0]
            return first.removeprefix("Fatal Python error: ").strip()
        return ""

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank_{rank:05d}.json"


def own_record(rank: int) -> RankRecord:
    """The record of this process."""
    stat = process_stat(os.getpid())
    return RankRecord(
        rank=rank,
        pid=os.getpid(),
        process_started=stat.started if stat is not None else 0,
        host=socket.gethostname(),
        pid_namespace=pid_namespace(),
    )


def process_state(record: RankRecord) -> str:
    """The kernel's letter for the process of `record` on this machine (R, S, D, T, ...); empty once it is dead."""
    stat = process_stat(record.pid)
    if stat is None or stat.state in "ZX" or stat.started != record.process_started:
        return ""
    return stat.state


def same_machine(first: RankRecord, second: RankRecord) -> bool:
    """Whether the pid of `second` means something to `first`."""
    return (first.host, first.pid_namespace) == (second.host, second.pid_namespace)
