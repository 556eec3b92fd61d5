"""Half-quadratic quantization: the scale and zero point of least lp-norm of the error, p < 1, without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.groupwise import Parameters, better_as_stored, codes_and_error, group_sum, quantize_groups, refit
from quantcli.quant.minmax import minmax_scale

P = 0.7
# The original has 10, 1.01 and 20, with errors in units of the weights: there v is 0 for nearly every weight of a
# language model, and the steps are plain least squares. In units of a step of the grid v tells errors apart; beginning
# at 1 (nearly least squares) and growing to 16 finds lower norms than 10 throughout. SmolLM2-135M, norm relative to
# min-max, 4 bits: groups of 64 .960 (original .975), rows .838 (.880).
BETA, GROWTH, ITERATIONS = 1.0, 1.1, 30
_SMALLEST = 1e-9  # an error of 0 would make |u|^(p-2) infinite


def hqq(weight: Tensor, grid: WeightGrid, importance: Tensor | None = None) -> QuantizedWeight:
    """For each group the least sum |w - (q - z) s|^p, p = 0.7, by half-quadratic splitting (Badri and Shaji, 2023).

    With u = (w - (q - z) s) / s0 the error in steps of min-max, from which it begins, ITERATIONS times in turn:

        q = clamp(round(w / s) + z)
        v = sign(u) max(0, |u| - |u|^(p-1) / beta)         what of the error is left alone: the large, rare part
        (s, z) = least squares of w - v s0 by the codes q   (`groupwise.refit`)
        beta = beta * GROWTH

    z is rounded to an integer in every iteration, since no format holds another; of such steps alone, as the original
    makes them, none would ever move it, so the scale is fitted with it. On symmetric grids the scale alone is. The
    iterate of least norm is rounded to grid.scale_dtype; where its norm is then above that of min-max, min-max stays.

    weight [out, in] of any float dtype; importance is accepted for the common signature and not used. Raises ValueError
    as `minmax` does.
    """
    return quantize_groups(weight, grid, partial(_solve, grid=grid))


def _solve(pieces: Sequence[Tensor], low: Tensor, high: Tensor, grid: WeightGrid) -> Parameters:
    start = scale, zero = minmax_scale(low, high, grid)
    scratch = torch.empty(4, *pieces[0].shape, dtype=torch.float32, device=low.device)
    unit, beta = scale.abs(), BETA
    best_scale, best_zero, best_loss = scale, zero, torch.full_like(scale, torch.inf)
    for _ in range(ITERATIONS):
        loss, (next_scale, next_zero) = _step(pieces, scale, zero, unit, beta, grid, scratch)
        lower = loss < best_loss
        best_scale, best_loss = torch.where(lower, scale, best_scale), torch.where(lower, loss, best_loss)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(lower, zero, best_zero)
        scale, zero, beta = next_scale, next_zero, beta * GROWTH
    return better_as_stored(pieces, start, (best_scale, best_zero), _power_, grid, scratch)


def _step(
    pieces: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    unit: Tensor,
    beta: float,
    grid: WeightGrid,
    scratch: Tensor,
) -> tuple[Tensor, Parameters]:
    """sum |u|^p of each group, and the parameters of the next iteration.

    What is fitted is (q - z) s + g with g = (u - v) s0 = e min(1, |u|^(p-2) / beta), e = w - (q - z) s.
    """
    loss, c, cc, g, cg = torch.zeros(5, *scale.shape, dtype=torch.float32, device=scale.device)
    for piece in pieces:
        codes, error = codes_and_error(piece, scale, zero, grid, scratch)
        u = torch.div(error, unit, out=scratch[2, : piece.shape[0]]).abs_().clamp_(min=_SMALLEST)
        power = torch.log2(u, out=scratch[3, : piece.shape[0]]).mul_(P).exp2_()  # u^p, in half the time of pow
        loss += group_sum(power, scale)
        fitted = error.mul_(power.div_(u).div_(u).div_(beta).clamp_(max=1))
        if zero is not None:
            c += group_sum(codes, scale)
            g += group_sum(fitted, scale)
        cg += group_sum(fitted.mul_(codes), scale)
        cc += group_sum(codes.square_(), scale)
    count = sum(piece.numel() for piece in pieces) // scale.numel()
    return loss, refit(scale, zero, count, c, cc, g, cg, grid)


def _power_(error: Tensor) -> Tensor:
    return error.abs_().pow_(P)
