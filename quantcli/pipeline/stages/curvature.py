"""curvature: how errors of outputs add up in the predictions of the float model, for each linear that GPTQ solves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder
from quantcli.pipeline.samples import calibration_samples, spread
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream

GRADIENTS = "gradients"


def _wanted(recipe: Recipe) -> bool:
    return recipe.quantize.mixes and recipe.calibration is not None


def _identity(context: Context) -> dict[str, Any]:
    from quantcli.pipeline.curvature import mixed_linears

    recipe = context.recipe
    assert recipe.calibration is not None
    return {
        "samples": recipe.quantize.gptq.output_samples,
        "calibration": data_identity(recipe.calibration),
        "seed": recipe.calibration.seed,
        "model": [recipe.model.dtype, recipe.model.trust_remote_code, context.device],
        "linears": mixed_linears(context),
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes block-00000.safetensors …: of each linear correlations of its outputs' gradients, and their squares.
    Raises ModelError, with the linear, for gradients that are not finite.

    The float model runs once over the samples, what enters each block is kept, and then the blocks run again, the last
    one first, with gradients.
    """
    import torch

    from quantcli.formats.store import block_file
    from quantcli.model.stream import BlockStream
    from quantcli.model.writer import write_tensors
    from quantcli.pipeline.curvature import block_moments, mixed_linears, sampled_gradients

    calibration = context.recipe.calibration
    assert calibration is not None
    samples = spread(calibration_samples(context).samples, context.recipe.quantize.gptq.output_samples)
    context.emit("tokens", samples=len(samples), tokens=sum(map(len, samples)))
    stream = BlockStream(context.skeleton(), batched(samples))
    states = _forward(context, folder, stream)
    leaving, gradients = states.pop(), _cache(context, folder, stream, GRADIENTS)
    generator = torch.Generator().manual_seed(calibration.seed)
    with stream.head():
        for batch in range(len(stream.batches)):
            gradients.put(batch, sampled_gradients(stream, leaving.get(batch), generator))
    gradients.commit(context.blocks, resumable=False)
    leaving.clear()
    mixed = mixed_linears(context)
    for index in reversed(range(context.blocks)):
        started = time.perf_counter()
        wanted = {name: context.linears[name].out_features for name in mixed if context.linear_blocks[name] == index}
        entering = states.pop()
        tensors: dict[str, Tensor] = {}
        for name, moments in block_moments(stream, index, entering, gradients, wanted).items():
            correlation, second_moment, share = moments.shrunk()
            if not bool(second_moment.isfinite().all()):
                raise ModelError(f"{name}: gradients of its outputs are not finite.",
                                 "Try model.dtype: float32, or leave out quantize.gptq.output_samples.")  # fmt: skip
            tensors |= {f"{name}.correlation": correlation, f"{name}.second_moment": second_moment}
            context.emit("outputs", module=name, kept=round(share, 3))
        entering.clear()
        file = block_file(folder.path, index)
        folder.add(file, write_tensors(file, tensors, "quantcli-curvature"))
        seconds = round(time.perf_counter() - started, 3)
        context.emit("block", index=context.blocks - 1 - index, of=context.blocks, seconds=seconds, model="backward")
    gradients.clear()


def _forward(context: Context, folder: StageFolder, stream: BlockStream) -> list[HiddenCache]:
    """What enters each block of the float model, and last what leaves the last one."""
    states = [_cache(context, folder, stream, "entering-00000")]
    stream.enter(states[0], None)
    for index in range(context.blocks):
        started = time.perf_counter()
        behind = _cache(context, folder, stream, f"entering-{index + 1:05d}")
        with stream.block(index):
            for batch in range(len(stream.batches)):
                behind.put(batch, stream.run(index, batch, states[-1].get(batch)))
        behind.commit(0, resumable=False)
        states.append(behind)
        seconds = round(time.perf_counter() - started, 3)
        context.emit("block", index=index, of=context.blocks, seconds=seconds, model="float")
    return states


def _cache(context: Context, folder: StageFolder, stream: BlockStream, name: str) -> HiddenCache:
    """One of as many as there are blocks, which have the memory of one together."""

    from quantcli.model.hidden import HiddenCache

    limit = context.recipe.model.cache_memory // (context.blocks + 2)
    return HiddenCache(folder.path / name, stream.hidden_shapes(), stream.skeleton.dtype, limit)


def _writes(context: Context) -> tuple[str, ...]:
    from quantcli.formats.store import block_file

    kept = (f"entering-{index:05d}/*" for index in range(context.blocks + 1))
    files = (block_file(Path(), index).name for index in range(context.blocks))
    return (*files, *kept, f"{GRADIENTS}/*")


STAGE = Stage(
    "curvature",
    ("select", "smooth"),
    _wanted,
    _identity,
    run,
    _writes,
    guards=("check",),
    title="Looking how errors of outputs add up",
    asked_by="quantize.gptq.output_samples",
)
