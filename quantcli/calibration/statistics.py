"""Streaming statistics of what enters a linear layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import DataError
from quantcli.model.structure import Block
from quantcli.quant.observers import VALUES, count_patterns, in_order

_PER_CHANNEL = ("minimum", "maximum", "absolute_maximum")
_PER_SAMPLE = ("sample_minimum", "sample_maximum")
RANGE_PARM_SAMPLES = 5
"""Samples that range_parm is about: the first ones."""
EXACT_VALUES = 1 << 20
"""Values up to which all are counted (whole tokens, the last one beyond it included), and after which one token in
COUNTED is, for that many."""
COUNTED = 4
# Elements reduced or counted at once: copies that stay small. Smaller pieces would fit a CPU's cache, but gain
# nothing measurable, and each needs its threads to meet some ten times, which waits on a machine with other work.
_CPU_CHUNK = 1 << 21
_DEVICE_CHUNK = 1 << 26
_SIGN = -(1 << 15)  # the sign bit of 16, as a signed integer
_GOLDEN = 2654435769  # 2^32 (√5 - 1) / 2
_local = threading.local()


class InputStatistics:
    """Extremes, second moments and value counts of activations x, gathered batch by batch.

        minimum_c = min_t x_tc      maximum_c = max_t x_tc      absolute_maximum_c = max_t |x_tc|
        second_moment_c = 1/T Σ_t x_tc²

    over all T tokens seen, each float32 of shape [channels]. Squares are added in float32 within a batch, and from
    batch to batch in float64 where the device has it, with Kahan's compensation, so that many batches do not lose the
    small ones. How tokens are divided into batches changes moments by rounding only, and the rest not at all.

    Over all channels: the extremes of each sample, `range_parm`, and with `counts` how often each value occurs when
    rounded to bfloat16. Counts are exact for the first ceil(EXACT_VALUES / channels) tokens. Of those that follow, the
    tokens t (from 0) with t φ mod 1 < 1 / COUNTED are counted, φ = (√5 - 1) / 2, each COUNTED times: multiples of φ are
    spread evenly along any regular subset of tokens, such as the first of each sample (Weyl's theorem; Knuth, TAOCP 3,
    6.4). Extremes are always those of all values. On SmolLM2 (32 samples of 512 tokens, inputs of two blocks) the
    expected squared error of ranges that `mse` and `histogram` find so is at most 0.5 % above that of exact counts.

    Args:
        counts: whether to count values.
        moments: whether to gather second moments.

    Attributes:
        count: tokens seen; with none seen, every statistic is zero.
        non_finite: elements that were NaN or infinite. They count as zero; whether they matter is the caller's to say.
    """

    def __init__(
        self, channels: int, device: torch.device | str = "cpu", *, counts: bool = True, moments: bool = True
    ) -> None:
        self.channels = channels
        self.device = torch.device(device)
        self.count = 0
        self.non_finite = 0
        wide = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        self._minimum = torch.full((channels,), torch.inf, device=self.device)
        self._maximum = torch.full((channels,), -torch.inf, device=self.device)
        self._squares = torch.zeros(channels, dtype=wide, device=self.device) if moments else None
        self._lost = torch.zeros(channels, dtype=wide, device=self.device)  # what the rounding of their sums lost
        self._samples = torch.zeros((2, 0), device=self.device)  # rows: minimum, maximum
        self._spread = 0.0  # largest standard deviation among the first samples
        self._patterns = torch.zeros(VALUES, dtype=torch.int64, device=self.device) if counts else None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds a batch.

        Args:
            x: activations [samples, ..., channels], any floating dtype; the dimensions between are tokens. [tokens,
                channels] is one sample.

        Raises:
            DataError: the last dimension is not `channels`.
        """
        if x.ndim == 0 or x.shape[-1] != self.channels:
            raise DataError(
                f"Activations of shape {list(x.shape)} do not end in the {self.channels} channels of the linear.",
                "The stored statistics belong to another model; run calibrate again.",
            )
        if not x.numel():
            return
        x = x.reshape(x.shape[0] if x.ndim > 2 else 1, -1, self.channels)
        low, high = _extremes(x)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):  # NaN and infinity reach an extreme
            finite = torch.isfinite(x)
            self.non_finite += int(x.numel() - finite.sum())
            x = x.where(finite, 0)
            low, high = _extremes(x)
        first = x[: max(0, RANGE_PARM_SAMPLES - self._samples.shape[1])]
        for sample, shift in zip(first, low + high, strict=False):
            self._spread = max(self._spread, _deviation(sample, shift))
        samples = torch.stack((low.amin(1), high.amax(1)))
        self._samples = torch.cat((self._samples, samples.to(self.device)), 1)
        torch.minimum(self._minimum, low.amin(0).to(self.device), out=self._minimum)
        torch.maximum(self._maximum, high.amax(0).to(self.device), out=self._maximum)
        tokens = x.reshape(-1, self.channels)
        if self._squares is not None:
            squares = _squares(tokens).to(self.device)
            self._squares, self._lost = add_compensated(self._squares, self._lost, squares)
        if self._patterns is not None:
            self._count_values(tokens, self._patterns)
        self.count += len(tokens)

    def _count_values(self, tokens: Tensor, patterns: Tensor) -> None:
        """Adds to the counts, `self.count` tokens having been seen before these [tokens, channels]."""
        exact = min(len(tokens), max(0, math.ceil(EXACT_VALUES / self.channels) - self.count))
        index = torch.arange(self.count + exact, self.count + len(tokens), device=tokens.device)
        sampled = (index * _GOLDEN) % (1 << 32) < (1 << 32) // COUNTED
        for part, weight in ((tokens[:exact], 1), (tokens[exact:][sampled], COUNTED)):
            for piece in part.reshape(-1).split(_chunk(tokens.device)):
                patterns += weight * count_patterns(piece, _scratch(piece, torch.int32)).to(self.device)

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
    def second_moment(self) -> Tensor | None:
        """None if not gathered."""
        return None if self._squares is None else (self._squares / max(1, self.count)).float()

    @property
    def sample_minimum(self) -> Tensor:
        """Least value of each sample, in the order they were seen: float32 [samples]. Empty samples are no samples."""
        return self._samples[0].clone()

    @property
    def sample_maximum(self) -> Tensor:
        """Greatest value of each sample, likewise."""
        return self._samples[1].clone()

    @property
    def range_parm(self) -> float:
        """max|x| / max_i std(x_i - shift_i) over the first five samples, shift_ic = max_t x_itc + min_t x_itc.

        The measure by which msModelSlim (v0) ranks linears for rollback and chooses observers: the shift is not halved,
        std is unbiased over all elements of sample i. Without any spread it is infinite, of zeros 0.
        """
        largest = float(self._samples[:, :RANGE_PARM_SAMPLES].abs().amax()) if self._samples.numel() else 0.0
        if self._spread:
            return largest / self._spread
        return math.inf if largest else 0.0

    @property
    def value_counts(self) -> Tensor | None:
        """How often each value occurred, rounded to bfloat16: int64 [65536] in the order of `observers.bin_values`.

        Beyond EXACT_VALUES an estimate. Float32 and float16 are rounded to nearest, ties to even. None if not counted.
        """
        return None if self._patterns is None else in_order(self._patterns)

    def to_tensors(self) -> dict[str, Tensor]:
        """The statistics on the CPU, for storage.

        count int64 [1]; minimum, maximum, absolute_maximum float32 [channels]; sample_minimum, sample_maximum float32
        [samples]; range_parm float32 [1]; if gathered, second_moment float32 [channels] and value_counts int64 [65536].
        """
        tensors = {"count": torch.tensor([self.count], dtype=torch.int64)}
        tensors |= {key: getattr(self, key).cpu() for key in (*_PER_CHANNEL, *_PER_SAMPLE)}
        tensors["range_parm"] = torch.tensor([self.range_parm], dtype=torch.float32)
        optional = {"second_moment": self.second_moment, "value_counts": self.value_counts}
        return tensors | {key: tensor.cpu() for key, tensor in optional.items() if tensor is not None}


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest values of each sample of [samples, tokens, channels], float32 [samples, channels] each.

    A NaN or an infinity makes one of them not finite. A CPU compares 16-bit integers ten times as fast as 16-bit
    floats. A float's pattern is sign and magnitude: of signed integers, the greatest is the greatest of what is
    positive, and the least is the nearest to zero of what is negative; with the sign turned, the greatest is the
    farthest from zero of what is negative.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x.amin(1).float(), x.amax(1).float()
    parts = [_pattern_extremes(part) for part in x.split(max(1, _chunk(x.device) // max(1, x[0].numel())))]
    low, high = (torch.cat(side).view(x.dtype).float() for side in zip(*parts, strict=True))
    return low, high


def _pattern_extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int16)
    least, most = bits.amin(1), bits.amax(1)
    far = torch.bitwise_xor(bits, _SIGN, out=_scratch(bits, torch.int16)).amax(1).bitwise_xor_(_SIGN)
    return torch.where(far < 0, far, least), torch.where(most >= 0, most, least)


def _squares(tokens: Tensor) -> Tensor:
    """Σ_t x_tc² of [tokens, channels], float32."""
    sums = torch.zeros(tokens.shape[1], device=tokens.device)
    for part in tokens.split(max(1, _chunk(tokens.device) // tokens.shape[1])):
        sums += _scratch(part, torch.float32).copy_(part).square_().sum(0)
    return sums


def _deviation(sample: Tensor, shift: Tensor) -> float:
    """Unbiased standard deviation of x_tc - shift_c over all elements of [tokens, channels], 0 of one alone.

    shift: max_c + min_c, float32 [channels]. Half its mean is about what the mean of the difference would be, up to the
    sign; with it added, the squares lose nothing to a common offset.
    """
    wide = _scratch(sample, torch.float32).copy_(sample)
    wide -= shift - shift.mean() / 2
    total, squares, n = float(wide.sum()), float(wide.square_().sum()), wide.numel()
    return math.sqrt(max(0.0, squares - total * total / n) / max(1, n - 1))


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _scratch(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory in the shape of x to overwrite, of a dtype of 4 bytes or 2; on a CPU the same each time, for each thread.

    There new memory comes as pages that are mapped at first touch, which takes longer than to count what is put there.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    memory: Tensor | None = getattr(_local, "memory", None)
    if memory is None or memory.numel() < x.numel():
        with torch.inference_mode(False):  # usable in both modes
            memory = _local.memory = torch.empty(x.numel(), dtype=torch.int32)
    return memory.view(dtype)[: x.numel()].view(x.shape)


@contextmanager
def inputs_observed(
    module: nn.Module, block: Block, device: str, *, counts: bool = True, moments: bool = True
) -> Iterator[dict[str, InputStatistics]]:
    """Statistics that fill while the body runs `module`, the block: one for each shared input, by its name, hooked at
    its first reader. `counts` and `moments` as of `InputStatistics`."""
    found = {
        shared.name: InputStatistics(shared.width, device, counts=counts, moments=moments) for shared in block.inputs
    }

    entered = torch.Size()

    def enters(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal entered
        entered = (args[0] if args else kwargs["hidden_states"]).shape[:-1]

    def hook(gathered: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def reads(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # OPT hands all tokens of a batch to some linears as one sequence; samples are told apart all the same
            gathered.update(x.reshape(*entered, -1) if x.ndim == 2 and len(x) == entered.numel() else x)

        return reads

    handles = [module.register_forward_pre_hook(enters, with_kwargs=True)]
    handles += [
        module.get_submodule(name.removeprefix(f"{block.name}.")).register_forward_pre_hook(
            hook(gathered), with_kwargs=True
        )
        for name, gathered in found.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def add_compensated(total: Tensor, lost: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """total + addend by Kahan's summation (Commun. ACM 8, 1965, p. 40): the new total and what its rounding lost.

    All of one shape; the addend is converted to the total's dtype.
    """
    corrected = addend.to(total.dtype) - lost
    new = total + corrected
    return new, (new - total) - corrected
