"""Reward model: score responses so that preferred ones score higher (pairs, and rankings of K responses)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.algorithms.config import RewardConfig
from rlhf.algorithms.ranking_losses import ranked_pairs, ranking_loss
from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows, accuracy_of, candidate_columns, ranking_metrics
from rlhf.algorithms.shortcuts import common_openings
from rlhf.data.collate import collate_rankings
from rlhf.data.stage_data import StageData
from rlhf.distributed.collectives import all_gather_rows
from rlhf.numerics.statistics import score_last
from rlhf.training.offline import OfflineTrainer
from rlhf.types import RankedBatch, TokenizedRanking


class RewardTrainer(OfflineTrainer[RankedBatch]):
    """Trains a `ScalarModel` on rankings; all candidates of a prompt go through one forward."""

    def __init__(
        self,
        engine: Any,
        data: StageData,
        config: RewardConfig,
        *,
        pad_token_id: int,
        decode: Callable[[Sequence[int]], str] | None = None,
        **loop: Any,
    ) -> None:
        """`decode` makes text of token ids, for the openings of responses; without it they are not looked at."""
        super().__init__(engine, data, eval_every_steps=config.eval_every_steps, **loop)
        self.config = config
        self.pad_token_id = pad_token_id
        self.category_names = sorted({example.category for example in [*data.train, *data.evaluation]})
        sources = sorted({example.source for example in data.evaluation}) or [""]
        self.openings, openings = ([], []) if decode is None else common_openings(data.evaluation, decode)
        self.names = RowNames(self.category_names, sources, openings)

    def length(self, example: TokenizedRanking) -> int:
        return sum(len(candidate.input_ids) for candidate in example.candidates)

    def collate(self, examples: Sequence[TokenizedRanking]) -> RankedBatch:
        index = {name: number for number, name in enumerate(self.category_names)}
        return collate_rankings(examples, self.pad_token_id, index)

    def loss_count(self, batch: RankedBatch) -> float:
        better, _ = ranked_pairs(batch.groups, batch.ranks)
        return float(batch.groups[better].unique().numel())

    def loss_sum(self, batch: RankedBatch) -> torch.Tensor:
        scores = self.scores(batch)
        margins = batch.margins if self.config.use_margins else torch.zeros_like(scores)
        better, worse = ranked_pairs(batch.groups, batch.ranks)
        with torch.no_grad():
            correct = accuracy_of(scores[better], scores[worse])
            self.meter.add({"accuracy": correct.sum(), "margin": (scores[better] - scores[worse]).sum()}, len(better))
        return ranking_loss(scores, batch.groups, batch.ranks, margins, centering_coef=self.config.centering_coef)

    def scores(self, batch: RankedBatch) -> torch.Tensor:
        """Raw scores [N]: the scalar head's value at the last real token of each row."""
        values = self.engine(batch.input_ids, batch.attention_mask)
        return score_last(values, batch.attention_mask)

    def evaluate(self) -> dict[str, Any]:
        return ranking_metrics(self._score_all(self.evaluation, self.openings), self.names)

    def export(self) -> None:
        """Export the model with the normalisation of its scores as they are now."""
        self.engine.module.set_normalisation(*self.calibrate())
        super().export()

    def calibrate(self) -> tuple[float, float]:
        """Mean and standard deviation of the scores of the best responses of `calibration_rows` random prompts.

        InstructGPT normalises the reward model so that reference responses have mean score 0. The range of all their
        responses' scores, normalised alike, is noted in the model, which is saved with it.
        """
        self.engine.eval()
        with torch.no_grad():
            rows = self._score_all(self.calibration_examples())
        best = rows.scores[rows.ranks == 0]
        mean, std = float(best.mean()), max(float(best.std(unbiased=False)), 1e-6)
        self.engine.module.set_score_range((rows.scores - mean) / std)
        return mean, std

    def calibration_examples(self) -> list[TokenizedRanking]:
        """Random training prompts, the same on every rank (data sets may stand one after the other)."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.run.seed))
        return [self.train[index] for index in order[: self.config.calibration_rows].tolist()]

    def _score_all(self, examples: Sequence[TokenizedRanking], openings: Sequence[int] | None = None) -> ScoredRows:
        """Scores of all candidates over all ranks, in the order of `examples`, with what is known of each."""
        sizes = torch.tensor([len(example.candidates) for example in examples])
        starts = sizes.cumsum(0) - sizes
        parts = []
        for indices, counted in self.evaluation_parts(examples):
            batch = self.collate([examples[index] for index in indices])
            scores = self.scores(batch.to(self.engine.device)).double().cpu()
            numbers = torch.cat([torch.arange(int(sizes[index])) + starts[index] for index in indices])
            parts.append(torch.stack([scores, numbers.double()], dim=1)[batch.groups < counted])
        table = all_gather_rows(torch.cat(parts).to(self.engine.device)).cpu()
        table = table[table[:, 1].argsort()]
        numbers = table[:, 1].long()
        columns = candidate_columns(examples, self.names, openings or [-1] * int(sizes.sum()))
        return ScoredRows(scores=table[:, 0].float(), **{name: column[numbers] for name, column in columns.items()})
