"""FP8 codes of weights and inputs, against references that try every code."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.quant.activation import (
    SMALLEST_FP8_SCALE,
    prepared_float8_linear,
    quantize_per_token,
    quantize_static,
    static_parameters,
)
from quantcli.quant.float8 import FP8, FP8_MAX, cut_fp8, decoded_fp8, fp8_values_, quantize_fp8
from quantcli.quant.gptq import factored, gptq
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, quantize_codes
from quantcli.quant.methods import weight_error
from quantcli.quant.minmax import minmax
from quantcli.quant.refine import descended, output_error, refitted
from quantcli.quant.search import mse
from quantcli.quant.straight_through import graded_linear, rounded_fp8, static_codes, token_codes

GRIDS = {
    "channel": WeightGrid(8, type="float"),
    "tensor": WeightGrid(8, granularity="tensor", type="float"),
    "bfloat16": WeightGrid(8, scale_dtype=torch.bfloat16, type="float"),
}
PATTERNS = torch.tensor([n for n in range(256) if n & 0x7F != 0x7F], dtype=torch.uint8)
"""All codes but the two that are NaN."""


def decoded(pattern: int) -> float:
    """The value of a pattern by the definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    sign, exponent, mantissa = -1 if pattern >> 7 else 1, (pattern >> 3) & 15, pattern & 7
    return sign * (2.0**-9 * mantissa if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


CODES = [(decoded(n), n & 1) for n in PATTERNS.tolist()]


def nearest(value: float) -> float:
    """The code of least distance, of two the one with an even last bit; beyond the largest that one."""
    held = min(FP8_MAX, max(-FP8_MAX, value))
    return min((abs(code - held), last_bit, code) for code, last_bit in CODES)[2]


def below(value: float) -> float:
    """The code of greatest magnitude that is not beyond the value, on its side of zero."""
    return max((abs(code), code) for code, _ in CODES if abs(code) <= abs(value) and code * value >= 0)[1]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_grid_has_all_codes_and_no_others() -> None:
    grid = GRIDS["channel"]
    assert grid.code_dtype == FP8
    values = torch.tensor([[decoded(n) for n in PATTERNS.tolist()]])
    assert (values.min(), values.max()) == (grid.qmin, grid.qmax) == (-FP8_MAX, FP8_MAX)
    for scale in (torch.tensor([[1.0]]), torch.tensor([[2.0**-11]]), torch.tensor([[0.0123]])):
        codes = quantize_codes(values * scale, scale, None, grid)
        assert torch.equal(codes.float(), values)
        assert torch.equal(codes[values != 0].view(torch.uint8), PATTERNS[PATTERNS & 0x7F != 0])
        assert torch.equal(dequantize(QuantizedWeight(codes, scale, None)), values * scale)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=8), st.sampled_from([0.25, 1.0, 4.0]))
def test_codes_are_the_nearest_ones(values: list[float], scale: float) -> None:
    weight = torch.tensor([values])
    codes = quantize_codes(weight, torch.tensor([[scale]]), None, GRIDS["channel"])
    assert codes.float()[0].tolist() == [nearest(value / scale) for value in values]


def test_ties_go_to_even_codes_and_what_is_too_large_to_the_largest() -> None:
    x = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 440.0, 449.0, 480.0, 1e30, -1e30, -17.0])
    assert fp8_values_(x).tolist() == [16, 20, 0, 2**-8, 448, 448, 448, 448, -448, -16]


