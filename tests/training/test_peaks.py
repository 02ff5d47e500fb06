"""The best evaluation so far, by measures of three prompts worked out by hand."""

import json
import math

import pytest

from rlhf.training.peaks import Peaks


def evaluation(values, score, reward=0.0, name="gold"):
    return {
        name: sum(values) / len(values), "score": score, "reward": reward, "prompt_measures": {name: list(values)}
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gold", "held_out_score"])
def test_how_far_an_evaluation_is_below_the_best_and_how_sure_that_is(name):
    peaks = Peaks()
    assert peaks.look(0, evaluation([0.25, 0.5, 0.75], 1.0, name=name)) == {}
    assert peaks.look(10, evaluation([0.5, 0.5, 1.0], 2.0, name=name)) == {}
    found = peaks.look(20, evaluation([0.25, 0.5, 0.5], 2.75, name=name))
    falls = [0.25, 0.0, 0.5]
    spread = math.sqrt(sum((fall - 0.25) ** 2 for fall in falls) / 2)
    assert found == pytest.approx(
        {
            f"{name}_fall": 0.25,
            f"{name}_fall_error": spread / math.sqrt(3),
            f"{name}_fall_since": 10.0,
            f"{name}_fall_score": 0.75,
        }
    )
    assert peaks.found[name].since == 1


def test_a_new_best_starts_again_and_one_that_is_as_good_does_not():
    peaks = Peaks()
    peaks.look(0, evaluation([0.5, 0.5], 0.0))
    peaks.look(1, evaluation([0.25, 0.75], 0.0))
    assert (peaks.found["gold"].iteration, peaks.found["gold"].since) == (0, 1)
    peaks.look(2, evaluation([0.5, 0.75], 0.0))
    assert (peaks.found["gold"].iteration, peaks.found["gold"].since) == (2, 0)


def test_what_is_optimised_has_a_peak_and_no_fall():
    peaks = Peaks()
    assert [peaks.look(step, {"score": 0.0, "reward": value}) for step, value in enumerate((1.0, 3.0, 2.0))] == [{}] * 3
    assert (peaks.found["reward"].iteration, peaks.found["reward"].since) == (1, 1)
    assert list(peaks.found) == ["reward"]


def test_one_prompt_has_no_error_and_nothing_is_said():
    peaks = Peaks()
    peaks.look(0, evaluation([1.0], 0.0))
    assert peaks.look(1, evaluation([0.5], 0.0)) == {}
    assert peaks.found["gold"].since == 1


def test_the_state_goes_through_json():
    peaks, again = Peaks(), Peaks()
    peaks.look(0, evaluation([0.5, 0.75], 1.0))
    peaks.look(1, evaluation([0.25, 0.5], 1.0))
    again.load_state(json.loads(json.dumps(peaks.state())))
    lower = evaluation([0.25, 0.25], 2.0)
    assert again.look(2, lower) == peaks.look(2, lower) != {}
    assert again.found == peaks.found
