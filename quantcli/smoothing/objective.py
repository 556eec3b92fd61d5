"""What quantization under the target scheme does to the outputs of a group of linears, measured and expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantcli.quant.activation import quantize_per_token, quantize_static, static_parameters
from quantcli.smoothing.group import ErrorOf, Group

Reduction = Literal["mean", "joint", "token"]


@dataclass(frozen=True)
class Target:
    """How the linears of a group are to be quantized.

    weight: float32 [out, C] → the weight quantized and back. bits: of its codes; group_size: inputs that share a scale,
    None for all. activations: `none`, `static` (one scale for the tensor) or `dynamic` (one a token), of
    `activation_bits`.
    """

    weight: Callable[[Tensor], Tensor]
    bits: int
    group_size: int | None = None
    activations: Literal["none", "static", "dynamic"] = "none"
    activation_bits: int = 8
    symmetric: bool = True


def quantized_input(group: Group, scale: Tensor, target: Target) -> Tensor:
    """The kept tokens x/s quantized and back, float32 [T, C]. A static range is that of all inputs seen."""
    x = group.tokens / scale
    if target.activations == "dynamic":
        codes, token_scale = quantize_per_token(x, target.activation_bits)
        return codes.float().mul_(token_scale)
    if target.activations == "static":
        low, high = float((group.minimum / scale).min()), float((group.maximum / scale).max())
        step, zero = static_parameters(low, high, target.symmetric)
        step, zero = step.to(x.device), zero.to(x.device)
        return quantize_static(x, step, zero).float().sub_(zero.float()).mul_(step)
    return x


def output_error(group: Group, target: Target, reduction: Reduction) -> ErrorOf:
    """scale [C] → squared error of Q(x/s) Q(W diag(s))ᵀ against x Wᵀ over the kept tokens.

    reduction: `mean` adds up the mean squares of the linears (msModelSlim's AWQ), `joint` is all squares over those of
    all outputs (its flex smoothing); `token` is relative for each linear and counts a token whose output is larger than
    the median's as much as the median's, because the norm behind it divides by its size: without that, the first token
    of a text, whose outputs are a thousand times larger in some models, would decide alone.
    """
    outputs = [group.tokens @ weight.t() for weight in group.weights]
    share = token_shares(outputs) if reduction == "token" else None
    whole = sum(float(y.square().sum()) for y in outputs) if reduction == "joint" else 0.0

    def error(scale: Tensor) -> float:
        x = quantized_input(group, scale, target)
        total = 0.0
        for weight, y in zip(group.weights, outputs, strict=True):
            squares = (x @ target.weight(weight * scale).t()).sub_(y).square_()
            if share is not None:
                total += float(share @ squares.sum(1)) / max(float(share @ y.square().sum(1)), _TINY)
            else:
                total += float(squares.mean()) if reduction == "mean" else float(squares.sum()) / max(whole, _TINY)
        return total

    return error


def token_shares(outputs: list[Tensor]) -> Tensor:
    """min(1, median of ‖y‖² / ‖y_t‖²) for each token t, with ‖y_t‖² over all outputs [T, out]: float32 [T]."""
    energy = torch.stack([y.square().sum(1) for y in outputs]).sum(0)
    median = energy.median()
    return torch.where(energy > median, median / energy, 1.0) if median > 0 else torch.ones_like(energy)


class ExpectedNoise:
    """The output error that rounding is expected to make, as a function of the logarithms of scales with a gradient.

    Rounding makes errors that are about independent: of variance d²/12 with a step d, but never more than the value
    itself, which small values lose by becoming zero. For a linear that gives
        E = Σ_t a_t Σ_c min(x_tc², d_t² s_c²/12) ‖W_c‖² + Σ_rc min(w_rc², d_rg² / (12 s_c²)) m_c
    with token shares a_t, d_t = range of x_t/s over the codes (of all inputs seen, if static), d_rg = max_{c in g}
    |w_rc| s_c over the codes for the group g of c, and m_c = Σ_t a_t x_tc². Each linear counts relative to its output.
    Without a product with the tokens it is far cheaper than `output_error`, though less exact.
    """

    def __init__(self, group: Group, target: Target, tokens: int = 128) -> None:
        step = max(1, len(group.tokens) // tokens)
        kept = group.tokens[::step]
        self.group, self.target = group, target
        outputs = [kept @ weight.t() for weight in group.weights]
        share = token_shares(outputs)
        self.share = share / share.sum()
        self.inputs = kept.abs()
        self.squares = kept.square()
        self.moment = self.share @ self.squares
        relative = [1 / max(float(self.share @ y.square().sum(1)), _TINY) for y in outputs]
        pairs = list(zip(relative, group.weights, strict=True))
        self.columns = torch.stack([factor * weight.square().sum(0) for factor, weight in pairs]).sum(0)
        self.weights = torch.cat([weight.abs() * factor**0.5 for factor, weight in pairs])
        self.weight_squares = self.weights.square()

    def __call__(self, log_scale: Tensor) -> Tensor:
        scale, target = log_scale.exp(), self.target
        half, high = 2 ** (target.bits - 1) - 1, 2 ** (target.activation_bits - 1) - 1
        size = target.group_size or len(scale)
        scaled = (self.weights * scale).unflatten(1, (-1, size))
        steps = scaled.amax(2, keepdim=True).div(half).square().div(12)
        lost = torch.minimum(self.weight_squares, (steps / scale.square().view(1, -1, size)).flatten(1))
        noise = (lost.sum(0) * self.moment).sum()
        if target.activations == "none":
            return noise
        if target.activations == "dynamic":
            step = ((self.inputs / scale).amax(1, keepdim=True) / high).square()
        else:
            top, bottom = (self.group.maximum / scale).amax(), (self.group.minimum / scale).amin()
            width = torch.maximum(top, -bottom) * 2 if target.symmetric else top.clamp(min=0) - bottom.clamp(max=0)
            step = (width / (2 * high + 1)).square().view(1, 1)
        rounding = torch.minimum(self.squares, step * (scale.square() / 12))
        return noise + self.share @ (rounding @ self.columns)


_TINY = 1e-30
