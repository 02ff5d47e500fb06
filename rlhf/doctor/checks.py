"""The checks: pure functions of a run's metrics. Each looks at the first and the last lines only (`condensed`).

A history is a list of dicts, one for each line of `metrics.jsonl`, with "step" and numbers. A check returns a finding
where the sickness is there at the end of the history. Where noise could raise it, several lines in a row must agree.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from rlhf.doctor.findings import Finding, Severity, finding
from rlhf.doctor.limits import (
    ADVANTAGES_EQUAL,
    BLIND_SPREAD,
    CLIP_FRACTION,
    CORRELATION,
    EMPTY,
    ENTROPY_LEFT,
    EOS_LEFT,
    EOS_START,
    EXACT_ERROR,
    EXACT_LOG_MAX,
    EXACT_LOG_MEAN,
    KEPT_FIRST,
    KEPT_LAST,
    KL_DEAD,
    KL_DEAD_LINES,
    KL_HIGH,
    KL_HUGE,
    KL_NEGATIVE,
    LENGTH_GROWTH,
    LOSS_RISE,
    LOSS_RISE_FIRST,
    OUT_OF_RANGE,
    RATIO_LOG_MAX,
    RATIO_LOG_MEAN,
    RATIO_MEAN,
    REPEATED,
    SAMPLING_ERROR_MEAN,
    SATURATED_ACCURACY,
    SATURATED_MARGIN,
    SCORE_GAIN,
    SCORE_IS_LENGTH,
    SCORES_ALIKE,
    START,
    VALUE_LINES,
    VALUE_PATIENCE,
)

Line = Mapping[str, float]
History = Sequence[Line]
Point = tuple[int, float]


def series(history: History, name: str) -> list[Point]:
    """(step, value) of every line that has the metric `name`."""
    return [(int(line["step"]), float(line[name])) for line in history if name in line]


def condensed(history: History) -> list[Line]:
    """The lines that checks look at: the first and the last ones of training and of evaluation, in order."""
    kept: set[int] = set()
    for evaluation in (False, True):
        places = [index for index, line in enumerate(history) if _is_evaluation(line) == evaluation]
        kept.update(places[:KEPT_FIRST], places[-KEPT_LAST:])
    return [line for index, line in enumerate(history) if index in kept]


def check(stage: str, history: History) -> list[Finding]:
    """Everything that is wrong at the end of a stage's history, most severe first."""
    found = [one for function in CHECKS[stage] for one in function(history)]
    return sorted(found, key=lambda one: (one.severity != "critical", one.since, one.check))


def _is_evaluation(line: Line) -> bool:
    return any(name.startswith("eval_") for name in line)


def _mean(points: Sequence[Point]) -> float:
    return statistics.fmean(value for _, value in points)


def _run(points: Sequence[Point], bad: Callable[[float], bool]) -> list[Point]:
    """The points at the end that are all bad."""
    start = len(points)
    while start and bad(points[start - 1][1]):
        start -= 1
    return list(points[start:])


def _lasting(
    name: str, points: Sequence[Point], bad: Callable[[float], bool], lines: int, severity: Severity,
    message: Callable[[float], str], badness: Callable[[float], float],
) -> list[Finding]:  # fmt: skip
    """A finding when the last `lines` points are bad."""
    run = _run(points, bad)
    if len(run) < lines:
        return []
    last_step, value = run[-1]
    return [finding(name, severity, run[0][0], last_step, message(value), badness(value))]


# --------------------------------------------------------------------------------------------------- every stage


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
        run = _run(series(history, name), lambda value: value == 0.0)
        if len(run) >= 2:
            return [finding("learning_rate_zero", "critical", run[0][0], run[-1][0], f"{name} is 0")]
    return []


