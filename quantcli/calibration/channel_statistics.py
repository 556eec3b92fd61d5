"""Streaming statistics of the channels of one input, as outlier suppression reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.calibration.statistics import add_compensated
from quantcli.errors import DataError


class ChannelStatistics:
    """Extremes and means of every channel of activations x, and how far channels reach beyond their middle.

        minimum_c = min_t x_tc      maximum_c = max_t x_tc      mean_absolute_c = 1/T Σ_t |x_tc|

    over the tokens t of all samples. With mid_ic = (max_c + min_c) / 2 over the samples 1..i, by msModelSlim's m2,

        centred_maximum_c = max_i max_t (x_itc - mid_ic)        spread = max_i std(x_itc - mid_ic)

    the deviation of sample i unbiased, over all its tokens and channels. These two depend on the order of the samples,
    not on how they are divided into batches. Tensors are float32 [channels]; sums are float64 where the device has it.

    With `by_sample` the extremes of each sample are kept as well: min_t x_itc and max_t x_itc, [2, samples, channels].

    Attributes:
        count: tokens seen; with none seen, every statistic is zero.
        non_finite: elements that were NaN or infinite. They count as zero; whether they matter is the caller's to say.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu", by_sample: bool = False) -> None:
        self.channels = channels
        self._extremes: list[Tensor] | None = [] if by_sample else None
        self.device = torch.device(device)
        self.count = 0
        self.non_finite = 0
        self._wide = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        self._minimum = torch.full((channels,), torch.inf, device=self.device)
        self._maximum = torch.full((channels,), -torch.inf, device=self.device)
        self._centred = torch.full((channels,), -torch.inf, device=self.device)
        self._sum = torch.zeros(channels, dtype=self._wide, device=self.device)
        self._lost = torch.zeros_like(self._sum)
        self._spread = torch.zeros((), dtype=self._wide, device=self.device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds samples: x [samples, tokens, channels] of any float dtype, or [tokens, channels], which is one sample.

        Raises:
            DataError: the shape is another input's.
        """
        if x.ndim not in (2, 3) or x.shape[-1] != self.channels:
            raise DataError(
                f"Activations of shape {list(x.shape)} are no samples of the {self.channels} channels of the linear.",
                "Smoothing needs inputs of shape [samples, tokens, channels]; leave the linear out.",
            )
        if not x.numel():
            return
        for sample in x.reshape(-1, *x.shape[-2:]):
            self._add(sample.to(self.device, torch.float32))

    def _add(self, x: Tensor) -> None:
        low, high = x.amin(0), x.amax(0)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):  # NaN and infinity reach an extreme
            finite = torch.isfinite(x)
            self.non_finite += int(x.numel() - finite.sum())
            x = x.where(finite, 0)
            low, high = x.amin(0), x.amax(0)
        if self._extremes is not None:
            self._extremes.append(torch.stack((low, high)))
        self._minimum = torch.minimum(self._minimum, low)
        self._maximum = torch.maximum(self._maximum, high)
        middle = (self._maximum + self._minimum) / 2
        self._centred = torch.maximum(self._centred, high - middle)
        if x.numel() > 1:
            self._spread = torch.maximum(self._spread, (x - middle).std().to(self._wide))
        self._sum, self._lost = add_compensated(self._sum, self._lost, x.abs().sum(0))
        self.count += x.shape[0]

    @property
    def minimum(self) -> Tensor:
        return self._seen(self._minimum)

    @property
    def maximum(self) -> Tensor:
        return self._seen(self._maximum)

    @property
    def sample_extremes(self) -> Tensor | None:
        """The least and the largest value of each channel in each sample, [2, samples, channels]; None where none are
        kept."""
        return torch.stack(self._extremes, 1) if self._extremes else None

    @property
    def mean_absolute(self) -> Tensor:
        return (self._sum / max(1, self.count)).float()

    @property
    def centred_maximum(self) -> Tensor:
        return self._seen(self._centred)

    @property
    def spread(self) -> float:
        return float(self._spread)

    def _seen(self, extreme: Tensor) -> Tensor:
        return extreme.clone() if self.count else torch.zeros_like(extreme)
