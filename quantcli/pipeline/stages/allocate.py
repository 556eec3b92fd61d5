"""allocate: the scheme of each group of linears under a budget, by the error that each candidate makes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.allocation import TOKENS, Allocation, allocation_of, with_overrides
from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.experts import tokens_of_experts
from quantcli.pipeline.knapsack import knapsack
from quantcli.pipeline.plan import make_plan
from quantcli.pipeline.rundir import RECIPE, StageFolder, six_digits, six_digits_or_none, write_json
from quantcli.pipeline.stages.calibrate import read_statistics
from quantcli.pipeline.stages.sensitivity import first_samples, relative_error
from quantcli.pipeline.tried import tried
from quantcli.recipe.budget import CandidateSection
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.calibration.statistics import InputStatistics
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.model.structure import Block
    from quantcli.pipeline.treatment import StatisticsOf, WeightSource

RESULT = "found.json"
HIDDEN = "hidden"
RUINED = 1e9
"""What counts for an error that is not finite: no sum of others outweighs it."""

Errors = dict[str, dict[str, float | None]]
"""First linear of a group → candidate → error; null where it is not finite."""


def _wanted(recipe: Recipe) -> bool:
    return recipe.quantize.target is not None


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.calibration is not None
    return {
        "quantize": recipe.quantize.model_dump(mode="json"),
        "dtype": recipe.model.dtype,
        "device": context.device,
        "samples": data_identity(recipe.calibration),
        "formats": list(recipe.export.formats) if recipe.export else [],
        **({"engines": list(recipe.export.engines)} if recipe.export and recipe.export.engines else {}),
        **({"experts": tokens_of_experts(context)} if context.experts else {}),
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes found.json with the error of each group under each candidate, and what was chosen.

    The error of a group under a candidate is the mean over tokens of ‖ĥ − h‖² / ‖h‖², h the output of its block in the
    float model, ĥ that with the group quantized so and the rest in float: what it adds to the residual stream, next to
    the stream itself. Errors of groups are taken to add up; the sum is minimized within the budget (`knapsack`).
    """
    allocation = allocation_of(context.recipe, context.model, context.plan.structure)
    errors = _measured(context, folder, allocation)
    names = [candidate.name for candidate in allocation.candidates]
    rows = [[_comparable(errors[group[0]][name]) for name in names] for group in allocation.groups]
    chosen = knapsack(rows, allocation.costs, allocation.budget)
    settled = allocation.settled(chosen)
    plan = make_plan(settled, context.model, context.plan.structure)
    counts = dict.fromkeys(names, 0)
    for group, option in zip(allocation.groups, chosen, strict=True):
        counts[names[option]] += len(group)
    target = context.recipe.quantize.target
    assert target is not None
    facts = {
        "bits_per_weight": six_digits(allocation.bits_per_weight(allocation.cost(chosen))),
        "size": plan.size_after,
        "error": six_digits(math.fsum(row[option] for row, option in zip(rows, chosen, strict=True))),
        "linears": {name: count for name, count in counts.items() if count},
    }
    content = {
        "target": target.model_dump(mode="json", exclude_none=True, exclude={"candidates"}),
        "candidates": {c.name: c.section.keys for c in allocation.candidates},
        **facts,
        "groups": [
            {
                "linears": list(group),
                "scheme": names[option],
                "errors": errors[group[0]],
                "bits": {
                    name: six_digits(8 * cost / _weights(context, group)) for name, cost in zip(names, row, strict=True)
                },
            }
            for group, option, row in zip(allocation.groups, chosen, allocation.costs, strict=True)
        ],
    }
    write_json(folder.path / RESULT, content)
    folder.add(folder.path / RESULT)
    context.emit("allocated", recipe=str(folder.path / RECIPE), **facts)


def settle(context: Context) -> None:
    """Bring what was chosen into the plan."""
    context.plan = make_plan(_plain(context), context.model, context.plan.structure)


def _plain(context: Context) -> Recipe:
    """The recipe with the chosen schemes as overrides, and no target."""
    content = json.loads((context.folder(STAGE.name) / RESULT).read_text(encoding="utf-8"))
    members: dict[str, list[str]] = {}
    for group in content["groups"]:
        members.setdefault(group["scheme"], []).extend(group["linears"])
    sections = {name: CandidateSection(**keys) for name, keys in content["candidates"].items()}
    return with_overrides(context.recipe, [(members[name], sections[name]) for name in sections if name in members])


