"""A smooth curve of one number against another: locally weighted regression (LOWESS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

KNOTS = 33
"""Places, at equal shares of the data, at which a curve is fitted; between them it is straight."""
ROBUST_PASSES = 3
"""Fits in which outliers weigh less each time (Cleveland 1979: two or three are enough)."""
BACKFITTING_PASSES = 50
"""Turns of curve and levels. Where four fifths of the variance of x lie between groups the correlation within them
comes from 0.69 to 0.06; where half of it does, 10 turns are enough."""


@dataclass(frozen=True)
class Curve:
    """A curve through `values` at the ascending `places`, straight between them and constant beyond the two ends."""

    places: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, where: torch.Tensor) -> torch.Tensor:
        """The curve at `where`, of any shape: float32."""
        places, values = (
            torch.tensor(each, dtype=torch.float64, device=where.device) for each in (self.places, self.values)
        )
        if len(places) == 1:
            return values[0].float().expand(where.shape)
        inside = where.double().clamp(places[0], places[-1])
        right = torch.searchsorted(places, inside.contiguous()).clamp(1, len(places) - 1)
        share = (inside - places[right - 1]) / (places[right] - places[right - 1])
        return (values[right - 1] + share * (values[right] - values[right - 1])).float()

    def divided(self, by: float) -> Curve:
        """The same curve in units that are `by` times as large."""
        return Curve(self.places, tuple(value / by for value in self.values))

    def content(self) -> dict[str, list[float]]:
        """What `read` reads."""
        return {"places": list(self.places), "values": list(self.values)}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Curve:
        """From what `content` gave. Raises ValueError for what is no curve."""
        places, values = (tuple(float(each) for each in content.get(name, ())) for name in ("places", "values"))
        ascending = all(first < second for first, second in zip(places, places[1:], strict=False))
        if not places or len(places) != len(values) or not ascending or not all(map(math.isfinite, places + values)):
            raise ValueError("a curve needs ascending `places` and as many `values`, all finite")
        return cls(places, values)


def local_regression(
    x: torch.Tensor, y: torch.Tensor, *, span: float, knots: int = KNOTS, robust_passes: int = ROBUST_PASSES
) -> Curve:
    """E[y | x] as a smooth curve: Cleveland 1979, "Robust Locally Weighted Regression and Smoothing Scatterplots".

    At each of up to `knots` quantiles x0 of `x` [N] a straight line is fitted to the ceil(span N) nearest points with
    the weights (1 - (|x - x0| / h)^3)^3, h the distance of the farthest of them. The fit is repeated with each point's
    weight times (1 - (e / 6 m)^2)^2, e its residual and m the median of their sizes (0 beyond 6 m), `robust_passes`
    times; with 0 of them the curve is that of the mean, outliers and all. Where fewer than two values of x have a
    weight the line is the weighted mean. Raises ValueError for no points, `span` outside (0, 1].
    """
    if x.numel() == 0 or not 0 < span <= 1:
        raise ValueError(f"a curve through {x.numel()} points with span={span}: needs points, and a span in (0, 1]")
    x, y = x.double(), y.double()
    places = torch.quantile(x, torch.linspace(0, 1, knots, dtype=torch.float64)).unique()
    distances = (x - places[:, None]).abs()  # [knots, N]
    near = max(1, math.ceil(span * len(x)))
    reach = distances.sort(dim=1).values[:, near - 1].unsqueeze(1).clamp(min=1e-9)
    weights = (1 - (distances / reach).clamp(max=1) ** 3) ** 3
    robust = torch.ones_like(x)
    for again in range(robust_passes + 1):
        curve = Curve(tuple(places.tolist()), tuple(_lines(x, y, weights * robust, places).tolist()))
        residuals = (y - curve.at(x).double()).abs()
        scale = 6 * float(residuals.median())
        if scale < 1e-12 or again == robust_passes:
            return curve
        robust = (1 - (residuals / scale).clamp(max=1) ** 2) ** 2
    return curve


def within_groups(
    x: torch.Tensor, y: torch.Tensor, groups: torch.Tensor, *, span: float, robust_passes: int = ROBUST_PASSES
) -> Curve:
    """f of y = f(x) + a level of each group, smooth as `local_regression`: how y follows x among those of one group.

    What differs between groups alone (some have larger x, and for that reason or another larger y) is no part of it;
    the levels have mean 0 over the points.
    Fitted by backfitting (Buja, Hastie and Tibshirani 1989): curve and levels take turns at what the other one leaves.
    x, y [N]; `groups` [N] are numbers from 0. Raises ValueError as `local_regression` does.
    """
    count = int(groups.max()) + 1 if groups.numel() else 0
    sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, torch.ones_like(y, dtype=torch.float64))
    levels = torch.zeros(count, dtype=torch.float64)
    curve = local_regression(x, y, span=span, robust_passes=robust_passes)
    for _ in range(BACKFITTING_PASSES):
        left = y.double() - curve.at(x).double()
        levels = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, left - left.mean()) / sizes.clamp(min=1)
        curve = local_regression(x, y.double() - levels[groups], span=span, robust_passes=robust_passes)
    return curve


def _lines(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The weighted least-squares line of each row of `weights` [knots, N] at its place: [knots]."""
    total = weights.sum(1)
    empty = total <= 0  # robustness has left nothing near: every point counts alike
    weights = torch.where(empty.unsqueeze(1), torch.ones_like(weights), weights)
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    offset = x - mean_x[:, None]
    spread = (weights * offset**2).sum(1)
    slope = (weights * offset * y).sum(1) / spread.clamp(min=1e-12)
    flat = spread <= 1e-9 * total
    return mean_y + torch.where(flat, torch.zeros_like(slope), slope) * (places - mean_x)
