"""float8_e4m3fn, 8-bit floats of 4 bits of exponent and 3 of mantissa: codes of weights, inputs, keys and values."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest code; the format has no infinities, and two patterns are NaN."""

_SMALLEST_NORMAL = 2.0**-6
_EXPONENT = 0x7F800000  # of float32
_AND_NO_FINER = 1.5 * 2.0**20


def quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x / s, held within +-448, as float8_e4m3fn (ties to even) in the shape of x; scale [1], or of a shape like x."""
    return (x.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)


def cut_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """As `quantize_fp8`, but towards zero, not to the nearest: what vLLM's kernels for CPUs write into a cache."""
    nearest = quantize_fp8(x, scale)
    beyond = nearest.float().abs() > (x.float() / scale).abs()
    return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(FP8)  # magnitudes are ordered as their bits


def decoded_fp8(codes: Tensor) -> Tensor:
    """Float32 values of float8_e4m3fn codes; on a CPU from a table, since torch 2.13 converts one code at a time."""
    if codes.device.type != "cpu":
        return codes.float()
    patterns = codes.contiguous().view(torch.uint8).flatten().int()  # index_select takes no uint8
    return _table().index_select(0, patterns).view(codes.shape)


@cache
def _table() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(FP8).float()


def fp8_values_(x: Tensor) -> Tensor:
    """In place on float32: the nearest float8_e4m3fn value within +-448, ties to even; zeros lose their sign.

    Values of 2^e and more are multiples of 2^(e-3), and below 2^-6 all are of 2^-9. Where m is that power, 2^-6 at
    least, x + 1.5 * 2^20 m has no bits below 2^-3 m in float32, so that the sum itself rounds as wanted. On a CPU that
    takes a quarter of the time of a conversion to float8 and back.
    """
    x.clamp_(-FP8_MAX, FP8_MAX)
    if x.device.type != "cpu":
        return x.copy_(x.to(FP8)).add_(0.0)
    power = (x.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=_SMALLEST_NORMAL)
    return x.add_(power, alpha=_AND_NO_FINER).sub_(power, alpha=_AND_NO_FINER)
