"""Linears with gradients against the arithmetic that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcli.quant.activation import (
    int8_linear,
    quantize_per_token,
    quantize_per_token_asymmetric,
    quantize_static,
)
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize
from quantcli.quant.minmax import minmax
from quantcli.quant.scheme import CodeType
from quantcli.quant.straight_through import (
    asymmetric_token_codes,
    graded_linear,
    graded_weight,
    rounded,
    static_codes,
    token_codes,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "grid",
    [
        WeightGrid(4, True, "group", 16, torch.bfloat16),
        WeightGrid(4, False, "group", 16, torch.bfloat16),
        WeightGrid(8, True, "channel"),
        WeightGrid(8, False, "tensor"),
    ],
)
def test_the_weight_is_the_dequantized_one(grid: WeightGrid) -> None:
    quantized = minmax(random(24, 64), grid)
    for dtype in (torch.float32, torch.bfloat16):
        expected = dequantize(quantized, dtype)
        found = graded_weight(quantized, quantized.scale.float(), dtype)
        if dtype == torch.float32 or grid.scale_dtype == torch.bfloat16:
            assert torch.equal(found, expected)
        else:
            assert torch.allclose(found.float(), expected.float(), rtol=2**-7)


@pytest.mark.parametrize("kind", ["token", "token4", "asymmetric token", "static", "asymmetric", "groups"])
def test_values_are_those_of_integer_products(kind: str) -> None:
    x, bias = random(7, 64, seed=1), random(24, seed=2)
    grid = WeightGrid(4, True, "group", 16) if kind == "groups" else WeightGrid(8, True, "channel")
    quantized = minmax(random(24, 64), grid)
    bits = 4 if kind == "token4" else 8
    scale, zero = torch.tensor([0.02]), torch.tensor([11], dtype=torch.int8) if kind == "asymmetric" else None
    if kind in ("static", "asymmetric"):
        codes = quantize_static(x, scale, torch.zeros(1) if zero is None else zero)
        expected = int8_linear(codes, scale, 11 if zero is not None else 0, quantized.codes, quantized.scale, bias,
                               torch.float32)  # fmt: skip
        inputs = {"input_bits": 8, "input_scale": scale, "input_zero_point": zero}
    elif kind == "asymmetric token":
        codes, steps, zeros = quantize_per_token_asymmetric(x)
        expected = int8_linear(codes, steps, zeros, quantized.codes, quantized.scale, bias, torch.float32)
        inputs = {"input_bits": 8, "input_symmetric": False}
    else:
        codes, steps = quantize_per_token(x, bits)
        expected = int8_linear(codes, steps, None, quantized.codes, quantized.scale, bias, torch.float32)
        inputs = {"input_bits": bits}
    found = graded_linear(x, quantized, quantized.scale, bias, **inputs)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_scale_is_that_of_the_output() -> None:
    x, wanted = random(5, 32, seed=3), random(8, 5, seed=4).t()
    quantized = minmax(random(8, 32), WeightGrid(4, True, "group", 16))
    scale = quantized.scale.double().requires_grad_()
    quantized = QuantizedWeight(quantized.codes, quantized.scale.double(), None)
    assert torch.autograd.gradcheck(lambda s: graded_linear(x.double(), quantized, s, None) * wanted, (scale,))


def test_rounding_passes_gradients_within_the_range_only() -> None:
    x = torch.tensor([[0.4, -0.6, 3.0, -3.0]], requires_grad=True)
    scale = torch.tensor([0.01], requires_grad=True)
    codes = static_codes(x, scale, None)
    assert codes.tolist() == [[40, -60, 127, -128]]
    (codes * scale).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert scale.grad is not None
    # q − x/s within the range, which is 0 here, and q at its ends
    assert torch.allclose(scale.grad, torch.tensor([127.0 - 128.0]), atol=1e-4)
    assert torch.autograd.grad(rounded(x).sum(), x)[0].tolist() == [[1, 1, 1, 1]]


def test_asymmetric_tokens_pass_the_gradient_of_their_values() -> None:
    x = (random(3, 8) + 0.5).requires_grad_()
    codes, scale = asymmetric_token_codes(x)
    exact, _, zeros = quantize_per_token_asymmetric(x.detach())
    assert torch.allclose(codes, (exact - zeros).float(), rtol=0, atol=1e-4)
    (codes * scale).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.ones_like(x))
    equal, _ = asymmetric_token_codes(torch.full((1, 4), 3.0))
    assert equal.tolist() == [[0, 0, 0, 0]]


def test_a_token_of_zeros_stays_zero() -> None:
    codes, scale = token_codes(torch.zeros(1, 4), 8)
    assert codes.tolist() == [[0, 0, 0, 0]]
    assert scale.tolist() == [[1]]


@pytest.mark.parametrize("type", ["int", "float"])
def test_sums_of_codes_do_not_leave_float16(type: CodeType) -> None:
    grid = WeightGrid(8, True, "channel", type=type)
    quantized, x = minmax(random(16, 512), grid), random(3, 512, seed=1)
    wanted = graded_linear(x, quantized, quantized.scale.float(), None, input_bits=8)
    found = graded_linear(x.half(), quantized, quantized.scale.float(), None, input_bits=8)
    assert found.dtype == torch.float16
    assert torch.isfinite(found).all()
    assert (found.float() - wanted).norm() < 0.01 * wanted.norm()
