"""Streaming statistics of queries, keys and values of one attention module."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantcli.errors import DataError
from quantcli.quant.attention import (
    AttentionScales,
    fp8_scale,
    int8_channel_scales,
    int8_head_scales,
    recall_window,
)

_WINDOWS = ("query_window", "key_window", "value_window")
_EXTREMES = ("key_minimum", "key_maximum", "value_minimum", "value_maximum")


class AttentionStatistics:
    """What scales of a cache and of heads are computed from, gathered batch by batch in bounded memory.

    Attributes:
        key_minimum, key_maximum: extremes over all tokens of each key channel, float32 [kv_heads * key_size], channels
            of a head side by side; value_minimum and value_maximum likewise.
        query_window: [heads, 2], the ends of an interval that holds every sample's recall window of the head (see
            `quant.attention.recall_window`); key_window and value_window likewise, [kv_heads, 2]. None without
            `recall`. The window is each sample's own, so that nothing but its ends is kept.
        count: tokens seen; with none seen, every statistic is zero.
        non_finite: elements that were NaN or infinite. They count as zero; whether they matter is the caller's to say.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        key_size: int,
        value_size: int,
        *,
        recall: tuple[float, float, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """`recall` has the ratios of queries, keys and values; without it, windows are not looked for."""
        self.sizes = (heads, kv_heads, key_size, value_size)
        self.recall = recall
        self.device = torch.device(device)
        self.count = 0
        self.non_finite = 0
        channels = (kv_heads * key_size, kv_heads * value_size)
        rows = (heads, kv_heads, kv_heads)
        # Of (query,) key, value: minimum and maximum, in rows.
        self._extremes = [self._nothing_seen(width) for width in channels]
        self._windows = [self._nothing_seen(height) for height in rows] if recall else []

    @classmethod
    def for_shapes(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        recall: tuple[float, float, float] | None = None,
        device: torch.device | str = "cpu",
    ) -> AttentionStatistics:
        """Empty statistics of the sizes of these tensors, which are not counted."""
        return cls(query.shape[1], key.shape[1], key.shape[3], value.shape[3], recall=recall, device=device)

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Adds samples: query [samples, heads, tokens, size], key and value [samples, kv_heads, tokens, size].

        Raises:
            DataError: the shapes are another module's.
        """
        heads, kv_heads, key_size, value_size = self.sizes
        samples, _, tokens, _ = key.shape
        expected = [(samples, heads, tokens, key_size), (samples, kv_heads, tokens, key_size),
                    (samples, kv_heads, tokens, value_size)]  # fmt: skip
        if [tuple(x.shape) for x in (query, key, value)] != expected:
            raise DataError(
                f"Queries, keys and values of shapes {list(query.shape)}, {list(key.shape)} and {list(value.shape)} do "
                f"not fit {heads} heads and {kv_heads} KV heads of sizes {key_size} and {value_size}.",
                "The stored statistics belong to another model; run calibrate again.",
            )
        if not key.numel():
            return
        query, key, value = (self._finite(x) for x in (query, key, value))
        for extremes, x in zip(self._extremes, (key, value), strict=True):
            _extend(extremes, x.amin((0, 2)).flatten(), x.amax((0, 2)).flatten())
        if self.recall:
            for window, x, ratio in zip(self._windows, (query, key, value), self.recall, strict=True):
                low, high = recall_window(x.reshape(samples * x.shape[1], -1), ratio)
                _extend(window, low.view(samples, -1).amin(0), high.view(samples, -1).amax(0))
        self.count += samples * tokens

    def _finite(self, x: Tensor) -> Tensor:
        wrong = int(x.numel() - torch.isfinite(x).sum())
        if not wrong:
            return x
        self.non_finite += wrong
        return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)

    def _nothing_seen(self, size: int) -> Tensor:
        return torch.tensor([[torch.inf], [-torch.inf]], device=self.device).repeat(1, size)

    def _seen(self, extremes: Tensor) -> Tensor:
        return extremes.clone() if self.count else torch.zeros_like(extremes)

    @property
    def key_minimum(self) -> Tensor:
        return self._seen(self._extremes[0])[0]

    @property
    def key_maximum(self) -> Tensor:
        return self._seen(self._extremes[0])[1]

    @property
    def value_minimum(self) -> Tensor:
        return self._seen(self._extremes[1])[0]

    @property
    def value_maximum(self) -> Tensor:
        return self._seen(self._extremes[1])[1]

    @property
    def query_window(self) -> Tensor | None:
        return self._seen(self._windows[0]).t().contiguous() if self.recall else None

    @property
    def key_window(self) -> Tensor | None:
        return self._seen(self._windows[1]).t().contiguous() if self.recall else None

    @property
    def value_window(self) -> Tensor | None:
        return self._seen(self._windows[2]).t().contiguous() if self.recall else None

    def to_tensors(self) -> dict[str, Tensor]:
        """The statistics on the CPU, for storage: count int64 [1], sizes int64 [4] (heads, kv_heads, key_size,
        value_size), the four extremes float32 [channels]; with recall, its ratios float64 [3] and three windows."""
        tensors = {"count": torch.tensor([self.count]), "sizes": torch.tensor(self.sizes)}
        tensors |= {name: getattr(self, name).cpu() for name in _EXTREMES}
        if self.recall:
            tensors["recall"] = torch.tensor(self.recall, dtype=torch.float64)
            tensors |= {name: getattr(self, name).cpu() for name in _WINDOWS}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> AttentionStatistics:
        """The statistics that to_tensors stored, ready for more batches; `non_finite` is not stored and starts at 0.

        Raises:
            DataError: a tensor is missing or has another shape.
        """
        wanted = ["count", "sizes", *_EXTREMES, *(_WINDOWS if "recall" in tensors else ())]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise DataError(f"The stored statistics lack {', '.join(missing)}.", "Run calibrate again.")
        recall = tensors["recall"].tolist() if "recall" in tensors else None
        if tensors["sizes"].shape != (4,) or tensors["count"].numel() != 1 or (recall and len(recall) != 3):
            raise DataError("The stored statistics do not fit together in shape.", "Run calibrate again.")
        heads, kv_heads, key_size, value_size = (int(size) for size in tensors["sizes"])
        statistics = cls(heads, kv_heads, key_size, value_size, recall=tuple(recall) if recall else None, device=device)
        empty = statistics.to_tensors()
        if any(tensors[name].shape != empty[name].shape for name in wanted):
            raise DataError("The stored statistics do not fit together in shape.", "Run calibrate again.")
        statistics.count = int(tensors["count"])
        if statistics.count:
            for extremes, name in zip(statistics._extremes, ("key", "value"), strict=True):
                extremes.copy_(torch.stack([tensors[f"{name}_minimum"], tensors[f"{name}_maximum"]]))
            for window, name in zip(statistics._windows, _WINDOWS if recall else (), strict=True):
                window.copy_(tensors[name].t())
        return statistics


def attention_scales(
    statistics: AttentionStatistics,
    kind: Literal["int8", "fp8", "heads"],
    *,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AttentionScales:
    """The scales that `quant.attention` makes of the statistics; `dtype` is what the checkpoint holds them in.

    `symmetric` is about int8 caches; the other kinds always are.

    Raises:
        DataError: no token was seen, or `heads` without windows.
    """
    if not statistics.count:
        raise DataError("No token reached this attention module.", "Calibrate with more samples.")
    extremes = {
        "k": (statistics.key_minimum, statistics.key_maximum),
        "v": (statistics.value_minimum, statistics.value_maximum),
    }
    if kind == "fp8":
        return AttentionScales("fp8", **{f"{x}_scale": fp8_scale(*ends, dtype) for x, ends in extremes.items()})
    if kind == "int8":
        k_scale, k_offset = int8_channel_scales(*extremes["k"], symmetric, dtype)
        v_scale, v_offset = int8_channel_scales(*extremes["v"], symmetric, dtype)
        return AttentionScales("int8", k_scale, v_scale, k_offset, v_offset)
    scales = {}
    for name, window in zip("qkv", (getattr(statistics, window) for window in _WINDOWS), strict=True):
        if window is None:
            raise DataError("The stored statistics have no recall windows.", "Run calibrate again.")
        scales[f"fa_{name}_scale"] = int8_head_scales(window[:, 0], window[:, 1], dtype)
    return AttentionScales("heads", **scales)


def _extend(extremes: Tensor, low: Tensor, high: Tensor) -> None:
    """In place on [2, n]: the first row down to `low`, the second up to `high`."""
    torch.minimum(extremes[0], low.to(extremes), out=extremes[0])
    torch.maximum(extremes[1], high.to(extremes), out=extremes[1])
