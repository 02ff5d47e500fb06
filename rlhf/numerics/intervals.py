"""How far a figure measured on a few rows may lie from its true value: 95% intervals and standard errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the doctor's checks are read where torch is not loaded
    import torch

Z95 = 1.959963984540054
"""The normal distribution's 97.5% quantile."""
Interval = tuple[float, float]


def wilson_interval(share: float, count: float) -> Interval:
    """The 95% score interval of a share measured on `count` independent rows (Wilson 1927, JASA 22, eq. 9).

    Unlike share +- 2 errors it is neither empty at 0 or 1 nor leaves [0, 1], also for few rows (Brown, Cai and
    DasGupta 2001, Statistical Science 16). Of rows that come in dependent groups `count` is their
    `effective_number`: wide rather than narrow. Raises ValueError without rows.
    """
    if count <= 0:
        raise ValueError(f"a share of {count} rows has no interval")
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def effective_number(weights: torch.Tensor) -> float:
    """How many groups of one size tell as much as groups of these sizes do: Kish's (sum w)^2 / sum w^2.

    Survey Sampling, 1965, section 11.2. A few large ones among many small ones count as little more than the few.
    `weights` [n], positive.
    """
    values = weights.double()
    return float(values.sum() ** 2 / (values**2).sum())


def paired_interval(differences: torch.Tensor, weights: torch.Tensor) -> Interval:
    """The 95% interval of the mean difference of two shares measured on the same rows (Agresti and Min 2005,
    Statistics in Medicine 24, 729-740): Wald's, with half a row added to each of the four outcomes.

    `differences` [n] in [-1, 1], `weights` [n]: rows a group of dependent ones holds (all alike: the paper's interval).
    Groups of unlike size count as `effective_number` of them.
    Raises ValueError without rows.
    """
    if differences.numel() == 0:
        raise ValueError("a difference over no row has no interval")
    values, count = differences.double(), effective_number(weights)
    shares = weights.double() / weights.double().sum() * count
    mean = float((shares * values).sum()) / (count + 2)
    added = ((1 - mean) ** 2 + (1 + mean) ** 2) / 2 + mean**2
    error = math.sqrt(float((shares * (values - mean) ** 2).sum()) + added) / (count + 2)
    return max(-1.0, mean - Z95 * error), min(1.0, mean + Z95 * error)


def standard_error(values: torch.Tensor) -> float:
    """Of the mean of independent values [n]. Raises ValueError for fewer than two, whose spread is unknown."""
    if len(values) < 2:
        raise ValueError(f"the mean of {len(values)} values has no standard error: it takes two")
    return float(values.double().std()) / math.sqrt(len(values))


def correlation_interval(correlation: float, count: float) -> Interval:
    """The 95% interval of a correlation measured on `count` independent pairs of values (Fisher 1921, Metron 1).

    tanh(artanh(r) +- 1.96 / sqrt(n - 3)); (-1, 1) for three or fewer, which say nothing. Of values that come in
    dependent groups `count` is their `effective_number`.
    """
    if count <= 3:
        return -1.0, 1.0
    center, half = math.atanh(min(max(correlation, -1 + 1e-12), 1 - 1e-12)), Z95 / math.sqrt(count - 3)
    return math.tanh(center - half), math.tanh(center + half)


def bootstrap_interval(values: torch.Tensor, groups: torch.Tensor, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The 95% percentile interval of the mean of `values` [n] (Efron 1979, Annals of Statistics 7).

    Whole groups are drawn with replacement: what is of one group (`groups` [n], any numbers) is right or wrong
    together. The same for a `seed`. Raises ValueError without values.
    """
    import torch

    if values.numel() == 0:
        raise ValueError("the mean of no value has no interval")
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, group, values.double())
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, dtype=torch.float64)
    for number in range(resamples):
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        means[number] = sums[drawn].sum() / counts[drawn].sum()
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
