"""Quantized linears as functions with gradients: rounding is passed as if it were not there (Bengio et al. 2013)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantcli.quant.activation import QMAX, QMIN, quantize_per_token, quantize_per_token_asymmetric
from quantcli.quant.float8 import FP8, FP8_MAX, fp8_values_
from quantcli.quant.grid import QuantizedWeight
from quantcli.quant.scheme import CodeType


def rounded(x: Tensor) -> Tensor:
    """round(x), ties to even, with the gradient of x."""
    return x + (x.detach().round() - x.detach())


def rounded_fp8(x: Tensor) -> Tensor:
    """The nearest float8_e4m3fn value within +-448, with the gradient of x within that range and none beyond."""
    held = x.clamp(-FP8_MAX, FP8_MAX)
    return held + (fp8_values_(held.detach().clone()) - held.detach())


def graded_weight(quantized: QuantizedWeight, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """ŵ = (q − z) s in `dtype` [out, in], with the gradient of `scale`, which has the shape of `quantized.scale`.

    q − z, integer or float8, is exact in bfloat16, so a scale of that dtype gives the weight that an engine unpacks.
    """
    out_features, in_features = quantized.codes.shape
    rows = out_features if scale.shape[0] > 1 else 1
    centred = quantized.codes.view(rows, scale.shape[1], -1).to(dtype)
    if quantized.zero_point is not None:
        centred = centred - quantized.zero_point.to(dtype).unsqueeze(-1)
    return (centred * scale.to(dtype).unsqueeze(-1)).view(out_features, in_features)


def token_codes(x: Tensor, bits: int, type: CodeType = "int") -> tuple[Tensor, Tensor]:
    """Codes with the gradient of x, and the scale of each token [..., 1]: `activation.quantize_per_token` in float32.

    The scale is that of the largest magnitude and has no gradient.
    """
    if type == "float":
        scale = quantize_per_token(x.detach(), type=type)[1]
        return rounded_fp8(x.float() / scale), scale
    largest = (1 << (bits - 1)) - 1
    scale = x.detach().float().abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return rounded(x.float() / scale).clamp(-largest - 1, largest), scale


def asymmetric_token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """q − z with the gradient of x, and the scale of each token [..., 1]: `activation.quantize_per_token_asymmetric` in
    float32. Scale and z have no gradient."""
    codes, scale, zero = quantize_per_token_asymmetric(x.detach())
    exact = x.float() / scale
    return exact + ((codes - zero).float() - exact.detach()), scale


def static_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, type: CodeType = "int") -> Tensor:
    """q − z of a static scale, float32, with the gradients of x within the range and of the scale [1] everywhere.

    The gradient of q s to s is q − x/s within the range and q at its ends (Esser et al. 2020, LSQ, arXiv 1902.08153,
    eq. 3); it comes of the rounding that is passed.
    """
    if type == "float":
        return rounded_fp8(x.float() / scale)
    zero = 0.0 if zero_point is None else zero_point.float()
    return (rounded(x.float() / scale) + zero).clamp(QMIN, QMAX) - zero


def input_codes(
    x: Tensor,
    type: CodeType,
    input_bits: int,
    input_symmetric: bool = True,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q − z of inputs, float32, with the gradient of x, and their scale: the static one, or of each token [..., 1]."""
    if input_scale is not None:
        return static_codes(x, input_scale, input_zero_point, type), input_scale
    return token_codes(x, input_bits, type) if input_symmetric else asymmetric_token_codes(x)


def graded_linear(
    x: Tensor,
    quantized: QuantizedWeight,
    scale: Tensor,
    bias: Tensor | None,
    *,
    input_bits: int | None = None,
    input_symmetric: bool = True,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """y = x̂ ŵᵀ + b in the dtype of x, with the gradients of x, the scales and b.

    Weight-only without `input_bits`; with them a scale a token (and unless `input_symmetric` a zero point), or the
    static `input_scale`. Codes are multiplied as they are where the weight has a scale a row, so that the product of a
    wide dtype is rounded once.
    """
    if input_bits is None:
        return linear(x, graded_weight(quantized, scale, x.dtype), bias)
    type: CodeType = "float" if quantized.codes.dtype == FP8 else "int"
    codes, step = input_codes(x, type, input_bits, input_symmetric, input_scale, input_zero_point)
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # whose range sums of products of codes leave
    if scale.shape[1] == 1:
        weight, columns = quantized.codes.to(dtype), scale.float().view(1, -1)
    else:
        weight, columns = graded_weight(quantized, scale, dtype), torch.ones((), device=x.device)
    y = (linear(codes.to(dtype), weight).float() * (step * columns)).to(x.dtype)
    return y if bias is None else y + bias
