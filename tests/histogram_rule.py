"""msModelSlim's search in a histogram, which its recorded scales pin; quantcli searches otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantcli.quant.observers import bin_values

BINS, TARGET_BINS, STEP = 2048, 256, 1e-5


def histogram_of(counts: Tensor, low: float, high: float, bins: int = BINS) -> Tensor:
    """Counts in equal bins over [low, high], the last one closed; values outside go to the nearest: float64 [bins]."""
    index = counts.nonzero().squeeze(1)
    values, weights = bin_values()[index], counts[index].double()
    histogram = torch.zeros(bins, dtype=torch.float64)
    if high <= low:
        histogram[0] = weights.sum()
        return histogram
    place = ((values.double() - low) * (bins / (high - low))).floor_().clamp_(0, bins - 1).long()
    return histogram.index_add_(0, place, weights)


def search_bins(histogram: Tensor) -> tuple[int, int]:
    """First and last bin of the range that torch.ao's HistogramObserver, and msModelSlim after it, would choose.

    Quantiles 1e-5 k and 1 - 1e-5 k move inwards, k = 1, 2, …; of the two ends, the one that would pass more bins moves.
    The search stops where the error first grows: 256 equal target bins over the range, values spread evenly inside
    each source bin, every value taken to the centre of its target bin, or of the outermost one. histogram: float64
    [bins].
    """
    bins = len(histogram)
    below = histogram.cumsum(0)
    total = below[-1]
    quantiles = torch.arange(1, round(1 / STEP) + 1, dtype=torch.float64) * STEP
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
    """Squared error, in bin widths, of 256 target bins over source bins first … last, as `search_bins` describes."""
    target = (last - first + 1) / TARGET_BINS
    edges = torch.arange(len(histogram) + 1, dtype=torch.float64) - first
    index = (edges / target).floor_().clamp_(0, TARGET_BINS - 1)
    # The integral of the error from the left end of the range to each edge: whole target bins, then the last one.
    integral = (index * (target**3 / 4) + (edges - (index + 0.5) * target) ** 3 + (target / 2) ** 3) / 3
    return float(histogram @ integral.diff())
