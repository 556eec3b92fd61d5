from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize
from quantcli.quant.hqq import BETA, GROWTH, ITERATIONS, P, hqq
from quantcli.quant.minmax import minmax
from quantcli.quant.ssz import ssz


def slow_group(w: list[float], scale: float, zero: int, grid: WeightGrid) -> tuple[float, int]:
    """Scale and zero point of one group, by the three steps of the splitting written out."""
    start, beta, best = abs(scale), BETA, (math.inf, scale, zero)
    for _ in range(ITERATIONS):
        codes = [min(max(round(x / scale) + zero, grid.qmin), grid.qmax) for x in w]
        u = [(x - (q - zero) * scale) / start for x, q in zip(w, codes, strict=True)]
        loss = sum(abs(a) ** P for a in u)
        if loss < best[0]:
            best = (loss, scale, zero)
        v = [math.copysign(max(0.0, abs(a) - abs(a) ** (P - 1) / beta), a) if a else 0.0 for a in u]
        x = [a - b * start for a, b in zip(w, v, strict=True)]
        if not grid.symmetric:  # the line through the points (q, x)
            mean_q, mean_x = sum(codes) / len(w), sum(x) / len(w)
            slope = sum((q - mean_q) * (a - mean_x) for a, q in zip(x, codes, strict=True)) / sum(
                (q - mean_q) ** 2 for q in codes
            )
            zero = min(max(round(mean_q - mean_x / slope), grid.qmin), grid.qmax)
        scale = sum(a * (q - zero) for a, q in zip(x, codes, strict=True)) / sum((q - zero) ** 2 for q in codes)
        beta *= GROWTH
    return best[1], best[2]


def group_norms(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    error = (weight.double() - dequantize(quantized).double()).abs() ** P
    return error.view(weight.shape[0], quantized.scale.shape[1], -1).sum(-1)


def some_weight(rows: int = 12, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)) * 0.05
    weight[0, 3] = 0.9
    weight[1] = weight[1].abs() + 0.1
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_group_is_as_good_as_that_of_the_slow_loop(bits: int, symmetric: bool) -> None:
    """The same parameters in nearly all groups: 30 float32 steps may take the other side of a tie once."""
    weight, grid = some_weight(), WeightGrid(bits, symmetric, "group", 32)
    start, found = minmax(weight, grid), hqq(weight, grid)
    same = 0
    for i, row in enumerate(weight.double().view(12, 2, 32).tolist()):
        for j, group in enumerate(row):
            first = 0 if start.zero_point is None else int(start.zero_point[i, j])
            scale, zero = slow_group(group, float(start.scale[i, j]), first, grid)
            ours = 0 if found.zero_point is None else int(found.zero_point[i, j])
            same += ours == zero and math.isclose(float(found.scale[i, j]), scale, rel_tol=1e-4)
    assert same >= 22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_no_group_has_a_larger_norm_than_minmax(dtype: torch.dtype, symmetric: bool, signed: bool) -> None:
    weight = some_weight(64, 1).to(torch.bfloat16)
    for bits in (2, 3, 4, 8):
        for size in (16, None):
            grid = WeightGrid(bits, symmetric, "group" if size else "channel", size, dtype, signed)
            found, plain = group_norms(weight, hqq(weight, grid)), group_norms(weight, minmax(weight, grid))
            assert bool((found <= plain * (1 + 1e-5)).all())
            assert float(found.sum()) < (0.97 if bits < 8 else 0.9999) * float(plain.sum())


def test_one_scale_a_tensor_has_no_larger_norm_either() -> None:
    weight = some_weight(64, 1)
    for symmetric in (True, False):
        grid = WeightGrid(4, symmetric, "tensor")
        assert float(group_norms(weight, hqq(weight, grid)).sum()) < 0.9 * float(
            group_norms(weight, minmax(weight, grid)).sum()
        )


def test_an_outlier_pulls_the_scale_less_than_squared_errors_do() -> None:
    """What the norm is for. All weights but one lie on a grid of step 0.1; that one is half a step beyond its end."""
    weight = torch.randint(-7, 8, (64, 128), generator=torch.Generator().manual_seed(5)) * 0.1
    weight[:, 0] = 0.75
    grid = WeightGrid(4, signed_scales=False)
    by_norm, by_squares = ((method(weight, grid).scale / 0.1 - 1).abs() for method in (hqq, ssz))
    assert float(by_norm.max()) < 1e-3
    assert float(by_norm.mean()) < 0.3 * float(by_squares.mean())


def test_the_size_of_the_weights_does_not_matter() -> None:
    weight = some_weight(16, 3)
    for symmetric in (True, False):
        grid = WeightGrid(3, symmetric)
        small, large = hqq(weight, grid), hqq(weight * 1024, grid)
        assert torch.equal(small.codes, large.codes)
        assert torch.equal(small.scale * 1024, large.scale)


def test_scales_for_integer_kernels_stay_positive() -> None:
    for bits, symmetric in ((8, True), (4, False), (2, False)):
        assert bool((hqq(some_weight(64, 4), WeightGrid(bits, symmetric)).scale > 0).all())
