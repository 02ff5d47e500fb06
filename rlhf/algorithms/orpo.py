"""ORPO: fine-tuning on the better response with a penalty on the odds of the worse one, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlhf.algorithms.candidates import Candidates
from rlhf.algorithms.config import OfflineConfig


def log_odds(mean_logprobs: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(`mean_logprobs`), exact where p is near 0 or 1."""
    return mean_logprobs - torch.log(-torch.expm1(mean_logprobs.clamp(max=-1e-7)))


def orpo_margin(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """The log of the odds ratio of the better response over the worse one [M], of probabilities by token."""
    odds = log_odds(given.logprobs / given.tokens)
    better, worse = given.pairs
    return odds[better] - odds[worse]


def orpo_loss(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """L_SFT + beta L_OR, L_OR = -log sigmoid(log odds ratio): arXiv 2403.07691, eq. 6 and 7 (beta is its lambda).

    L_SFT is of the best response by token.
    """
    ratio = given.mean_over_pairs(-F.logsigmoid(orpo_margin(given, config)))
    return config.of("sft_coef") * given.imitation() + config.of("beta") * ratio
