"""Joining and leaving the world, this rank's device, and seeding.

Everything works in a single process without a launcher: the world is then of size one.
"""

from __future__ import annotations

import errno
import os
import random
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from rlhf.config import ConfigError
from rlhf.distributed.chatter import without_chatter
from rlhf.distributed.operator_builds import watch_operator_builds
from rlhf.distributed.place import free_port, rank


def init_world(timeout_minutes: float = 60.0) -> torch.device:
    """Join the launcher's world, or make a world of one, and return this rank's device.

    Raises ConfigError when the launcher's port is taken, naming the port and the option that changes it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    watch_operator_builds()
    accelerator = get_accelerator()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(free_port())
        elif os.environ["RANK"] == "0":
            _check_port(int(os.environ.get("MASTER_PORT", "29500")))
        with without_chatter():
            deepspeed.init_distributed(
                auto_mpi_discovery=False,
                timeout=timedelta(minutes=timeout_minutes),
                verbose=False,
            )
        if accelerator.device_name() == "cpu":
            _unlink_shared_memory()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))


def _unlink_shared_memory() -> None:
    """Take the name off the memory that DeepSpeed's all-reduce on a CPU has mapped, 67 MB a rank.

    Nobody does so later, and it would stay until the machine restarts. The ranks that have mapped it keep it.
    """
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank()}"
    buffer = Path("/dev/shm") / name
    dist.barrier()  # every rank of this machine has mapped it
    buffer.unlink(missing_ok=True)


def close_world() -> None:
    """Leave the world in good order; a rank that only exits may end with the library's abort and a false status."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_port(port: int) -> None:
    """The rendezvous listens on every interface of rank 0's machine."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own store listens there
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return  # not for this check to judge
            raise ConfigError(
                f"port {port} cannot be used for the rendezvous ({error.strerror}): another run may hold it; "
                f"choose a free one with `deepspeed --master_port PORT ...`"
            ) from error


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch alike on every rank.

    Sampling does not use these generators: it draws from streams keyed by prompt (see `rlhf.generation`).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
