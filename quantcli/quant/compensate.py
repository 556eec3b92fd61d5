"""Weights that make good what quantizing the layers before has changed in their inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def compensated(weight: Tensor, hessian: Tensor, drift: Tensor, damping: float) -> Tensor:
    """W* = W + W Dᵀ (H + damping · diag H)⁻¹, float32 [out, in]: the target of asymmetric calibration.

    x are the inputs that the float model has, x̂ those behind quantized layers; H = E[x̂ x̂ᵀ] and D = E[x̂ (x − x̂)ᵀ],
    float32 [in, in]; D may come from fewer tokens.
    Of all Ŵ, E‖x̂ Ŵᵀ − x Wᵀ‖² = tr((Ŵ − W*) H (Ŵ − W*)ᵀ) + const without damping, so that rounding W* by any method
    that minimises the plain error solves the problem with the float model's outputs (LoaQ, 2509.06297; GPTAQ solves the
    same one step by step). Damping draws W* back to W. Raises ValueError if H does not factor.
    """
    diagonal = hessian.diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    normal = hessian * unit * unit[:, None]
    normal.diagonal().copy_(torch.full_like(unit, 1.0 + damping))
    lower, info = torch.linalg.cholesky_ex(normal)
    if info:
        raise ValueError(f"the Hessian does not factor with {damping:.0%} of its diagonal added")
    right = drift @ weight.float().t()
    step = torch.cholesky_solve(right * unit[:, None], lower) * unit[:, None]
    return weight.float() + step.t()


def kept_share(weight: Tensor, target: Tensor, hessian: Tensor, drift: Tensor) -> float:
    """The share t of W* − W, in [0, 1], that lowers E‖x̂ (W + t (W* − W))ᵀ − x Wᵀ‖² most on tokens that W* has not
    seen, whose D is `drift`: the minimum of a parabola. 0 where W* makes it worse."""
    step = target - weight.float()
    gain = (step @ drift).mul_(weight).sum()
    curvature = (step @ hessian).mul_(step).sum()
    return float((gain / curvature).clamp(0, 1)) if curvature > 0 else 0.0
