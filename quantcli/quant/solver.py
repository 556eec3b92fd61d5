"""The whole way from a weight and the second moments of its input to codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.quant.gptq import Curvature, gptq
from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.refine import descended, refitted, relative_error
from quantcli.quant.search import mse


def solved(weight: Tensor, grid: WeightGrid, curvature: Curvature, sweeps: int) -> tuple[QuantizedWeight, float]:
    """GPTQ on scales found before it, then `sweeps` times scales fitted to the codes and one descent on the codes.

    Scales are those of `search.mse` under √(H_jj / U_jj²) of each channel, so that the order of solving costs nothing
    at run time: H_jj is what an error of the channel costs where no other makes it good, and 1 / U_jj² what it costs
    where all that are rounded later do (`quant.gptq`). weight [out, in], float32 or as stored. Returns the codes and
    scales, and the relative output error Σ (w − ŵ) H (w − ŵ)ᵀ / Σ w H wᵀ.
    """
    hessian = curvature.hessian
    alone = torch.empty_like(curvature.factor.diagonal())
    alone[curvature.order] = curvature.factor.diagonal().reciprocal()
    start = mse(weight, grid, hessian.diagonal().clamp(min=0).sqrt() * alone)
    found = gptq(weight, grid, start.scale, start.zero_point, curvature)
    for _ in range(sweeps):
        found = refitted(weight, found, grid, hessian)
        found = descended(weight, found, grid, hessian, curvature.order)
    return found, relative_error(weight, found, hessian)
