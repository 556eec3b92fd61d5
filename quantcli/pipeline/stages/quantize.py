"""quantize: codes and scales of every planned linear, block by block, into the neutral store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.experts import HIDDEN_EXPERTS, tokens_of_experts
from quantcli.pipeline.plan import UNREACHED
from quantcli.pipeline.rundir import StageFolder
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.stages.calibrate import read_observed, read_statistics
from quantcli.pipeline.stages.export import writer_ahead
from quantcli.pipeline.tried import tried

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear
    from quantcli.pipeline.treatment import Facts, Jobs

HIDDEN = "hidden"
HIDDEN_FLOAT = "hidden-float"


def _identity(context: Context) -> dict[str, Any]:
    from quantcli.pipeline.propagation import propagates

    recipe = context.recipe
    treatments = context.plan.treatments
    solves = any(treatments[name].weights.solves for name in context.expert_inputs if name in treatments)
    drawn = recipe.calibration is not None and propagates(treatments)  # which values are quantized
    return {
        "quantize": recipe.quantize.model_dump(mode="json", exclude={"distill"}),
        "schemes": {name: scheme.to_json() for name, (_, scheme) in context.plan.schemes.items()},
        "dtype": recipe.model.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "device": context.device,
        "samples": data_identity(recipe.calibration) if recipe.calibration and recipe.quantize.solves else None,
        "seed": recipe.calibration.seed if recipe.calibration and drawn else None,
        **({"experts": tokens_of_experts(context)} if solves else {}),
        # a size that the recipe names is warned of where it does not divide, the same one by default is not
        **({"narrowed": narrowed} if (narrowed := context.plan.narrowed) else {}),
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes block-00000.safetensors … and manifest.json, as `formats.store` describes.

    No forward pass is made, unless static scales are to be found on the quantized model, or weights solved for the
    inputs that they will have. Raises ModelError, with the
    module, for weights that are not finite.
    """
    from quantcli.formats.store import MANIFEST
    from quantcli.pipeline.propagation import propagates

    if unreached := [name for name, reason in context.plan.kept.items() if reason == UNREACHED]:
        shown = ", ".join(unreached[:3]) + (", …" if len(unreached) > 3 else "")
        stay = "1 linear stays" if len(unreached) == 1 else f"{len(unreached)} linears stay"
        context.emit("warning", fallback="unreached", count=len(unreached), modules=unreached,
                     text=f"{stay} in float: no input reaches {shown}.")  # fmt: skip
    for text, names in context.plan.narrowed.items():
        context.emit("warning", fallback="smaller_groups", count=len(names), text=text, modules=names)
    write_store_manifest(context, folder.path)
    keep = _keeping(context, folder)
    if any(treatment.weights.solves for treatment in context.plan.treatments.values()):
        _run_solved(context, folder, keep)
    elif propagates(context.plan.treatments):
        _run_propagated(context, folder, keep)
    else:
        quantize_blocks(context, folder.path, folder.adopt, keep)
    folder.add(folder.path / MANIFEST)


def _keeping(context: Context, folder: StageFolder) -> Callable[[Path, str], None]:
    """Records the file of a block; then shards of exports are written whose blocks are all there."""
    write = writer_ahead(context, folder.path)

    def keep(file: Path, digest: str) -> None:
        folder.add(file, digest)
        if write is not None:
            write()

    return keep


def write_store_manifest(context: Context, path: Path) -> None:
    """The manifest of a store of the context's plan."""
    from quantcli.formats.store import write_manifest

    plan = context.plan
    modules = _attention_modules(context)
    write_manifest(path, plan.structure.dtype, plan.schemes, plan.kept, plan.attention, modules)


def trial_store(context: Context, path: Path) -> Store:
    """A store of the context's plan at `path`, with scales from the float model, to try the model with. Linears that
    are solved block by block have the codes that they are tried by."""
    from quantcli.formats.store import MANIFEST, Store

    path.mkdir(exist_ok=True)
    if not (path / MANIFEST).is_file():
        quiet = tried(replace(context, listener=None))
        quantize_blocks(quiet, path, Path.exists, lambda _file, _digest: None)
        write_store_manifest(quiet, path)
    return Store(path)


def quantize_blocks(
    context: Context, path: Path, finished: Callable[[Path], bool], keep: Callable[[Path, str], None]
) -> None:
    """Codes, scales and static input scales of every planned linear, a file a block, from weights and statistics.

    `finished` says of a file whether it is done already; `keep` is told the digest of each new one.
    """
    from quantcli.formats.store import block_file
    from quantcli.model.workers import linear_workers
    from quantcli.pipeline.treatment import WeightSource

    source = WeightSource(context)
    statistics_of = partial(read_statistics, context)
    with linear_workers(context.device) as workers:
        # one block ahead: the workers go on while a finished block is written
        ahead: tuple[int, Jobs] | None = None
        try:
            for index in _units(context):
                if not finished(block_file(path, index)):
                    behind, ahead = ahead, (index, source.submit(workers, index, statistics_of, with_inputs=True))
                    if behind is not None:
                        _finish(context, path, keep, *behind)
            if ahead is not None:
                _finish(context, path, keep, *ahead)
        finally:
            workers.shutdown(cancel_futures=True)


