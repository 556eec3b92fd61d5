from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.quant import activation
from quantcli.quant.activation import (
    int8_linear,
    prepared_int8_linear,
    quantize_per_token,
    quantize_per_token_asymmetric,
    quantize_static,
    static_parameters,
)
from quantcli.quant.scheme import CodeType

finite = st.floats(-1e4, 1e4, width=32)


def test_asymmetric_parameters_of_the_ascend_integer_quantizer() -> None:
    scale, zero = static_parameters(-3.0, 5.0, symmetric=False)
    assert scale.item() == pytest.approx(8 / 255)
    assert zero.tolist() == [-32]
    scale, zero = static_parameters(1.0, 5.0, symmetric=False)  # the range is widened to hold 0
    assert scale.item() == pytest.approx(5 / 255)
    assert zero.tolist() == [-128]
    scale, zero = static_parameters(-4.0, -1.0, symmetric=False)
    assert scale.item() == pytest.approx(4 / 255)
    assert zero.tolist() == [127]


@given(finite, finite, st.booleans())
def test_static_codes_hold_the_range_and_zero_exactly(a: float, b: float, symmetric: bool) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = static_parameters(low, high, symmetric)
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.int8
    assert scale.shape == zero.shape == (1,)
    x = torch.linspace(low, high, 50)
    codes = quantize_static(x, scale, zero)
    values = (codes.double() - zero.double()) * scale.double()
    # The zero point is rounded, so that an end of the range may lie up to half a step outside the grid.
    assert float((values - x.double()).abs().max()) <= float(scale) * (1.0 + 1e-3)
    assert quantize_static(torch.zeros(1), scale, zero).tolist() == zero.tolist()
    if symmetric:
        assert zero.item() == 0


def test_static_codes_saturate_and_round_to_even() -> None:
    x = torch.tensor([-1e9, -129.0, 0.5, 1.5, 200.0, 1e9], dtype=torch.float64)
    codes = quantize_static(x, torch.tensor([1.0]), torch.tensor([3], dtype=torch.int8))
    assert codes.tolist() == [-128, -126, 3, 5, 127, 127]


