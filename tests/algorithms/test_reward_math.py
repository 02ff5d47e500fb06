"""The reward model's losses and metrics against brute force, tables worked by hand, and TRL's own loss."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlhf.algorithms import ranking_losses
from rlhf.algorithms.ranking_losses import ranked_pairs, ranking_loss
from rlhf.algorithms.ranking_metrics import (
    RowNames,
    ScoredRows,
    accuracy_of,
    calibration,
    certainty,
    histogram,
    prompt_numbers,
    ranking_metrics,
)
from rlhf.config import ConfigError
from rlhf.numerics.intervals import effective_number, paired_interval, wilson_interval
from rlhf.types import TokenizedRanking, TokenizedResponse

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
RANKS = torch.tensor([2, 0, 0, 1, 1, 0, 0, 0, 0, 0, 5])  # ties at the top of 0; 2 is nothing but ties


def case(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(11, generator=generator, dtype=torch.float64) * 2
    margins = torch.rand(4, generator=generator, dtype=torch.float64)[GROUPS]
    return scores, margins


def brute_force_loss(scores, margins, centering_coef):
    """Plain Python: for every prompt the mean over its ordered pairs, then the sum over prompts."""
    scores, margins, groups, ranks = scores.tolist(), margins.tolist(), GROUPS.tolist(), RANKS.tolist()
    total = 0.0
    for prompt in set(groups):
        rows = [index for index, group in enumerate(groups) if group == prompt]
        terms = []
        for better in rows:
            for worse in rows:
                if ranks[better] < ranks[worse]:
                    gap = scores[better] - scores[worse] - margins[better]
                    terms.append(math.log1p(math.exp(-gap)) + centering_coef * (scores[better] + scores[worse]) ** 2)
        if terms:
            total += sum(terms) / len(terms)
    return total


@pytest.mark.parametrize("centering_coef", [0.0, 0.01])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_loss_with_ties_against_a_double_loop(seed, centering_coef):
    scores, margins = case(seed)
    found = ranking_loss(scores, GROUPS, RANKS, margins, centering_coef=centering_coef)
    assert found.item() == pytest.approx(brute_force_loss(scores, margins, centering_coef), rel=1e-12)


def test_every_prompt_weighs_the_same_however_many_candidates_it_has():
    """At equal scores the best of K = 4 and the best of K = 2 are pulled up alike, by 1/2."""
    groups, ranks = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1, 1, 1, 0, 1])
    scores = torch.zeros(6, requires_grad=True)
    ranking_loss(scores, groups, ranks, torch.zeros(6)).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([-1 / 2, 1 / 6, 1 / 6, 1 / 6, -1 / 2, 1 / 2]))


def test_one_pair_alone_teaches():
    """A micro-batch may hold a single pair; at equal scores it is pulled apart by 1/2."""
    scores = torch.zeros(2, requires_grad=True)
    ranking_loss(scores, torch.tensor([0, 0]), torch.tensor([1, 0]), torch.zeros(2)).backward()
    assert scores.grad.tolist() == [0.5, -0.5]


def test_a_ranking_of_ties_alone_teaches_nothing():
    scores = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = ranking_loss(scores, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0, 0, 0]


def test_two_candidates_are_the_pairwise_loss_worked_by_hand():
    """-log sigmoid(chosen - rejected - margin), summed over prompts."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = (torch.randn(5, generator=generator) for _ in range(3))
    scores = torch.stack([rejected, chosen], dim=1).flatten()
    groups, ranks = torch.arange(5).repeat_interleave(2), torch.tensor([1, 0] * 5)
    total = ranking_loss(scores, groups, ranks, margins.repeat_interleave(2))
    expected = sum(
        math.log1p(math.exp(-(a - b - m)))
        for a, b, m in zip(chosen.tolist(), rejected.tolist(), margins.tolist(), strict=True)
    )
    assert total.item() == pytest.approx(expected, rel=1e-6)


