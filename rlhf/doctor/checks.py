"""Which checks there are, for which kind of training, and what each of them needs to know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rlhf.doctor.findings import Finding
from rlhf.doctor.held_out_checks import (
    over_optimised,
    reward_model_at_chance,
    reward_model_is_shortcut,
    score_below_start,
    score_follows_length,
    too_few_held_out,
)
from rlhf.doctor.history import History
from rlhf.doctor.on_policy_checks import (
    advantages_equal,
    clip_fraction_high,
    empty_responses,
    entropy_collapse,
    eos_rate_falls,
    kl_dead,
    kl_explodes,
    kl_negative,
    length_exploited,
    ratio_not_one,
    repetition,
    sampling_mismatch,
    score_is_length,
    score_out_of_range,
    scores_alike,
    value_function_useless,
)
from rlhf.doctor.preference_checks import chosen_collapses, margin_saturated
from rlhf.doctor.reward_checks import groups_alike, reward_fails, reward_part_falls
from rlhf.doctor.training_checks import (
    learning_rate_zero,
    loss_diverges,
    not_finite,
    reward_model_blind,
    reward_model_saturated,
)

Check = Callable[[History], list[Finding]]

EVERY_STAGE: tuple[Check, ...] = (not_finite, learning_rate_zero, too_few_held_out)
"""What may go wrong wherever something is trained; the others begin with these."""
OFFLINE: tuple[Check, ...] = (*EVERY_STAGE, loss_diverges)
"""Training on rows that are there."""
REWARD: tuple[Check, ...] = (
    *OFFLINE, reward_model_saturated, reward_model_blind, reward_model_at_chance, reward_model_is_shortcut,
)  # fmt: skip
"""Training a reward model."""
PREFERENCE: tuple[Check, ...] = (*OFFLINE, chosen_collapses, margin_saturated)
"""Preference optimisation on responses that are there."""
ON_POLICY: tuple[Check, ...] = (
    *EVERY_STAGE, ratio_not_one, sampling_mismatch, kl_negative, kl_explodes, kl_dead, clip_fraction_high,
    value_function_useless, entropy_collapse, eos_rate_falls, length_exploited, score_is_length, repetition,
    empty_responses, score_out_of_range, scores_alike, reward_fails, reward_part_falls, groups_alike, advantages_equal,
    score_below_start, score_follows_length, over_optimised,
)  # fmt: skip
"""Training on responses that the model samples itself."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "loss_diverges": ("loss",),
    "learning_rate_zero": ("learning_rate",),
    "too_few_held_out": ("eval_rows",),
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
    "reward_fails": ("score",),
    "reward_part_falls": ("score", "score_std"),
    "groups_alike": ("score",),
    "chosen_collapses": ("eval_chosen_logprob",),
    "margin_saturated": ("accuracy", "margin", "loss"),
    "reward_model_saturated": ("accuracy", "margin"),
    "reward_model_blind": ("eval_score_std",),
    "reward_model_at_chance": ("eval_accuracy_low",),
    "reward_model_is_shortcut": ("eval_over_shortcut",),
    "score_below_start": ("eval_score_gain_error",),
    "score_follows_length": ("eval_score_length_within",),
    "over_optimised": ("eval_gold or eval_held_out_score",),
}
"""Metrics without which a check says nothing; "A or B": one of the two is enough."""


def examine(checks: Sequence[Check], history: History) -> list[Finding]:
    """Everything that is wrong at the end of a history, most severe first."""
    found = [one for check in checks for one in check(history)]
    return sorted(found, key=lambda one: (one.severity != "critical", one.since, one.check))


def unchecked(checks: Sequence[Check], history: History) -> dict[str, list[str]]:
    """Names of the checks that a history has no metrics for, and which metrics are missing."""
    known = {name for line in history for name in line}
    missing = {
        check.__name__: [name for name in NEEDS.get(check.__name__, ()) if known.isdisjoint(name.split(" or "))]
        for check in checks
    }
    return {name: names for name, names in missing.items() if names}
