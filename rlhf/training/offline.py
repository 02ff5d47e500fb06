"""The offline loop: batches -> updates, with evaluation, and the best model kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from rlhf.data.stage_data import StageData
from rlhf.distributed.log import logger
from rlhf.distributed.place import rank
from rlhf.distributed.progress import Progress
from rlhf.training.data_order import DataOrder, Plan
from rlhf.training.loop import Loop, RunContext
from rlhf.training.step import accumulate_step, learning_rate

Batch = TypeVar("Batch")


class OfflineTrainer(Loop, Generic[Batch]):
    """The loop owns epochs, accumulation, evaluation, logging, saving, and keeps the best model.

    An algorithm writes `collate`, `length`, `loss_count`, `loss_sum` and `evaluate`. `export` writes the model;
    `best_metric` (lower is better) decides which evaluation's model is kept. Without evaluation data the last
    model is exported.
    """

    best_metric = "eval_loss"

    def __init__(
        self,
        engine: Any,
        data: StageData,
        *,
        plan: Plan,
        total_steps: int,
        eval_every_steps: int,
        export: Callable[[], None],
        context: RunContext,
    ) -> None:
        super().__init__(context, total_steps=total_steps)
        self.engine = engine
        self.train = data.train
        self.evaluation = data.evaluation
        self.plan = plan
        self.eval_every_steps = eval_every_steps
        self.order = DataOrder([self.length(example) for example in data.train], plan, self.run.seed)
        self._export = export

    @property
    def device(self) -> torch.device:
        return torch.device(self.engine.device)

    def engines(self) -> dict[str, Any]:
        return {"model": self.engine}

    def export(self) -> None:
        self._export()

    @abstractmethod
    def length(self, example: Any) -> int:
        """Tokens of an example."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Batch:
        """Examples -> a batch on the CPU."""

    @abstractmethod
    def loss_count(self, batch: Batch) -> float:
        """Elements the loss of this batch is a sum over."""

    @abstractmethod
    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Summed loss of a batch on the device; adds its metrics to `self.meter`."""

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Look at this rank's micro-batches of a step before any of them is learnt from (nothing to see as a rule)."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Metrics on the held-out data, named `eval_...`; every rank gets the same."""

    def fit(self) -> dict[str, Any]:
        """Train; returns {"before": metrics, "after": metrics of the exported model, "best_step", "seconds"}.

        Resumes from a saved state where there is one. Raises Stopped when the run was asked to stop.
        """
        torch.manual_seed(self.run.seed * 1_000_003 + rank())  # dropout masks differ between ranks
        if not self.evaluation:
            logger.warning(
                "%s: no held-out data, so no evaluation and the last model is kept; see eval_fraction", self.stage
            )
        done = self.begin()
        if done == 0:
            before = self._evaluate_and_log(0)
            self.outcome = {"before": before, "after": before, "best_step": 0}
        self.engine.train()
        with Progress(self.total_steps, self.stage, self.unit, done=done) as progress:
            for step in range(done + 1, self.total_steps + 1):
                loss = self._step(step)
                progress.advance(loss=loss)
                if self.evaluation and self._evaluation_due(step):
                    self._keep_if_best(step, self._evaluate_and_log(step))
                    self.engine.train()
                self.end_step(step)
        if not self.evaluation:
            self.outcome["best_step"] = self.total_steps
            self.export()
        return self.ended()

    def _step(self, step: int) -> float:
        batches = [
            self.collate([self.train[index] for index in part]).to(self.engine.device)  # type: ignore[attr-defined]
            for part in self.order.micro_batches(step - 1)
        ]
        self.before_step(batches)
        loss = accumulate_step(
            self.engine,
            batches,
            count=self.loss_count,
            loss_sum=self.loss_sum,
            step=step,
            name=f"{self.stage} loss",
            engine_name=self.stage,
            directory=self.directory,
            meter=self.meter,
        )
        self.meter.add({"loss": loss, "learning_rate": learning_rate(self.engine)}, 1)
        if step % self.run.log_every_steps == 0 or step == self.total_steps:
            self.record(step, self.meter.means(self.engine.device, counted=True))
        return loss

    def better(self, metrics: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
        """Whether the model of one evaluation is to be kept in place of another one's."""
        return bool(metrics[self.best_metric] < than[self.best_metric])

    def _keep_if_best(self, step: int, metrics: dict[str, Any]) -> None:
        """Export the model when no evaluation before was as good. A disk that is full costs this one, not the run."""
        best_step, best = self.outcome["best_step"], self.outcome["after"]
        if best_step and not self.better(metrics, best):
            return
        if self.exported(last=step == self.total_steps):
            self.outcome.update(after=metrics, best_step=step)

    def _evaluation_due(self, step: int) -> bool:
        return step == self.total_steps or (self.eval_every_steps > 0 and step % self.eval_every_steps == 0)

    def _evaluate_and_log(self, step: int) -> dict[str, Any]:
        if not self.evaluation:
            nothing = {"eval_rows": 0.0}
            self.record(step, nothing)
            return nothing
        self.engine.eval()
        with torch.no_grad():
            metrics = self.evaluate()
        self.record_evaluation(step, {name: value for name, value in metrics.items() if isinstance(value, float)})
        return metrics

    def evaluation_batches(self, examples: Sequence[Any] | None = None) -> Iterator[tuple[Batch, int]]:
        """This rank's batches of `examples` (default: the evaluation data) and how many leading rows count."""
        chosen = self.evaluation if examples is None else examples
        for part, counted in self.evaluation_parts(chosen):
            yield self.collate([chosen[index] for index in part]), counted

    def evaluation_parts(self, examples: Sequence[Any]) -> Iterator[tuple[Sequence[int], int]]:
        """Which of `examples` each of this rank's batches holds, and how many leading ones count.

        Every rank gets equally many batches (a collective forward must not run short); rows that only fill up
        are the last examples again and do not count.
        """
        world = self.plan.world_size
        parts = self.plan.micro_batches([self.length(example) for example in examples])
        counts = [len(part) for part in parts]
        while len(parts) % world:
            parts.append(parts[-1])
            counts.append(0)
        yield from list(zip(parts, counts, strict=True))[rank() :: world]
