"""The length curve of the first actor's own responses, and what taking it off leaves."""

import dataclasses
import json

import pytest
import torch

from rlhf.algorithms.config import PPOConfig
from rlhf.config import ConfigError
from rlhf.rewards.reward import RewardError
from rlhf.training import rollouts
from rlhf.training.length_calibration import LengthCalibration, within_prompts
from tests.algorithms.test_ppo_checklist import make_trainer  # noqa: F401  (a fixture)


def drawn(prompts=64, copies=4, seed=0):
    """Lengths of `copies` responses to each prompt, prompts that call for longer ones, and a quality of each."""
    generator = torch.Generator().manual_seed(seed)
    usual = torch.randint(5, 90, (prompts,), generator=generator).repeat_interleave(copies)
    tokens = usual + torch.randint(0, 30, (prompts * copies,), generator=generator)
    return tokens, usual, torch.randn(prompts * copies, generator=generator, dtype=torch.float64)


FOLLOWING = {"up": lambda n: 0.1 * n, "down": lambda n: -3 * torch.log(n), "bent": lambda n: (n - 60) ** 2 / 500}


@pytest.mark.parametrize("follows", FOLLOWING.values(), ids=FOLLOWING)
def test_what_follows_length_within_prompts_is_gone_and_the_rest_stays(follows):
    tokens, usual, quality = drawn()
    longing = -0.2 * usual.double()  # prompts that call for longer answers score lower: no part of the curve
    scores = quality + longing + follows(tokens.double())
    found = LengthCalibration.of(scores.float(), tokens, copies=4)
    left = scores - found.curve.at(tokens).double()
    groups = torch.arange(len(tokens)) // 4
    assert found.before == pytest.approx(within_prompts(scores, tokens.double(), groups), abs=1e-6)
    assert abs(found.after) < 0.12 and found.after == pytest.approx(
        within_prompts(left, tokens.double(), groups), abs=1e-6
    )
    assert float(left.mean()) == pytest.approx(0, abs=1e-4), "the first actor's mean score"
    assert torch.corrcoef(torch.stack([left - longing, quality]))[0, 1] > 0.9


def test_a_sharp_turn_at_the_limit_is_followed():
    """Responses that reach the limit do not end, and a reward model that likes that likes it suddenly."""
    tokens, _, quality = drawn()
    tokens = tokens.clamp(max=70)
    scores = 0.1 * quality + 4.0 * (tokens == 70)
    assert (tokens == 70).sum() > 40
    found = LengthCalibration.of(scores, tokens, copies=4)
    jump = found.curve.at(torch.tensor([70])) - found.curve.at(torch.tensor([40]))
    assert float(jump) == pytest.approx(4.0, abs=0.7)


def test_a_constant_score_has_a_flat_curve():
    tokens, _, _ = drawn()
    found = LengthCalibration.of(torch.full((len(tokens),), 2.5), tokens, copies=4)
    assert found.before == found.after == 0 and found.curve.at(tokens).tolist() == pytest.approx([2.5] * len(tokens))


def test_an_evaluation_compares_the_responses_to_one_prompt(make_trainer):  # noqa: F811
    """Scores fall with length from prompt to prompt and rise with it among the responses to each."""
    worker = make_trainer().rollouts
    scored = worker.run([prompt for prompt in make_trainer().prompts.train[:4] for _ in range(2)], 1)
    tokens = torch.tensor([1, 2, 2, 3, 3, 4, 4, 5])
    mask = torch.arange(6) < tokens.unsqueeze(1)
    rollout = dataclasses.replace(scored.rollout, response_mask=mask)
    scores = torch.tensor([9.0, 10, 6, 7, 3, 4, 0, 1])
    made = dataclasses.replace(scored, rollout=rollout, scores=scores)
    assert rollouts.follows_length(made, 2)["score_length_within"] == pytest.approx(1.0)
    assert rollouts.follows_length(made, 1) == {} and rollouts.follows_length(made.rows(slice(0, 6)), 2) == {}


def length_score(rollout, _):
    return 0.5 * rollout.response_mask.sum(1).float()


def test_a_score_that_is_length_says_nothing_any_more(make_trainer):  # noqa: F811
    trainer = make_trainer(
        scorer=length_score, prompts=32, rollout=16, new_tokens=60, actor_eos=7, length_calibration_prompts=32
    )
    plain = trainer.rollouts.run(trainer.prompts.train[:16], 1)
    assert plain.scores.std() > 0.3 and trainer.rollouts.part_names == ()
    trainer.prepare()
    found = trainer.rollouts.run(trainer.prompts.train[:16], 1)
    assert torch.equal(found.rollout.response_ids, plain.rollout.response_ids)
    assert found.scores.std() < 0.15 * plain.scores.std()
    metrics = trainer.rollouts.describe(found)
    assert trainer.rollouts.part_names == ("length_curve",)
    assert metrics["score/length_curve"] == pytest.approx(float((found.scores - plain.scores).mean()), abs=1e-5)


