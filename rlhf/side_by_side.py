"""Independent jobs on half of the CPU's threads each: two single-threaded products wait for nobody.

OpenMP threads meet at the end of every operation; at the sizes of a few million weights that costs about a fifth of
the time (docs/performance.md). On a GPU, or with several ranks, whose collectives must keep one order, jobs run one
after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from rlhf.distributed import world_size

WORKERS = 2
Result = TypeVar("Result")


def pays(device: torch.device | str) -> bool:
    """True where jobs run side by side: one process on a CPU that may use several threads."""
    return torch.device(device).type == "cpu" and world_size() == 1 and torch.get_num_threads() >= WORKERS


def side_by_side(jobs: Sequence[Callable[[], Result]], *, together: bool) -> list[Result]:
    """Results of all jobs in their order; `together` runs WORKERS of them at a time, the first ones first.

    Jobs must not change what another one reads. They see the caller's gradient mode. The last job may call
    `take_idle_threads` on its way. An exception of one is raised when all have ended.
    """
    if not together or len(jobs) < 2:
        return [job() for job in jobs]
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    group = _Jobs(len(jobs), threads)

    def run(job: Callable[[], Result]) -> Result:
        _running.group = group
        try:
            with torch.set_grad_enabled(gradients):
                return job()
        finally:
            group.ended.append(job)

    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(threads // WORKERS,)) as pool:
            futures = [pool.submit(run, job) for job in jobs]
            wait(futures)
    finally:
        torch.set_num_threads(threads)  # a part of the setting is the process's
    return [future.result() for future in futures]


def take_idle_threads() -> None:
    """Called by a job between two pieces of its work: if no other job is left it computes on all threads from here."""
    group = getattr(_running, "group", None)
    if group is not None and len(group.ended) == group.count - 1 and torch.get_num_threads() < group.threads:
        torch.set_num_threads(group.threads)


class _Jobs:
    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self.threads = threads
        self.ended: list[Callable[[], object]] = []


_running = threading.local()
"""The group of jobs that the current thread works on."""