def loss_diverges(history: History) -> list[Finding]:
    """Each of the last five lines against the first five, and against the start alone (held out where there is)."""
    points = series(history, "loss")
    if len(points) < 10:
        return []
    first, start, end = points[0][1], _mean(points[:5]), _mean(points[-5:])
    held_out = [value for step, value in series(history, "eval_loss") if step == 0]
    limit = min(LOSS_RISE * start, LOSS_RISE_FIRST * max([first, *held_out]))
    if not (first > 0 and min(value for _, value in points[-5:]) > limit):
        return []
    message = f"loss {end:.3g} over the last 5 lines, {start:.3g} over the first 5, {first:.3g} in the first"
    since = _run(points, lambda value: value > limit) or points[-5:]
    return [finding("loss_diverges", "critical", since[0][0], points[-1][0], message, end / limit)]


# ---------------------------------------------------------------------------------------------------------- PPO


def ratio_not_one(history: History) -> list[Finding]:
    """The first minibatch of the newest iteration: the mean ratio, and |log ratio| by token."""
    points = series(history, "ratio_first")
    if not points:
        return []
    line = next(line for line in reversed(history) if "ratio_first" in line)
    exact = line.get("sampling_logprob_error", math.inf) <= EXACT_ERROR
    mean, largest = line.get("log_ratio_first_mean", 0.0), line.get("log_ratio_first_max", 0.0)
    badness = max(
        abs(line["ratio_first"] - 1) / RATIO_MEAN,
        mean / (EXACT_LOG_MEAN if exact else RATIO_LOG_MEAN),
        largest / (EXACT_LOG_MAX if exact else RATIO_LOG_MAX),
    )
    if not badness > 1:
        return []
    message = (
        f"mean ratio {line['ratio_first']:.4f}; |log ratio| is {mean:.3g} nats a token on average and {largest:.3g} "
        f"at most, where {EXACT_LOG_MEAN if exact else RATIO_LOG_MEAN} and {EXACT_LOG_MAX if exact else RATIO_LOG_MAX} "
        "are rounding's"
    )
    step = int(line["step"])
    return [finding("ratio_not_one", "critical", step, step, message, badness)]


def sampling_mismatch(history: History) -> list[Finding]:
    """Captured against recomputed log-probabilities."""
    return _lasting(
        "sampling_mismatch", series(history, "sampling_logprob_error_mean"), lambda value: value > SAMPLING_ERROR_MEAN,
        1, "critical",
        lambda value: f"captured and recomputed log-probabilities differ by {value:.3g} nats a token on average",
        lambda value: value / SAMPLING_ERROR_MEAN,
    )  # fmt: skip


def kl_negative(history: History) -> list[Finding]:
    """Beyond two standard errors: a handful of responses gives a negative estimate of a KL near 0."""
    errors = dict(series(history, "kl_error"))
    points = [
        (step, value if value + 2 * errors.get(step, 0.0) < -KL_NEGATIVE else 0.0)
        for step, value in series(history, "kl_per_token")
    ]
    return _lasting(
        "kl_negative", points, lambda value: value < -KL_NEGATIVE, START, "critical",
        lambda value: f"KL {value:.3g} nats per token", lambda value: -value / KL_NEGATIVE,
    )  # fmt: skip


def kl_explodes(history: History) -> list[Finding]:
    points = series(history, "kl_per_token")
    huge = len(_run(points, lambda value: value > KL_HUGE)) >= 2
    return _lasting(
        "kl_explodes", points, lambda value: value > KL_HIGH, 2, "critical" if huge else "warning",
        lambda value: f"KL {value:.3g} nats per token", lambda value: value / KL_HIGH,
    )  # fmt: skip


def kl_dead(history: History) -> list[Finding]:
    points = series(history, "kl_per_token")[1:]  # the first rollout is the reference's own
    return _lasting(
        "kl_dead", points, lambda value: abs(value) < KL_DEAD, KL_DEAD_LINES, "warning",
        lambda value: f"KL {value:.2g} nats per token", lambda value: 1.0,
    )  # fmt: skip


def clip_fraction_high(history: History) -> list[Finding]:
    return _lasting(
        "clip_fraction_high", series(history, "clip_fraction"), lambda value: value > CLIP_FRACTION, START, "warning",
        lambda value: f"{value:.0%} of the tokens are clipped", lambda value: value / CLIP_FRACTION,
    )  # fmt: skip


