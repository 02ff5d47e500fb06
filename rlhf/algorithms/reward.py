"""Reward model: score responses so that preferred ones score higher (pairs, and rankings of K responses)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf.algorithms.config import RewardConfig
from rlhf.algorithms.odin import LengthPull, orthogonality_loss
from rlhf.algorithms.ranking_losses import LengthBalance, ranked_pairs, ranking_loss
from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows, accuracy_of, candidate_columns, ranking_metrics
from rlhf.algorithms.shortcuts import common_openings
from rlhf.data.collate import collate_rankings
from rlhf.data.stage_data import StageData
from rlhf.distributed.collectives import all_gather_rows, all_reduce_sum
from rlhf.distributed.log import logger
from rlhf.numerics.local_regression import Curve, within_groups
from rlhf.numerics.statistics import score_last
from rlhf.training.offline import OfflineTrainer
from rlhf.types import RankedBatch, TokenizedRanking


def less(rows: ScoredRows, curve: Curve | None) -> ScoredRows:
    """`rows` with r - E[r | length] for r (Huang et al., arXiv 2409.17407); unchanged without a curve."""
    return rows if curve is None else replace(rows, scores=rows.scores - curve.at(rows.lengths))


def length_balance(rankings: Sequence[TokenizedRanking]) -> LengthBalance:
    """The weights of all pairs of `rankings`. Raises ConfigError where there are none that balance."""
    differences, shares = [], []
    for example in rankings:
        ranks, lengths = example.ranks, [row.response_tokens for row in example.candidates]
        pairs = [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]]
        differences += [lengths[i] - lengths[j] for i, j in pairs]
        shares += [1 / len(pairs)] * len(pairs)
    return LengthBalance.of(torch.tensor(differences), torch.tensor(shares, dtype=torch.float64))


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
        added: Sequence[TokenizedRanking] = (),
        balance: LengthBalance | None = None,
        **loop: Any,
    ) -> None:
        """`decode` makes text of token ids, for the openings of responses; without it they are not looked at. `added`
        are training rows that nothing is calibrated on (`cross_prompt_pairs`). `length_control: odin` needs an engine
        around an `OdinModel`, `balance` the weights (`length_balance`)."""
        if (balance is None) == (config.length_control == "balance"):
            raise ValueError(f"length_control={config.length_control} with balance={balance}")
        everything = replace(data, train=[*data.train, *added])
        super().__init__(engine, everything, eval_every_steps=config.eval_every_steps, **loop)
        self.config = config
        self.own_rows = data.train
        self.balance = balance
        for line in [] if balance is None else balance.lines():
            logger.info("%s: %s", self.stage, line)
        self.pulls: dict[int, tuple[LengthPull, float]] = {}
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
        if self.config.length_control == "odin":
            quality, length, heads = self.heads(batch)
            return self._ranking_loss(batch, quality + length) + self._odin_loss(batch, quality, length, heads)
        return self._ranking_loss(batch, self.scores(batch))

    def _ranking_loss(self, batch: RankedBatch, scores: torch.Tensor) -> torch.Tensor:
        margins = batch.margins if self.config.use_margins else torch.zeros_like(scores)
        better, worse = ranked_pairs(batch.groups, batch.ranks)
        with torch.no_grad():
            correct = accuracy_of(scores[better], scores[worse])
            self.meter.add({"accuracy": correct.sum(), "margin": (scores[better] - scores[worse]).sum()}, len(better))
        weights = None if self.balance is None else self.balance.weights(batch.lengths[better] - batch.lengths[worse])
        return ranking_loss(
            scores, batch.groups, batch.ranks, margins, centering_coef=self.config.centering_coef, weights=weights
        )

    def scores(self, batch: RankedBatch) -> torch.Tensor:
        """Raw scores [N]: the scalar head's value at the last real token of each row, with ODIN that for quality."""
        if self.config.length_control == "odin":
            return self.heads(batch)[0]
        values = self.engine(batch.input_ids, batch.attention_mask)
        return score_last(values, batch.attention_mask)

    # ---------------------------------------------------------------------------------------- length control

    def heads(self, batch: RankedBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ODIN's heads say of quality and of length [N], and their rows [2, H] scaled to length 1."""
        quality, length, rows = self.engine(batch.input_ids, batch.attention_mask)
        return score_last(quality, batch.attention_mask), score_last(length, batch.attention_mask), rows

    def before_step(self, batches: Sequence[RankedBatch]) -> None:
        """With ODIN: the correlations with length are those of the global batch, which is scored once for them.

        Random numbers are put back, so that the pass which learns has the same dropout.
        """
        if self.config.length_control != "odin":
            return
        devices = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            said = [torch.stack(self.heads(batch)[:2]) for batch in batches]
        quality, length = torch.cat(said, dim=1)
        pull = LengthPull.of(quality, length, torch.cat([batch.lengths for batch in batches]))
        mine = torch.tensor(sum(self.loss_count(batch) for batch in batches), device=self.device)
        total = float(all_reduce_sum(mine))
        parts = pull.split([len(batch) for batch in batches])
        self.pulls = {id(batch): (part, total) for batch, part in zip(batches, parts, strict=True)}
        names = ("quality_length_correlation", "length_head_correlation")
        self.meter.add(dict(zip(names, pull.correlations, strict=True)), 1)

    def _odin_loss(
        self, batch: RankedBatch, quality: torch.Tensor, length: torch.Tensor, heads: torch.Tensor
    ) -> torch.Tensor:
        """The micro-batch's part of the two losses beside the ranking loss, times the count that it is divided by.

        1 is added to the length loss, which is at least -1: what is logged is never negative, and the doctor can tell
        that it rises.
        """
        pull, total = self.pulls[id(batch)]
        count = self.loss_count(batch)
        of_length = count * (1 + pull.value) + total * pull.surrogate(quality, length)
        of_heads = count * orthogonality_loss(heads)
        loss = self.config.odin_length_coef * of_length + self.config.odin_orthogonality_coef * of_heads
        return loss.to(quality.dtype)

    def _length_curve(self, rows: ScoredRows) -> Curve | None:
        """How the score of `rows` follows length among responses to one prompt; None where that is to stay."""
        if self.config.length_control != "calibrate":
            return None
        return within_groups(rows.lengths, rows.scores, rows.prompts, span=self.config.length_curve_span)

    # --------------------------------------------------------------------------------- evaluation and export

    def evaluate(self) -> dict[str, Any]:
        rows = self._score_all(self.evaluation, self.openings)
        if self.config.length_control == "calibrate":
            rows = less(rows, self._length_curve(self._score_all(self.calibration_examples())))
        return ranking_metrics(rows, self.names, None if self.balance is None else self.balance.weights)

    def export(self) -> None:
        """Export the model with the normalisation of its scores as they are now."""
        self.engine.module.set_normalisation(*self.calibrate())
        super().export()

    def calibrate(self) -> tuple[float, float]:
        """Mean and standard deviation of the scores of the best responses of `calibration_rows` random prompts.

        InstructGPT normalises the reward model so that reference responses have mean score 0. The range of all their
        responses' scores, normalised alike, is noted in the model, which is saved with it; so is the length curve
        where there is one, which is taken off first.
        """
        self.engine.eval()
        with torch.no_grad():
            raw = self._score_all(self.calibration_examples())
        curve = self._length_curve(raw)
        rows = less(raw, curve)
        best = rows.scores[rows.ranks == 0]
        mean, std = float(best.mean()), max(float(best.std(unbiased=False)), 1e-6)
        self.engine.module.set_score_range((rows.scores - mean) / std)
        self.engine.module.length_curve = None if curve is None else curve.divided(std)
        return mean, std

    def calibration_examples(self) -> list[TokenizedRanking]:
        """Random training prompts, the same on every rank (data sets may stand one after the other)."""
        order = torch.randperm(len(self.own_rows), generator=torch.Generator().manual_seed(self.run.seed))
        return [self.own_rows[index] for index in order[: self.config.calibration_rows].tolist()]

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
