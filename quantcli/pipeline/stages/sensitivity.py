"""sensitivity: rank the linears by how much quantization hurts them, and roll the first of them back."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.batches import batched
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.fused import fused_groups
from quantcli.pipeline.plan import make_plan
from quantcli.pipeline.rundir import StageFolder, append_line, read_lines, six_digits_or_none, write_json
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.stages.calibrate import read_statistics
from quantcli.pipeline.tried import tried
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.evaluation.simulate import Replacement
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.model.structure import Block
    from quantcli.pipeline.treatment import WeightSource

Metrics = dict[str, float | None]

RESULT = "sensitivity.json"
HIDDEN = "hidden"
OF_INPUTS = ("range_parm", "kurtosis", "quantile")
OF_OUTPUTS = ("output_error", "block_error")
OF_MODEL = "kl_divergence"
MEASURED = "measured.jsonl"
STORE = "store"
TOKENS = 4096
"""Calibration tokens on which errors of outputs are measured; what is known of inputs comes from all of them."""
MODEL_TOKENS = 2048
"""Calibration tokens on which the whole model is measured, once for each group of linears."""


def _wanted(recipe: Recipe) -> bool:
    return recipe.quantize.rollback.ranks


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    return {
        "quantize": recipe.quantize.model_dump(mode="json"),
        "schemes": {name: scheme.to_json() for name, (_, scheme) in context.plan.schemes.items()},
        "dtype": recipe.model.dtype,
        "device": context.device,
        "outputs": _measures_outputs(context),
    }


def _measures_outputs(context: Context) -> bool:
    return context.ranking or context.recipe.quantize.rollback.ranked_by in OF_OUTPUTS


def _measures_model(context: Context) -> bool:
    return context.recipe.quantize.rollback.ranked_by == OF_MODEL


def run(context: Context, folder: StageFolder) -> None:
    """Writes sensitivity.json: the metrics of every quantized linear, most sensitive first, and what is rolled back.

    range_parm, kurtosis and quantile describe the input (`InputStatistics`). output_error is the relative squared error
    of the linear's output under its scheme, ‖ŷ − y‖² / ‖y‖²; block_error the mean over tokens of that of its block's
    output, with the linear and those that are fused with it quantized and the rest in float; kl_divergence that of the
    model's logits, in nats a token, quantized likewise, and the only one that costs a pass through the model for each
    group: it is measured where the recipe ranks by it. A metric that is not finite is null, and above every number; the
    output head has no errors, and without one a linear comes last. Linears of `_fixed` are ranked, not rolled back.
    """
    names = context.plan.rankable
    observed = _observed(context)
    observed -= context.expert_inputs.keys()  # of those the values are not counted
    rows: dict[str, Metrics] = {name: _of_input(context, name) if name in observed else {} for name in names}
    if _measures_outputs(context):
        for name, errors in _of_outputs(context, folder).items():
            if name in rows:
                rows[name] |= errors
    if _measures_model(context):
        for name, divergence in _of_model(context, folder).items():
            rows[name][OF_MODEL] = divergence
    section = context.recipe.quantize.rollback
    metric = section.ranked_by
    ranking = sorted(names, key=lambda name: -_comparable(rows[name], metric))
    level, fixed = section.level, _fixed(context)
    if level > len(set(names) - fixed):
        kept = f"all but {len(fixed)}, which have biases that a shift added," if fixed else "all of them"
        context.emit("warning", text=f"quantize.rollback.level is {level}, and {len(ranking)} linears are quantized: "
                     f"{kept} are rolled back.")  # fmt: skip
    chosen = [name for name in ranking if name not in fixed][:level]
    content = {
        "metric": metric,
        "linears": [{"name": name, **rows[name]} for name in ranking],
        "rolled_back": {name: _reason(rows[name], metric) for name in chosen},
    }
    for name in names:
        context.emit("sensitivity", module=name, **rows[name])
    write_json(folder.path / RESULT, content)
    folder.add(folder.path / RESULT)


def _fixed(context: Context) -> set[str]:
    """Linears that stay as they are, for engines read a bias that a shift added to them beside their codes alone; and
    those that are fused with them."""
    from quantcli.model.folding import added_biases

    biased = {name.removesuffix(".bias") for name in added_biases(context.checkpoint)}
    groups = fused_groups(context.plan.structure, context.plan.rankable)
    return {name for group in groups if biased.intersection(group) for name in group}


def _comparable(row: Metrics, metric: str) -> float:
    value = row.get(metric, -math.inf)
    return math.inf if value is None else value


def _reason(row: Metrics, metric: str) -> str:
    value = row.get(metric)
    return f"rolled back by {metric}" + ("" if value is None else f" {value:.4g}")


def settle(context: Context) -> None:
    """Bring the linears that are rolled back into the plan."""
    content = json.loads((context.folder(STAGE.name) / RESULT).read_text(encoding="utf-8"))
    if context.recipe.quantize.rollback.target is None:
        context.plan = make_plan(context.recipe, context.model, context.plan.structure, content["rolled_back"])


def _of_input(context: Context, name: str) -> Metrics:
    from quantcli.quant.observers import kurtosis, quantile_score

    seen = read_statistics(context, name)
    largest = max(abs(float(seen["minimum"].min())), abs(float(seen["maximum"].max())))
    found = {
        "range_parm": float(seen["range_parm"]),
        "kurtosis": kurtosis(seen["value_counts"]),
        "quantile": quantile_score(seen["value_counts"], largest),
    }
    return {key: six_digits_or_none(value) for key, value in found.items()}


def _observed(context: Context) -> set[str]:
    """Linears whose input the calibrate stage saw; the head is one only if its scheme needs it."""
    content = json.loads((context.folder("calibrate") / "manifest.json").read_text(encoding="utf-8"))
    return set(content["linears"])


def _of_outputs(context: Context, folder: StageFolder) -> dict[str, Metrics]:
    """output_error and block_error of each linear of the blocks; a block at a time, resumable between blocks."""
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.treatment import WeightSource

    source = WeightSource(tried(context))
    stream = BlockStream(context.skeleton(), batched(first_samples(context, TOKENS)))
    cache = HiddenCache(
        folder.path / HIDDEN, stream.hidden_shapes(), stream.skeleton.dtype, context.recipe.model.cache_memory
    )
    parts = [folder.path / _part(index) for index in range(context.blocks)]
    done = cache.resume([part.name in folder.files for part in parts])
    for index in range(stream.enter(cache, done), context.blocks):
        started = time.perf_counter()
        errors = _block_errors(context, source, stream, cache, index)
        write_json(parts[index], errors)
        folder.add(parts[index])
        cache.commit(index + 1)
        context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))
    cache.clear()
    found: dict[str, Metrics] = {}
    for part in parts:
        found |= json.loads(part.read_text(encoding="utf-8"))
    return found


def _of_model(context: Context, folder: StageFolder) -> dict[str, float | None]:
    """kl_divergence of each linear; a group at a time, resumable between groups."""
    from quantcli.evaluation.protocols import EvaluationText
    from quantcli.pipeline.stages.quantize import trial_store
    from quantcli.pipeline.trial import TrialModel

    file = folder.journal(MEASURED)
    found = {name: entry["kl_divergence"] for entry in read_lines(file) for name in entry["linears"]}
    groups = [g for g in fused_groups(context.plan.structure, context.plan.rankable) if g[0] not in found]
    if groups:
        text = EvaluationText("calibration", first_samples(context, MODEL_TOKENS), 0, None, "")
        store = trial_store(context, folder.path / STORE)
        model = TrialModel(context, store, None, text, "prefill")
        every = set(store.schemes)
        for number, group in enumerate(groups, start=1):
            started = time.perf_counter()
            scores = model.measure(every - set(group))
            assert scores.kl_divergence is not None
            divergence = six_digits_or_none(scores.kl_divergence)
            append_line(file, {"linears": list(group), "kl_divergence": divergence})
            found |= dict.fromkeys(group, divergence)
            context.emit("group", number=number, of=len(groups), linears=list(group), kl_divergence=divergence,
                         seconds=round(time.perf_counter() - started, 3))  # fmt: skip
    shutil.rmtree(folder.path / STORE, ignore_errors=True)  # also of a run that was killed behind its last group
    folder.add(file)  # measurements belong to this fingerprint: under another the folder removes what it knows of
    return found


def first_samples(context: Context, tokens: int) -> list[list[int]]:
    """The first calibration samples that together have at most so many tokens; at least one, cut off there."""
    samples, taken = [], 0
    for sample in calibration_samples(context).samples:
        if taken and taken + len(sample) > tokens:
            break
        samples.append(sample[:tokens])
        taken += len(sample)
    return samples


def _block_errors(
    context: Context, source: WeightSource, stream: BlockStream, cache: HiddenCache, index: int
) -> dict[str, Metrics]:
    import torch

    from quantcli.evaluation.simulate import simulated

    block: Block = context.plan.structure.blocks[index]
    replaced = source.replacements(index, partial(read_statistics, context), stream.skeleton.dtype)
    errors: dict[str, Metrics] = {name: {} for name in replaced}
    with stream.block(index) as module, torch.inference_mode():
        exact = []
        with output_errors(module, block, replaced, errors):
            for batch in range(len(stream.batches)):
                exact.append(stream.run(index, batch, cache.get(batch)))
                cache.put(batch, exact[-1])
        for found in errors.values():
            found.setdefault("output_error", 0.0)
        for group in fused_groups(context.plan.structure, replaced):
            lost, tokens = 0.0, 0
            local = {name.removeprefix(f"{block.name}."): replaced[name] for name in group}
            with simulated(module, local, block.local_experts):
                for batch, wanted in enumerate(exact):
                    output = stream.run(index, batch, cache.get(batch))
                    lost += float(relative_error(output, wanted).sum())
                    tokens += wanted.shape[0] * wanted.shape[1]
            for name in group:
                errors[name]["block_error"] = six_digits_or_none(lost / tokens)
    return errors


@contextmanager
def output_errors(
    module: nn.Module,
    block: Block,
    replaced: Mapping[str, Replacement],
    errors: dict[str, Metrics],
) -> Iterator[None]:
    """While the body runs the block, compare what each linear puts out with what it would put out quantized.

    Afterwards `errors` has an output_error of each linear that put out anything.
    """
    from torch import nn
    from torch.nn.functional import linear

    from quantcli.evaluation.simulate import forward_of
    from quantcli.model.expert_loop import Weight, one_by_one

    sums = {name: [0.0, 0.0] for name in replaced}

    def compare(name: str, output: Tensor, quantized: Tensor) -> None:
        wanted = output.float()
        sums[name][0] += float((quantized.float() - wanted).square().sum(dtype=wanted.dtype))
        sums[name][1] += float(wanted.square().sum())

    def expert_linear(local: str, x: Tensor, weight: Weight) -> Tensor:
        output, name = linear(x, weight()), f"{block.name}.{local}"
        if name in replaced:
            compare(name, output, forward_of(nn.Module(), replaced[name])(x))
        return output

    joined = {name for experts in block.experts for name in experts.names}
    with ExitStack() as stack:
        for name in replaced.keys() - joined:
            owner = module.get_submodule(name.removeprefix(f"{block.name}."))
            quantized = forward_of(owner, replaced[name])

            def hook(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: Tensor,
                _quantized: Any = quantized,
                _name: str = name,
            ) -> None:
                compare(_name, output, _quantized(*args, **kwargs))

            stack.callback(owner.register_forward_hook(hook, with_kwargs=True).remove)
        for experts in block.local_experts if joined & replaced.keys() else ():
            stack.enter_context(one_by_one(module.get_submodule(experts.name), experts, expert_linear))
        yield
    for name, (lost, whole) in sums.items():
        if whole:
            errors[name]["output_error"] = six_digits_or_none(lost / whole)


def relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    """‖output − wanted‖² / ‖wanted‖² of every token."""
    exact = wanted.float()
    norm = exact.square().sum(-1)
    return (output.float() - exact).square().sum(-1) / norm.clamp(min=1e-30)


def _part(index: int) -> str:
    return f"block-{index:05d}.json"


def _writes(context: Context) -> tuple[str, ...]:
    return (RESULT, MEASURED, f"{STORE}/*", *(_part(index) for index in range(context.blocks)), f"{HIDDEN}/*")


STAGE = Stage(
    "sensitivity",
    ("smooth", "calibrate"),
    _wanted,
    _identity,
    run,
    _writes,
    settle=settle,
    title="Ranking linears by sensitivity",
    asked_by="calibration",
)
