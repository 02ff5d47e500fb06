"""Checks of held-out figures: whether they rest on enough rows, and what the trained model is worth by them."""

from __future__ import annotations

import math

from rlhf.doctor.findings import Finding, Severity, finding
from rlhf.doctor.history import History, Line, bad_end, best_evaluation, kept_evaluation, lasting, series
from rlhf.doctor.limits import (
    FALL_ERRORS,
    FALL_ERRORS_FEW,
    FALL_SPREADS,
    FEW_ROWS,
    FOLLOWS_LENGTH,
    JUDGED_FROM,
    PAST_BEST_LINES,
)
from rlhf.numerics.intervals import Z95, wilson_interval


def too_few_held_out(history: History) -> list[Finding]:
    """None, or fewer than FEW_ROWS (of rows that hold unlike many pairs: that tell as much)."""
    lines = [line for line in history if "eval_rows" in line]
    if not lines or _effective(lines[-1]) >= FEW_ROWS:
        return []
    since, step, rows = int(lines[0]["step"]), int(lines[-1]["step"]), _effective(lines[-1])
    if rows == 0:
        message = "nothing is held out: whether anything was learnt cannot be said"
    else:
        held_out = f"{lines[-1]['eval_rows']:.0f} held out"
        if rows < 0.95 * lines[-1]["eval_rows"]:
            held_out += f", which tell as much as {rows:.1f}: few of them have most of the pairs"
        message = f"{held_out}: a mean over so many is known to +-{Z95 / math.sqrt(rows):.2g} of their SD"
        known = [line for line in history if "eval_accuracy_low" in line]
        message += f"; {_accuracy(best_evaluation(known) or known[-1])}" if known else ""
    return [finding("too_few_held_out", "warning", since, step, message, FEW_ROWS / max(rows, 0.5))]


def reward_model_at_chance(history: History) -> list[Finding]:
    """The 95% interval of the kept model's accuracy reaches down to a coin's; on few prompts the accuracy itself does,
    since their interval always will."""
    line = _judged(history)
    if line is None or "eval_accuracy_low" not in line:
        return []
    accuracy = line["eval_accuracy"]
    if line["eval_accuracy_low"] > 0.5 or (accuracy > 0.5 and _effective(line) < FEW_ROWS):
        return []
    step = int(line["step"])
    return [finding("reward_model_at_chance", "critical", step, step, _accuracy(line), 1 + max(0.0, 0.5 - accuracy))]


def reward_model_is_shortcut(history: History) -> list[Finding]:
    """Choosing by length alone is better than a coin, and the kept model is not better than that."""
    line = _judged(history)
    if line is None or not _beside_shortcut(line) or line["eval_over_shortcut"] > 0:
        return []
    severity: Severity = "critical" if line["eval_over_shortcut_high"] < 0 else "warning"
    step, badness = int(line["step"]), 1 - line["eval_over_shortcut"]
    return [finding("reward_model_is_shortcut", severity, step, step, _beside_shortcut(line), badness)]


def shortcut_notes(history: History) -> list[str]:
    """What is worth a note and no finding: better than length alone on the held-out pairs, which may be by chance."""
    line = _judged(history)
    told = "" if line is None else _beside_shortcut(line)
    if line is None or not told or line["eval_over_shortcut"] <= 0 or line["eval_over_shortcut_low"] > 0:
        return []
    return [f"{told}: more held-out pairs would show whether that is chance"]


def _judged(history: History) -> Line | None:
    """The evaluation of the kept model; None early in a run (an earlier release did not record how early)."""
    newest = next((line for line in reversed(history) if "eval_loss" in line), None)
    if newest is None or newest.get("eval_progress", 1.0) < JUDGED_FROM:
        return None
    return best_evaluation(history)


def _beside_shortcut(line: Line) -> str:
    """The accuracy and that of choosing by length; empty where the latter is no better than a coin, or not known."""
    if "eval_over_shortcut" not in line:
        return ""
    over, low, high = (line[f"eval_over_shortcut{end}"] for end in ("", "_low", "_high"))
    if wilson_interval(line["eval_shortcut_accuracy"], _effective(line))[0] <= 0.5:
        return ""
    longer = "longer" if line["eval_length_baseline_accuracy"] >= 0.5 else "shorter"
    return (
        f"{_accuracy(line)}; choosing the {longer} response {line['eval_shortcut_accuracy']:.3f}, so that the model is "
        f"{over:+.3f} beside it (95% interval {low:+.3f} to {high:+.3f})"
    )


