"""Gradients that float16 holds: its smallest values swallow those of a mean over many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_EXPONENT = 100
"""Of a scale, so that its product with a float32 stays one."""
ATTEMPTS = 4
STEP = 6
"""Powers of two by which a scale is lowered where a gradient overflows."""


def scaled_gradients(
    output: Tensor, gradient: Tensor, leaves: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor | None], float]:
    """S ∂L/∂x of each leaf x, where ∂L/∂y of the `output` y is `gradient`, and S; None of a leaf that y does not hold.

    `dtype` is that of the arithmetic between. In float16 S is the power of two by which the largest magnitude of ∂L/∂y
    comes to lie in [1/2, 1), lowered where a gradient overflows all the same (Micikevicius et al. 2018, arXiv
    1710.03740, 3.2, for each backward pass anew). Elsewhere S = 1, and gradients are those of `Tensor.backward`.
    """
    if dtype != torch.float16:
        return list(torch.autograd.grad(output, leaves, gradient.to(output.dtype), allow_unused=True)), 1.0
    largest = float(gradient.detach().abs().amax())
    exponent = min(LARGEST_EXPONENT, -math.frexp(largest)[1]) if 0 < largest < math.inf else 0
    for attempt in range(ATTEMPTS):
        scale = 2.0 ** (exponent - attempt * STEP)
        upstream = (gradient.float() * scale).to(output.dtype)
        last = attempt + 1 == ATTEMPTS
        found = torch.autograd.grad(output, leaves, upstream, retain_graph=not last, allow_unused=True)
        if all(bool(torch.isfinite(each).all()) for each in found if each is not None):
            break
    return list(found), scale
