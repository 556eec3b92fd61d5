"""Activations as integers of 8 or 4 bits or as 8-bit floats: their scales, their codes, and the products of a linear
layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantcli.quant.float8 import FP8_MAX, decoded_fp8, fp8_values_
from quantcli.quant.grid import QuantizedWeight, dequantize
from quantcli.quant.scheme import CodeType

QMIN, QMAX = -128, 127
SMALLEST_FP8_SCALE = 1 / (448 * 512)
"""Of a token, in vLLM: with it every code of the token is below 1, the smallest being 2^-9."""

# |sum (x - z) w| <= 255 * 128 * in has to stay below 2^31 for an int32 accumulator.
_INT32_MAX_IN_FEATURES = (2**31 - 1) // (255 * 128)
# The CUDA kernel behind torch._int_mm takes more than 16 rows and widths that are multiples of 8.
_CUDA_MIN_ROWS, _CUDA_MULTIPLE = 17, 8
# Values that are quantized and products that are made at once on a CPU: each pass over them finds them in the cache,
# and calls are few enough that what a call costs by itself does not count.
_CPU_ELEMENTS = 1 << 18
# Rows of a product of a prepared weight: its kernel is fast for many, whose float32 outputs have to fit into memory.
_PREPARED_ROWS = 2048


def static_parameters(minimum: float, maximum: float, symmetric: bool, type: CodeType = "int") -> tuple[Tensor, Tensor]:
    """Scale (float32 [1]) and zero point (int8 [1]) of a tensor whose values were seen in [minimum, maximum].

    Symmetric: s = max(|min|, |max|) / 127, or / 448 for float codes, and z = 0. Asymmetric, with 0 in the range:
    s = (max - min) / 255, z = clamp(round(-min / s) - 128, -128, 127). A range of zero gives s = 1. Raises ValueError
    unless minimum <= maximum, both finite, and for asymmetric float codes.
    """
    if type == "float" and not symmetric:
        raise ValueError("float codes have no zero point")
    if not (math.isfinite(minimum) and math.isfinite(maximum) and minimum <= maximum):
        raise ValueError(f"activation range [{minimum}, {maximum}] is not a finite interval")
    low, high = torch.tensor([min(minimum, 0.0)]), torch.tensor([max(maximum, 0.0)])
    largest = FP8_MAX if type == "float" else QMAX
    scale = torch.maximum(-low, high) / largest if symmetric else high / 255 - low / 255
    scale = _usable(scale)
    zero = torch.zeros_like(scale) if symmetric else ((-low / scale).round() + QMIN).clamp(QMIN, QMAX)
    return scale, zero.to(torch.int8)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, type: CodeType = "int") -> Tensor:
    """clamp(round(x / s) + z, -128, 127) in float32, ties to even: int8 in the shape of x (any float dtype).

    Float codes, float8_e4m3fn, are x / s to nearest within +-448 and come as their values, in float32; zero_point means
    nothing to them.
    """
    flat = x.flatten()
    if type == "float":
        values = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
        for part in _parts(flat):
            fp8_values_(torch.div(flat[part], scale, out=values[part]))
        return values.view(x.shape)
    zero, codes = zero_point.float(), torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    for part in _parts(flat):
        codes[part] = (flat[part].float() / scale).round_().add_(zero).clamp_(QMIN, QMAX)
    return codes.view(x.shape)


def quantize_per_token(x: Tensor, bits: int = 8, type: CodeType = "int") -> tuple[Tensor, Tensor]:
    """Symmetric codes (int8, shape of x) with one scale a token: s = max|x| / (2^(bits-1) - 1) over the last dimension,
    float32 [..., 1]; q = clamp(round(x / s), -2^(bits-1), 2^(bits-1) - 1). A token of zeros gets s = 1.

    The divisor, 127 or 7, is that of vLLM's kernels (scaled_int8_quant; dynamic_per_token_int8_quant_ref for any bits),
    which put both ends of the token on the grid. compressed-tensors, and so transformers, divides by 127.5 or 7.5.

    Float codes, float8_e4m3fn: q = x / s to nearest with s = max(max|x| / 448, 1 / (448 * 512)), vLLM's too (QuantFP8);
    compressed-tensors has no such bound. They come as their values, in float32.
    """
    tokens, largest = x.reshape(-1, x.shape[-1]), (1 << (bits - 1)) - 1
    codes = torch.empty(tokens.shape, dtype=torch.int8 if type == "int" else torch.float32, device=x.device)
    ends = _largest_magnitude(tokens).float()
    scales = (ends / FP8_MAX).clamp(min=SMALLEST_FP8_SCALE) if type == "float" else _usable(ends / largest)
    room: Tensor | None = None
    for part in _parts(tokens):
        if type == "float":
            fp8_values_(torch.div(tokens[part], scales[part], out=codes[part]))
            continue
        if room is None:
            room = torch.empty(tokens[part].shape, dtype=torch.float32, device=x.device)
        values = room[: len(scales[part])].copy_(tokens[part])
        codes[part] = values.div_(scales[part]).round_()  # within the codes, since no value exceeds the ends
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def quantize_per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes (int8, shape of x) with a scale and a zero point a token: s = (max x - min x) / 255 over the last
    dimension, float32 [..., 1]; z = round(-128 - min x / s), int64 [..., 1]; q = clamp(round(x / s + z), -128, 127).
    A code stands for (q - z) s.

    This is the rule of vLLM's kernel on CPUs (onednn_scaled_int8_quant); that on GPUs rounds before it adds z. The
    range is that of the values alone, so z is no int8 for a token whose values are all far from zero;
    compressed-tensors, and so transformers, widens it to hold zero. A token of equal values becomes zeros, with s = 1,
    as it does in those kernels, where s is 0.
    """
    tokens, of_tokens = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], 1)
    codes = torch.empty(tokens.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(of_tokens, dtype=torch.float32, device=x.device).view(-1, 1)
    zeros = torch.empty_like(scales, dtype=torch.int64)
    for part in _parts(tokens):
        values = tokens[part].to(torch.float32, copy=True)
        low = values.amin(-1, keepdim=True)
        scale = (values.amax(-1, keepdim=True) - low) / (QMAX - QMIN)
        scales[part] = _usable(scale)
        step = scales[part].masked_fill(scale == 0, math.inf)  # every code is then z, the code of 0
        zero = (QMIN - low / step).round_()
        zeros[part] = zero.to(torch.int64)
        codes[part] = values.div_(step).add_(zero).round_().clamp_(QMIN, QMAX)
    return codes.view(x.shape), scales.view(of_tokens), zeros.view(of_tokens)


def _largest_magnitude(x: Tensor) -> Tensor:
    """max|x| over the last dimension, [..., 1] in the dtype of x.

    The 15 bits below the sign of a 16-bit float are ordered as its magnitude is, NaN last: comparing them as integers
    takes half the time of both extremes.
    """
    if x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1]:
        return (x.view(torch.int16) & 0x7FFF).amax(-1, keepdim=True).view(x.dtype)
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))


