"""Accumulate metrics as sums, reduce them over ranks, write them from rank 0."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from rlhf.config import RunConfig
from rlhf.distributed import all_reduce_sum, is_main


class MeanMeter:
    """Weighted means over micro-batches and ranks: sums and counts are added, divided once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, totals: Mapping[str, torch.Tensor | float], count: torch.Tensor | float) -> None:
        """Add sums of quantities over `count` elements."""
        weight = torch.as_tensor(count, dtype=torch.float64).detach().cpu()
        for name, total in totals.items():
            value = torch.as_tensor(total).detach().double().cpu()
            self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.float64)) + value
            self._counts[name] = self._counts.get(name, torch.zeros((), dtype=torch.float64)) + weight

    def means(self, device: torch.device | str = "cpu", *, keep: bool = False) -> dict[str, float]:
        """Means over all ranks (a collective; every rank must have added the same names), then start anew.

        `keep` leaves the sums as they are, for a look in between.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        packed = torch.stack([torch.stack([self._sums[name], self._counts[name]]) for name in names])
        packed = all_reduce_sum(packed.float().to(device) if str(device).startswith("mps") else packed.to(device)).cpu()
        if not keep:
            self._sums, self._counts = {}, {}
        return {
            name: (packed[i, 0] / packed[i, 1]).item() if packed[i, 1] > 0 else math.nan for i, name in enumerate(names)
        }


class MetricsWriter:
    """Writes `metrics.jsonl`, TensorBoard events and, when asked for, Weights & Biases; rank 0 only.

    Raises ImportError with the pip command when `wandb_project` is set and wandb is not installed.
    """

    def __init__(self, directory: Path, run: RunConfig, *, stage: str) -> None:
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._started = time.perf_counter()
        if not is_main():
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "metrics.jsonl").open("w", encoding="utf-8")
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"))
        if run.wandb_project:
            self._wandb = _start_wandb(run, stage)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics at an optimizer step (PPO: iteration)."""
        if self._file is None:
            return
        seconds = round(time.perf_counter() - self._started, 3)
        self._file.write(json.dumps({"step": step, "seconds": seconds, **metrics}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush and close every writer."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(run: RunConfig, stage: str) -> Any:
    import wandb

    return wandb.init(project=run.wandb_project, name=f"{Path(run.output_dir).name}-{stage}", reinit=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a json file from rank 0, readable by people (indented, Korean as it is)."""
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
