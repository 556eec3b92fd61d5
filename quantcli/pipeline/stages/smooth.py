"""smooth: find scales that suppress outliers, block by block, and check on real inputs that they change nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quantcli.model.structure import Block, SharedInput, Structure, rotatable_heads
from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.exactness import (
    CHECKED_TOKENS,
    TOLERANCE,
    Passed,
    changed_parameters,
    check_outside,
    check_rotation,
    difference,
    exact_streams,
    passed,
)
from quantcli.pipeline.experts import tokens_of_experts
from quantcli.pipeline.held import addable_biases
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.samples import calibration_samples, spread
from quantcli.pipeline.seen import Seen, inputs_seen
from quantcli.pipeline.smoothed import ROTATION, folds_file, write_folds
from quantcli.pipeline.stages.export import checkpoint_files, source_of

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.folding import Fold
    from quantcli.model.rotation import ModelRotation
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.groups import GroupSource, Outcome

MANIFEST = "manifest.json"
HIDDEN = "hidden"
MODEL = "model"


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.smooth is not None
    section, biases = recipe.model, _addable(context)
    return {
        "smooth": recipe.smooth.model_dump(mode="json"),
        "calibration": data_identity(recipe.calibration) if recipe.calibration and recipe.smooth.scales else None,
        "experts": tokens_of_experts(context) if recipe.calibration and context.expert_inputs else None,
        "schemes": {
            name: [treatment.scheme.to_json(), treatment.weights.full_range, treatment.averages]
            for name, treatment in context.plan.treatments.items()
        },
        "model": {"dtype": section.dtype, "trust_remote_code": section.trust_remote_code, "device": context.device},
        **({"biases": biases} if biases else {}),  # which depend on the formats
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes block-00000.safetensors … with scales, block-00000.json … with what came of each group, rotation.json
    where the recipe rotates, manifest.json, and the smoothed float model where the recipe asks for it."""
    section = context.recipe.smooth
    assert section is not None
    checkpoint, rotation = _rotated(context, folder)
    if section.scales or rotation is not None:
        _go_through_blocks(context, folder, checkpoint, rotation)
    if MANIFEST not in folder.files:
        write_json(folder.path / MANIFEST, _manifest(context, folder, rotation))
        folder.add(folder.path / MANIFEST)
    if section.save_model:
        _save_model(context, folder)


def _addable(context: Context) -> list[str]:
    schemes = {name: scheme for name, (_, scheme) in context.plan.schemes.items()}
    return addable_biases(context.recipe, context.plan.structure, schemes)[0]


def _rotated(context: Context, folder: StageFolder) -> tuple[Checkpoint, ModelRotation | None]:
    """The checkpoint that scales are found for, and the rotation that it is read with, if any."""
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.rotation import ModelRotation
    from quantcli.pipeline.smoothed import changeable_tensors, rotated_checkpoint, write_rotation

    section, structure = context.recipe.smooth, context.plan.structure
    checkpoint = Checkpoint(context.model)
    assert section is not None
    if section.rotation is None:
        return checkpoint, None
    size = structure.head_dim
    rotation = ModelRotation(section.rotation.seed, section.rotation.hidden, section.rotation.heads, size)
    names = changeable_tensors(context.recipe, checkpoint, structure)
    rotated = rotated_checkpoint(checkpoint, structure, rotation, names)
    if rotation.heads and size is not None:
        turned = {name for shared in rotatable_heads(structure, size) for name in shared.linears}
        plain = [block.name for block in structure.blocks if not turned & {each.name for each in block.linears}]
        if plain:
            done = f"{context.blocks - len(plain)} of {context.blocks}"
            context.emit("warning", fallback="not_rotated", count=len(plain), modules=plain,
                         text=f"The values of attention are rotated in {done} blocks; "
                         "in the others they do not reach the output projection head by head.")  # fmt: skip
    if ROTATION not in folder.files:
        write_rotation(folder.path, rotation)
        folder.add(folder.path / ROTATION)
    return rotated, rotation


