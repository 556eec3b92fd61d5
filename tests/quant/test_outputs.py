"""Rounding under what outputs are to each other, against one row after the other in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_gptq import correlated, slow_gptq, some_weight
from torch import Tensor

from quantcli.quant import outputs as module
from quantcli.quant.gptq import factored
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize
from quantcli.quant.minmax import minmax
from quantcli.quant.outputs import RUN, _descended, _fitted, _layout, _rounded, mixed_error, mixed_outputs
from quantcli.quant.solver import solved


def mixing(rows: int, seed: int = 1, strength: float = 1.0) -> Tensor:
    """G of outputs that few directions of the loss look at."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, max(1, rows // 4), generator=generator) * strength
    size = (torch.randn(rows, generator=generator) * 0.5).exp()
    return (few @ few.t() / few.shape[1] + torch.eye(rows)) * size * size[:, None]


def slow_mixed(
    weight: Tensor, start: QuantizedWeight, grid: WeightGrid, hessian: Tensor, outputs: Tensor
) -> np.ndarray:
    """Rows one at a time, the largest G_ii first: each by GPTQ as in the paper, then its error shared out by the
    inverse of G, of which a row that is done is taken out."""
    g = outputs.double().numpy()
    inverse = np.linalg.inv(g + 0.01 * np.diag(np.diag(g)))
    w, codes = weight.double().clone(), np.zeros(tuple(weight.shape), dtype=np.int64)
    scale = start.scale.expand(len(weight), -1)
    for i in np.argsort(-np.diag(g), kind="stable"):
        zero = None if start.zero_point is None else start.zero_point.expand(len(weight), -1)[i : i + 1]
        own = QuantizedWeight(start.codes[i : i + 1], scale[i : i + 1], zero)
        codes[i] = slow_gptq(w[i : i + 1], own, grid, hessian, 0.01)[0]
        found = QuantizedWeight(torch.from_numpy(codes[i : i + 1]).to(torch.int8), own.scale, zero)
        lost = (w[i] - dequantize(found)[0].double()) / inverse[i, i]
        w -= torch.from_numpy(inverse[i])[:, None] * lost
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "granularity"), [(24, 96, "group"), (RUN - 1, 40, "channel"), (7, 26, "channel")]
)
def test_codes_are_those_of_one_row_after_the_other(rows: int, width: int, granularity: str, symmetric: bool) -> None:
    grid = WeightGrid(4, symmetric, granularity, 32 if granularity == "group" else None)  # type: ignore[arg-type]
    weight, hessian, outputs = some_weight(rows, width), correlated(width), mixing(rows)
    start, curvature = minmax(weight, grid), factored(hessian, 0.01)
    layout = _layout(weight, curvature, outputs)
    assert layout.lots == rows
    found = _rounded(weight, start, grid, curvature, outputs, layout)
    # a code at a tie goes either way, and all that follow may differ with it
    assert (found.codes.numpy() == slow_mixed(weight, start, grid, hessian, outputs)).mean() > 0.98
    assert torch.equal(found.scale, start.scale)


def slow_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, outputs: Tensor) -> float:
    difference = weight.double() - dequantize(quantized).double()
    return float(torch.trace(outputs.double() @ difference @ hessian.double() @ difference.t()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(4 * RUN, 96), (50, 64)])
def test_errors_that_make_good_each_other_cost_less(bits: int, symmetric: bool, rows: int, width: int) -> None:
    grid = WeightGrid(bits, symmetric, "group", 32, torch.bfloat16)
    weight, hessian, outputs = some_weight(rows, width), correlated(width), mixing(rows, strength=3.0)
    curvature = factored(hessian, 0.01)
    start, _ = solved(weight, grid, curvature, 2)
    found, before, after = mixed_outputs(weight, start, grid, curvature, outputs, 2)
    assert before == pytest.approx(slow_error(weight, start, hessian, outputs), rel=1e-3)
    assert after == pytest.approx(slow_error(weight, found, hessian, outputs), rel=1e-3)
    assert after == pytest.approx(mixed_error(weight, found, hessian, outputs))
    assert after < 0.8 * before
    assert int(found.codes.min()) >= grid.qmin
    assert int(found.codes.max()) <= grid.qmax


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
def test_a_descent_never_raises_the_error_however_alike_outputs_are(strength: float, symmetric: bool) -> None:
    """Codes that change at once, each as if it were alone, overshoot where all outputs push in one direction."""
    rows, width = 3 * RUN, 160
    grid = WeightGrid(4, symmetric, "group", 32, torch.bfloat16)
    weight, hessian, outputs = some_weight(rows, width), correlated(width), mixing(rows, strength=strength)
    curvature = factored(hessian, 0.01)
    layout = _layout(weight, curvature, outputs)
    found = minmax(weight, grid)
    error = before = slow_error(weight, found, hessian, outputs)
    for _ in range(4):
        found = _descended(weight, found, grid, hessian, outputs, layout)
        error, last = slow_error(weight, found, hessian, outputs), error
        assert error <= last * (1 + 1e-4)
    assert error < 0.8 * before
    assert int(found.codes.min()) >= grid.qmin
    assert int(found.codes.max()) <= grid.qmax


