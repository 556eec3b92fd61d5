"""GPTQ against the paper's procedure, one row and one column at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli.calibration.hessian import Hessian
from quantcli.quant.gptq import BLOCK, factored, gptq
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, quantize_codes
from quantcli.quant.minmax import minmax
from quantcli.quant.refine import output_error
from quantcli.quant.search import mse
from quantcli.quant.solver import solved

TIE = 2e-3  # steps of the grid: codes this far from a tie are not moved by float32, whatever came before them


def correlated(width: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """H of inputs whose channels are mixed, of very different size, the largest not first."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * width**-0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mix * (torch.randn(width, generator=generator) * 0.7).exp()
    return x.t() @ x / tokens


def some_weight(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01


def slow_gptq(
    weight: Tensor, start: QuantizedWeight, grid: WeightGrid, hessian: Tensor, damping: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, how far each was from a tie, and the order: Frantar et al. 2022, equations (2) and (3)."""
    h = hessian.double().numpy()
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    inverse = np.linalg.inv(h + damping * np.diag(np.diag(h)))
    rows = []  # of the inverse, as they are when their channel is rounded
    for j in order:
        rows.append(inverse[j].copy())
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    w = weight.double().numpy().copy()
    groups = start.scale.shape[1]
    scale = np.broadcast_to(start.scale.double().numpy(), (len(w), groups))
    zeros = np.zeros((len(w), groups))
    if start.zero_point is not None:
        zeros = np.broadcast_to(start.zero_point.double().numpy(), (len(w), groups))
    codes, ties = np.zeros(w.shape, dtype=np.int64), np.zeros(w.shape)
    for i in range(len(w)):
        for j, row in zip(order, rows, strict=True):
            g = j * groups // w.shape[1]
            s, z = scale[i, g], zeros[i, g]
            exact = w[i, j] / s
            q = min(max(round(exact) + z, grid.qmin), grid.qmax)
            codes[i, j], ties[i, j] = q, abs(abs(exact - np.floor(exact)) - 0.5)
            w[i] -= (w[i, j] - (q - z) * s) / row[j] * row
    return codes, ties, order


def assert_codes_agree(ours: Tensor, theirs: np.ndarray, ties: np.ndarray, order: np.ndarray) -> None:
    """Equal, except from the first code of a row on that lies at a tie."""
    equal = (ours.numpy() == theirs)[:, order]
    whole = equal.all(1)
    for row in np.flatnonzero(~whole):
        first = int(np.argmin(equal[row]))
        assert ties[row, order[first]] < TIE, f"row {row} differs at channel {order[first]}"
    assert whole.mean() >= 0.75


@pytest.mark.parametrize("granularity", ["channel", "group", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_paper_one_channel_at_a_time(bits: int, symmetric: bool, granularity: str) -> None:
    width = BLOCK + 22
    grid = WeightGrid(bits, symmetric, granularity, 30 if granularity == "group" else None)  # type: ignore[arg-type]
    weight, hessian = some_weight(8, width), correlated(width)
    start = minmax(weight, grid)
    curvature = factored(hessian, 0.01)
    found = gptq(weight, grid, start.scale, start.zero_point, curvature)
    assert_codes_agree(found.codes, *slow_gptq(weight, start, grid, hessian, 0.01))
    assert torch.equal(found.scale, start.scale)
    assert not torch.equal(found.codes, start.codes)


@pytest.mark.parametrize("width", [1, 7, 32, 33, BLOCK, 2 * BLOCK + 45])
def test_widths_around_the_sizes_of_blocks(width: int) -> None:
    grid = WeightGrid(4)
    weight, hessian = some_weight(6, width, seed=1), correlated(width, seed=1)
    start = minmax(weight, grid)
    found = gptq(weight, grid, start.scale, None, factored(hessian, 0.05))
    assert_codes_agree(found.codes, *slow_gptq(weight, start, grid, hessian, 0.05))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_and_scales_of_16_bits(dtype: torch.dtype) -> None:
    grid = WeightGrid(4, False, "group", 16, dtype)
    weight, hessian = some_weight(8, 64).to(dtype), correlated(64)
    start = minmax(weight, grid)
    found = gptq(weight, grid, start.scale, start.zero_point, factored(hessian))
    assert_codes_agree(found.codes, *slow_gptq(weight, start, grid, hessian, 0.01))


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_without_correlation_are_rounded_to_nearest(symmetric: bool) -> None:
    grid = WeightGrid(4, symmetric, "group", 25)
    weight = some_weight(9, 150)
    start = minmax(weight, grid)
    curvature = factored(torch.diag(torch.rand(150, generator=torch.Generator().manual_seed(0)) + 0.01))
    found = gptq(weight, grid, start.scale, start.zero_point, curvature)
    assert torch.equal(found.codes, quantize_codes(weight, start.scale, start.zero_point, grid))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_error_is_below_that_of_rounding(bits: int) -> None:
    grid = WeightGrid(bits, granularity="group", group_size=32)
    for seed in range(12):
        weight, hessian = some_weight(32, 96, seed), correlated(96, seed)
        start = minmax(weight, grid)
        found = gptq(weight, grid, start.scale, start.zero_point, factored(hessian))
        ours, plain = (output_error(weight, each, hessian).sum() for each in (found, start))
        assert ours < plain, f"seed {seed}"


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_factor_is_that_of_the_damped_inverse_in_the_order_of_solving(damping: float) -> None:
    hessian = correlated(70)
    curvature = factored(hessian, damping)
    assert curvature.damping == damping
    diagonal = hessian.diagonal()[curvature.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())
    damped = (hessian.double() + damping * torch.diag(hessian.diagonal()).double())[curvature.order][:, curvature.order]
    factor = curvature.factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(70).double(), rtol=0, atol=1e-4)
    assert torch.equal(curvature.hessian, correlated(70)), "the Hessian itself stays as it was"


def test_inputs_of_any_size_have_the_codes_of_their_shape() -> None:
    """Second moments of 1e-20 and of 1e+20 factor as those of 1 do."""
    grid, weight, hessian = WeightGrid(4), some_weight(8, 40), correlated(40)
    start = minmax(weight, grid)
    codes = [
        gptq(weight, grid, start.scale, None, factored(hessian * 2.0**power)).codes for power in (-66, 0, 66)
    ]  # fmt: skip
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[2], codes[1])


def test_inputs_of_fewer_tokens_than_channels_factor() -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    grid, weight, hessian = WeightGrid(3), some_weight(16, 40), x.t() @ x / 3
    start = minmax(weight, grid)
    found = gptq(weight, grid, start.scale, None, factored(hessian))
    ours, plain = (float(output_error(weight, each, hessian).sum()) for each in (found, start))
    assert ours < plain / 2, "three directions leave much freedom"


@pytest.mark.parametrize("correlation", [1.03, 1.5])
def test_damping_rises_until_an_indefinite_hessian_factors(correlation: float) -> None:
    hessian = torch.tensor([[4.0, 6.0 * correlation], [6.0 * correlation, 9.0]])
    curvature = factored(hessian, 0.01)

    def lowest(damping: float) -> float:
        damped = hessian.double() + damping * torch.diag(hessian.diagonal()).double()
        return float(torch.linalg.eigvalsh(damped).min())

    assert lowest(0.01) < 0 < lowest(curvature.damping)
    assert curvature.damping <= 1
    assert torch.equal(curvature.hessian.diagonal(), hessian.diagonal() * (1 + curvature.damping))
    assert hessian[1, 1] == 9.0, "what is handed in stays as it was"
    assert bool(torch.isfinite(curvature.factor).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_stay_near_where_the_sum_of_one_constant_input_is_indefinite(bits: int) -> None:
    """Products of bfloat16 leave curvatures of either sign that are rounding alone: nothing may go along them."""
    generator = torch.Generator().manual_seed(0 if bits == 4 else 2)
    x = torch.randn(1, 256, generator=generator).bfloat16().expand(512, -1)
    moments = Hessian(256, "cpu")
    moments.update(x)
    weight = torch.randn(96, 256, generator=generator) / 16
    grid = WeightGrid(bits, granularity="group", group_size=32, scale_dtype=torch.bfloat16)
    curvature = factored(moments.moments(), 0.01)
    assert curvature.damping > 0.01
    ends = [solved(weight, grid, curvature, sweeps) for sweeps in (0, 2)]
    distances = [float((dequantize(found) - weight).square().sum()) for found, _ in ends]
    assert distances[1] < 1.2 * distances[0]
    assert 0 <= ends[1][1] <= ends[0][1]
    lost, plain = (
        float(((dequantize(found) - weight) @ x[0].float()).square().sum())
        for found in (ends[1][0], mse(weight, grid, curvature.hessian.diagonal()))
    )
    assert lost < plain / 100


def test_a_hessian_that_never_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="does not factor with 100% of its diagonal"):
        factored(torch.tensor([[1.0, 2.5], [2.5, 1.0]]), 0.01)


@pytest.mark.parametrize("place", [(2, 2), (1, 3)])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(place: tuple[int, int], value: float) -> None:
    hessian = correlated(6)
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(ValueError, match=r"not finite|does not factor"):
        factored(hessian)


def test_channels_that_never_held_anything_neither_give_nor_take() -> None:
    grid, weight, hessian = WeightGrid(4), some_weight(10, 60), correlated(60)
    dead = torch.zeros(60, dtype=torch.bool)
    dead[[0, 17, 59]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    start = minmax(weight, grid)
    found = gptq(weight, grid, start.scale, None, factored(hessian)).codes
    alone = gptq(weight[:, ~dead], grid, start.scale, None, factored(hessian[~dead][:, ~dead])).codes
    assert torch.equal(found[:, ~dead], alone)
    assert torch.equal(found[:, dead], start.codes[:, dead])
    nothing = gptq(weight, grid, start.scale, None, factored(torch.zeros(60, 60)))
    assert torch.equal(nothing.codes, start.codes)


def test_scales_weigh_channels_by_what_their_errors_cost_before_and_after_they_are_made_good() -> None:
    """What is left of H_jj when all channels that are rounded later are free is a Schur complement."""
    hessian, weight, grid = correlated(48), some_weight(24, 48), WeightGrid(4, True, "group", 16, torch.bfloat16, True)
    curvature = factored(hessian)
    exact = hessian.double().numpy() + 0.01 * np.diag(np.diag(hessian.double().numpy()))
    left = np.empty(48)
    order = curvature.order.tolist()
    for place, j in enumerate(order):
        behind = order[place + 1 :]
        pulled = np.linalg.solve(exact[np.ix_(behind, behind)], exact[behind, j])
        left[j] = exact[j, j] - exact[j, behind] @ pulled
    wanted = mse(weight, grid, (hessian.diagonal() * torch.from_numpy(left).float()).sqrt())
    found, _ = solved(weight, grid, curvature, 0)
    assert (found.scale == wanted.scale).float().mean() > 0.98
