"""Accumulate metrics as sums, reduce them over ranks, write them from rank 0."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from rlhf.config import RunConfig
from rlhf.distributed.collectives import all_reduce_sum
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main


class MeanMeter:
    """Weighted means over micro-batches and ranks: sums and counts are added, divided once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, totals: Mapping[str, torch.Tensor | float], count: torch.Tensor | float) -> None:
        """Add sums of quantities over `count` elements."""
        weight = torch.as_tensor(count, dtype=torch.float64).detach().cpu()
        for name, total in totals.items():
            value = torch.as_tensor(total, dtype=torch.float64).detach().cpu()
            self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.float64)) + value
            self._counts[name] = self._counts.get(name, torch.zeros((), dtype=torch.float64)) + weight

    def means(
        self, device: torch.device | str = "cpu", *, keep: bool = False, counted: bool = False
    ) -> dict[str, float]:
        """Means over all ranks (a collective; every rank must have added the same names), then start anew.

        `keep` leaves the sums as they are, for a look in between. A name of which no rank counted an element is nan, or
        with `counted` left out.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        packed = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in names])
        packed = all_reduce_sum(packed.float().to(device) if str(device).startswith("mps") else packed.to(device)).cpu()
        if not keep:
            self._sums, self._counts = {}, {}
        return {
            name: (packed[i, 0] / packed[i, 1]).item() if packed[i, 1] > 0 else math.nan
            for i, name in enumerate(names)
            if packed[i, 1] > 0 or not counted
        }

    def state(self) -> dict[str, tuple[float, float]]:
        """Sum and count of this rank by name."""
        return {name: (total.item(), self._counts[name].item()) for name, total in self._sums.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Add the sums and counts that `state` gave."""
        for name, (total, count) in state.items():
            self.add({name: total}, count)


class MetricsWriter:
    """Writes `metrics.jsonl`, TensorBoard events and, when asked for, Weights & Biases; rank 0 only.

    `open` comes first. A disk that cannot be written stops no training: lines wait for the next one, and the log says
    so. Raises ImportError with the pip command when `wandb_project` is set and wandb is not installed.
    """

    def __init__(self, directory: Path, run: RunConfig, *, stage: str) -> None:
        self._lines = LineFile(directory / "metrics.jsonl")
        self._directory = directory
        self._run = run
        self._stage = stage
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._started = time.perf_counter()

    def open(self, position: int = 0, *, seconds: float = 0.0, step: int = 0) -> None:
        """Start, or continue behind the `position` bytes, `seconds` and `step` that an earlier process came to."""
        self._started = time.perf_counter() - seconds
        if not is_main():
            return
        self._lines.open(position)
        if self._run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self._directory / "tensorboard")
            self._tensorboard = SummaryWriter(folder, purge_step=step + 1 if position else None)
        if self._run.wandb_project:
            self._wandb = _start_wandb(self._run, self._stage)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics at an optimizer step (PPO: iteration)."""
        if not is_main():
            return
        seconds = round(time.perf_counter() - self._started, 3)
        self._lines.write(json.dumps({"step": step, "seconds": seconds, **metrics}))
        if self._tensorboard is not None:
            try:
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)
            except OSError as error:
                logger.error("TensorBoard events cannot be written (%s); metrics.jsonl goes on", error)
                self._tensorboard = None
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def position(self) -> int:
        """Bytes of `metrics.jsonl` that are written for good (0 on other ranks)."""
        return self._lines.position() if is_main() else 0

    def close(self) -> None:
        """Flush and close every writer."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class LineFile:
    """A file of lines that is cut back to whole ones: a line that cannot be written waits for the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._written = 0
        self._waiting: list[bytes] = []

    def open(self, position: int = 0) -> None:
        """Open for lines behind the first `position` bytes; what lies there beyond them is cut off.

        A file that is shorter (moved away, or cleaned up by somebody) is no reason to refuse: it is reported.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size < position:
            logger.error("%s has %d bytes and had %d: earlier lines are lost", self._path, size, position)
            position = size
        self._file = self._path.open("r+b" if position else "wb", buffering=0)
        self._file.truncate(position)
        self._written = position

    def write(self, line: str) -> None:
        """Add a line, and those that are still waiting."""
        if self._file is None:
            raise ValueError(f"{self._path} is not open")
        self._waiting.append(line.encode() + b"\n")
        block = b"".join(self._waiting)
        try:
            self._file.truncate(self._written)  # of an earlier attempt
            self._file.seek(self._written)
            done = 0
            while done < len(block):
                done += self._file.write(block[done:])
        except OSError as error:
            logger.error("%s cannot be written (%s); %d lines wait", self._path, error.strerror, len(self._waiting))
            return
        self._written += len(block)
        self._waiting = []

    def position(self) -> int:
        """Bytes written for good. Raises OSError when lines are still waiting or cannot be synced."""
        if self._file is None:
            return 0
        if self._waiting:
            raise OSError(errno.EIO, f"{len(self._waiting)} lines of {self._path} could not be written yet")
        os.fsync(self._file.fileno())
        return self._written

    def close(self) -> None:
        """Close; lines that could not be written are reported."""
        if self._file is None:
            return
        if self._waiting:
            logger.error("%d lines of %s are lost: it cannot be written", len(self._waiting), self._path)
        self._file.close()
        self._file = None


def _start_wandb(run: RunConfig, stage: str) -> Any:
    import wandb

    return wandb.init(project=run.wandb_project, name=f"{Path(run.output_dir).name}-{stage}", reinit=True)