def test_the_curve_is_of_the_first_actor_and_goes_on_with_the_run(make_trainer):  # noqa: F811
    settings = {"scorer": length_score, "prompts": 16, "iterations": 2, "length_calibration_prompts": 16}
    trainer = make_trainer(**settings)
    trainer.fit()
    curves = trainer.rollouts.length_curves
    fresh = make_trainer(**settings)
    fresh.prepare()
    assert fresh.rollouts.length_curves.last == curves.first == curves.last, "not fitted again on the way"
    other = make_trainer(**settings)
    other.load_state(json.loads(json.dumps(trainer.state())), [], {})
    assert vars(other.rollouts.length_curves) == vars(curves)
    off = make_trainer(**{**settings, "length_calibration_prompts": 0})
    off.fit()
    assert off.rollouts.length_curves.last is None
    off.load_state(off.state(), [], {})
    assert off.rollouts.length_curves.first is None


def test_a_curve_that_is_fitted_anew_knows_all_responses_and_evaluations_keep_the_first(make_trainer):  # noqa: F811
    trainer = make_trainer(
        scorer=length_score, prompts=16, rollout=8, iterations=4, new_tokens=60, actor_eos=7, kl_coef=0.0,
        length_calibration_prompts=16, length_calibration_every=2, eval_every_steps=1,
    )  # fmt: skip
    trainer.engine.actor.optimizer.param_groups[0]["lr"] = 0.05
    fitted, scored = [], []
    worker = trainer.rollouts
    calibrate, run = worker.calibrate_length, worker.run
    worker.calibrate_length = lambda *given, **named: fitted.append(trainer.step) or calibrate(*given, **named)
    worker.run = lambda examples, iteration: scored.append((iteration, run(examples, iteration))) or scored[-1][1]
    trainer.fit()
    curves = trainer.rollouts.length_curves
    assert fitted == [0, 2] and len(curves.scores) == len(curves.tokens) == 2 * 16 * 4 and curves.first != curves.last
    raw = [one for iteration, one in scored if iteration == rollouts.CALIBRATION]
    assert curves.scores == [score for one in raw for score in one.scores.tolist()]
    assert curves.scores == pytest.approx([0.5 * tokens for tokens in curves.tokens]), "as the reward gave them"

    def taken_off(one):
        return 0.5 * one.rollout.response_mask.sum(1) - one.scores

    for iteration, one in scored:
        tokens = one.rollout.response_mask.sum(1)
        if iteration in (rollouts.EVALUATION, 1, 2):
            torch.testing.assert_close(taken_off(one), curves.first.at(tokens), atol=1e-5, rtol=0)
        elif iteration in (3, 4):
            torch.testing.assert_close(taken_off(one), curves.last.at(tokens), atol=1e-5, rtol=0)


def test_a_score_that_is_not_finite_is_told_before_a_curve_is_made_of_it(make_trainer):  # noqa: F811
    def broken(rollout, _):
        return length_score(rollout, _) + torch.where(rollout.response_mask.sum(1) > 0, torch.nan, 0.0)

    trainer = make_trainer(scorer=broken, length_calibration_prompts=8)
    with pytest.raises(RewardError, match="gave nan for a response to prompt '.*', the first of 32 of 32 that"):
        trainer.prepare()
    assert trainer.rollouts.length_curves.last is None


def test_with_a_curve_the_score_range_of_the_reward_model_is_forgotten(make_trainer):  # noqa: F811
    """The range is of scores without the curve: holding other scores against it would say nothing."""
    trainer = make_trainer(scorer=length_score, length_calibration_prompts=8)
    trainer.rollouts.reward.training_range = {"minimum": 0.0, "maximum": 1.0, "responses": 500}
    found = trainer.rollouts.run(trainer.prompts.train, 1)
    assert trainer.rollouts.describe(found)["scores_outside_range"] > 0
    trainer.prepare()
    assert "scores_outside_range" not in trainer.rollouts.describe(trainer.rollouts.run(trainer.prompts.train, 1))


def test_fewer_prompts_than_a_curve_needs_are_refused():
    with pytest.raises(ConfigError, match="length_calibration_prompts=-1 must be at least 0"):
        PPOConfig(length_calibration_prompts=-1)
    with pytest.raises(ConfigError, match="length_calibration_prompts=3 are too few.*give 8 at least"):
        PPOConfig(length_calibration_prompts=3)
    with pytest.raises(ConfigError, match="length_calibration_every=4 fits a curve anew that .*prompts=0 does not fit"):
        PPOConfig(length_calibration_every=4)
