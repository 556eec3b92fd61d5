"""Scales that balance the range of a channel's input against that of its weights: s = A^α / Wmax^β."""

from __future__ import annotations

from torch import Tensor

from quantcli.smoothing.group import (
    FLOOR,
    ErrorOf,
    Found,
    Group,
    largest_input,
    largest_weight,
    least_error,
    shared_maximum,
    shared_mean,
)

_STEPS = 20  # of exponents between 0 and 1


def smoothquant(group: Group, error: ErrorOf, *, alpha: float = 0.5) -> Found:
    """m1: s_c = A_c^α / Wmax_c^(1-α) (Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, eq. 4), A_c = max_t |x_tc|.

    Channels that share a producer's channel take the largest A and Wmax among them. `error` is not asked.
    """
    inputs, weights = _ranges(group)
    return Found(balanced(inputs, weights, alpha, 1 - alpha), {"alpha": alpha})


def iterative(group: Group, error: ErrorOf, *, alpha: float = 0.9) -> Found:
    """m4: s_c = A_c^α / Wmax_c^(1-α), with most of the range moved into the weights (msModelSlim's iter_smooth).

    Channels that share a producer's channel take the mean of s over them. `error` is not asked.
    """
    inputs = largest_input(group)
    scale = balanced(inputs, largest_weight(group), alpha, 1 - alpha)
    return Found(shared_mean(scale, group.channels, inputs > 0), {"alpha": alpha})


def flex(group: Group, error: ErrorOf, *, alpha: float | None = None, beta: float | None = None) -> Found:
    """m6: s_c = A_c^α / Wmax_c^β, with the exponents of least error (msModelSlim's flex smooth).

    First α in 0, 0.05, … 1 with β = 1 - α, then β over the same grid; of equal errors the first counts. At most 41
    calls of `error`. A given exponent is taken as it is, and only the other is looked for; with both given `error` is
    not asked. Channels that share a producer's channel take the largest A and Wmax among them.

    Raises:
        DataError: the error is finite nowhere on the grid.
    """
    inputs, weights = _ranges(group)

    def best(exponents: list[tuple[float, float]]) -> tuple[tuple[float, float], float]:
        return least_error(((pair, balanced(inputs, weights, *pair)) for pair in exponents), error)

    def found(pair: tuple[float, float], loss: float) -> Found:
        return Found(balanced(inputs, weights, *pair), {"alpha": pair[0], "beta": pair[1], "error": loss})

    grid = [i / _STEPS for i in range(_STEPS + 1)]
    if alpha is not None and beta is not None:
        return Found(balanced(inputs, weights, alpha, beta), {"alpha": alpha, "beta": beta})
    if alpha is not None:
        return found(*best([(alpha, b) for b in grid]))
    if beta is not None:
        return found(*best([(a, beta) for a in grid]))
    first, loss = best(list(zip(grid, reversed(grid), strict=True)))
    second, other = best([(first[0], b) for b in grid if b != first[1]])
    return found(second, other) if other < loss else found(first, loss)


def balanced(inputs: Tensor, weights: Tensor, alpha: float, beta: float) -> Tensor:
    """max(A^α / max(Wmax, 1e-5)^β, 1e-5), and 1 where A is 0: [C] of two [C].

    What never carried anything is left alone: its producer's weight over a least scale would blow up whatever an unseen
    text puts there.
    """
    scale = (inputs.pow(alpha) / weights.clamp(min=FLOOR).pow(beta)).clamp(min=FLOOR)
    return scale.where(inputs > 0, 1.0)


def _ranges(group: Group) -> tuple[Tensor, Tensor]:
    return shared_maximum(largest_input(group), group.channels), shared_maximum(largest_weight(group), group.channels)
