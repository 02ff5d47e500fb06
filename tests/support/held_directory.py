"""Directories whose lock another run left, and file systems without `flock`."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path

import pytest


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)


def left_behind(tmp_path: Path, **facts: object) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "then", "command": "python", "birth": None}
    (tmp_path / ".lock").write_text(json.dumps({**holder, **facts}))
