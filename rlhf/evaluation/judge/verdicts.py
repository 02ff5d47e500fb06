"""What a judge's scores and verdicts come to: means with intervals, win rates, position bias, length taken out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from rlhf.evaluation.judge.client import JudgeClient
from rlhf.evaluation.judge.criteria import FIRST, SECOND, Criterion, comparing_question, percent, scoring_question
from rlhf.numerics.intervals import bootstrap_interval


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer to it."""

    prompt: str
    answer: str
    category: str = ""


@dataclass(frozen=True)
class Compared:
    """A prompt with the answers of two models, the one in question and the one it is held against."""

    prompt: str
    answer: str
    baseline: str
    category: str = ""


def score_answers(client: JudgeClient, rows: Sequence[Answered], criteria: Sequence[Criterion]) -> dict[str, Any]:
    """Every answer scored alone.

    "score": mean of all criteria between 0 and 100, with its 95% interval "low", "high" over answers, None where none
    could be read; "by_criterion" and "by_category" means; "answers", "unreadable"; "rows": the scores of each, None
    where they could not be read.
    """
    found = client.ask(scoring_question(row.prompt, row.answer, criteria) for row in rows)
    read = [(row, percent(scores, criteria)) for row, scores in zip(rows, found, strict=True) if scores is not None]
    means = [fmean(scores.values()) for _, scores in read]
    categories = dict.fromkeys(row.category for row, _ in read)
    return {
        **_mean(means, "score"),
        "by_criterion": {each.name: fmean(scores[each.name] for _, scores in read) for each in criteria if read},
        "by_category": {
            name: fmean(mean for (row, _), mean in zip(read, means, strict=True) if row.category == name)
            for name in categories
            if len(categories) > 1
        },
        "answers": len(rows),
        "unreadable": len(rows) - len(read),
        "rows": found,
    }


def win_rate(client: JudgeClient, rows: Sequence[Compared]) -> dict[str, Any]:
    """Every pair judged in both orders.

    A pair is worth the mean of the two: 1 where the answer wins both, 0.5 for ties and for verdicts that change with
    the order. "win_rate" with its interval over pairs, "by_category", "wins", "losses", "ties" (both orders agree),
    "order_decides": the share of pairs whose winner changes with the order; "first_chosen": how often the first
    answer is chosen where one is (0.5: no position bias). "length_controlled": see `length_controlled`. "rows": the
    worth of each, None where a verdict could not be read in one of the orders.
    """
    questions = [
        question
        for row in rows
        for question in (
            comparing_question(row.prompt, row.answer, row.baseline),
            comparing_question(row.prompt, row.baseline, row.answer),
        )
    ]
    verdicts = client.ask(questions)
    orders = list(zip(verdicts[::2], verdicts[1::2], strict=True))
    read = [(row, order) for row, order in zip(rows, orders, strict=True) if None not in order]
    worth = [(_worth(first, FIRST, SECOND) + _worth(second, SECOND, FIRST)) / 2 for _, (first, second) in read]
    decided = [verdict for _, order in read for verdict in order if verdict in (FIRST, SECOND)]
    changed = [first == second and first in (FIRST, SECOND) for _, (first, second) in read]
    categories = dict.fromkeys(row.category for row, _ in read)
    lengths = [len(row.answer) - len(row.baseline) for row, _ in read]
    values = iter(worth)
    return {
        **_mean(worth, "win_rate"),
        "length_controlled": length_controlled(worth, lengths),
        "wins": sum(value == 1 for value in worth),
        "losses": sum(value == 0 for value in worth),
        "ties": sum(value not in (0, 1) for value in worth),
        "order_decides": fmean(map(float, changed)) if read else None,
        "first_chosen": fmean(float(verdict == FIRST) for verdict in decided) if decided else None,
        "by_category": {
            name: fmean(value for (row, _), value in zip(read, worth, strict=True) if row.category == name)
            for name in categories
            if len(categories) > 1
        },
        "longer": fmean(float(each > 0) + 0.5 * float(each == 0) for each in lengths) if read else None,
        "pairs": len(rows),
        "unreadable": len(rows) - len(read),
        "rows": [None if None in order else next(values) for order in orders],
    }


def length_controlled(worth: Sequence[float], differences: Sequence[float]) -> float | None:
    """The win rate that is left where both answers are of one length (Dubois et al., arXiv 2404.04475).

    The logistic regression of AlpacaEval 2 for a single pair of models: a constant for the model and a coefficient of
    tanh(length difference in its standard deviations), without the term for each instruction's difficulty, which one
    comparison cannot tell. A worth between 0 and 1 counts as that share of a win. None without a win or without a loss.
    ConfigError without scikit-learn.
    """
    wins, losses = sum(worth), len(worth) - sum(worth)
    if not wins or not losses:
        return None
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        from rlhf.config import ConfigError

        raise ConfigError("a length-controlled win rate needs scikit-learn: pip install 'rlhf[eval]'") from error
    spread = float(torch.tensor(differences, dtype=torch.float64).std(unbiased=False))
    features = [[math.tanh(each / spread) if spread else 0.0] for each in differences]
    weighted = [(row, label, weight) for row, value in zip(features, worth, strict=True)
                for label, weight in ((1, value), (0, 1 - value)) if weight > 0]  # fmt: skip
    rows, labels, weights = zip(*weighted, strict=True)
    fitted = LogisticRegression(C=1e4, max_iter=1000).fit(rows, labels, sample_weight=weights)
    return 1 / (1 + math.exp(-float(fitted.intercept_[0])))


def _worth(verdict: str, own: str, other: str) -> float:
    return 1.0 if verdict == own else 0.0 if verdict == other else 0.5


def _mean(values: Sequence[float], name: str) -> dict[str, Any]:
    if not values:
        return {name: None, "low": None, "high": None}
    low, high = bootstrap_interval(torch.tensor(values, dtype=torch.float64), torch.arange(len(values)))
    return {name: fmean(values), "low": low, "high": high}
