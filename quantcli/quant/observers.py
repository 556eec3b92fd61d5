"""Ranges of static 8-bit activations, from the extremes of each sample and the counts of all values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.quant.activation import QMAX, QMIN

VALUES = 1 << 16
"""Bit patterns of bfloat16; value counts have one bin for each."""
AGGREGATIONS = ("max", "mean")
MIXED_RANGE_PARM = 50.0
"""Up to here `mixed` takes the histogram's range, above it the extremes (msModelSlim, act_method 3)."""

_HALF = VALUES // 2
_LEVELS = QMAX - QMIN  # 255 steps
_BINS = 2048
# Search of `mse`: ratio and number of the first grid (down to 1e-4 of the extremes), ratios of finer ones around the
# best _KEPT, and how many steps those reach; along one number if symmetric, across two otherwise.
_ALONG = (0.99, 900, (0.9985, 0.9998), 8)
_ACROSS = (0.75, 32, (0.93, 0.982, 0.9955), 4)
_KEPT = 3
# Elements of a (candidates x values) table of errors that exist at a time: a float32 copy that stays in the cache.
_TABLE = 1 << 18


@dataclass(frozen=True, eq=False)
class Observed:
    """What calibration saw of one activation.

    sample_minimum, sample_maximum: extremes of each sample over all its elements, float32 [samples].
    counts: how often each bfloat16 value occurred, or an estimate of it from some of the tokens, int64 [65536] in the
        order of `bin_values`; None if not counted.
    range_parm: max|x| over the spread of the first samples (`InputStatistics.range_parm`).
    """

    sample_minimum: Tensor
    sample_maximum: Tensor
    counts: Tensor | None = None
    range_parm: float = 0.0


def bin_values() -> Tensor:
    """The values that counts count, ascending: float32 [65536].

    Entry i is the bfloat16 whose bits are i - 32768 for i >= 32768 and 65535 - i below, so bin 32768 is zero and bin
    32767, negative zero, stays empty. Infinities stand for values that round beyond the largest bfloat16, and are given
    as that; patterns of NaN, whose bins stay empty, as well.
    """
    index = torch.arange(VALUES, dtype=torch.int32)
    bits = torch.where(index < _HALF, VALUES - 1 - index, index - _HALF)
    largest = torch.finfo(torch.bfloat16).max
    values = bits.to(torch.int16).view(torch.bfloat16).float()
    values = torch.where(values.isnan(), torch.where(index < _HALF, -torch.inf, torch.inf), values)
    return values.clamp_(-largest, largest)


