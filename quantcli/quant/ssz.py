"""Self-scaling: scales that fit their own codes by least squares, as msModelSlim's `ssz` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.groupwise import Parameters, better_as_stored, codes_and_error, group_sum, quantize_groups, refit
from quantcli.quant.minmax import minmax_scale

STEPS = 50
# Squared errors are sums in float32: a fit that moves the scale by 1e-5 changes them by less than their rounding.
_ROUNDING = 1e-6
_STILL = 4e-7  # relative change of a scale that is rounding only


def ssz(weight: Tensor, grid: WeightGrid, importance: Tensor | None = None) -> QuantizedWeight:
    """For each group, rounding and least squares in turn, from min-max on, as long as the squared error falls:

        q = clamp(round(w / s) + z),        s = sum w (q - z) / sum (q - z)^2

    until s stays or STEPS are made. On an asymmetric grid the zero point is fitted with the scale, and rounded to an
    integer (`groupwise.refit`). Scales are rounded to grid.scale_dtype at the end; where the squared error is then
    above that of min-max, min-max stays.

    weight [out, in] of any float dtype; importance is accepted for the common signature and not used. Raises ValueError
    as `minmax` does.
    """
    return quantize_groups(weight, grid, partial(_solve, grid=grid))


def _solve(pieces: Sequence[Tensor], low: Tensor, high: Tensor, grid: WeightGrid) -> Parameters:
    start = minmax_scale(low, high, grid)
    scratch = torch.empty(3, *pieces[0].shape, dtype=torch.float32, device=low.device)
    found = _descend(pieces, start, grid, scratch)
    return better_as_stored(pieces, start, found, torch.Tensor.square_, grid, scratch)


def _descend(pieces: Sequence[Tensor], start: Parameters, grid: WeightGrid, scratch: Tensor) -> Parameters:
    """Where rounding and fit of each group come to rest, its scale not rounded."""
    shape = start[0].shape
    best_scale = start[0].reshape(-1, 1, 1).clone()
    best_zero = None if start[1] is None else start[1].reshape(-1, 1, 1).clone()
    best_loss = torch.full_like(best_scale, torch.inf)
    if best_scale.numel() > 1:
        # Most groups are done after a few steps: those that are not go on alone.
        (block,) = pieces
        pieces, scratch = [block.reshape(-1, 1, block.shape[-1])], scratch.view(3, -1, 1, block.shape[-1])
    going = torch.arange(best_scale.shape[0], device=best_scale.device)
    scale, zero = best_scale, best_zero
    for _ in range(STEPS + 1):
        loss, (next_scale, next_zero) = _step(pieces, scale, zero, grid, scratch)
        falls = loss <= best_loss[going] * (1 + _ROUNDING)
        last = falls.flatten().nonzero().flatten()
        best_loss[going[last]], best_scale[going[last]] = loss[last], scale[last]
        if best_zero is not None and zero is not None:
            best_zero[going[last]] = zero[last]
        keep = (falls & ((next_scale - scale).abs() > _STILL * scale.abs())).flatten().nonzero().flatten()
        if not keep.numel():
            break
        if keep.numel() < going.numel():
            pieces, going = [piece[keep] for piece in pieces], going[keep]
        scale, zero = next_scale[keep], None if next_zero is None else next_zero[keep]
    return best_scale.view(shape), None if best_zero is None else best_zero.view(shape)


def _step(
    pieces: Sequence[Tensor], scale: Tensor, zero: Tensor | None, grid: WeightGrid, scratch: Tensor
) -> tuple[Tensor, Parameters]:
    """The squared error of each group, and the parameters that fit its codes."""
    loss, c, cc, e, ce = torch.zeros(5, *scale.shape, dtype=torch.float32, device=scale.device)
    for piece in pieces:
        codes, error = codes_and_error(piece, scale, zero, grid, scratch)
        product = scratch[2, : piece.shape[0]]
        if zero is not None:
            c += group_sum(codes, scale)
            e += group_sum(error, scale)
        ce += group_sum(torch.mul(codes, error, out=product), scale)
        cc += group_sum(codes.square_(), scale)
        loss += group_sum(error.square_(), scale)
    count = sum(piece.numel() for piece in pieces) // scale.numel()
    return loss, refit(scale, zero, count, c, cc, e, ce, grid)
