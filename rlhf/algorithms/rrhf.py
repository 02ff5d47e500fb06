"""RRHF: candidates in the order of their scores, by how likely they are, and imitation of the best."""

from __future__ import annotations

import torch

from rlhf.algorithms.candidates import Candidates
from rlhf.algorithms.config import OfflineConfig


def rrhf_margin(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """p_i - p_j [M] with p = sum of log pi / |y|^length_penalty, of the better response i and the worse one j."""
    scores = given.logprobs / given.tokens.to(given.logprobs.dtype) ** config.of("length_penalty")
    better, worse = given.pairs
    return scores[better] - scores[worse]


def rrhf_loss(given: Candidates, config: OfflineConfig) -> torch.Tensor:
    """rank_coef * sum over pairs of max(0, p_j - p_i) + sft_coef * L_SFT: arXiv 2304.05302, eq. 2 to 4.

    The sum is over all pairs of a prompt whose scores differ, however many candidates it has; L_SFT is of the best one,
    by token as in the authors' code.
    """
    ranked = torch.relu(-rrhf_margin(given, config)).sum()
    return config.of("rank_coef") * ranked + config.of("sft_coef") * given.imitation()
