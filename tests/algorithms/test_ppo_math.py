"""PPO's pure functions against tables worked by hand, finite differences and brute force.

Details that stand on the PPO checklist (score placement, GAE, adaptive KL, gradients and micro-batches) are tested in
test_ppo_checklist.py.
"""

import dataclasses
import math

import pytest
import torch

from rlhf.algorithms.advantages import gae
from rlhf.algorithms.config import PPOBatchConfig, PPOConfig
from rlhf.algorithms.policy_loss import KLController, explained_variance, policy_loss, shape_rewards, value_loss
from rlhf.algorithms.ppo import PPOExperience, chosen_prompts, planned_iterations, ppo_optimizer_steps
from rlhf.config import ConfigError
from rlhf.rewards.rules import overlong_penalties
from rlhf.types import Rollout, TokenizedPrompt

LOG = math.log


@dataclasses.dataclass(frozen=True)
class OnePlan:
    """The arithmetic of rlhf.engine.BatchPlan, for functions that are handed a plan."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1

    @property
    def accumulation_steps(self):
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


# ------------------------------------------------------------------------------------------------ rewards


def test_rewards_worked_by_hand_for_every_estimator():
    """One response of two tokens: pi / ref = 2 on the first, 1/2 on the second; score 3; coefficient 0.1."""
    logprobs = torch.tensor([[LOG(0.5), LOG(0.25)]])
    ref_logprobs = torch.tensor([[LOG(0.25), LOG(0.5)]])
    mask = torch.tensor([[True, True]])
    score = torch.tensor([3.0])
    expected = {
        "k1": [-0.1 * LOG(2), 3 + 0.1 * LOG(2)],
        "k2": [-0.05 * LOG(2) ** 2, 3 - 0.05 * LOG(2) ** 2],
        "k3": [-0.1 * (0.5 - 1 + LOG(2)), 3 - 0.1 * (2 - 1 - LOG(2))],
    }
    for estimator, rewards in expected.items():
        found = shape_rewards(score, logprobs, ref_logprobs, mask, kl_coef=0.1, kl_estimator=estimator)
        torch.testing.assert_close(found, torch.tensor([rewards]))


def test_the_overlong_penalty_worked_by_hand():
    """DAPO's eq. 13 with Lmax = 20 and Lc = 8: 0 up to 12 tokens, then an eighth a token, -1 from 20 on."""
    tokens = [0, 1, 11, 12, 13, 14, 16, 19, 20, 21, 100]
    expected = [0, 0, 0, 0, -0.125, -0.25, -0.5, -0.875, -1, -1, -1]
    found = overlong_penalties(torch.tensor(tokens), max_tokens=20, buffer_tokens=8)
    assert found.tolist() == expected and found.dtype == torch.float32
    assert overlong_penalties(torch.tensor([19, 20]), max_tokens=20, buffer_tokens=1).tolist() == [0, -1]
    assert overlong_penalties(torch.tensor([0, 5, 20]), max_tokens=20, buffer_tokens=20).tolist() == [0, -0.25, -1]


@pytest.mark.parametrize(("given", "longest", "tokens"), [(0, 64, 12), (0, 3, 1), (7, 64, 7)])
def test_the_overlong_buffer_is_a_fifth_of_a_response_unless_it_is_given(given, longest, tokens):
    assert PPOConfig(overlong_buffer_tokens=given).overlong_buffer(longest) == tokens


def test_a_response_without_tokens_gets_no_reward_at_all():
    zeros = torch.zeros(2, 3)
    mask = torch.tensor([[False, False, False], [True, False, False]])
    rewards = shape_rewards(torch.tensor([7.0, 2.0]), zeros, zeros, mask, kl_coef=0.1)
    assert rewards.tolist() == [[0, 0, 0], [2, 0, 0]]


# ---------------------------------------------------------------------------------------------------- GAE


def test_gae_of_two_tokens_worked_by_hand():
    """gamma = lambda = 0.5, V = (1, 2), r = (3, 4): delta_1 = 4 - 2; delta_0 = 3 + 1 - 1; A_0 = 3 + 0.25 * 2."""
    advantages, returns = gae(
        torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]]), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [[3.5, 2.0]]
    assert returns.tolist() == [[4.5, 4.0]]


