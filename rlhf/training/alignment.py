"""Offline loops that align a model beside a reference, and sample from it at their evaluations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from rlhf.data.stage_data import StageData
from rlhf.training.offline import OfflineTrainer
from rlhf.types import RankedBatch, ResponseBatch

Batch = TypeVar("Batch")
LiveReference = Callable[[RankedBatch | ResponseBatch], torch.Tensor]
"""log pi_ref of each whole response of a batch: sums over tokens, as `response_log_likelihoods` gives them."""
SAMPLED = ("eos_rate", "response_tokens", "repeated_4grams", "empty_responses", "entropy_estimate")
"""Figures of sampled responses that an evaluation records."""


class AlignmentTrainer(OfflineTrainer[Batch]):
    """`live_reference` says what the reference says of a batch, where the rows do not bring it along; `sample` what the
    actor's responses to held-out prompts are like, see `RolloutWorker.evaluate`. `keep_best`: the figure of an
    evaluation whose highest value decides which model is kept, where it is not the loss."""

    def __init__(
        self,
        engine: Any,
        data: StageData,
        *,
        pad_token_id: int,
        eval_every_steps: int,
        keep_best: str | None = None,
        sample: Callable[[], dict[str, Any]] | None = None,
        live_reference: LiveReference | None = None,
        **loop: Any,
    ) -> None:
        super().__init__(engine, data, eval_every_steps=eval_every_steps, **loop)
        self.pad_token_id = pad_token_id
        self.keep_best = keep_best
        self.sample = sample
        self.live_reference = live_reference

    def reference(self, batch: RankedBatch | ResponseBatch, known: torch.Tensor) -> torch.Tensor:
        """What the reference says of the responses of `batch`, of which the rows say `known`."""
        return known if self.live_reference is None else self.live_reference(batch)

    def better(self, metrics: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
        if self.keep_best is None:
            return super().better(metrics, than)
        name = f"eval_{self.keep_best}"
        return bool(metrics[name] > than[name])

    @abstractmethod
    def held_out(self) -> dict[str, float]:
        """Loss and what is logged in training, of the held-out rows."""

    def evaluate(self) -> dict[str, Any]:
        """What `held_out` says; of sampled responses what `SAMPLED` names and what measures say, and all of it under
        "sampled"."""
        figures = {f"eval_{name}": value for name, value in self.held_out().items()}
        found: dict[str, Any] = {**figures, "eval_rows": float(len(self.evaluation))}
        if self.sample is not None:
            sampled = self.sample()
            names = [*SAMPLED, *sampled.get("prompt_measures", {})]
            found |= {f"eval_{name}": sampled[name] for name in names if name in sampled}
            found["sampled"] = sampled
        return found