def value_function_useless(history: History) -> list[Finding]:
    points = series(history, "explained_variance")
    if len(points) < VALUE_PATIENCE:
        return []
    return _lasting(
        "value_function_useless", points, lambda value: value < 0, VALUE_LINES, "warning",
        lambda value: f"explained variance {value:.3g}", lambda value: max(1.0, -value),
    )  # fmt: skip


def _fallen(name: str, metric: str, history: History, left: float, start_least: float, what: str) -> list[Finding]:
    """The mean of the last lines below `left` times that of the first ones, each of the last ones too."""
    points = series(history, metric)
    if len(points) < 2 * START:
        return []
    start = _mean(points[:START])
    limit = left * start
    run = _run(points[START:], lambda value: value < limit)
    if start < start_least or len(run) < START:
        return []
    end = _mean(points[-START:])
    return [
        finding(name, "warning", run[0][0], points[-1][0], f"{what} {end:.3g} after {start:.3g} at the start",
                2 - end / limit)
    ]  # fmt: skip


def entropy_collapse(history: History) -> list[Finding]:
    return _fallen("entropy_collapse", "entropy_estimate", history, ENTROPY_LEFT, 0.0, "nats of entropy per token:")


def eos_rate_falls(history: History) -> list[Finding]:
    return _fallen("eos_rate_falls", "eos_rate", history, EOS_LEFT, EOS_START, "share of responses that end:")


def length_exploited(history: History) -> list[Finding]:
    """Longer responses with higher scores, and a correlation of the two within rollouts or over time."""
    lengths, scores = series(history, "response_tokens"), series(history, "score")
    spreads, inside = series(history, "score_std"), series(history, "score_length_correlation")
    if min(len(lengths), len(scores), len(spreads)) < 2 * START:
        return []
    start, end = _mean(lengths[:START]), _mean(lengths[-START:])
    gain = (_mean(scores[-START:]) - _mean(scores[:START])) / max(_mean(spreads[:START]), 1e-9)
    within = _mean(inside[-5:]) if inside else 0.0
    over_time = _correlation([v for _, v in lengths[-KEPT_LAST:]], [v for _, v in scores[-KEPT_LAST:]])
    if end < LENGTH_GROWTH * start or gain < SCORE_GAIN or (within < CORRELATION and over_time < 0.8):
        return []
    run = _run(lengths, lambda value: value > LENGTH_GROWTH * start) or lengths[-1:]
    message = (
        f"responses of {end:.3g} tokens after {start:.3g}, the score {gain:+.2g} standard deviations; correlation of "
        f"score and length {within:.2f} within rollouts, {over_time:.2f} over time"
    )
    return [finding("length_exploited", "warning", run[0][0], lengths[-1][0], message, end / (LENGTH_GROWTH * start))]


def score_is_length(history: History) -> list[Finding]:
    return _lasting(
        "score_is_length", series(history, "score_length_correlation"), lambda value: abs(value) > SCORE_IS_LENGTH, 5,
        "warning", lambda value: f"correlation of score and length {value:.3f} within the rollout", lambda value: 1.0,
    )  # fmt: skip


def repetition(history: History) -> list[Finding]:
    return _lasting(
        "repetition", series(history, "repeated_4grams"), lambda value: value > REPEATED, START, "warning",
        lambda value: f"{value:.0%} of the 4-grams stood earlier in their response", lambda value: value / REPEATED,
    )  # fmt: skip


def empty_responses(history: History) -> list[Finding]:
    return _lasting(
        "empty_responses", series(history, "empty_responses"), lambda value: value > EMPTY, START, "warning",
        lambda value: f"{value:.0%} of the responses are empty", lambda value: value / EMPTY,
    )  # fmt: skip


def score_out_of_range(history: History) -> list[Finding]:
    return _lasting(
        "score_out_of_range", series(history, "scores_outside_range"), lambda value: value > OUT_OF_RANGE, START,
        "warning", lambda value: f"{value:.0%} of the scores are beyond those of every training response",
        lambda value: value / OUT_OF_RANGE,
    )  # fmt: skip


