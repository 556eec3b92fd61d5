"""calibrate: run the float model over the calibration tokens, block by block, and keep input statistics of linears."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.model.structure import Block
from quantcli.pipeline.batches import batched, data_identity, texts_of
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.plan import needs_calibration
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

    from quantcli.calibration.statistics import InputStatistics

MANIFEST = "manifest.json"
HIDDEN = "hidden"


def _wanted(recipe: Recipe) -> bool:
    return recipe.calibration is not None and needs_calibration(recipe)


def _identity(context: Context) -> dict[str, Any]:
    assert context.recipe.calibration is not None
    return {"calibration": data_identity(context.recipe.calibration), "model": _reading(context)}


def _reading(context: Context) -> dict[str, Any]:
    section = context.recipe.model
    return {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code, "device": context.device}


def run(context: Context, folder: StageFolder) -> None:
    """Writes block-00000.safetensors …, with the InputStatistics of each shared input, and manifest.json."""
    import torch

    from quantcli.calibration.tokens import tokenize
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream

    section = context.recipe.calibration
    assert section is not None
    recorded = [_block_file(index) in folder.files for index in range(context.blocks)]
    if MANIFEST in folder.files and all(recorded):
        HiddenCache(folder.path / HIDDEN, [], torch.float32).clear()
        return
    found = tokenize(
        context.tokenizer(),
        texts_of(section),
        samples=section.samples,
        sequence_length=section.sequence_length,
        packing=section.packing,
        seed=section.seed,
    )
    context.emit("tokens", samples=len(found.samples), tokens=found.tokens, documents=found.documents_used)
    if found.note:
        context.emit("note", text=found.note)
    skeleton = context.skeleton()
    stream = BlockStream(skeleton, batched(found.samples))
    cache = HiddenCache(folder.path / HIDDEN, stream.hidden_shapes(), skeleton.dtype)
    done = cache.resume()
    if done is not None and not all(recorded[:done]):
        done = None  # statistics of an earlier block are gone, and so are the hidden states that made them
    for index in range(stream.enter(cache, done), context.blocks):
        started = time.perf_counter()
        block = context.plan.structure.blocks[index]
        with stream.block(index) as module:
            statistics, handles = _observe(module, block, context.device)
            for batch in range(len(stream.batches)):
                cache.put(batch, stream.run(index, batch, cache.get(batch)))
            for handle in handles:
                handle.remove()
        _check(block, statistics)
        _write(folder, index, statistics)
        cache.commit(index + 1)
        context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))
    write_json(folder.path / MANIFEST, _manifest(context, found.tokens))
    folder.add(folder.path / MANIFEST)
    cache.clear()


def _observe(module: nn.Module, block: Block, device: str) -> tuple[dict[str, InputStatistics], list[Any]]:
    """Statistics that fill while the block runs: one for each shared input, hooked at its first reader."""
    from quantcli.calibration.statistics import InputStatistics

    statistics: dict[str, InputStatistics] = {}
    handles = []
    for shared in block.inputs:
        gathered = statistics[shared.name] = InputStatistics(shared.width, device)

        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _gathered: InputStatistics = gathered
        ) -> None:
            _gathered.update(args[0] if args else next(iter(kwargs.values())))

        reader = module.get_submodule(shared.name.removeprefix(f"{block.name}."))
        handles.append(reader.register_forward_pre_hook(hook, with_kwargs=True))
    return statistics, handles


def _check(block: Block, statistics: dict[str, InputStatistics]) -> None:
    for name, gathered in statistics.items():
        if gathered.non_finite:
            raise ModelError(f"{name}: {gathered.non_finite} input values are not finite during calibration.",
                             "Try model.dtype: float32; if it persists, the weights are damaged.")  # fmt: skip
        if gathered.count == 0:
            raise ModelError(f"{name} in {block.name} saw no token during calibration.", "Use more calibration text.")


def _write(folder: StageFolder, index: int, statistics: dict[str, InputStatistics]) -> None:
    from quantcli.model.writer import PlannedTensor, split_shards, write_safetensors

    tensors = {
        f"{name}.{part}": t for name, gathered in statistics.items() for part, t in gathered.to_tensors().items()
    }
    (planned,) = split_shards([PlannedTensor(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], 1 << 62)
    file = folder.path / _block_file(index)
    digest = write_safetensors(file, planned, tensors.__getitem__, {"format": "quantcli-statistics"})
    folder.add(file, digest)


def _block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _manifest(context: Context, tokens: int) -> dict[str, Any]:
    """Which statistics belong to which linear."""
    inputs = {
        linear: {"block": index, "input": shared.name}
        for index, block in enumerate(context.plan.structure.blocks)
        for shared in block.inputs
        for linear in shared.linears
    }
    return {"tokens": tokens, "linears": inputs}


def _writes(context: Context) -> tuple[str, ...]:
    return (*(_block_file(index) for index in range(context.blocks)), MANIFEST, f"{HIDDEN}/*")


STAGE = Stage("calibrate", (), _wanted, _identity, run, _writes, guards=("check",))
