"""GPTQ: weights are rounded channel by channel, and each error is made good by the channels still to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, nearest_codes_

BLOCK = 128
"""Channels whose updates wait for one matrix product."""
INNER = 32
"""Channels that are updated one after the other."""
DAMPING_STEPS = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Curvature:
    """What GPTQ needs to know of an input: H = E[x xᵀ] of its channels, damped and factored in the order of solving.

    order: int64 [in], the channels as they are rounded, those of the largest second moment first. factor: float32
    [in, in], upper triangular U with (H + damping · diag H)⁻¹ = Uᵀ U, rows and columns in that order. damping: the
    share of the diagonal that was added. hessian: float32 [in, in], channels in their own order, not damped unless more
    damping was needed than was asked for.
    """

    order: Tensor
    factor: Tensor
    damping: float
    hessian: Tensor


def factored(hessian: Tensor, damping: float = 0.01) -> Curvature:
    """Factor a Hessian H [in, in] float32 for `gptq`. Raises as `inverse_factor`.

    An H that factors only with more damping has directions without curvature but the rounding of its sum, of either
    sign. Whatever goes on from codes of `gptq` meets H with that damping, or weights would run away along them.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor, used = inverse_factor(hessian, order, damping)
    if used > damping:
        hessian = hessian.clone()
        hessian.diagonal().mul_(1 + used)
    return Curvature(order, factor, used, hessian)


def inverse_factor(matrix: Tensor, order: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """Upper triangular U with (M + damping · diag M)⁻¹ = Uᵀ U, and the damping that was used. M is `matrix` [n, n]
    float32 with rows and columns in `order`.

    Damping is relative to each channel, as Marquardt has it: M_jj (1 + damping). Where M does not factor it is
    multiplied by 10, then by 100. Channels that never held anything are left without compensation. Raises ValueError
    for a matrix that holds values that are not finite, or that does not factor even then.
    """
    diagonal = matrix.diagonal()[order]
    if not bool(torch.isfinite(diagonal).all()):
        raise ValueError("the Hessian holds values that are not finite")
    # Solved for channels of variance one: the factor's rounding is then relative to each channel
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    for step in DAMPING_STEPS:
        used = min(1.0, damping * step)
        # made anew at each step, and let go of at once: these matrices are the most that solving a block holds
        normal = matrix[order][:, order].mul_(unit).mul_(unit[:, None])
        normal.diagonal().copy_(torch.full_like(unit, 1.0 + used))
        factor, info = torch.linalg.cholesky_ex(normal)
        del normal
        if not info:
            factor = torch.cholesky_inverse(factor)
            factor, info = torch.linalg.cholesky_ex(factor, upper=True)
        if not info and bool(torch.isfinite(factor).all()):
            # of S N S with S = 1 / unit: the inverse is unit N⁻¹ unit, its factor U has its columns scaled
            return factor.mul_(unit), used
    raise ValueError(f"the Hessian does not factor with {used:.0%} of its diagonal added")


def gptq(
    weight: Tensor, grid: WeightGrid, scale: Tensor, zero_point: Tensor | None, curvature: Curvature
) -> QuantizedWeight:
    """Codes q that keep tr((W − Ŵ) H (W − Ŵ)ᵀ) small, ŵ = (q − z) s, for scales that are given.

    Frantar et al. 2022 (GPTQ): for each channel j in order q_j = clamp(round(w_j / s + z)), e = (w_j − ŵ_j) / U_jj, and
    W_i −= e U_ji for all later channels i. Scales belong to the channel, whatever the order, so a checkpoint needs no
    g_idx. weight [out, in] float; scale [out, groups] in grid.scale_dtype; zero_point int8 of that shape or None.
    """
    out_features, in_features = weight.shape
    order, factor = curvature.order, curvature.factor
    # channels as rows, so that every step works on contiguous memory
    left = weight.float().t()[order]
    scales = scale.float().t().contiguous().expand(-1, out_features)
    zeros = None if zero_point is None else zero_point.float().t().contiguous().expand(-1, out_features)
    size = in_features // scales.shape[0]
    groups = (order // size).tolist()
    diagonal = factor.diagonal().tolist()
    codes = torch.empty(in_features, out_features, dtype=grid.code_dtype, device=weight.device)
    errors = torch.empty(min(BLOCK, in_features), out_features, device=weight.device)
    rounded = torch.empty(out_features, device=weight.device)
    for start in range(0, in_features, BLOCK):
        end = min(start + BLOCK, in_features)
        for begin in range(start, end, INNER):
            stop = min(begin + INNER, end)
            for j in range(begin, stop):
                step = scales[groups[j]]
                zero = None if zeros is None else zeros[groups[j]]
                nearest_codes_(torch.div(left[j], step, out=rounded), zero, grid)
                codes[j] = rounded
                if zero is not None:
                    rounded.sub_(zero)
                error = errors[j - start]
                torch.addcmul(left[j], rounded, step, value=-1, out=error).div_(diagonal[j])
                if j + 1 < stop:
                    left[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
            if stop < end:
                left[stop:end].addmm_(factor[begin:stop, stop:end].t(), errors[begin - start : stop - start], alpha=-1)
        if end < in_features:
            left[end:].addmm_(factor[start:end, end:].t(), errors[: end - start], alpha=-1)
    natural = torch.empty_like(codes)
    natural[order] = codes
    return QuantizedWeight(natural.t().contiguous(), scale, zero_point)
