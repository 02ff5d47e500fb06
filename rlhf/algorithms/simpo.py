"""SimPO: the mean log-probability of a response as its reward, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlhf.algorithms.candidates import Candidates
from rlhf.algorithms.config import OfflineConfig


def simpo_margin(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) [M]."""
    rewards = config.of("beta") * given.logprobs / given.tokens
    better, worse = given.pairs
    return rewards[better] - rewards[worse]


def simpo_loss(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """-log sigmoid(margin - gamma): arXiv 2405.14734, eq. 6; gamma is `target_margin`."""
    return given.mean_over_pairs(-F.logsigmoid(simpo_margin(given, config) - config.of("target_margin")))
