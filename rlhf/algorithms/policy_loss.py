"""The losses of the policy and of the value function, and the KL penalty: what on-policy algorithms have in common.

Schulman et al. (arXiv 1707.06347) and what followed; per-token tensors [B, T] cover the response only.
"""

from __future__ import annotations

from typing import Any

import torch

from rlhf.algorithms.advantages import LossMean
from rlhf.numerics.logprobs import KLEstimator, estimate_kl
from rlhf.numerics.statistics import last_true, masked_variance


def shape_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    kl_estimator: KLEstimator = "k1",
    score_clip: float = 0.0,
    penalties: torch.Tensor | None = None,
    token_rewards: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per-token rewards [B, T]: -kl_coef * KL estimate on every response token, plus the score on the last one.

    Ziegler et al. (arXiv 1909.08593) eq. 2. `scores` [B] are clipped to +-score_clip (0: not at all) before the
    KL penalty and `penalties` [B] (of a missing end, of too many tokens) are taken off, so that no penalty is clipped
    away; `token_rewards` [B, T] are added as they are. 0 outside `mask` [B, T].
    """
    kl = estimate_kl(logprobs, ref_logprobs, kl_estimator)
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    if token_rewards is not None:
        rewards = torch.where(mask, rewards + token_rewards, rewards)
    clipped = scores.clamp(-score_clip, score_clip) if score_clip else scores
    if penalties is not None:
        clipped = clipped - penalties
    last = last_true(mask).unsqueeze(1)
    has_tokens = mask.any(dim=1)
    return rewards.scatter_add(1, last, (clipped * has_tokens).to(rewards.dtype).unsqueeze(1))


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), summed over the mask; all arguments [B, T].

    Per token max(-A r, -A clip(r, 1 - eps, 1 + eps_high)) with r = pi / pi_old; eps_high is eps unless
    `clip_range_high` says another (DAPO, arXiv 2503.14476, eq. 10). `weights` [B, 1] multiply the loss of a row, see
    `loss_weights`. The metrics are sums over the mask: divide them by the token count of the global batch, the loss by
    its `loss_count`.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    above = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + above)
    per_token = torch.where(mask, torch.maximum(unclipped, clipped), torch.zeros_like(unclipped))
    loss = per_token.sum() if weights is None else (per_token * weights).sum()
    with torch.no_grad():
        metrics = {
            "policy_loss": loss.detach(),
            "ratio": (ratio * mask).sum(),
            "clip_fraction": ((clipped > unclipped) & mask).sum().float(),
            "approx_kl": ((torch.expm1(log_ratio) - log_ratio) * mask).sum(),
        }
    return loss, metrics


def loss_kl(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: KLEstimator,
    *,
    ratio: bool,
) -> torch.Tensor:
    """The KL penalty of each token as it stands in the loss: [B, T] like its arguments.

    With `ratio` its gradient is on average that of the KL divergence to the reference: k1 and k3 times rho_t, which has
    a gradient itself (DeepSeek-V3.2, arXiv 2512.02556), k2, whose own gradient is that already, times rho_t as a
    weight. Without it the bare estimate (GRPO, arXiv 2402.03300, eq. 4).
    """
    kl = estimate_kl(logprobs, ref_logprobs, estimator)
    if not ratio:
        return kl
    weight = (logprobs - old_logprobs).exp()
    return kl * (weight.detach() if estimator == "k2" else weight)


def loss_weights(mask: torch.Tensor, mean: LossMean, *, max_tokens: int) -> torch.Tensor:
    """What the loss of each row's tokens is multiplied by before it is divided by `loss_count`: [B, 1].

    `token`: 1, for the mean over all tokens; `sequence`: 1 / |y|, for the mean over responses of their tokens' mean
    (arXiv 2402.03300, eq. 3); `constant`: 1 / `max_tokens` for every response (arXiv 2503.20783), so that a token
    weighs the same in a long response as in a short one, in this minibatch as in another.
    """
    if mean == "sequence":
        return 1.0 / mask.sum(1, keepdim=True).clamp(min=1)
    share = 1.0 if mean == "token" else 1.0 / max_tokens
    return torch.full((len(mask), 1), share, device=mask.device)


def loss_count(mask: torch.Tensor, mean: LossMean) -> float:
    """What the summed, weighted loss of the rows is divided by: their tokens, or their number."""
    return float(mask.sum()) if mean == "token" else float(len(mask))


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, clip_range: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped value loss, summed over the mask; all arguments [B, T].

    Per token 0.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) (Huang et al., detail of openai/baselines).
    """
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    zero = torch.zeros_like(values)
    plain = torch.where(mask, values - returns, zero) ** 2
    limited = torch.where(mask, clipped - returns, zero) ** 2
    loss = 0.5 * torch.maximum(plain, limited).sum()
    with torch.no_grad():
        metrics = {"value_loss": loss.detach(), "value_clip_fraction": (limited > plain).sum().float()}
    return loss, metrics


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask; 1 is a perfect critic, 0 one that knows only the mean."""
    return float(1 - masked_variance(returns - values, mask) / masked_variance(returns, mask).clamp(min=1e-12))


class KLController:
    """The coefficient of the KL penalty: fixed, or steered towards a target (Ziegler et al., section 2.2).

    Adaptive: e = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + e * episodes / horizon, with the *observed* KL of
    whole responses in nats.
    """

    def __init__(self, kl_coef: float, *, target: float | None = None, horizon: int = 10_000) -> None:
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, observed_kl: float, episodes: int) -> None:
        """Steer by the mean KL per response over `episodes` new responses."""
        if self.target is not None:
            error = min(max(observed_kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * episodes / self.horizon

    def state(self) -> dict[str, float]:
        """What `load_state` restores."""
        return {"kl_coef": self.value}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        self.value = float(state["kl_coef"])
