"""What every training loop has: metrics, the doctor's eye on them, and a state that is saved and restored."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint.atomic import write_json
from rlhf.config import RunConfig
from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main
from rlhf.distributed.rank_watch import Stopped, beat, note_saved, stop_requested
from rlhf.doctor.checks import Check
from rlhf.doctor.monitor import HealthMonitor
from rlhf.training.metrics import MeanMeter, MetricsWriter
from rlhf.training.resume import TrainingStates

PLAN_FILE = "plan.json"
"""How many steps (PPO: iterations) the run is to have, for whoever looks on."""
SHOWN = 5
"""Figures of an evaluation in a line of the log, where a stage names those that matter."""


@dataclass(frozen=True)
class RunContext:
    """What a stage gives its loop: its name, the directory it writes to, the doctor's checks of its metrics, its
    training states (None saves nothing), the figures of an evaluation that the log shows (none named: all), and what
    rank 0 calls with the step that the loop begins after, once a saved state has been accepted."""

    stage: str
    run: RunConfig
    directory: Path
    checks: Sequence[Check]
    states: TrainingStates | None = None
    logged: Sequence[str] = ()
    begins: Callable[[int], None] | None = None


class Loop(ABC):
    """Steps 1 to `total_steps` (PPO: iterations), each followed by `end_step`.

    A subclass's `fit` calls `begin`, then takes the steps after the one it returns.
    """

    unit = "step"
    """What the loop counts."""

    def __init__(self, context: RunContext, *, total_steps: int) -> None:
        self.total_steps = total_steps
        self.run = context.run
        self.directory = context.directory
        self.stage = context.stage
        self.states = context.states
        self.logged = context.logged
        self.begins = context.begins
        self.meter = MeanMeter()
        self.writer = MetricsWriter(self.directory, self.run, stage=self.stage)
        self.health = HealthMonitor(self.directory, self.stage, context.checks)
        self.step = 0
        self.outcome: dict[str, Any] = {}
        """What `fit` returns in the end, as far as it is known: evaluations before and after."""
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    @abstractmethod
    def engines(self) -> Mapping[str, Any]:
        """Training engines by name."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the ranks' collectives run."""

    @abstractmethod
    def export(self) -> None:
        """Write the models; a collective. Raises OSError on every rank when they cannot be written."""

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._seconds_before + time.perf_counter() - self._started

    def begin(self) -> int:
        """Restore the newest saved state, or start; the number of steps that are done already."""
        self._started = time.perf_counter()
        if self.states is None or not self.states.restore(self):
            self.writer.open()
        if self.step:
            note_saved(self.step)
        if is_main():
            write_json(self.directory / PLAN_FILE, {"unit": self.unit, "planned": self.total_steps})
            if self.begins is not None:
                self.begins(self.step)
        beat(f"step {self.step}")
        return self.step

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write a line of metrics and let the doctor look at it."""
        self.writer.write(step, metrics)
        self.health.observe(step, metrics)

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation, and show the figures that matter in the log; `metrics.jsonl` has all of them.

        `eval_progress` is the share of the run's steps that are done: early on the doctor does not judge a model.
        """
        self.record(step, {**metrics, "eval_progress": step / self.total_steps})
        there = [name for name in self.logged or metrics if name in metrics]
        figures = "  ".join(f"{name}={metrics[name]:.4f}" for name in (there[:SHOWN] if self.logged else there))
        if figures:
            logger.info("%s %s %d: %s", self.stage, self.unit, step, figures)

    def exported(self, *, last: bool) -> bool:
        """Export the models; a disk that cannot be written is no reason to end a run before its `last` step."""
        try:
            self.export()
        except OSError as error:
            if last:
                raise
            logger.error("%s: %s; training goes on, the next export tries again", self.stage, error)
            return False
        return True

    def end_step(self, step: int) -> None:
        """Save where it is due; raises Stopped on every rank when one was asked to stop."""
        self.step = step
        beat(f"step {step}")
        stop = stop_requested(self.device)
        saved = False
        if self.states is not None and (self.states.due(step, self.total_steps) or (stop and self.run.keep_last > 0)):
            saved = self.states.save(step, self)
            if saved:
                note_saved(step)
        if stop:
            self.writer.close()
            raise Stopped(step, self.directory, saved=saved)

    def ended(self) -> dict[str, Any]:
        """What `fit` returns: the evaluations, seconds over all processes of the run, and what the doctor found."""
        self.writer.close()
        return {**self.outcome, "seconds": self.seconds, "health": self.health.summary()}

    # ------------------------------------------------------------------------- see rlhf.training.resume.Resumable

    def state(self) -> dict[str, Any]:
        """Everything alike on every rank that the next step or the end of the run depends on."""
        return {
            "step": self.step,
            "outcome": self.outcome,
            "seconds": self.seconds,
            "health": self.health.state(),
        }

    def rank_state(self) -> dict[str, Any]:
        """This rank's sums since the last line of metrics, and where its files end."""
        return {"meter": self.meter.state(), "metrics_bytes": self.writer.position()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors of rank 0 outside the engines."""
        return {}

    def load_state(
        self, state: dict[str, Any], rank_states: Sequence[dict[str, Any]], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Restore what `state`, `rank_state` and `tensors` gave; metrics written after the save are cut off."""
        self.step = state["step"]
        self.outcome = state["outcome"]
        self._seconds_before = state["seconds"]
        self.health.load_state(state["health"])
        position = rank_states[0]["metrics_bytes"] if rank_states else 0
        self.writer.open(position, seconds=self._seconds_before, step=self.step)
        for rank_state in rank_states:
            self.meter.load(rank_state["meter"])