def trl_reward_loss(chosen, rejected, margins, center_rewards_coefficient):
    """What TRL's RewardTrainer computes from these scores, with everything around the formula left out."""
    from trl import RewardTrainer

    logits = torch.cat([chosen, rejected]).unsqueeze(1)

    def model(**inputs):
        return SimpleNamespace(logits=logits)

    model.training = False
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient),
        accelerator=SimpleNamespace(gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    return RewardTrainer.compute_loss(trainer, model, {"margin": margins})


@pytest.mark.parametrize("centering_coef", [None, 0.01, 1.0])
def test_margin_and_centering_agree_with_trl(centering_coef):
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    margins = torch.rand(6, generator=generator)
    scores = torch.stack([chosen, rejected], dim=1).flatten()
    groups, ranks = torch.arange(6).repeat_interleave(2), torch.tensor([0, 1] * 6)
    ours = ranking_loss(scores, groups, ranks, margins.repeat_interleave(2), centering_coef=centering_coef or 0.0) / 6
    torch.testing.assert_close(ours, trl_reward_loss(chosen, rejected, margins, centering_coef))


def test_ranked_pairs_are_those_of_a_double_loop():
    better, worse = ranked_pairs(GROUPS, RANKS)
    expected = {
        (i, j) for i, j in itertools.permutations(range(11), 2) if GROUPS[i] == GROUPS[j] and RANKS[i] < RANKS[j]
    }
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == expected
    assert len(better) == len(expected) == 5 + 1 + 0 + 1


def test_accuracy_counts_a_tie_as_half():
    assert accuracy_of(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]


def test_metrics_of_three_pairs_worked_by_hand():
    """Pairs (better, worse): (3, 1) of category a; (0, 2) and (1, 1) of category b."""
    rows = ScoredRows(
        scores=torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 1.0]),
        groups=torch.tensor([4, 4, 7, 7, 9, 9]),
        prompts=torch.tensor([0, 0, 1, 1, 2, 2]),
        ranks=torch.tensor([0, 1, 0, 1, 0, 1]),
        lengths=torch.tensor([5.0, 9.0, 8.0, 3.0, 6.0, 6.0]),
        categories=torch.tensor([0, 0, 1, 1, 1, 1]),
        sources=torch.tensor([0, 0, 0, 0, 1, 1]),
        openings=torch.tensor([0, -1, -1, -1, 0, 0]),
    )
    metrics = ranking_metrics(rows, RowNames(["a", "b", "unused"], ["one.jsonl", "two.jsonl"], ["네, 그럼요"]))
    loss = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)) + math.log(2)) / 3
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(0.5)
    assert metrics["eval_margin"] == pytest.approx(0.0)
    assert metrics["eval_length_baseline_accuracy"] == pytest.approx(0.5)  # shorter, longer, equal
    assert metrics["eval_score_mean"] == pytest.approx(8 / 6)
    assert metrics["eval_score_std"] == pytest.approx(math.sqrt(16 / 6 - (8 / 6) ** 2))
    assert (metrics["eval_rows"], metrics["eval_pairs"]) == (3, 3)
    assert (metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]) == wilson_interval(0.5, 3)
    assert metrics["eval_shortcut_accuracy"] == 0.5 and metrics["eval_over_shortcut"] == 0.0
    # beside choosing the longer one the model is right, wrong, and as undecided: 1, -1, 0
    expected = paired_interval(torch.tensor([1.0, -1.0, 0.0]), torch.ones(3))
    assert (metrics["eval_over_shortcut_low"], metrics["eval_over_shortcut_high"]) == pytest.approx(expected)
    histograms = {name: entry.pop("histogram") for name, entry in metrics["by_category"].items()}
    assert {name: sum(counts["chosen"]) for name, counts in histograms.items()} == {"a": 1, "b": 2}
    assert metrics["eval_accuracy/a"] == 1.0 and metrics["eval_accuracy/b"] == 0.25
    a, b = (metrics["by_category"][name] for name in ("a", "b"))
    assert (a["accuracy"], a["length_baseline_accuracy"], a["margin"], a["pairs"], a["rows"]) == (1, 0, 2, 1, 1)
    assert (b["accuracy"], b["length_baseline_accuracy"], b["margin"], b["pairs"], b["rows"]) == (0.25, 0.75, -1, 2, 2)
    assert a["shortcut_accuracy"] == 1.0 and a["over_shortcut"] == 0.0, "the shorter response is right in a"
    assert b["shortcut_accuracy"] == 0.75 and b["over_shortcut"] == -0.5
    assert (b["accuracy_low"], b["accuracy_high"]) == wilson_interval(0.25, 2)
    assert sum(metrics["histogram"]["chosen"]) == sum(metrics["histogram"]["rejected"]) == 3


