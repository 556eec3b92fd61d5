"""Linears that compute as a serving engine does with quantized weights and activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantcli.model.expert_loop import Weight, one_by_one
from quantcli.model.structure import Experts
from quantcli.quant.activation import (
    Float8Linear,
    Int8Linear,
    int8_linear,
    prepared_float8_linear,
    prepared_int8_linear,
    quantize_per_token,
    quantize_per_token_asymmetric,
    quantize_static,
)
from quantcli.quant.float8 import FP8
from quantcli.quant.scheme import CodeType


@dataclass(frozen=True)
class QuantizedProduct:
    """A linear of products of codes: int8 [out, in] with a scale float32 [out, groups], [out, 1] or [1, 1], or
    float8_e4m3fn with the latter two, and inputs of the same type.

    Static activations have input_scale float32 [1] and, if asymmetric, input_zero_point int8 [1]; dynamic ones, with
    one scale a token and codes of `input_bits`, have neither. `input_symmetric` is about those: false gives each token
    a zero point, too, and needs 8 bits.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    input_bits: int = 8
    input_symmetric: bool = True


Forward = Callable[[nn.Module, Tensor], Tensor]
"""(linear, input [..., in]) to its output [..., out]."""
Replacement = QuantizedProduct | Tensor | Forward
"""What takes the place of a linear, as `simulated` has it."""


@contextmanager
def simulated(block: nn.Module, linears: Mapping[str, Replacement], experts: Iterable[Experts] = ()) -> Iterator[None]:
    """While the body runs, the named linears of `block` compute otherwise.

    QuantizedProduct: y = (Xq·Wqᵀ − z·Σ Wq)·sx·sw + b, as `int8_linear` and `prepared_float8_linear` of
    `quant.activation` have it. A tensor [out, in], in the input's dtype: y = x·Wᵀ + b with it, as for weights that an
    engine unpacks. A function: whatever it returns.

    Linears of `experts`, by names below the block, have no modules: where one is named, its layer runs expert by
    expert, and the others keep their float weights.
    """
    layers = [layer for layer in experts if any(name in linears for name in layer.names)]
    joined = {name for layer in layers for name in layer.names}
    modules = {block.get_submodule(name): weights for name, weights in linears.items() if name not in joined}
    shared = _Codes()
    parts = {name: forward_of(nn.Module(), how, shared) for name, how in linears.items() if name in joined}

    def expert_linear(name: str, x: Tensor, weight: Weight) -> Tensor:
        return parts[name](x) if name in parts else linear(x, weight())

    try:
        with ExitStack() as loops:
            for layer in layers:
                loops.enter_context(one_by_one(block.get_submodule(layer.name), layer, expert_linear))
            for module, how in modules.items():
                module.__dict__["forward"] = forward_of(module, how, shared)
            yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def not_read(linears: Collection[str], experts: Iterable[Experts]) -> set[str]:
    """The parameters that no forward reads while `simulated` replaces these linears."""
    joined = {name for layer in experts for name in layer.names}
    whole = {name for layer in experts if all(n in linears for n in layer.names) for name in layer.parameters}
    return {f"{name}.weight" for name in linears if name not in joined} | whole


@dataclass
class _Codes:
    """The codes (of float8 their values, float32), scales and zero points of each token, if there are any, of the input
    that was quantized last. Linears that share an input are given one tensor, one after the other, which no block
    changes in between."""

    input: Tensor | None = None
    how: Hashable = None
    found: tuple[Tensor, Tensor, Tensor | None] | None = None


def forward_of(module: nn.Module, how: Replacement, shared: _Codes | None = None) -> Callable[[Tensor], Tensor]:
    """The forward that `simulated` gives a linear; those of one `shared` quantize an input that they share once."""
    if isinstance(how, QuantizedProduct):
        return _forward(module, how, shared or _Codes())
    if isinstance(how, Tensor):
        # nn.Linear's own name for its input, since callers may use it as a keyword
        return lambda input: linear(input, how, getattr(module, "bias", None))
    return lambda input: how(module, input)


def _forward(module: nn.Module, weights: QuantizedProduct, shared: _Codes) -> Callable[[Tensor], Tensor]:
    zero_point = weights.input_zero_point
    if weights.input_scale is not None and zero_point is None:
        zero_point = torch.zeros_like(weights.input_scale, dtype=torch.int8)
    zero = None if zero_point is None else int(zero_point.item())
    type: CodeType = "float" if weights.codes.dtype == FP8 else "int"

    by_token = weights.input_scale is None and not weights.input_symmetric
    product: Int8Linear | Float8Linear | None = None
    if type == "float":
        product = prepared_float8_linear(weights.codes, weights.scale)
    elif not by_token:
        product = prepared_int8_linear(zero, weights.codes, weights.scale)
    static = None if weights.input_scale is None else weights.input_scale.item()
    how = type, weights.input_bits, static, zero, by_token

    def quantized(input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if shared.found is None or shared.input is not input or shared.how != how:
            tokens = input.reshape(-1, input.shape[-1])
            found: tuple[Tensor, Tensor, Tensor | None]
            if weights.input_scale is not None and zero_point is not None:
                found = quantize_static(tokens, weights.input_scale, zero_point, type), weights.input_scale, None
            elif by_token:
                found = quantize_per_token_asymmetric(tokens)
            else:
                found = *quantize_per_token(tokens, weights.input_bits, type), None
            shared.input, shared.how, shared.found = input, how, found
        return shared.found

    def forward(input: Tensor) -> Tensor:  # nn.Linear's own name for it, since callers may use it as a keyword
        codes, scale, zeros = quantized(input)
        bias: Tensor | None = getattr(module, "bias", None)
        if product is not None:
            output = product(codes, scale, bias, input.dtype)
        else:
            output = int8_linear(codes, scale, zeros, weights.codes, weights.scale, bias, input.dtype)
        return output.view(*input.shape[:-1], weights.codes.shape[0])

    return forward
