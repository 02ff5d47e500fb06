"""How far a held-out score has risen, prompt by prompt."""

import math

import pytest

from rlhf.training.on_policy import score_gain


def test_the_gain_and_its_error_are_those_of_the_differences_by_prompt():
    """Prompts that are far apart and all rise by about 1: the error is that of the rises, not of the scores."""
    before, after = [-5.0, 0.0, 5.0, 10.0], [-4.0, 1.5, 5.5, 11.0]
    found = score_gain({"prompt_scores": before}, {"prompt_scores": after})
    assert found["score_gain"] == pytest.approx(1.0)
    assert found["score_gain_error"] == pytest.approx(math.sqrt((0 + 0.25 + 0.25 + 0) / 3) / 2)


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_without_two_prompts_nothing_is_said(scores):
    assert score_gain({"prompt_scores": scores}, {"prompt_scores": scores}) == {}
    assert score_gain({"rows": 0.0}, {"rows": 0.0}) == {}
