"""The on-policy loop: prompts -> experience -> updates."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.distributed.log import logger
from rlhf.distributed.place import is_main
from rlhf.distributed.progress import Progress
from rlhf.numerics.intervals import standard_error
from rlhf.training.loop import Loop, RunContext
from rlhf.training.metrics import LineFile
from rlhf.training.peaks import Peaks
from rlhf.training.rollout_samples import ROLLOUTS_FILE


@dataclass(frozen=True)
class Selection:
    """When a run is evaluated, which evaluation's models are kept, and when it ends before its last iteration.

    `keep_best` and `stop_when` name a figure of the evaluation, higher is better. None: the last models are kept, and
    all iterations run. `patience`: so many evaluations in a row without a new best by `stop_when` end the run.
    """

    every: int = 0
    keep_best: str | None = None
    stop_when: str | None = None
    patience: int = 3


class OnPolicyTrainer(Loop):
    """The loop owns iterations, evaluation, logging, saving, and which models are kept.

    An algorithm writes `make_experience(iteration)`, `update(experience, iteration)` and `evaluate(iteration)`.
    """

    unit = "iteration"

    def __init__(self, context: RunContext, *, total_steps: int, selection: Selection) -> None:
        super().__init__(context, total_steps=total_steps)
        self.selection = selection
        self.peaks = Peaks()
        self.rollout_lines: list[str] = []
        """What `make_experience` keeps of its responses for people to read, on rank 0."""
        self.kept_responses = LineFile(self.directory / ROLLOUTS_FILE)

    @abstractmethod
    def make_experience(self, iteration: int) -> Any:
        """Sample responses to the iteration's prompts and score them: everything `update` learns from."""

    @abstractmethod
    def update(self, experience: Any, iteration: int) -> dict[str, float]:
        """All inner epochs over one experience; returns metrics."""

    def prepare(self) -> None:
        """What is measured of the first actor before its evaluation; nothing unless an algorithm needs it."""

    @abstractmethod
    def evaluate(self, iteration: int) -> dict[str, Any]:
        """Metrics on held-out prompts; every rank gets the same."""

    def begin(self) -> int:
        done = super().begin()
        if done == 0 and is_main():
            self.kept_responses.open()
        return done

    def fit(self) -> dict[str, Any]:
        """Train; returns {"before", "after", "kept_iteration", "iterations", "seconds"}: the evaluations of the first
        actor and of the exported one, the iteration it is of, and how many there were.

        Resumes from a saved state where there is one. Raises Stopped when the run was asked to stop.
        """
        done = self.begin()
        if done == 0:
            self.prepare()
            before = self._evaluate_and_log(0)
            self.outcome = {"before": before, "after": before, "kept_iteration": 0}
        with Progress(self.total_steps, self.stage, self.unit, done=done) as progress:
            for iteration in range(done + 1, self.total_steps + 1):
                if self._past_its_best():
                    self._tell_the_end()
                    break
                metrics = self._iterate(iteration)
                progress.advance(score=metrics["score"], kl_per_token=metrics["kl_per_token"])
                if iteration % self.run.log_every_steps == 0 or iteration in (1, self.total_steps):
                    self.record(iteration, metrics)
                every = self.selection.every
                if (every > 0 and iteration % every == 0) or iteration == self.total_steps:
                    self._evaluate_and_log(iteration)
                self.end_step(iteration)
        self.outcome["iterations"] = self.step
        self.kept_responses.close()
        return self.ended()

    def _past_its_best(self) -> bool:
        """Whether `stop_when` ends the run here."""
        peak = self.peaks.found.get(self.selection.stop_when or "")
        return peak is not None and peak.since >= self.selection.patience

    def _tell_the_end(self) -> None:
        name = str(self.selection.stop_when)
        peak = self.peaks.found[name]
        logger.info(
            "%s ends after iteration %d of %d (stop_when): the best %s of the held-out prompts, %.4f, is that of "
            "iteration %d, and %d evaluations since have not passed it", self.stage, self.step, self.total_steps, name,
            peak.value, peak.iteration, peak.since,
        )  # fmt: skip

    def _iterate(self, iteration: int) -> dict[str, float]:
        started = time.perf_counter()
        experience = self.make_experience(iteration)
        for line in self.rollout_lines:
            self.kept_responses.write(line)
        update_started = time.perf_counter()
        metrics = self.update(experience, iteration)
        metrics["seconds_experience"] = update_started - started
        metrics["seconds_update"] = time.perf_counter() - update_started
        return metrics

    def _evaluate_and_log(self, iteration: int) -> dict[str, Any]:
        metrics = self.evaluate(iteration)
        metrics.update(score_gain(self.outcome.get("before", {}), metrics))
        metrics.update(self.peaks.look(iteration, metrics))
        best = iteration > 0 and self._is_best(metrics)
        numbers = {f"eval_{name}": value for name, value in metrics.items() if isinstance(value, float)}
        kept = iteration if best else self.outcome.get("kept_iteration", 0)
        self.record_evaluation(iteration, {**numbers, "eval_kept_step": float(kept)})
        last = iteration == self.total_steps or self._past_its_best()
        if best and self.exported(last=last):
            self.outcome.update(after=metrics, kept_iteration=iteration)
        return metrics

    def _is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether its models are to be exported: they are the newest, or better by `keep_best` than those that are."""
        name = self.selection.keep_best
        return name is None or not self.outcome["kept_iteration"] or metrics[name] > self.outcome["after"][name]

    # ------------------------------------------------------------------------- see rlhf.training.resume.Resumable

    def state(self) -> dict[str, Any]:
        return {**super().state(), "peaks": self.peaks.state()}

    def rank_state(self) -> dict[str, Any]:
        return {**super().rank_state(), "kept_responses_bytes": self.kept_responses.position()}

    def load_state(
        self, state: dict[str, Any], rank_states: Sequence[dict[str, Any]], tensors: dict[str, torch.Tensor]
    ) -> None:
        super().load_state(state, rank_states, tensors)
        self.peaks.load_state(state["peaks"])
        if is_main():  # an earlier release kept no responses
            self.kept_responses.open(rank_states[0].get("kept_responses_bytes", 0) if rank_states else 0)


def score_gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """How far the held-out score has risen since `before`, and the standard error of that over prompts.

    Both evaluations are on the same prompts, so that the error is that of the differences by prompt: what is hard for
    both does not count. {} where one of them has no `prompt_scores`, or those of a single prompt, which has no error.
    """
    scores = [evaluation.get("prompt_scores", []) for evaluation in (before, after)]
    if min(map(len, scores)) < 2:
        return {}
    gains = torch.tensor(scores[1]) - torch.tensor(scores[0])
    return {"score_gain": float(gains.mean()), "score_gain_error": standard_error(gains)}