def int8_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: int | Tensor | None,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y = (Xq Wq^T - z_x rowsum(Wq)) * s_x * s_w + bias: [tokens, out] in `dtype`.

    x_codes int8 [tokens, in]; x_scale float32 [1] or [tokens, 1]; x_zero_point of all tokens, or int64 [tokens, 1];
    weight_codes int8 [out, in]; weight_scale [out, 1] or [1, 1]; bias [out] or None. The integers in the brackets are
    exact; they are scaled in float32 and rounded once. Codes of fewer bits are held in int8, too.

    With weight_scale [out, groups], one for each group of inputs g: y = s_x * sum_g s_wg (Xq_g - z_x) Wq_g^T + bias, in
    float32, in which each product of a 4-bit code, an 8-bit code and a 16-bit scale is exact.
    """
    if weight_scale.shape[1] > 1:
        return _grouped_linear(x_codes, x_scale, x_zero_point, weight_codes, weight_scale, bias, dtype)
    columns, by_token, offset = weight_scale.float().view(1, -1), None, None
    if isinstance(x_zero_point, Tensor):
        by_token, offset = x_zero_point.double(), _row_sums(weight_codes).double()  # which holds their product exactly
    elif x_zero_point:
        offset = x_zero_point * _row_sums(weight_codes)

    def product(part: slice) -> Tensor:
        integers = _integer_product(x_codes[part], weight_codes)
        if by_token is not None and offset is not None:
            integers = integers.double().addcmul_(by_token[part], offset, value=-1)
        elif offset is not None:
            integers -= offset.to(integers.dtype)
        return integers.to(torch.float32).mul_(columns)

    rows = x_codes.shape[0] if x_codes.is_cuda else max(32, _CPU_ELEMENTS // weight_codes.shape[0])
    return _in_parts(product, rows, x_codes, x_scale, weight_codes.shape[0], bias, dtype)


Int8Linear = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""(x_codes, x_scale, bias, dtype) to `int8_linear` of them and of a weight."""


