"""From rewards to advantages: the estimators, one function and one row of `ESTIMATORS` each.

Per-token tensors [B, T] cover the response only; `mask` is True on a prefix of each row. The configuration is checked
against this table before torch is loaded, so this file does not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EstimatorInput:
    """What an estimator may use: `rewards`, `values`, `mask` [B, T] and the constants of the run.

    `values` are 0 where there is no critic. `groups` [B] is the number of each row's prompt: rows of one group are
    responses to the same prompt.
    """

    rewards: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor
    groups: torch.Tensor
    gamma: float
    lam: float


LossMean = Literal["token", "sequence", "constant"]
"""What the policy loss is a mean over; see `rlhf.algorithms.policy_loss.loss_weights`."""
KLPlace = Literal["reward", "loss"]
"""Where the KL penalty stands."""


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator: `compute` gives advantages and returns, [B, T] each, 0 outside the mask.

    `needs_critic`: without it no critic is built, and the returns are not used. `samples_per_prompt`: the fewest
    responses to one prompt that it can work with. The others say what its source does where the configuration leaves it
    open: whether advantages are whitened over the rollout, what the loss is a mean over, where the KL penalty stands.
    """

    compute: Callable[[EstimatorInput], tuple[torch.Tensor, torch.Tensor]]
    needs_critic: bool
    samples_per_prompt: int = 1
    whitens: bool = True
    loss_mean: LossMean = "token"
    kl_in: KLPlace = "reward"


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): advantages and returns, [B, T] each.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, with V and A equal to 0 after the
    last response token.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = values.new_zeros(values.shape)
    advantage = next_value = values.new_zeros(len(values))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def rewards_to_go(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma G_{t+1}: [B, T], 0 outside the mask."""
    return gae(rewards, rewards.new_zeros(rewards.shape), mask, gamma=gamma, lam=1.0)[0]


def group_means(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of `values` [B] the mean over the rows of its group, and how many those are: [B] each."""
    count = int(groups.max()) + 1
    sizes = values.new_zeros(count).index_add_(0, groups, values.new_ones(len(values)))
    return (values.new_zeros(count).index_add_(0, groups, values) / sizes)[groups], sizes[groups]


def rloo(given: EstimatorInput) -> torch.Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740): the response's whole reward less the mean of the others of its
    prompt, for every token alike: [B, T]."""
    totals = _totals(given)
    means, sizes = group_means(totals, given.groups)
    return _for_every_token((totals - means) * sizes / (sizes - 1), given.mask)


def grpo(given: EstimatorInput) -> torch.Tensor:
    """Group-relative advantages (arXiv 2402.03300, section 4.1.2): the response's whole reward less the mean of its
    prompt's, in standard deviations of those (of a sample; 1e-4 is added, as TRL does), for every token alike: [B, T].
    """
    centred = _totals(given)
    means, sizes = group_means(centred, given.groups)
    centred = centred - means
    variances = group_means(centred**2, given.groups)[0] * sizes / (sizes - 1)
    return _for_every_token(centred / (variances.sqrt() + 1e-4), given.mask)


def dr_grpo(given: EstimatorInput) -> torch.Tensor:
    """GRPO done right (arXiv 2503.20783, section 3.2): without the division by the standard deviation, which weighs
    prompts by how alike their responses are; with `loss_mean` constant, without that by the length either: [B, T]."""
    totals = _totals(given)
    return _for_every_token(totals - group_means(totals, given.groups)[0], given.mask)


def reinforce_pp(given: EstimatorInput) -> torch.Tensor:
    """REINFORCE++ (arXiv 2501.03262): the rewards to go of each token; whitening over the rollout is its baseline."""
    return rewards_to_go(given.rewards, given.mask, gamma=given.gamma)


def reinforce_pp_baseline(given: EstimatorInput) -> torch.Tensor:
    """REINFORCE++ with a baseline (arXiv 2501.03262): the rewards to go less the mean whole reward of the prompt's
    responses, then whitened: [B, T]."""
    means = group_means(_totals(given), given.groups)[0]
    return (reinforce_pp(given) - means.unsqueeze(1)).masked_fill(~given.mask, 0.0)


def _totals(given: EstimatorInput) -> torch.Tensor:
    return given.rewards.masked_fill(~given.mask, 0.0).sum(1)


def _for_every_token(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return advantages.unsqueeze(1) * mask


def _alone(compute: Callable[[EstimatorInput], torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Of an estimator without a critic, whose returns nobody uses."""
    return lambda given: (compute(given), given.values)


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(
        lambda given: gae(given.rewards, given.values, given.mask, gamma=given.gamma, lam=given.lam), needs_critic=True
    ),
    "rloo": Estimator(_alone(rloo), needs_critic=False, samples_per_prompt=2, whitens=False),
    "grpo": Estimator(
        _alone(grpo), needs_critic=False, samples_per_prompt=2, whitens=False, loss_mean="sequence", kl_in="loss"
    ),
    "dr_grpo": Estimator(
        _alone(dr_grpo), needs_critic=False, samples_per_prompt=2, whitens=False, loss_mean="constant", kl_in="loss"
    ),
    "reinforce_pp": Estimator(_alone(reinforce_pp), needs_critic=False),
    "reinforce_pp_baseline": Estimator(_alone(reinforce_pp_baseline), needs_critic=False, samples_per_prompt=2),
}
"""By the name that `advantage` has in the configuration."""
