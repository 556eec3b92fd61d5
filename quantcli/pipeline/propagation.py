"""Static input scales found on the quantized model: each block runs with quantized linears while it is observed.

msModelSlim calibrates so: every sample is quantized with the statistics of the samples up to it, and what the quantized
linears put out enters the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantcli.calibration.statistics import InputStatistics
from quantcli.errors import ModelError
from quantcli.evaluation.simulate import Replacement, simulated
from quantcli.formats.store import StoredLinear
from quantcli.model.hidden import HiddenCache
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Block, SharedInput
from quantcli.pipeline.plan import Treatment
from quantcli.pipeline.treatment import dequantized, input_parameters, observed_of, replacement, with_input
from quantcli.quant.activation import quantize_static, static_parameters

if TYPE_CHECKING:
    from quantcli.recipe.quantization import ActivationsSection


def propagates(treatments: Mapping[str, Treatment]) -> bool:
    """Whether any static scale has to be found on the quantized model."""
    return any(t.scheme.observed and t.activations.propagation == "quantized" for t in treatments.values())


class RunningInput:
    """One input, quantized with what has been observed of it up to and including the sample at hand.

    The range is the running one of the extremes, by `aggregation`; the scale is that of `static_parameters`. A value
    takes its quantized value with probability `quantized_share` (msModelSlim's `pr`); a negative share is drawn anew
    for each batch. `seed` fixes what is drawn. `entered` is the shape [samples, tokens] of the batch that enters the
    block: OPT hands all its tokens to some linears as one sequence, and samples are told apart all the same.
    """

    def __init__(self, width: int, section: ActivationsSection, device: str, seed: int) -> None:
        self.section = section
        self.statistics = InputStatistics(width, device, counts=section.method != "minmax")
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._last: tuple[Tensor, Tensor] | None = None
        self.entered = torch.Size()

    def __call__(self, x: Tensor) -> Tensor:
        """x [samples, tokens, width] or [tokens, width] as it enters the product, in its own dtype."""
        if self._last is None or self._last[0] is not x:  # linears that share an input get one tensor
            apart = x.reshape(*self.entered, -1) if x.ndim == 2 and len(x) == self.entered.numel() else x
            self._last = (x, self._quantized(apart).view_as(x))
        return self._last[1]

    def _quantized(self, x: Tensor) -> Tensor:
        before = len(self.statistics.sample_minimum)
        self.statistics.update(x)
        low, high = self.statistics.sample_minimum.cpu(), self.statistics.sample_maximum.cpu()
        if self.section.aggregation == "mean":
            count = torch.arange(1, len(low) + 1, dtype=torch.float32)
            low, high = low.cumsum(0) / count, high.cumsum(0) / count
        else:
            low, high = low.cummin(0).values, high.cummax(0).values
        samples = x.unsqueeze(0) if x.ndim == 2 else x
        parts = []
        for sample, least, most in zip(samples, low[before:].tolist(), high[before:].tolist(), strict=True):
            parameters = static_parameters(least, most, self.section.symmetric, self.section.type)
            scale, zero = (p.to(x.device) for p in parameters)
            codes = quantize_static(sample, scale, zero, self.section.type).float()
            parts.append(codes.sub_(zero.float()).mul_(scale).to(x.dtype))
        return self._mixed(torch.stack(parts).view_as(x), x)

    def _mixed(self, quantized: Tensor, x: Tensor) -> Tensor:
        share = self.section.quantized_share
        if share < 0:
            share = float(torch.rand((), generator=self._generator))
        if share == 1:
            return quantized
        drawn = torch.rand(x.shape, generator=self._generator).to(x.device)
        return torch.where(drawn < share, quantized, x)


@torch.inference_mode()
def propagate_block(
    stream: BlockStream,
    index: int,
    block: Block,
    cache: HiddenCache,
    stored: Mapping[str, StoredLinear],
    treatments: Mapping[str, Treatment],
    statistics: Callable[[str], Mapping[str, Tensor]],
    seed: int,
    anew: Callable[[], None] = lambda: None,
) -> tuple[dict[str, StoredLinear], dict[str, dict[str, float]]]:
    """Run one block quantized over all batches of `cache`, find its static scales, and put what leaves it.

    `stored` has the codes of the block's quantized linears; `statistics` gives what the float pass observed of one, for
    those whose scale is found there. Returns the linears with their input scales, and facts about the ranges. Where the
    range is more than running extremes, the block runs a second time with the final scales; `anew` is called before.
    """
    device = str(stream.skeleton.device)
    dtype = stream.skeleton.dtype
    found = dict(stored)
    facts: dict[str, dict[str, float]] = {}
    running: dict[str, RunningInput] = {}
    for position, shared in enumerate(block.inputs):
        quantizers: dict[ActivationsSection, RunningInput] = {}
        for name in shared.linears:
            treatment = treatments.get(name)
            if treatment is None or not treatment.scheme.observed:
                continue
            if treatment.activations.propagation == "float":
                scale, zero, facts[name] = input_parameters(observed_of(statistics(name)), treatment)
                found[name] = with_input(stored[name], scale, zero)
                continue
            section = treatment.activations
            if section not in quantizers:
                seeded = ((seed * 1_000_003 + index) * 1_009 + position) % 2**63
                quantizers[section] = RunningInput(shared.width, section, device, seeded)
            running[name] = quantizers[section]

    def replacements(final: bool) -> dict[str, Replacement]:
        made: dict[str, Replacement] = {}
        for name, entry in found.items():
            short = name.removeprefix(f"{block.name}.")
            if name in running and not final:
                made[short] = _through(running[name], dequantized(entry, dtype, device))
            else:
                made[short] = replacement(entry, treatments[name].scheme, dtype, device, "decode")
        return made

    with stream.block(index) as module:
        with simulated(module, replacements(final=not running), block.local_experts):
            for batch in range(len(stream.batches)):
                for quantizer in running.values():
                    quantizer.entered = stream.batches[batch].shape
                cache.put(batch, stream.run(index, batch, cache.get(batch)))
        for name, quantizer in running.items():
            require_finite(name, quantizer.statistics)
            observed = observed_of(quantizer.statistics.to_tensors())
            scale, zero, facts[name] = input_parameters(observed, treatments[name])
            found[name] = with_input(stored[name], scale, zero)
        if any(quantizer.section.method != "minmax" for quantizer in running.values()):
            anew()
            with simulated(module, replacements(final=True), block.local_experts):
                for batch in range(len(stream.batches)):
                    cache.put(batch, stream.run(index, batch, cache.get(batch)))
    return found, facts


def _through(quantizer: RunningInput, weight: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda module, x: linear(quantizer(x), weight, getattr(module, "bias", None))


def require_finite(name: str, statistics: InputStatistics) -> None:
    """Raise ModelError, with the linear, if a value that entered it was NaN or infinite."""
    if statistics.non_finite:
        raise ModelError(f"{name}: {statistics.non_finite} input values are not finite during calibration.",
                         "Try model.dtype: float32; if it persists, the weights are damaged.")  # fmt: skip


@torch.inference_mode()
def observe_head(
    stream: BlockStream, cache: HiddenCache, head: SharedInput, device: str, counts: bool
) -> InputStatistics:
    """Statistics of what enters the output head, over the hidden states that left the last block."""
    statistics = InputStatistics(head.width, device, counts=counts)
    module = stream.skeleton.module(head.name)
    pieces: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, args: pieces.append(args[0]))
    try:
        with stream.head():
            for batch in range(len(stream.batches)):
                for _ in stream.logits(cache.get(batch)):
                    pass
                statistics.update(torch.cat(pieces, dim=1))  # the head runs on pieces of the positions
                pieces.clear()
    finally:
        handle.remove()
    require_finite(head.name, statistics)
    return statistics