def _row_sums(codes: Tensor) -> Tensor:
    """Int64 [rows]. Summed in int64 they take forty times as long, and int32 holds them."""
    return codes.sum(1, dtype=torch.int32).long()


def prepared_int8_linear(x_zero_point: int | None, weight_codes: Tensor, weight_scale: Tensor) -> Int8Linear:
    """`int8_linear` for one weight and many inputs: the same numbers.

    Where oneDNN has a kernel that is exact it is given the weight once, in the order that it reads, and puts out
    (Xq Wq^T - z_x rowsum(Wq)) * s_w: a third of the time of a product that sorts its weight at each call and is scaled
    behind it.
    """
    fits = 1 < weight_codes.shape[1] <= _INT32_MAX_IN_FEATURES and weight_scale.shape[1] == 1
    if weight_codes.device.type != "cpu" or not fits or not _onednn_is_exact():
        return lambda codes, scale, bias, dtype: int8_linear(
            codes, scale, x_zero_point, weight_codes, weight_scale, bias, dtype
        )
    packed = torch.ops.onednn.qlinear_prepack(weight_codes, None)
    columns = weight_scale.float().flatten().expand(weight_codes.shape[0]).contiguous()
    zeros = torch.zeros_like(columns, dtype=torch.int64)

    def linear(codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        def product(part: slice) -> Tensor:
            return _onednn_product(codes[part], x_zero_point or 0, packed, columns, zeros)

        return _in_parts(product, _PREPARED_ROWS, codes, scale, len(columns), bias, dtype)

    return linear


def _in_parts(
    product: Callable[[slice], Tensor],
    rows: int,
    x_codes: Tensor,
    x_scale: Tensor,
    out_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """product(tokens) * s_x + bias: [tokens, out] in `dtype`, from float32 products of `rows` tokens at a time."""

    def scaled(part: slice) -> Tensor:
        y = product(part).mul_(x_scale if x_scale.numel() == 1 else x_scale[part])
        return y if bias is None else y.add_(bias.float())

    if x_codes.shape[0] <= rows:
        return scaled(slice(None)).to(dtype)
    output = torch.empty(x_codes.shape[0], out_features, dtype=dtype, device=x_codes.device)
    for begin in range(0, x_codes.shape[0], max(1, rows)):
        part = slice(begin, begin + rows)
        output[part] = scaled(part)
    return output


Float8Linear = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""(x_values, x_scale, bias, dtype) to y = x s_x W^T + bias, [tokens, out] in `dtype`. x_values are those of codes,
float32 [tokens, in]; x_scale float32 [1] or [tokens, 1]; bias [out] or None."""


def prepared_float8_linear(weight_codes: Tensor, weight_scale: Tensor) -> Float8Linear:
    """y = Xq Wq^T * s_w * s_x + bias for one weight and many inputs.

    weight_codes float8_e4m3fn [out, in]; weight_scale [out, 1] or [1, 1]. Products of codes are exact in float32, in
    which they are added up and scaled; the result is rounded once, as engines do.
    """
    weight = decoded_fp8(weight_codes).bfloat16()  # which holds codes, too, in half of the memory
    columns = weight_scale.float().view(1, -1)

    def linear(values: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        whole = weight.float()

        def product(part: slice) -> Tensor:
            return _float8_product(values[part], whole).mul_(columns)

        return _in_parts(product, _PREPARED_ROWS, values, scale, len(weight), bias, dtype)

    return linear


def _float8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32, of values that bfloat16 holds.

    PyTorch gives it to oneDNN where factors may be rounded to bfloat16, which changes none of these. On an AMD EPYC
    that takes 3.7 ms where the BLAS of PyTorch takes 9.2, and AMX has a unit for it. Older versions of it have no
    such setting.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None:
        return x @ weight.t()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return x @ weight.t()
    finally:
        settings.fp32_precision = before


def _grouped_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: int | Tensor | None,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One product with Wq * s_w: one a group would pass over [tokens, out] as often as there are groups."""
    weight = dequantize(QuantizedWeight(weight_codes, weight_scale, None))
    centred = x_codes.float() if x_zero_point is None else x_codes.float() - x_zero_point
    y = (centred @ weight.t()).mul_(x_scale)
    return (y if bias is None else y.add_(bias.float())).to(dtype)


def _integer_product(x_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """Xq Wq^T without any rounding: int32, or int64 for inputs too wide for int32."""
    in_features = x_codes.shape[1]
    if in_features <= _INT32_MAX_IN_FEATURES and _int_mm_takes(x_codes, weight_codes):
        return torch._int_mm(x_codes, weight_codes.t())
    # Sums of products of 8-bit integers stay far below 2^53, so float64 holds each of them exactly.
    product = x_codes.double() @ weight_codes.double().t()
    return product.to(torch.int32 if in_features <= _INT32_MAX_IN_FEATURES else torch.int64)


def _parts(x: Tensor) -> Iterator[slice]:
    """Parts along the first dimension that are worked on one after the other; on a GPU all of it is one."""
    parts = 1 if x.device.type != "cpu" else max(1, math.ceil(x.numel() / _CPU_ELEMENTS))
    rows = max(1, math.ceil(x.shape[0] / parts))  # of equal size, since a call on a few rows costs nearly as much
    for begin in range(0, x.shape[0], rows):
        yield slice(begin, begin + rows)


def _int_mm_takes(x_codes: Tensor, weight_codes: Tensor) -> bool:
    tokens, in_features = x_codes.shape
    # With one input channel the CPU kernel of torch 2.13 misreads the strides and returns wrong numbers.
    if tokens == 0 or in_features < 2:
        return False
    if x_codes.device.type == "cuda":
        widths_fit = in_features % _CUDA_MULTIPLE == 0 and weight_codes.shape[0] % _CUDA_MULTIPLE == 0
        return tokens >= _CUDA_MIN_ROWS and widths_fit and _int_mm_is_exact("cuda")
    return x_codes.device.type == "cpu" and _int_mm_is_exact("cpu")


@cache
def _int_mm_is_exact(device: str) -> bool:
    """Whether the integer product is available here and keeps all bits.

    CPUs without VNNI add pairs of products in 16 bits, which saturates for large codes; those largest codes are tried.
    """
    for value in (QMIN, QMAX):
        codes = torch.full((32, 256), value, dtype=torch.int8, device=device)
        try:
            product = torch._int_mm(codes, codes.t())
        except (RuntimeError, NotImplementedError):
            return False
        if not bool((product == 256 * value * value).all()):
            return False
    return True


def _onednn_product(x_codes: Tensor, x_zero_point: int, packed: Tensor, columns: Tensor, zeros: Tensor) -> Tensor:
    """(Xq Wq^T - z_x rowsum(Wq)) * s_w in float32, of a weight that qlinear_prepack returned; its zero points are 0."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x_codes, 1.0, x_zero_point, packed, columns, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN has a kernel for products of signed integers here, and it keeps all bits, tried as
    `_int_mm_is_exact` does.

    Without AMX it has none: its reference code would take a thousand times as long as `torch._int_mm`.
    """
    if not torch.cpu._is_amx_tile_supported():
        return False
    for value in (QMIN, QMAX):
        codes = torch.full((32, 256), value, dtype=torch.int8)
        try:
            packed = torch.ops.onednn.qlinear_prepack(codes, None)
            product = _onednn_product(codes, -1 - value, packed, torch.ones(32), torch.zeros(32, dtype=torch.int64))
        except (AttributeError, RuntimeError, NotImplementedError):
            return False
        if not bool((product == 256 * (2 * value + 1) * value).all()):
            return False
    return True


def _usable(scale: Tensor) -> Tensor:
    """Zero ranges get scale 1; scales too small for a normal float32 get the smallest one."""
    return torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=torch.finfo(torch.float32).tiny))
