"""Checks of preference optimisation on responses that are there. See `training_checks`."""

from __future__ import annotations

from rlhf.doctor.findings import Finding, finding
from rlhf.doctor.history import History, bad_end, series
from rlhf.doctor.limits import CHOSEN_FALL, PREFERENCE_SATURATED, SATURATED_ACCURACY, START


def chosen_collapses(history: History) -> list[Finding]:
    """The held-out better responses become less likely, and not the worse ones alone."""
    points = series(history, "eval_chosen_logprob")
    if len(points) < 2:
        return []
    start = points[0][1]
    run = bad_end(points, lambda value: value < start - CHOSEN_FALL)
    if not run:
        return []
    fall = start - run[-1][1]
    message = f"{run[-1][1]:.3g} nats by token after {start:.3g} at the start"
    return [finding("chosen_collapses", "warning", run[0][0], run[-1][0], message, fall / CHOSEN_FALL)]


def margin_saturated(history: History) -> list[Finding]:
    """Every training pair right, with nothing left to learn from it."""
    losses, accuracies = series(history, "loss"), series(history, "accuracy")
    length = min(
        len(bad_end(losses, lambda value: value < PREFERENCE_SATURATED)),
        len(bad_end(accuracies, lambda value: value >= SATURATED_ACCURACY)),
    )
    if length < START:
        return []
    margin = series(history, "margin")[-1][1]
    message = f"accuracy {accuracies[-1][1]:.3f}, loss {losses[-1][1]:.2g}, mean margin {margin:.3g}"
    return [finding("margin_saturated", "warning", losses[-length][0], losses[-1][0], message)]
