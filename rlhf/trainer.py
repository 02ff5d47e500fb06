"""The two loops there are: offline (batches -> updates) and on-policy (prompts -> experience -> updates)."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from rlhf.config import BatchConfig, RunConfig
from rlhf.distributed import all_reduce_sum, any_rank, is_main, logger, rank, world_size
from rlhf.loop import Loop
from rlhf.metrics import MeanMeter, write_json
from rlhf.nonfinite import NonFiniteError as NonFiniteError
from rlhf.nonfinite import gradient_error, loss_error
from rlhf.resume import TrainingStates

Batch = TypeVar("Batch")


class Plan(Protocol):
    """The arithmetic of a batch (see `rlhf.engine.BatchPlan`)."""

    @property
    def global_batch_size(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def token_budget(self, lengths: Sequence[int]) -> int: ...
    def micro_batches(self, lengths: Sequence[int], *, sharers: int = 1) -> list[list[int]]: ...


class DataOrder:
    """The order of examples: an endless stream of shuffled epochs, the same on every rank.

    Step s takes examples s*G to (s+1)*G of the stream, so no batch is ever partial. Within a step examples go into
    micro-batches by length, which changes no gradient: losses are normalised over the whole global batch.
    """

    def __init__(self, lengths: Sequence[int], plan: Plan, seed: int) -> None:
        if not lengths:
            raise ValueError("no training example: the data set is empty")
        self._lengths = lengths
        self._plan = plan
        self._seed = seed

    def steps(self, epochs: float) -> int:
        """Optimizer steps that `epochs` passes take (the last one runs on into the next pass)."""
        return max(1, math.ceil(round(epochs * len(self._lengths), 6) / self._plan.global_batch_size))

    def indices(self, step: int) -> list[int]:
        """Examples of the global batch of `step`, longest first."""
        size, total = self._plan.global_batch_size, len(self._lengths)
        chosen = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, total)
            chosen.append(int(self._permutation(epoch)[offset]))
        return sorted(chosen, key=lambda index: (-self._lengths[index], index))

    def micro_batches(self, step: int, *, sharers: int = 1) -> list[list[int]]:
        """This rank's micro-batches of `step`, equally many on every rank (see `BatchPlan.micro_batches`)."""
        chosen = self.indices(step)
        parts = self._plan.micro_batches([self._lengths[index] for index in chosen], sharers=sharers)
        return [[chosen[place] for place in part] for part in parts[rank() :: self._plan.world_size]]

    def _permutation(self, epoch: int) -> torch.Tensor:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self._lengths), generator=generator)
            self._epoch = epoch
        return self._order


def accumulate_step(
    engine: Any,
    micro_batches: Sequence[Batch],
    *,
    count: Callable[[Batch], float],
    loss_sum: Callable[[Batch], torch.Tensor],
    step: int,
    name: str = "loss",
    engine_name: str = "model",
    directory: Path | None = None,
    meter: MeanMeter | None = None,
    norm_name: str = "gradient_norm",
) -> float:
    """One optimizer step over all micro-batches of all ranks; returns the loss of the global batch.

    `loss_sum(batch)` is a sum over `count(batch)` elements (tokens or prompts). It is divided by the count of the
    *global* batch, so neither the split into micro-batches nor the number of ranks changes the gradient
    (TRL#583). The gradient's norm before clipping goes to `meter` as `norm_name` (not in fp16, where it may carry the
    loss scale). Raises NonFiniteError on every rank, before a weight changes, when the loss of one of them or the
    gradient is not finite; the batch then lies in `directory`. In fp16 a gradient that overflows is DeepSpeed's to
    handle.
    """
    from rlhf.engine.gradients import keeps_plain_gradients, plain_gradient_norm, scales_loss

    device = engine.device
    total = all_reduce_sum(torch.tensor(float(sum(count(batch) for batch in micro_batches)), device=device))
    if total == 0:
        raise ValueError(f"step {step}: no element of the batch counts for {name}; check the data and the masks")
    parts: list[torch.Tensor] = []

    def backward() -> None:
        for left, batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            engine.set_gradient_accumulation_boundary(left == 0)  # the number of micro-batches varies
            loss = loss_sum(batch) / total
            engine.backward(loss * world_size(), scale_wrt_gas=False)  # DeepSpeed takes the mean over ranks
            parts.append(loss.detach())

    backward()
    running = torch.zeros((), device=device)
    for part in parts:
        running += part
    norm = plain_gradient_norm(engine) if keeps_plain_gradients(engine) else None
    bad_loss = not bool(torch.isfinite(running))
    if any_rank(bad_loss or (norm is not None and not bool(torch.isfinite(norm))), device):
        if any_rank(bad_loss, device):
            raise loss_error(engine, engine_name, name, step, micro_batches, parts, directory)
        raise gradient_error(engine, engine_name, name, step, micro_batches, directory, None)
    engine.step()
    if not scales_loss(engine):
        if norm is None and getattr(engine.optimizer, "overflow", False):  # DeepSpeed has left the step out
            raise gradient_error(engine, engine_name, name, step, micro_batches, directory, backward)
        norm = engine.get_global_grad_norm() if norm is None else norm
        if meter is not None and norm is not None:
            meter.add({norm_name: norm}, 1)
    return float(all_reduce_sum(running))


