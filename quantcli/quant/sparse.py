"""Sparse quantization (W8A8S): 4-bit codes for the many, 8-bit codes for the few weights beyond them, in int8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, float_blocks, quantize_codes
from quantcli.quant.minmax import check_weight

SparseMode = Literal["co_sparse", "low_bit", "low_bit_sigma"]

INLIER_CODE = 7
FRACTION_LIMITS = (0.01, 0.1)
SIGMA_FACTOR_LIMITS = (3.0, 4.0)


def sparse_weight(
    weight: Tensor,
    grid: WeightGrid,
    importance: Tensor | None = None,
    *,
    mode: SparseMode = "co_sparse",
    fraction: float = 0.01,
    sigma_factor: float = 3.0,
) -> QuantizedWeight:
    """s = max{|w| : |w| <= t} / 7, q = clamp(round(w / s), -128, 127): 4-bit codes up to the threshold t, 8-bit beyond.

    The threshold, with k = max(1, floor(fraction * number of weights)):

    - co_sparse: one for the matrix, the k-th largest |w| of the matrix;
    - low_bit: one a row, the k-th largest |w| of the row;
    - low_bit_sigma: one a row, sigma_factor * std(|w|), the standard deviation (n - 1) of the magnitudes.

    The k-th largest is an inlier itself, so fewer than k weights are outliers, and k = 1 gives plain 4 bits. An outlier
    beyond 127 s, 18.1 times the largest inlier, is cut to 127 s. Granularity "tensor" takes the largest of the rows'
    scales. The scale is rounded to grid.scale_dtype before codes are computed from it.

    Found from recorded outputs of msModelSlim (type W8A8S; its source is closed). On float32 weights all codes and
    scales (to the bit) are equal, per channel in the three modes and per tensor in low_bit. Not recorded: per tensor
    in the other two, other dtypes, codes below -127, sigma factors but 3. Where only zeros are inliers (NaN there) the
    largest |w| counts as one, and zero rows get s = 1; where floor gives 0 (an error there) nothing is an outlier.

    weight [out, in] of any float dtype; grid: symmetric, 8 bits, channel or tensor; importance is accepted for the
    common signature and not used. fraction (0.01..0.1) means nothing to low_bit_sigma, sigma_factor (3..4) to the
    others. Raises ValueError for another grid or mode, values outside these limits, and a weight that is no matrix, is
    empty, or holds NaN or infinity.
    """
    check_weight(weight)
    _check_arguments(grid, mode, fraction, sigma_factor)
    out_features, in_features = weight.shape
    threshold = torch.zeros((), device=weight.device)
    if mode == "co_sparse":
        threshold = _kth_largest_magnitude(weight, max(1, int(fraction * weight.numel())))

    inlier = torch.empty(out_features, 1, dtype=torch.float32, device=weight.device)
    largest = torch.empty_like(inlier)
    for rows, block in float_blocks(weight, 1):
        magnitude = block.squeeze(1).abs_()
        largest[rows] = magnitude.amax(1, keepdim=True)
        if mode == "low_bit":
            inlier[rows] = magnitude.topk(max(1, int(fraction * in_features)), dim=1).values[:, -1:]
            continue
        if mode == "low_bit_sigma":
            threshold = sigma_factor * magnitude.std(1, keepdim=True, correction=min(1, in_features - 1))
        inlier[rows] = magnitude.masked_fill_(magnitude > threshold, 0).amax(1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("the weight holds NaN or infinite values")

    if grid.granularity == "tensor":
        inlier, largest = inlier.amax().reshape(1, 1), largest.amax().reshape(1, 1)
    inlier = torch.where(inlier == 0, largest, inlier)
    scale = grid.stored(inlier / INLIER_CODE).to(grid.scale_dtype)
    return QuantizedWeight(quantize_codes(weight, scale, None, grid), scale, None)


def _check_arguments(grid: WeightGrid, mode: SparseMode, fraction: float, sigma_factor: float) -> None:
    if mode not in get_args(SparseMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(SparseMode))}, got {mode!r}")
    if grid.bits != 8 or not grid.symmetric or grid.granularity == "group":
        raise ValueError(f"sparse weights need a symmetric 8-bit grid a channel or tensor, got {grid}")
    for name, value, (low, high) in (
        ("fraction", fraction, FRACTION_LIMITS),
        ("sigma_factor", sigma_factor, SIGMA_FACTOR_LIMITS),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def _kth_largest_magnitude(weight: Tensor, k: int) -> Tensor:
    """The k-th largest |w| in float32, a scalar; exact.

    Non-negative float32 numbers sort as their bit patterns do, so two counts find it: one of the upper 16 bits, one of
    the lower 16 among the weights that share the upper ones. Sorting would hold 12 bytes or more for every weight.
    """
    upper, k = _kth_bin((bits >> 16 for bits in _magnitude_bits(weight)), 1 << 15, k, weight.device)
    inside = (bits[bits >> 16 == upper] & 0xFFFF for bits in _magnitude_bits(weight))
    lower, _ = _kth_bin(inside, 1 << 16, k, weight.device)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32, device=weight.device).view(torch.float32)


def _magnitude_bits(weight: Tensor) -> Iterator[Tensor]:
    """|w| as int32 bit patterns, flat, by blocks of rows."""
    for _, block in float_blocks(weight, 1):
        yield block.abs_().view(torch.int32).flatten()


def _kth_bin(pieces: Iterator[Tensor], bins: int, k: int, device: torch.device) -> tuple[int, int]:
    """The value in 0..bins-1 that is the k-th largest of all pieces, and which one among its equals the k-th is."""
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    for piece in pieces:
        counts += torch.bincount(piece, minlength=bins)
    at_least = counts.flip(0).cumsum(0).flip(0)
    value = int((at_least >= k).sum()) - 1
    return value, k - int(at_least[value] - counts[value])