def test_gae_at_lambda_one_is_return_minus_value_and_at_zero_the_td_error():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)
    mask = torch.ones(3, 6, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


# ------------------------------------------------------------------------------------------------- losses

RATIOS = torch.tensor([[1.0, 1.5, 1.5, 0.5], [0.5, 1.1, 9.0, 9.0]])
ADVANTAGES = torch.tensor([[2.0, 2.0, -2.0, 2.0], [-2.0, 3.0, 5.0, -5.0]])
LOSS_MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
# max(-A r, -A clip(r, 0.8, 1.2)): -2, -2.4 (clipped), 3 (not clipped), -1 (not clipped); 1.6 (clipped), -3.3
POLICY_TERMS = [-2.0, -2.4, 3.0, -1.0, 1.6, -3.3]


def test_policy_loss_and_its_metrics_worked_by_hand():
    old = torch.full_like(RATIOS, -1.0)
    loss, metrics = policy_loss(RATIOS.log() + old, old, ADVANTAGES, LOSS_MASK, clip_range=0.2)
    assert loss.item() == pytest.approx(sum(POLICY_TERMS), abs=1e-5)
    assert metrics["policy_loss"].item() == pytest.approx(sum(POLICY_TERMS), abs=1e-5)
    counted = [1.0, 1.5, 1.5, 0.5, 0.5, 1.1]
    assert metrics["ratio"].item() == pytest.approx(sum(counted), abs=1e-5)
    assert metrics["clip_fraction"].item() == 2
    assert metrics["approx_kl"].item() == pytest.approx(sum(r - 1 - LOG(r) for r in counted), abs=1e-5)
    assert metrics["approx_kl"] > 0


def test_policy_gradient_is_minus_advantage_times_ratio_and_zero_where_clipped():
    old = torch.full_like(RATIOS, -1.0)
    new = (RATIOS.log() + old).requires_grad_()
    loss, _ = policy_loss(new, old, ADVANTAGES, LOSS_MASK, clip_range=0.2)
    loss.backward()
    expected = torch.tensor([[-2.0, 0.0, 3.0, -1.0], [0.0, -3.3, 0.0, 0.0]])
    torch.testing.assert_close(new.grad, expected)


def test_policy_loss_ignores_garbage_outside_the_mask():
    old = torch.full_like(RATIOS, -1.0)
    advantages = ADVANTAGES.masked_fill(~LOSS_MASK, math.nan)
    garbage = (RATIOS.log() + old).masked_fill(~LOSS_MASK, math.inf).requires_grad_()
    loss, metrics = policy_loss(garbage, old, advantages, LOSS_MASK, clip_range=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(sum(POLICY_TERMS), abs=1e-5)
    assert all(math.isfinite(value) for value in metrics.values())
    assert torch.isfinite(garbage.grad).all()


def test_value_loss_worked_by_hand():
    """Range 0.2. Returns and old values (1, 1), (0, 1), (1, 0), masked; values 1.1, 1.5, 1.0."""
    values = torch.tensor([[1.1, 1.5, 1.0, 50.0]], requires_grad=True)
    old = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    returns = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    loss, metrics = value_loss(values, old, returns, mask, clip_range=0.2)
    # 0.5 * (0.1^2; max(1.5^2, 1.2^2); max(0, (0.2 - 1)^2) which is the clipped one)
    assert loss.item() == pytest.approx(0.5 * (0.01 + 2.25 + 0.64), abs=1e-6)
    assert metrics["value_clip_fraction"].item() == 1
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.1, 1.5, 0.0, 0.0]]))


def test_value_loss_ignores_garbage_outside_the_mask():
    values = torch.tensor([[1.0, math.nan]], requires_grad=True)
    loss, _ = value_loss(
        values, torch.zeros(1, 2), torch.tensor([[3.0, math.inf]]), torch.tensor([[True, False]]), clip_range=9.0
    )
    loss.backward()
    assert loss.item() == 2.0
    assert values.grad.tolist() == [[-2.0, 0.0]]


# ------------------------------------------------------------------------------------------------ metrics


