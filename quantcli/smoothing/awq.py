"""Scales that spare the weights of salient channels, for weights of few bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantcli.errors import DataError
from quantcli.smoothing.group import ErrorOf, Found, Group, least_error, shared_maximum

_FLOOR = 1e-4


def awq(group: Group, error: ErrorOf, *, ratios: int = 20, duo: bool = False, group_size: int | None = None) -> Found:
    """m3: s_c = mean_t |x_tc|^r over sqrt(max_c s · min_c s), r in 0, 1/ratios, … of least error (Lin et al. 2024, AWQ,
    arXiv 2306.00978, eq. 4 and the search of its code).

    duo: s_c = mean|x|^r / (w_c^(1-r) + 1e-4), w_c = mean over rows of |w_rc| / max over the row's group of `group_size`
    channels (None: the row), so that channels of large weights are spared too; r = 0 stays s = 1.

    s is at least 1e-4 before it is divided, and 1 where the input is always 0. Channels that share a producer's channel
    take the largest mean|x| and w among them. `ratios` calls of `error`; of equal errors the first counts.

    Raises:
        DataError: the error is finite for no ratio; group_size does not divide the channels.
    """
    inputs = shared_maximum(group.mean_absolute, group.channels)
    weights = shared_maximum(_relative_weight(group.weights, group_size), group.channels) if duo else None

    def scale(ratio: float) -> Tensor:
        s = inputs.pow(ratio)
        if weights is not None and ratio:
            s = s / (weights.pow(1 - ratio) + _FLOOR)
        return _centred(s.clamp(min=_FLOOR), inputs > 0)

    def trials() -> Iterator[tuple[float, Tensor]]:
        for i in range(ratios):
            yield i / ratios, scale(i / ratios)

    ratio, loss = least_error(trials(), error)
    return Found(scale(ratio), {"ratio": ratio, "error": loss})


def _centred(scale: Tensor, live: Tensor) -> Tensor:
    """scale / sqrt(max · min) over the live channels, and 1 elsewhere."""
    if not bool(live.any()):
        return torch.ones_like(scale)
    seen = scale[live]
    return (scale / (seen.amax() * seen.amin()).sqrt()).where(live, 1.0)


def _relative_weight(weights: tuple[Tensor, ...], group_size: int | None) -> Tensor:
    """Mean over rows of |w| / the largest |w| in its row and group: [C]. Groups of zeros count as zero."""
    width = weights[0].shape[1]
    size = group_size or width
    if width % size:
        raise DataError(
            f"Groups of {size} weights do not divide the {width} input channels of the linear.",
            "Choose a group_size that divides them.",
        )
    sums, rows = weights[0].new_zeros(width), 0
    for weight in weights:
        groups = weight.abs().unflatten(1, (-1, size))
        largest = groups.amax(2, keepdim=True)
        sums += (groups / largest.where(largest > 0, 1.0)).flatten(1).sum(0)
        rows += weight.shape[0]
    return sums / rows