def _run_propagated(context: Context, folder: StageFolder, keep: Callable[[Path, str], None]) -> None:
    """As `quantize_blocks`, with each block run quantized, so that later ones are observed on what it puts out."""
    import torch

    from quantcli.formats.store import block_file
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.model.structure import SharedInput
    from quantcli.model.workers import linear_workers
    from quantcli.pipeline.attention import observing_heads
    from quantcli.pipeline.propagation import observe_head, propagate_block
    from quantcli.pipeline.treatment import WeightSource, input_parameters, observed_of, with_input

    units = _units(context, every=True)
    recorded = [block_file(folder.path, index).name in folder.files for index in units]
    if all(recorded):
        HiddenCache(folder.path / HIDDEN, [], torch.float32).clear()
        return
    stream = BlockStream(context.skeleton(), batched(calibration_samples(context).samples))
    cache = HiddenCache(
        folder.path / HIDDEN, stream.hidden_shapes(), stream.skeleton.dtype, context.recipe.model.cache_memory
    )
    done = cache.resume(recorded)
    section = context.recipe.calibration
    assert section is not None
    statistics_of = partial(read_statistics, context)
    source = WeightSource(context)
    with linear_workers(context.device) as workers:
        for index in units[stream.enter(cache, done) :]:
            started = time.perf_counter()
            attention: dict[str, dict[str, Tensor]] = {}
            jobs = source.submit(workers, index, statistics_of, with_inputs=False)
            results = {name: job.result() for name, job in jobs.items()}
            stored = {name: result[0] for name, result in results.items()}
            if index < context.blocks:
                block = context.plan.structure.blocks[index]
                with observing_heads(context, stream, block) as seen:
                    treatments, seed = context.plan.treatments, section.seed
                    stored, ranges = propagate_block(
                        stream, index, block, cache, stored, treatments, statistics_of, seed, seen.clear
                    )
                attention = {module: found.to_tensors() for module, found in seen.items()}
            else:
                ranges = {}
                for name, entry in stored.items():
                    treatment = context.plan.treatments[name]
                    if treatment.scheme.observed:
                        shared = SharedInput((name,), context.linears[name].in_features)
                        counts = treatment.activations.method != "minmax"
                        statistics = observe_head(stream, cache, shared, context.device, counts)
                        scale, zero, ranges[name] = input_parameters(observed_of(statistics.to_tensors()), treatment)
                        stored[name] = with_input(entry, scale, zero)
            facts = {name: result[1] | ranges.get(name, {}) for name, result in results.items()}
            _write(context, folder.path, keep, index, stored, facts, started, attention)
            if index < context.blocks:
                cache.commit(index + 1)
    cache.clear()


