"""Scales that spare the weights of salient channels, for weights of few bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantcli.smoothing.group import ErrorOf, Found, Group, least_error, shared_maximum

_RATIOS = 20
_FLOOR = 1e-4


def awq(group: Group, error: ErrorOf) -> Found:
    """m3: s_c = mean_t |x_tc|^r over sqrt(max_c s · min_c s), r in 0, 1/20, … 19/20 of least error (Lin et al. 2024,
    AWQ, arXiv 2306.00978, eq. 4 and the search of its code).

    s is at least 1e-4 before it is divided, and 1 where the input is always 0. Channels that share a producer's channel
    take the largest mean|x| among them. 20 calls of `error`; of equal errors the first counts.

    Raises:
        DataError: the error is finite for no ratio.
    """
    inputs = shared_maximum(group.mean_absolute, group.channels)

    def scale(ratio: float) -> Tensor:
        return _centred(inputs.pow(ratio).clamp(min=_FLOOR), inputs > 0)

    def trials() -> Iterator[tuple[float, Tensor]]:
        for i in range(_RATIOS):
            yield i / _RATIOS, scale(i / _RATIOS)

    ratio, loss = least_error(trials(), error)
    return Found(scale(ratio), {"ratio": ratio, "error": loss})


def _centred(scale: Tensor, live: Tensor) -> Tensor:
    """scale / sqrt(max · min) over the live channels, and 1 elsewhere."""
    if not bool(live.any()):
        return torch.ones_like(scale)
    seen = scale[live]
    return (scale / (seen.amax() * seen.amin()).sqrt()).where(live, 1.0)
