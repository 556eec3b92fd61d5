"""8-bit keys and values in the cache, and 8-bit queries, keys and values in the products of attention."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from quantcli.quant.float8 import FP8_MAX, cut_fp8, decoded_fp8, fp8_values_
from quantcli.quant.grid import stored_scale

QMIN, QMAX = -128, 127
RECALL = (0.9999, 0.9999, 1.0)
"""Ratios of the recall windows of queries, keys and values."""

KINDS: dict[str, tuple[set[str], set[str]]] = {
    "int8": ({"k_scale", "v_scale"}, {"k_offset", "v_offset"}),
    "fp8": ({"k_scale", "v_scale"}, set()),
    "heads": ({"fa_q_scale", "fa_k_scale", "fa_v_scale"}, set()),
}
"""Of each kind of scales: the tensors it needs, and those it has when asymmetric."""


@dataclass(frozen=True)
class AttentionScales:
    """How one attention module's queries, keys and values are quantized, all tensors float32.

    int8: the cache holds clamp(round(x / s + z), -128, 127); k_scale, v_scale and, if asymmetric, k_offset and v_offset
    are [kv_heads * head_size], channels of a head side by side. fp8: the cache holds e4m3 of x / s; k_scale and v_scale
    are [1]. heads: queries, keys and values enter the products as symmetric int8; fa_q_scale is [heads, 1], fa_k_scale
    and fa_v_scale are [kv_heads, 1]. Raises ValueError for tensors that are missing or do not belong to the kind.
    """

    kind: Literal["int8", "fp8", "heads"]
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_offset: Tensor | None = None
    v_offset: Tensor | None = None
    fa_q_scale: Tensor | None = None
    fa_k_scale: Tensor | None = None
    fa_v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        needed, asymmetric = KINDS[self.kind]
        if set(self.tensors()) not in (needed, needed | asymmetric):
            raise ValueError(f"{self.kind} scales cannot consist of {', '.join(sorted(self.tensors())) or 'nothing'}")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that the kind does not have."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "kind")
        return {name: value for name, value in values if value is not None}


def int8_channel_scales(
    minimum: Tensor, maximum: Tensor, symmetric: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of channels whose values were seen in [minimum, maximum], all [channels], float32.

    Symmetric: s = max(|min|, |max|) / 127 and no offset. Asymmetric, with 0 in the range: s = (max - min) / 255,
    z = round(-min / s) - 128. s is rounded to `dtype`, in which the checkpoint holds it, before z is computed; a range
    of zero gives s = 1. The rule of msModelSlim's C8.
    """
    low, high = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if symmetric:
        return stored_scale(torch.maximum(-low, high) / QMAX, dtype), None
    scale = stored_scale((high - low) / 255, dtype)
    return scale, ((-low / scale).round() + QMIN).clamp(QMIN, QMAX)


def fp8_scale(minimum: Tensor, maximum: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """s = max(|min|, |max|) / 448 over all channels, rounded to `dtype`: float32 [1]. Zero gives 1."""
    return stored_scale((torch.maximum(minimum.abs(), maximum.abs()).float().amax() / FP8_MAX).view(1), dtype)


def recall_window(x: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Ends (low, high) of the narrowest interval that covers m = floor(ratio * n) of the n values in each row.

    x [rows, n], finite; results float32 [rows]. With v_1 <= ... <= v_n: the least v_(i+m-1) - v_i over i, the first of
    equals. The rule of msModelSlim's FA quantizer (FA3), which takes it over one sample. Raises ValueError unless
    0 < ratio <= 1.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"a recall window covers a ratio in (0, 1] of the values, got {ratio}")
    values = x.shape[1]
    candidates = values - max(1, int(ratio * values)) + 1
    if candidates == 1:
        return x.amin(1).float(), x.amax(1).float()
    # only the ends of the sorted values can be ends of the window
    lows = x.topk(candidates, 1, largest=False, sorted=True).values.float()
    highs = x.topk(candidates, 1, largest=True, sorted=True).values.flip(1).float()
    first = (highs - lows).argmin(1, keepdim=True)
    return lows.gather(1, first).squeeze(1), highs.gather(1, first).squeeze(1)


def int8_head_scales(low: Tensor, high: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """s = max(|low|, |high|) / 127 of each head's window: [heads] to float32 [heads, 1], rounded to `dtype`."""
    return stored_scale(torch.maximum(low.abs(), high.abs()).float() / QMAX, dtype).view(-1, 1)


def quantize_int8(x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """clamp(round(x / s + z), -128, 127) in float32, ties to even: int8 in the shape of x [batch, heads, tokens, size].

    scale and offset [heads * size], or [heads, 1].
    """
    codes = x.float() / _spread(scale, x)
    if offset is not None:
        codes += _spread(offset, x)
    return codes.round_().clamp_(QMIN, QMAX).to(torch.int8)


def dequantize_int8(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(q - z) * s: float32 in the shape of the codes [batch, heads, tokens, size]; scale and offset as they were."""
    values = codes.float()
    if offset is not None:
        values -= _spread(offset, codes)
    return values.mul_(_spread(scale, codes))


def round_trip(
    query: Tensor, key: Tensor, value: Tensor, scales: AttentionScales, *, cut: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as the products see them: quantized by `scales` and dequantized, in their own dtypes.

    query [batch, heads, tokens, size], key and value [batch, kv_heads, tokens, size]. The cache kinds leave the query
    as it is. `cut` rounds fp8 towards zero. Raises ValueError for scales of other heads or sizes.
    """
    s = scales.tensors()
    if scales.kind == "fp8":
        return query, _through_fp8(key, s["k_scale"], cut), _through_fp8(value, s["v_scale"], cut)
    if scales.kind == "int8":
        key = _through_int8(key, s["k_scale"], s.get("k_offset"))
        return query, key, _through_int8(value, s["v_scale"], s.get("v_offset"))
    return (
        _through_int8(query, s["fa_q_scale"]),
        _through_int8(key, s["fa_k_scale"]),
        _through_int8(value, s["fa_v_scale"]),
    )


def _through_int8(x: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    return dequantize_int8(quantize_int8(x, scale, offset), scale, offset).to(x.dtype)


def _through_fp8(x: Tensor, scale: Tensor, cut: bool) -> Tensor:
    scale = scale.to(x.device)
    values = decoded_fp8(cut_fp8(x, scale)) if cut else fp8_values_(x.float() / scale)
    return values.mul_(scale).to(x.dtype)


def _spread(parameters: Tensor, x: Tensor) -> Tensor:
    """Values of channels [heads * size] or of heads [heads, 1], laid over x [batch, heads, tokens, size]."""
    heads, size = x.shape[1], x.shape[3]
    if parameters.shape not in ((heads * size,), (heads, 1)):
        raise ValueError(f"scales of shape {list(parameters.shape)} do not fit {heads} heads of size {size}")
    return parameters.to(x.device).float().view(1, heads, 1, -1)