def test_histogram_counts_worked_by_hand():
    found = histogram(torch.tensor([0.0, 0.4, 2.0]), torch.tensor([-2.0, 0.6]), bins=4)
    assert found["edges"] == [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert found["chosen"] == [0, 0, 2, 1] and found["rejected"] == [1, 0, 1, 0]
    same = histogram(torch.tensor([1.0]), torch.tensor([1.0]), bins=2)  # one score: the edges must not coincide
    assert sum(same["chosen"]) == 1 and same["edges"][0] < same["edges"][-1]


def test_rankings_that_are_ties_only_are_refused():
    rows = ScoredRows(
        *(torch.tensor(values) for values in ([1.0, 2.0], [0, 0], [0, 0], [0, 0], [3.0, 4.0], *[[0, 0]] * 3))
    )
    with pytest.raises(ConfigError, match="ties only"):
        ranking_metrics(rows, RowNames(["a"]))


def test_pairs_of_one_prompt_count_as_one_row():
    """Six pairs of two prompts, four and two: what is known is known of two."""
    correct = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.0, 1.0])
    by_length = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5, 0.0])  # choosing the shorter one: 0.75
    found = certainty(correct, by_length, torch.tensor([7, 7, 7, 7, 3, 3]))
    assert found["rows"] == 2 and found["shortcut_accuracy"] == 0.75
    assert found["effective_rows"] == pytest.approx(36 / 20), "one prompt has two thirds of the pairs"
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx(wilson_interval(4.5 / 6, 1.8))
    assert found["over_shortcut"] == pytest.approx(0.0)
    # by prompt: (1 + 1 + 0.5 + 0 - 3) / 4 and (1 + 1 - 1.5) / 2
    expected = paired_interval(torch.tensor([-0.125, 0.25]), torch.tensor([4.0, 2.0]))
    assert (found["over_shortcut_low"], found["over_shortcut_high"]) == pytest.approx(expected)


def test_prompts_of_unlike_many_pairs_hold_the_truth_in_their_interval():
    """30 prompts of one pair and 5 of 45 that are right or wrong together: 35 prompts that tell as much as 6."""
    pairs = torch.tensor([1] * 30 + [45] * 5)
    prompts, held = torch.arange(35).repeat_interleave(pairs), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        right = (torch.rand(35, generator=generator) < 0.7).float()
        found = certainty(right[prompts], torch.ones(len(prompts)), prompts)
        held += found["accuracy_low"] <= 0.7 <= found["accuracy_high"]
    assert effective_number(pairs) == pytest.approx(255**2 / (30 + 5 * 45**2))
    assert held / 500 >= 0.9


def test_rankings_of_one_prompt_share_a_number():
    def ranking(prompt, *candidates):
        rows = tuple(TokenizedResponse("", (*prompt, *each), len(prompt)) for each in candidates)
        return TokenizedRanking("", rows, tuple(range(len(rows))))

    rankings = [ranking((1, 2), (3,), (4,)), ranking((1,), (2, 3), (4,)), ranking((1, 2), (5, 6), (3,), (9,))]
    assert prompt_numbers(rankings).tolist() == [0, 1, 0]


def test_calibration_is_accuracy_against_confidence():
    """Margins whose confidences are 0.52, 0.54 (one bin), 0.77 and 0.99; right, wrong, right, a tie's half."""
    sure = torch.tensor([0.52, 0.54, 0.77, 0.99], dtype=torch.float64)
    margin = torch.log(sure / (1 - sure)) * torch.tensor([1, -1, 1, 1])
    found = calibration(margin, torch.tensor([1.0, 0.0, 1.0, 0.5]))
    assert [each["pairs"] for each in found["bins"]] == [2, 1, 1]
    assert [each["confidence"] for each in found["bins"]] == pytest.approx([0.53, 0.77, 0.99])
    assert [each["accuracy"] for each in found["bins"]] == pytest.approx([0.5, 1.0, 0.5])
    assert found["error"] == pytest.approx((2 * 0.03 + 0.23 + 0.49) / 4)
    certain = calibration(torch.tensor([1e4, 0.0]), torch.tensor([1.0, 0.5]))
    assert [each["pairs"] for each in certain["bins"]] == [1, 1] and certain["error"] == pytest.approx(0.0)


def test_pairs_of_many_candidates_are_those_of_all_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(1, 6, (40,), generator=generator)
    groups = torch.arange(40).repeat_interleave(sizes)
    ranks = torch.randint(0, 3, (len(groups),), generator=generator)
    expected = ranked_pairs(groups, ranks)
    for limit in (1, 7, 30):
        monkeypatch.setattr(ranking_losses, "COMPARED_AT_ONCE", limit)
        found = ranked_pairs(groups, ranks)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        mixed = torch.randperm(len(groups), generator=generator)
        assert len(ranked_pairs(groups[mixed], ranks[mixed])[0]) == len(expected[0])
