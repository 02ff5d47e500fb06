"""What of a history is kept, and what checks ask of it."""

import math

import pytest

from rlhf.doctor.history import bad_end, best_evaluation, condensed, correlation, lasting, mean_value, series


def evaluation(step, loss):
    return {"step": step, "eval_loss": loss}


def test_the_ends_of_training_and_of_evaluation_are_kept_and_the_best():
    """Six lines and 24 of each kind; the best evaluation is one of the middle."""
    lines = [{"step": step, "loss": 1.0} if step % 2 else evaluation(step, abs(step - 30)) for step in range(160)]
    assert [line["step"] for line in condensed(lines)] == [*range(12), 30, *range(112, 160)]
    assert condensed(lines[:60]) == lines[:60]
    assert [line["step"] for line in condensed(lines[1::2])] == [*range(1, 12, 2), *range(113, 160, 2)]


def test_the_best_evaluation_is_the_first_with_the_lowest_loss_after_training_began():
    lines = [evaluation(0, 0.1), evaluation(1, 0.7), evaluation(2, 0.5), evaluation(3, 0.5), evaluation(4, math.nan)]
    assert best_evaluation(lines) is lines[2]
    assert best_evaluation(lines[:2]) is lines[1]
    assert best_evaluation([lines[0], lines[4], {"step": 5, "loss": 0.0}]) is None


def test_a_run_of_bad_lines_is_that_at_the_end():
    points = series(
        [{"step": 1, "x": 5}, {"step": 2}, {"step": 3, "x": 1}, {"step": 4, "x": 7}, {"step": 6, "x": 8}], "x"
    )
    assert points == [(1, 5.0), (3, 1.0), (4, 7.0), (6, 8.0)] and mean_value(points) == 5.25
    assert bad_end(points, lambda value: value > 4) == points[2:]
    assert bad_end(points, lambda value: value > 0) == points and bad_end(points, lambda value: value < 8) == []
    for lines, expected in ((2, [(4, 6, "8.0", 4.0)]), (3, [])):
        found = lasting("repetition", points, lambda value: value > 4, lines, "warning", str, lambda value: value / 2)
        assert [(one.since, one.step, one.message, one.badness) for one in found] == expected


@pytest.mark.parametrize(("first", "second", "expected"), [
    ([1.0, 2.0], [3.0, 1.0], -1.0), ([1.0, 1.0], [1.0, 2.0], 0.0), ([1.0, 2.0], [1.0, 1.0], 0.0), ([], [], 0.0),
    ([1.0, math.inf], [1.0, 2.0], 0.0), ([1.0, 2.0], [math.nan, 2.0], 0.0),
])  # fmt: skip
def test_what_does_not_vary_or_is_not_finite_correlates_with_nothing(first, second, expected):
    assert correlation(first, second) == pytest.approx(expected)
