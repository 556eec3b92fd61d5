"""One group of linears that read one input, what is known of that input, and scales for its channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from quantcli.errors import DataError

Trial = TypeVar("Trial")

ErrorOf = Callable[[Tensor], float]
"""Scale [C] -> squared output error of the group under the target scheme, relative to its output."""

FLOOR = 1e-5
"""The least scale, and the least max|w| that is divided by."""


@dataclass(frozen=True)
class Group:
    """Linears that read one input x, whose channels are scaled: x' = x / s, W' = W · s, so that W' x' = W x.

    Of many experts only some are held, by whose outputs scales are judged.

    Attributes:
        weights: of the linears, float32 [out, C] each.
        channels: the producer's channel of each input channel, int64 [C]. Channels that share one (query heads over
            one KV head) get one scale.
        minimum, maximum, mean_absolute, centred_maximum, spread: of x, as in `calibration.channel_statistics`, float32
            [C] and one number.
        tokens: inputs kept for searches, float32 [T, C].
        fitted: those of them that a descent looks at, float32 [F, C], which are not among `tokens` then; None if it
            looks at these.
        sample_extremes: least and largest x in each sample, float32 [2, samples, C], for a static range that is their
            mean; None where none is.
        shift: what was subtracted from x and the linears give back in their biases, float32 [C]; None for nothing.
        beyond: max |w| in each column of the linears that are not held, float32 [C]; None if all are.
        ranges: how many input channels share a scale in each of `weights`; None for those that stay in float.
        moments: E[x xᵀ] of `counted` tokens, float32 [C, C]; None where the tokens kept have to do.
    """

    weights: tuple[Tensor, ...]
    channels: Tensor
    minimum: Tensor
    maximum: Tensor
    mean_absolute: Tensor
    centred_maximum: Tensor
    spread: float
    tokens: Tensor
    fitted: Tensor | None = None
    sample_extremes: Tensor | None = None
    shift: Tensor | None = None
    beyond: Tensor | None = None
    ranges: tuple[int | None, ...] = ()
    moments: Tensor | None = None
    counted: int = 0


@dataclass(frozen=True)
class Found:
    """A scale [C], float32, positive, equal over channels that share a producer's; and how it was found."""

    scale: Tensor
    facts: dict[str, float | str] = field(default_factory=dict)


def largest_input(group: Group) -> Tensor:
    """A_c = max_t |x_tc|: [C]."""
    return torch.maximum(group.minimum.abs(), group.maximum.abs())


def largest_weight(group: Group) -> Tensor:
    """Wmax_c = max over linears and rows of |w_rc|: [C]. Of the magnitude: the sign of a weight says nothing here."""
    columns = [weight.abs().amax(0) for weight in group.weights]
    return torch.stack(columns if group.beyond is None else [*columns, group.beyond]).amax(0)


def shared_maximum(values: Tensor, channels: Tensor) -> Tensor:
    """For each channel the largest of the values of those that share its producer's channel: [C]."""
    size = int(channels.max()) + 1
    return values.new_zeros(size).scatter_reduce_(0, channels, values, "amax", include_self=False)[channels]


def shared_mean(values: Tensor, channels: Tensor, counted: Tensor) -> Tensor:
    """For each channel the mean of the values over those of `counted` that share its producer's channel; 1 without any.

    values float32 [C], counted bool [C]: [C].
    """
    size = int(channels.max()) + 1
    count = values.new_zeros(size).index_add_(0, channels, counted.to(values.dtype))
    total = values.new_zeros(size).index_add_(0, channels, values.where(counted, 0))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)[channels]


def least_error(trials: Iterable[tuple[Trial, Tensor]], error: ErrorOf) -> tuple[Trial, float]:
    """The trial whose scale has the least error, the first of equal ones, and that error.

    Raises:
        DataError: the error is finite for none of them.
    """
    best: tuple[Trial, float] | None = None
    for trial, scale in trials:
        loss = error(scale)
        if math.isfinite(loss) and (best is None or loss < best[1]):
            best = trial, loss
    if best is None:
        raise DataError(
            "The output error of a group of linears is not finite for any of the scales tried.",
            "Check the float model with the stage check, or leave these linears out of smoothing.",
        )
    return best
