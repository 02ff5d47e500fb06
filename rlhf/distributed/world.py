"""Rank, world size, seeding, statistics over all ranks, and logging from rank 0.

Everything works in a single process without a launcher: the world is then of size one.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from rlhf.config import ConfigError

logger = logging.getLogger("rlhf")
_PROCESS_STARTED = time.time()


def rank() -> int:
    """This process's rank, 0 in a world of one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, 1 without a launcher."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on rank 0, which writes files and prints."""
    return rank() == 0


def init_world(timeout_minutes: float = 60.0) -> torch.device:
    """Join the launcher's world, or make a world of one, and return this rank's device.

    Raises ConfigError when the launcher's port is taken, naming the port and the option that changes it.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(free_port())
        elif os.environ["RANK"] == "0":
            _check_port(int(os.environ.get("MASTER_PORT", "29500")))
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name() if accelerator.is_available() else "gloo",
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


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of `values` over all ranks, as a new tensor."""
    total = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on every rank when `flag` is true on one. A collective: every rank must call it."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def raise_on_all(error: Exception | None) -> None:
    """Raise rank 0's `error` on every rank (the others say that it was rank 0's); None there passes. A collective."""
    if any_rank(is_main() and error is not None, init_world()):
        raise error if is_main() and error is not None else ConfigError("rank 0 cannot start; its message says why")


def all_gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, ...] of every rank, in rank order: [sum of n, ...]. n may differ between ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device))
    most = int(max(count.item() for count in counts))
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


def all_reduce_max(value: int, device: torch.device | str = "cpu") -> int:
    """The largest `value` of all ranks."""
    largest = torch.tensor(value, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def rank_zero_first(path: Path, make: Callable[[], None], *, poll_seconds: float = 0.5) -> None:
    """Let rank 0 make the file or directory `path` while the others poll for it.

    There is no collective inside, so `make` may take hours without running into a collective's time-out.
    `make` must create `path` atomically (write beside, then rename). When it fails, rank 0 leaves
    `<path>.failed` for the others, which raise RuntimeError with its message.
    """
    failed = path.with_name(path.name + ".failed")
    if is_main():
        failed.unlink(missing_ok=True)
        if path.exists():
            return
        try:
            make()
        except BaseException as error:
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise
        return
    waiting_since = time.monotonic()
    told = False
    while not path.exists():
        if failed.exists() and failed.stat().st_mtime >= _PROCESS_STARTED - 5:  # not one of an earlier run
            raise RuntimeError(f"rank 0 could not make {path}: {failed.read_text(encoding='utf-8')}")
        if not told and time.monotonic() - waiting_since > 60:
            logger.error("rank %d waits for rank 0 to make %s; on several nodes it must be a shared disk", rank(), path)
            told = True
        time.sleep(poll_seconds)


class _BesideProgressBars(logging.Handler):
    """Prints above a running progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def setup_logging() -> None:
    """Print the library's messages on rank 0 only, and quieten the libraries below."""
    from transformers.utils import logging as transformers_logging

    logger.handlers = [_BesideProgressBars()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    transformers_logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
