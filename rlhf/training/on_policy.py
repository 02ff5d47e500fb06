"""The on-policy loop: prompts -> experience -> updates."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from rlhf.distributed.progress import Progress
from rlhf.numerics.intervals import standard_error
from rlhf.training.loop import Loop, RunContext


class OnPolicyTrainer(Loop):
    """The loop owns iterations, evaluation, logging and saving.

    An algorithm writes `make_experience(iteration)`, `update(experience, iteration)` and `evaluate(iteration)`.
    """

    unit = "iteration"

    def __init__(self, context: RunContext, *, total_steps: int, eval_every_steps: int) -> None:
        super().__init__(context, total_steps=total_steps)
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

        Resumes from a saved state where there is one. Raises Stopped when the run was asked to stop.
        """
        done = self.begin()
        if done == 0:
            before = self._evaluate_and_log(0)
            self.outcome = {"before": before, "after": before}
        with Progress(self.total_steps, self.stage, self.unit, done=done) as progress:
            for iteration in range(done + 1, self.total_steps + 1):
                metrics = self._iterate(iteration)
                progress.advance(score=metrics["score"], kl_per_token=metrics["kl_per_token"])
                if iteration % self.run.log_every_steps == 0 or iteration in (1, self.total_steps):
                    self.record(iteration, metrics)
                due = self.eval_every_steps > 0 and iteration % self.eval_every_steps == 0
                if due or iteration == self.total_steps:
                    self.outcome["after"] = self._evaluate_and_log(iteration)
                    self.exported(last=iteration == self.total_steps)
                self.end_step(iteration)
        return self.ended()

    def _iterate(self, iteration: int) -> dict[str, float]:
        started = time.perf_counter()
        experience = self.make_experience(iteration)
        update_started = time.perf_counter()
        metrics = self.update(experience, iteration)
        metrics["seconds_experience"] = update_started - started
        metrics["seconds_update"] = time.perf_counter() - update_started
        return metrics

    def _evaluate_and_log(self, iteration: int) -> dict[str, Any]:
        metrics = self.evaluate(iteration)
        metrics.update(score_gain(self.outcome.get("before", {}), metrics))
        numbers = {f"eval_{name}": value for name, value in metrics.items() if isinstance(value, float)}
        self.record_evaluation(iteration, numbers)
        return metrics


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
