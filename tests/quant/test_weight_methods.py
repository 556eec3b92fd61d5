from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, quantize_codes
from quantcli.quant.methods import WEIGHT_METHODS, weight_error
from quantcli.quant.minmax import minmax
from quantcli.quant.rounding import DRAW, LearnedRounding
from quantcli.quant.search import mse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = ["minmax", "mse", "hqq", "ssz"]  # of any grid; sparse ones have theirs alone, and their own tests
ROWS, COLUMNS = 6, 32
Granularity = Literal["tensor", "channel", "group"]


@st.composite
def grids(draw: st.DrawFn) -> WeightGrid:
    granularity: Granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    return WeightGrid(
        bits=draw(st.integers(2, 8)),
        symmetric=draw(st.booleans()),
        granularity=granularity,
        group_size=draw(st.sampled_from([8, 16, 32])) if granularity == "group" else None,
        scale_dtype=draw(st.sampled_from(DTYPES)),
    )


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Random rows among them constant, zero, one-sided ones and ones with an outlier, at sizes from 1e-6 to 1e2."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight[0] = 0
    weight[1] = round(draw(st.floats(-2, 2)), 3)
    weight[2] = -weight[2].abs()
    weight[3, draw(st.integers(0, COLUMNS - 1))] *= 30
    weight[4, :16] = 0
    weight *= 10.0 ** draw(st.integers(-6, 2))
    return weight.to(draw(st.sampled_from(DTYPES)))


def per_weight(values: Tensor, weight: Tensor) -> Tensor:
    """[out, groups] (or [1, 1]) values, one for each weight, float64."""
    values = values.double().expand(weight.shape[0], -1)
    return values.repeat_interleave(weight.shape[1] // values.shape[1], dim=1)


def squared_error(weight: Tensor, quantized: QuantizedWeight, h: Tensor | None) -> Tensor:
    """The objective of each group in float64, in the shape of the scale."""
    zero = 0 if quantized.zero_point is None else per_weight(quantized.zero_point, weight)
    values = (quantized.codes.double() - zero) * per_weight(quantized.scale, weight)
    error = (weight.double() - values).square() * (1 if h is None else h.double())
    return error.view(weight.shape[0], quantized.scale.shape[1], -1).sum(-1).sum_to_size(quantized.scale.shape)


@given(weights(), grids(), st.sampled_from(METHODS))
@settings(deadline=None, max_examples=150)
def test_what_is_stored_is_consistent(weight: Tensor, grid: WeightGrid, method: str) -> None:
    """Codes come from the scale as stored, lie on the grid, and zero weights come back as zero."""
    quantized = WEIGHT_METHODS[method](weight, grid, None)
    codes, scale, zero = quantized
    assert codes.dtype == torch.int8
    assert scale.dtype == grid.scale_dtype
    assert (zero is None) == grid.symmetric
    groups = COLUMNS // (grid.group_size or COLUMNS)
    assert scale.shape == ((1, 1) if grid.granularity == "tensor" else (ROWS, groups))
    assert bool(scale.isfinite().all())
    assert bool((scale != 0).all())
    assert grid.qmin <= int(codes.min())
    assert int(codes.max()) <= grid.qmax
    assert torch.equal(codes, quantize_codes(weight, scale, zero, grid))
    assert bool((dequantize(quantized)[weight == 0] == 0).all())


@given(weights(), grids())
@settings(deadline=None, max_examples=150)
def test_minmax_stays_within_half_a_step(weight: Tensor, grid: WeightGrid) -> None:
    """|w - deq| <= s / 2 wherever the grid with the stored scale reaches w; beyond its ends w meets the nearest end."""
    quantized = minmax(weight, grid)
    scale = per_weight(quantized.scale, weight)
    zero = 0 if quantized.zero_point is None else per_weight(quantized.zero_point, weight)
    ends = torch.stack([(grid.qmin - zero) * scale, (grid.qmax - zero) * scale])
    reachable = weight.double().clamp(ends.amin(0), ends.amax(0))
    error = (reachable - dequantize(quantized).double()).abs()
    assert bool((error <= scale.abs() * (0.5 + 1e-4)).all())


@given(weights(), st.integers(2, 8), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=100)
def test_minmax_scale_follows_the_formula(weight: Tensor, bits: int, symmetric: bool, grouped: bool) -> None:
    group = weight.shape[1] if grouped else None
    quantized = minmax(weight, WeightGrid(bits, symmetric, "group" if grouped else "channel", group))
    for i, row in enumerate(weight.double().tolist()):
        low, high = min(row), max(row)
        if not symmetric:
            expected = (max(high, 0) - min(low, 0)) / (2**bits - 1)
        elif bits == 8 and not grouped:
            expected = max(abs(low), abs(high)) / 127
        else:
            expected = (low if -low >= high else high) / -(2 ** (bits - 1))
        assert float(quantized.scale[i]) == pytest.approx(expected or 1.0, rel=1e-6)
        if quantized.zero_point is not None:
            ideal = -(2 ** (bits - 1)) - min(low, 0) / (expected or 1.0)
            assert abs(int(quantized.zero_point[i]) - ideal) <= 0.5 + 1e-4


@given(weights(), grids())
@settings(deadline=None, max_examples=100)
def test_minmax_is_idempotent(weight: Tensor, grid: WeightGrid) -> None:
    """Weights on the grid come back with the same values. Holds where the ends of the range are codes: symmetric grids
    at every scale but the clamped and the subnormal ones, which only float16 meets here."""
    grid = WeightGrid(grid.bits, True, grid.granularity, grid.group_size, torch.float32)
    once = dequantize(minmax(weight, grid))
    again = minmax(once, grid)
    assert torch.allclose(dequantize(again), once, rtol=1e-6, atol=0)
    assert torch.equal(again.codes, minmax(weight, grid).codes)


@given(weights(), grids(), st.booleans(), st.integers(0, 100))
@settings(deadline=None, max_examples=150)
def test_search_never_loses_against_minmax(weight: Tensor, grid: WeightGrid, weighted: bool, seed: int) -> None:
    h = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(seed)) ** 4 if weighted else None
    if h is not None:
        h[:8] = 0
    searched = squared_error(weight, mse(weight, grid, h), h)
    plain = squared_error(weight, minmax(weight, grid), h)
    energy = squared_error(weight, QuantizedWeight(torch.zeros(weight.shape), torch.ones_like(plain), None), h)
    assert bool((searched <= plain * (1 + 1e-4) + energy * 1e-10).all())


