"""What is read from the curves of `learning.py`: values at an equal KL, when gold turns, a fit of its course.

A curve is a list of points (mappings of numbers), one for each evaluation, in the order of training. d is the square
root of the KL divergence to the SFT model in nats per response (Bai et al., arXiv 2204.05862; Gao et al. 2210.10760).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

Point = Mapping[str, float]


def with_distance(curve: Sequence[Point]) -> list[dict[str, float]]:
    """The points with "d" = sqrt(KL); an estimate below 0 counts as 0."""
    return [{**point, "d": math.sqrt(max(0.0, point["kl"]))} for point in curve]


def at_first(curve: Sequence[Point], along: str, value: float, of: str) -> float | None:
    """`of` where `along` first reaches `value`, on straight lines between points; None where it never does."""
    if curve[0][along] >= value:
        return curve[0][of]
    for before, after in zip(curve, curve[1:], strict=False):
        if after[along] >= value:
            share = (value - before[along]) / (after[along] - before[along])
            return before[of] + share * (after[of] - before[of])
    return None


def best_within(curve: Sequence[Point], distance: float, of: str = "gold") -> float:
    """The highest `of` on the curve where d is at most `distance`, on straight lines in d between evaluations.

    So a curve that went far and came back is judged by where it came back to. The first point must be within.
    """
    values = [point[of] for point in curve if point["d"] <= distance]
    for before, after in zip(curve, curve[1:], strict=False):
        if min(before["d"], after["d"]) <= distance < max(before["d"], after["d"]):
            share = (distance - before["d"]) / (after["d"] - before["d"])
            values.append(before[of] + share * (after[of] - before[of]))
    return max(values)


def equal_kl(ours: Sequence[Point], peer: Sequence[Point], *, of: str = "gold", places: int = 20) -> dict[str, float]:
    """`of` of ours less the peer's where both may have the same KL.

    At `places` equal steps of d, from 0 (without it) to the largest d that both reach, each side counts with
    `best_within`. "mean" is over the places, "lowest" the place that is worst for ours, "last" the one at the largest
    KL, "kl" in nats.
    """
    curves = [with_distance(curve) for curve in (ours, peer)]
    reach = min(max(point["d"] for point in curve) for curve in curves)
    distances = [reach * place / places for place in range(1, places + 1)]
    differences = [best_within(curves[0], d, of) - best_within(curves[1], d, of) for d in distances]
    return {
        "kl": reach**2,
        "mean": float(np.mean(differences)),
        "lowest": min(differences),
        "last": differences[-1],
    }


def turning_point(curve: Sequence[Point], *, fall: float = 0.01, window: int = 3) -> dict[str, Any]:
    """Where gold is highest, and whether it has turned: it ends lower by `fall` though the score has risen since.

    Both are means over `window` evaluations in a row (fewer where the curve has fewer), since a single one has an
    error of about `fall`; iteration and KL are those of the middle one.
    """
    window = min(window, len(curve))
    means = [
        {
            **{name: float(np.mean([point[name] for point in part])) for name in ("gold", "score")},
            **{name: part[window // 2][name] for name in ("iteration", "kl")},
        }
        for start in range(len(curve) - window + 1)
        for part in [curve[start : start + window]]
    ]
    peak, end = max(means, key=lambda point: point["gold"]), means[-1]
    turned = peak["gold"] - end["gold"] >= fall and end["score"] > peak["score"]
    return {"turned": turned, "peak": peak, "end": end}


def fit_overoptimisation(curve: Sequence[Point], form: Literal["rl", "bon"]) -> dict[str, float] | None:
    """Gao et al., section 3.1: gold above its start = d (alpha - beta log d) ("rl") or d (alpha - beta d) ("bon").

    Least squares over the points with d > 0. "peak_kl" is where the fit is highest, in nats (d = exp(alpha / beta - 1)
    and alpha / (2 beta)), infinite where beta is not above 0 and the fit never turns; "r2" the share of the variance
    of gold that it explains. None of fewer than three such points: two numbers go through two of them.
    """
    points = with_distance(curve)
    moved = [point for point in points if point["d"] > 0]
    if len(moved) < 3:
        return None
    d = np.array([point["d"] for point in moved])
    gold = np.array([point["gold"] for point in moved]) - points[0]["gold"]
    bend = np.log(d) if form == "rl" else d
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * bend], axis=1), gold, rcond=None)
    left = gold - d * (alpha - beta * bend)
    highest = math.inf
    if beta > 0:
        highest = math.exp(min(alpha / beta - 1, 300.0)) if form == "rl" else alpha / (2 * beta)
    variance = float(((gold - gold.mean()) ** 2).sum())
    r2 = 1 - float((left**2).sum()) / variance if variance else math.nan
    return {"alpha": float(alpha), "beta": float(beta), "peak_kl": highest**2, "r2": r2}
