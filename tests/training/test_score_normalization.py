"""Scores of single rewards brought to mean 0 and variance 1."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf.config import ConfigError
from rlhf.rewards.reward import RewardPart
from rlhf.rewards.table import NO_SOURCES, RewardSpec, build_reward, reward_parts
from rlhf.training.score_normalization import Moments, ScoreNormalization
from rlhf.types import RewardOutput
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)


def test_moments_of_parts_are_those_of_all():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1000
    moments = Moments()
    for part in values.split([1, 7, 30, 12]):
        moments = moments.with_more(part)
    expected = (values - values.mean()) / values.std(unbiased=False)
    torch.testing.assert_close(moments.normalized(values), expected, atol=1e-9, rtol=0)
    assert moments.count == 50


def test_scores_that_are_all_the_same_become_0():
    assert Moments().with_more(torch.full((4,), 2.5)).normalized(torch.full((4,), 2.5)).tolist() == [0.0] * 4


def normalized(kind: str) -> tuple[ScoreNormalization, list[list[float]]]:
    """Two parts of which b (weight 2) is normalised, over an evaluation, two rollouts and an evaluation."""
    made = ScoreNormalization([RewardPart("a", 1.0), RewardPart("b", 2.0, kind)])
    found = []
    for values, evaluation in (([1.0, 3.0], True), ([5.0, 7.0], False), ([9.0, 11.0], False), ([1.0, 3.0], True)):
        parts = torch.tensor([[10.0, values[0]], [20.0, values[1]]])
        total = parts[:, 0] + 2 * parts[:, 1]
        found.append(made.apply(total, parts, ["a", "b"], evaluation=evaluation).tolist())
    return made, found


def test_fixed_keeps_the_moments_of_the_first_responses():
    """Mean 2 and deviation 1."""
    made, found = normalized("fixed")
    assert found == [[8.0, 22.0], [16.0, 30.0], [24.0, 38.0], [8.0, 22.0]]


def test_running_knows_all_rollouts_and_evaluations_keep_the_first():
    """[1, 3, 5, 7]: mean 4, variance 5; [1, 3, 5, 7, 9, 11]: mean 6, variance 35 / 3."""
    made, found = normalized("running")
    assert found[0] == found[3] == [8.0, 22.0]
    assert found[1] == pytest.approx([10 + 2 / 5**0.5, 20 + 6 / 5**0.5], abs=1e-5)
    assert found[2] == pytest.approx([10 + 6 / (35 / 3) ** 0.5, 20 + 10 / (35 / 3) ** 0.5], abs=1e-5)
    other = ScoreNormalization(made.parts)
    other.load_state(json.loads(json.dumps(made.state())))
    assert vars(other) == vars(made)


def test_entries_say_how_they_are_normalised():
    specs = [RewardSpec.parse("ends"), RewardSpec.parse('{"name": "ends", "weight": -2, "normalize": "running"}')]
    assert reward_parts(specs) == [RewardPart("ends", 1.0), RewardPart("ends_2", -2.0, "running")]
    assert reward_parts(specs[:1]) == [] and reward_parts(specs[1:]) == [RewardPart("ends", -2.0, "running")]
    assert set(build_reward(specs[1:], NO_SOURCES).rewards) == {"ends"}
    with pytest.raises(ConfigError, match="normalize of ends is 'always'; give running or fixed"):
        RewardSpec.parse('{"name": "ends", "normalize": "always"}')


class Parts:
    """A sum of the length and ten times the first token."""

    training_range = None

    def score(self, responses):
        length, first = responses.rollout.response_mask.sum(1).float(), responses.rollout.response_ids[:, 0].float()
        return RewardOutput(length + 10 * first, None, {"first": first, "length": length})


def test_a_run_normalises_over_whole_rollouts_and_says_how_each_reward_spreads(make_trainer):  # noqa: F811
    trainer = make_trainer(prompts=16, rollout=8, iterations=2)
    worker = trainer.rollouts
    worker.reward = Parts()
    raw = worker.run(trainer.prompts.train[:8], 1)
    worker.normalization = ScoreNormalization([RewardPart("first", 10.0, "running"), RewardPart("length", 1.0)])
    worker.watched_parts = ["first", "length"]
    found = worker.run(trainer.prompts.train[:8], 1)
    first = raw.part_scores[:, 0]
    expected = raw.scores - 10 * first + 10 * (first - first.mean()) / first.std(unbiased=False)
    torch.testing.assert_close(found.scores, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(found.part_scores, raw.part_scores), "the parts stand in the log as the rewards gave them"
    metrics = worker.describe(found)
    assert metrics["score_std/first"] == pytest.approx(float(first.std(unbiased=False)))
    assert worker.state()["normalization"]["all"]["first"][0] == 8
    trainer.fit()
    assert worker.state()["normalization"]["all"]["first"][0] == 8 + 16, "evaluations do not count"
