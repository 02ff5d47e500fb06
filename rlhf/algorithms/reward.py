"""Reward model: score responses so that preferred ones score higher (pairs, and rankings of K responses)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from rlhf.algorithms.config import RewardConfig
from rlhf.config import ConfigError
from rlhf.data.collate import collate_rankings
from rlhf.data.stage_data import StageData
from rlhf.distributed.collectives import all_gather_rows
from rlhf.numerics.intervals import effective_number, paired_interval, wilson_interval
from rlhf.numerics.statistics import score_last
from rlhf.training.offline import OfflineTrainer
from rlhf.types import RankedBatch, TokenizedRanking


def ranked_pairs(groups: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (better, worse) of every pair of one prompt whose ranks differ: two index tensors [pairs].

    `groups`, `ranks` [N]. Ties make no pair.
    """
    same_prompt = groups.unsqueeze(1) == groups.unsqueeze(0)
    better = ranks.unsqueeze(1) < ranks.unsqueeze(0)
    first, second = (same_prompt & better).nonzero(as_tuple=True)
    return first, second


def ranking_loss(
    scores: torch.Tensor,
    groups: torch.Tensor,
    ranks: torch.Tensor,
    margins: torch.Tensor,
    *,
    centering_coef: float = 0.0,
) -> torch.Tensor:
    """Bradley-Terry loss of rankings, summed over prompts; every prompt weighs the same.

    Per prompt the mean over its pairs (i better than j) of -log sigmoid(s_i - s_j - margin): InstructGPT
    (arXiv 2203.02155) eq. 1 with 1 / C(K, 2), ties left out; the margin as in Llama 2 (arXiv 2307.09288) eq. 2.
    `centering_coef` adds the mean of (s_i + s_j)^2, which keeps scores near 0 (Eisenstein et al., arXiv 2312.09244).
    `scores`, `groups`, `ranks`, `margins` [N]; 0 when no pair differs in rank.
    """
    better, worse = ranked_pairs(groups, ranks)
    if better.numel() == 0:
        return scores.sum() * 0.0
    loss = -F.logsigmoid(scores[better] - scores[worse] - margins[better])
    if centering_coef:
        loss = loss + centering_coef * (scores[better] + scores[worse]) ** 2
    pairs_per_prompt = torch.bincount(groups[better], minlength=int(groups.max()) + 1)
    return (loss / pairs_per_prompt[groups[better]]).sum()


@dataclass(frozen=True)
class ScoredRows:
    """Scores [N] of candidates with the group (ranking), prompt, rank, token length and category of each row.

    Several rankings may be of one prompt: their pairs are right or wrong together, and count as one in an interval.
    """

    scores: torch.Tensor
    groups: torch.Tensor
    prompts: torch.Tensor
    ranks: torch.Tensor
    lengths: torch.Tensor
    categories: torch.Tensor


