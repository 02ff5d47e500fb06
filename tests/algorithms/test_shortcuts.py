"""What a score follows beside quality: tables worked by hand, and scores of which the shortcut is known."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from rlhf.algorithms.ranking_losses import ranked_pairs
from rlhf.algorithms.ranking_metrics import RowNames, ScoredRows, accuracy_of, ranking_metrics
from rlhf.algorithms.shortcuts import ScoredPairs, by_group, common_openings, follows, length_verdict, log_shortcuts
from rlhf.numerics.intervals import correlation_interval, wilson_interval
from rlhf.types import TokenizedRanking, TokenizedResponse


def pairs_of(scores, prompts=None):
    """Pairs of responses, of which the first is the better one; a prompt each unless `prompts` says otherwise."""
    scores = torch.tensor(scores, dtype=torch.float64).flatten()
    groups = torch.arange(len(scores) // 2).repeat_interleave(2)
    better, worse = ranked_pairs(groups, torch.tensor([0, 1] * (len(scores) // 2)))
    prompts = groups if prompts is None else torch.tensor(prompts).repeat_interleave(2)
    return ScoredPairs(scores, prompts, better, worse, accuracy_of(scores[better], scores[worse]))


def test_accuracies_by_length_worked_by_hand():
    """Lengths (chosen, rejected): like each other, exactly 10% apart, longer twice, shorter twice, shorter and tied."""
    pairs = pairs_of([(2, 1), (1, 2), (3, 1), (4, 1), (1, 5), (2, 1), (1, 1)])
    lengths = torch.tensor([(20, 20), (9, 10), (30, 10), (12, 10), (10, 30), (10, 12), (8, 10)]).flatten()
    found = follows(pairs, lengths, tolerance=0.1)
    assert (found["matched"]["accuracy"], found["matched"]["pairs"]) == (0.5, 2)
    assert (found["chosen_more"]["accuracy"], found["chosen_more"]["pairs"]) == (1.0, 2)
    assert (found["chosen_less"]["accuracy"], found["chosen_less"]["pairs"]) == (pytest.approx(1.5 / 4), 4)
    assert (found["chosen_less"]["low"], found["chosen_less"]["high"]) == pytest.approx(wilson_interval(0.375, 4))
    assert (found["labels_choose_more"]["share"], found["labels_choose_more"]["pairs"]) == (pytest.approx(2 / 6), 6)


def test_a_score_that_is_length_is_right_on_half_of_the_pairs_of_like_length_whatever_the_labels_like():
    """Three of four times the longer one was chosen; one pair of equal length counts as it is."""
    lengths = torch.tensor([(100, 99), (98, 97), (50, 49), (60, 61), (70, 70), (90, 10)]).flatten()
    found = follows(pairs_of(lengths.tolist()), lengths, tolerance=0.1)
    assert found["matched"]["accuracy"] == pytest.approx(3.5 / 5)
    balanced = found["matched_balanced"]
    assert balanced["accuracy"] == pytest.approx(0.5) and balanced["pairs"] == 5
    weights = [2 / 3, 2 / 3, 2 / 3, 2, 1]
    assert balanced["effective_rows"] == pytest.approx(sum(weights) ** 2 / sum(weight**2 for weight in weights))
    one_sided = follows(pairs_of([2, 1, 1, 2]), torch.tensor([100, 99, 50, 50]), tolerance=0.1)["matched_balanced"]
    assert (one_sided["accuracy"], one_sided["pairs"]) == (0.0, 1), "the pair of equal length alone"
    nothing = follows(pairs_of([2, 1]), torch.tensor([100, 99]), tolerance=0.1)["matched_balanced"]
    assert nothing["accuracy"] is None and nothing["pairs"] == 0


def test_correlations_overall_and_within_prompts_worked_by_hand():
    """Within every prompt the longer response scores lower by 1; between prompts scores rise with length."""
    pairs = pairs_of([(1, 0), (11, 10), (21, 20), (31, 30), (41, 40)])
    lengths = torch.tensor([(1, 2), (11, 12), (21, 22), (31, 32), (41, 42)]).flatten()
    found = follows(pairs, lengths)
    assert found["correlation_within"]["value"] == pytest.approx(-1)
    deviations = [10 * (i // 2) - 20 + (0.5 if i % 2 == 0 else -0.5) for i in range(10)]
    other = [10 * (i // 2) - 20 + (-0.5 if i % 2 == 0 else 0.5) for i in range(10)]
    by_hand = sum(a * b for a, b in zip(deviations, other, strict=True)) / sum(a * a for a in deviations)
    assert found["correlation"]["value"] == pytest.approx(by_hand) and by_hand > 0.99
    assert found["correlation"]["responses"] == 10
    low, high = found["correlation"]["low"], found["correlation"]["high"]
    assert (low, high) == pytest.approx(correlation_interval(by_hand, 5)), "five prompts, not ten responses"


def test_pairs_of_one_prompt_count_as_one_in_an_interval():
    scores, lengths = [(2, 1)] * 8, torch.tensor([(9, 5)] * 8).flatten()
    apart = follows(pairs_of(scores), lengths)["chosen_more"]
    together = follows(pairs_of(scores, prompts=[0] * 4 + [1] * 4), lengths)["chosen_more"]
    assert apart["accuracy"] == together["accuracy"] == 1.0
    assert (together["low"], together["effective_rows"]) == (pytest.approx(wilson_interval(1.0, 2)[0]), 2)
    assert together["low"] < apart["low"]


def test_a_prompt_counts_in_a_correlation_by_what_differs_in_it():
    """Four prompts of two responses and one of five: as many contrasts as (1, 1, 1, 1, 4)."""
    prompts = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4])
    better, worse = ranked_pairs(prompts, torch.tensor([0, 1] * 4 + [0, 1, 2, 3, 4]))
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 1.0, 0.0, 5.0, 3.0, 4.0, 1.0, 2.0])
    pairs = ScoredPairs(scores, prompts, better, worse, accuracy_of(scores[better], scores[worse]))
    within = follows(pairs, torch.arange(13))["correlation_within"]
    assert (within["low"], within["high"]) == pytest.approx(correlation_interval(within["value"], 8**2 / 20))


def test_what_there_is_no_pair_of_is_not_known():
    found = follows(pairs_of([(2, 1), (1, 2)]), torch.tensor([5, 5, 7, 7]))
    assert found["chosen_more"] == {"accuracy": None, "low": None, "high": None, "pairs": 0, "effective_rows": 0.0}
    assert found["labels_choose_more"]["share"] is None
    assert (found["correlation_within"]["value"], found["correlation_within"]["low"]) == (0.0, -1.0)


def made_up(seed=0, pairs=200, *, by_length=0.0, by_quality=0.0, longer_is_chosen=0.5):
    """The audit of a score = by_length * tokens + by_quality * (it is the better one) + noise."""
    generator = torch.Generator().manual_seed(seed)
    long, short = (
        torch.randint(30, 60, (pairs,), generator=generator),
        torch.randint(10, 30, (pairs,), generator=generator),
    )
    like = torch.arange(pairs) % 4 == 0
    short = torch.where(like, long - 1, short)
    first = torch.rand(pairs, generator=generator) < longer_is_chosen
    lengths = torch.stack([torch.where(first, long, short), torch.where(first, short, long)], dim=1).flatten()
    better = torch.tensor([1.0, 0.0] * pairs)
    noise = torch.randn(2 * pairs, generator=generator)
    scores = by_length * lengths + by_quality * better + noise
    return follows(pairs_of(scores.tolist()), lengths, tolerance=0.1)


@pytest.mark.parametrize(
    ("score", "verdict"),
    [
        ({"by_quality": 3.0}, "the score does not follow length"),
        ({"by_length": 1.0}, "the score is explained by length, the longer response scoring higher"),
        ({"by_length": -1.0}, "the score is explained by length, the shorter response scoring higher"),
        ({"by_length": 0.1, "by_quality": 3.0}, "the score leans to the longer response and says more than length"),
        ({"by_length": -0.1, "by_quality": 3.0}, "the score leans to the shorter response and says more than length"),
        ({"by_length": 1.0, "longer_is_chosen": 0.9}, "the score is explained by length, the longer response"),
        ({"by_length": -1.0, "longer_is_chosen": 0.1}, "the score is explained by length, the shorter response"),
        (
            {"by_length": 1.0, "pairs": 16, "longer_is_chosen": 1.0},
            "the score follows length, to the longer response, and too few pairs say",
        ),
    ],
)
def test_the_verdict_names_the_direction_of_either_bias(score, verdict):
    said = length_verdict(made_up(**score))
    assert said.startswith(verdict), said
    assert "pairs of like length" in said


def test_a_score_without_length_is_as_often_right_whichever_is_longer():
    found = made_up(by_quality=2.0, pairs=2000)
    assert found["chosen_more"]["accuracy"] == pytest.approx(found["chosen_less"]["accuracy"], abs=0.04)
    biased = made_up(by_quality=2.0, by_length=0.1, pairs=2000)
    assert biased["chosen_more"]["accuracy"] > biased["chosen_less"]["accuracy"] + 0.3


def test_groups_that_a_prompt_shares_worked_by_hand():
    pairs = pairs_of([(3, 1), (5, 3), (10, 12), (10, 12)])
    found = by_group(
        pairs, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), ["law", "talk"], {"law": {"accuracy": 1.0, "pairs": 2}}
    )
    # means 3 and 11 around 7: 16 each, of a mean square of (16 + 36 + 4 + 16 + 9 + 25 + 9 + 25) / 8
    assert found["variance_share"] == pytest.approx(16 / (140 / 8))
    law = found["groups"]["law"]
    assert (law["score_mean"], law["responses"], law["accuracy"], law["pairs"]) == (3.0, 4, 1.0, 2)
    half = 1.959963984540054 * math.sqrt(2) / math.sqrt(2)  # two prompts with means 2 and 4
    assert (law["score_low"], law["score_high"]) == pytest.approx((3 - half, 3 + half))
    assert "accuracy" not in found["groups"]["talk"] and found["groups"]["talk"]["score_low"] == 11.0


def test_openings_are_the_commonest_first_words():
    letters = {1: "네,", 2: " 좋은", 3: " 말씀", 4: "아니요", 5: " 괜찮"}

    def decode(ids):
        return "".join(letters[number] for number in ids)

    def ranking(*responses):
        rows = tuple(TokenizedResponse("", (9, *each), 1) for each in responses)
        return TokenizedRanking("", rows, tuple(range(len(rows))))

    examples = [ranking((1, 2, 3), (4, 5))] * 10 + [ranking((1, 2), (4, 3))] * 9
    numbers, names = common_openings(examples, decode)
    assert names == ["네, 좋은", "아니요 괜찮"]
    assert numbers == [0, 1] * 10 + [0, -1] * 9, "nine responses are too few for a phrase of their own"


def test_five_openings_get_a_name_and_the_sixth_does_not():
    def ranking(number):
        return TokenizedRanking("", tuple(TokenizedResponse("", (9, number), 1) for _ in range(2)), (0, 1))

    examples = [ranking(number) for number in range(6) for _ in range(11 - number)]  # 22, 20, ... 12 responses
    numbers, names = common_openings(examples, lambda ids: f"글{ids[0]}")
    assert names == ["글0", "글1", "글2", "글3", "글4"]
    assert sorted(set(numbers)) == [-1, 0, 1, 2, 3, 4] and numbers.count(-1) == 12


def rows_of(scores, lengths, openings, sources):
    pairs = len(scores)
    groups = torch.arange(pairs).repeat_interleave(2)
    return ScoredRows(
        scores=torch.tensor(scores, dtype=torch.float32).flatten(),
        groups=groups,
        prompts=groups,
        ranks=torch.tensor([0, 1] * pairs),
        lengths=torch.tensor(lengths).flatten(),
        categories=torch.zeros(2 * pairs, dtype=torch.long),
        sources=torch.tensor(sources).repeat_interleave(2),
        openings=torch.tensor(openings).flatten(),
    )


def test_the_audit_is_part_of_the_metrics_and_is_told(caplog):
    """40 pairs: the score is 1 for one opening and 0 otherwise, and higher by 10 in one of two files."""
    opening = [(0, -1), (-1, 0)] * 20
    sources = [0] * 20 + [1] * 20
    scores = [tuple(float(o == 0) + 10 * s for o in pair) for pair, s in zip(opening, sources, strict=True)]
    rows = rows_of(scores, [(7, 7)] * 40, opening, sources)
    metrics = ranking_metrics(rows, RowNames(["a"], ["one.jsonl", "two.jsonl"], ["네, 그럼요"]))
    audit = metrics["shortcuts"]
    assert (
        metrics["eval_accuracy_like_length"]
        == audit["length"]["matched"]["accuracy"]
        == metrics["eval_accuracy"]
        == 0.5
    )
    assert metrics["eval_score_length_correlation"] == 0.0
    phrase = audit["opening"]["네, 그럼요"]
    assert phrase["correlation_within"]["value"] == pytest.approx(1.0)
    assert (phrase["chosen_more"]["accuracy"], phrase["chosen_less"]["accuracy"]) == (1.0, 0.0)
    assert phrase["matched"]["pairs"] == 0
    source = audit["source"]["groups"]["two.jsonl"]
    assert (source["accuracy"], source["pairs"], source["score_mean"]) == (0.5, 20, 10.5)
    assert list(audit["category"]["groups"]) == ["a"] and audit["category"]["variance_share"] == 0.0
    with caplog.at_level(logging.INFO, logger="rlhf"):
        log_shortcuts(audit)
        log_shortcuts(None)
    told = caplog.messages
    assert told[0].startswith("reward: the score does not follow length")
    assert told[1].startswith(
        "reward: responses that open with '네, 그럼요' score higher: correlation within prompts +1.00"
    )
    assert told[2] == "reward: the source explains 99% of the scores' variance" and len(told) == 3