def score_below_start(history: History) -> list[Finding]:
    """The held-out score of the actor that is kept against that before training, prompt by prompt: lower by more than
    its standard error, and by enough to matter."""
    line = kept_evaluation(history)
    if line is None or "eval_score_gain_error" not in line:
        return []
    gain, error, rows = line["eval_score_gain"], line["eval_score_gain_error"], line["eval_rows"]
    start = next((each for each in history if each["step"] == 0 and "eval_score" in each), None)
    spread = 0.0 if start is None else start["eval_score_std"]
    errors = FALL_ERRORS if rows >= FEW_ROWS else FALL_ERRORS_FEW
    if gain >= -errors * error or gain > -FALL_SPREADS * spread:
        return []
    in_spreads = f" = {error / spread:.2f} SD" if spread > 0 else ""
    message = f"{_fall(start, line)} on {rows:.0f} prompts, standard error {error:.3g}{in_spreads}"
    step = int(line["step"])
    return [finding("score_below_start", "warning", step, step, message, -gain / max(error, 1e-9))]


def score_follows_length(history: History) -> list[Finding]:
    """Among the responses to one held-out prompt, of FEW_ROWS at least, as the evaluation before training shows."""
    return lasting(
        "score_follows_length",
        series([line for line in history if line.get("eval_rows", 0) >= FEW_ROWS], "eval_score_length_within"),
        lambda value: abs(value) > FOLLOWS_LENGTH, 1, "warning",
        lambda value: f"correlation of score and length {value:+.2f} among the actor's responses to one prompt",
        lambda value: abs(value) / FOLLOWS_LENGTH,
    )  # fmt: skip


def over_optimised(history: History) -> list[Finding]:
    """A measure that training does not see stays below its best while the score that is optimised rises."""
    gold = _past_best(history, "gold", "gold")
    return gold or _past_best(history, "held_out_score", "the score of the held-out reward model")


def _past_best(history: History, name: str, what: str) -> list[Finding]:
    """Below by more standard errors than the best of n evaluations lies above the others by luck, sqrt(2 ln n).

    Nothing where the actor that is kept is that best one.
    """
    lines = [line for line in history if f"eval_{name}" in line]
    limit = math.sqrt(2 * math.log(max(2, len(lines))))
    points = [(int(line["step"]), _errors_below(line, name)) for line in lines]
    below = bad_end(points, lambda errors: errors > limit)
    if len(below) < PAST_BEST_LINES:
        return []
    fall, error, peak, rise = (
        lines[-1][f"eval_{name}_{part}"] for part in ("fall", "fall_error", "fall_since", "fall_score")
    )
    if rise <= 0 or lines[-1].get("eval_kept_step") == peak:
        return []
    message = (
        f"{what} is {lines[-1][f'eval_{name}']:.3f}, {fall:.3f} (standard error {error:.3f}) below that of iteration "
        f"{peak:.0f}, while the score rose by {rise:.3f}"
    )
    (since, _), (step, errors) = below[0], below[-1]
    return [finding("over_optimised", "warning", since, step, message, errors / limit)]


def _errors_below(line: Line, name: str) -> float:
    """How many standard errors a measure lies below its best; 0 at the best."""
    return line.get(f"eval_{name}_fall", 0.0) / max(line.get(f"eval_{name}_fall_error", 0.0), 1e-9)


def _fall(start: Line | None, line: Line) -> str:
    gain = line["eval_score_gain"]
    if start is None:
        return f"held-out score {line['eval_score']:.3f}, {gain:+.3f} since the start"
    spread = start["eval_score_std"]
    in_spreads = f" = {gain / spread:+.2f} SD of the first scores" if spread > 0 else ""
    told = (
        f"held-out score {line['eval_score']:.3f} after {start['eval_score']:.3f} at the start: {gain:+.3f}{in_spreads}"
    )
    if "eval_reward" in line and "eval_reward" in start:
        told += f" (less penalties, as optimised: {line['eval_reward'] - start['eval_reward']:+.3f})"
    return told


def _effective(line: Line) -> float:
    """The rows of an evaluation, those that hold more pairs than others counted down; an earlier release did not."""
    return line.get("eval_effective_rows", line["eval_rows"])


def _accuracy(line: Line) -> str:
    """`held-out accuracy 0.647 on 116 pairs (95% interval 0.556 to 0.728)`."""
    pairs, rows = line["eval_pairs"], line["eval_rows"]
    of = f"{pairs:.0f} pairs" if pairs == rows else f"{pairs:.0f} pairs of {rows:.0f} prompts"
    low, high = line["eval_accuracy_low"], line["eval_accuracy_high"]
    return f"held-out accuracy {line['eval_accuracy']:.3f} on {of} (95% interval {low:.3f} to {high:.3f})"
