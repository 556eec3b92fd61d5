"""Grids for weights: which codes exist, how scales lie over a matrix, and the way to codes and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantcli.quant.float8 import FP8, FP8_MAX, fp8_values_
from quantcli.quant.scheme import CodeType

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Quantizing one weight takes six to ten elementwise passes. Over a whole matrix each pass would go through main memory;
# in pieces of 1 MB of float32 a thread, the passes after the first find the piece in the core's second-level cache
# (measured on two cores: 1.0 ns a weight instead of 2.0). An accelerator wants few large launches instead.
_CPU_ELEMENTS_PER_THREAD = 1 << 18
_DEVICE_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class WeightGrid:
    """A grid of codes q with w ~ (q - z) * s, and how many weights share one (s, z).

    Codes are the signed integers in [-2^(b-1), 2^(b-1)-1] or, of type float, the values of float8_e4m3fn. Asymmetric
    zero points live in the same signed domain as the codes; a symmetric grid has z = 0. Raises ValueError for bits
    outside 2..8, an unknown granularity or scale dtype, a group size without (or missing with) "group", or float codes
    that are not of 8 bits, symmetric, with a scale a channel or tensor.
    """

    bits: int
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    signed_scales: bool = True
    smallest_scale: float = 0.0
    type: CodeType = "int"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2..8, got {self.bits}")
        if self.granularity not in ("tensor", "channel", "group"):
            raise ValueError(f"granularity must be tensor, channel or group, got {self.granularity!r}")
        if self.granularity == "group" and (self.group_size is None or self.group_size < 1):
            raise ValueError(f"granularity group needs a positive group_size, got {self.group_size}")
        if self.granularity != "group" and self.group_size is not None:
            raise ValueError(f"group_size {self.group_size} has no meaning with granularity {self.granularity}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be float32, bfloat16 or float16, got {self.scale_dtype}")
        if self.type == "float" and (self.bits != 8 or not self.symmetric or self.granularity == "group"):
            raise ValueError("float codes have 8 bits, no zero point, and a scale a channel or tensor")

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype in which codes are held: int8, or float8_e4m3fn."""
        return FP8 if self.type == "float" else torch.int8

    @property
    def qmin(self) -> int:
        return -int(FP8_MAX) if self.type == "float" else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        return int(FP8_MAX) if self.type == "float" else (1 << (self.bits - 1)) - 1

    @property
    def full_range(self) -> bool:
        """Whether a symmetric scale takes the sign of the largest weight, so that all 2^b codes are used.

        Not for 8 bits a channel or tensor: that is what integer kernels read, for which a scale is positive; and not
        where `signed_scales` is false.
        """
        return self.signed_scales and self.symmetric and (self.bits < 8 or self.granularity == "group")

    def stored(self, scale: Tensor) -> Tensor:
        """`stored_scale` of this grid."""
        return stored_scale(scale, self.scale_dtype, self.smallest_scale)


class QuantizedWeight(NamedTuple):
    """Codes int8 or float8_e4m3fn [out, in]; scale [out, groups] ([1, 1] for tensor, [out, 1] for channel) in the
    grid's scale dtype; zero_point int8 of the scale's shape, or None on a symmetric grid."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on a device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), zero_point)


def quantize_codes(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: WeightGrid) -> Tensor:
    """q = clamp(round(w / s) + z, qmin, qmax) in float32, ties to even: [out, in] in the dtype of the grid's codes.

    weight [out, in] of any float dtype; scale and zero_point [out, groups], [out, 1] or [1, 1].
    """
    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    for rows, block in float_blocks(weight, scale.shape[1]):
        zero = None if zero_point is None else row_slice(zero_point, rows).float().unsqueeze(-1)
        round_to_codes_(block, row_slice(scale, rows).float().unsqueeze(-1), zero, grid)
        codes[rows].view(block.shape).copy_(block)
    return codes


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """(q - z) * s in float32, rounded once to `dtype`: [out, in]."""
    codes, scale, zero_point = quantized
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows, block in float_blocks(codes, scale.shape[1]):
        if zero_point is not None:
            block.sub_(row_slice(zero_point, rows).float().unsqueeze(-1))
        block.mul_(row_slice(scale, rows).float().unsqueeze(-1))
        values[rows].view(block.shape).copy_(block)
    return values


def group_count(in_features: int, grid: WeightGrid) -> int:
    """Scales along one row. Raises ValueError if the grid's group size does not divide `in_features`."""
    if grid.group_size is None:
        return 1
    if in_features % grid.group_size:
        raise ValueError(f"group size {grid.group_size} does not divide the input width {in_features}")
    return in_features // grid.group_size


def stored_scale(scale: Tensor, dtype: torch.dtype, smallest: float = 0.0) -> Tensor:
    """A float32 scale as the checkpoint will hold it, still in float32: rounded to `dtype`, never zero, never infinite.

    Zero (a group of zero weights) becomes 1; what underflows becomes the smallest normal number of `dtype`, what
    overflows its largest, each with its sign. A smaller magnitude than `smallest` becomes that one.
    """
    if smallest:
        scale = torch.where(scale == 0, scale, scale.abs().clamp(min=smallest).copysign(scale))
    info = torch.finfo(dtype)
    rounded = scale.clamp(-info.max, info.max).to(dtype).float()
    rounded = torch.where(rounded == 0, torch.full_like(scale, info.tiny).copysign_(scale), rounded)
    return rounded.masked_fill_(scale == 0, 1.0)


def round_to_codes_(block: Tensor, scale: Tensor, zero: Tensor | None, grid: WeightGrid) -> Tensor:
    """In place on float32 [rows, groups, size]: clamp(round(w / s) + z, qmin, qmax); scale and zero [rows, groups, 1].

    It divides rather than multiplying by 1 / s: the extra rounding of the reciprocal would move codes at ties.
    """
    return nearest_codes_(block.div_(scale), zero, grid)


def nearest_codes_(values: Tensor, zero: Tensor | None, grid: WeightGrid) -> Tensor:
    """In place on float32: clamp(round(x) + z, qmin, qmax), the codes nearest to x = w / s, ties to even."""
    if grid.type == "float":
        return fp8_values_(values)
    values.round_()
    if zero is not None:
        values.add_(zero)
    return values.clamp_(grid.qmin, grid.qmax)


def row_runs(matrix: Tensor) -> Iterator[slice]:
    """The matrix's rows in cache-sized runs, of equal length but for the last."""
    out_features, in_features = matrix.shape
    elements = _DEVICE_ELEMENTS
    if matrix.device.type == "cpu":
        elements = _CPU_ELEMENTS_PER_THREAD * torch.get_num_threads()
    step = max(1, elements // max(1, in_features))
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def float_blocks(matrix: Tensor, groups: int) -> Iterator[tuple[slice, Tensor]]:
    """The matrix by `row_runs`: (rows, float32 [rows, groups, size]).

    Each block is scratch for the caller to overwrite; the next one reuses its memory.
    """
    scratch: Tensor | None = None
    for rows in row_runs(matrix):
        count = rows.stop - rows.start
        if scratch is None:
            scratch = torch.empty(count, matrix.shape[1], dtype=torch.float32, device=matrix.device)
        yield rows, scratch[:count].copy_(matrix[rows]).view(count, groups, -1)


def row_slice(values: Tensor, rows: slice) -> Tensor:
    """The rows' scales or zero points; a per-tensor value ([1, 1]) belongs to every row."""
    return values if values.shape[0] == 1 else values[rows]
