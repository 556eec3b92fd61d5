"""Ranges of static activations against direct quantization of the values, in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from histogram_rule import bin_error, histogram_of, search_bins
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.quant.activation import static_parameters
from quantcli.quant.observers import (
    RANGE_METHODS,
    VALUES,
    Observed,
    activation_range,
    bin_values,
    count_patterns,
    in_order,
    kurtosis,
    quantile_score,
)

NORMAL: Callable[[int], Tensor] = lambda n: torch.randn(n, generator=torch.Generator().manual_seed(n))  # noqa: E731
SHAPES: dict[str, Callable[[int], Tensor]] = {
    "normal": NORMAL,
    "outlier": lambda n: torch.cat((NORMAL(n), torch.tensor([40.0]))),
    "two outliers": lambda n: torch.cat((NORMAL(n), torch.tensor([30.0, -300.0]))),
    "heavy tails": lambda n: NORMAL(n) * NORMAL(n + 1)[:n].exp(),
    "one-sided": lambda n: torch.nn.functional.silu(4 * NORMAL(n)),
    "positive": lambda n: NORMAL(n).relu() ** 3 + 0.5,
    "even": lambda n: 3 * torch.rand(n, generator=torch.Generator().manual_seed(n)) - 1,
}


def observed(x: Tensor, range_parm: float = 0.0) -> Observed:
    """x as one sample; its values rounded to bfloat16, so that counts hold all there is to know."""
    counts = in_order(count_patterns(x))
    return Observed(x.amin().view(1), x.amax().view(1), counts, range_parm)


def values(shape: str, n: int) -> Tensor:
    return SHAPES[shape](n).bfloat16().float()


def squared_error(x: Tensor, low: float, high: float, symmetric: bool) -> float:
    """Mean squared error of the codes that static_parameters leads to."""
    scale, zero = (p.double() for p in static_parameters(low, high, symmetric))
    codes = ((x.double() / scale).round() + zero).clamp(-128, 127)
    return float((((codes - zero) * scale) - x.double()).square().mean())


def test_bins_ascend_through_every_bfloat16() -> None:
    bins = bin_values()
    assert bool((bins.diff() >= 0).all())
    assert bins[VALUES // 2] == 0
    every = torch.arange(VALUES, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    assert set(every.float().tolist()) == set(bins.tolist())
    times = every.repeat_interleave(torch.arange(len(every)) % 3)
    counts = in_order(count_patterns(times))
    assert Counter({v: n for v, n in zip(bins.tolist(), counts.tolist(), strict=True) if n}) == Counter(times.tolist())


@pytest.mark.parametrize("shape", SHAPES)
def test_kurtosis_and_quantile_score_of_all_values(shape: str) -> None:
    x = values(shape, 501)
    wide = x.double()
    centred = (wide - wide.mean()) / wide.std(correction=0)
    assert kurtosis(observed(x).counts) == pytest.approx(float((centred**4).mean()) - 3, rel=1e-9, abs=1e-9)
    lower, upper = torch.quantile(wide, torch.tensor([0.25, 0.75]).double())
    expected = 2 * float(x.abs().amax()) / 254 / (float(upper - lower) + 1e-10)
    assert quantile_score(observed(x).counts, float(x.abs().amax())) == pytest.approx(expected, rel=1e-9)


def test_kurtosis_of_equal_and_of_huge_values() -> None:
    assert kurtosis(observed(torch.full((9,), 3.0)).counts) == 0
    huge = torch.tensor([-(2.0**126), 2.0**126])
    assert kurtosis(observed(huge).counts) == pytest.approx(-2)


def test_minmax_takes_extremes_or_their_means() -> None:
    seen = Observed(torch.tensor([-1.0, -4.0, 0.5]), torch.tensor([2.0, 1.0, 6.0]))
    assert activation_range(seen, "minmax", symmetric=False) == (-4, 6)
    assert activation_range(seen, "minmax", symmetric=False, aggregation="mean") == (-1.5, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_cuts_what_torch_quantile_says(shape: str, percentile: float) -> None:
    x = values(shape, 1000)
    tail = torch.tensor([(100 - percentile) / 200, 1 - (100 - percentile) / 200], dtype=torch.float64)
    low, high = torch.quantile(x.double(), tail).tolist()
    found = activation_range(observed(x), "percentile", symmetric=False, percentile=percentile)
    assert found == pytest.approx((min(low, 0), max(high, 0)), rel=1e-9)
    bound = float(torch.quantile(x.double().abs(), percentile / 100))
    found = activation_range(observed(x), "percentile", symmetric=True, percentile=percentile)
    assert max(-found[0], found[1]) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_within_one_percent_of_the_best_range(shape: str, symmetric: bool) -> None:
    x = values(shape, 400)
    low, high = min(float(x.amin()), 0.0), max(float(x.amax()), 0.0)
    ratios = torch.cat((torch.logspace(-3, -1, 12), torch.linspace(0.1, 1, 90))).tolist()
    if symmetric:
        bound = max(-low, high)
        tried = [(-bound * r, bound * r) for r in torch.linspace(0.001, 1, 4000).tolist()]
    else:
        tried = [(low * a, high * b) for a in (ratios if low else [1.0]) for b in ratios]
    best = min(squared_error_table(x, tried, symmetric))
    found = squared_error(x, *activation_range(observed(x), "mse", symmetric=symmetric), symmetric)
    assert found <= 1.01 * best


def squared_error_table(x: Tensor, ranges: list[tuple[float, float]], symmetric: bool) -> list[float]:
    """squared_error of many ranges, in float64 throughout."""
    errors = []
    for part in torch.tensor(ranges, dtype=torch.float64).split(500):
        low, high = part[:, :1], part[:, 1:]
        scale = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
        zero = torch.zeros_like(scale) if symmetric else ((-low / scale).round() - 128).clamp(-128, 127)
        codes = ((x.double() / scale).round() + zero).clamp(-128, 127)
        errors += ((codes - zero) * scale - x.double()).square().mean(1).tolist()
    return errors


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 300), power=st.integers(-60, 60), symmetric=st.booleans())
def test_mse_is_never_worse_than_the_extremes(seed: int, n: int, power: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) ** 3 + torch.randn(1, generator=generator)
    x = (x * 2.0**power).bfloat16().float()
    found = squared_error(x, *activation_range(observed(x), "mse", symmetric=symmetric), symmetric)
    assert found <= squared_error(x, float(x.amin()), float(x.amax()), symmetric) * (1 + 1e-5)


def test_mse_gives_up_an_outlier_only_where_that_pays() -> None:
    """n normal values lose n s^2 / 12 to steps s = a / 127, the outlier (30 - a)^2 to clipping: best at
    a = 30 / (1 + n / (12 * 127^2)), which is 19.8 for n = 100 000."""
    many = torch.cat((NORMAL(100_000), torch.tensor([30.0])))
    assert activation_range(observed(many), "mse", symmetric=True)[1] == pytest.approx(19.8, rel=0.02)
    few = torch.tensor([-1.0, 0.1, 1.0, 30.0])
    assert activation_range(observed(few), "mse", symmetric=True)[1] > 29


@pytest.mark.parametrize("shape", SHAPES)
def test_histogram_error_is_that_of_evenly_spread_values(shape: str) -> None:
    """The closed form against 64 points in each source bin, taken to the centre of their target bin."""
    x = values(shape, 3000)
    histogram = histogram_of(observed(x).counts, float(x.amin()), float(x.amax()))
    assert torch.equal(histogram, torch.histc(x.double(), 2048))
    points = torch.arange(64 * 2048, dtype=torch.float64).add(0.5).div(64)
    weights = histogram.repeat_interleave(64) / 64
    for first, last in ((0, 2047), (100, 1400), (900, 1300)):
        target = (last - first + 1) / 256
        code = ((points - first) / target).floor().clamp(0, 255)
        expected = (((code + 0.5) * target + first - points).square() * weights).sum()
        assert bin_error(histogram, first, last) == pytest.approx(float(expected), rel=2e-3)


def test_histogram_search_follows_its_rule_step_by_step() -> None:
    for shape in SHAPES:
        x = values(shape, 20_000)
        histogram = histogram_of(observed(x).counts, float(x.amin()), float(x.amax()))
        assert search_bins(histogram) == slow_search(histogram), shape


def slow_search(histogram: Tensor) -> tuple[int, int]:
    below = histogram.cumsum(0).tolist()
    total, first, last, error = below[-1], 0, len(below) - 1, math.inf
    left = right = 0
    while left + right < 100_000:
        lower, upper = first, last
        while lower < last and below[lower] < (left + 1) * 1e-5 * total:
            lower += 1
        while upper > first and below[upper] > (1 - (right + 1) * 1e-5) * total:
            upper -= 1
        if lower - first > last - upper:
            left, trial = left + 1, (lower, last)
        else:
            right, trial = right + 1, (first, upper)
        if trial != (first, last):
            if (new := bin_error(histogram, *trial)) > error:
                break
            (first, last), error = trial, new
    return first, last


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_histogram_is_the_best_range_of_bin_edges_but_for_a_bin(shape: str, symmetric: bool) -> None:
    x = values(shape, 5000)
    low, high = float(x.amin()), float(x.amax())
    found = activation_range(observed(x), "histogram", symmetric=symmetric)
    best = activation_range(observed(x), "mse", symmetric=symmetric)
    width = (high - low) / 2048
    for edge, end in zip(found, best, strict=True):
        assert abs(edge - end) <= width * (1 + 1e-6)


def test_an_outlier_far_away_is_not_clipped_as_the_rule_of_evenly_spread_values_clips_it() -> None:
    x = torch.cat((NORMAL(300_000) * 0.3, torch.full((60,), 700.0)))
    low, high = activation_range(observed(x), "histogram", symmetric=False)
    assert high == pytest.approx(700.0, rel=0.01)
    histogram = histogram_of(observed(x).counts, float(x.amin()), float(x.amax()))
    first, last = search_bins(histogram)
    width = (float(x.amax()) - float(x.amin())) / len(histogram)
    theirs = squared_error(x, float(x.amin()) + width * first, float(x.amin()) + width * (last + 1), False)
    assert squared_error(x, low, high, False) <= theirs


def test_mixed_changes_over_above_50() -> None:
    x = values("outlier", 20_000)
    results = {method: activation_range(observed(x), method, symmetric=False) for method in ("histogram", "minmax")}
    assert results["histogram"] != results["minmax"]
    assert activation_range(observed(x, 50.0), "mixed", symmetric=False) == results["histogram"]
    assert activation_range(observed(x, 50.1), "mixed", symmetric=False) == results["minmax"]


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_lie_within_the_extremes_hold_zero_and_scale(method: str, symmetric: bool) -> None:
    for shape in SHAPES:
        x = values(shape, 700)
        low, high = activation_range(observed(x), method, symmetric=symmetric)
        assert min(float(x.amin()), 0) <= low <= 0 <= high <= max(float(x.amax()), 0), shape
        scaled = activation_range(observed(x * 1024), method, symmetric=symmetric)
        assert scaled == pytest.approx((low * 1024, high * 1024), rel=1e-6), shape


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_and_single_values(method: str, symmetric: bool) -> None:
    for value, count in ((0.0, 20), (2.5, 20), (-2.5, 20), (7.0, 1), (1e-30, 3)):
        found = activation_range(observed(torch.full((count,), value)), method, symmetric=symmetric)
        assert found == pytest.approx((min(value, 0), max(value, 0)), rel=0.02), (value, count)


def test_what_cannot_be_is_refused() -> None:
    seen = observed(torch.ones(3))
    with pytest.raises(ValueError, match="no range method kl; there are minmax"):
        activation_range(seen, "kl", symmetric=False)
    with pytest.raises(ValueError, match="no aggregation median"):
        activation_range(seen, "minmax", symmetric=False, aggregation="median")
    with pytest.raises(ValueError, match="percentile must be above 0"):
        activation_range(seen, "percentile", symmetric=False, percentile=0)
    with pytest.raises(ValueError, match="no sample"):
        activation_range(Observed(torch.ones(0), torch.ones(0)), "minmax", symmetric=False)
    for method in ("histogram", "percentile", "mse"):
        with pytest.raises(ValueError, match="needs the counts"):
            activation_range(Observed(torch.zeros(1), torch.ones(1)), method, symmetric=False)
