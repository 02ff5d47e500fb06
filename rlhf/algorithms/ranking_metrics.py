"""How good a reward model is on held-out pairs and rankings, and how far that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.algorithms.ranking_losses import ranked_pairs, ranking_loss
from rlhf.algorithms.shortcuts import ScoredPairs, audit, by_group
from rlhf.config import ConfigError
from rlhf.numerics.intervals import effective_number, paired_interval, wilson_interval
from rlhf.types import TokenizedRanking


@dataclass(frozen=True)
class ScoredRows:
    """Scores [N] of candidates with the group (ranking), prompt, rank, response tokens, category, source and opening of
    each row; the last three are numbers of `RowNames`, an opening that has no name is -1.

    Several rankings may be of one prompt: their pairs are right or wrong together, and count as one in an interval.
    """

    scores: torch.Tensor
    groups: torch.Tensor
    prompts: torch.Tensor
    ranks: torch.Tensor
    lengths: torch.Tensor
    categories: torch.Tensor
    sources: torch.Tensor
    openings: torch.Tensor


@dataclass(frozen=True)
class RowNames:
    """What the numbers of `ScoredRows` stand for."""

    categories: Sequence[str]
    sources: Sequence[str] = ("",)
    openings: Sequence[str] = ()


def accuracy_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Per pair 1 where `first` is larger, 0.5 where they are equal, else 0: [pairs] float."""
    return (first > second).float() + 0.5 * (first == second).float()


def candidate_columns(
    examples: Sequence[TokenizedRanking], names: RowNames, openings: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The columns of `ScoredRows` but the scores, of all candidates of `examples` in order.

    `openings` numbers that of each candidate. A source that has no name is -1.
    """
    sizes = torch.tensor([len(example.candidates) for example in examples])
    category = {name: number for number, name in enumerate(names.categories)}
    source = {name: number for number, name in enumerate(names.sources)}

    def repeated(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values).repeat_interleave(sizes)

    return {
        "groups": repeated(range(len(examples))),
        "prompts": prompt_numbers(examples).repeat_interleave(sizes),
        "ranks": torch.tensor([rank for example in examples for rank in example.ranks]),
        "lengths": torch.tensor([row.response_tokens for example in examples for row in example.candidates]),
        "categories": repeated([category[example.category] for example in examples]),
        "sources": repeated([source.get(example.source, -1) for example in examples]),
        "openings": torch.tensor(openings),
    }


def ranking_metrics(
    rows: ScoredRows, names: RowNames, weigh: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> dict[str, Any]:
    """Pair accuracy (see `accuracy_of`), margin, loss, what choosing by length alone gives, and all per category.

    `eval_rows` counts prompts with a pair, `eval_pairs` their pairs. `weigh` makes of length differences [pairs] the
    weights of pairs in the loss, and in nothing else. `shortcuts` is what the score follows beside
    quality, see `rlhf.algorithms.shortcuts.audit`.
    """
    better, worse = ranked_pairs(rows.groups, rows.ranks)
    if better.numel() == 0:
        raise ConfigError("the held-out rankings are ties only: no pair to measure accuracy on; hold out more")
    margin = rows.scores[better] - rows.scores[worse]
    correct = accuracy_of(rows.scores[better], rows.scores[worse])
    by_length = accuracy_of(rows.lengths[better], rows.lengths[worse])
    zero = torch.zeros_like(rows.scores)
    weights = None if weigh is None else weigh(rows.lengths[better] - rows.lengths[worse])
    rankings = rows.groups[better].unique().numel()
    by_category = _pairs_by_group(rows, rows.categories, names.categories)
    result: dict[str, Any] = {
        "eval_loss": float(ranking_loss(rows.scores, rows.groups, rows.ranks, zero, weights=weights)) / rankings,
        "eval_accuracy": float(correct.mean()),
        **{f"eval_{name}": value for name, value in certainty(correct, by_length, rows.prompts[better]).items()},
        "eval_pairs": float(len(better)),
        "eval_margin": float(margin.mean()),
        "eval_length_baseline_accuracy": float(by_length.mean()),
        "eval_score_mean": float(rows.scores.mean()),
        "eval_score_std": float(rows.scores.std(unbiased=False)),
        **{f"eval_accuracy/{name}": entry["accuracy"] for name, entry in by_category.items()},
    }
    shortcuts = _shortcuts(rows, names, correct, by_category)
    within, matched = shortcuts["length"]["correlation_within"], shortcuts["length"]["matched"]
    result["eval_score_length_correlation"] = within["value"]
    if matched["accuracy"] is not None:
        result["eval_accuracy_like_length"] = matched["accuracy"]
    calibrated = calibration(margin, correct)
    result["eval_calibration_error"] = calibrated["error"]
    histograms = histogram(rows.scores[better], rows.scores[worse])
    return {
        **result,
        "by_category": by_category,
        "histogram": histograms,
        "calibration": calibrated,
        "shortcuts": shortcuts,
    }


CALIBRATION_BINS = 10
"""Equal widths of confidence between 0.5 and 1."""


def calibration(margin: torch.Tensor, correct: torch.Tensor) -> dict[str, Any]:
    """How often the model is right when it is so sure: confidence is the probability that Bradley-Terry gives the
    response it prefers, sigmoid(|margin|), over pairs [pairs]; `correct` as `accuracy_of`.

    "bins" that hold a pair: {"confidence", "accuracy", "pairs"}, means. "error": the expected calibration error (Guo
    et al., arXiv 1706.04599, eq. 3), the mean distance of the two over pairs.
    """
    confidence = torch.sigmoid(margin.double().abs())
    number = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    bins = []
    for each in number.unique().tolist():
        member = number == each
        bins.append(
            {
                "confidence": float(confidence[member].mean()),
                "accuracy": float(correct[member].double().mean()),
                "pairs": int(member.sum()),
            }
        )
    error = sum(each["pairs"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / max(1, len(margin))
    return {"bins": bins, "error": error}


def _pairs_by_group(rows: ScoredRows, groups: torch.Tensor, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Accuracy with its certainty, margin and scores of the pairs of each group; `groups` [N] numbers of `names`."""
    better, worse = ranked_pairs(rows.groups, rows.ranks)
    correct = accuracy_of(rows.scores[better], rows.scores[worse])
    by_length = accuracy_of(rows.lengths[better], rows.lengths[worse])
    found: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(names):
        member = groups[better] == index
        if member.any():
            chosen, rejected = rows.scores[better][member], rows.scores[worse][member]
            found[name or "all"] = {
                "accuracy": float(correct[member].mean()),
                **certainty(correct[member], by_length[member], rows.prompts[better][member]),
                "length_baseline_accuracy": float(by_length[member].mean()),
                "margin": float((chosen - rejected).mean()),
                "pairs": int(member.sum()),
                "histogram": histogram(chosen, rejected),
            }
    return found


def _shortcuts(
    rows: ScoredRows, names: RowNames, correct: torch.Tensor, by_category: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The audit of `rows`, whose pairs are right as `correct` [pairs] says."""
    pairs = ScoredPairs(rows.scores, rows.prompts, *ranked_pairs(rows.groups, rows.ranks), correct)
    groups = {"category": by_group(pairs, rows.categories, names.categories, by_category)}
    by_source = _pairs_by_group(rows, rows.sources, names.sources)
    groups["source"] = by_group(pairs, rows.sources, names.sources, by_source)
    return audit(pairs, rows.lengths, rows.openings, names.openings, groups)


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
