"""select: leave out the calibration samples whose output quantization changes most."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.experts import tokens_of_experts
from quantcli.pipeline.plan import reads_calibration
from quantcli.pipeline.rundir import StageFolder, six_digits, write_json
from quantcli.pipeline.samples import SELECTION, calibration_samples
from quantcli.pipeline.tried import tried
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.calibration.tokens import TokenSet


def _wanted(recipe: Recipe) -> bool:
    return recipe.calibration is not None and recipe.calibration.drop_outliers > 0 and reads_calibration(recipe)


def _identity(context: Context) -> dict[str, Any]:
    section = context.recipe.calibration
    assert section is not None
    return {
        "calibration": data_identity(section),
        "experts": tokens_of_experts(context),
        "quantize": context.recipe.quantize.model_dump(mode="json"),
        "dtype": context.recipe.model.dtype,
        "device": context.device,
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes selection.json: the samples kept, and for each the KL divergence of its quantized from its float logits,
    nats a token. Quantized are weights and inputs as the plan has it, with what all samples together show."""
    from quantcli.calibration.selection import keep_samples

    section = context.recipe.calibration
    assert section is not None
    found = calibration_samples(context, every=True)
    differences = _differences(context, found)
    kept = keep_samples(differences, section.drop_outliers)
    dropped = len(differences) - len(kept)
    context.emit("note", text=f"{dropped} of {len(differences)} calibration samples are dropped: quantization changes "
                 "their output most.")  # fmt: skip
    content = {"kept": kept, "differences": [six_digits(value) for value in differences]}
    write_json(folder.path / SELECTION, content)
    folder.add(folder.path / SELECTION)


def _differences(context: Context, found: TokenSet) -> list[float]:
    from quantcli.calibration.expert_statistics import experts_observed
    from quantcli.calibration.statistics import inputs_observed
    from quantcli.evaluation.scores import score_windows
    from quantcli.evaluation.simulate import simulated
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.treatment import WeightSource

    batches = batched(found.samples)
    stream = BlockStream(context.skeleton(original=True), batches)
    exact = list(stream.start())
    rounded = list(exact)
    source = WeightSource(tried(context), original=True)
    assert context.recipe.calibration is not None
    every_token = context.recipe.calibration.route_all_experts
    for index, block in enumerate(context.plan.structure.blocks):
        started = time.perf_counter()
        of = {name: shared.name for shared in block.inputs for name in shared.linears}
        of |= {name: first.removeprefix(f"{block.name}.") for name, first in context.expert_inputs.items()}
        with stream.block(index) as module:
            with (
                inputs_observed(module, block, context.device) as statistics,
                experts_observed(module, block.local_experts, context.device, every_token=every_token) as of_experts,
            ):
                exact = [stream.run(index, batch, hidden) for batch, hidden in enumerate(exact)]

            def seen_by(name: str) -> dict[str, Tensor]:
                return {**statistics, **of_experts}[of[name]].to_tensors()  # noqa: B023

            replaced = source.replacements(index, seen_by, stream.skeleton.dtype)
            local = {name.removeprefix(f"{block.name}."): how for name, how in replaced.items()}
            with simulated(module, local, block.local_experts):
                rounded = [stream.run(index, batch, hidden) for batch, hidden in enumerate(rounded)]
        context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))
    with stream.head():
        scores = score_windows(
            batches,
            lambda batch, sample, first: stream.logits(exact[batch][sample : sample + 1, first - 1 : -1], None),
            lambda batch, sample, first: stream.logits(rounded[batch][sample : sample + 1, first - 1 : -1], None),
            None,
        )
    return [window.kl / max(1, window.tokens) for window in scores]


STAGE = Stage(
    "select",
    (),
    _wanted,
    _identity,
    run,
    lambda _: (SELECTION,),
    guards=("check",),
    title="Looking for calibration samples that mislead",
    asked_by="calibration.drop_outliers",
)
