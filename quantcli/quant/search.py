"""Search for the scale of each group that loses least, weighted by the input's second moment where that is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, group_count
from quantcli.quant.groupwise import centred_codes, quantize_groups
from quantcli.quant.minmax import check_weight, minmax_scale, zero_for

# Trial scales as multiples of the min-max scale. Measured on SmolLM2-135M, relative squared error at 4 bits, group 64:
# min-max .0102, these 14 with two refits .0087, a grid of 53 with three refits .0087 at three times the cost. The low
# end is for whole rows (outliers) and for 2 bits; a ratio above 1 trades a little range for codes that fall better.
RATIOS = (1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2)
REFITS = 2


def mse(weight: Tensor, grid: WeightGrid, importance: Tensor | None = None) -> QuantizedWeight:
    """For every group the scale (and zero point) that minimises sum_j h_j (w_j - (q_j - z) s)^2 over a set of trials.

    The trials are the min-max scale times RATIOS; below 8 bits symmetric also with the other sign, which gives the code
    -2^(b-1) to the other end; asymmetric, both ends shrink together. The best is then refitted to its codes,
    s = sum h w (q - z) / sum h (q - z)^2, with z and, asymmetric, z - 1 and z + 1, and kept where the loss falls.
    Every trial is judged with the scale rounded to grid.scale_dtype and the codes rounded anew, and min-max itself is
    the first, so the loss is never above that of min-max.

    weight [out, in] of any float dtype; importance: h = E[x_j^2] of the layer's input, [in], finite and not negative,
    or None for h = 1. Raises ValueError as `minmax` does, and for an importance that does not fit.
    """
    check_weight(weight)
    groups = group_count(weight.shape[1], grid)
    h = None if importance is None else _checked_importance(importance, weight).view(1, groups, -1)
    return quantize_groups(weight, grid, partial(_search, h=h, grid=grid))


def _search(
    pieces: Sequence[Tensor], low: Tensor, high: Tensor, *, h: Tensor | None, grid: WeightGrid
) -> tuple[Tensor, Tensor | None]:
    """Best scale (as stored) and zero point, float32 in the shape of `low`; pieces as `groupwise.Solver` has them.

    h: [1, groups, size].
    """
    # Two pieces of scratch for all trials: allocating them anew in each would cost more than the arithmetic.
    scratch = torch.empty(2, *pieces[0].shape, dtype=torch.float32, device=low.device)
    scale, zero = minmax_scale(low, high, grid)
    loss = _loss(pieces, scale, zero, h, grid, scratch)
    for trial_scale, trial_zero in _trials(low, high, scale, grid):
        scale, zero, loss = _better(pieces, h, grid, scratch, (scale, zero, loss), (trial_scale, trial_zero))
    for _ in range(REFITS):
        for shift in (0,) if zero is None else (0, -1, 1):
            trial_zero = None if zero is None else (zero + shift).clamp_(grid.qmin, grid.qmax)
            trial_scale = _refitted_scale(pieces, scale, trial_zero, h, grid, scratch)
            scale, zero, loss = _better(pieces, h, grid, scratch, (scale, zero, loss), (trial_scale, trial_zero))
    return scale, zero


def _trials(low: Tensor, high: Tensor, start: Tensor, grid: WeightGrid) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and zero points to try after those of min-max (`start`)."""
    if grid.symmetric:
        both_signs = grid.full_range
        if both_signs:
            yield -start, None
        for ratio in RATIOS:
            scale = grid.stored(start * ratio)
            yield scale, None
            if both_signs:
                yield -scale, None
        return
    low = low.clamp(max=0)
    for ratio in RATIOS:
        scale = grid.stored(start * ratio)
        yield scale, zero_for(low * ratio, scale, grid)


def _better(
    pieces: Sequence[Tensor],
    h: Tensor | None,
    grid: WeightGrid,
    scratch: Tensor,
    best: tuple[Tensor, Tensor | None, Tensor],
    trial: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(scale, zero, loss), group by group those of the trial where its loss is lower and those of `best` elsewhere."""
    scale, zero, loss = best
    trial_scale, trial_zero = trial
    trial_loss = _loss(pieces, trial_scale, trial_zero, h, grid, scratch)
    lower = trial_loss < loss
    if zero is not None and trial_zero is not None:
        zero = torch.where(lower, trial_zero, zero)
    return torch.where(lower, trial_scale, scale), zero, torch.where(lower, trial_loss, loss)


def _loss(
    pieces: Sequence[Tensor], scale: Tensor, zero: Tensor | None, h: Tensor | None, grid: WeightGrid, scratch: Tensor
) -> Tensor:
    """sum_j h_j (w_j - (q_j - z) s)^2 of each group, in the shape of `scale`."""
    total = torch.zeros_like(scale)
    for piece in pieces:
        error = centred_codes(piece, scale, zero, grid, scratch[0]).mul_(scale).sub_(piece).square_()
        if h is not None:
            error.mul_(h)
        total += error.sum(-1, keepdim=True).sum_to_size(scale.shape)
    return total


def _refitted_scale(
    pieces: Sequence[Tensor], scale: Tensor, zero: Tensor | None, h: Tensor | None, grid: WeightGrid, scratch: Tensor
) -> Tensor:
    """Least squares scale of the codes that `scale` and `zero` give, as stored; unchanged where all codes equal z."""
    numerator, denominator = torch.zeros_like(scale), torch.zeros_like(scale)
    for piece in pieces:
        codes = centred_codes(piece, scale, zero, grid, scratch[0])
        product = scratch[1, : piece.shape[0]]
        for other, total in ((codes, denominator), (piece, numerator)):
            torch.mul(codes, other, out=product)
            if h is not None:
                product.mul_(h)
            total += product.sum(-1, keepdim=True).sum_to_size(scale.shape)
    refitted = numerator / denominator
    usable = refitted.isfinite() & (refitted != 0)
    return torch.where(usable, grid.stored(refitted), scale)


def _checked_importance(importance: Tensor, weight: Tensor) -> Tensor:
    h = importance.to(weight.device, torch.float32)
    if h.shape != (weight.shape[1],):
        raise ValueError(f"importance has shape {list(h.shape)}, the weight has {weight.shape[1]} input channels")
    if not bool((h.isfinite() & (h >= 0)).all()):
        raise ValueError("importance holds negative, infinite or NaN values")
    return h
