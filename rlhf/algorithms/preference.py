"""Offline preference optimisation: raise the better of the responses that are there, by any of the offline losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.algorithms.candidates import Candidates
from rlhf.algorithms.config import OfflineConfig
from rlhf.algorithms.offline_losses import OFFLINE_LOSSES
from rlhf.algorithms.ranking_losses import ranked_pairs
from rlhf.algorithms.ranking_metrics import accuracy_of
from rlhf.data.collate import collate_rankings
from rlhf.data.stage_data import StageData
from rlhf.training.alignment import AlignmentTrainer
from rlhf.training.metrics import MeanMeter
from rlhf.training.reference_logprobs import Referenced, response_log_likelihoods
from rlhf.types import RankedBatch, TensorBatch, TokenizedRanking


@dataclass(frozen=True)
class PreferenceBatch(TensorBatch):
    """Candidates of several prompts, and `ref_logprobs` [N], what the reference says of each whole response."""

    ranked: RankedBatch
    ref_logprobs: torch.Tensor


class PreferenceTrainer(AlignmentTrainer[PreferenceBatch]):
    """Learns the loss `config.algorithm`, averaged over the prompts of the global batch that have a pair."""

    def __init__(self, engine: Any, data: StageData, config: OfflineConfig, **loop: Any) -> None:
        super().__init__(engine, data, eval_every_steps=config.eval_every_steps, keep_best=config.keep_best, **loop)
        self.config = config
        self.algorithm = OFFLINE_LOSSES[config.algorithm]
        self.numbers = {name: 0 for name in {example.category for example in [*data.train, *data.evaluation]}}

    def length(self, example: Referenced[TokenizedRanking]) -> int:
        return sum(len(candidate.input_ids) for candidate in example.row.candidates)

    def collate(self, examples: Sequence[Referenced[TokenizedRanking]]) -> PreferenceBatch:
        ranked = collate_rankings([example.row for example in examples], self.pad_token_id, self.numbers)
        return PreferenceBatch(ranked, torch.tensor([value for example in examples for value in example.ref_logprobs]))

    def loss_count(self, batch: PreferenceBatch) -> float:
        better, _ = ranked_pairs(batch.ranked.groups, batch.ranked.ranks)
        return float(batch.ranked.groups[better].unique().numel())

    def loss_sum(self, batch: PreferenceBatch) -> torch.Tensor:
        given = self.candidates(batch)
        self.meter.add(*self.told(given))
        return self.algorithm.loss(given, self.config)

    def candidates(self, batch: PreferenceBatch) -> Candidates:
        """The batch with what the actor says of it."""
        ranked = batch.ranked
        reference = self.reference(ranked, batch.ref_logprobs)
        logprobs = response_log_likelihoods(self.engine, ranked)
        return Candidates(logprobs, reference, ranked.lengths, ranked.groups, ranked.ranks)

    @torch.no_grad()
    def told(self, given: Candidates) -> tuple[dict[str, torch.Tensor], float]:
        """Sums over prompts of what is logged, and their number: `accuracy` and `margin` of the pairs, log-probability
        by token of the better and the worse ones, and how far the better ones have moved from the reference."""
        better, worse = given.pairs
        margin = self.algorithm.margin(given, self.config)
        by_token = given.logprobs / given.tokens
        found = {
            "accuracy": accuracy_of(margin, torch.zeros_like(margin)),
            "margin": margin,
            "chosen_logprob": by_token[better],
            "rejected_logprob": by_token[worse],
        }
        if self.algorithm.needs_reference:
            found["chosen_shift"] = (by_token - given.ref_logprobs / given.tokens)[better]
        return {name: given.mean_over_pairs(values) for name, values in found.items()}, given.prompts

    def held_out(self) -> dict[str, float]:
        """Averaged over the held-out prompts that have a pair."""
        meter = MeanMeter()
        for batch, counted in self.evaluation_batches():
            given = self.candidates(batch.to(self.engine.device))
            if counted:
                given = given.rows(given.groups < counted)
            sums, prompts = self.told(given)
            sums = {"loss": self.algorithm.loss(given, self.config), **sums}
            share = float(counted > 0)  # every rank names the same figures, also of rows that only fill up
            meter.add({name: share * value for name, value in sums.items()}, share * prompts)
        return meter.means(self.engine.device)
