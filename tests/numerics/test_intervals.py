"""Intervals against their defining equations, the paper's formula cell by cell, and how often they hold the truth."""

import math

import pytest
import torch

from rlhf.numerics.intervals import (
    Z95,
    correlation_interval,
    effective_number,
    paired_interval,
    standard_error,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (2, 2), (1, 4), (75, 116), (106.5, 112), (20, 40), (400, 1000)])
def test_wilson_is_the_solution_of_the_score_equation(right, count):
    """Both ends are shares p under which the measured one is exactly Z95 standard errors *of p* away."""
    share = right / count
    low, high = wilson_interval(share, count)
    for end in (low, high):
        if 1e-12 < end < 1 - 1e-12:
            assert abs(share - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / count), rel=1e-9)
    assert low <= share <= high and (low, high) != (0.0, 1.0)
    assert (low < share or share == 0) and (high > share or share == 1)


def test_wilson_by_hand():
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, Z95**2 / (10 + Z95**2)))  # the rule of three's exact sibling
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="0 rows"):
        wilson_interval(0.5, 0)


@pytest.mark.parametrize(("both", "first", "second", "neither"), [(53, 8, 16, 9), (0, 2, 0, 0), (30, 0, 0, 5)])
def test_paired_interval_is_that_of_the_four_cells(both, first, second, neither):
    """Agresti and Min: half a row added to each cell, then Wald's interval of the difference."""
    differences = torch.tensor([0.0] * (both + neither) + [1.0] * first + [-1.0] * second)
    total, b, c = both + first + second + neither + 2, first + 0.5, second + 0.5
    mean = (b - c) / total
    error = math.sqrt(b + c - (b - c) ** 2 / total) / total
    expected = max(-1.0, mean - Z95 * error), min(1.0, mean + Z95 * error)
    assert paired_interval(differences, torch.ones(len(differences))) == pytest.approx(expected, rel=1e-9)


def test_paired_interval_of_groups_of_one_size_ignores_the_size():
    differences = torch.tensor([1.0, 0.0, -0.5, 0.25, 1.0])
    assert paired_interval(differences, 3 * torch.ones(5)) == pytest.approx(paired_interval(differences, torch.ones(5)))
    with pytest.raises(ValueError, match="no row"):
        paired_interval(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("prompts", [8, 60])
def test_they_hold_the_truth_about_95_times_in_100(prompts):
    """Prompts of one to six pairs; the pairs of one prompt are right or wrong together."""
    generator = torch.Generator().manual_seed(1)
    held = {"wilson": 0, "paired": 0}
    for _ in range(600):
        pairs = torch.randint(1, 7, (prompts,), generator=generator)
        right = (torch.rand(prompts, generator=generator) < 0.7).float()
        rule = torch.where(torch.rand(prompts, generator=generator) < 0.5, right, 1 - right)  # right for 0.5 of them
        low, high = wilson_interval(float(right.mean()), prompts)
        held["wilson"] += low <= 0.7 <= high
        low, high = paired_interval(right - rule, pairs)
        held["paired"] += low <= 0.2 <= high
    assert all(0.92 <= count / 600 <= 0.995 for count in held.values()), held


def test_a_few_large_groups_among_small_ones_hold_the_truth():
    generator, pairs, held = torch.Generator().manual_seed(1), torch.tensor([1] * 30 + [45] * 5), 0
    for _ in range(600):
        right = (torch.rand(35, generator=generator) < 0.7).float()
        rule = torch.where(torch.rand(35, generator=generator) < 0.5, right, 1 - right)  # right for 0.5 of them
        low, high = paired_interval(right - rule, pairs)
        held += low <= 0.2 <= high
    assert 0.92 <= held / 600 <= 0.99


def test_the_effective_number_by_hand():
    assert effective_number(torch.tensor([3, 3, 3])) == pytest.approx(3)
    assert effective_number(torch.tensor([4, 2])) == pytest.approx(36 / 20)


def test_standard_error_by_hand():
    assert standard_error(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3) / 2)
    with pytest.raises(ValueError, match="takes two"):
        standard_error(torch.tensor([1.0]))


def test_the_interval_of_a_correlation_worked_by_hand():
    """Fisher's z of 0.5 is 0.549306; with 28 values the half width is 1.96 / 5."""
    assert correlation_interval(0.5, 28) == pytest.approx(
        (math.tanh(0.549306 - 0.391993), math.tanh(0.549306 + 0.391993)), abs=1e-5
    )
    assert correlation_interval(-0.5, 28) == tuple(-end for end in reversed(correlation_interval(0.5, 28)))
    assert correlation_interval(0.9, 3) == (-1.0, 1.0)
    low, high = correlation_interval(1.0, 50)
    assert 0.999 < low <= high <= 1.0


def test_the_interval_of_a_correlation_holds_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1000):
        first = torch.randn(40, generator=generator)
        second = 0.6 * first + 0.8 * torch.randn(40, generator=generator)
        low, high = correlation_interval(float(torch.corrcoef(torch.stack([first, second]))[0, 1]), 40)
        held += low <= 0.6 <= high
    assert 0.93 <= held / 1000 <= 0.97
