"""What quantization under the target scheme does to the outputs of a group of linears, measured and expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantcli.quant.activation import (
    quantize_per_token,
    quantize_per_token_asymmetric,
    quantize_static,
    static_parameters,
)
from quantcli.quant.scheme import CodeType
from quantcli.smoothing.clip import COARSE_RATIOS, RATIOS, SWEEPS, clamped, clip_bounds, tensor_bound
from quantcli.smoothing.group import ErrorOf, Group

Reduction = Literal["mean", "joint", "token"]

MASSIVE = 100
"""Energy of a massive token's outputs, over the median's."""
MASSIVE_SHARE = 5
"""Weight of all such tokens together, over that of the others; tried: 1, 3, 5 and 10."""


@dataclass(frozen=True)
class Target:
    """How a linear is to be quantized. Linears of one scheme are to have one and the same target.

    weight: float32 [out, C] → the weight quantized and back. bits: of its codes; group_size: inputs that share a scale,
    None for all; one_scale: all rows share it. clipped: the weight is held within `bounds` first. activations: `none`,
    `static` (one scale for the tensor) or `dynamic` (one a token), of `activation_bits`; with a zero point each unless
    `symmetric`. averaged: the static range is the mean of those of samples. type: of the codes of both.
    """

    weight: Callable[[Tensor], Tensor]
    bits: int
    group_size: int | None = None
    one_scale: bool = False
    clipped: bool = False
    activations: Literal["none", "static", "dynamic"] = "none"
    averaged: bool = False
    activation_bits: int = 8
    symmetric: bool = True
    type: CodeType = "int"

    def bounds(self, weight: Tensor, tokens: Tensor, ratios: Sequence[float] = RATIOS, sweeps: int = SWEEPS) -> Tensor:
        """What the weight is to be held within: float32 [out, groups], or [1, 1] with one scale."""
        if self.one_scale:
            return tensor_bound(weight, tokens, self.weight, ratios)
        return clip_bounds(weight, tokens, self.weight, self.group_size, ratios, sweeps)


Targets = Sequence[Target | None]
"""How each linear of a group is to be quantized; None stays in float, and makes no error."""


def static_range(group: Group, scale: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The range of x/s over all inputs seen, or the mean of those of samples; other methods have about the first."""
    if target.averaged:
        assert group.sample_extremes is not None
        low, high = group.sample_extremes / scale
        return low.amin(1).mean(), high.amax(1).mean()
    return (group.minimum / scale).amin(), (group.maximum / scale).amax()


def quantized_input(group: Group, scale: Tensor, target: Target) -> Tensor:
    """The kept tokens x/s quantized and back, float32 [T, C], by its `static_range` where the target has one."""
    x = group.tokens / scale
    if target.activations == "dynamic" and not target.symmetric:
        codes, token_scale, zero = quantize_per_token_asymmetric(x)
        return codes.float().sub_(zero).mul_(token_scale)
    if target.activations == "dynamic":
        codes, token_scale = quantize_per_token(x, target.activation_bits, target.type)
        return codes.float().mul_(token_scale)
    if target.activations == "static":
        low, high = static_range(group, scale, target)
        step, zero = static_parameters(float(low), float(high), target.symmetric, target.type)
        step, zero = step.to(x.device), zero.to(x.device)
        return quantize_static(x, step, zero, target.type).float().sub_(zero.float()).mul_(step)
    return x


