"""This process's place in the world, known without loading torch: its rank, the world's size, a free port."""

from __future__ import annotations

import os
import socket
import sys
from types import ModuleType


def rank() -> int:
    """This process's rank, 0 in a world of one."""
    dist = _open_world()
    return int(os.environ.get("RANK", "0")) if dist is None else int(dist.get_rank())


def world_size() -> int:
    """The number of processes, 1 without a launcher."""
    dist = _open_world()
    return int(os.environ.get("WORLD_SIZE", "1")) if dist is None else int(dist.get_world_size())


def is_main() -> bool:
    """True on rank 0, which writes files and prints."""
    return rank() == 0


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _open_world() -> ModuleType | None:
    """`torch.distributed` where this process has joined a world; where nothing has loaded it, it has not."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