def _go_through_blocks(
    context: Context, folder: StageFolder, checkpoint: Checkpoint, rotation: ModelRotation | None
) -> None:
    import torch

    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.groups import GroupSource
    from quantcli.pipeline.smoothed import biased_checkpoint, changeable_tensors

    section = context.recipe.smooth
    assert section is not None
    written = [(folds_file(folder.path, index).name, _report_file(index)) for index in range(context.blocks)]
    recorded = [{*names} <= folder.files.keys() for names in written]
    if all(recorded):
        HiddenCache(folder.path / HIDDEN, [], torch.float32).clear()
        return
    found = calibration_samples(context) if section.scales else None
    samples = [list(range(CHECKED_TOKENS))]
    if found is not None:
        ranges = any(treatment.scheme.observed for treatment in context.plan.treatments.values())
        samples = spread(found.samples, section.looks_at(ranges))
        tokens = sum(map(len, samples))
        context.emit("tokens", samples=len(samples), tokens=tokens, documents=found.documents_used)
    batches = batched(samples)
    skeleton = context.skeleton(checkpoint=checkpoint)
    stream = BlockStream(skeleton, batches if section.scales else batches[:1])
    biases = _addable(context)
    names = changeable_tensors(context.recipe, checkpoint, context.plan.structure)
    shiftable = biased_checkpoint(checkpoint, context.plan.structure, biases, names)
    exact, embedded = exact_streams(context, shiftable, rotation, batches[0][:1, :CHECKED_TOKENS])
    if rotation is not None:
        check_outside(context, exact, embedded, rotation)
    cache = context.hidden_cache(folder.path / HIDDEN, stream)
    source = GroupSource(context, shiftable)
    for text, kept_out in _obstacles(context.plan.structure, source):
        linears = [name for shared in kept_out for name in shared.linears]
        context.emit("warning", fallback="not_smoothed", count=len(kept_out), text=text, modules=linears)
    for index in range(stream.enter(cache, cache.resume(recorded)), context.blocks):
        started = time.perf_counter()
        block = context.plan.structure.blocks[index]
        entering = cache.get(0)[:1, :CHECKED_TOKENS]
        if rotation is not None:
            check_rotation(context, index, exact, entering, rotation)
        wanted = [shared for shared in block.groups if source.folds(shared) or source.clipped(shared)]
        with stream.block(index) as module, inputs_seen(context, module, block, wanted, len(samples)) as seen:
            for batch in range(len(stream.batches)):
                cache.put(batch, stream.run(index, batch, cache.get(batch)))
        outcomes, clips = _smooth_block(context, index, source, exact[0], entering, seen)
        folds = [outcome.fold for outcome in outcomes if outcome.fold is not None]
        folder.add(folds_file(folder.path, index), write_folds(folder.path, index, folds, clips))
        write_json(folder.path / _report_file(index), [outcome.to_json() for outcome in outcomes])
        folder.add(folder.path / _report_file(index))
        cache.commit(index + 1)
        seconds = round(time.perf_counter() - started, 3)
        context.emit("block", index=index, of=context.blocks, smoothed=len(folds), seconds=seconds)
    cache.clear()


def _obstacles(structure: Structure, source: GroupSource) -> Iterator[tuple[str, list[SharedInput]]]:
    """What keeps groups from being scaled, each once with its blocks, and which: blocks of one make have the same."""
    found: dict[tuple[str, str], list[tuple[int, SharedInput]]] = {}
    for index, block in enumerate(structure.blocks):
        for shared in filter(source.folds, block.groups):
            if shared.producer is not None and shared.producer.obstacle:
                name = shared.name.removeprefix(f"{block.name}.")
                found.setdefault((name, shared.producer.obstacle), []).append((index, shared))
    for (name, obstacle), places in found.items():
        blocks = _blocks([index for index, _ in places])
        yield f"{name} of {blocks} is not smoothed: {obstacle}.", [shared for _, shared in places]