class Trainer(Loop, Generic[Batch]):
    """The offline loop: epochs, accumulation, evaluation, logging, saving the best model.

    An algorithm writes `collate`, `length`, `loss_count`, `loss_sum` and `evaluate`. `export` writes the model;
    `best_metric` (lower is better) decides which evaluation's model is kept. Without evaluation data the last
    model is exported.
    """

    best_metric = "eval_loss"

    def __init__(
        self,
        engine: Any,
        train: Sequence[Any],
        evaluation: Sequence[Any],
        *,
        plan: Plan,
        batch: BatchConfig,
        run: RunConfig,
        directory: Path,
        stage: str,
        eval_every_steps: int,
        export: Callable[[], None],
        states: TrainingStates | None = None,
    ) -> None:
        self.engine = engine
        self.train = train
        self.evaluation = evaluation
        self.plan = plan
        self.eval_every_steps = eval_every_steps
        self._export = export
        self.order = DataOrder([self.length(example) for example in train], plan, run.seed)
        total = batch.max_steps or self.order.steps(batch.epochs)
        super().__init__(total_steps=total, run=run, directory=directory, stage=stage, states=states)

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

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Metrics on the held-out data, named `eval_...`; every rank gets the same."""

    def fit(self) -> dict[str, Any]:
        """Train; returns {"before": metrics, "after": metrics of the exported model, "best_step", "seconds"}.

        Goes on from a saved state where `states` has one. Raises Stopped when the run was asked to stop.
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
        with tqdm(
            total=self.total_steps, initial=done, desc=self.stage, unit="step", disable=not is_main()
        ) as progress:
            for step in range(done + 1, self.total_steps + 1):
                loss = self._step(step)
                progress.update()
                progress.set_postfix(loss=f"{loss:.4f}")
                if self.evaluation and self._evaluation_due(step):
                    self._keep_if_best(step, self._evaluate_and_log(step))
                    self.engine.train()
                self.end_step(step)
        if not self.evaluation:
            self.outcome["best_step"] = self.total_steps
            self.export()
        self.writer.close()
        return self.ended()

    def _step(self, step: int) -> float:
        batches = [
            self.collate([self.train[index] for index in part]).to(self.engine.device)  # type: ignore[attr-defined]
            for part in self.order.micro_batches(step - 1)
        ]
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
            self.record(step, self.meter.means(self.engine.device))
        return loss

    def _keep_if_best(self, step: int, metrics: dict[str, Any]) -> None:
        """Export the model when no evaluation before was as good. A disk that is full costs this one, not the run."""
        best_step, best = self.outcome["best_step"], self.outcome["after"]
        if best_step and metrics[self.best_metric] >= best[self.best_metric]:
            return
        if self.exported(last=step == self.total_steps):
            self.outcome.update(after=metrics, best_step=step)

    def _evaluation_due(self, step: int) -> bool:
        return step == self.total_steps or (self.eval_every_steps > 0 and step % self.eval_every_steps == 0)

    def _evaluate_and_log(self, step: int) -> dict[str, Any]:
        if not self.evaluation:
            return {}
        self.engine.eval()
        with torch.no_grad():
            metrics = self.evaluate()
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        self.record(step, numbers)
        shown = {name: value for name, value in numbers.items() if "/" not in name}
        logger.info("%s step %d: %s", self.stage, step, "  ".join(f"{k}={v:.4f}" for k, v in shown.items()))
        return metrics

    def evaluation_batches(self, examples: Sequence[Any] | None = None) -> Iterator[tuple[Batch, int]]:
        """This rank's batches of `examples` (default: the evaluation data) and how many leading ones count.

        Every rank gets equally many batches (a collective forward must not run short); rows that only fill up
        are the last examples again and do not count.
        """
        world = self.plan.world_size
        chosen = self.evaluation if examples is None else examples
        parts = self.plan.micro_batches([self.length(example) for example in chosen])
        counts = [len(part) for part in parts]
        while len(parts) % world:
            parts.append(parts[-1])
            counts.append(0)
        for part, counted in list(zip(parts, counts, strict=True))[rank() :: world]:
            yield self.collate([chosen[index] for index in part]), counted


