"""calibrate: run the float model over the calibration tokens, block by block, and keep input statistics of linears."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.model.structure import Block, SharedInput
from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.experts import few_tokens, tokens_of_experts, warn_of_few, weighed_experts
from quantcli.pipeline.plan import needs_calibration
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.samples import calibration_samples, spread
from quantcli.pipeline.tried import weighed
from quantcli.recipe.quantization import named_scheme
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.calibration.attention_statistics import AttentionStatistics
    from quantcli.calibration.statistics import InputStatistics

MANIFEST = "manifest.json"
HIDDEN = "hidden"
MOMENT_SAMPLES = 12
"""Calibration samples, spread over all, from which second moments are known well enough to weigh errors by."""


def _wanted(recipe: Recipe) -> bool:
    return recipe.calibration is not None and needs_calibration(recipe)


def _identity(context: Context) -> dict[str, Any]:
    section = context.recipe.calibration
    assert section is not None
    cache = context.recipe.quantize.kv_cache
    attention = context.plan.attention
    return {
        "calibration": data_identity(section),
        "model": _reading(context),
        "counts": _counts(context),
        "moments": _moments(context),
        "head": _observes_head(context),
        "attention": attention and [attention.to_json(), cache and cache.observe, _coverage(context)],
        "experts": _identity_of_experts(context),
        "looks_at": _looks_at(context),
    }


def _identity_of_experts(context: Context) -> list[Any] | None:
    """How experts are observed, and of which anything is found so, where that is not all of them."""
    names = weighed_experts(context)
    some = [names] if len(names) < len(context.experts) else []
    return [*tokens_of_experts(context), *some] if names else None


def _looks_at(context: Context) -> int | None:
    """How many calibration samples are looked at; None for all, which ranges, ranks and experts need."""
    plan, ranges = context.plan, any(t.scheme.observed for t in context.plan.treatments.values())
    every = ranges or context.ranks or plan.attention is not None or _observes_experts(context)
    return None if every else MOMENT_SAMPLES


def _counts(context: Context) -> bool:
    """Whether the distribution of values is read: by measures of linears, or by a range other than of extremes; of
    static scales that are found on the quantized model, by trials that come before them."""
    tried = context.recipe.quantize.target is not None
    return context.ranks or any(
        t.scheme.observed and (tried or t.activations.propagation == "float") and t.activations.method != "minmax"
        for t in context.plan.treatments.values()
    )


def _moments(context: Context) -> bool:
    return any(weighed(context, name) for name in context.plan.treatments)


def _observes_head(context: Context) -> bool:
    head = context.plan.structure.head or ""
    treatment = context.plan.treatments.get(head)
    if treatment is None:
        return False
    section = context.recipe.quantize.rollback
    other = named_scheme(section.to) if section.ranks else None  # what the ranking may make of it
    observed = treatment.activations.observed or (other is not None and other[1].observed)
    return observed or weighed(context, head)


def _observes_experts(context: Context) -> bool:
    """Whether anything about the linears of experts is found from their inputs."""
    return bool(weighed_experts(context))


def _coverage(context: Context) -> float | None:
    section = context.recipe.quantize.attention
    return section.coverage if section is not None else None


def _reading(context: Context) -> dict[str, Any]:
    section = context.recipe.model
    return {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code, "device": context.device}


def run(context: Context, folder: StageFolder) -> None:
    """Writes block-00000.safetensors …, with the InputStatistics of each shared input, and manifest.json."""
    import torch

    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.propagation import observe_head

    recorded = [_block_file(index) in folder.files for index in range(context.blocks)]
    head_recorded = not _observes_head(context) or _block_file(context.blocks) in folder.files
    if MANIFEST in folder.files and all(recorded) and head_recorded:
        HiddenCache(folder.path / HIDDEN, [], torch.float32).clear()
        return
    found = calibration_samples(context)
    samples = spread(found.samples, _looks_at(context))
    tokens = sum(map(len, samples))
    context.emit("tokens", samples=len(samples), tokens=tokens, documents=found.documents_used)
    for note in found.notes:
        context.emit("note", text=note)
    skeleton = context.skeleton()
    stream = BlockStream(skeleton, batched(samples))
    cache = context.hidden_cache(folder.path / HIDDEN, stream)
    for index in range(stream.enter(cache, cache.resume(recorded)), context.blocks):
        started = time.perf_counter()
        block = context.plan.structure.blocks[index]
        with (
            stream.block(index) as module,
            _observing(context, module, block) as (statistics, attention),
            _observing_experts(context, module, block) as of_experts,
        ):
            for batch in range(len(stream.batches)):
                cache.put(batch, stream.run(index, batch, cache.get(batch)))
        _check(context, block, statistics)
        seen = {f"{block.name}.{name}": gathered for name, gathered in of_experts.items()}
        _check_experts(context, block, seen)
        _write(folder, index, {**statistics, **seen, **attention})
        cache.commit(index + 1)
        context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))
    if _observes_head(context):
        head = context.plan.structure.head_linear
        assert head is not None
        shared = SharedInput((head.name,), head.in_features)
        entering = observe_head(stream, cache, shared, context.device, _counts(context))
        _write(folder, context.blocks, {head.name: entering})
    write_json(folder.path / MANIFEST, _manifest(context, folder, tokens))
    folder.add(folder.path / MANIFEST)
    cache.clear()


@contextmanager
def _observing(
    context: Context, module: nn.Module, block: Block
) -> Iterator[tuple[dict[str, InputStatistics], dict[str, AttentionStatistics]]]:
    """Statistics that fill while the block runs: of its inputs, and of attention if what is inside is quantized."""
    from quantcli.calibration.statistics import inputs_observed

    gathers = {"counts": _counts(context), "moments": _moments(context)}
    with inputs_observed(module, block, context.device, **gathers) as statistics:
        if context.plan.attention is None:
            yield statistics, {}
        else:
            from quantcli.pipeline.attention import attention_statistics

            with attention_statistics(context, module, block) as attention:
                yield statistics, attention


@contextmanager
def _observing_experts(context: Context, module: nn.Module, block: Block) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of what enters experts, by names below the block, that fill while it runs."""
    from quantcli.calibration.expert_statistics import experts_observed

    section = context.recipe.calibration
    assert section is not None
    experts = block.local_experts if _observes_experts(context) else ()
    with experts_observed(module, experts, context.device, every_token=section.route_all_experts) as statistics:
        yield statistics


