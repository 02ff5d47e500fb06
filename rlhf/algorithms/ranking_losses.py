"""What a reward model is trained with: losses of pairs and of rankings of K responses, as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ranked_pairs(groups: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (better, worse) of every pair of one prompt whose ranks differ: two index tensors [pairs].

    `groups`, `ranks` [N]. Ties make no pair.
    """
    same_prompt = groups.unsqueeze(1) == groups.unsqueeze(0)
    better = ranks.unsqueeze(1) < ranks.unsqueeze(0)
    first, second = (same_prompt & better).nonzero(as_tuple=True)
    return first, second


def ranking_loss(
    scores: torch.Tensor,
    groups: torch.Tensor,
    ranks: torch.Tensor,
    margins: torch.Tensor,
    *,
    centering_coef: float = 0.0,
) -> torch.Tensor:
    """Bradley-Terry loss of rankings, summed over prompts; every prompt weighs the same.

    Per prompt the mean over its pairs (i better than j) of -log sigmoid(s_i - s_j - margin): InstructGPT
    (arXiv 2203.02155) eq. 1 with 1 / C(K, 2), ties left out; the margin as in Llama 2 (arXiv 2307.09288) eq. 2.
    `centering_coef` adds the mean of (s_i + s_j)^2, which keeps scores near 0 (Eisenstein et al., arXiv 2312.09244).
    `scores`, `groups`, `ranks`, `margins` [N]; 0 when no pair differs in rank.
    """
    better, worse = ranked_pairs(groups, ranks)
    if better.numel() == 0:
        return scores.sum() * 0.0
    loss = -F.logsigmoid(scores[better] - scores[worse] - margins[better])
    if centering_coef:
        loss = loss + centering_coef * (scores[better] + scores[worse]) ** 2
    pairs_per_prompt = torch.bincount(groups[better], minlength=int(groups.max()) + 1)
    return (loss / pairs_per_prompt[groups[better]]).sum()
