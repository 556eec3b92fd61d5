"""Clipping the weights of a linear where that makes its output more exact, as AWQ does after scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Bounds that are tried, as shares of the largest magnitude; AWQ tries 20 down to a half."""
COARSE_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Those of a search that finds bounds for each of its trials."""


def clip_bounds(
    weight: Tensor,
    tokens: Tensor,
    quantized: Callable[[Tensor], Tensor],
    group_size: int | None,
    ratios: Sequence[float] = RATIOS,
) -> Tensor:
    """For each row and group of inputs the bound b of least Σ_t ((w − Q(clamp(w, −b, b))) · x_t)² over the group alone.

    AWQ, https://arxiv.org/abs/2306.00978, and `auto_clip.py` of its code. The sum is a quadratic form with the Gram
    matrix of the group's inputs, so where tokens are many it costs no pass over them for each bound.

    weight float32 [out, C]; tokens float32 [T, C]; quantized: a weight to its quantized value; ratios: of the bounds
    that are tried to the largest magnitude. Returns float32 [out, groups]: the largest magnitude itself where clipping
    does not help.
    """
    size = group_size or weight.shape[1]
    inputs = tokens.unflatten(1, (-1, size)).permute(1, 2, 0)  # [groups, size, T]
    gram = inputs @ inputs.transpose(1, 2) if size <= len(tokens) else None
    groups = weight.unflatten(1, (-1, size))
    largest = groups.abs().amax(2)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for ratio in ratios:
        bound = largest * ratio
        clamped = torch.minimum(torch.maximum(groups, -bound[..., None]), bound[..., None])
        lost = (quantized(clamped.flatten(1)).unflatten(1, (-1, size)) - groups).transpose(0, 1)  # [groups, out, size]
        outputs = (lost @ inputs).square() if gram is None else (lost @ gram) * lost
        error = outputs.sum(2).t()
        better = error < least
        best, least = torch.where(better, bound, best), torch.where(better, error, least)
    return best


def clamped(weight: Tensor, bounds: Tensor) -> Tensor:
    """The weight [out, C] within its bounds [out, groups]."""
    groups = weight.unflatten(1, (bounds.shape[1], -1))
    limit = bounds.to(weight)[..., None]
    return torch.minimum(torch.maximum(groups, -limit), limit).flatten(1)
