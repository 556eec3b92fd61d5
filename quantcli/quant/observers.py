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
# msModelSlim's histogram observer: source bins, target bins, quantile step.
_BINS, _TARGET_BINS, _STEP = 2048, 256, 1e-5
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
    counts: how often each bfloat16 value occurred, int64 [65536] in the order of `bin_values`; None if not counted.
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


def count_patterns(x: Tensor) -> Tensor:
    """How often each bit pattern of bfloat16 occurs in x rounded to bfloat16 (ties to even): int64 [65536].

    In the order of the patterns as unsigned integers; `in_order` sorts by value. x: any shape and float dtype.
    """
    patterns = x.to(torch.bfloat16).contiguous().view(torch.uint16).to(torch.int32)
    return torch.bincount(patterns.view(-1), minlength=VALUES)


def in_order(patterns: Tensor) -> Tensor:
    """Counts of bit patterns sorted by value, with those of negative zero added to zero: int64 [65536]."""
    counts = torch.cat((patterns[_HALF:].flip(0), patterns[:_HALF]))
    counts[_HALF] += counts[_HALF - 1]
    counts[_HALF - 1] = 0
    return counts


def in_patterns(counts: Tensor) -> Tensor:
    """What `in_order` sorted, back in the order of the bit patterns."""
    return torch.cat((counts[_HALF:], counts[:_HALF].flip(0)))


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
        histogram   the least quantization error among ranges that drop ever larger quantiles, see `_histogram`
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
    """The range that torch.ao's HistogramObserver (and msModelSlim's act_method 2) finds in 2048 bins.

    Quantiles 1e-5 k and 1 - 1e-5 k move inwards, k = 1, 2, …; of the two ends, the one that would pass more bins moves.
    The search stops where the error first grows: 256 equal target bins over the range, values spread evenly inside
    each source bin, every value taken to the centre of its target bin, or of the outermost one.
    """
    low, high = _extremes(observed)
    histogram = histogram_of(_counts(observed), low, high)
    first, last = search_bins(histogram)
    width = (high - low) / len(histogram)
    return low + width * first, low + width * (last + 1)


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


def histogram_of(counts: Tensor, low: float, high: float, bins: int = _BINS) -> Tensor:
    """Counts in equal bins over [low, high], the last one closed; values outside go to the nearest: float64 [bins]."""
    values, weights = _occupied(counts)
    histogram = torch.zeros(bins, dtype=torch.float64)
    if high <= low:
        histogram[0] = weights.sum()
        return histogram
    index = ((values.double() - low) * (bins / (high - low))).floor_().clamp_(0, bins - 1).long()
    return histogram.index_add_(0, index, weights)


def search_bins(histogram: Tensor) -> tuple[int, int]:
    """First and last bin of the range that `_histogram` describes. histogram: float64 [bins]."""
    bins = len(histogram)
    below = histogram.cumsum(0)
    total = below[-1]
    quantiles = torch.arange(1, round(1 / _STEP) + 1, dtype=torch.float64) * _STEP
    # First bin that reaches the lower quantile, last bin that does not pass the upper one.
    from_left = torch.searchsorted(below, quantiles * total).tolist()
    from_right = (torch.searchsorted(below, (1 - quantiles) * total, right=True) - 1).tolist()
    first, last, error = 0, bins - 1, math.inf
    left = right = 0  # quantile steps taken at each end
    while left + right < len(quantiles) and first < last:
        lower = min(max(from_left[left], first), last)
        upper = max(min(from_right[right], last), first)
        trial = (first, last)
        if lower - first > last - upper:
            left, trial = left + 1, (lower, last)
        else:
            right, trial = right + 1, (first, upper)
        if trial == (first, last):
            continue
        trial_error = bin_error(histogram, *trial)
        if trial_error > error:
            break
        (first, last), error = trial, trial_error
    return first, last


def bin_error(histogram: Tensor, first: int, last: int) -> float:
    """Squared error, in bin widths, of 256 target bins over source bins first … last, as `_histogram` describes."""
    target = (last - first + 1) / _TARGET_BINS
    edges = torch.arange(len(histogram) + 1, dtype=torch.float64) - first
    index = (edges / target).floor_().clamp_(0, _TARGET_BINS - 1)
    # The integral of the error from the left end of the range to each edge: whole target bins, then the last one.
    integral = (index * (target**3 / 4) + (edges - (index + 0.5) * target) ** 3 + (target / 2) ** 3) / 3
    return float(histogram @ integral.diff())


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
