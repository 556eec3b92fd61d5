"""Round-to-nearest on the range of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.quant.grid import (
    QuantizedWeight,
    WeightGrid,
    float_blocks,
    group_count,
    quantize_codes,
    round_to_codes_,
)


def minmax(weight: Tensor, grid: WeightGrid, importance: Tensor | None = None) -> QuantizedWeight:
    """Scales from the smallest and largest weight that share them, then round to nearest.

    Symmetric: s = w* / -2^(b-1) with w* the weight of largest magnitude, so that s may be negative, all codes are
    used and w* is met exactly (the Q4_0 rule of llama.cpp); with 8 bits a channel or tensor s = max|w| / 127,
    or max|w| / 448 for float codes.
    Asymmetric: lo = min(w, 0), hi = max(w, 0), s = (hi - lo) / (2^b - 1), z = clamp(round(qmin - lo / s), qmin, qmax).
    The scale is rounded to grid.scale_dtype before codes and zero points are computed from it; zero weights get s = 1.

    weight [out, in] of any float dtype; importance is accepted for the common signature and not used.
    Raises ValueError for a weight that is no matrix, is empty, holds NaN or infinity, or that the group size does not
    divide.
    """
    check_weight(weight)
    out_features, in_features = weight.shape
    groups = group_count(in_features, grid)
    if grid.granularity == "tensor":
        scale, zero = minmax_scale(*_tensor_range(weight), grid)
        scale = scale.to(grid.scale_dtype)
        zero_point = None if zero is None else zero.to(torch.int8)
        return QuantizedWeight(quantize_codes(weight, scale, zero_point, grid), scale, zero_point)

    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    scale = torch.empty(out_features, groups, dtype=grid.scale_dtype, device=weight.device)
    zero_point = None if grid.symmetric else torch.empty(scale.shape, dtype=torch.int8, device=weight.device)
    for rows, block in float_blocks(weight, groups):
        # Two reductions: torch.aminmax is many times slower than amin and amax along a dimension of a CPU tensor.
        block_scale, block_zero = minmax_scale(block.amin(-1, keepdim=True), block.amax(-1, keepdim=True), grid)
        round_to_codes_(block, block_scale, block_zero, grid)
        codes[rows].view(block.shape).copy_(block)
        scale[rows] = block_scale.squeeze(-1).to(grid.scale_dtype)
        if zero_point is not None and block_zero is not None:
            zero_point[rows] = block_zero.squeeze(-1).to(torch.int8)
    return QuantizedWeight(codes, scale, zero_point)


def minmax_scale(low: Tensor, high: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor | None]:
    """Scale as stored and zero point, both float32, for weights that range over [low, high] (float32, any shape)."""
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError("the weight holds NaN or infinite values")
    if not grid.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        levels = grid.qmax - grid.qmin
        # Divided one by one: high - low may overflow float32 where the scale does not.
        scale = grid.stored(high / levels - low / levels)
        return scale, zero_for(low, scale, grid)
    if grid.full_range:
        return grid.stored(torch.where(-low >= high, low, high) / grid.qmin), None
    return grid.stored(torch.maximum(high, -low) / grid.qmax), None


def zero_for(low: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
    """z = clamp(round(qmin - low / s), qmin, qmax): the code of 0 when `low` is to get code qmin. Float32."""
    return (grid.qmin - low / scale).round_().clamp_(grid.qmin, grid.qmax)


def check_weight(weight: Tensor) -> None:
    """Raises ValueError unless `weight` is a matrix of floats with at least one element."""
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected a float matrix [out, in], got {weight.dtype} of shape {list(weight.shape)}")


def _tensor_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight, float32 [1, 1]."""
    low, high = weight.amin().float(), weight.amax().float()
    return low.reshape(1, 1), high.reshape(1, 1)