def test_explained_variance_of_a_perfect_a_constant_and_an_inverted_critic():
    returns = torch.tensor([[1.0, 3.0, 1e9], [5.0, -1e9, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert explained_variance(returns + 7, returns, mask) == pytest.approx(1.0)  # a constant shift explains as much
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)  # residual 2R: 1 - 4
    half = torch.tensor([[2.0, 3.0, 0.0], [4.0, 0.0, 0.0]])  # residuals -1, 0, 1: variance 2/3 of 8/3
    assert explained_variance(half, returns, mask) == pytest.approx(0.75)


def test_a_fixed_kl_coefficient_does_not_move():
    controller = KLController(0.1)
    controller.update(1e6, 10_000)
    assert controller.value == 0.1


# ------------------------------------------------------------------------------------------ configuration


def test_a_rollout_is_a_whole_number_of_minibatches():
    def iterations(prompts_per_rollout, samples=1, batch=8, **options):
        config = PPOBatchConfig(rollout_batch_size=prompts_per_rollout, samples_per_prompt=samples, **options)
        return planned_iterations(config, OnePlan(batch, 2), prompts=48)

    assert iterations(24) == 2 and iterations(24, max_steps=5) == 5
    assert iterations(4, samples=8, batch=32) == 12  # 32 responses to four prompts are one minibatch
    for prompts, samples, batch, message in (
        (
            20,
            1,
            8,
            "20 prompts with samples_per_prompt=1 give 20 responses.*global_batch_size=8.*_size=16 or 24, or",
        ),
        (4, 1, 8, "rollout_batch_size=4 .*; else use rollout_batch_size=8, or"),
        (10, 4, 32, "give 40 responses.*global_batch_size=32.*; else use rollout_batch_size=8 or 16, or"),
    ):
        with pytest.raises(ConfigError, match=message):
            iterations(prompts, samples, batch)


def test_optimizer_steps_of_a_run_are_iterations_times_epochs_times_minibatches():
    """Those of the actor, which waits for the critic's warm-up, and those of the critic."""

    def steps(batch, **config):
        return ppo_optimizer_steps(PPOConfig(**config), batch, OnePlan(8, 2), prompts=30)

    batch = PPOBatchConfig(rollout_batch_size=24, ppo_epochs=4, epochs=2.0)
    assert steps(batch, critic_warmup_iterations=0) == (3 * 4 * 3, 3 * 4 * 3)  # 60 prompts are 2.5 rollouts
    assert steps(batch, critic_warmup_iterations=1) == (2 * 4 * 3, 3 * 4 * 3)
    assert steps(batch, critic_warmup_iterations=9) == (1 * 4 * 3, 3 * 4 * 3)  # one iteration is always the actor's
    assert steps(dataclasses.replace(batch, max_steps=5), critic_warmup_iterations=0) == (5 * 4 * 3, 5 * 4 * 3)
    twice = dataclasses.replace(batch, samples_per_prompt=2)
    assert steps(twice, critic_warmup_iterations=0) == (3 * 4 * 6, 3 * 4 * 6)


def test_evaluation_is_on_a_bounded_choice_that_a_seed_repeats():
    prompts = [TokenizedPrompt(str(index), (1,), "") for index in range(100_000)]
    first, again, other = (chosen_prompts(prompts, 256, seed) for seed in (1, 1, 2))
    assert len(first) == 256 and first == again and first != other
    numbers = [int(prompt.id) for prompt in first]
    assert numbers == sorted(numbers) and numbers[-1] > 90_000  # from all over the set, in its order
    assert chosen_prompts(prompts[:200], 256, 1) == prompts[:200]
    assert chosen_prompts(prompts, 0, 1) is prompts


def test_trimming_an_experience_drops_only_columns_of_padding():
    prompt_mask = torch.tensor([[False, False, True], [False, True, True]])
    mask = torch.tensor([[True, False, False, False], [True, True, False, False]])
    ids = torch.arange(8).reshape(2, 4)
    rollout = Rollout(torch.arange(6).reshape(2, 3), prompt_mask, ids, mask, ids.float())
    fields = [ids.float() * factor for factor in (6, 2, 3, 4, 5)]
    small = PPOExperience(rollout, *fields, scores=torch.tensor([1.0, 2.0])).trimmed()
    assert small.rollout.prompt_ids.tolist() == [[1, 2], [4, 5]]
    assert small.rollout.response_ids.tolist() == [[0, 1], [4, 5]]
    assert small.rollout.logprobs.tolist() == [[0, 1], [4, 5]]
    names = ("ref_logprobs", "values", "rewards", "advantages", "returns")
    for name, factor in zip(names, (6, 2, 3, 4, 5), strict=True):
        assert getattr(small, name).tolist() == [[0, factor], [4 * factor, 5 * factor]]
    assert small.scores.tolist() == [1.0, 2.0]


def test_per_token_rewards_are_added_inside_the_response_alone():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros, per_token = torch.zeros(2, 3), torch.tensor([[0.5, 0.0, 1.0], [2.0, 9.0, 9.0]])
    rewards = shape_rewards(torch.tensor([1.0, 2.0]), zeros, zeros, mask, kl_coef=0.1, token_rewards=per_token)
    assert rewards.tolist() == [[0.5, 0.0, 2.0], [4.0, 0.0, 0.0]]