def output_error(group: Group, targets: Targets, reduction: Reduction) -> ErrorOf:
    """scale [C] → squared error of Q(x/s) Q(W diag(s))ᵀ against x Wᵀ over the kept tokens, with each linear's target.

    reduction: `mean` adds up the mean squares of the linears (msModelSlim's AWQ), `joint` is all squares over those of
    all outputs (its flex smoothing); `token` is relative for each linear and counts tokens by `token_shares`: one whose
    output is larger than the median's as much as the median's, because the norm behind it divides by its size. The
    first token of a text, whose outputs are a thousand times larger in some models, would decide alone otherwise.
    Sizes of outputs are those before a shift. A linear that is clipped has bounds for each scale, of COARSE_RATIOS:
    the scale that is best without clipping is not the best with it.
    """
    outputs = [group.tokens @ weight.t() for weight in group.weights]
    whole = _unshifted(group, outputs)
    share = token_shares(whole) if reduction == "token" else None
    joint = sum(float(y.square().sum()) for y in whole) if reduction == "joint" else 0.0

    def error(scale: Tensor) -> float:
        total = 0.0
        for target in _different(targets):
            x = quantized_input(group, scale, target)
            for own, weight, y, size in zip(targets, group.weights, outputs, whole, strict=True):
                if own is not target:
                    continue
                scaled = weight * scale
                if target.clipped:
                    scaled = clamped(scaled, target.bounds(scaled, x, COARSE_RATIOS, sweeps=0))
                squares = (x @ target.weight(scaled).t()).sub_(y).square_()
                if share is not None:
                    total += float(share @ squares.sum(1)) / max(float(share @ size.square().sum(1)), _TINY)
                else:
                    total += float(squares.mean()) if reduction == "mean" else float(squares.sum()) / max(joint, _TINY)
        return total

    return error


def _different(targets: Targets) -> list[Target]:
    return list(dict.fromkeys(target for target in targets if target is not None))


def _unshifted(group: Group, outputs: list[Tensor]) -> list[Tensor]:
    """x Wᵀ of the inputs before what was subtracted from them: each linear's bias gives it back."""
    if group.shift is None:
        return outputs
    return [y + weight @ group.shift for y, weight in zip(outputs, group.weights, strict=True)]


def token_shares(outputs: list[Tensor]) -> Tensor:
    """min(1, median of ‖y‖² / ‖y_t‖²) for each token t, with ‖y_t‖² over all outputs [T, out]: float32 [T].

    Times MASSIVE_SHARE · T/n for n tokens of more than MASSIVE medians, so that together they count that many times
    as much as all others: other tokens attend to them (Sun et al. 2024, massive activations, arXiv 2402.17762), and
    what moves them moves all.
    """
    energy = torch.stack([y.square().sum(1) for y in outputs]).sum(0)
    median = energy.median()
    if not median > 0:
        return torch.ones_like(energy)
    massive = energy > MASSIVE * median
    share = torch.where(energy > median, median / energy, 1.0)
    return torch.where(massive, share * (MASSIVE_SHARE * len(share) / massive.sum()), share)


