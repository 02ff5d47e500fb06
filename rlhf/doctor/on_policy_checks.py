"""Checks of a run that samples its own responses: the policy, its value function, its scores. See `training_checks`."""

from __future__ import annotations

import math

from rlhf.doctor.findings import Finding, finding
from rlhf.doctor.history import History, bad_end, correlation, lasting, mean_value, series
from rlhf.doctor.limits import (
    ADVANTAGES_EQUAL,
    CLIP_FRACTION,
    CORRELATION,
    EMPTY,
    ENTROPY_LEFT,
    EOS_LEFT,
    EOS_START,
    EXACT_ERROR,
    EXACT_LOG_MAX,
    EXACT_LOG_MEAN,
    KEPT_LAST,
    KL_DEAD,
    KL_DEAD_LINES,
    KL_HIGH,
    KL_HUGE,
    KL_NEGATIVE,
    LENGTH_GROWTH,
    OUT_OF_RANGE,
    RATIO_LOG_MAX,
    RATIO_LOG_MEAN,
    RATIO_MEAN,
    REPEATED,
    SAMPLING_ERROR_MEAN,
    SCORE_GAIN,
    SCORE_IS_LENGTH,
    SCORES_ALIKE,
    START,
    VALUE_LINES,
    VALUE_PATIENCE,
)


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
    return lasting(
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
    return lasting(
        "kl_negative", points, lambda value: value < 0, START, "critical",
        lambda value: f"KL {value:.3g} nats per token", lambda value: -value / KL_NEGATIVE,
    )  # fmt: skip


def kl_explodes(history: History) -> list[Finding]:
    points = series(history, "kl_per_token")
    huge = len(bad_end(points, lambda value: value > KL_HUGE)) >= 2
    return lasting(
        "kl_explodes", points, lambda value: value > KL_HIGH, 2, "critical" if huge else "warning",
        lambda value: f"KL {value:.3g} nats per token", lambda value: value / KL_HIGH,
    )  # fmt: skip


def kl_dead(history: History) -> list[Finding]:
    learnt = [line for line in history if "policy_loss" in line]  # in a critic's warm-up the actor stands still
    points = series(learnt, "kl_per_token")[1:]  # the first rollout is the reference's own
    return lasting(
        "kl_dead", points, lambda value: abs(value) < KL_DEAD, KL_DEAD_LINES, "warning",
        lambda value: f"KL {value:.2g} nats per token", lambda value: 1.0,
    )  # fmt: skip


def clip_fraction_high(history: History) -> list[Finding]:
    return lasting(
        "clip_fraction_high", series(history, "clip_fraction"), lambda value: value > CLIP_FRACTION, START, "warning",
        lambda value: f"{value:.0%} of the tokens are clipped", lambda value: value / CLIP_FRACTION,
    )  # fmt: skip


def value_function_useless(history: History) -> list[Finding]:
    points = series(history, "explained_variance")
    if len(points) < VALUE_PATIENCE:
        return []
    return lasting(
        "value_function_useless", points, lambda value: value < 0, VALUE_LINES, "warning",
        lambda value: f"explained variance {value:.3g}", lambda value: max(1.0, -value),
    )  # fmt: skip


def _fallen(name: str, metric: str, history: History, left: float, start_least: float, what: str) -> list[Finding]:
    """The mean of the last lines below `left` times that of the first ones, each of the last ones too."""
    points = series(history, metric)
    if len(points) < 2 * START:
        return []
    start = mean_value(points[:START])
    limit = left * start
    run = bad_end(points[START:], lambda value: value < limit)
    if start < start_least or len(run) < START:
        return []
    end = mean_value(points[-START:])
    return [finding(name, "warning", run[0][0], points[-1][0], f"{what} {end:.3g} after {start:.3g} at the start")]


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
    start, end = mean_value(lengths[:START]), mean_value(lengths[-START:])
    gain = (mean_value(scores[-START:]) - mean_value(scores[:START])) / max(mean_value(spreads[:START]), 1e-9)
    within = mean_value(inside[-5:]) if inside else 0.0
    over_time = correlation([v for _, v in lengths[-KEPT_LAST:]], [v for _, v in scores[-KEPT_LAST:]])
    if end < LENGTH_GROWTH * start or gain < SCORE_GAIN or (within < CORRELATION and over_time < 0.8):
        return []
    run = bad_end(lengths, lambda value: value > LENGTH_GROWTH * start) or lengths[-1:]
    message = (
        f"responses of {end:.3g} tokens after {start:.3g}, the score {gain:+.2g} standard deviations; correlation of "
        f"score and length {within:.2f} within rollouts, {over_time:.2f} over time"
    )
    return [finding("length_exploited", "warning", run[0][0], lengths[-1][0], message, end / (LENGTH_GROWTH * start))]


def score_is_length(history: History) -> list[Finding]:
    return lasting(
        "score_is_length", series(history, "score_length_correlation"), lambda value: abs(value) > SCORE_IS_LENGTH, 5,
        "warning", lambda value: f"correlation of score and length {value:.3f} within the rollout", lambda value: 1.0,
    )  # fmt: skip


def repetition(history: History) -> list[Finding]:
    return lasting(
        "repetition", series(history, "repeated_4grams"), lambda value: value > REPEATED, START, "warning",
        lambda value: f"{value:.0%} of the 4-grams stood earlier in their response", lambda value: value / REPEATED,
    )  # fmt: skip


def empty_responses(history: History) -> list[Finding]:
    return lasting(
        "empty_responses", series(history, "empty_responses"), lambda value: value > EMPTY, START, "warning",
        lambda value: f"{value:.0%} of the responses are empty", lambda value: value / EMPTY,
    )  # fmt: skip


def score_out_of_range(history: History) -> list[Finding]:
    return lasting(
        "score_out_of_range", series(history, "scores_outside_range"), lambda value: value > OUT_OF_RANGE, START,
        "warning", lambda value: f"{value:.0%} of the scores are beyond those of every training response",
        lambda value: value / OUT_OF_RANGE,
    )  # fmt: skip


def scores_alike(history: History) -> list[Finding]:
    return lasting(
        "scores_alike", series(history, "score_std"), lambda value: value < SCORES_ALIKE, START, "warning",
        lambda value: f"standard deviation of the scores {value:.2g}", lambda value: 1.0,
    )  # fmt: skip


def advantages_equal(history: History) -> list[Finding]:
    return lasting(
        "advantages_equal", series(history, "advantage_std"), lambda value: value < ADVANTAGES_EQUAL, 2, "critical",
        lambda value: f"standard deviation of the advantages {value:.2g} before whitening", lambda value: 1.0,
    )  # fmt: skip
