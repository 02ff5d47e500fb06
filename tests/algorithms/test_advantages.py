"""Estimators without a critic, and the losses beside them, against their formulas worked by hand and by plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from rlhf.algorithms.advantages import ESTIMATORS, EstimatorInput, group_means
from rlhf.algorithms.config import PPOConfig
from rlhf.algorithms.policy_loss import loss_count, loss_kl, loss_weights, policy_loss
from rlhf.config import ConfigError
from rlhf.engine import BatchPlan
from rlhf.numerics.logprobs import estimate_kl
from rlhf.training.groups import all_alike
from rlhf.training.metrics import MeanMeter
from rlhf.training.scoring import response_logprobs
from tests.algorithms.test_ppo_checklist import LocalModels, load, make_trainer  # noqa: F401  (a fixture)

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
REWARDS = torch.tensor(
    [[-0.1, -0.2, 1.0], [0.4, 9.0, 9.0], [-0.3, 2.0, 9.0], [0.1, 0.0, -1.0], [0.0, 0.5, 9.0], [3.0, 9.0, 9.0]]
)
"""Two prompts with three responses each; 9 stands outside the responses and must count for nothing."""
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
TOTALS = [[0.7, 0.4, 1.7], [-0.9, 0.5, 3.0]]


def advantages(name: str, gamma: float = 1.0) -> torch.Tensor:
    given = EstimatorInput(REWARDS, torch.zeros_like(REWARDS), MASK, GROUPS, gamma=gamma, lam=0.95)
    return ESTIMATORS[name].compute(given)[0]


def of_response(found: torch.Tensor) -> list[float]:
    """The advantage of each response, the same for every token of it and 0 outside."""
    assert not found[~MASK].any()
    for row, mask in zip(found, MASK, strict=True):
        assert row[mask].tolist() == pytest.approx([float(row[0])] * int(mask.sum()))
    return found[:, 0].tolist()


def test_rloo_leaves_the_response_itself_out_of_its_baseline():
    expected = [
        total - statistics.fmean(other for place, other in enumerate(group) if place != mine)
        for group in TOTALS
        for mine, total in enumerate(group)
    ]
    assert of_response(advantages("rloo")) == pytest.approx(expected, abs=1e-6)


def test_grpo_counts_in_standard_deviations_of_the_prompt():
    expected = [
        (total - statistics.fmean(group)) / (statistics.stdev(group) + 1e-4) for group in TOTALS for total in group
    ]
    assert of_response(advantages("grpo")) == pytest.approx(expected, abs=1e-5)


def test_dr_grpo_does_not():
    expected = [total - statistics.fmean(group) for group in TOTALS for total in group]
    assert of_response(advantages("dr_grpo")) == pytest.approx(expected, abs=1e-6)


def test_reinforce_pp_is_the_rewards_to_go():
    found = advantages("reinforce_pp", gamma=0.5)
    assert found[0].tolist() == pytest.approx([-0.1 - 0.1 + 0.25, -0.2 + 0.5, 1.0])
    assert found[1].tolist() == pytest.approx([0.4, 0, 0]) and found[2].tolist() == pytest.approx([0.7, 2.0, 0])


def test_its_baseline_is_the_mean_of_the_prompts_responses():
    found = advantages("reinforce_pp_baseline")
    mean = statistics.fmean(TOTALS[1])
    assert found[3].tolist() == pytest.approx([-0.9 - mean, -1.0 - mean, -1.0 - mean])
    assert found[5].tolist() == pytest.approx([3.0 - mean, 0, 0])


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
def test_responses_that_are_alike_teach_nothing(name):
    rewards = torch.tensor([[0.5], [0.5], [2.0], [1.0]])
    given = EstimatorInput(
        rewards, torch.zeros(4, 1), torch.ones(4, 1).bool(), torch.tensor([0, 0, 1, 1]), gamma=1.0, lam=1.0
    )
    found = ESTIMATORS[name].compute(given)[0].squeeze(1)
    assert found[:2].tolist() == [0, 0] and found[2] > 0.4 and found[3] == -found[2]
    assert all_alike(torch.tensor([0.5, 0.5, 2.0, 1.0, 3.0, 3.0]), 2).tolist() == [True, False, True]


def test_groups_may_lie_in_any_order():
    means, sizes = group_means(torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([1, 0, 1, 1]))
    assert sizes.tolist() == [3, 1, 3, 3] and means.tolist() == pytest.approx([11 / 3, 5, 11 / 3, 11 / 3])


# ------------------------------------------------------------------------------------------------------ losses


def test_a_higher_clip_range_above_lets_good_tokens_rise_further():
    """Ratios of 1.25 and 0.75: with 0.2 and 0.28 only what lies above 1.28 or below 0.8 is clipped."""
    new = torch.tensor([[1.25, 1.35, 0.75]]).log()
    old, mask, good = torch.zeros(1, 3), torch.ones(1, 3).bool(), torch.ones(1, 3)
    plain, _ = policy_loss(new, old, good, mask, clip_range=0.2)
    higher, metrics = policy_loss(new, old, good, mask, clip_range=0.2, clip_range_high=0.28)
    assert float(plain) == pytest.approx(-(1.2 + 1.2 + 0.75)) and float(higher) == pytest.approx(-(1.25 + 1.28 + 0.75))
    assert metrics["clip_fraction"] == 1
    bad, _ = policy_loss(new, old, -good, mask, clip_range=0.2, clip_range_high=0.28)
    assert float(bad) == pytest.approx(1.25 + 1.35 + 0.8), "below it is the lower range that holds"


@pytest.mark.parametrize(
    ("mean", "expected"), [("token", (3 + 8) / 5), ("sequence", (3 / 1 + 8 / 4) / 2), ("constant", (3 + 8) / 10 / 2)]
)
def test_what_the_loss_is_a_mean_over(mean, expected):
    """A response of one token with a loss of 3, and one of four tokens with 2 each, where ten are allowed."""
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    losses = torch.tensor([[-3.0, -9, -9, -9], [-2.0, -2, -2, -2]])
    weights = loss_weights(mask, mean, max_tokens=10)
    loss, _ = policy_loss(torch.zeros(2, 4), torch.zeros(2, 4), losses, mask, clip_range=0.2, weights=weights)
    assert float(loss) / loss_count(mask, mean) == pytest.approx(expected)
    both = sum(
        float(
            policy_loss(
                torch.zeros(1, 4), torch.zeros(1, 4), losses[row : row + 1], mask[row : row + 1], clip_range=0.2,
                weights=loss_weights(mask[row : row + 1], mean, max_tokens=10),
            )[0]
        )
        for row in range(2)
    )  # fmt: skip
    assert both / sum(loss_count(mask[row : row + 1], mean) for row in range(2)) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------ the run


def test_each_estimator_brings_what_its_source_does():
    found = {
        name: (config.whitens, config.kl_place, config.kl_estimate, config.estimator.loss_mean)
        for name in ESTIMATORS
        for config in [PPOConfig(advantage=name)]
    }
    assert found == {
        "gae": (True, "reward", "k1", "token"),
        "rloo": (False, "reward", "k1", "token"),
        "grpo": (False, "loss", "k3", "sequence"),
        "dr_grpo": (False, "loss", "k3", "constant"),
        "reinforce_pp": (True, "reward", "k1", "token"),
        "reinforce_pp_baseline": (True, "reward", "k1", "token"),
    }
    own = PPOConfig(advantage="grpo", whiten_advantages=True, kl_in="reward", kl_estimator="k2")
    assert (own.whitens, own.kl_place, own.kl_estimate) == (True, "reward", "k2")


def test_k1_alone_in_the_loss_is_refused():
    with pytest.raises(ConfigError, match="kl_estimator=k1 with the KL penalty in the loss: the gradient of k1 is 0"):
        PPOConfig(advantage="grpo", kl_estimator="k1", kl_ratio=False)
    assert PPOConfig(advantage="grpo", kl_estimator="k1").kl_estimate == "k1"
    with pytest.raises(ConfigError, match="clip_range_high=0 must be above 0"):
        PPOConfig(clip_range_high=0)
    assert PPOConfig(advantage="grpo", kl_estimator="k1", kl_coef=0.0, kl_ratio=False).kl_coef == 0


def group_trainer(make, tiny_models, **config):
    plan = BatchPlan(8, 4, 1)
    actor, reference = load(tiny_models["gpt_neox"]).eval(), load(tiny_models["gpt_neox"])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    engine = LocalModels(actor, None, reference, plan)
    return make(engine=engine, plan=plan, rollout=4, samples_per_prompt=2, **config)


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if not row.needs_critic])
def test_every_estimator_without_a_critic_trains(make_trainer, tiny_models, name):  # noqa: F811
    trainer = group_trainer(make_trainer, tiny_models, advantage=name)
    experience = trainer.make_experience(1)
    before = [parameter.detach().clone() for parameter in trainer.engine.actor.parameters()]
    metrics = trainer.update(experience, 1)
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.engine.actor.parameters(), strict=True))
    assert ("kl_loss" in metrics) == (trainer.config.kl_place == "loss")
    assert metrics["ratio_first"] == pytest.approx(1, abs=1e-4) and 0 <= metrics["equal_groups"] <= 1
    assert not any("critic" in key or "value" in key for key in metrics)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_an_estimate_times_the_ratio_has_the_gradient_of_the_divergence(estimator):
    """Over all five tokens of a distribution, each as likely as the old policy has it; without the ratio it has not."""
    generator = torch.Generator().manual_seed(4)
    logits, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    new, ref = logits.log_softmax(0), reference.log_softmax(0)
    old = new.detach()
    (exact,) = torch.autograd.grad((new.exp() * (new - ref)).sum(), logits, retain_graph=True)
    for ratio in (False, True):
        penalty = (old.exp() * loss_kl(new, old, ref, estimator, ratio=ratio)).sum()
        (found,) = torch.autograd.grad(penalty, logits, retain_graph=True)
        assert torch.allclose(found, exact) == (ratio or estimator == "k2"), "k2's own gradient is that already"


@pytest.mark.parametrize("kl_ratio", [False, True])
def test_with_the_penalty_in_the_loss_the_rewards_have_none_and_the_gradient_is_that_of_the_estimate(
    make_trainer,  # noqa: F811
    tiny_models,
    kl_ratio,
):
    """The advantages are put to 0: what is left is kl_coef times the mean k3 over responses of their tokens' mean."""
    trainer = group_trainer(make_trainer, tiny_models, advantage="grpo", kl_coef=0.7, kl_ratio=kl_ratio)
    experience = trainer.make_experience(1)
    mask = experience.rollout.response_mask
    assert torch.equal(experience.rewards.sum(1), experience.scores), "the score alone"
    experience.advantages.zero_()
    (minibatch,) = trainer.minibatches(experience, 1, 0)
    trainer.actor_step(minibatch, MeanMeter())
    (found,) = trainer.engine.actor.gradients
    actor = load(tiny_models["gpt_neox"]).eval()
    logprobs = response_logprobs(actor, experience.rollout, trainer.rollouts.sampling)
    kl = estimate_kl(logprobs, experience.ref_logprobs, "k3")
    kl = kl * (logprobs - logprobs.detach()).exp() if kl_ratio else kl
    loss = 0.7 * (torch.where(mask, kl, 0.0).sum(1) / mask.sum(1)).mean()
    loss.backward()
    assert float(loss) > 1e-3 and math.isfinite(float(loss))
    for name, parameter in actor.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)
