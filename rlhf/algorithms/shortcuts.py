"""What a score follows beside quality: its length, its opening words, its category, its file.

A shortcut that both responses of a pair share (category, file) cannot decide between them; how far the score follows
it is still told. All figures are of held-out rows, with how many there are and a 95% interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.distributed.log import logger
from rlhf.doctor.limits import FEW_ROWS
from rlhf.numerics.intervals import Z95, correlation_interval, effective_number, standard_error, wilson_interval
from rlhf.numerics.statistics import correlation, correlation_ratio, without_group_means
from rlhf.types import TokenizedRanking

LIKE_LENGTH = 0.1
"""Two responses are of like length when they differ by at most this share of the longer one."""
OPENING_WORDS, OPENING_TOKENS = 2, 24
"""Words of an opening phrase, and the first tokens of a response that they are looked for in."""
OPENINGS, OPENING_RESPONSES = 5, 10
"""The commonest openings that are looked at, and how many responses must begin with one."""
SMALL_EFFECT, MEDIUM_EFFECT, LARGE_SHARE = 0.1, 0.3, 0.14
"""A small and a medium correlation, and a large share of variance (Cohen 1988, Statistical Power Analysis)."""


@dataclass(frozen=True)
class ScoredPairs:
    """Responses [N] with `scores` and `prompts` (a number that those to one prompt share), and their pairs.

    `better`, `worse` [pairs] are rows; `correct` [pairs] is 1 where the better one scores higher, 0.5 for equal scores.
    """

    scores: torch.Tensor
    prompts: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    correct: torch.Tensor


def follows(pairs: ScoredPairs, feature: torch.Tensor, *, tolerance: float = 0.0) -> dict[str, Any]:
    """How far the score follows `feature` [N], a number that is not negative: more of it, or less.

    `correlation` over all responses; `correlation_within` of what differs between responses to one prompt. Accuracies
    on pairs that are `matched` (they differ by at most `tolerance` of the larger), where the chosen one has more
    (`chosen_more`) and where it has less (`chosen_less`): a score that does not use the feature is as often right in
    the one as in the other. `matched_balanced` weighs the two directions alike, so that a score that follows the
    feature alone is right on half of them, whatever the labels like. `labels_choose_more`: how often the chosen one has
    more, of pairs that differ.
    """
    values = feature.double()
    first, second = values[pairs.better], values[pairs.worse]
    matched = (first - second).abs() <= tolerance * torch.maximum(first, second)
    _, prompt, rows = pairs.prompts.unique(return_inverse=True, return_counts=True)
    inside = correlation(without_group_means(pairs.scores, prompt), without_group_means(values, prompt))
    contrasts = rows[rows > 1] - 1  # a prompt counts by what differs in it
    unlike = first != second
    return {
        "correlation": _correlation(correlation(pairs.scores, values), effective_number(rows), int(rows.sum())),
        "correlation_within": _correlation(inside, effective_number(contrasts), int(rows.sum())),
        "matched": _share(pairs, pairs.correct, matched),
        "matched_balanced": _balanced_share(pairs, (first - second).sign(), matched),
        "chosen_more": _share(pairs, pairs.correct, first > second),
        "chosen_less": _share(pairs, pairs.correct, first < second),
        "labels_choose_more": _share(pairs, (first > second).float(), unlike, name="share"),
    }


def _correlation(value: float, count: float, responses: int) -> dict[str, float]:
    low, high = correlation_interval(value, count)
    return {"value": value, "low": low, "high": high, "responses": responses}


def _share(
    pairs: ScoredPairs, values: torch.Tensor, member: torch.Tensor, *, name: str = "accuracy"
) -> dict[str, float | None]:
    """The mean of `values` over the pairs in `member`, with its interval over prompts; None where there is no pair."""
    if not member.any():
        return {name: None, "low": None, "high": None, "pairs": 0, "effective_rows": 0.0}
    share = float(values[member].mean())
    effective = effective_number(pairs.prompts[pairs.better][member].unique(return_counts=True)[1])
    low, high = wilson_interval(share, effective)
    return {name: share, "low": low, "high": high, "pairs": int(member.sum()), "effective_rows": effective}


def _balanced_share(pairs: ScoredPairs, direction: torch.Tensor, member: torch.Tensor) -> dict[str, float | None]:
    """The accuracy over `member`, pairs of direction 1 weighing as much together as those of -1; where one of the two
    is missing only pairs of direction 0 can tell."""
    more, less = (member & (direction == sign) for sign in (1, -1))
    half = (more.sum() + less.sum()) / 2
    weights = (member & (direction == 0)).double()
    if more.any() and less.any():
        weights = weights + more * half / more.sum() + less * half / less.sum()
    if not weights.any():
        return _share(pairs, pairs.correct, torch.zeros_like(member))
    share = float((weights * pairs.correct).sum() / weights.sum())
    _, prompt = pairs.prompts[pairs.better].unique(return_inverse=True)
    of_prompt = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64).index_add(0, prompt, weights)
    effective = effective_number(of_prompt)
    low, high = wilson_interval(share, effective)
    counted = int((weights > 0).sum())
    return {"accuracy": share, "low": low, "high": high, "pairs": counted, "effective_rows": effective}


def by_group(
    pairs: ScoredPairs, groups: torch.Tensor, names: Sequence[str], accuracies: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """How far the score follows a group that all responses to a prompt share: `groups` [N] numbers of `names`.

    `variance_share` is the share of the scores' variance that lies between the groups; each group has its mean score
    with an interval over prompts (None for one prompt), and what `accuracies` has for it.
    """
    found: dict[str, Any] = {}
    for number in groups.unique().tolist():
        member = groups == number
        _, prompt = pairs.prompts[member].unique(return_inverse=True)
        means = torch.zeros(int(prompt.max()) + 1, dtype=torch.float64)
        means = means.index_add(0, prompt, pairs.scores[member].double()) / torch.bincount(prompt)
        mean, half = float(means.mean()), Z95 * standard_error(means) if len(means) > 1 else None
        name = names[number] or "all"
        known = accuracies.get(name, {})
        found[name] = {
            "score_mean": mean,
            "score_low": None if half is None else mean - half,
            "score_high": None if half is None else mean + half,
            "responses": int(member.sum()),
            **{key: known[key] for key in ("accuracy", "accuracy_low", "accuracy_high", "pairs") if key in known},
        }
    return {"variance_share": correlation_ratio(pairs.scores, groups), "groups": found}


def audit(
    pairs: ScoredPairs,
    lengths: torch.Tensor,
    openings: torch.Tensor,
    opening_names: Sequence[str],
    groups: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """All shortcuts, and what they come to in words (`verdict`, and `notes` on those other than length).

    `lengths` [N] in tokens of the response; `openings` [N] are numbers of `opening_names`, -1 for any other; `groups`
    is what `by_group` says, by the name of the shortcut.
    """
    found: dict[str, Any] = {
        "length": follows(pairs, lengths, tolerance=LIKE_LENGTH),
        "opening": {name: follows(pairs, openings == number) for number, name in enumerate(opening_names)},
        **groups,
    }
    return {"verdict": length_verdict(found["length"]), "notes": _notes(found), **found}


def length_verdict(length: Mapping[str, Any]) -> str:
    """Whether the score is explained by length, and in which direction, from what `follows` says of it.

    A correlation within prompts that its interval does not tell from 0, or below `SMALL_EFFECT`, is none. One that is
    there explains the score unless it is right without it: the interval of the accuracy lies above a coin's on pairs of
    like length (`matched_balanced`), or on those where the chosen one is the one that length speaks against.
    """
    within, matched = length["correlation_within"], length["matched_balanced"]
    figures = f"correlation within prompts {within['value']:+.2f} ({within['low']:+.2f} to {within['high']:+.2f})"
    like = f"{_figure(matched)} on {matched['pairs']} pairs of like length (either direction weighing the same)"
    if within["low"] <= 0 <= within["high"] or abs(within["value"]) < SMALL_EFFECT:
        return f"the score does not follow length: {figures}; accuracy {like}"
    longer = within["value"] > 0
    against = length["chosen_less" if longer else "chosen_more"]
    direction, other = ("longer", "shorter") if longer else ("shorter", "longer")
    figures += f"; accuracy {like}, {_figure(against)} on {against['pairs']} where the {other} one was chosen"
    if any(part["low"] is not None and part["low"] > 0.5 for part in (matched, against)):
        return f"the score leans to the {direction} response and says more than length: {figures}"
    misled = against["high"] is not None and against["high"] < 0.5
    if not misled and max(matched["effective_rows"], against["effective_rows"]) < FEW_ROWS:
        return f"the score follows length, to the {direction} response, and too few pairs say whether more: {figures}"
    return f"the score is explained by length, the {direction} response scoring higher: {figures}"


def _figure(share: Mapping[str, Any]) -> str:
    if share["accuracy"] is None:
        return "not known"
    return f"{share['accuracy']:.3f} ({share['low']:.3f} to {share['high']:.3f})"


def _notes(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each shortcut other than length that the score follows far."""
    notes = []
    for name, opening in found["opening"].items():
        within = opening["correlation_within"]
        if abs(within["value"]) >= MEDIUM_EFFECT and not within["low"] <= 0 <= within["high"]:
            side = "higher" if within["value"] > 0 else "lower"
            notes.append(
                f"responses that open with {name!r} score {side}: correlation within prompts {within['value']:+.2f} "
                f"({within['low']:+.2f} to {within['high']:+.2f})"
            )
    for kind in ("category", "source"):
        if kind in found and found[kind]["variance_share"] >= LARGE_SHARE:
            notes.append(f"the {kind} explains {found[kind]['variance_share']:.0%} of the scores' variance")
    return notes


def log_shortcuts(shortcuts: Mapping[str, Any] | None) -> None:
    """Say in the log what an audit came to; None was not measured."""
    if shortcuts is not None:
        for line in (shortcuts["verdict"], *shortcuts["notes"]):
            logger.info("reward: %s", line)


def common_openings(
    examples: Sequence[TokenizedRanking], decode: Callable[[Sequence[int]], str]
) -> tuple[list[int], list[str]]:
    """The opening of each candidate, in order, as a number of the names returned; -1 for one that is not common.

    An opening is the first `OPENING_WORDS` words; `decode` makes text of token ids. At most `OPENINGS` names, the
    commonest first.
    """
    phrases = [
        " ".join(decode(row.input_ids[row.prompt_tokens :][:OPENING_TOKENS]).split()[:OPENING_WORDS])
        for example in examples
        for row in example.candidates
    ]
    counts = Counter(phrase for phrase in phrases if phrase)
    common = sorted(
        (item for item in counts.items() if item[1] >= OPENING_RESPONSES), key=lambda item: (-item[1], item[0])
    )
    names = [name for name, _ in common[:OPENINGS]]
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers.get(phrase, -1) for phrase in phrases], names
