"""Masked statistics of tokens and sequences: pure functions of tensors.

`mask` is True where an element counts; everything outside it changes no result.
"""

from __future__ import annotations

import torch


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of `values` where `mask` is True. Both of one shape; returns a scalar."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask` is True; raises ValueError when the mask is empty."""
    count = mask.sum()
    if count == 0:
        raise ValueError("masked_mean of an empty mask: no element counts")
    return masked_sum(values, mask) / count


def masked_variance(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Population variance (divided by the count) of `values` where `mask` is True."""
    mean = masked_mean(values, mask)
    return masked_mean((values - mean) ** 2, mask)


def masked_whiten(
    values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> torch.Tensor:
    """Scale to variance 1 over the mask and, with `shift_mean`, shift to mean 0; 0 outside the mask.

    Rewards are whitened with `shift_mean=False`, which keeps their mean (Huang et al., "The N implementation
    details of RLHF with PPO"). Hand in the values of all ranks: statistics of a shard are not those of the batch.
    """
    mean = masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_variance(values, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson's correlation of two vectors [N]; 0 where one of them is constant."""
    first, second = first.double() - first.double().mean(), second.double() - second.double().mean()
    scale = first.norm() * second.norm()
    return float((first * second).sum() / scale) if scale > 1e-9 else 0.0


def without_group_means(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """`values` [N] less the mean of their group, which `groups` [N] numbers from 0: [N] float64."""
    counts = torch.bincount(groups).clamp(min=1)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device).index_add(0, groups, values.double())
    return values.double() - (sums / counts)[groups]


def correlation_ratio(values: torch.Tensor, groups: torch.Tensor) -> float:
    """The share of the variance of `values` [N] that lies between the groups: eta squared, in [0, 1].

    Pearson 1905, "On the general theory of skew correlation". 0 where nothing varies.
    """
    total = float(((values.double() - values.double().mean()) ** 2).sum())
    within = float((without_group_means(values, groups) ** 2).sum())
    return max(0.0, 1 - within / total) if total > 1e-18 else 0.0


def repeated_share(token_ids: torch.Tensor, mask: torch.Tensor, n: int = 4) -> float:
    """Share of the n-grams of all rows that stood earlier in their own row, see `repeated_ngrams`; 0 without any."""
    repeated, ngrams = repeated_ngrams(token_ids, mask, n)
    return float(repeated.sum() / ngrams.sum().clamp(min=1))


def repeated_shares(token_ids: torch.Tensor, mask: torch.Tensor, n: int = 4) -> torch.Tensor:
    """The same of each row: [B] float32; 0 for a row shorter than n."""
    repeated, ngrams = repeated_ngrams(token_ids, mask, n)
    return repeated / ngrams.clamp(min=1)


def repeated_ngrams(token_ids: torch.Tensor, mask: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many n-grams of each row stood earlier in it, and how many it has: [B] each; `token_ids`, `mask` [B, T].

    `mask` is True on a prefix of each row.
    """
    if token_ids.shape[1] < n:
        none = torch.zeros(len(token_ids), dtype=torch.int64, device=token_ids.device)
        return none, none
    keys = torch.zeros_like(token_ids[:, n - 1 :], dtype=torch.int64)
    for offset in range(n):  # a polynomial that wraps around 2^64: two n-grams of one row hardly ever meet
        keys = keys * 1_000_000_007 + token_ids[:, offset : offset + keys.shape[1]] + 1
    inside = mask.bool()[:, n - 1 :]
    apart = -1 - torch.arange(keys.shape[1], device=keys.device)  # what lies outside repeats nothing
    ordered = torch.where(inside, keys, apart).sort(dim=1).values
    return (ordered[:, 1:] == ordered[:, :-1]).sum(1), inside.sum(1)


def last_true(mask: torch.Tensor) -> torch.Tensor:
    """Column of the last True in each row of `mask` [B, T]: [B]; 0 for a row without one."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, torch.zeros_like(columns)).amax(dim=1)


def score_last(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The value at the last real token of each row: values [B, L], mask [B, L] -> scores [B].

    Read from the mask, never from `ids != pad`: the padding token may be the end-of-sequence token.
    """
    return values.gather(1, last_true(attention_mask.bool()).unsqueeze(1)).squeeze(1)
