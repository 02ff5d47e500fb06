"""rlhf.numerics.statistics against tables worked by hand, closed forms, and torch in float64."""

import math

import pytest
import torch
from trl.trainer.utils import entropy_from_logits as trl_entropy
from trl.trainer.utils import selective_log_softmax

from rlhf.numerics.logprobs import entropy_from_logits, estimate_kl, logprobs_from_logits
from rlhf.numerics.statistics import (
    correlation_ratio,
    last_true,
    masked_mean,
    masked_sum,
    masked_variance,
    masked_whiten,
    score_last,
    without_group_means,
)

MASK = torch.tensor([[True, True, False], [True, False, False]])
VALUES = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -1e30]])


def test_masked_statistics_of_1_2_and_6_worked_by_hand():
    assert masked_sum(VALUES, MASK) == 9
    assert masked_mean(VALUES, MASK) == 3
    assert masked_variance(VALUES, MASK).item() == pytest.approx(14 / 3)  # population: (4 + 1 + 9) / 3


def test_masked_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="empty mask"):
        masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))


def test_whitened_values_worked_by_hand():
    scale = (14 / 3) ** -0.5
    expected = torch.tensor([[-2 * scale, -scale, 0.0], [3 * scale, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(VALUES, MASK), expected)
    expected_with_mean = torch.where(MASK, expected + 3, torch.zeros(()))
    torch.testing.assert_close(masked_whiten(VALUES, MASK, shift_mean=False), expected_with_mean)


def test_whitening_constant_values_gives_zeros_not_nan():
    values = torch.full((2, 3), 4.0)
    assert torch.equal(masked_whiten(values, MASK), torch.zeros(2, 3))


def test_logprobs_agree_with_trl_and_leave_the_logits_alone():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    torch.testing.assert_close(logprobs_from_logits(logits, ids), selective_log_softmax(logits, ids))
    torch.testing.assert_close(logprobs_from_logits(logits, ids, 0.7), selective_log_softmax(logits / 0.7, ids))
    assert torch.equal(logits, before)


def test_entropy_agrees_with_trl_and_with_the_uniform_distribution():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(entropy_from_logits(logits), trl_entropy(logits))
    torch.testing.assert_close(entropy_from_logits(logits, 2.0), trl_entropy(logits / 2))
    assert entropy_from_logits(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("actor", [(0.5, 0.3, 0.2), (0.1, 0.1, 0.8)])
def test_kl_estimators_expectation_against_the_closed_form_sign_included(actor):
    """The expectation under the actor is a finite sum over the vocabulary, so nothing here is random."""
    actor, reference = torch.tensor(actor).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (actor * (actor / reference).log()).sum()
    other_way = (reference * (reference / actor).log()).sum()
    assert abs(exact - other_way) > 1e-3  # or the test could not tell KL(actor||ref) from KL(ref||actor)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((actor * estimate_kl(actor.log(), reference.log(), estimator)).sum(), exact)
    squared = (actor * 0.5 * (actor / reference).log() ** 2).sum()
    torch.testing.assert_close((actor * estimate_kl(actor.log(), reference.log(), "k2")).sum(), squared)


def test_kl_estimators_of_one_token_worked_by_hand():
    logprob, ref_logprob = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert estimate_kl(logprob, ref_logprob, "k1").item() == pytest.approx(math.log(2))
    assert estimate_kl(ref_logprob, logprob, "k1").item() == pytest.approx(-math.log(2))
    assert estimate_kl(logprob, ref_logprob, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert estimate_kl(logprob, ref_logprob, "k3").item() == pytest.approx(0.5 - 1 + math.log(2))
    assert estimate_kl(ref_logprob, logprob, "k3").item() == pytest.approx(2 - 1 - math.log(2))


def test_an_unknown_kl_estimator_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="k4.*k1, k2, k3"):
        estimate_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_last_true_also_with_holes_and_with_padding_on_either_side():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert last_true(mask).tolist() == [1, 2, 3, 2, 0]


def test_score_last_reads_the_last_real_token_of_each_row():
    values = torch.arange(12.0).reshape(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    assert score_last(values, mask).tolist() == [1.0, 7.0, 10.0]


def test_group_means_are_taken_off_and_what_they_explain_worked_by_hand():
    values, groups = torch.tensor([1.0, 3.0, 10.0, 14.0, 12.0]), torch.tensor([0, 0, 1, 1, 1])
    assert without_group_means(values, groups).tolist() == [-1.0, 1.0, -2.0, 2.0, 0.0]
    # mean 8: 49 + 25 + 4 + 36 + 16 = 130 in all, of which 1 + 1 + 4 + 4 within the groups
    assert correlation_ratio(values, groups) == pytest.approx(120 / 130)
    assert correlation_ratio(torch.ones(3), torch.tensor([0, 1, 1])) == 0.0
