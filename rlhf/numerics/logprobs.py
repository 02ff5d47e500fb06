"""Log-probabilities, entropies and KL estimates from logits: pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

KLEstimator = Literal["k1", "k2", "k3"]


def logprobs_from_logits(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of `token_ids` [B, T] under `logits` [B, T, V] / temperature, as float32 [B, T].

    The log-softmax runs in float32 whatever the dtype of the logits; `logits` is not changed in place.
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy_from_logits(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Entropy in nats of softmax(logits / temperature): [B, T, V] -> [B, T], float32."""
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def estimate_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Per-token estimate of KL(actor || reference) from tokens sampled by the actor; shapes alike.

    With d = log pi_actor - log pi_ref (Schulman, "Approximating KL divergence", 2020):
    k1 = d (unbiased, any sign); k2 = d^2 / 2 (biased, small variance); k3 = exp(-d) - 1 + d (unbiased, never negative).
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator={estimator!r} is not one of k1, k2, k3")
