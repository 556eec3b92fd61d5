"""layers: how far what each exported linear puts out is from what it puts out in float, for the same inputs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.batches import batched, data_identity, texts_of
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.source import known_positions
from quantcli.pipeline.stages.sensitivity import output_errors
from quantcli.recipe.data import PerplexitySection
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from quantcli.evaluation.simulate import Replacement
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.stream import BlockStream

RESULT = "errors.json"


def _wanted(recipe: Recipe) -> bool:
    evaluate = recipe.evaluate
    return evaluate is not None and evaluate.output_error is not None and evaluate.perplexity is not None


def _tokens(recipe: Recipe) -> tuple[int, PerplexitySection]:
    assert recipe.evaluate is not None
    assert recipe.evaluate.output_error is not None
    assert recipe.evaluate.perplexity is not None
    return recipe.evaluate.output_error.tokens, recipe.evaluate.perplexity


def _identity(context: Context) -> dict[str, Any]:
    tokens, section = _tokens(context.recipe)
    return {"text": data_identity(section)["text"], "tokens": tokens, "phase": section.phase,
            "dtype": context.recipe.model.dtype, "device": context.device}  # fmt: skip


def run(context: Context, folder: StageFolder) -> None:
    """Writes errors.json: ‖ŷ − y‖² / ‖y‖² of every linear of a block that is quantized and put something out.

    y is the output of the float linear (smoothed, if the recipe smooths), ŷ that of the exported one, read from its
    files, for the inputs that the first tokens of the evaluation text give it in the float model.
    """
    import torch

    from quantcli.calibration.tokens import tokenize
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.served import exported_checkpoint
    from quantcli.pipeline.stages.export import float_source

    wanted, section = _tokens(context.recipe)
    length = min(wanted, known_positions(context.model) or wanted)
    tokenizer = context.tokenizer()
    texts = texts_of(section, tokenizer)
    text = tokenize(tokenizer, texts, samples=1, sequence_length=length, packing="packed", seed=0)
    exported, weights = exported_checkpoint(context), float_source(context).weights
    stream = BlockStream(context.skeleton(), batched(text.samples))
    (hidden,) = stream.start()
    errors: dict[str, dict[str, float | None]] = {}
    for index, block in enumerate(context.plan.structure.blocks):
        started = time.perf_counter()
        planned = [linear.name for linear in block.linears if linear.name in context.plan.schemes]
        replaced = {name: _exported(context, exported, weights[name], name, stream, section) for name in planned}
        found: dict[str, dict[str, float | None]] = {name: {} for name in replaced}
        with stream.block(index) as module, torch.inference_mode(), output_errors(module, block, replaced, found):
            hidden = stream.run(index, 0, hidden)
        errors |= {name: error for name, error in found.items() if error}
        seconds = round(time.perf_counter() - started, 3)
        context.emit("block", index=index, of=context.blocks, seconds=seconds)
    content = {"tokens": text.tokens, "linears": [{"name": name, **error} for name, error in errors.items()]}
    write_json(folder.path / RESULT, content)
    folder.add(folder.path / RESULT)


def _exported(
    context: Context,
    exported: QuantizedCheckpoint,
    weight: str,
    name: str,
    stream: BlockStream,
    section: PerplexitySection,
) -> Replacement:
    """A linear as an engine computes it: integer products, or the weight [out, in] that its codes stand for."""
    from quantcli.pipeline.treatment import replacement

    dtype, device = stream.skeleton.dtype, stream.skeleton.device
    if name in exported.schemes:
        return replacement(exported.read_linear(name), exported.schemes[name], dtype, device, section.phase)
    dense = exported.read([weight])[weight].to(device, dtype)
    return dense.t() if context.linears[name].transposed else dense


STAGE = Stage(
    "layers",
    ("smooth", "export"),
    _wanted,
    _identity,
    run,
    lambda _: (RESULT,),
    guards=("check", "verify"),
    title="Comparing what linears put out",
    asked_by="evaluate.output_error",
)
