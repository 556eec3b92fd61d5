"""What is quantized inside attention, as the stages observe, store and simulate it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from quantcli.calibration.attention_statistics import AttentionStatistics, attention_scales
from quantcli.errors import ModelError
from quantcli.evaluation.simulate_attention import simulated_attention
from quantcli.model.attention import attention_observed
from quantcli.model.structure import Block
from quantcli.pipeline.context import Context
from quantcli.quant.attention import AttentionScales
from quantcli.quant.scheme import AttentionScheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.treatment import Arithmetic


@contextmanager
def attention_statistics(context: Context, module: nn.Module, block: Block) -> Iterator[dict[str, AttentionStatistics]]:
    """Statistics, by the path from the model's root, that fill while the block runs.

    Raises ModelError if its attention cannot be observed.
    """
    cache, heads = context.recipe.quantize.kv_cache, context.recipe.quantize.attention
    recall = None if heads is None else (heads.coverage, heads.coverage, 1.0)
    found: dict[str, AttentionStatistics] = {}

    def receive(path: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = f"{block.name}.{path}"
        if name not in found:
            found[name] = AttentionStatistics.for_shapes(query, key, value, recall=recall, device=context.device)
        found[name].update(query, key, value)

    with attention_observed(module, receive, cache.observe if cache else "cache"):
        yield found
    if not found:
        raise ModelError(f"{block.name} computes attention in a way that cannot be observed.",
                         "Leave out quantize.kv_cache and quantize.attention for this model.")  # fmt: skip
    for name, statistics in found.items():
        if statistics.non_finite:
            raise ModelError(f"{name}: {statistics.non_finite} queries, keys or values are not finite.",
                             "Try model.dtype: float32; if it persists, the weights are damaged.")  # fmt: skip


@contextmanager
def observing_heads(context: Context, stream: BlockStream, block: Block) -> Iterator[dict[str, AttentionStatistics]]:
    """As `attention_statistics`, where queries, keys and values are quantized: those of the quantized model count.

    Of a cache, the float model's do, as in msModelSlim.
    """
    if context.plan.attention is None or not context.plan.attention.heads:
        yield {}
        return
    with attention_statistics(context, stream.skeleton.module(block.name), block) as found:
        yield found


def scales_of(observed: Mapping[str, Tensor], scheme: AttentionScheme, model_dtype: str) -> dict[str, Tensor]:
    """The tensors that the store holds of an attention module, from what was observed of it.

    Scales of channels and heads are rounded to the model's dtype, in which Ascend's engines hold them; fp8 scales are
    float32, as in compressed-tensors.
    """
    statistics = AttentionStatistics.from_tensors(dict(observed))
    kind = scheme.kind
    assert kind != "none"
    dtype = torch.float32 if kind == "fp8" else getattr(torch, model_dtype)
    return attention_scales(statistics, kind, symmetric=scheme.kv_symmetric, dtype=dtype).tensors()


@contextmanager
def attention_as_stored(
    module: nn.Module,
    block: str,
    scheme: AttentionScheme | None,
    parts: Mapping[str, Mapping[str, Tensor]],
    arithmetic: Arithmetic = "engine",
) -> Iterator[None]:
    """While the body runs, attention below the block computes with what an engine would hold.

    `parts` has the stored tensors by the attention module's path from the model's root.
    """
    if scheme is None:
        yield
        return
    kind = scheme.kind
    assert kind != "none"
    scales = {
        path.removeprefix(f"{block}."): AttentionScales(kind, **{name: t.float() for name, t in tensors.items()})
        for path, tensors in parts.items()
        if path.startswith(f"{block}.")
    }
    with simulated_attention(module, scales, cut=arithmetic == "vllm-cpu"):
        yield
