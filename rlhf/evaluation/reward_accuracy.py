"""What a reward model's scores of held-out pairs and rankings are worth, beyond what its training tells of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.algorithms.ranking_losses import ranked_pairs
from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows, accuracy_of, ranking_metrics
from rlhf.numerics.intervals import bootstrap_interval
from rlhf.numerics.statistics import correlation

BUCKETS = 4
"""Of pairs by their length, as many pairs in each."""


def _distinct_words(text: str) -> float:
    words = text.split()
    return len(set(words)) / len(words) if words else 0.0


BASELINES: dict[str, Callable[[str], float]] = {
    "longer": lambda text: float(len(text)),
    "more lines": lambda text: float(len([line for line in text.splitlines() if line.strip()])),
    "more varied words": _distinct_words,
    "ends with a full stop": lambda text: float(text.rstrip().endswith((".", "!", "?", "。"))),
    "more question marks": lambda text: float(text.count("?")),
}
"""What chooses a response by its outside alone: the higher number is chosen, equal ones count half. Each also stands
for its opposite."""


def reward_metrics(rows: ScoredRows, names: RowNames, texts: Sequence[str]) -> dict[str, Any]:
    """`ranking_metrics`, and beside it

    "bootstrap": (low, high) of the accuracy over prompts; "by_length": accuracy of pairs by their mean tokens, with
    the same interval; "baselines": the accuracy of each of `BASELINES` on the same pairs, 1 less it where that is more
    (then "reversed"). `texts` [N] are the responses.
    """
    better, worse = ranked_pairs(rows.groups, rows.ranks)
    found = ranking_metrics(rows, names)
    correct, prompts = accuracy_of(rows.scores[better], rows.scores[worse]), rows.prompts[better]
    return {
        **found,
        "bootstrap": bootstrap_interval(correct, prompts),
        "by_length": _by_length((rows.lengths[better] + rows.lengths[worse]) / 2, correct, prompts),
        "baselines": baselines(better, worse, texts),
    }


def _by_length(lengths: torch.Tensor, correct: torch.Tensor, prompts: torch.Tensor) -> list[dict[str, Any]]:
    order = lengths.argsort(stable=True)
    found = []
    for part in order.tensor_split(min(BUCKETS, len(order))):
        low, high = bootstrap_interval(correct[part], prompts[part])
        found.append(
            {
                "shortest": float(lengths[part].min()),
                "longest": float(lengths[part].max()),
                "accuracy": float(correct[part].mean()),
                "low": low,
                "high": high,
                "pairs": len(part),
            }
        )
    return found


def baselines(better: torch.Tensor, worse: torch.Tensor, texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The accuracy of each of `BASELINES` on the pairs of rows [pairs], the best one first."""
    found = {}
    for name, measure in BASELINES.items():
        values = torch.tensor([measure(text) for text in texts], dtype=torch.float64)
        accuracy = float(accuracy_of(values[better], values[worse]).mean())
        found[name] = {"accuracy": max(accuracy, 1 - accuracy), "reversed": accuracy < 0.5}
    return dict(sorted(found.items(), key=lambda item: -item[1]["accuracy"]))


def agreement(first: ScoredRows, second: ScoredRows) -> dict[str, float]:
    """How two models judge the same pairs: the share that they order alike (a tie of one counts half), what chance
    would give by how often each is right (Cohen 1960), and the correlation of their margins."""
    better, worse = ranked_pairs(first.groups, first.ranks)
    margins = [rows.scores[better] - rows.scores[worse] for rows in (first, second)]
    signs = [margin.sign() for margin in margins]
    alike = float((1 - (signs[0] - signs[1]).abs() / 2).mean())
    shares = [float((sign == 1).float().mean() + 0.5 * (sign == 0).float().mean()) for sign in signs]
    chance = shares[0] * shares[1] + (1 - shares[0]) * (1 - shares[1])
    kappa = (alike - chance) / (1 - chance) if chance < 1 else 1.0
    return {
        "agreement": alike,
        "kappa": kappa,
        "margin_correlation": correlation(margins[0], margins[1]),
        "pairs": float(len(better)),
    }
