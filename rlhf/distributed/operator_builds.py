"""DeepSpeed's operators are compiled on first use, one process at a time: the others wait for a lock file to go away.

A process that is killed meanwhile leaves its lock behind, and torch then waits for ever without a word. Here who waits
looks for the owner, and takes over the lock of one that is gone:

- an owner that wrote its name into the lock (all of this project do) is looked up by process id and start;
- without a name, the owner has the lock file open: it is looked for among the open files of this machine's processes;
- an owner that this process cannot see (another user's, another machine's or container's that shares the directory) is
  never taken for gone at once: only when nothing has changed in the directory for UNSEEN_MINUTES.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils import file_baton
from tqdm import tqdm

from rlhf.distributed.processes import pid_namespace, process_stat

UNSEEN_MINUTES = 30.0
"""How long a directory must be still before the lock of an owner that cannot be seen counts as left behind."""
FIRST_WORD_SECONDS = 10.0
"""How long one waits for an owner that lives before one says so."""
WORD_SECONDS = 60.0
"""Between two such lines."""
LOOK_SECONDS = 1.0
"""Between two looks at who holds the lock; an owner must be missed in two looks at the same lock."""
_MACHINES_OWN_PIDS = "pid:[4026531836]"
"""The first namespace of process ids, which counts every process of the machine."""
_LOCAL_DISKS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "tmpfs", "ramfs", "overlay"})


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as written into it."""

    host: str
    boot: str
    """Names one run of the machine's kernel."""
    pid_namespace: str
    pid: int
    started: int
    """See `ProcessStat.started`."""

    @classmethod
    def this_process(cls) -> Owner:
        stat = process_stat(os.getpid())
        return cls(socket.gethostname(), _boot(), pid_namespace(), os.getpid(), stat.started if stat else 0)

    @classmethod
    def read(cls, lock: Path) -> Owner | None:
        """The owner that `lock` names; None for the lock of another program."""
        try:
            return cls(**json.loads(lock.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def name(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_visible(self) -> bool:
        """Whether this process sees the owner, if it lives."""
        return (self.host, self.boot, self.pid_namespace) == (socket.gethostname(), _boot(), pid_namespace())

    def lives(self) -> bool:
        stat = process_stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"


def watch_operator_builds() -> None:
    """Let whatever compiles an operator in this process from now on wait for locks as `PatientBaton` does."""
    file_baton.FileBaton = PatientBaton  # type: ignore[misc]
    extensions = sys.modules.get("torch.utils.cpp_extension")
    if extensions is not None:
        extensions.FileBaton = PatientBaton  # type: ignore[attr-defined]


class PatientBaton(file_baton.FileBaton):
    """Torch's lock of a build, with its owner's name in it; a lock that was left behind is taken over.

    A lock is never removed for another's sake: who waits for it would take that for a build that is done. It is adopted
    where it lies, by the one who gets an `flock` on it.
    """

    fd: int | None  # type: ignore[assignment]  # torch declares what it starts as

    def try_acquire(self) -> bool:
        """True: this process builds. False: another one did, and its lock is gone again."""
        lock = Path(self.lock_file_path)
        if self._make(lock):
            if not any(lock.parent.glob("*.so")):
                _say(f"compiling DeepSpeed's operator {lock.parent.name}: once, about a minute; kept in {lock.parent}")
            return True
        missed: int | None = None  # the lock whose owner was not found at the last look
        began = time.monotonic()
        next_word = FIRST_WORD_SECONDS
        while (number := _number(lock)) is not None:
            holder = holder_of(lock)
            if holder is None and number == missed:
                if self._adopt(lock, number):
                    _say(
                        f"{lock} was left by a process that is gone: taking it over, to compile what it did not finish"
                    )
                    return True
                holder = "the lock of a process that is gone, which cannot be taken over: remove it if that goes on"
            missed = number if holder is None else None
            waited = time.monotonic() - began
            if holder is not None and waited >= next_word and os.environ.get("LOCAL_RANK", "0") == "0":
                _say(f"waiting for {waited:.0f} s now for {holder}; the lock is {lock}")
                next_word = waited + WORD_SECONDS
            time.sleep(LOOK_SECONDS)
        return False

    def _make(self, lock: Path) -> bool:
        try:
            self.fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        except FileExistsError:
            return False
        self._sign()
        return True

    def _adopt(self, lock: Path, number: int) -> bool:
        """Become the owner of the lock with this inode number; False where another process does or it is gone."""
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(descriptor).st_ino == number == _number(lock)
        except OSError:
            ours = False
        if not ours:
            os.close(descriptor)
            return False
        self.fd = descriptor
        self._sign()
        return True

    def _sign(self) -> None:
        assert self.fd is not None
        name = json.dumps(asdict(Owner.this_process())).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock is found among the open files all the same
            os.pwrite(self.fd, name, 0)
            os.ftruncate(self.fd, len(name))


def holder_of(lock: Path) -> str | None:
    """Who holds a lock, in words; None where its owner is gone, or the lock is."""
    owner = Owner.read(lock)
    if owner is not None and owner.is_visible():
        return f"{owner.name}, which compiles the operator" if owner.lives() else _left_compiler(lock.parent)
    try:
        status = lock.stat()
    except OSError:
        return None
    if owner is not None:
        return _unless_still(lock, owner.name)
    if os.geteuid() not in (0, status.st_uid):
        return _unless_still(lock, f"a process of user {status.st_uid}, if it lives")
    for pid in _pids():
        if _has_open(pid, lock, status):
            return f"process {pid}, which compiles the operator"
    if _is_shared(lock.parent):
        return _unless_still(lock, "a process of another machine or container, if it lives")
    return _left_compiler(lock.parent)


def _unless_still(lock: Path, who: str) -> str | None:
    """`who` may hold the lock; None once nothing has changed beside it for so long that nobody compiles."""
    changed = []
    with contextlib.suppress(OSError):  # removed meanwhile
        changed = [file.stat().st_mtime for file in (lock, *lock.parent.iterdir())]
    if changed and time.time() - max(changed) > UNSEEN_MINUTES * 60:
        return None
    return (
        f"{who}, which cannot be seen from here; its lock is taken over when nothing has changed in {lock.parent} for "
        f"{UNSEEN_MINUTES:.0f} minutes, or remove it if nobody compiles"
    )


def _left_compiler(directory: Path) -> str | None:
    """A `ninja` that outlives the process that started it and still writes into `directory`."""
    for pid in _pids():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "ninja" and Path(f"/proc/{pid}/cwd").samefile(
                directory
            ):
                return f"the compiler that a killed process left (process {pid})"
    return None


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _has_open(pid: int, lock: Path, status: os.stat_result) -> bool:
    """Whether the process has the file open; one of the file's owner that does not let itself be looked at may."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{name}"
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(link).endswith(lock.name) and os.path.samestat(os.stat(link), status):
                    return True
    except PermissionError:
        with contextlib.suppress(OSError):
            return os.stat(f"/proc/{pid}").st_uid == status.st_uid
    except OSError:
        pass  # the process has ended
    return False


def _is_shared(directory: Path, mounts: str | None = None) -> bool:
    """Whether processes that this one cannot see may write to `directory`: from other machines, or other containers."""
    mounts = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    place, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split()
        point = fields[4].replace("\\040", " ")
        if directory.resolve().is_relative_to(point) and len(point) >= len(place):
            place, kind = point, fields[fields.index("-") + 1]  # of several on one place the last one counts
    return kind not in _LOCAL_DISKS or (pid_namespace() != _MACHINES_OWN_PIDS and kind != "overlay")


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _number(lock: Path) -> int | None:
    """The inode number of the lock file; None where there is none."""
    try:
        return lock.stat().st_ino
    except OSError:
        return None


def _say(text: str) -> None:
    """Print from any rank: one of them builds or waits, whichever comes first."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
