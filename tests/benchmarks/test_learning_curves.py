"""What the learning benchmark reads from its curves, against values worked out by hand."""

import importlib
import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture()
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("learning_curves")


def points(kls, golds, scores=None):
    scores = golds if scores is None else scores
    return [
        {"iteration": 4 * place, "seconds": 10.0 * place, "kl": kl, "gold": gold, "score": score}
        for place, (kl, gold, score) in enumerate(zip(kls, golds, scores, strict=True))
    ]


def test_a_value_is_read_where_it_is_first_reached(curves):
    curve = points([0, 1, 4, 2, 9], [0.5, 0.7, 0.6, 0.8, 0.4])
    assert curves.at_first(curve, "gold", 0.6, "seconds") == pytest.approx(5.0)  # half way up the first piece
    assert curves.at_first(curve, "gold", 0.75, "seconds") == pytest.approx(27.5)  # three quarters of the third piece
    assert curves.at_first(curve, "kl", 9, "gold") == 0.4
    assert curves.at_first(curve, "gold", 0.5, "seconds") == 0.0
    assert curves.at_first(curve, "gold", 0.81, "seconds") is None


def test_curves_are_compared_at_the_distances_that_both_reach(curves):
    ours = points([0, 1, 4], [0.5, 0.7, 0.9])  # gold = 0.5 + 0.2 d, up to d = 2
    peer = points([0, 9], [0.5, 0.8])  # gold = 0.5 + 0.1 d, up to d = 3
    found = curves.equal_kl(ours, peer, places=4)  # d = 0.5, 1, 1.5, 2: differences 0.05, 0.1, 0.15, 0.2
    assert found == pytest.approx({"kl": 4.0, "mean": 0.125, "lowest": 0.05, "last": 0.2})
    back = curves.equal_kl(peer, ours, places=4)
    assert back == pytest.approx({"kl": 4.0, "mean": -0.125, "lowest": -0.2, "last": -0.2})


def test_a_curve_that_came_back_counts_with_where_it_came_back_to(curves):
    far = curves.with_distance(points([0, 9, 1, 4], [0.5, 0.6, 0.8, 0.7]))
    assert curves.best_within(far, 1.0) == 0.8
    assert curves.best_within(far, 3.0) == 0.8, "more KL may be had and need not be used"
    # to d = 0.5: a sixth of the first piece; to d = 2 the best is the point at d = 1
    assert curves.best_within(far, 0.5) == pytest.approx(0.5 + 0.1 / 6)
    falling = curves.with_distance(points([0, 9, 4], [0.5, 0.9, 0.6]))
    # at d = 2.5 on the way out 0.5 + 0.4 * 2.5 / 3, on the way back half of 0.9 and 0.6
    assert curves.best_within(falling, 2.5) == pytest.approx(0.5 + 1.0 / 3)


def test_straight_lines_are_in_the_root_of_the_kl(curves):
    bent = points([0, 4], [0.5, 0.9])
    same = points([0, 1, 4], [0.5, 0.7, 0.9])  # at d = 1 half of the way; in the KL itself it would be a quarter
    assert curves.equal_kl(bent, same, places=2)["mean"] == pytest.approx(0.0)


def test_an_estimate_of_the_kl_below_zero_is_no_distance(curves):
    assert [point["d"] for point in curves.with_distance(points([-2e-6, 0.25], [0.5, 0.6]))] == [0.0, 0.5]


def test_gold_turns_where_it_falls_while_the_score_rises(curves):
    kls = [0, 1, 2, 3, 4, 5, 6]
    golds = [0.70, 0.74, 0.80, 0.80, 0.80, 0.74, 0.74]
    rising, falling = [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 2, 1, 0]
    found = curves.turning_point(points(kls, golds, rising))
    assert found["turned"] and found["peak"] == pytest.approx({"gold": 0.80, "score": 3, "iteration": 12, "kl": 3})
    assert found["end"] == pytest.approx({"gold": 0.76, "score": 5, "iteration": 20, "kl": 5})
    assert not curves.turning_point(points(kls, golds, falling))["turned"], "the score fell too: no over-optimisation"
    assert not curves.turning_point(points(kls, golds, rising), fall=0.05)["turned"]
    assert not curves.turning_point(points(kls, [0.7, 0.71, 0.72, 0.73, 0.74, 0.75, 0.76], rising))["turned"]


@pytest.mark.parametrize("form", ["rl", "bon"])
def test_the_fit_finds_the_numbers_it_was_made_of(curves, form):
    alpha, beta = 0.12, 0.04
    bend = math.log if form == "rl" else float
    distances = [0.5, 1.0, 1.5, 2.0, 4.0, 6.0]
    golds = [0.7 + d * (alpha - beta * bend(d)) for d in distances]
    fit = curves.fit_overoptimisation(points([0, *(d * d for d in distances)], [0.7, *golds]), form)
    assert (fit["alpha"], fit["beta"], fit["r2"]) == pytest.approx((alpha, beta, 1.0))
    # the slope alpha - beta log d - beta is 0 at d = e^2; alpha - 2 beta d at d = 1.5
    assert fit["peak_kl"] == pytest.approx(math.e**4 if form == "rl" else 2.25)


def test_a_fit_that_never_turns_says_so_and_two_points_are_too_few(curves):
    rising = points([0, 1, 4, 9], [0.5, 0.6, 0.8, 1.1])
    assert curves.fit_overoptimisation(rising, "bon")["peak_kl"] == math.inf
    assert curves.fit_overoptimisation(points([0, 1, -1e-6, 4], [0.5, 0.6, 0.6, 0.7]), "rl") is None
