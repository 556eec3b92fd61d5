"""Making a rounded weight fit its inputs better: scales fitted to the codes, codes changed one channel at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.quant.gptq import BLOCK, INNER
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, nearest_codes_

_ROUNDING = 1e-6
"""Share of the largest curvature that codes of such sizes can have, below which what is found is float32's rounding."""


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """(w − ŵ) H (w − ŵ)ᵀ of every row, float32 [out]: with H = E[x xᵀ] the mean squared error of each output.

    weight [out, in] of any float dtype, hessian [in, in] float32.
    """
    difference = weight.float() - dequantize(quantized)
    return (difference @ hessian).mul_(difference).sum(1)


def relative_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """Σ (w − ŵ) H (w − ŵ)ᵀ / Σ w H wᵀ over all rows; 0 for a weight of zeros, and where rounding of H leaves less."""
    whole = (weight.float() @ hessian).mul_(weight).sum()
    lost = output_error(weight, quantized, hessian).sum()
    return max(0.0, float(lost / whole)) if whole > 0 else 0.0


def refitted(weight: Tensor, quantized: QuantizedWeight, grid: WeightGrid, hessian: Tensor) -> QuantizedWeight:
    """Scales that fit the codes better, a group at a time with all others as they are by then.

    With c_g = q − z of group g, else zero, the s_g that minimises (w − Σ c_g s_g) H (w − Σ c_g s_g)ᵀ moves by
    c_g H (w − ŵ)ᵀ / (c_g H c_gᵀ). It is rounded to the stored dtype and taken where the error falls, so the sum over
    rows never rises. Codes that cancel out in every input, as where channels are copies of each other, have no
    curvature but rounding: their scale stays. weight [out, in]; hessian [in, in] float32.
    """
    out_features, in_features = weight.shape
    rows, groups = quantized.scale.shape
    size = in_features // groups
    centred = quantized.codes.float()
    if quantized.zero_point is not None:
        centred -= quantized.zero_point.float().repeat_interleave(size, 1)
    scale = quantized.scale.float().clone()
    slope = (weight.float() - dequantize(quantized)) @ hessian
    spread = hessian.diagonal().clamp(min=0).sqrt()
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        codes = centred[:, columns]
        product = codes @ hessian[columns]
        gain = (codes * slope[:, columns]).sum(1, keepdim=True)
        curvature = (codes * product[:, columns]).sum(1, keepdim=True)
        largest = (codes.abs() @ spread[columns, None]).square()
        if rows == 1:
            gain, curvature, largest = (each.sum(0, keepdim=True) for each in (gain, curvature, largest))
        found = grid.stored(scale[:, g : g + 1] + torch.nan_to_num(gain / curvature))
        change = found - scale[:, g : g + 1]
        taken = (2 * change * gain > change.square() * curvature) & (curvature > _ROUNDING * largest)
        if not grid.full_range:
            taken &= found > 0
        change = torch.where(taken, change, 0.0)
        scale[:, g : g + 1] += change
        slope.addcmul_(product, change.expand(out_features, 1), value=-1)
    return QuantizedWeight(quantized.codes, scale.to(grid.scale_dtype), quantized.zero_point)


def descended(
    weight: Tensor, quantized: QuantizedWeight, grid: WeightGrid, hessian: Tensor, order: Tensor
) -> QuantizedWeight:
    """One sweep of coordinate descent on the codes: in `order`, each channel takes the code that minimises
    (w − ŵ) H (w − ŵ)ᵀ with all others as they are by then (QuantEase, Behdin et al. 2023). It never raises that error.

    weight [out, in]; hessian [in, in] float32; order int64 [in].
    """
    out_features, in_features = weight.shape
    scales = quantized.scale.float().t().contiguous().expand(-1, out_features)
    size = in_features // scales.shape[0]
    groups = (order // size).tolist()
    h = hessian[order][:, order]
    slope = h @ (weight.float() - dequantize(quantized)).t()[order]  # kept up to date with every change
    codes = quantized.codes.t()[order].float()
    diagonal = h.diagonal().tolist()
    changes = torch.empty(min(BLOCK, in_features), out_features, device=weight.device)
    new = torch.empty(out_features, device=weight.device)
    for start in range(0, in_features, BLOCK):
        end = min(start + BLOCK, in_features)
        for begin in range(start, end, INNER):
            stop = min(begin + INNER, end)
            for j in range(begin, stop):
                change = changes[j - start]
                if diagonal[j] <= 0:  # never held anything: whatever its code, the outputs are the same
                    change.zero_()
                    continue
                step = scales[groups[j]]
                nearest_codes_(torch.div(slope[j], step, out=new).div_(diagonal[j]).add_(codes[j]), None, grid)
                torch.sub(new, codes[j], out=change).mul_(step)
                codes[j] = new
                if j + 1 < stop:
                    slope[j + 1 : stop].addr_(h[j, j + 1 : stop], change, alpha=-1)
            if stop < end:
                slope[stop:end].addmm_(h[begin:stop, stop:end].t(), changes[begin - start : stop - start], alpha=-1)
        if end < in_features:
            slope[end:].addmm_(h[start:end, end:].t(), changes[: end - start], alpha=-1)
    natural = torch.empty(in_features, out_features, dtype=grid.code_dtype, device=weight.device)
    natural[order] = codes.to(grid.code_dtype)
    return QuantizedWeight(natural.t().contiguous(), quantized.scale, quantized.zero_point)