def _check_experts(context: Context, block: Block, statistics: Mapping[str, InputStatistics]) -> None:
    """Warn of experts that saw too few tokens; raise ModelError for values that are not finite."""
    from quantcli.pipeline.propagation import require_finite

    for name, gathered in statistics.items():
        require_finite(name, gathered)
    known = set(weighed_experts(context))
    for layer in block.experts if statistics else ():
        firsts = [names[0] for names in layer.linears if names[0] in known]
        warn_of_few(context, layer, {name: statistics[name].count for name in firsts})


def _check(context: Context, block: Block, statistics: dict[str, InputStatistics]) -> None:
    """Raise ModelError for inputs that nothing can be found from; warn of those that never vary."""
    from quantcli.pipeline.propagation import require_finite

    readers = {shared.name: list(shared.linears) for shared in block.inputs}
    for name, gathered in statistics.items():
        require_finite(name, gathered)
        if gathered.count == 0:
            raise ModelError(f"{name} in {block.name} saw no token during calibration.", "Use more calibration text.")
        low, high = gathered.minimum, gathered.maximum
        constant = int((low == high).sum())
        if bool((low == 0).all() & (high == 0).all()):
            context.emit("warning", fallback="constant_inputs", modules=readers.get(name, [name]),
                         text=f"The input of {name} was zero for every calibration token; its scale is 1. "
                         "Use other calibration text, or roll it back.")  # fmt: skip
        elif constant:
            context.emit("warning", fallback="constant_inputs", modules=readers.get(name, [name]),
                         text=f"{constant} of {len(low)} input channels of {name} never varied during "
                         "calibration. Use more calibration text if they should.")  # fmt: skip


def _write(folder: StageFolder, index: int, statistics: Mapping[str, InputStatistics | AttentionStatistics]) -> None:
    from quantcli.model.writer import write_tensors

    tensors = {
        f"{name}.{part}": t for name, gathered in statistics.items() for part, t in gathered.to_tensors().items()
    }
    file = folder.path / _block_file(index)
    folder.add(file, write_tensors(file, tensors, "quantcli-statistics"))


def read_statistics(context: Context, linear: str) -> dict[str, Tensor]:
    """What was observed of a linear's input: the tensors of `InputStatistics.to_tensors`."""
    block = context.linear_blocks[linear]
    name = linear
    if linear in context.expert_inputs:
        name = context.expert_inputs[linear]
    elif block < context.blocks:
        name = next(s.name for s in context.plan.structure.blocks[block].inputs if linear in s.linears)
    return read_observed(context, block, name)


def read_observed(context: Context, block: int, name: str) -> dict[str, Tensor]:
    """What the calibrate stage stored under a name (of a shared input, or of an attention module) in a block."""
    from safetensors import safe_open

    with safe_open(context.folder(STAGE.name) / _block_file(block), framework="pt") as opened:
        names = [key for key in opened.keys() if key.rpartition(".")[0] == name]  # noqa: SIM118
        return {key.rpartition(".")[2]: opened.get_tensor(key) for key in names}


def _block_file(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _manifest(context: Context, folder: StageFolder, tokens: int) -> dict[str, Any]:
    """Which statistics belong to which linear, and the block of each attention module that was observed."""
    inputs = {
        linear: {"block": index, "input": shared.name}
        for index, block in enumerate(context.plan.structure.blocks)
        for shared in block.inputs
        for linear in shared.linears
    }
    if _observes_head(context):
        head = context.plan.structure.head
        assert head is not None
        inputs[head] = {"block": context.blocks, "input": head}
    experts: dict[str, int] = {}
    if _observes_experts(context):
        for linear, name in context.expert_inputs.items():
            inputs[linear] = {"block": context.linear_blocks[linear], "input": name}
        experts = {name: int(read_statistics(context, name)["count"]) for name in weighed_experts(context)}
    attention: dict[str, int] = {}
    for index in range(context.blocks) if context.plan.attention else ():
        attention |= dict.fromkeys(_attention_in(folder.path / _block_file(index)), index)
    least = few_tokens(context)
    few = {name: count for name, count in experts.items() if count < least}
    return {
        "tokens": tokens,
        "linears": inputs,
        "experts": {"observed": len(experts), "least": least, "few": few} if experts else None,
        "attention": attention,
    }


def _attention_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
    return sorted(key.rpartition(".")[0] for key in keys if key.endswith(".key_minimum"))


def _writes(context: Context) -> tuple[str, ...]:
    return (*(_block_file(index) for index in range(context.blocks + 1)), MANIFEST, f"{HIDDEN}/*")


STAGE = Stage(
    "calibrate",
    ("select", "smooth"),
    _wanted,
    _identity,
    run,
    _writes,
    guards=("check",),
    title="Observing activations",
    asked_by="a scheme that needs calibration",
)