def test_static_range_of_zero_and_nonsense() -> None:
    for symmetric in (True, False):
        assert static_parameters(0.0, 0.0, symmetric)[0].tolist() == [1.0]
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="range"):
            static_parameters(low, high, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_token_codes_follow_the_formula(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0, 0] = 0
    codes, scale = quantize_per_token(x)
    assert scale.shape == (2, 5, 1)
    assert scale.dtype == torch.float32
    for token, token_codes, s in zip(x.view(10, 24), codes.view(10, 24), scale.flatten(), strict=True):
        largest = max(abs(v) for v in token.tolist())
        assert float(s) == pytest.approx(largest / 127 if largest else 1.0, rel=1e-6)
        ideal = token.double() / float(s)
        assert float((ideal - token_codes.double()).abs().max()) <= 0.5 + 1e-5


@pytest.mark.parametrize(("bits", "largest_code"), [(8, 127), (4, 7)])
def test_per_token_codes_reach_the_largest_code_and_no_further(bits: int, largest_code: int) -> None:
    """s = max|x| / (2^(b-1) - 1): the largest value of a token is the largest code, of either sign."""
    x = torch.tensor([[0.5, -3.0, 1.4], [3.0, 0.2, -3.0], [0.0, 0.0, 0.0]])
    codes, scale = quantize_per_token(x, bits)
    assert scale.flatten().tolist() == pytest.approx([3 / largest_code, 3 / largest_code, 1.0])
    half, most = round(0.5 / 3 * largest_code), round(1.4 / 3 * largest_code)
    low = round(0.2 / 3 * largest_code)
    assert codes.tolist() == [[half, -largest_code, most], [largest_code, low, -largest_code], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asymmetric_codes_per_token_follow_the_formula(dtype: torch.dtype) -> None:
    """One token at a time, in Python's own floats: on both sides of zero, on one, and far from it."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 7, 24, generator=generator) * 3 + torch.tensor([0.0, 3.0, -20.0])[:, None, None]).to(dtype)
    x[1] = x[1].abs()
    codes, scale, zero = quantize_per_token_asymmetric(x)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float32, torch.int64)
    assert scale.shape == zero.shape == (3, 7, 1)
    parts = (x.view(21, 24), codes.view(21, 24), scale.flatten(), zero.flatten())
    for token, found, s, z in zip(*(part.tolist() for part in parts), strict=True):
        low, high = min(token), max(token)
        assert s == pytest.approx((high - low) / 255, rel=1e-6)
        assert abs(z - (-128 - low / s)) <= 0.5 + 1e-3
        for value, code in zip(token, found, strict=True):
            assert code == pytest.approx(min(127, max(-128, value / s + z)), abs=0.5 + 1e-3)
            # where the zero point was rounded up, the upper end is cut by as much
            assert (code - z) * s == pytest.approx(value, abs=s * 1.001)
    assert bool((zero[2] > 127).all())


@given(st.lists(finite, min_size=1, max_size=9), st.floats(-1e4, 1e4, width=32))
def test_asymmetric_codes_hold_zero_where_the_range_does(values: list[float], other: float) -> None:
    token = torch.tensor([[*values, other, 0.0]])
    codes, scale, zero = quantize_per_token_asymmetric(token)
    assert codes[0, -1] == zero.item()
    assert -128 <= zero.item() <= 127
    assert float(((codes - zero) * scale.double() - token.double()).abs().max()) <= float(scale) * (1 + 1e-3)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-42])
def test_equal_values_become_zeros(value: float) -> None:
    """As in engines, where the scale is 0: they multiply by it."""
    codes, scale, zero = quantize_per_token_asymmetric(torch.full((1, 5), value))
    assert scale.tolist() == [[1.0]]
    assert ((codes - zero) * scale).tolist() == [[0.0] * 5]


@pytest.mark.parametrize("int_mm", [True, False])
@given(
    st.sampled_from([0, 1, 2, 17, 40]),
    st.sampled_from([1, 2, 31, 130]),
    st.sampled_from([1, 9, 48]),
    st.sampled_from([128, 2**16, 2**31]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_linear_is_exact_with_a_zero_point_a_token(
    int_mm: bool, tokens: int, width: int, out: int, most: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    zero = torch.randint(-most, most, (tokens, 1), generator=generator)
    expected = (x.numpy().astype(np.int64) - zero.numpy()) @ w.numpy().astype(np.int64).T
    with pytest.MonkeyPatch.context() as patch:
        if not int_mm:
            patch.setattr(activation, "_int_mm_is_exact", lambda device: False)
        patch.setattr(activation, "_CPU_ELEMENTS", 1)  # so that tokens come in parts
        y = int8_linear(x, torch.ones(tokens, 1), zero, w, torch.ones(out, 1), None, torch.float64)
    assert np.array_equal(y.numpy(), expected.astype(np.float32))


@given(
    st.sampled_from([0, 1, 2, 7, 16, 17, 40]),
    st.sampled_from([1, 2, 3, 31, 64, 130]),
    st.sampled_from([1, 2, 9, 16, 48]),
    st.sampled_from([None, 0, -128, 5, 127]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=200)
def test_linear_is_exact(tokens: int, width: int, out: int, zero: int | None, seed: int) -> None:
    """With scales of one and float64 output the result is the int64 product of numpy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    y = int8_linear(x, torch.ones(1), zero, w, torch.ones(out, 1), None, torch.float64)
    expected = (x.numpy().astype(np.int64) - (zero or 0)) @ w.numpy().astype(np.int64).T
    assert np.array_equal(y.numpy(), expected)
    prepared = prepared_int8_linear(zero, w, torch.ones(out, 1))
    assert np.array_equal(prepared(x, torch.ones(1), None, torch.float32).numpy(), expected.astype(np.float32))


@given(
    st.sampled_from([1, 2, 33, 2049]),
    st.sampled_from([2, 17, 64]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_prepared_linear_is_the_linear(
    tokens: int, width: int, per_token: bool, per_channel: bool, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    """To the bit, whatever has scales of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (24, width), dtype=torch.int8, generator=generator)
    x_scale = torch.rand((tokens, 1) if per_token else (1,), generator=generator) + 0.01
    w_scale = torch.randn((24, 1) if per_channel else (1, 1), generator=generator) / 99
    bias = torch.randn(24, generator=generator) if biased else None
    zero = None if per_token else 11
    prepared = prepared_int8_linear(zero, w, w_scale)(x, x_scale, bias, dtype)
    assert torch.equal(prepared, int8_linear(x, x_scale, zero, w, w_scale, bias, dtype))


@pytest.mark.parametrize(("x_code", "w_code", "zero"), [(-128, -128, 127), (127, -128, -128), (127, 127, -128)])
@pytest.mark.parametrize("int_mm", [True, False])
def test_linear_keeps_the_largest_sums(
    x_code: int, w_code: int, zero: int, int_mm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No accumulator saturates or wraps, on either path, on both sides of the width that int32 can hold."""
    if not int_mm:
        monkeypatch.setattr(activation, "_int_mm_is_exact", lambda device: False)
    for width in (4096, activation._INT32_MAX_IN_FEATURES, activation._INT32_MAX_IN_FEATURES + 1, 200_000):
        x = torch.full((2, width), x_code, dtype=torch.int8)
        w = torch.full((3, width), w_code, dtype=torch.int8)
        y = int8_linear(x, torch.ones(1), zero, w, torch.ones(1, 1), None, torch.float64)
        expected = np.float32(width * (x_code - zero) * w_code)
        assert bool((y == float(expected)).all())


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_matches_the_product_of_the_dequantized(per_token: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-128, 128, (20, 96), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (32, 96), dtype=torch.int8, generator=generator)
    x_scale = torch.rand((20, 1) if per_token else (1,), generator=generator) + 0.01
    w_scale = torch.randn(32, 1, generator=generator)  # a scale may be negative
    bias = torch.randn(32, generator=generator)
    zero = None if per_token else -7
    y = int8_linear(x, x_scale, zero, w, w_scale, bias, dtype)
    exact = ((x.double() - (zero or 0)) * x_scale.double()) @ (w.double() * w_scale.double()).T + bias.double()
    assert y.dtype == dtype
    # A few float32 roundings, and one to the output's dtype.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().amax() * 1e-6
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("zero", [None, -7, torch.tensor([[3], [-900], [0], [127], [5]])])
@pytest.mark.parametrize(("groups", "size"), [(2, 48), (3, 32), (12, 8), (96, 1)])
def test_grouped_linear_is_the_sum_of_the_groups_integer_products(
    groups: int, size: int, zero: int | torch.Tensor | None
) -> None:
    """Each group's integers summed exactly, then scaled, in float64. What float32 may lose is bounded by the sum of the
    terms' sizes."""
    generator = torch.Generator().manual_seed(groups)
    x = torch.randint(-128, 128, (5, groups * size), dtype=torch.int8, generator=generator)
    w = torch.randint(-8, 8, (9, groups * size), dtype=torch.int8, generator=generator)
    x_scale = torch.rand(5, 1, generator=generator) + 0.01
    w_scale = torch.randn(9, groups, generator=generator)  # a scale may be negative
    bias = torch.randn(9, generator=generator)
    expected, sizes = bias.double().expand(5, 9).clone(), torch.zeros(5, 9, dtype=torch.float64)
    for token in range(5):
        own = int(zero[token]) if isinstance(zero, torch.Tensor) else zero or 0
        for out in range(9):
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                terms = [(a - own) * b for a, b in zip(x[token, part].tolist(), w[out, part].tolist(), strict=True)]
                scale = float(x_scale[token]) * float(w_scale[out, group])
                expected[token, out] += sum(terms) * scale
                sizes[token, out] += sum(map(abs, terms)) * abs(scale)
    y = int8_linear(x, x_scale, zero, w, w_scale, bias, torch.float64)
    assert ((y - expected).abs() <= 1e-6 * (sizes + bias.abs().double())).all()


def test_grouped_linear_is_exact_where_float32_is() -> None:
    """Scales that are powers of two lose nothing: the two ways to compute agree to the bit."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-128, 128, (6, 64), dtype=torch.int8, generator=generator)
    w = torch.randint(-8, 8, (10, 64), dtype=torch.int8, generator=generator)
    x_scale, w_scale = torch.full((1,), 0.125), torch.full((10, 1), 2.0**-6)
    by_channel = int8_linear(x, x_scale, None, w, w_scale, None, torch.bfloat16)
    assert torch.equal(int8_linear(x, x_scale, None, w, w_scale.expand(10, 4), None, torch.bfloat16), by_channel)


@pytest.mark.parametrize("type", ["int", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_have_the_codes_of_the_whole(type: CodeType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    step, zero = torch.tensor([0.05]), torch.tensor([0 if type == "float" else -9], dtype=torch.int8)
    static, (codes, scale) = quantize_static(x, step, zero, type), quantize_per_token(x, type=type)
    asymmetric = quantize_per_token_asymmetric(x)
    for elements in (1, 45, 209):  # less than a token, four of 21, 20
        monkeypatch.setattr(activation, "_CPU_ELEMENTS", elements)
        again, again_scale = quantize_per_token(x, type=type)
        assert (again.shape, again_scale.shape) == (x.shape, (3, 7, 1))
        assert torch.equal(again.float(), codes.float())
        assert torch.equal(again_scale, scale)
        assert torch.equal(quantize_static(x, step, zero, type).float(), static.float())
        assert all(map(torch.equal, quantize_per_token_asymmetric(x), asymmetric))
    assert [part.shape for part in quantize_per_token(x[:, :0], type=type)] == [(3, 0, 10), (3, 0, 1)]
    assert [part.shape for part in quantize_per_token_asymmetric(x[:, :0])] == [(3, 0, 10), (3, 0, 1), (3, 0, 1)]


@pytest.mark.parametrize("zero_point", [None, 3])
def test_no_tokens_give_no_outputs(zero_point: int | None) -> None:
    """As an expert sees that no token was sent to."""
    codes, scales = quantize_per_token(torch.empty(0, 64, dtype=torch.bfloat16))
    weight, columns, bias = torch.ones(32, 64, dtype=torch.int8), torch.ones(32, 1), torch.ones(32)
    product = prepared_int8_linear(zero_point, weight, columns)
    for scale in (scales, torch.ones(1)):
        for found in (
            product(codes, scale, bias, torch.bfloat16),
            int8_linear(codes, scale, zero_point, weight, columns, bias, torch.bfloat16),
        ):
            assert found.shape == (0, 32)
            assert found.dtype == torch.bfloat16


PRODUCTS = """
import torch
from quantcli.quant.activation import prepared_int8_linear
codes, scale = torch.ones(64, 96, dtype=torch.int8), torch.ones(64, 1)
for zero_point in (None, 3):
    prepared_int8_linear(zero_point, codes, scale)(codes, scale, None, torch.float32)
"""


def test_no_product_runs_in_reference_code() -> None:
    """oneDNN's, for what it has no kernel for on a CPU, takes a thousand times as long. It says what it runs."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "DNNL_VERBOSE": "1"}
    ran = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True, env=environment)
    products = [line for line in ran.stdout.splitlines() if ",exec," in line and "reorder" not in line]
    small = [line for line in products if "32x256" in line]  # of the check whether a kernel is exact
    assert not [line for line in products if ",ref" in line and line not in small]
    assert len(products) > len(small)
