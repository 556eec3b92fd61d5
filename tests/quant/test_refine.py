"""Scales fitted to codes and codes changed one by one, against least squares and trials of every code."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from quantcli.quant.gptq import BLOCK, factored, gptq
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize
from quantcli.quant.minmax import minmax
from quantcli.quant.refine import descended, output_error, refitted


def some_case(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and H of inputs whose channels are mixed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * 0.05 + 0.01
    mix = torch.randn(width, width, generator=generator) * width**-0.5 + 0.5 * torch.eye(width)
    x = torch.randn(300, width, generator=generator) @ mix * (torch.rand(width, generator=generator) + 0.2)
    return weight, x.t() @ x / 300


def centred(quantized: QuantizedWeight) -> Tensor:
    codes = quantized.codes.double()
    if quantized.zero_point is None:
        return codes
    size = codes.shape[1] // quantized.scale.shape[1]
    zeros = quantized.zero_point.double().repeat_interleave(size, 1)
    return codes - zeros


def slow_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """The quadratic form in float64, from codes and scales."""
    size = weight.shape[1] // quantized.scale.shape[1]
    rounded = centred(quantized) * quantized.scale.double().repeat_interleave(size, 1)
    difference = weight.double() - rounded
    return torch.einsum("oi,ij,oj->o", difference, hessian.double(), difference)


def order_of(hessian: Tensor) -> Tensor:
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def test_the_output_error_is_the_mean_square_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 24, generator=generator), torch.randn(6, 24, generator=generator)
    quantized = minmax(weight, WeightGrid(3, False, "group", 8))
    outputs = x.double() @ (weight - dequantize(quantized)).double().t()
    found = output_error(weight, quantized, x.t() @ x / 50)
    torch.testing.assert_close(found.double(), outputs.square().mean(0), rtol=1e-5, atol=0)


GRIDS = [
    WeightGrid(bits, symmetric, granularity, 24 if granularity == "group" else None, dtype)  # type: ignore[arg-type]
    for bits, symmetric, granularity, dtype in [
        (4, True, "group", torch.float32), (4, False, "group", torch.bfloat16), (2, False, "group", torch.float16),
        (3, True, "channel", torch.bfloat16), (8, True, "channel", torch.float16), (8, False, "channel", torch.float32),
        (4, True, "tensor", torch.bfloat16), (8, True, "tensor", torch.float32),
    ]
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.symmetric}-{g.granularity}-{g.scale_dtype}")
@pytest.mark.parametrize("width", [72, BLOCK + 40])
def test_the_error_never_rises(grid: WeightGrid, width: int) -> None:
    for seed in range(3):
        weight, hessian = some_case(16, width, seed)
        found = minmax(weight, grid)
        if seed == 1:  # behind GPTQ, where there is less to gain
            found = gptq(weight, grid, found.scale, found.zero_point, factored(hessian))
        errors = [slow_error(weight, found, hessian)]
        for _ in range(3):
            found = refitted(weight, found, grid, hessian)
            errors.append(slow_error(weight, found, hessian))
            found = descended(weight, found, grid, hessian, order_of(hessian))
            errors.append(slow_error(weight, found, hessian))
        for before, after in pairwise(errors):
            if grid.granularity == "tensor":
                before, after = before.sum(), after.sum()
            assert bool((after <= before * (1 + 1e-4)).all())
        assert errors[-1].sum() < errors[0].sum()
        assert found.scale.dtype == grid.scale_dtype
        assert bool((found.scale != 0).all())
        if not grid.full_range:
            assert bool((found.scale > 0).all())
        assert int(found.codes.min()) >= grid.qmin
        assert int(found.codes.max()) <= grid.qmax


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_scale_a_row_is_that_of_least_squares(symmetric: bool) -> None:
    weight, hessian = some_case(12, 40)
    grid = WeightGrid(3, symmetric)
    start = minmax(weight, grid)
    found = refitted(weight, start, grid, hessian)
    root = torch.linalg.cholesky(hessian.double())
    codes = centred(start)
    for row in range(12):
        left, right = (codes[row] @ root)[:, None], (weight[row].double() @ root)[:, None]
        wanted = torch.linalg.lstsq(left, right).solution.item()
        assert found.scale[row].item() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(found.codes, start.codes)


def test_one_scale_of_a_matrix_is_that_of_least_squares_over_all_rows() -> None:
    weight, hessian = some_case(12, 40)
    grid = WeightGrid(4, granularity="tensor")
    start = minmax(weight, grid)
    root = torch.linalg.cholesky(hessian.double())
    left, right = ((each @ root).flatten()[:, None] for each in (centred(start), weight.double()))
    wanted = torch.linalg.lstsq(left, right).solution.item()
    assert refitted(weight, start, grid, hessian).scale.item() == pytest.approx(wanted, rel=1e-5)


def test_scales_of_groups_are_fitted_one_after_the_other() -> None:
    weight, hessian = some_case(5, 48)
    grid = WeightGrid(3, False, "group", 16)
    start = minmax(weight, grid)
    codes, scale = centred(start), start.scale.double().clone()
    root = torch.linalg.cholesky(hessian.double())
    for g in range(3):
        for row in range(5):
            others = sum(
                codes[row, 16 * o : 16 * o + 16] * scale[row, o] @ root[16 * o : 16 * o + 16]
                for o in range(3) if o != g
            )  # fmt: skip
            own = codes[row, 16 * g : 16 * g + 16] @ root[16 * g : 16 * g + 16]
            target = weight[row].double() @ root - others
            scale[row, g] = torch.linalg.lstsq(own[:, None], target[:, None]).solution.item()
    found = refitted(weight, start, grid, hessian)
    torch.testing.assert_close(found.scale.double(), scale, rtol=1e-4, atol=0)


def test_groups_whose_codes_are_all_zero_or_whose_inputs_are_keep_their_scale() -> None:
    weight, hessian = some_case(4, 48)
    weight[2, 16:32] = 0
    hessian[32:] = 0
    hessian[:, 32:] = 0
    grid = WeightGrid(4, granularity="group", group_size=16)
    start = minmax(weight, grid)
    found = refitted(weight, start, grid, hessian)
    assert torch.equal(found.scale[:, 2], start.scale[:, 2])
    assert found.scale[2, 1] == start.scale[2, 1]
    assert bool((found.scale[:, 0] != start.scale[:, 0]).any())
    again = descended(weight, found, grid, hessian, order_of(hessian))
    assert torch.equal(again.codes[:, 32:], start.codes[:, 32:])
    assert bool(torch.isfinite(found.scale).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_that_cancel_out_keep_their_scale(symmetric: bool, dtype: torch.dtype) -> None:
    """Channels that are copies of each other: of codes whose sum is 0 nothing but rounding tells a scale."""
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(64, 32, generator=generator) * 0.05, torch.randn(200, generator=generator)
    hessian = (x @ x / 200).expand(32, 32).contiguous()
    grid = WeightGrid(3, symmetric, "group", 8, dtype)
    start = minmax(weight, grid)
    found = refitted(weight, start, grid, hessian)
    silent = centred(start).view(64, 4, 8).sum(-1) == 0
    assert silent.any()
    assert torch.equal(found.scale[silent], start.scale[silent])
    assert not torch.equal(found.scale[~silent], start.scale[~silent])


@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_ends_where_no_single_code_can_be_bettered(symmetric: bool) -> None:
    """Tried with all 1024 rows of codes: none that differs in one place is better, and the best of all stays."""
    grid = WeightGrid(2, symmetric)
    every = torch.tensor(list(product(range(grid.qmin, grid.qmax + 1), repeat=5)), dtype=torch.int8)
    missed = 0
    for seed in range(10):
        weight, hessian = some_case(1, 5, seed)
        found = minmax(weight, grid)
        scale, zero_point = found.scale, found.zero_point
        copies = (scale.expand(len(every), 1), None if zero_point is None else zero_point.expand(len(every), 1))
        errors = slow_error(weight.expand(len(every), 5), QuantizedWeight(every, *copies), hessian)
        for _ in range(20):
            before, found = found, descended(weight, found, grid, hessian, order_of(hessian))
        assert torch.equal(before.codes, found.codes), "it has come to rest"
        error = slow_error(weight, found, hessian)
        neighbours = (every != found.codes).sum(1) <= 1
        assert error <= errors[neighbours].min() * (1 + 1e-5)
        best = QuantizedWeight(every[errors.argmin()][None], scale, zero_point)
        assert torch.equal(descended(weight, best, grid, hessian, order_of(hessian)).codes, best.codes)
        missed += bool(error > errors.min() * (1 + 1e-5))
    assert missed < 10, "the best of all is often found"


def test_each_channel_takes_its_best_code_in_turn() -> None:
    """One sweep against a loop that tries every code, in float64."""
    weight, hessian = some_case(6, BLOCK + 12)
    grid = WeightGrid(3, False, "group", 20)
    start = minmax(weight, grid)
    order = order_of(hessian)
    rounded, h = dequantize(start).double(), hessian.double()
    codes = start.codes.clone()
    for j in order.tolist():
        scale, zero = start.scale[:, j // 20].double(), start.zero_point[:, j // 20].double()  # type: ignore[index]
        pull = ((weight.double() - rounded) @ h)[:, j]
        tried = torch.arange(grid.qmin, grid.qmax + 1)[:, None]
        step = (tried - zero) * scale - rounded[:, j]
        chosen = (step.square() * h[j, j] - 2 * step * pull).argmin(0)
        codes[:, j] = tried[chosen, 0]
        rounded[:, j] = (codes[:, j] - zero) * scale
    found = descended(weight, start, grid, hessian, order)
    assert torch.equal(found.codes, codes)
    assert not torch.equal(found.codes, start.codes)
