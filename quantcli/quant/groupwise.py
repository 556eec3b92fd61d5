"""What methods share that find a scale (and zero point) for each group of weights: the walk over groups, the error of a
group, and the least squares fit to its codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantcli.quant.grid import (
    QuantizedWeight,
    WeightGrid,
    float_blocks,
    group_count,
    quantize_codes,
    round_to_codes_,
    row_runs,
)
from quantcli.quant.minmax import check_weight

Parameters = tuple[Tensor, Tensor | None]
"""Scale and zero point (None on a symmetric grid), float32, of the same shape."""
Solver = Callable[[Sequence[Tensor], Tensor, Tensor], Parameters]
"""(pieces, low, high) -> the scale as stored, and the zero point, in the shape of `low`.

pieces: [rows, groups, size] each, the largest first; one with a scale a group ([rows, groups, 1]), or several that
share one scale ([1, 1, 1]). low, high: the smallest and largest weight of each group.
"""


def quantize_groups(weight: Tensor, grid: WeightGrid, solve: Solver) -> QuantizedWeight:
    """`weight` [out, in] of any float dtype with the scales that `solve` finds, block of rows by block of rows.

    Raises ValueError for a weight that is no matrix or is empty, or that the group size does not divide.
    """
    check_weight(weight)
    out_features, in_features = weight.shape
    groups = group_count(in_features, grid)
    if grid.granularity == "tensor":
        low, high = weight.amin().float().view(1, 1, 1), weight.amax().float().view(1, 1, 1)
        block_scale, block_zero = solve([weight[rows].unsqueeze(1) for rows in row_runs(weight)], low, high)
        scale = block_scale.view(1, 1).to(grid.scale_dtype)
        zero_point = None if block_zero is None else block_zero.view(1, 1).to(torch.int8)
        return QuantizedWeight(quantize_codes(weight, scale, zero_point, grid), scale, zero_point)

    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    scale = torch.empty(out_features, groups, dtype=grid.scale_dtype, device=weight.device)
    zero_point = None if grid.symmetric else torch.empty(scale.shape, dtype=torch.int8, device=weight.device)
    for rows, block in float_blocks(weight, groups):
        low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        block_scale, block_zero = solve([block], low, high)
        round_to_codes_(block, block_scale, block_zero, grid)
        codes[rows].view(block.shape).copy_(block)
        scale[rows] = block_scale.squeeze(-1).to(grid.scale_dtype)
        if zero_point is not None and block_zero is not None:
            zero_point[rows] = block_zero.squeeze(-1).to(torch.int8)
    return QuantizedWeight(codes, scale, zero_point)


def centred_codes(piece: Tensor, scale: Tensor, zero: Tensor | None, grid: WeightGrid, scratch: Tensor) -> Tensor:
    """c = q - z as float32, written into scratch [rows, groups, size]."""
    codes = round_to_codes_(scratch[: piece.shape[0]].copy_(piece), scale, zero, grid)
    return codes if zero is None else codes.sub_(zero)


def codes_and_error(
    piece: Tensor, scale: Tensor, zero: Tensor | None, grid: WeightGrid, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """c = q - z and e = w - c s as float32, written into scratch [2, rows, groups, size]."""
    codes = centred_codes(piece, scale, zero, grid, scratch[0])
    return codes, scratch[1, : piece.shape[0]].copy_(piece).addcmul_(codes, scale, value=-1)


def group_sum(values: Tensor, like: Tensor) -> Tensor:
    """The sum of [rows, groups, size] over what shares a scale, in the shape of the scale `like`."""
    return values.sum(-1, keepdim=True).sum_to_size(like.shape)


def refit(
    scale: Tensor, zero: Tensor | None, count: int, c: Tensor, cc: Tensor, g: Tensor, cg: Tensor, grid: WeightGrid
) -> Parameters:
    """Least squares fit of x = c s + g by the codes c: sums over each group of c, c^2, g and c g, of `count` weights.

    Symmetric: s' = sum c x / sum c^2 = s + sum c g / sum c^2. Asymmetric: the line through (c, x) has the slope t and
    is zero at d = mean c - mean x / t; the zero point becomes z' = clamp(round(z + d), qmin, qmax), an integer, and
    s' = sum c' x / sum c'^2 fits c' = c - (z' - z). A group stays as it is where s' is not finite or of another sign
    than s. c and g are not needed (and may be anything) on a symmetric grid.
    """
    if zero is None:
        fitted, shifted = scale + cg / cc, None
    else:
        mean_c, mean_g = c / count, g / count
        slope = scale + (cg - mean_c * g) / (cc - mean_c * c)
        shifted = (zero + mean_c - (scale * mean_c + mean_g) / slope).round_().clamp_(grid.qmin, grid.qmax)
        d = shifted - zero
        fitted = (scale * (cc - d * c) + cg - d * g) / (cc - 2 * d * c + count * d.square())
    usable = fitted.isfinite() & (fitted.sign() == scale.sign())
    if zero is not None and shifted is not None:
        zero = torch.where(usable, shifted, zero)
    return torch.where(usable, fitted, scale), zero


def better_as_stored(
    pieces: Sequence[Tensor],
    start: Parameters,
    found: Parameters,
    loss_: Callable[[Tensor], Tensor],
    grid: WeightGrid,
    scratch: Tensor,
) -> Parameters:
    """Group by group `found` with its scale rounded to grid.scale_dtype, or `start`, whose scale is so rounded already,
    where that has a smaller sum of `loss_` (in place, elementwise) over the errors. scratch as `codes_and_error`
    takes it."""
    scale, zero = grid.stored(found[0]), found[1]
    losses = []
    for parameters in (start, (scale, zero)):
        total = torch.zeros_like(scale)
        for piece in pieces:
            total += group_sum(loss_(codes_and_error(piece, *parameters, grid, scratch)[1]), scale)
        losses.append(total)
    lower = losses[1] <= losses[0]
    if zero is not None and start[1] is not None:
        zero = torch.where(lower, zero, start[1])
    return torch.where(lower, scale, start[0]), zero
