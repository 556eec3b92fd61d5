"""Clipping the weights of a linear where that makes its output more exact, as AWQ does after scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Bounds that are tried, as shares of the largest magnitude; AWQ tries 20 down to a half."""
COARSE_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Those of a search that finds bounds for each of its trials."""
SWEEPS = 2
"""Rounds over the groups of a row. Of the error on other tokens two take 15 to 28 %, four a hundredth more."""

# What is lost by every bound exists for so many weights times bounds at once.
_ELEMENTS = 1 << 23


def clip_bounds(
    weight: Tensor,
    tokens: Tensor,
    quantized: Callable[[Tensor], Tensor],
    group_size: int | None,
    ratios: Sequence[float] = RATIOS,
    sweeps: int = SWEEPS,
) -> Tensor:
    """For each row and group of inputs the bound b that the weight is held within before it is rounded to nearest.

    First that of least Σ_t ((w_g − Q(clamp(w_g, −b, b))) · x_gt)² over the group alone: AWQ,
    https://arxiv.org/abs/2306.00978, and `auto_clip.py` of its code. Then, in `sweeps` rounds at most, each group's
    bound of least Σ_t (Σ_h e_h · x_ht)² with e the errors of all groups of the row, the others' as they are: inputs of
    different groups are not independent, so errors of one group can be chosen that cancel those of another.

    weight float32 [out, C]; tokens float32 [T, C]; quantized: a weight, of any number of rows, to its quantized value,
    each row by itself; ratios: of the bounds that are tried to the largest magnitude. Returns float32 [out, groups]:
    the largest magnitude itself where clipping does not help.
    """
    size = group_size or weight.shape[1]
    if sweeps and len(tokens) > weight.shape[1]:
        tokens = torch.linalg.qr(tokens).R  # fewer rows x with the same sum of (e · x)² for any e
    inputs = tokens.unflatten(1, (-1, size)).permute(1, 2, 0)  # [groups, size, T]
    # the sums are quadratic forms with the Gram matrix of the group: where tokens are many, no pass over them a bound
    gram = inputs @ inputs.transpose(1, 2) if size <= len(tokens) else None
    rows = max(1, _ELEMENTS // (len(ratios) * weight.shape[1]))
    found = [_bounds(part, inputs, gram, quantized, ratios, sweeps) for part in weight.split(rows)]
    return torch.cat(found)


def tensor_bound(
    weight: Tensor, tokens: Tensor, quantized: Callable[[Tensor], Tensor], ratios: Sequence[float] = RATIOS
) -> Tensor:
    """`clip_bounds` of a weight that has one scale: the bound b of least Σ_t ‖(W − Q(clamp(W, −b, b))) x_t‖², judged on
    all rows at once, since the largest weight of any sets the step of all. Returns float32 [1, 1]."""
    if len(tokens) > weight.shape[1]:
        tokens = torch.linalg.qr(tokens).R
    largest = weight.abs().amax()
    lost = torch.stack(
        [((quantized(weight.clamp(-(b := largest * r), b)) - weight) @ tokens.t()).square().sum() for r in ratios]
    )
    return (largest * torch.tensor(ratios, device=weight.device)[lost.argmin()]).view(1, 1)


def _bounds(
    weight: Tensor,
    inputs: Tensor,
    gram: Tensor | None,
    quantized: Callable[[Tensor], Tensor],
    ratios: Sequence[float],
    sweeps: int,
) -> Tensor:
    """`clip_bounds` of some rows. inputs [groups, size, T]; gram [groups, size, size]."""
    groups = weight.unflatten(1, inputs.shape[:2])
    largest = groups.abs().amax(2)
    lost = torch.stack(
        [
            quantized(clamped(weight, largest * ratio)).unflatten(1, inputs.shape[:2]).sub_(groups).transpose(0, 1)
            for ratio in ratios
        ]
    )  # [ratios, groups, out, size]
    squares = (lost @ inputs).square() if gram is None else (lost @ gram) * lost
    alone = squares.sum(3)
    chosen = alone.argmin(0)  # [groups, out]
    every = torch.arange(len(weight), device=weight.device)
    if sweeps and len(inputs) > 1:
        errors = [lost[best, group, every] for group, best in enumerate(chosen)]
        output = torch.stack([error @ x for error, x in zip(errors, inputs, strict=True)]).sum(0)  # [out, T]
        for _ in range(sweeps):
            before = chosen.clone()
            for group, x in enumerate(inputs):
                output -= errors[group] @ x
                crossed = (lost[:, group] * (output @ x.t())).sum(2)  # [ratios, out]
                chosen[group] = (alone[:, group] + 2 * crossed).argmin(0)
                errors[group] = lost[chosen[group], group, every]
                output += errors[group] @ x
            if torch.equal(chosen, before):
                break
    return largest * torch.tensor(ratios, device=weight.device)[chosen].t()


def clamped(weight: Tensor, bounds: Tensor) -> Tensor:
    """The weight [out, C] within its bounds [out, groups] or [1, 1]."""
    groups = weight.unflatten(1, (bounds.shape[1], -1))
    limit = bounds.to(weight)[..., None]
    return torch.minimum(torch.maximum(groups, -limit), limit).flatten(1)
