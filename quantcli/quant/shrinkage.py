"""Second moments of few tokens, drawn towards what few tokens tell well: the moments of each channel alone."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024
"""Rows of a matrix that are squared at a time."""


def shrunk(hessian: Tensor, tokens: int, damping: float = 0.0) -> tuple[Tensor, float]:
    """H with all that lies off its diagonal multiplied by 1 − ρ, in place, and ρ in [0, 1]; H as it is, and 0, for ρ up
    to twice the `damping`.

    Schäfer & Strimmer 2005: with r_ij = H_ij / √(H_ii H_jj) found from n tokens, the least expected square of the error
    of all r_ij is at  ρ = Σ_{i≠j} Var(r_ij) / Σ_{i≠j} r_ij²,  Var(r_ij) ≈ (1 − r_ij²)² / n.  Channels that never held
    anything have no part in it. H [in, in] float32, E[x xᵀ] over n = `tokens`. Since (1 − ρ) H + ρ diag H =
    (1 − ρ) (H + ρ / (1 − ρ) diag H), damping by a share of each channel does as much as a ρ of its size.
    """
    diagonal = hessian.diagonal().clone()
    unit = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    squares = fourths = 0.0
    for start in range(0, len(hessian), ROWS):
        rows = slice(start, start + ROWS)
        r = (hessian[rows] * unit[rows, None] * unit).square_()
        r.diagonal(start).zero_()
        squares += float(r.sum(dtype=torch.float64))
        fourths += float(r.square_().sum(dtype=torch.float64))
    seen = int((diagonal > 0).sum())
    variances = (seen * (seen - 1) - 2 * squares + fourths) / max(1, tokens)
    share = min(1.0, max(0.0, variances / squares)) if squares > 0 else 0.0
    if share <= 2 * damping:
        return hessian, 0.0
    hessian.mul_(1 - share).diagonal().copy_(diagonal)
    return hessian, share
