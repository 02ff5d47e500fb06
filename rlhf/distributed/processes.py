"""What the kernel tells of the processes of this machine."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessStat:
    """Two fields of /proc/PID/stat."""

    state: str
    """The kernel's letter: R, S, D, T (stopped), t (traced), Z and X (dead), ..."""
    started: int
    """Clock ticks from the machine's start to the process's: tells it from a later process of the same pid."""


def process_stat(pid: int) -> ProcessStat | None:
    """The process `pid`, a dead one that nobody has waited for included; None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # what stands before is the program's name, which may hold spaces
    return ProcessStat(state=fields[0], started=int(fields[19]))


def pid_namespace() -> str:
    """Names the set of processes that this one's pid counts in; empty where the kernel does not say."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory since it started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
