"""From rewards to advantages: the estimators, one function and one row of `ESTIMATORS` each.

Per-token tensors [B, T] cover the response only; `mask` is True on a prefix of each row. The configuration is checked
against this table before torch is loaded, so this file does not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator: `compute` gives advantages and returns, [B, T] each, 0 outside the mask.

    `needs_critic`: without it no critic is built, and the returns are not used. `samples_per_prompt`: the fewest
    responses to one prompt that it can work with.
    """

    compute: Callable[[EstimatorInput], tuple[torch.Tensor, torch.Tensor]]
    needs_critic: bool
    samples_per_prompt: int = 1


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


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(
        lambda given: gae(given.rewards, given.values, given.mask, gamma=given.gamma, lam=given.lam), needs_critic=True
    ),
}
"""By the name that `advantage` has in the configuration."""