def learning_rate(engine: Any) -> float:
    """The learning rate of the engine's next optimizer step."""
    return float(engine.optimizer.param_groups[0]["lr"])


class OnPolicyTrainer(Loop):
    """The on-policy loop: prompts -> experience -> inner epochs of updates.

    An algorithm writes `make_experience(iteration)`, `update(experience, iteration)` and `evaluate(label)`.
    """

    def __init__(self, *, eval_every_steps: int, **loop: Any) -> None:
        super().__init__(**loop)
        self.eval_every_steps = eval_every_steps

    @abstractmethod
    def make_experience(self, iteration: int) -> Any:
        """Sample responses to the iteration's prompts and score them: everything `update` learns from."""

    @abstractmethod
    def update(self, experience: Any, iteration: int) -> dict[str, float]:
        """All inner epochs over one experience; returns metrics."""

    @abstractmethod
    def evaluate(self, iteration: int) -> dict[str, Any]:
        """Metrics on held-out prompts; every rank gets the same."""

    def fit(self) -> dict[str, Any]:
        """Train; returns {"before", "after", "seconds"} with the evaluations of the first and the last actor.

        Goes on from a saved state where `states` has one. Raises Stopped when the run was asked to stop.
        """
        done = self.begin()
        if done == 0:
            before = self._evaluate_and_log(0)
            self.outcome = {"before": before, "after": before}
        with tqdm(
            total=self.total_steps, initial=done, desc=self.stage, unit="iteration", disable=not is_main()
        ) as progress:
            for iteration in range(done + 1, self.total_steps + 1):
                experience_started = time.perf_counter()
                experience = self.make_experience(iteration)
                update_started = time.perf_counter()
                metrics = self.update(experience, iteration)
                metrics["seconds_experience"] = update_started - experience_started
                metrics["seconds_update"] = time.perf_counter() - update_started
                progress.update()
                progress.set_postfix(score=f"{metrics['score']:.3f}", kl=f"{metrics['kl_per_token']:.3f}")
                if iteration % self.run.log_every_steps == 0 or iteration in (1, self.total_steps):
                    self.record(iteration, metrics)
                due = self.eval_every_steps > 0 and iteration % self.eval_every_steps == 0
                if due or iteration == self.total_steps:
                    self.outcome["after"] = self._evaluate_and_log(iteration)
                    self.exported(last=iteration == self.total_steps)
                self.end_step(iteration)
        self.writer.close()
        return self.ended()

    def _evaluate_and_log(self, iteration: int) -> dict[str, Any]:
        metrics = self.evaluate(iteration)
        numbers = {f"eval_{name}": value for name, value in metrics.items() if isinstance(value, float)}
        self.record(iteration, numbers)
        logger.info("%s iteration %d: %s", self.stage, iteration, "  ".join(f"{k}={v:.4f}" for k, v in numbers.items()))
        return metrics


def write_result(directory: Path, result: Mapping[str, Any], *, seed: int) -> None:
    """Write a stage's `result.json` (rank 0): what `summary.json` is put together from."""
    write_json(directory / "result.json", {**result, "seconds": round(result["seconds"], 1), "seed": seed})
