"""Linears that compute as a serving engine does with int8 weights and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from quantcli.quant.activation import int8_linear, quantize_per_token, quantize_static


@dataclass(frozen=True)
class Int8Weights:
    """An int8 linear. codes int8 [out, in], scale float32 [out, 1] or [1, 1]; input_scale float32 [1] and input_zero_point
    int8 [1] for static activations, None for dynamic ones (one scale a token)."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None


@contextmanager
def simulated(block: nn.Module, linears: Mapping[str, Int8Weights]) -> Iterator[None]:
    """The named linears of `block` compute y = (Xq·Wqᵀ − z·Σ Wq)·sx·sw + b on exact integer sums while the body runs."""
    modules = {block.get_submodule(name): weights for name, weights in linears.items()}
    try:
        for module, weights in modules.items():
            module.forward = _forward(module, weights)  # type: ignore[method-assign]
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _forward(module: nn.Module, weights: Int8Weights) -> object:
    bias: Tensor | None = getattr(module, "bias", None)
    zero = None if weights.input_zero_point is None else int(weights.input_zero_point.item())

    def forward(x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if weights.input_scale is None:
            codes, scale = quantize_per_token(tokens)
        else:
            scale = weights.input_scale
            codes = quantize_static(tokens, scale, weights.input_zero_point)
        output = int8_linear(codes, scale, zero, weights.codes, weights.scale, bias, x.dtype)
        return output.view(*x.shape[:-1], -1)

    return forward