def accuracy_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Per pair 1 where `first` is larger, 0.5 where they are equal, else 0: [pairs] float."""
    return (first > second).float() + 0.5 * (first == second).float()


def ranking_metrics(rows: ScoredRows, category_names: Sequence[str]) -> dict[str, Any]:
    """Pair accuracy (see `accuracy_of`), margin, loss, what choosing by length alone gives, and all per category.

    `eval_rows` counts prompts with a pair, `eval_pairs` their pairs.
    """
    better, worse = ranked_pairs(rows.groups, rows.ranks)
    if better.numel() == 0:
        raise ConfigError("the held-out rankings are ties only: no pair to measure accuracy on; hold out more")
    margin = rows.scores[better] - rows.scores[worse]
    correct = accuracy_of(rows.scores[better], rows.scores[worse])
    by_length = accuracy_of(rows.lengths[better], rows.lengths[worse])
    prompts = rows.prompts[better]
    zero = torch.zeros_like(rows.scores)
    rankings = rows.groups[better].unique().numel()
    result: dict[str, Any] = {
        "eval_loss": float(ranking_loss(rows.scores, rows.groups, rows.ranks, zero)) / rankings,
        "eval_accuracy": float(correct.mean()),
        **{f"eval_{name}": value for name, value in certainty(correct, by_length, prompts).items()},
        "eval_pairs": float(len(better)),
        "eval_margin": float(margin.mean()),
        "eval_length_baseline_accuracy": float(by_length.mean()),
        "eval_score_mean": float(rows.scores.mean()),
        "eval_score_std": float(rows.scores.std(unbiased=False)),
    }
    per_category: dict[str, dict[str, Any]] = defaultdict(dict)
    for index, name in enumerate(category_names):
        member = rows.categories[better] == index
        if member.any():
            per_category[name or "all"] = {
                "accuracy": float(correct[member].mean()),
                **certainty(correct[member], by_length[member], prompts[member]),
                "length_baseline_accuracy": float(by_length[member].mean()),
                "margin": float(margin[member].mean()),
                "pairs": int(member.sum()),
                "histogram": histogram(rows.scores[better][member], rows.scores[worse][member]),
            }
            result[f"eval_accuracy/{name or 'all'}"] = float(correct[member].mean())
    result["by_category"] = dict(per_category)
    result["histogram"] = histogram(rows.scores[better], rows.scores[worse])
    return result


def certainty(correct: torch.Tensor, by_length: torch.Tensor, prompts: torch.Tensor) -> dict[str, float]:
    """How far an accuracy is known, and how far above a shortcut it lies: 95% intervals over prompts.

    `correct`, `by_length` [pairs] are what the model and choosing the longer response get (0, 0.5 or 1), `prompts`
    [pairs] the prompt of each. The shortcut is the better of choosing the longer and choosing the shorter response: a
    baseline of 0.3 is as good as one of 0.7. `over_shortcut` is the mean difference on the same pairs, which is known
    better than either accuracy. `effective_rows`: prompts of one pair each that would tell as much. See
    `wilson_interval` and `paired_interval`.
    """
    _, prompt, pairs = prompts.unique(return_inverse=True, return_counts=True)
    shortcut = by_length if by_length.mean() >= 0.5 else 1 - by_length
    difference = correct - shortcut
    of_prompt = torch.zeros(len(pairs)).index_add(0, prompt, difference) / pairs
    effective = effective_number(pairs)
    low, high = wilson_interval(float(correct.mean()), effective)
    over_low, over_high = paired_interval(of_prompt, pairs)
    return {
        "accuracy_low": low,
        "accuracy_high": high,
        "rows": float(len(pairs)),
        "effective_rows": effective,
        "shortcut_accuracy": float(shortcut.mean()),
        "over_shortcut": float(difference.mean()),
        "over_shortcut_low": over_low,
        "over_shortcut_high": over_high,
    }


def prompt_numbers(examples: Sequence[TokenizedRanking]) -> torch.Tensor:
    """The prompt of each ranking, as a number that rankings of the same prompt share [len(examples)]."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [tuple(first.input_ids[: first.prompt_tokens]) for first in (each.candidates[0] for each in examples)]
    return torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])


def histogram(chosen: torch.Tensor, rejected: torch.Tensor, bins: int = 20) -> dict[str, list[float]]:
    """Counts of chosen and rejected scores over common bin edges."""
    low = float(torch.minimum(chosen.min(), rejected.min()))
    high = max(float(torch.maximum(chosen.max(), rejected.max())), low + 1e-6)
    return {
        "edges": torch.linspace(low, high, bins + 1).tolist(),
        "chosen": torch.histc(chosen.float(), bins, low, high).tolist(),
        "rejected": torch.histc(rejected.float(), bins, low, high).tolist(),
    }


class RewardTrainer(OfflineTrainer[RankedBatch]):
    """Trains a `ScalarModel` on rankings; all candidates of a prompt go through one forward."""

    def __init__(self, engine: Any, data: StageData, config: RewardConfig, *, pad_token_id: int, **loop: Any) -> None:
        super().__init__(engine, data, eval_every_steps=config.eval_every_steps, **loop)
        self.config = config
        self.pad_token_id = pad_token_id
        self.category_names = sorted({example.category for example in [*data.train, *data.evaluation]})

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
        return ranking_metrics(self._score_all(self.evaluation), self.category_names)

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

    def _score_all(self, examples: Sequence[TokenizedRanking]) -> ScoredRows:
        parts = []
        for indices, counted in self.evaluation_parts(examples):
            batch = self.collate([examples[index] for index in indices])
            rows = batch.groups < counted
            moved = batch.to(self.engine.device)
            scores = self.scores(moved).float().cpu()
            groups = torch.tensor(indices)[batch.groups]
            columns = [scores, groups, batch.ranks, batch.attention_mask.sum(-1), batch.categories]
            parts.append(torch.stack([column.double() for column in columns], dim=1)[rows])
        table = all_gather_rows(torch.cat(parts).to(self.engine.device)).cpu()
        groups = table[:, 1].long()
        return ScoredRows(
            scores=table[:, 0].float(),
            groups=groups,
            prompts=prompt_numbers(examples)[groups],
            ranks=table[:, 2].long(),
            lengths=table[:, 3],
            categories=table[:, 4].long(),
        )
