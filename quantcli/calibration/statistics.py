"""Streaming statistics of what enters a linear layer, per input channel."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.errors import DataError

_KEYS = ("count", "minimum", "maximum", "absolute_maximum", "mean_absolute", "second_moment")
# Elements reduced at once: on a CPU a float32 copy that stays in the cache, elsewhere one that stays small.
_CPU_CHUNK = 1 << 20
_DEVICE_CHUNK = 1 << 26


class InputStatistics:
    """Per-channel extremes and moments of activations x, gathered batch by batch.

        minimum_c = min_t x_tc      maximum_c = max_t x_tc      absolute_maximum_c = max_t |x_tc|
        mean_absolute_c = 1/T Σ_t |x_tc|                        second_moment_c = 1/T Σ_t x_tc²

    over all T tokens seen, each float32 of shape [channels]. Every batch is reduced in float32; its sums are added in
    float64 where the device has it, with Kahan's compensation, so that many batches do not lose the small ones. How
    tokens are divided into batches changes the sums by rounding only, and extremes and count not at all.

    Attributes:
        count: tokens seen; with none seen, every statistic is zero.
        non_finite: elements that were NaN or infinite. They count as zero; whether they matter is the caller's to say.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        self.device = torch.device(device)
        self.count = 0
        self.non_finite = 0
        wide = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        self._minimum = torch.full((channels,), torch.inf, device=self.device)
        self._maximum = torch.full((channels,), -torch.inf, device=self.device)
        # Rows: Σ|x|, Σx²; and what their rounding lost.
        self._sums = torch.zeros((2, channels), dtype=wide, device=self.device)
        self._lost = torch.zeros_like(self._sums)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds a batch.

        Args:
            x: activations [..., channels], any floating dtype; the leading dimensions are tokens.

        Raises:
            DataError: the last dimension is not `channels`.
        """
        if x.ndim == 0 or x.shape[-1] != self.channels:
            raise DataError(
                f"Activations of shape {list(x.shape)} do not end in the {self.channels} channels of the linear.",
                "The stored statistics belong to another model; run calibrate again.",
            )
        tokens = x.reshape(-1, self.channels)
        size = _CPU_CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK
        for chunk in tokens.split(max(1, size // max(1, self.channels))):
            if len(chunk):
                self._update(chunk)

    def _update(self, x: Tensor) -> None:
        low, high = x.amin(0).float(), x.amax(0).float()
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):  # NaN and infinity reach an extreme
            self.non_finite += int(x.numel() - torch.isfinite(x).sum())
            x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
            low, high = x.amin(0).float(), x.amax(0).float()
        wide = x.to(torch.float32, copy=True)
        sums = torch.stack((wide.abs_().sum(0), wide.square_().sum(0)))
        torch.minimum(self._minimum, low.to(self.device), out=self._minimum)
        torch.maximum(self._maximum, high.to(self.device), out=self._maximum)
        self._sums, self._lost = add_compensated(self._sums, self._lost, sums.to(self.device))
        self.count += len(x)

    @property
    def minimum(self) -> Tensor:
        return self._minimum.clone() if self.count else torch.zeros_like(self._minimum)

    @property
    def maximum(self) -> Tensor:
        return self._maximum.clone() if self.count else torch.zeros_like(self._maximum)

    @property
    def absolute_maximum(self) -> Tensor:
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    @property
    def mean_absolute(self) -> Tensor:
        return (self._sums[0] / max(1, self.count)).float()

    @property
    def second_moment(self) -> Tensor:
        return (self._sums[1] / max(1, self.count)).float()

    def to_tensors(self) -> dict[str, Tensor]:
        """The statistics on the CPU, for storage: count int64 [1], the others float32 [channels]."""
        return {
            "count": torch.tensor([self.count], dtype=torch.int64),
            "minimum": self.minimum.cpu(),
            "maximum": self.maximum.cpu(),
            "absolute_maximum": self.absolute_maximum.cpu(),
            "mean_absolute": self.mean_absolute.cpu(),
            "second_moment": self.second_moment.cpu(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> InputStatistics:
        """The statistics that to_tensors stored, ready for more batches; `non_finite` is not stored and starts at 0.

        Raises:
            DataError: a tensor is missing or has another shape.
        """
        missing = [key for key in _KEYS if key not in tensors]
        if missing:
            raise DataError(f"The stored statistics lack {', '.join(missing)}.", "Run calibrate again.")
        shape = tensors["minimum"].shape
        if len(shape) != 1 or tensors["count"].numel() != 1 or any(tensors[key].shape != shape for key in _KEYS[1:]):
            raise DataError("The stored statistics do not fit together in shape.", "Run calibrate again.")
        statistics = cls(shape[0], device)
        statistics.count = int(tensors["count"])
        if statistics.count:
            statistics._minimum.copy_(tensors["minimum"])
            statistics._maximum.copy_(tensors["maximum"])
            means = torch.stack((tensors["mean_absolute"], tensors["second_moment"])).to(statistics._sums)
            statistics._sums = means * statistics.count
        return statistics


def add_compensated(total: Tensor, lost: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """total + addend by Kahan's summation (Commun. ACM 8, 1965, p. 40): the new total and what its rounding lost.

    All of one shape; the addend is converted to the total's dtype.
    """
    corrected = addend.to(total.dtype) - lost
    new = total + corrected
    return new, (new - total) - corrected
