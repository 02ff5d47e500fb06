"""Checks of every training, of a loss, and of a reward model.

A check is a pure function of a history. It returns a finding where the sickness is there at the end of the history;
where noise could raise it, several lines in a row must agree.
"""

from __future__ import annotations

import math

from rlhf.doctor.findings import Finding, finding
from rlhf.doctor.history import History, bad_end, lasting, mean_value, series
from rlhf.doctor.limits import (
    BLIND_SPREAD,
    LOSS_RISE,
    LOSS_RISE_FIRST,
    SATURATED_ACCURACY,
    SATURATED_MARGIN,
    START,
)


def not_finite(history: History) -> list[Finding]:
    """A metric of the newest line that is not finite."""
    if not history:
        return []
    last = history[-1]
    bad = [name for name, value in last.items() if not math.isfinite(value)]
    if not bad:
        return []
    step = int(last["step"])
    shown = ", ".join(f"{name} = {last[name]}" for name in bad[:4])
    return [finding("not_finite", "critical", step, step, shown, float(len(bad)))]


def learning_rate_zero(history: History) -> list[Finding]:
    """Two lines in a row: the schedule reaches 0 after the last step alone."""
    for name in ("learning_rate", "critic_learning_rate"):
        run = bad_end(series(history, name), lambda value: value == 0.0)
        if len(run) >= 2:
            return [finding("learning_rate_zero", "critical", run[0][0], run[-1][0], f"{name} is 0")]
    return []


def loss_diverges(history: History) -> list[Finding]:
    """Each of the last five lines against the first five, and against the start alone (held out where there is)."""
    points = series(history, "loss")
    if len(points) < 10:
        return []
    first, start, end = points[0][1], mean_value(points[:5]), mean_value(points[-5:])
    held_out = [value for step, value in series(history, "eval_loss") if step == 0]
    limit = min(LOSS_RISE * start, LOSS_RISE_FIRST * max([first, *held_out]))
    if not (first > 0 and min(value for _, value in points[-5:]) > limit):
        return []
    message = f"loss {end:.3g} over the last 5 lines, {start:.3g} over the first 5, {first:.3g} in the first"
    since = bad_end(points, lambda value: value > limit)
    return [finding("loss_diverges", "critical", since[0][0], points[-1][0], message, end / limit)]


def reward_model_saturated(history: History) -> list[Finding]:
    """Every training pair right by a huge margin."""
    accuracies, margins = series(history, "accuracy"), series(history, "margin")
    run = bad_end(margins, lambda value: value > SATURATED_MARGIN)
    all_right = bad_end(accuracies, lambda value: value >= SATURATED_ACCURACY)
    length = min(len(run), len(all_right))
    if length < START:
        return []
    message = f"accuracy {accuracies[-1][1]:.3f}, mean margin {margins[-1][1]:.3g} on the training pairs"
    badness = margins[-1][1] / SATURATED_MARGIN
    return [finding("reward_model_saturated", "warning", run[-length][0], margins[-1][0], message, badness)]


def reward_model_blind(history: History) -> list[Finding]:
    """Held-out scores after training, not of the model before it."""
    points = [point for point in series(history, "eval_score_std") if point[0] > 0]
    return lasting(
        "reward_model_blind", points, lambda value: value < BLIND_SPREAD, 1, "warning",
        lambda value: f"standard deviation of the held-out scores {value:.2g}", lambda value: 1.0,
    )  # fmt: skip