def test_lots_that_overshoot_together_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are nearly one each lot may help where the other has overshot, and still both do harm."""
    monkeypatch.setattr(module, "RUN", 2)
    monkeypatch.setattr(module, "CHUNK", 1)
    grid, hessian = WeightGrid(8, True, "channel", None, torch.float32), torch.eye(4) * 0.1 + 0.9
    for across in torch.linspace(-0.9, 0.9, 37).tolist():
        pairs = torch.tensor([[1.0, across], [across, 1.0]]).repeat(3, 3)  # of each two rows the first is in one lot
        outputs = pairs + torch.diag(torch.tensor([0.02, 0.01]).repeat(3))
        weight = torch.tensor([1.0, 0.5, -0.5, 0.25]).expand(6, 4)
        start, layout = minmax(weight, grid), _layout(weight, factored(hessian, 0.01), outputs)
        assert (layout.lots, layout.chunk) == (2, 1)
        found = start._replace(codes=start.codes - 40)  # all weights too small by as much
        error = slow_error(weight, found, hessian, outputs)
        for _ in range(3):
            found = _descended(weight, found, grid, hessian, outputs, layout)
            error, last = slow_error(weight, found, hessian, outputs), error
            assert error <= last * (1 + 1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_those_of_least_squares_over_all_of_them(symmetric: bool) -> None:
    """In float64 every scale of a weight is one column of a least-squares problem of tr(G (W − Ŵ) H (W − Ŵ)ᵀ)."""
    rows, width, size = 6, 64, 16
    grid = WeightGrid(3, symmetric, "group", size, torch.float32)
    weight, hessian, outputs = some_weight(rows, width), correlated(width), mixing(rows)
    start = minmax(weight, grid)
    codes = dequantize(start._replace(scale=torch.ones_like(start.scale))).double()
    parts = torch.zeros(rows * (width // size), rows, width, dtype=torch.float64)
    for k in range(len(parts)):
        row, group = divmod(k, width // size)
        parts[k, row, group * size : (group + 1) * size] = codes[row, group * size : (group + 1) * size]
    turned = outputs.double() @ parts @ hessian.double()
    best = torch.linalg.solve(
        torch.einsum("kij,lij->kl", turned, parts), torch.einsum("kij,ij->k", turned, weight.double())
    )
    found = _fitted(weight, start, grid, hessian, outputs, iterations=100)
    assert torch.allclose(found.scale.double().flatten(), best, rtol=2e-3, atol=1e-4)
    few = _fitted(weight, start, grid, hessian, outputs)
    errors = [slow_error(weight, each, hessian, outputs) for each in (found, few, start)]
    assert errors == sorted(errors)
    assert errors[2] - errors[1] > 0.8 * (errors[2] - errors[0])
    assert torch.equal(few.codes, start.codes)


@pytest.mark.parametrize("outputs", ["unmixed", "none", "one"])
def test_what_gains_nothing_stays(outputs: str) -> None:
    """The error never rises; and outputs that the loss does not look at, or that nothing mixes, are no fault."""
    rows, width = 2 * RUN, 64
    given = {"unmixed": torch.eye(rows), "none": torch.zeros(rows, rows), "one": torch.zeros(rows, rows)}[outputs]
    if outputs == "one":
        given[3, 3] = 2.0
    grid, weight, curvature = (
        WeightGrid(4, True, "channel"),
        some_weight(rows, width),
        factored(correlated(width), 0.01),
    )
    start, _ = solved(weight, grid, curvature, 2)
    found, before, after = mixed_outputs(weight, start, grid, curvature, given, 2)
    assert after <= before
    assert mixed_error(weight, found, curvature.hessian, given) <= before
