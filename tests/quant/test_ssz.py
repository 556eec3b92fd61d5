from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize
from quantcli.quant.minmax import minmax
from quantcli.quant.ssz import STEPS, ssz


def slow_row(w: list[float], scale: float, zero: int, grid: WeightGrid) -> tuple[float, int, float]:
    """Scale, zero point and squared error of one group: rounding and a fit in turn while the error falls."""
    best = (scale, zero, float("inf"))
    for _ in range(STEPS + 1):
        codes = [min(max(round(x / scale) + zero, grid.qmin), grid.qmax) for x in w]
        error = sum((x - (q - zero) * scale) ** 2 for x, q in zip(w, codes, strict=True))
        if error >= best[2]:
            break
        best = (scale, zero, error)
        if not grid.symmetric:  # the line through the points (q, w)
            mean_q, mean_w = sum(codes) / len(w), sum(w) / len(w)
            slope = sum((q - mean_q) * (x - mean_w) for x, q in zip(w, codes, strict=True)) / sum(
                (q - mean_q) ** 2 for q in codes
            )
            zero = min(max(round(mean_q - mean_w / slope), grid.qmin), grid.qmax)
        scale = sum(x * (q - zero) for x, q in zip(w, codes, strict=True)) / sum((q - zero) ** 2 for q in codes)
    return best


def group_errors(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    error = (weight.double() - dequantize(quantized).double()).square()
    return error.view(weight.shape[0], quantized.scale.shape[1], -1).sum(-1)


def some_weight(rows: int = 12, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0, 3] = 0.9
    weight[1] = weight[1].abs() + 0.1
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_every_group_is_that_of_the_slow_loop(bits: int, symmetric: bool, signed: bool) -> None:
    weight, grid = some_weight(), WeightGrid(bits, symmetric, "group", 32, signed_scales=signed)
    start, found = minmax(weight, grid), ssz(weight, grid)
    for i, row in enumerate(weight.double().view(12, 2, 32).tolist()):
        for j, group in enumerate(row):
            first = 0 if start.zero_point is None else int(start.zero_point[i, j])
            scale, zero, _ = slow_row(group, float(start.scale[i, j]), first, grid)
            assert float(found.scale[i, j]) == pytest.approx(scale, rel=1e-5)
            assert (0 if found.zero_point is None else int(found.zero_point[i, j])) == zero


def test_a_scale_of_the_whole_matrix_is_that_of_one_long_row() -> None:
    weight = some_weight()
    for symmetric in (True, False):
        grid = WeightGrid(4, symmetric, "tensor")
        start, found = minmax(weight, grid), ssz(weight, grid)
        first = 0 if start.zero_point is None else int(start.zero_point)
        scale, _, error = slow_row(weight.double().flatten().tolist(), float(start.scale), first, grid)
        assert float(found.scale) == pytest.approx(scale, rel=1e-5)
        assert float(group_errors(weight, found).sum()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_group_loses_against_minmax_with_the_scale_as_stored(dtype: torch.dtype, symmetric: bool) -> None:
    weight = some_weight(64, 1).to(torch.bfloat16)
    for bits in (2, 3, 4, 8):
        grid = WeightGrid(bits, symmetric, "group", 16, dtype)
        found, plain = group_errors(weight, ssz(weight, grid)), group_errors(weight, minmax(weight, grid))
        assert bool((found <= plain * (1 + 1e-5)).all())
        assert float(found.sum()) < (0.96 if bits < 8 else 0.999) * float(plain.sum())


def test_the_scale_is_the_least_squares_of_the_codes() -> None:
    """Where the descent ended by itself, no other scale fits the codes better (golden/README.md, 4.11)."""
    weight = some_weight(32, 2)
    codes, scale, _ = ssz(weight, WeightGrid(4))
    q = codes.double()
    fitted = (weight.double() * q).sum(1) / q.square().sum(1)
    close = (scale.flatten().double() / fitted - 1).abs() < 1e-6
    assert float(close.double().mean()) > 0.9
