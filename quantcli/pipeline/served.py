"""The exported model computing as engines serve it, one block at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantcli.pipeline.context import Context

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.evaluation.simulate import Replacement
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.skeleton import Skeleton
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.treatment import Arithmetic, Phase


def exported_model(context: Context) -> tuple[Skeleton, QuantizedCheckpoint]:
    """The model as its first export has it: without weights, and the checkpoint that they are read from."""
    from quantcli.model.skeleton import Skeleton

    exported = exported_checkpoint(context)
    skeleton = Skeleton(
        context.model,
        context.structure,
        dtype=exported.dtype,
        device=context.device,
        trust_remote_code=context.recipe.model.trust_remote_code,
        checkpoint=exported,
        untied=context.untied,
    )
    return skeleton, exported


def exported_checkpoint(context: Context) -> QuantizedCheckpoint:
    """The first export, as it is read back."""
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.pipeline.stages.export import float_source

    assert context.recipe.export is not None
    folder = context.folder("export") / context.recipe.export.formats[0]
    return QuantizedCheckpoint(folder, context.linears, float_source(context).weights)


def advance(
    name: str,
    stream: BlockStream,
    cache: HiddenCache,
    exported: QuantizedCheckpoint | None,
    phase: Phase,
    emit: Callable[..., None],
    arithmetic: Arithmetic = "engine",
) -> None:
    """Carry the hidden states of one model through all its blocks, going on where an interrupted run stopped.

    `exported` is the checkpoint that a quantized model is read from; `emit` is told of every block.
    """
    blocks = len(stream.skeleton.blocks)
    for index in range(stream.enter(cache, cache.resume()), blocks):
        started = time.perf_counter()
        with block_as_served(stream.skeleton, index, exported, phase, arithmetic):
            for batch in range(len(stream.batches)):
                cache.put(batch, stream.run(index, batch, cache.get(batch)))
        cache.commit(index + 1)
        seconds = round(time.perf_counter() - started, 3)
        emit("block", index=index, of=blocks, model=name, seconds=seconds)


@contextmanager
def block_as_served(
    skeleton: Skeleton,
    index: int,
    exported: QuantizedCheckpoint | None,
    phase: Phase | None,
    arithmetic: Arithmetic = "engine",
) -> Iterator[None]:
    """A resident block; of a quantized model, with linears and attention computing as an engine does. Without a phase
    inputs of one token are taken for what is decoded, and longer ones for prompts."""
    from quantcli.evaluation.simulate import not_read, simulated
    from quantcli.pipeline.attention import attention_as_stored

    path = skeleton.blocks[index]
    if exported is None:
        with skeleton.resident(skeleton.parameter_names(path)):
            yield
        return
    replaced = _replaced(skeleton, exported, f"{path}.", phase, arithmetic)
    structure = skeleton.structure.blocks[index]
    experts = structure.local_experts
    left_out = {f"{path}.{name}" for name in not_read(replaced, experts)}
    left_out -= {f"{linear.name}.weight" for linear in structure.linears if linear.read_apart}
    modules = [module for module in exported.attention_modules if module.startswith(f"{path}.")]
    attention = {module: exported.read_attention(module) for module in modules}
    block = skeleton.module(path)
    with (
        skeleton.resident(name for name in skeleton.parameter_names(path) if name not in left_out),
        simulated(block, replaced, experts),
        attention_as_stored(block, path, exported.attention, attention, arithmetic),
    ):
        yield


@contextmanager
def head_as_served(
    skeleton: Skeleton, exported: QuantizedCheckpoint | None, phase: Phase | None, arithmetic: Arithmetic = "engine"
) -> Iterator[list[str]]:
    """While the body runs, the quantized model's output head computes as an engine does, if it is quantized. Yields the
    parameters that nothing reads then."""
    from quantcli.evaluation.simulate import simulated

    head = skeleton.structure.head
    replaced = {} if exported is None or head is None else _replaced(skeleton, exported, head, phase, arithmetic)
    with simulated(skeleton.model, replaced):
        yield [f"{name}.weight" for name in replaced]


def _replaced(
    skeleton: Skeleton, exported: QuantizedCheckpoint, prefix: str, phase: Phase | None, arithmetic: Arithmetic
) -> dict[str, Replacement]:
    """What takes the place of linears with quantized inputs whose names begin so, by the rest of their names."""
    from quantcli.pipeline.treatment import replacement

    short = prefix if prefix.endswith(".") else ""
    found: dict[str, Replacement] = {}
    for name, scheme in exported.schemes.items():
        if scheme.activations == "none" or not (name == prefix or (short and name.startswith(prefix))):
            continue
        stored, how = exported.read_linear(name), (skeleton.dtype, skeleton.device)
        if phase is None and scheme.activations == "mix":
            prompt, decoded = (replacement(stored, scheme, *how, each, arithmetic) for each in ("prefill", "decode"))
            found[name.removeprefix(short)] = _by_length(prompt, decoded)
        else:
            found[name.removeprefix(short)] = replacement(stored, scheme, *how, phase or "prefill", arithmetic)
    return found


def _by_length(prompt: Replacement, decoded: Replacement) -> Callable[[nn.Module, Tensor], Tensor]:
    """A linear that computes by `decoded` where its input is one token of each text, else by `prompt`."""
    from quantcli.evaluation.simulate import forward_of

    return lambda module, x: forward_of(module, decoded if x.shape[-2] == 1 else prompt)(x)
