"""Locally weighted regression against a plain double loop, curves that are known, and a table worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from rlhf.numerics.local_regression import ROBUST_PASSES, Curve, local_regression, within_groups


def plain_loop(x, y, places, span):
    """Cleveland 1979, a place at a time, each line fitted by numpy."""
    x, y, robust = np.array(x, float), np.array(y, float), np.ones(len(x))
    for _ in range(ROBUST_PASSES + 1):
        fitted = []
        for place in places:
            distance = np.abs(x - place)
            reach = np.sort(distance)[math.ceil(span * len(x)) - 1]
            weight = np.where(distance < reach, (1 - (distance / reach) ** 3) ** 3, 0) * robust
            slope, start = np.polyfit(x, y, 1, w=np.sqrt(weight))
            fitted.append(start + slope * place)
        residual = np.abs(y - np.interp(x, places, fitted))
        ordered = np.sort(residual)
        scale = 6 * ordered[(len(x) - 1) // 2]
        robust = np.where(residual < scale, (1 - (residual / scale) ** 2) ** 2, 0)
    return fitted


@pytest.mark.parametrize("span", [0.3, 0.667, 1.0])
def test_against_a_plain_loop_with_noise_and_outliers(span):
    generator = torch.Generator().manual_seed(int(span * 10))
    x = torch.rand(120, generator=generator) * 50 + 5
    y = torch.sin(x / 8) + 0.1 * torch.randn(120, generator=generator)
    y[::15] += 6
    curve = local_regression(x, y, span=span)
    assert len(curve.places) == 33 and curve.places[0] == pytest.approx(float(x.min()))
    assert curve.values == pytest.approx(plain_loop(x.tolist(), y.tolist(), curve.places, span), abs=1e-6)


@pytest.mark.parametrize("slope", [-0.3, 0.0, 2.0])
def test_a_line_is_found_exactly_whatever_the_ties(slope):
    x = torch.randint(1, 12, (200,), generator=torch.Generator().manual_seed(1))
    curve = local_regression(x, 3 + slope * x, span=0.4)
    assert curve.at(torch.arange(1, 12)).tolist() == pytest.approx([3 + slope * n for n in range(1, 12)], abs=1e-5)


def test_outliers_do_not_bend_the_curve():
    x = torch.arange(100.0)
    y = 0.1 * x + 0.02 * torch.sin(3 * x)
    y[50] = 15.0
    assert local_regression(x, y, span=0.3).at(torch.tensor([50.0])).item() == pytest.approx(5.0, abs=0.02)


def test_one_length_alone_has_the_mean():
    curve = local_regression(torch.full((5,), 7), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), span=0.5)
    assert curve.at(torch.tensor([3, 7, 90])).tolist() == pytest.approx([3.0] * 3)


def test_two_lengths_of_which_one_is_rare():
    x = torch.tensor([5] * 20 + [9] * 2)
    curve = local_regression(x, torch.tensor([1.0] * 20 + [4.0] * 2), span=0.5)
    assert all(math.isfinite(value) for value in curve.values)
    assert curve.at(torch.tensor([5])).item() == pytest.approx(1.0)


def test_between_the_places_it_is_straight_and_beyond_them_constant():
    curve = Curve((2.0, 4.0, 8.0), (1.0, 3.0, -1.0))
    where = torch.tensor([[0, 2, 3], [4, 7, 99]])
    assert curve.at(where).tolist() == [[1.0, 1.0, 2.0], [3.0, 0.0, -1.0]]
    assert curve.divided(2.0).at(where).tolist() == [[0.5, 0.5, 1.0], [1.5, 0.0, -0.5]]
    assert Curve.read(json.loads(json.dumps(curve.content()))) == curve


@pytest.mark.parametrize(
    "content",
    [{}, {"places": [1.0], "values": []}, {"places": [2, 1], "values": [0, 0]}, {"places": [1], "values": [math.nan]}],
)
def test_what_is_no_curve_is_refused(content):
    with pytest.raises(ValueError, match="ascending `places`"):
        Curve.read(content)


@pytest.mark.parametrize(("points", "span"), [(0, 0.5), (3, 0.0), (3, 1.5)])
def test_nothing_to_fit_is_an_error(points, span):
    with pytest.raises(ValueError, match="needs points, and a span"):
        local_regression(torch.ones(points), torch.ones(points), span=span)


def centred(values, groups):
    """Values less the mean of their group."""
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, values.double())
    return values.double() - (sums / torch.bincount(groups))[groups]


@pytest.mark.parametrize("slope", [0.05, -0.05])
def test_what_differs_between_groups_is_no_part_of_the_curve_within_them(slope):
    """Groups with larger x have the lower level, so that over all points y hardly follows x at all."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.arange(300).repeat_interleave(3)
    level = 10 * torch.randn(300, generator=generator)
    x = 60 + level[groups] + 10 * torch.randn(900, generator=generator)
    y = slope * x - 2 * slope * level[groups] + 0.1 * torch.randn(900, generator=generator)

    def left(curve):
        pair = torch.stack([centred(x, groups), centred(y - curve.at(x), groups)])
        return float(torch.corrcoef(pair)[0, 1])

    assert abs(left(local_regression(x, y, span=0.667))) > 0.7
    curve = within_groups(x, y, groups, span=0.667)
    assert abs(left(curve)) < 0.1
    ends = curve.at(torch.tensor([45.0, 75.0]))
    assert float(ends[1] - ends[0]) == pytest.approx(30 * slope, rel=0.1)


def test_in_groups_that_are_alike_it_is_the_curve_over_all():
    x = torch.arange(40.0).repeat(2)
    y = torch.sin(x / 9)
    groups = torch.arange(2).repeat_interleave(40)
    plain = local_regression(x, y, span=0.4)
    assert within_groups(x, y, groups, span=0.4).values == pytest.approx(plain.values, abs=1e-6)
