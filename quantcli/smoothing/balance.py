"""Scales for weights that GPTQ rounds: a channel takes as much of the range of its group as of the group's error."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.quant.gptq import factored
from quantcli.quant.shrinkage import shrunk
from quantcli.smoothing.group import ErrorOf, Found, Group

POWER = 8
"""Of the norm that stands for the range of a group: near the maximum, and smooth. Measured: 2 is worse than no scale, 4
has three quarters of the gain, 6 to 12 the same (BENCHMARKS.md)."""
STEPS = 5
"""Of the fixed point, after which a loss that falls by a tenth moves by less than 1e-4 of it."""
MOST = 3.0
"""The most by which ln s leaves 0: a column of next to nothing could take any scale."""


def balance(group: Group, error: ErrorOf) -> Found:
    """s that makes Π L_l least over the quantized linears l of a group. `error`, of rounding to nearest, is not asked.

        L_l(s) = Σ_g R_g D_g,   R_g = Σ_r (Σ_{c∈g} |w_rc s_c|^p)^(2/p),   D_g = Σ_{c∈g} d_c / s_c²

    R_g is, but for a factor, the squared step of the weights of group g of input channels, summed over rows, with the
    norm of `POWER` p in the place of the maximum; d_c is what a squared error of channel c costs where GPTQ makes it
    good with the channels that it rounds later: 1 / U_cc² of H = E[x xᵀ] (`quant.gptq`; Frantar et al. 2022, eq. 3,
    which has [H⁻¹]_cc = U_cc²). At the least L a channel has the share of R_g that it has of D_g, and a step towards
    there is

        ln s_c += (ln E_c − ln A_c) / (2 + p),   E_c = Σ_l R_g d_c / s_c² / L_l,   A_c = Σ_l D_g R_g a_c / L_l,

    a_c the share of R_g that is c's; channels with one producer's channel are added up. Without d_c and with p = ∞ this
    makes the columns of a group alike (cross-layer equalization, Nagel et al. 2019, arXiv:1906.04721, does so for
    pairs of weights). H is that of `moments`, or of the kept tokens, drawn to its diagonal where these are few. The
    geometric mean of s is 1; channels that hold nothing, or that nobody reads, have s = 1, as all have where no linear
    is quantized or H does not factor.
    """
    weights = [
        (weight.abs() / weight.abs().max(), width)
        for weight, width in zip(group.weights, group.ranges, strict=True)
        if width is not None and bool(weight.any())
    ]
    costs = _costs(group)
    if not weights or costs is None:
        return Found(torch.ones_like(group.mean_absolute))
    producers = int(group.channels.max()) + 1
    log, before, after = costs.new_zeros(producers), 0.0, 0.0
    for step in range(STEPS + 1):
        scale = log[group.channels].exp()
        pushed, pulled, lost = costs.new_zeros(producers), costs.new_zeros(producers), 0.0
        for weight, width in weights:
            error_of, range_of, loss = _sides(weight, width, scale, costs)
            pushed.index_add_(0, group.channels, error_of)
            pulled.index_add_(0, group.channels, range_of)
            lost += loss
        before, after = (lost if step == 0 else before), lost
        if step < STEPS:
            live = (pushed > 0) & (pulled > 0)
            log += torch.where(live, (pushed / pulled).log() / (2 + POWER), 0.0)
            log.clamp_(-MOST, MOST)
            log[live] -= log[live].mean()
    return Found(log[group.channels].exp(), {"loss": float(torch.tensor((after - before) / len(weights)).exp())})


def _costs(group: Group) -> Tensor | None:
    """d [C] float32, None where H does not factor."""
    if group.moments is None:
        moments, tokens = group.tokens.t() @ group.tokens / len(group.tokens), len(group.tokens)
    else:
        moments, tokens = group.moments.clone(), group.counted
    try:
        curvature = factored(shrunk(moments, tokens)[0])
    except ValueError:
        return None
    costs = torch.empty_like(moments[0])
    costs[curvature.order] = curvature.factor.diagonal().reciprocal().square()
    return torch.where(curvature.hessian.diagonal() > 0, costs, 0.0)


def _sides(weight: Tensor, width: int, scale: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, float]:
    """(E [C], A [C], ln L) of a linear, |weight| [out, C] at most 1."""
    scaled = (weight * scale).view(len(weight), -1, width)
    powers = scaled.square_().square_().square_()  # to the 8th, POWER
    whole = powers.sum(-1, keepdim=True)
    share = torch.where(whole > 0, whole.pow(2 / POWER - 1), 0.0)
    ranges = (powers * share).sum(0)  # [groups, width], R_g a_c
    errors = (costs / scale.square()).view(-1, width)
    steps, noise = ranges.sum(-1, keepdim=True), errors.sum(-1, keepdim=True)
    loss = (steps * noise).sum()
    if not loss > 0:
        return torch.zeros_like(costs), torch.zeros_like(costs), 0.0
    return (steps * errors / loss).flatten(), (noise * ranges / loss).flatten(), float(loss.log())