def count_patterns(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """How often each bit pattern of bfloat16 occurs in x rounded to bfloat16 (ties to even): int64 [65536].

    In the order of the patterns as unsigned integers; `in_order` sorts by value. x: [elements] of any float dtype;
    scratch: int32 [elements] to overwrite.
    """
    patterns = x.to(torch.bfloat16).contiguous().view(torch.uint16)
    wide = patterns.to(torch.int32) if scratch is None else scratch.copy_(patterns)
    return torch.bincount(wide, minlength=VALUES)


def in_order(patterns: Tensor) -> Tensor:
    """Counts of bit patterns sorted by value, with those of negative zero added to zero: int64 [65536]."""
    counts = torch.cat((patterns[_HALF:].flip(0), patterns[:_HALF]))
    counts[_HALF] += counts[_HALF - 1]
    counts[_HALF - 1] = 0
    return counts


def kurtosis(counts: Tensor) -> float:
    """Excess kurtosis E[((a - mean) / sigma)^4] - 3 with the population's sigma; 0 where all values are equal.

    counts: int64 [65536].
    """
    values, weights = _occupied(counts)
    if len(values) < 2:
        return 0.0
    values, weights = values.double(), weights / weights.sum()
    centred = values - weights @ values
    centred /= centred.abs().amax()  # fourth powers of activations leave no range otherwise
    return float(weights @ centred**4 / (weights @ centred**2) ** 2) - 3.0


def quantile_score(counts: Tensor, absolute_maximum: float) -> float:
    """int8 step over inter-quartile range, (2 max|a| / 254) / (Q75 - Q25 + 1e-10), as msModelSlim's `quantile`.

    counts: int64 [65536]; absolute_maximum: max|a|.
    """
    low, high = _quantiles(*_occupied(counts), 0.25, 0.75)
    return (2 * absolute_maximum / 254) / (high - low + 1e-10)


def activation_range(
    observed: Observed,
    method: str,
    *,
    symmetric: bool,
    aggregation: str = "max",
    percentile: float = 99.99,
) -> tuple[float, float]:
    """(low, high) of a static int8 activation, as `quant.activation.static_parameters` takes them.

    It lies within the extremes of what was observed and includes 0. Ranges are symmetric only where the values are:
    symmetric scales come from the larger end.

        minmax      the extremes; with aggregation "mean" the arithmetic means over samples of each sample's extremes
        histogram   the range of 2048 bins of the least expected squared error, see `_histogram`
        mixed       histogram where range_parm <= 50, minmax above (msModelSlim, act_method 3)
        percentile  the middle `percentile` % of the values, of |x| if symmetric; linear between order statistics
        mse         the least expected squared error of int8 codes over all values

    Raises ValueError for a method, an aggregation or a percentile (0 < percentile <= 100) that does not exist, without
    any sample, and without counts where a method needs them.
    """
    if method not in RANGE_METHODS:
        raise ValueError(f"no range method {method}; there are {', '.join(RANGE_METHODS)}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"no aggregation {aggregation}; there are {', '.join(AGGREGATIONS)}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")
    if observed.sample_minimum.numel() == 0:
        raise ValueError("no sample was observed")
    low, high = RANGE_METHODS[method](observed, symmetric, aggregation, percentile)
    least, most = _extremes(observed)
    return max(min(low, 0.0), min(least, 0.0)), min(max(high, 0.0), max(most, 0.0))


def _extremes(observed: Observed) -> tuple[float, float]:
    return float(observed.sample_minimum.amin()), float(observed.sample_maximum.amax())


def _minmax(observed: Observed, symmetric: bool, aggregation: str, percentile: float) -> tuple[float, float]:
    if aggregation == "max":
        return _extremes(observed)
    return float(observed.sample_minimum.double().mean()), float(observed.sample_maximum.double().mean())


def _histogram(observed: Observed, symmetric: bool, aggregation: str, percentile: float) -> tuple[float, float]:
    """Of the ranges between edges of 2048 equal bins over the extremes, the one around the range of least error.

    torch.ao's HistogramObserver, and msModelSlim's act_method 2 after it, estimate the error from values spread evenly
    in each bin. Where an outlier makes bins wider than most values, that finds errors that are not there, and clips the
    outlier: on SmolLM2 the perplexity of the clipped model is twice as high. Here the values themselves count.
    """
    low, high = _extremes(observed)
    best_low, best_high = _mse(observed, symmetric, aggregation, percentile)
    width = (high - low) / _BINS
    if not width > 0:
        return low, high
    first, last = math.floor((best_low - low) / width), math.ceil((best_high - low) / width)
    return low + width * max(first, 0), low + width * min(last, _BINS)


def _mixed(observed: Observed, symmetric: bool, aggregation: str, percentile: float) -> tuple[float, float]:
    method = _histogram if observed.range_parm <= MIXED_RANGE_PARM else _minmax
    return method(observed, symmetric, aggregation, percentile)


def _percentile(observed: Observed, symmetric: bool, aggregation: str, percentile: float) -> tuple[float, float]:
    counts = _counts(observed)
    if symmetric:
        (bound,) = _quantiles(*_occupied(_magnitudes(counts)), percentile / 100)
        return -bound, bound
    outside = (100 - percentile) / 200
    low, high = _quantiles(*_occupied(counts), outside, 1 - outside)
    return low, high


def _mse(observed: Observed, symmetric: bool, aggregation: str, percentile: float) -> tuple[float, float]:
    """The (low, high) of least sum_v n_v (v - dequantized(v))^2 over all values v that occur n_v times.

    Both ends are shrunk on a geometric grid; around its best points follow ever finer ones. The extremes are the first
    trial, so that the error is never above theirs.
    """
    values, weights = _occupied(_counts(observed))
    low, high = _extremes(observed)
    low, high = min(low, 0.0), max(high, 0.0)
    bound = max(-low, high)
    if bound == 0:
        return 0.0, 0.0
    unit = 2.0 ** math.frexp(bound)[1]  # squares of what is at most 1 do not overflow; a power of two rounds nothing
    values, weights = values / unit, (weights / weights.sum()).float()
    widest = torch.tensor([[-bound, bound] if symmetric else [low, high]]) / unit
    shrink, count, finer, reach = _ALONG if symmetric else _ACROSS
    ends = widest * _factors(shrink ** torch.arange(count), widest, symmetric)
    losses = code_errors(values, weights, ends, symmetric)
    for step in finer:
        best = ends[losses.topk(min(_KEPT, len(ends)), largest=False).indices]
        around = _factors(step ** torch.arange(-reach, reach + 1), widest, symmetric)
        near = (torch.cat((best, widest)).unsqueeze(1) * around).view(-1, 2)
        near = torch.maximum(torch.minimum(near, widest.clamp(min=0)), widest.clamp(max=0))
        ends = torch.cat((widest, best, near)).unique(dim=0)
        losses = code_errors(values, weights, ends, symmetric)
    found = ends[losses.argmin()].double() * unit
    return float(found[0]), float(found[1])


def _factors(ratios: Tensor, widest: Tensor, symmetric: bool) -> Tensor:
    """What both ends are multiplied with: equal ratios if symmetric, otherwise all pairs, 1 for an end that is zero."""
    if symmetric:
        return ratios.unsqueeze(1).expand(-1, 2)
    sides = [ratios if end else torch.ones(1) for end in widest[0].tolist()]
    return torch.cartesian_prod(*sides)


def code_errors(values: Tensor, weights: Tensor, ends: Tensor, symmetric: bool) -> Tensor:
    """sum_v w_v (v - dequantized(v))^2 for each range, with scale and zero point as `static_parameters` gives them.

    values, weights: float32 [values]; ends: float32 [ranges, 2], low <= 0 <= high, low < high. Gives float32 [ranges].
    """
    low, high = ends[:, :1], ends[:, 1:]
    scale = torch.maximum(-low, high) / QMAX if symmetric else high / _LEVELS - low / _LEVELS
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale) if symmetric else ((-low / scale).round() + QMIN).clamp(QMIN, QMAX)
    errors = torch.empty(len(ends))
    rows = max(1, _TABLE // len(values))
    for part in scale.squeeze(1).argsort().split(rows):
        s, z = scale[part], zero[part]
        zeroed = values.abs() < 0.499 * s[0]  # they become 0 at each of these scales
        v, w = values[~zeroed], weights[~zeroed]
        table = (v / s).round_().clamp_(QMIN - z, QMAX - z).mul_(s).sub_(v)
        errors[part] = table.square_() @ w + values[zeroed].square() @ weights[zeroed]
    return errors


def _counts(observed: Observed) -> Tensor:
    if observed.counts is None or not bool(observed.counts.any()):
        raise ValueError("this method needs the counts of the values, which were not gathered")
    return observed.counts.cpu()


def _occupied(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Values that occur, float32 ascending, and how often, float64."""
    counts = counts.cpu()
    index = counts.nonzero().squeeze(1)
    return bin_values()[index], counts[index].double()


def _magnitudes(counts: Tensor) -> Tensor:
    """Counts of |x|."""
    folded = counts.clone()
    folded[_HALF + 1 :] += counts[: _HALF - 1].flip(0)
    folded[:_HALF] = 0
    return folded


def _quantiles(values: Tensor, weights: Tensor, *fractions: float) -> list[float]:
    """Quantiles by linear interpolation between order statistics, as torch.quantile over all values; 0 without any."""
    if len(values) == 0:
        return [0.0] * len(fractions)
    ends = weights.cumsum(0)  # exact: whole numbers below 2^53
    position = torch.tensor(fractions, dtype=torch.float64) * (ends[-1] - 1)
    below = values[torch.searchsorted(ends, position.floor(), right=True)].double()
    above = values[torch.searchsorted(ends, position.ceil(), right=True)].double()
    return torch.lerp(below, above, position.frac()).tolist()


RangeMethod = Callable[[Observed, bool, str, float], tuple[float, float]]
"""(observed, symmetric, aggregation, percentile) -> low, high."""

RANGE_METHODS: dict[str, RangeMethod] = {
    "minmax": _minmax,
    "histogram": _histogram,
    "mixed": _mixed,
    "percentile": _percentile,
    "mse": _mse,
}