def _blocks(indices: list[int]) -> str:
    """[0, 1, 2, 5] → blocks 0 to 2, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    parts = [f"{first} to {last}" if first < last else str(first) for first, last in runs]
    return f"block{'s' * (len(indices) > 1)} {', '.join(parts)}"


def _smooth_block(
    context: Context,
    index: int,
    source: GroupSource,
    exact: BlockStream,
    entering: Tensor,
    seen: dict[str, tuple[SharedInput, Seen]],
) -> tuple[list[Outcome], dict[str, Tensor]]:
    """Scales for each group of the block, checked one after the other on top of those that were kept, and bounds of the
    weights that are to be clipped."""
    import torch

    from quantcli.model.heap import release_freed_memory

    kept: list[Fold] = []
    outcomes: list[Outcome] = []
    clips: dict[str, Tensor] = {}
    folded = [(shared, own) for shared, own in seen.values() if source.folds(shared)]
    with exact.block(index), torch.no_grad():
        before = passed(exact, index, entering.float()) if folded else Passed(entering)

        def checked(found: Sequence[Outcome]) -> list[Outcome]:
            folds = [outcome.fold for outcome in found if outcome.fold is not None]
            if not folds:
                return [*found]
            changed = changed_parameters(exact, index, [*kept, *folds], source.names)
            off = difference(passed(exact, index, entering.float(), changed), before, entering.float())
            return [outcome if outcome.fold is None else outcome.checked(off, TOLERANCE) for outcome in found]

        for groups in _checked_together(context.plan.structure.blocks[index], folded):
            release_freed_memory()  # left by passes and other groups, in pieces that no weight in float32 fits into
            found = [source.smooth(shared, own) for shared, own in groups]
            made = checked(found)
            for place, (shared, own) in enumerate(groups):
                fold = found[place].fold
                if made[place].fold is None and fold is not None and fold.shift is not None:
                    reason = made[place].reason
                    context.emit("warning", fallback="not_smoothed", modules=list(shared.linears),
                                 text=f"{shared.name} is not shifted: {reason}.")  # fmt: skip
                    (made[place],) = checked([source.smooth(shared, own, shifting=False)])
            kept += [outcome.fold for outcome in made if outcome.fold is not None]
            _tell(context, made)
            outcomes += made
    release_freed_memory()
    for shared, own in seen.values():
        clips |= source.clips(shared, own, kept)
    return outcomes, clips


def _checked_together(
    block: Block, groups: Iterable[tuple[SharedInput, Seen]]
) -> Iterable[list[tuple[SharedInput, Seen]]]:
    """The groups one by one, but those inside the experts of a layer, which are many and of one make, at once."""
    layers = {name: layer.name for layer in block.experts for name in layer.leaving}
    found: dict[str, list[tuple[SharedInput, Seen]]] = {}
    for shared, own in groups:
        found.setdefault(layers.get(shared.name, shared.name), []).append((shared, own))
    return found.values()


def _tell(context: Context, outcomes: Sequence[Outcome]) -> None:
    """Record outcomes, and warn of those that were not by choice, of many experts at once."""
    reasons: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        context.emit("smoothed", **outcome.to_json())
        if outcome.reason and outcome.cause != "obstacle":
            reasons.setdefault(outcome.cause, []).append(outcome)
    for left in reasons.values():
        name, reason = left[0].shared.name, left[0].reason
        text = f"{name} is not smoothed: {reason}."
        if len(left) > 1:
            text = f"{name} and {len(left) - 1} more of {len(outcomes)} experts are not smoothed: {reason}."
        names = [name for outcome in left for name in outcome.shared.linears]
        context.emit("warning", fallback="not_smoothed", count=len(left), text=text, modules=names)


def _manifest(context: Context, folder: StageFolder, rotation: ModelRotation | None) -> dict[str, Any]:
    """How many groups each method smoothed, how many were left for each cause, and what is rotated."""
    methods: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for index in range(context.blocks):
        file = folder.path / _report_file(index)
        for outcome in json.loads(file.read_text(encoding="utf-8")) if file.is_file() else ():
            counted = methods if outcome["kept"] else left
            counted[outcome["chosen"] if outcome["kept"] else outcome["cause"]] += 1
    parts = [] if rotation is None else ["residual stream"] * rotation.hidden + ["heads"] * rotation.heads
    return {"methods": dict(sorted(methods.items())), "left": dict(sorted(left.items())), "rotated": parts}


def _save_model(context: Context, folder: StageFolder) -> None:
    """The smoothed float model as an ordinary checkpoint, smooth/model."""
    from quantcli.formats.export import export_float

    source = source_of(context.recipe, context.plan.structure, context.checkpoint)
    for shard in sorted((folder.path / MODEL).glob("model*.safetensors")):
        folder.adopt(shard)
    for file, digest in export_float(folder.path / MODEL, source, context.plan.structure.dtype):
        folder.add(file, digest)
        context.emit("file", format="float", file=file.name, bytes=file.stat().st_size)


def _report_file(index: int) -> str:
    return f"block-{index:05d}.json"


def _writes(context: Context) -> tuple[str, ...]:
    own = [name for i in range(context.blocks) for name in (folds_file(context.folder(""), i).name, _report_file(i))]
    saved = (f"{MODEL}/{name}" for name in checkpoint_files(context.model, MODEL))
    return (*own, ROTATION, MANIFEST, f"{HIDDEN}/*", *saved)


STAGE = Stage(
    "smooth",
    ("select",),
    lambda recipe: recipe.smooth is not None,
    _identity,
    run,
    _writes,
    guards=("check",),
    title="Suppressing outliers",
    asked_by="smooth",
)
