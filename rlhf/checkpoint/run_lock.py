"""One run at a time in a directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlhf.config import ConfigError
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main
from rlhf.distributed.processes import process_stat

LOCK_PATIENCE = 1.0
"""Seconds for which a lock is tried that nobody known to live holds: `is_held` takes one of an instant to look."""
_WITHOUT_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class RunLock:
    """Holds `directory` for this run while the block lasts; rank 0 does, the others pass.

    ConfigError names the holder where another run has it, or this process already. The lock is an `flock` on
    `.lock`, which ends with its process however that dies; the file's content says who it is and stays after a death,
    where the next run reports it and locks the directory for itself. Where the file system knows no `flock` the
    content decides: a process of this machine that is gone holds nothing, one of another machine might.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory).absolute() / ".lock"
        self._descriptor: int | None = None
        # a forked data worker may outlive a killed run, and an flock lives as long as any copy of its descriptor
        os.register_at_fork(after_in_child=self._forget)

    def __enter__(self) -> Self:
        if is_main():
            descriptor = None
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                self._acquire(descriptor)
                self._descriptor, descriptor = descriptor, None
            except OSError as error:
                raise ConfigError(
                    f"{self.path} cannot be locked: {error.strerror or error}; make it writable, or choose another "
                    "--output_dir"
                ) from error
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # the lock ends all the same
                os.ftruncate(self._descriptor, 0)  # not removed: one could lock the old file and another a new one
            self._forget()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _acquire(self, descriptor: int) -> None:
        by_content = False
        try:
            self._flock(descriptor)
        except OSError as error:
            if error.errno not in _WITHOUT_FLOCK:
                raise
            by_content = True
        before = _read(descriptor)
        if before and by_content and _may_live(before):
            raise self._held(before, by_content=True)
        if before:
            logger.warning("%s was left by a run that died (%s); taking it over", self.path, _described(before))
        mine = _this_process()
        _write(descriptor, mine)
        if by_content:
            time.sleep(0.2)  # of two that found it free at once the last to write has it
            if _read(descriptor) != mine:
                raise self._held(_read(descriptor), by_content=True)

    def _flock(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(descriptor)
                if (holder and _may_live(holder)) or time.monotonic() > deadline:
                    raise self._held(holder) from None
            time.sleep(0.01)

    def _held(self, holder: dict[str, Any], *, by_content: bool = False) -> ConfigError:
        if (holder.get("host"), holder.get("pid")) == (socket.gethostname(), os.getpid()):
            return ConfigError(f"this process already holds {self.path.parent}: enter its lock once")
        advice = f"wait until it ends, stop it (kill {holder['pid']}), " if holder else "wait until it ends, "
        if by_content and holder.get("host") != socket.gethostname():
            advice = f"if that run is dead, remove {self.path}; otherwise wait until it ends "
        return ConfigError(
            f"{self.path.parent} is in use by another run ({_described(holder)}); "
            f"{advice}or choose another --output_dir"
        )


def is_held(path: Path) -> bool | None:
    """Whether a process that lives holds the `flock` on the file `path`; None where it cannot be told from here.

    That is so of a run that names another machine, where the lock is not seen held: some network disks keep locks to
    each machine. Looks by a shared lock of an instant and writes nothing; False where there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _WITHOUT_FLOCK:
            raise
        holder = _read(descriptor)
        return (None if _elsewhere(holder) else _may_live(holder)) if holder else False
    else:
        return None if _elsewhere(_read(descriptor)) else False
    finally:
        os.close(descriptor)


def last_holder(path: Path) -> str:
    """Who died holding the lock file `path`, or holds it: `process 5 on node-1, since ...`; else empty."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return ""
    try:
        holder = _read(descriptor)
    finally:
        os.close(descriptor)
    return _named(holder) if holder else ""


def _elsewhere(holder: dict[str, Any]) -> bool:
    return bool(holder) and holder["host"] != socket.gethostname()


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "birth": _birth(os.getpid()),
    }


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "one that has not written its name yet"
    return f"{_named(holder)}: {holder['command']}"


def _named(holder: dict[str, Any]) -> str:
    return "process {pid} on {host}, since {started}".format(**holder)


def _may_live(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, and another user's
    return holder["birth"] is None or _birth(holder["pid"]) in (None, holder["birth"])


def _birth(pid: int) -> str | None:
    """When a process started: tells it from a later one of the same number."""
    stat = process_stat(pid)
    return None if stat is None else str(stat.started)


def _read(descriptor: int) -> dict[str, Any]:
    """Who the file names; empty where it names nobody."""
    try:
        content = json.loads(os.pread(descriptor, 65536, 0))
        return content if {"host", "pid", "started", "command", "birth"} <= content.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _write(descriptor: int, holder: dict[str, Any]) -> None:
    text = json.dumps(holder).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
