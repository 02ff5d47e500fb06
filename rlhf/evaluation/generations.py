"""What sampled responses are like, whatever they were asked."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

import torch

from rlhf.numerics.statistics import repeated_shares
from rlhf.rewards.rules import hangul_share


def generation_statistics(
    texts: Sequence[str], token_ids: torch.Tensor, mask: torch.Tensor, ended: torch.Tensor
) -> dict[str, float]:
    """Of B responses: share that ends by itself, tokens (the end included), repeated 4-grams of tokens, share of Hangul
    among letters, responses that are empty or occur more than once, and distinct n-grams of words over all of them (Li
    et al., arXiv 1510.03055). `token_ids`, `mask` [B, T], `ended` [B] bool. Raises ValueError without responses.
    """
    if not texts:
        raise ValueError("no responses: there is nothing to say of them")
    lengths = mask.sum(1).tolist()
    said = [" ".join(text.split()) for text in texts]
    return {
        "responses": float(len(texts)),
        "eos_rate": float(ended.float().mean()),
        "tokens_mean": fmean(lengths),
        "tokens_median": float(median(lengths)),
        "tokens_max": float(max(lengths)),
        "repeated_4grams": float(repeated_shares(token_ids, mask).mean()),
        "hangul_share": fmean(hangul_share(text) for text in texts),
        "empty": fmean(float(not text) for text in said),
        "repeated_responses": 1 - len(set(said)) / len(said),
        **{f"distinct_{n}": distinct(said, n) for n in (1, 2, 3)},
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words among all n-grams of the texts; 0 where there is none."""
    ngrams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