def _measured(context: Context, folder: StageFolder, allocation: Allocation) -> Errors:
    """The errors of all groups, in one pass over the first calibration samples; resumable between blocks."""
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.treatment import WeightSource

    names = set(allocation.names)
    sources = {c.name: WeightSource(tried(context, c.plan, names)) for c in allocation.candidates if c.plan is not None}
    stream = BlockStream(context.skeleton(), batched(first_samples(context, TOKENS)))
    cache = context.hidden_cache(folder.path / HIDDEN, stream)
    parts = [folder.path / _part(index) for index in range(context.blocks)]
    done = cache.resume([part.name in folder.files for part in parts])
    for index in range(stream.enter(cache, done), context.blocks):
        started = time.perf_counter()
        found = _block_errors(context, allocation, sources, stream, cache, index)
        write_json(parts[index], found)
        folder.add(parts[index])
        cache.commit(index + 1)
        context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))
    cache.clear()
    errors: Errors = {}
    for part in parts:
        errors |= json.loads(part.read_text(encoding="utf-8"))
    return errors


def _block_errors(
    context: Context,
    allocation: Allocation,
    sources: Mapping[str, WeightSource],
    stream: BlockStream,
    cache: HiddenCache,
    index: int,
) -> Errors:
    """The errors of the groups of a block. The float block runs first, and what its linears read is observed; then it
    runs for each candidate with one group after the other quantized. One candidate's weights exist at a time."""
    import torch

    from quantcli.evaluation.simulate import simulated

    block = context.plan.structure.blocks[index]
    own = {linear.name for linear in block.linears}
    groups = [group for group in allocation.groups if group[0] in own]
    errors: Errors = {group[0]: {c.name: 0.0 for c in allocation.candidates} for group in groups}
    with stream.block(index) as module, torch.inference_mode():
        exact = []
        with ExitStack() as stack:
            seen = _observing(stack, context, module, block) if groups else {}
            for batch in range(len(stream.batches)):
                exact.append(stream.run(index, batch, cache.get(batch)))
                cache.put(batch, exact[-1])
        tokens = sum(output.shape[0] * output.shape[1] for output in exact)
        for name, source in sources.items():
            replaced = source.replacements(index, _statistics_of(context, block, seen), stream.skeleton.dtype)
            for group in groups:
                local = {linear.removeprefix(f"{block.name}."): replaced[linear] for linear in group}
                lost = 0.0
                with simulated(module, local, block.local_experts):
                    for batch, wanted in enumerate(exact):
                        output = stream.run(index, batch, cache.get(batch))
                        lost += float(relative_error(output, wanted).sum())
                errors[group[0]][name] = six_digits_or_none(lost / tokens)
    return errors


def _observing(stack: ExitStack, context: Context, module: Any, block: Block) -> dict[str, InputStatistics]:
    """Second moments of what enters the linears of a block, by full names, while `stack` is open."""
    from quantcli.calibration.expert_statistics import experts_observed
    from quantcli.calibration.statistics import inputs_observed

    shared = stack.enter_context(inputs_observed(module, block, context.device, counts=False))
    section = context.recipe.calibration
    every_token = section is not None and section.route_all_experts
    observed = experts_observed(module, block.local_experts, context.device, every_token=every_token)
    experts = stack.enter_context(observed)
    return {**shared, **{f"{block.name}.{name}": gathered for name, gathered in experts.items()}}


def _statistics_of(context: Context, block: Block, seen: Mapping[str, InputStatistics]) -> StatisticsOf:
    """What a linear's input was seen to be: ranges of static scales by the stage calibrate, second moments here."""
    readers = {linear: shared.name for shared in block.inputs for linear in shared.linears} | context.expert_inputs

    def statistics(name: str) -> dict[str, Tensor]:
        found = seen[readers[name]].to_tensors()
        if not context.plan.treatments[name].scheme.observed:
            return found
        return read_statistics(context, name) | {"second_moment": found["second_moment"]}

    return statistics


def _weights(context: Context, group: Sequence[str]) -> int:
    return sum(context.linears[name].weights for name in group)


def _comparable(error: float | None) -> float:
    return RUINED if error is None else min(error, RUINED)


def _part(index: int) -> str:
    return f"block-{index:05d}.json"


def _writes(context: Context) -> tuple[str, ...]:
    return (RESULT, *(_part(index) for index in range(context.blocks)), f"{HIDDEN}/*")


STAGE = Stage(
    "allocate",
    ("select", "smooth", "calibrate"),
    _wanted,
    _identity,
    run,
    _writes,
    guards=("check",),
    settle=settle,
    plain=_plain,
    title="Trying schemes for a number of bits",
    asked_by="quantize.target",
)