def test_values_are_those_of_a_conversion_and_back() -> None:
    """Of every bfloat16, and of float32 with any bits, among them ties and their neighbours."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    some = torch.randint(0, 1 << 16, patterns.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for low in (torch.zeros_like(patterns), torch.ones_like(patterns), torch.full_like(patterns, 0xFFFF), some):
        x = (patterns << 16 | low).view(torch.float32)
        expected = x.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()
        assert torch.equal(fp8_values_(x.clone()).nan_to_num(1000.0), expected.nan_to_num(1000.0))


def test_zeros_have_no_sign() -> None:
    assert not fp8_values_(torch.tensor([-0.0, 0.0, -(2.0**-11), 2.0**-11])).signbit().any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=8), st.sampled_from([0.25, 1.0, 4.0]))
def test_cut_codes_are_the_next_ones_towards_zero(values: list[float], scale: float) -> None:
    codes = cut_fp8(torch.tensor(values), torch.tensor([scale]))
    assert codes.dtype == FP8
    assert codes.float().tolist() == [below(value / scale) for value in values]


def test_codes_themselves_are_not_cut() -> None:
    values, one = PATTERNS.view(FP8).float(), torch.ones(1)
    assert torch.equal(cut_fp8(values, one).view(torch.uint8), PATTERNS)
    between = (values[1:120] + values[:119]) / 2  # of two neighbours that are not negative
    assert torch.equal(cut_fp8(between, one).float(), values[:119])
    assert torch.equal(cut_fp8(-between, one).float(), -values[:119])
    assert not torch.equal(quantize_fp8(between, one).float(), values[:119])


@pytest.mark.parametrize("name", GRIDS)
def test_minmax_gives_the_largest_weight_the_largest_code(name: str) -> None:
    grid, weight = GRIDS[name], random(5, 40) * 0.03
    weight[2] = 0
    found = minmax(weight, grid)
    rows = weight.abs().amax().view(1, 1) if grid.granularity == "tensor" else weight.abs().amax(1, keepdim=True)
    expected = torch.where(rows == 0, 1.0, (rows / 448).to(grid.scale_dtype).float())
    assert torch.equal(found.scale.float(), expected)
    assert found.scale.dtype == grid.scale_dtype
    assert found.zero_point is None
    assert found.codes.float().abs().max() == 448
    error = (dequantize(found) - weight).abs()
    # half a step: 2^-4 of the value, or half of the smallest code
    assert bool((error <= torch.maximum(weight.abs() / 16, found.scale.float() / 1024) * 1.001).all())


@pytest.mark.parametrize("name", GRIDS)
def test_searched_scales_lose_no_more_than_those_of_minmax(name: str) -> None:
    grid = GRIDS[name]
    gains = []
    for seed in range(6):
        weight, importance = random(8, 48, seed=seed), random(48, seed=seed + 100).square()
        for h in (None, importance):
            found, plain = mse(weight, grid, h), minmax(weight, grid)
            assert bool((found.scale > 0).all())
            assert torch.equal(found.codes.float(), quantize_codes(weight, found.scale, None, grid).float())
            gains.append(weight_error(weight, found, h) / weight_error(weight, plain, h))
    assert max(gains) <= 1
    assert min(gains) < 0.95


def correlated(width: int, seed: int) -> Tensor:
    x = random(300, width, seed=seed) @ (random(width, width, seed=seed + 1) * width**-0.5 + 0.5 * torch.eye(width))
    return x.t() @ x / 300


def test_gptq_rounds_to_nearest_without_correlation_and_gains_with_it() -> None:
    grid, weight = GRIDS["channel"], random(12, 70)
    start = minmax(weight, grid)
    alone = factored(torch.diag(random(70, seed=1).square() + 0.01))
    assert torch.equal(gptq(weight, grid, start.scale, None, alone).codes.float(), start.codes.float())
    hessian = correlated(70, seed=2)
    curvature = factored(hessian)
    found = gptq(weight, grid, start.scale, None, curvature)
    errors = [float(output_error(weight, each, hessian).sum()) for each in (start, found)]
    for _ in range(2):
        found = refitted(weight, found, grid, hessian)
        errors.append(float(output_error(weight, found, hessian).sum()))
        found = descended(weight, found, grid, hessian, curvature.order)
        errors.append(float(output_error(weight, found, hessian).sum()))
    assert errors[1] < 0.8 * errors[0]
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert found.codes.dtype == FP8
    assert bool((found.codes.float().abs() <= 448).all())


def test_descent_takes_the_best_code_of_every_channel() -> None:
    """Trying all codes of one channel, with the others as they are left, finds none that is better."""
    grid, weight, hessian = GRIDS["channel"], random(3, 9), correlated(9, seed=3)
    found, order = minmax(weight, grid), torch.arange(9)
    for _ in range(20):
        found = descended(weight, found, grid, hessian, order)
    least = output_error(weight, found, hessian)
    for channel in range(9):
        for value, _ in CODES:
            codes = found.codes.float()
            codes[:, channel] = value
            tried = QuantizedWeight(codes.to(FP8), found.scale, None)
            assert bool((output_error(weight, tried, hessian) >= least * (1 - 1e-4)).all())


@pytest.mark.parametrize(
    "arguments", [{"bits": 4}, {"bits": 8, "symmetric": False}, {"bits": 8, "granularity": "group", "group_size": 16}]
)
def test_grids_that_nothing_holds_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="float codes"):
        WeightGrid(**arguments, type="float")


def test_static_scales_and_codes_are_symmetric() -> None:
    scale, zero = static_parameters(-3.0, 14.0, True, "float")
    assert scale.tolist() == pytest.approx([14 / 448])
    assert zero.tolist() == [0]
    assert static_parameters(0.0, 0.0, True, "float")[0].tolist() == [1]
    x = torch.tensor([-1e9, -3.0, 0.0, 0.01, 14.0, 1e9]).double()
    codes = quantize_static(x, scale, zero, "float")
    assert codes.dtype == torch.float32
    assert codes.tolist() == [nearest(float(value) / float(scale)) for value in x]
    with pytest.raises(ValueError, match="zero point"):
        static_parameters(-3.0, 14.0, False, "float")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_scale_of_its_largest_value(dtype: torch.dtype) -> None:
    x = random(6, 20).to(dtype)
    x[1] *= 1e4
    x[2] = 0
    x[3] *= 1e-4  # below the bound of vLLM's scales
    codes, scale = quantize_per_token(x, type="float")
    for row, own, step in zip(x.float(), codes, scale.squeeze(1), strict=True):
        assert float(step) == pytest.approx(max(float(row.abs().max()) / 448, 1 / (448 * 512)))
        assert own.tolist() == [nearest(float(value / step)) for value in row]
    assert float(scale[2]) == float(scale[3]) == pytest.approx(SMALLEST_FP8_SCALE)
    assert codes[0].abs().max() == codes[1].abs().max() == 448


@pytest.mark.parametrize("kind", ["static", "token"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_products_are_those_of_the_values(kind: str, granularity: str) -> None:
    weight = minmax(random(24, 64), GRIDS[granularity])
    x, bias = random(7, 64, seed=1), random(24, seed=2)
    codes, scale = quantize_per_token(x, type="float")
    if kind == "static":
        scale = torch.tensor([0.01])
        codes = quantize_static(x, scale, torch.zeros(1), "float")
    for added in (None, bias):
        product = prepared_float8_linear(weight.codes, weight.scale)
        y = product(codes, scale, added, torch.float32)
        expected = (codes.double() * scale) @ (weight.codes.double() * weight.scale).t()
        expected += 0 if added is None else added
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        low = product(codes, scale, added, torch.bfloat16)
        assert torch.equal(low, y.bfloat16())


@pytest.mark.parametrize("tokens", [1, 300])
def test_products_are_exact_but_for_their_sums_in_float32(tokens: int) -> None:
    """Also of sizes that take another kernel, and with what the process asks of other products left as it was."""
    codes, weight = (random(tokens, 600, seed=3) * 40).to(FP8), (random(200, 600, seed=4) * 40).to(FP8)
    asked = torch.backends.mkldnn.matmul.fp32_precision
    y = prepared_float8_linear(weight, torch.ones(1, 1))(decoded_fp8(codes), torch.ones(1), None, torch.float32)
    exact, terms = codes.double() @ weight.double().t(), codes.double().abs() @ weight.double().abs().t()
    assert ((y - exact).abs() <= 2**-20 * terms).all()
    assert torch.backends.mkldnn.matmul.fp32_precision == asked


def test_older_versions_of_torch_compute_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, weight = (random(5, 600, seed=3) * 40).to(FP8), (random(200, 600, seed=4) * 40).to(FP8)
    product = prepared_float8_linear(weight, torch.ones(1, 1))
    expected = product(decoded_fp8(codes), torch.ones(1), None, torch.float32)
    monkeypatch.delattr(type(torch.backends.mkldnn), "matmul")
    found = product(decoded_fp8(codes), torch.ones(1), None, torch.float32)
    terms = codes.double().abs() @ weight.double().abs().t()
    assert ((found - expected).abs() <= 2**-20 * terms).all()


def test_each_code_has_its_value() -> None:
    codes = PATTERNS.view(FP8)
    assert torch.equal(decoded_fp8(codes), codes.float())
    assert torch.equal(decoded_fp8(codes[:252].view(2, -1).t()), codes[:252].view(2, -1).t().float())
    assert decoded_fp8(torch.tensor([0x7F, 0xFF], dtype=torch.uint8).view(FP8)).isnan().all()


@pytest.mark.parametrize("static", [True, False])
def test_values_with_gradients_are_those_without(static: bool) -> None:
    weight = minmax(random(24, 64), GRIDS["channel"])
    x, scale = random(7, 64, seed=1), torch.tensor([0.004])  # some values are beyond the largest code
    codes, step = quantize_per_token(x, type="float")
    if static:
        codes, step = quantize_static(x, scale, torch.zeros(1), "float"), scale
    product = prepared_float8_linear(weight.codes, weight.scale)
    expected = product(codes, step, None, torch.float32)
    graded = graded_linear(x, weight, weight.scale, None, input_bits=8, input_scale=scale if static else None)
    torch.testing.assert_close(graded, expected, rtol=1e-5, atol=1e-5)
    found = static_codes(x, scale, None, "float") if static else token_codes(x, 8, "float")[0]
    assert torch.equal(found, codes)


def test_the_gradient_passes_within_the_range_alone() -> None:
    x = torch.tensor([0.3, -17.2, 447.0, 460.0, -1e6, 2.0**-11], requires_grad=True)
    y = rounded_fp8(x)
    assert y.tolist() == [nearest(value) for value in x.tolist()]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0, 1]
