"""What ranks do together: sums, gathered rows, one error for all, and a file that rank 0 makes for all.

In a world of one each of them is what a single process would do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from rlhf.config import ConfigError
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main, rank
from rlhf.distributed.world import init_world

_PROCESS_STARTED = time.time()


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
    mine = rows.new_tensor([rows.shape[0]], dtype=torch.long)
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    most = int(max(count.item() for count in counts))
    padded = rows.new_zeros(most, *rows.shape[1:])
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
