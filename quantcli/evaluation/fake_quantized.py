"""Linears that compute as transformers does with quantized inputs: rounded floats, and a product of floats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantcli.quant.float8 import FP8, FP8_MAX, fp8_values_
from quantcli.quant.grid import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from quantcli.evaluation.simulate import Forward


def fake_quantized(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    input_bits: int = 8,
    input_symmetric: bool = True,
) -> Forward:
    """y = x̂ Ŵᵀ + b in the dtype of x, with x̂ = (clamp(round(x/s + z), −2^(b−1), 2^(b−1) − 1) − z) s, each step
    rounded to that dtype: the arithmetic of compressed-tensors 0.20, which transformers runs.

    Static inputs have input_scale [1] and, if asymmetric, input_zero_point int8 [1], both taken in the dtype of the
    model. Without them s = max|x| / ((2^b − 1) / 2) for every token, 127.5 where engines divide by 127, and the
    dtype's eps for a token of zeros. Codes of float8_e4m3fn: s = max|x| / 448, and no z. Dynamic ones that are not
    symmetric: s = (hi − lo) / (2^b − 1) and z = round(clamp(−2^(b−1) − lo/s, −2^(b−1), 2^(b−1) − 1)) for every token,
    with lo = min(x, 0) and hi = max(x, 0), where engines leave the range as it is.
    """
    wide = dequantize(QuantizedWeight(weight.codes, weight.scale.to(dtype), weight.zero_point), dtype)
    is_float = weight.codes.dtype == FP8
    low, high = (-FP8_MAX, FP8_MAX) if is_float else (-(1 << (input_bits - 1)), (1 << (input_bits - 1)) - 1)

    def parameters(x: Tensor) -> tuple[Tensor, Tensor | None]:
        if input_scale is not None:
            return input_scale.to(x.dtype), None if input_zero_point is None else input_zero_point.to(x.dtype)
        zero = None
        if input_symmetric:
            scale = x.abs().amax(-1, keepdim=True) / ((high - low) / 2)
        else:
            least, most = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
            scale = (most - least) / (high - low)
            zero = (low - least / scale).nan_to_num_(0).clamp_(low, high).round_()
        return scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps), zero

    def rounded(x: Tensor) -> Tensor:
        scale, zero = parameters(x)
        codes = x / scale
        if zero is not None:
            codes += zero
        if is_float:
            return fp8_values_(codes.float()).mul_(scale).to(x.dtype)  # exact products, rounded once
        codes = codes.clamp_(low, high).round_()
        if zero is not None:
            codes -= zero
        return codes * scale

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        return linear(rounded(x), wide, getattr(module, "bias", None))

    return forward