def _run_solved(context: Context, folder: StageFolder, keep: Callable[[Path, str], None]) -> None:
    """As `quantize_blocks`, with the calibration samples run through each block as its linears are quantized."""
    import torch

    from quantcli.formats.store import block_file
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.solve import Passes, solve_block, solve_head
    from quantcli.pipeline.treatment import WeightSource
    from quantcli.pipeline.vectors import by_tensor

    units = _units(context, every=True)
    recorded = [block_file(folder.path, index).name in folder.files for index in units]
    if all(recorded):
        for name in (HIDDEN, HIDDEN_FLOAT, HIDDEN_EXPERTS):
            HiddenCache(folder.path / name, [], torch.float32).clear()
        return
    section = context.recipe.quantize
    skeleton, batches = context.skeleton(), batched(calibration_samples(context).samples)
    compares = section.gptq.asymmetric or section.tunes
    if compares and len(batches) == 1:  # one part to learn from, one to check it on
        batches = [half for half in batches[0].tensor_split(2) if len(half)]
    if section.gptq.asymmetric and len(batches) == 1:
        context.emit("warning", fallback="not_tuned",
                     text="quantize.gptq.asymmetric has no effect with one calibration "
                     "sample, which leaves none to check it on. Use more calibration text.")  # fmt: skip
    if section.tunes and len(batches) == 1:
        context.emit("warning", fallback="not_tuned",
                     text="Method signround is judged on the one calibration sample that it learns "
                     "from. Use more calibration text.")  # fmt: skip
    stream = BlockStream(skeleton, batches)
    cache = context.hidden_cache(folder.path / HIDDEN, stream)
    passes, caches = Passes(stream, cache), [cache]
    if compares:
        passes.beside = BlockStream(skeleton, batches[: max(2, round(section.gptq.compared * len(batches)))])
        passes.plain = context.hidden_cache(folder.path / HIDDEN_FLOAT, passes.beside)
        caches.append(passes.plain)
    if passes.waiting_bytes() > context.recipe.model.cache_memory:
        passes.again = True
        context.emit("note", text=f"Inside a block {passes.waiting_bytes() / 2**20:.1f} MiB of activations would wait, "
                     "more than model.cache_memory: a block is run anew for each input of its linears.")  # fmt: skip
    positions = [one.resume(recorded) for one in caches]
    done = positions[0] if len(set(positions)) == 1 else None
    start = stream.enter(cache, done)
    if passes.beside is not None and passes.plain is not None:
        passes.beside.enter(passes.plain, done)
    source, statistics_of = WeightSource(context), partial(read_statistics, context)
    for index in units[start:]:
        started = time.perf_counter()
        vectors: dict[str, Tensor] = {}
        if index < context.blocks:
            block = context.plan.structure.blocks[index]
            results, vectors = solve_block(source, passes, index, block, section, statistics_of)
        else:
            results = solve_head(source, passes, section.gptq, statistics_of)
        stored = {name: result[0] for name, result in results.items()}
        facts = {name: result[1] for name, result in results.items()}
        _write(context, folder.path, keep, index, stored, facts, started, vectors=by_tensor(skeleton, vectors))
        for one in caches if index < context.blocks else ():
            one.commit(index + 1)
    for one in (*caches, HiddenCache(folder.path / HIDDEN_EXPERTS, [], stream.skeleton.dtype)):
        one.clear()


def _finish(context: Context, path: Path, keep: Callable[[Path, str], None], index: int, jobs: Jobs) -> None:
    started = time.perf_counter()
    results = {name: jobs.pop(name).result() for name in list(jobs)}
    stored = {name: result[0] for name, result in results.items()}
    _write(context, path, keep, index, stored, {name: result[1] for name, result in results.items()}, started)


def _write(
    context: Context,
    path: Path,
    keep: Callable[[Path, str], None],
    index: int,
    stored: dict[str, StoredLinear],
    facts: dict[str, Facts],
    started: float,
    seen: Mapping[str, Mapping[str, Tensor]] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> None:
    """The block's file. `seen`: attention modules observed on the quantized model, in place of the float model's;
    `vectors`: what was tuned beside the linears."""
    from quantcli.formats.store import block_file, write_block
    from quantcli.pipeline.attention import scales_of

    for name, found in facts.items():
        if zero_rows := found.pop("zero_rows", 0):
            context.emit("warning", fallback="zero_channels", modules=[name],
                         text=f"{zero_rows} of {context.linears[name].out_features} output channels of "
                         f"{name} hold zeros only; their scale is 1. Check the checkpoint.")  # fmt: skip
        context.emit("linear", module=name, scheme=context.plan.treatments[name].scheme.name, **found)
    scheme = context.plan.attention
    attention: dict[str, dict[str, Tensor]] = {}
    if scheme is not None:
        modules = [module for module, block in _attention_modules(context).items() if block == index]
        dtype = context.plan.structure.dtype
        for module in modules:
            observed = (seen or {}).get(module) or read_observed(context, index, module)
            attention[module] = scales_of(observed, scheme, dtype)
    keep(block_file(path, index), write_block(path, index, stored, attention, vectors))
    context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))


def _attention_modules(context: Context) -> dict[str, int]:
    """Attention modules that the calibrate stage observed, and their blocks."""
    import json

    if context.plan.attention is None:
        return {}
    content = json.loads((context.folder("calibrate") / "manifest.json").read_text(encoding="utf-8"))
    found: dict[str, int] = content["attention"]
    return found


def _units(context: Context, every: bool = False) -> list[int]:
    """Blocks (and, behind the last, the head) of which something is stored; with `every`, blocks without as well."""
    wanted = {block for block, _ in context.plan.schemes.values()}
    if every or context.plan.attention is not None:
        wanted |= set(range(context.blocks))
    return sorted(wanted)


def _writes(context: Context) -> tuple[str, ...]:
    from quantcli.formats.store import MANIFEST, block_file

    files = (block_file(Path(), index).name for index in range(context.blocks + 1))
    return (*files, MANIFEST, *(f"{name}/*" for name in (HIDDEN, HIDDEN_FLOAT, HIDDEN_EXPERTS)))


STAGE = Stage(
    "quantize",
    ("select", "smooth", "calibrate", "sensitivity", "search", "allocate", "curvature"),
    lambda _: True,
    _identity,
    run,
    _writes,
    title="Quantizing",
    asked_by="quantize",
)