def scores_alike(history: History) -> list[Finding]:
    return _lasting(
        "scores_alike", series(history, "score_std"), lambda value: value < SCORES_ALIKE, START, "warning",
        lambda value: f"standard deviation of the scores {value:.2g}", lambda value: 2 - value / SCORES_ALIKE,
    )  # fmt: skip


def advantages_equal(history: History) -> list[Finding]:
    return _lasting(
        "advantages_equal", series(history, "advantage_std"), lambda value: value < ADVANTAGES_EQUAL, 2, "critical",
        lambda value: f"standard deviation of the advantages {value:.2g} before whitening", lambda value: 1.0,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- reward model


def reward_model_saturated(history: History) -> list[Finding]:
    """Every training pair right by a huge margin."""
    accuracies, margins = series(history, "accuracy"), series(history, "margin")
    run = _run(margins, lambda value: value > SATURATED_MARGIN)
    all_right = _run(accuracies, lambda value: value >= SATURATED_ACCURACY)
    length = min(len(run), len(all_right))
    if length < START:
        return []
    message = f"accuracy {accuracies[-1][1]:.3f}, mean margin {margins[-1][1]:.3g} on the training pairs"
    badness = margins[-1][1] / SATURATED_MARGIN
    return [finding("reward_model_saturated", "warning", run[-length][0], margins[-1][0], message, badness)]


def reward_model_blind(history: History) -> list[Finding]:
    """Held-out scores after training, not of the model before it."""
    points = [point for point in series(history, "eval_score_std") if point[0] > 0]
    return _lasting(
        "reward_model_blind", points, lambda value: value < BLIND_SPREAD, 1, "warning",
        lambda value: f"standard deviation of the held-out scores {value:.2g}", lambda value: 1.0,
    )  # fmt: skip


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2 or not all(map(math.isfinite, [*first, *second])):
        return 0.0
    return statistics.correlation(first, second)


Check = Callable[[History], list[Finding]]
EVERY_STAGE: tuple[Check, ...] = (not_finite, learning_rate_zero)
CHECKS: Mapping[str, tuple[Check, ...]] = {
    "sft": (*EVERY_STAGE, loss_diverges),
    "reward": (*EVERY_STAGE, loss_diverges, reward_model_saturated, reward_model_blind),
    "ppo": (
        *EVERY_STAGE, ratio_not_one, sampling_mismatch, kl_negative, kl_explodes, kl_dead, clip_fraction_high,
        value_function_useless, entropy_collapse, eos_rate_falls, length_exploited, score_is_length, repetition,
        empty_responses, score_out_of_range, scores_alike, advantages_equal,
    ),
}  # fmt: skip
"""The checks of each stage."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "loss_diverges": ("loss",),
    "learning_rate_zero": ("learning_rate",),
    "ratio_not_one": ("ratio_first", "log_ratio_first_max"),
    "sampling_mismatch": ("sampling_logprob_error_mean",),
    "kl_negative": ("kl_per_token",),
    "kl_explodes": ("kl_per_token",),
    "kl_dead": ("kl_per_token",),
    "clip_fraction_high": ("clip_fraction",),
    "value_function_useless": ("explained_variance",),
    "entropy_collapse": ("entropy_estimate",),
    "eos_rate_falls": ("eos_rate",),
    "length_exploited": ("response_tokens", "score", "score_std"),
    "score_is_length": ("score_length_correlation",),
    "repetition": ("repeated_4grams",),
    "empty_responses": ("empty_responses",),
    "score_out_of_range": ("scores_outside_range",),
    "scores_alike": ("score_std",),
    "advantages_equal": ("advantage_std",),
    "reward_model_saturated": ("accuracy", "margin"),
    "reward_model_blind": ("eval_score_std",),
}
"""Metrics without which a check says nothing."""


def unchecked(stage: str, history: History) -> dict[str, list[str]]:
    """Checks of a stage that its history has no metrics for, and which ones are missing."""
    known = {name for line in history for name in line}
    missing = {
        function.__name__: [name for name in NEEDS.get(function.__name__, ()) if name not in known]
        for function in CHECKS[stage]
    }
    return {name: names for name, names in missing.items() if names}
