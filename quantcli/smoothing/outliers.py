"""Scales for the few channels that reach far beyond the others; all others keep the scale 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantcli.smoothing.group import FLOOR, ErrorOf, Found, Group, largest_weight, least_error, shared_maximum
from quantcli.smoothing.strength import smoothquant

_SIGMAS = 3.0  # below this reach, in standard deviations, no channel is an outlier
_THRESHOLDS = 100
_QUANTILES, _REACH = (0.2, 0.8), 1.5
_EXPONENT = 0.7


def outlier_suppression(group: Group, error: ErrorOf, thresholds: int = _THRESHOLDS) -> Found:
    """m2: s_c = sqrt(thr_c / Wmax_c) where thr_c > t, else 1, with the threshold t of least error (msModelSlim's m2).

    thr_c is `centred_maximum`, σ is `spread`, t one of `thresholds` evenly from σ to max_c thr_c. If max_c thr_c < 3σ
    there are no outliers, and the scale is that of m1. Thresholds that choose the same channels are one trial; of equal
    errors the least t counts. At most that many calls of `error`. Channels that share a producer's channel take the
    largest thr and Wmax among them.

    The factors and the candidates are msModelSlim's on the four groups recorded from it; the loss by which it chooses
    among them is not known.

    Raises:
        DataError: the error is finite for no threshold.
    """
    reach = shared_maximum(group.centred_maximum, group.channels)
    largest = float(reach.amax())
    if largest < _SIGMAS * group.spread or largest <= 0:
        found = smoothquant(group, error)
        return Found(found.scale, {**found.facts, "reach": largest / group.spread if group.spread else 0.0})
    weights = shared_maximum(largest_weight(group), group.channels).clamp(min=FLOOR)
    strong = (reach / weights).clamp(min=0).sqrt().clamp(min=FLOOR)

    def scale(threshold: float) -> Tensor:
        return strong.where(reach > threshold, 1.0)

    def trials() -> Iterator[tuple[float, Tensor]]:
        seen = -1
        for threshold in torch.linspace(group.spread, largest, thresholds).tolist():
            chosen = int((reach > threshold).sum())  # fewer with every step, so the number says which
            if chosen != seen:
                seen = chosen
                yield threshold, scale(threshold)

    threshold, loss = least_error(trials(), error)
    facts = {"reach": largest / group.spread if group.spread else 0.0, "threshold": threshold, "error": loss}
    return Found(scale(threshold), {**facts, "channels": float((reach > threshold).sum())})


def cbq(group: Group, error: ErrorOf) -> Found:
    """m5: s_c = (v_c / v*)^0.7 for outlier channels, v* the largest v that is none; all others 1. `error` is not asked.

    Once with v_c = max_t x_tc and once with v_c = -min_t x_tc, of which the larger s counts. Outliers are found coarse
    to fine (Ding et al. 2023, CBQ, arXiv 2312.07950, algorithm 1): those above q80 + 1.5 (q80 - q20) are sorted and cut
    where

        (least v above the cut - largest v below)² - Var(those of them below)

    is largest; below stays at least one, unless there is but one. Weights play no part. Channels that share a
    producer's channel take the largest v among them.

    This gives msModelSlim's scales on the four groups recorded from it. Those do not tell the factor of the variance
    (1, as in the paper) or quantiles of 20 and 80 % from 25 and 75 %. Where no inlier is positive, s is 1.
    """
    maximum = shared_maximum(group.maximum, group.channels)
    minimum = shared_maximum(-group.minimum, group.channels)
    sides = torch.stack([_outlier_scale(v.clamp(min=0)) for v in (maximum, minimum)])
    scale = sides.amax(0)
    return Found(scale, {"channels": float((scale > 1).sum())})


def _outlier_scale(v: Tensor) -> Tensor:
    ordered = v.sort().values
    low, high = torch.quantile(v, torch.tensor(_QUANTILES, dtype=v.dtype, device=v.device)).tolist()
    coarse = ordered[ordered > high + _REACH * (high - low)]
    if not len(coarse):
        return torch.ones_like(v)
    cut = len(v) - len(coarse) + _cut(coarse)
    inlier = ordered[cut - 1] if cut else ordered.new_zeros(())
    if inlier <= 0:
        return torch.ones_like(v)
    return (v / inlier).pow(_EXPONENT).where(v > inlier, 1.0)


def _cut(coarse: Tensor) -> int:
    """Index of the first outlier among sorted candidates [n], n > 0."""
    if len(coarse) == 1:
        return 0
    scores = []
    for i in range(1, len(coarse)):
        apart = float(coarse[i] - coarse[i - 1]) ** 2
        scores.append(apart - float(coarse[:i].double().var(correction=0)))
    return 1 + scores.index(max(scores))