class ExpectedNoise:
    """The output error that rounding is expected to make, as a function of the logarithms of scales with a gradient.

    Rounding makes errors that are about independent: of variance d²/12 with a step d, but never more than the value
    itself, which small values lose by becoming zero. For a linear that gives
        E = Σ_t a_t Σ_c min(x_tc², d_t² s_c²/12) ‖W_c‖² + Σ_rc min(w_rc², d_rg² / (12 s_c²)) m_c
    with token shares a_t, d_t = range of x_t/s over the codes (`static_range`, if static), d_rg = max_{c in g}
    |w_rc| s_c over the codes for the group g of c, of all rows with one scale, and m_c = Σ_t a_t x_tc². The step of a
    float code is about x/2^3.5, but no less than that of the codes nearest to zero, the largest over 448·512. Each
    linear counts relative to its output. Without a product with the tokens it is far cheaper than `output_error`,
    though less exact.
    """

    def __init__(self, group: Group, targets: Targets) -> None:
        kept = group.tokens if group.fitted is None else group.fitted
        self.group = group
        outputs = _unshifted(group, [kept @ weight.t() for weight in group.weights])
        share = token_shares(outputs)
        self.share = share / share.sum()
        self.tokens, self.inputs = kept, kept.abs()
        self.squares = kept.square()
        self.moment = self.share @ self.squares
        relative = [1 / max(float(self.share @ y.square().sum(1)), _TINY) for y in outputs]
        self.parts = []
        for target in _different(targets):
            pairs = [(f, w) for f, w, own in zip(relative, group.weights, targets, strict=True) if own is target]
            columns = torch.stack([factor * weight.square().sum(0) for factor, weight in pairs]).sum(0)
            weights = torch.cat([weight.abs() * factor**0.5 for factor, weight in pairs])
            rows = tuple(len(weight) for _, weight in pairs) if target.one_scale else None
            self.parts.append((target, columns, weights, weights.square() * self.moment, rows))

    def __call__(self, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp()
        noise = scale.new_zeros(())
        for target, columns, weights, squares, rows in self.parts:
            noise = noise + _weight_noise(weights, squares, scale, self.moment, target, rows)
            if target.activations != "none":
                steps = self._input_step(scale, target) * (scale.square() / 12)
                rounding = _rounding(self.squares, steps, target.type)
                noise = noise + self.share @ (rounding @ columns)
        return noise

    def _input_step(self, scale: Tensor, target: Target) -> Tensor:
        """Squared step of the inputs over s: [T, 1] with a scale a token, [1, 1] with one for all."""
        high = _steps(target.activation_bits, target.type)
        if target.activations == "dynamic" and target.symmetric:
            return ((self.inputs / scale).amax(1, keepdim=True) / high).square()
        if target.activations == "dynamic":
            x = self.tokens / scale
            return ((x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (2 * high + 1)).square()
        bottom, top = static_range(self.group, scale, target)
        width = torch.maximum(top, -bottom) * 2 if target.symmetric else top.clamp(min=0) - bottom.clamp(max=0)
        return (width / (2 * high + 1)).square().view(1, 1)


def _weight_noise(
    weights: Tensor,
    squares: Tensor,
    scale: Tensor,
    moment: Tensor,
    target: Target,
    rows: tuple[int, ...] | None,
) -> Tensor:
    """Σ_rc min(w_rc², d_rg² / (12 s_c²)) m_c, with a gradient by s; `squares` are w_rc² m_c, `rows` those of each
    linear where all of them have one scale.

    What weights lose that lose themselves, and in float codes those that lose a share of themselves, does not depend on
    s: in the gradient only the others count, so that it takes two products with a matrix of zeros and ones.
    """
    size = target.group_size or len(scale)
    with torch.no_grad():
        scaled = (weights * scale).unflatten(1, (-1, size))
        at = scaled.argmax(2) if scale.requires_grad else None
        ends = _joined(scaled.amax(2), rows)
        root = (ends / (_steps(target.bits, target.type) * 12**0.5)).unsqueeze(2)
        lost = (scaled <= root).to(scale.dtype)
        fixed = torch.dot(squares.flatten(), lost.flatten())
        if target.type == "float":
            relative = (scaled > root / _SHARE**0.5).to(scale.dtype)
            fixed += _SHARE * torch.dot(squares.flatten(), relative.flatten())
            lost += relative
        rounded = lost.neg_().add_(1)
    if at is not None:
        at += torch.arange(0, len(scale), size, device=scale.device)
        ends = _joined(weights.gather(1, at) * scale[at], rows)
    steps = ends.square() / (12 * _steps(target.bits, target.type) ** 2)
    shares = (moment / scale.square()).view(-1, size)
    return (steps * torch.einsum("rgc,gc->rg", rounded, shares)).sum() + fixed


def _joined(ends: Tensor, rows: tuple[int, ...] | None) -> Tensor:
    """Ends of rows [R, groups], or those of all rows of a linear for each of them."""
    if rows is None:
        return ends
    return torch.cat([own.amax(0, keepdim=True).expand_as(own) for own in ends.split(rows)])


def _steps(bits: int, type: CodeType) -> int:
    """Steps from zero to the largest code, of the size that they have at zero."""
    return 448 * 512 if type == "float" else 2 ** (bits - 1) - 1


def _rounding(squares: Tensor, steps: Tensor, type: CodeType) -> Tensor:
    """Expected squared error of values of these squares, with the variance `steps` of the codes nearest to zero."""
    if type == "float":
        steps = torch.maximum(steps, squares * _SHARE)
    return torch.minimum(squares, steps)


_SHARE = 2.0**-7 / 12
"""Squared error of a float code over the square of its value, on average."""
_TINY = 1e-30
