"""Weights that make good what quantizing the layers before has changed in their inputs, and in what they add to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DAMPINGS = (0.03, 0.3, 3.0)
"""Shares of each channel's second moment: little holds W* to the tokens that it was found on, much to W."""


def step_of(hessian: Tensor, pull: Tensor, damping: float) -> Tensor:
    """Pᵀ (H + damping · diag H)⁻¹, float32 [out, in]: W* − W, W* the target of asymmetric calibration.

    x are the inputs that the float model has, x̂ those behind quantized layers; H = E[x̂ x̂ᵀ] [in, in]. P = E[x̂ eᵀ]
    [in, out] says what the outputs lack, e = (x − x̂) Wᵀ: P = D Wᵀ with D = E[x̂ (x − x̂)ᵀ]. Of all Ŵ, E‖x̂ Ŵᵀ − x Wᵀ‖² =
    tr((Ŵ − W*) H (Ŵ − W*)ᵀ) + const without damping, so that rounding W* by any method that minimises the plain error
    solves the problem with the float model's outputs (LoaQ, 2509.06297; GPTAQ solves the same one step by step). What
    the stream lacks that the outputs are added to may be part of e as well. Tokens may count differently, in H and P
    alike. Damping draws W* back to W. Raises ValueError if H does not factor.
    """
    diagonal = hessian.diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    normal = (hessian * unit).mul_(unit[:, None])
    normal.diagonal().copy_(torch.full_like(unit, 1.0 + damping))
    lower, info = torch.linalg.cholesky_ex(normal)
    del normal  # three of them would be the most that solving a block holds
    if info:
        raise ValueError(f"the Hessian does not factor with {damping:.0%} of its diagonal added")
    # the inverse, for one matrix product in the place of two triangular solves
    return (pull.t() * unit) @ torch.cholesky_inverse(lower) * unit


def compensation(
    weight: Tensor,
    hessian: Tensor,
    pull: Tensor,
    held_out: Tensor,
    held_out_share: float,
    dampings: Sequence[float] = DAMPINGS,
) -> tuple[Tensor, float, float]:
    """What asymmetric calibration rounds in the place of W: (float32 [out, in], damping, share of the step).

    Damping and share are those with which the step of `pull` lowers the error of the tokens of `held_out` most; the
    step that is taken is that of all tokens, `held_out_share` of which were held out. W itself, with share 0, if no
    step lowers that error. Raises ValueError if H factors with none of the dampings.
    """
    best, chosen, damping_chosen, factors = 0.0, 0.0, 0.0, False
    for damping in dampings:
        try:
            step = step_of(hessian, pull, damping)
        except ValueError:
            continue  # more damping will do
        factors = True
        gain = (step * held_out.t()).sum()
        # step H stepᵀ, since step (H + damping · diag H) = Pᵀ
        curvature = (step * pull.t()).sum() - damping * (step.square().sum(0) * hessian.diagonal()).sum()
        if gain <= 0 or curvature <= 0:
            continue
        share = float((gain / curvature).clamp(max=1))
        lowered = float(share * (2 * gain - share * curvature))
        if lowered > best:
            best, chosen, damping_chosen = lowered, share, damping
    if not factors:
        raise ValueError(f"the Hessian does not factor with {max(dampings):.0%} of its diagonal added")
    if not chosen:
        return weight.float(), 0.0, 0.0
    step = step_of(hessian, torch.lerp(pull, held_out, held_out_share), damping_chosen)
    return weight.float() + chosen * step, damping_chosen, chosen
