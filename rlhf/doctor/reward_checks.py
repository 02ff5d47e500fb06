"""Checks of the rewards that a run's score is made of, and of the groups that are compared. See `training_checks`."""

from __future__ import annotations

from rlhf.doctor.findings import Finding, finding
from rlhf.doctor.history import History, bad_end, lasting, mean_value, series
from rlhf.doctor.limits import FALLBACK_MANY, FALLBACKS, GROUPS_ALIKE, PART_FALL, SCORE_GAIN, START

PART, SPREAD, FALLBACK = "score/", "score_std/", "fallback"


def reward_fails(history: History) -> list[Finding]:
    """Responses that a reward gave no score, by the share that got the fallback."""
    names = sorted({name for line in history for name in line if _is_fallback(name)})
    found: list[Finding] = []
    for name in names:
        points = series(history, name)
        reward = name.removeprefix(PART).removesuffix(FALLBACK).strip("/") or "the reward"
        many = points[-1][1] >= FALLBACK_MANY
        found += lasting(
            "reward_fails", points, lambda value: value > FALLBACKS, 1, "critical" if many else "warning",
            lambda value, reward=reward: f"{reward} gave no score for {value:.0%} of the responses",  # type: ignore[misc]
            lambda value: value / FALLBACKS,
        )  # fmt: skip
    return found[:1]


def reward_part_falls(history: History) -> list[Finding]:
    """A reward that falls while their sum rises, each in standard deviations of its first rollouts."""
    names = sorted({name.removeprefix(SPREAD) for line in history for name in line if name.startswith(SPREAD)})
    if _change(series(history, "score"), series(history, "score_std")) < SCORE_GAIN:
        return []
    fallen = []
    for name in names:
        points, spreads = series(history, PART + name), series(history, SPREAD + name)
        change = _change(points, spreads)
        if change <= -PART_FALL:
            limit = mean_value(points[:START]) - PART_FALL * mean_value(spreads[:START])
            run = bad_end(points, lambda value, limit=limit: value < limit) or points[-1:]  # type: ignore[misc]
            fallen.append((change, name, run[0][0], points[-1][0]))
    if not fallen:
        return []
    change, name, since, step = min(fallen)
    gain = _change(series(history, "score"), series(history, "score_std"))
    message = f"{name} {change:+.2g} standard deviations, the score {gain:+.2g}"
    return [finding("reward_part_falls", "warning", since, step, message, -change / PART_FALL)]


def groups_alike(history: History) -> list[Finding]:
    """Prompts whose responses all have the same score."""
    return lasting(
        "groups_alike", series(history, "equal_groups"), lambda value: value > GROUPS_ALIKE, START, "warning",
        lambda value: f"at {value:.0%} of the prompts all responses have the same score",
        lambda value: value / GROUPS_ALIKE,
    )  # fmt: skip


def _is_fallback(name: str) -> bool:
    return name.startswith(PART) and name.split("/")[-1] == FALLBACK


def _change(points: list[tuple[int, float]], spreads: list[tuple[int, float]]) -> float:
    """From the first lines to the last, in standard deviations of the first; 0 where that cannot be said."""
    if min(len(points), len(spreads)) < 2 * START or mean_value(spreads[:START]) <= 0:
        return 0.0
    return (mean_value(points[-START:]) - mean_value(points[:START])) / mean_value(spreads[:START])
