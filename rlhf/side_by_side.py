"""Independent jobs on half of the CPU's threads each: two single-threaded products wait for nobody.

OpenMP threads meet at the end of every operation; at the sizes of a few million weights that costs about a fifth of
the time (docs/performance.md). On a GPU, under ZeRO-3, or with several ranks, whose collectives must keep one
order, jobs run one after the other. With an odd number of threads one is idle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from rlhf.distributed import world_size

WORKERS = 2
Result = TypeVar("Result")


def pays(device: torch.device | str) -> bool:
    """True where jobs run side by side: one process on a CPU that may use several threads."""
    return torch.device(device).type == "cpu" and world_size() == 1 and torch.get_num_threads() >= WORKERS


def side_by_side(jobs: Sequence[Callable[[], Result]], *, together: bool) -> list[Result]:
    """Results of all jobs in their order; `together` runs WORKERS of them at a time, the first ones first.

    Jobs must not change what another one reads. They see the caller's gradient mode. Each keeps its half of the
    threads to its end, so that results do not depend on timing. An exception of one is raised when all have ended.
    """
    if not together or len(jobs) < 2:
        return [job() for job in jobs]
    group = _Group(iter(enumerate(jobs)), torch.get_num_threads(), torch.is_grad_enabled())
    helper = threading.Thread(target=group.work)
    helper.start()
    try:
        group.work()  # the caller is one of the workers: a second new thread would hold memory of its own
    finally:
        helper.join()
        torch.set_num_threads(group.threads)  # a part of the setting is the process's
    for error in group.errors:
        raise error
    return [group.results[index] for index in range(len(jobs))]


@dataclass
class _Group:
    """Jobs that are run side by side; `waiting` gives each to one worker."""

    waiting: Iterator[tuple[int, Callable[[], Any]]]
    threads: int
    gradients: bool
    results: dict[int, Any] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        torch.set_num_threads(self.threads // WORKERS)
        while True:
            with self.lock:
                index, job = next(self.waiting, (0, None))
            if job is None:
                return
            try:
                with torch.set_grad_enabled(self.gradients):
                    self.results[index] = job()
            except Exception as error:  # raised by the caller when all have ended
                self.errors.append(error)