@pytest.mark.parametrize(
    ("bits", "symmetric", "bound"), [(4, True, 1.01), (3, True, 1.01), (4, False, 1.01), (2, False, 1.06)]
)
def test_search_comes_near_the_best_scale_of_a_fine_grid(bits: int, symmetric: bool, bound: float) -> None:
    """A slow float64 search over 2000 scales and every zero point finds hardly anything better."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 64, generator=generator)
    weight[0, 0] = 8
    h = torch.rand(64, generator=generator).square() + 0.01
    grid = WeightGrid(bits, symmetric)
    found = squared_error(weight, mse(weight, grid, h), h).flatten()
    w = weight.double()
    best = torch.full((8,), math.inf, dtype=torch.float64)
    zeros = [0] if symmetric else range(grid.qmin, grid.qmax + 1)
    for step in torch.linspace(0.01, 1.2, 1000, dtype=torch.float64):
        for sign in (1, -1):
            scale = sign * step * w.abs().amax(1, keepdim=True) / -grid.qmin
            for z in zeros:
                values = (((w / scale).round() + z).clamp(grid.qmin, grid.qmax) - z) * scale
                best = torch.minimum(best, ((w - values).square() * h).sum(1))
    plain = squared_error(weight, minmax(weight, grid), h).flatten()
    assert float(found.sum()) <= bound * float(best.sum())
    assert float(found.sum()) < 0.9 * float(plain.sum())


def test_full_range_scale_meets_the_largest_weight_with_either_sign() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5, 0.0], [-3.0, 1.0, 0.5, 0.0]])
    quantized = minmax(weight, WeightGrid(4))
    assert quantized.scale.tolist() == [[-0.375], [0.375]]
    assert quantized.codes[:, 0].tolist() == [-8, -8]
    assert dequantize(quantized)[:, 0].tolist() == [3.0, -3.0]


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows_get_scale_one(method: str) -> None:
    for grid in (WeightGrid(4), WeightGrid(8), WeightGrid(4, symmetric=False)):
        codes, scale, zero = WEIGHT_METHODS[method](torch.zeros(2, 16), grid, None)
        assert scale.tolist() == [[1.0], [1.0]]
        assert torch.equal(codes, torch.zeros_like(codes) if zero is None else zero.expand(2, 16))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_gets_scale_one(method: str, symmetric: bool) -> None:
    weight = torch.linspace(-1, 1, 32).view(2, 16)
    weight[1, 8:] = 0
    quantized = WEIGHT_METHODS[method](weight, WeightGrid(4, symmetric, "group", 8), None)
    assert float(quantized.scale[1, 1]) == 1.0
    assert not dequantize(quantized)[1, 8:].any()
    assert bool((quantized.scale.flatten()[:3] != 1).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-44, 3e-7, 3e38])
def test_extreme_sizes_stay_finite(method: str, size: float) -> None:
    weight = torch.linspace(-1, 1, 32).view(2, 16) * size
    for dtype in DTYPES:
        for symmetric in (True, False):
            for bits in (4, 8):
                quantized = WEIGHT_METHODS[method](weight, WeightGrid(bits, symmetric, scale_dtype=dtype), None)
                assert bool(quantized.scale.isfinite().all() and (quantized.scale != 0).all())
                assert bool(dequantize(quantized).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_result_does_not_depend_on_the_chunks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    grid_list = [WeightGrid(4, s, "group", 32, torch.bfloat16) for s in (True, False)] + [WeightGrid(8)]
    whole = [WEIGHT_METHODS[method](weight, grid, None) for grid in grid_list]
    monkeypatch.setattr("quantcli.quant.grid._CPU_ELEMENTS_PER_THREAD", 500)
    for grid, expected in zip(grid_list, whole, strict=True):
        got = WEIGHT_METHODS[method](weight, grid, None)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scale, expected.scale)
    tensor = WEIGHT_METHODS[method](weight, WeightGrid(4, granularity="tensor"), None)
    assert tensor.scale.shape == (1, 1)
    assert 0 < weight_error(weight, tensor) < 0.1


@given(weights(), grids(), st.booleans())
@settings(deadline=None, max_examples=50)
def test_weight_error_is_the_ratio_of_float64_sums(weight: Tensor, grid: WeightGrid, weighted: bool) -> None:
    h = torch.linspace(0, 3, COLUMNS) if weighted else None
    quantized = minmax(weight, grid)
    energy = (weight.double().square() * (1 if h is None else h.double())).sum()
    expected = squared_error(weight, quantized, h).sum() / energy
    assert weight_error(weight, quantized, h) == pytest.approx(float(expected), rel=1e-3, abs=1e-12)


def test_weight_error_without_energy() -> None:
    nothing = torch.zeros(2, 16)
    assert weight_error(nothing, minmax(nothing, WeightGrid(4))) == 0.0
    assert weight_error(nothing, minmax(torch.ones(2, 16), WeightGrid(4))) == math.inf


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method: str) -> None:
    quantize = WEIGHT_METHODS[method]
    for bad in (math.nan, math.inf):
        weight = torch.ones(2, 16)
        weight[1, 3] = bad
        for grid in (WeightGrid(4), WeightGrid(8, False), WeightGrid(4, granularity="tensor")):
            with pytest.raises(ValueError, match="NaN or infinite"):
                quantize(weight, grid, None)
    with pytest.raises(ValueError, match="48"):
        quantize(torch.ones(2, 48), WeightGrid(4, granularity="group", group_size=32), None)
    with pytest.raises(ValueError, match="matrix"):
        quantize(torch.ones(16), WeightGrid(4), None)


def test_importance_that_does_not_fit_is_refused() -> None:
    for importance in (torch.ones(15), -torch.ones(16), torch.full((16,), math.nan)):
        with pytest.raises(ValueError, match="importance"):
            mse(torch.ones(2, 16), WeightGrid(4), importance)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_learned_rounding_starts_at_the_codes_that_it_is_given(outputs: int, granularity: Granularity) -> None:
    weight = torch.randn(outputs, 64, generator=torch.Generator().manual_seed(0))
    grid = WeightGrid(4, True, granularity, 16 if granularity == "group" else None)
    quantized = minmax(weight, grid)
    learned = LearnedRounding(weight, quantized, grid)
    torch.testing.assert_close(learned.weight().detach(), dequantize(quantized))


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_rounding_is_what_its_formula_says(symmetric: bool) -> None:
    """clamp(round(c + v)), times s exp(b), element by element in float64, before and after steps against gradients."""
    generator = torch.Generator().manual_seed(1)
    weight, target = (torch.randn(4, 32, generator=generator) for _ in range(2))
    grid = WeightGrid(3, symmetric, "group", 16)
    quantized = minmax(weight, grid)
    learned = LearnedRounding(weight, quantized, grid)
    codes, scale = quantized.codes.double(), quantized.scale.double().repeat_interleave(16, 1)
    zero = 0 if quantized.zero_point is None else quantized.zero_point.double().repeat_interleave(16, 1)
    centre = codes + (weight.double() / scale + zero - codes).clamp(-0.5, 0.5) * DRAW
    v, b = torch.zeros(4, 32, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(4):
        (learned.weight() - target).square().sum().backward()
        wide = b.repeat_interleave(16, 1)
        unclamped = (centre + v).round()
        rounded = unclamped.clamp(grid.qmin, grid.qmax)
        lost = 2 * ((rounded - zero) * scale * wide.exp() - target.double())
        inside = (unclamped >= grid.qmin) & (unclamped <= grid.qmax)
        toward_v = lost * scale * wide.exp() * inside
        toward_b = (lost * (rounded - zero) * scale * wide.exp()).view(4, 2, 16).sum(2)
        learned.step(0.2, 0.02)
        v, b = (v - 0.2 * toward_v.sign()).clamp(-0.5, 0.5), (b - 0.02 * toward_b.sign()).clamp(-0.1, 0.1)
        found = ((centre + v).round().clamp(grid.qmin, grid.qmax) - zero) * scale * b.repeat_interleave(16, 1).exp()
        torch.testing.assert_close(learned.weight().detach().double(), found, rtol=1e-6, atol=1e-6)
    stored = learned.quantized()
    torch.testing.assert_close(dequantize(stored).double(), found, rtol=1e-6, atol=1e-6)
