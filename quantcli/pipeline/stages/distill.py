"""distill: scales and norms tuned until the quantized model predicts what the float model does."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.batches import batched, data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.tuned import FILE, write_tuned

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.model.stream import BlockStream

RESULT = "distilled.json"
HIDDEN = "hidden"


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    assert recipe.calibration is not None
    assert recipe.quantize.distill is not None
    return {
        "distill": recipe.quantize.distill.model_dump(mode="json"),
        "calibration": data_identity(recipe.calibration),
        "model": [recipe.model.dtype, recipe.model.trust_remote_code, context.device],
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes tuned.safetensors and distilled.json: the divergence on samples kept apart before and after.

    Where it did not fall, nothing is tuned, and a note says so.
    """
    from quantcli.formats.store import Store
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.distillation import Student, train

    section, calibration = context.recipe.quantize.distill, context.recipe.calibration
    assert section is not None
    assert calibration is not None
    found = calibration_samples(context)
    context.emit("tokens", samples=len(found.samples), tokens=found.tokens, documents=found.documents_used)
    batches = batched(found.samples)
    if len(batches) == 1:  # one part to learn from, one to check it on
        batches = [half for half in batches[0].tensor_split(2) if len(half)]
    apart = max(1, round(section.held_out * len(batches)))
    stream = BlockStream(context.skeleton(), batches)
    student = Student(context, stream, Store(context.folder("quantize")), section)
    if len(batches) <= apart:
        context.emit("warning", fallback="not_tuned",
                     text="quantize.distill has no effect with one calibration sample, which leaves none to "
                     "check it on. Use more calibration text.")  # fmt: skip
        _write(folder, {}, {}, {"steps": 0})
        return
    states = _states(context, folder, stream)
    student.prepare()
    checked, taught = range(len(batches) - apart, len(batches)), list(range(len(batches) - apart))
    order = [batch for turn in range(section.passes) for batch in _shuffled(taught, calibration.seed + turn)]

    def measured() -> float:
        sums = [
            student.divergence(student.forward(b, states[b][0])[-1], states[b][1]) * batches[b].numel() for b in checked
        ]
        return sum(sums) / sum(batches[b].numel() for b in checked)

    before, started = measured(), time.perf_counter()
    for number, loss in enumerate(train(student, order, states)):
        seconds = round(time.perf_counter() - started, 3)
        context.emit("block", index=number, of=len(order), seconds=seconds, loss=float(f"{loss:.4g}"))
        started = time.perf_counter()
    after = measured()
    facts = {"steps": len(order), "kl_before": float(f"{before:.4g}"), "kl_after": float(f"{after:.4g}")}
    context.emit("distilled", **facts)
    if after < before:
        _write(folder, *student.tuned(), facts)
    else:
        context.emit("warning", fallback="not_tuned",
                     text=f"Tuning does not help on samples kept apart (KL divergence {before:.4g}, then "
                     f"{after:.4g}): scales and norms stay as they were. Try lower rates or more text.")  # fmt: skip
        _write(folder, {}, {}, facts)


def _states(context: Context, folder: StageFolder, stream: BlockStream) -> dict[int, tuple[Tensor, Tensor]]:
    """Of every batch what enters the first block, and what leaves the last one of the float model."""
    cache = context.hidden_cache(folder.path / HIDDEN, stream)
    stream.enter(cache, None)
    embedded = [cache.get(batch).clone() for batch in range(len(stream.batches))]
    for index in range(context.blocks):
        started = time.perf_counter()
        with stream.block(index):
            for batch in range(len(stream.batches)):
                cache.put(batch, stream.run(index, batch, cache.get(batch)))
        cache.commit(index + 1)
        seconds = round(time.perf_counter() - started, 3)
        context.emit("block", index=index, of=context.blocks, seconds=seconds, model="float")
    found = {batch: (hidden, cache.get(batch).clone()) for batch, hidden in enumerate(embedded)}
    cache.clear()
    return found


def _shuffled(batches: list[int], seed: int) -> list[int]:
    order = list(batches)
    random.Random(seed).shuffle(order)
    return order


def _write(folder: StageFolder, scales: dict[str, Tensor], vectors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    folder.add(folder.path / FILE, write_tuned(folder.path, scales, vectors))
    write_json(folder.path / RESULT, facts | {"scales": len(scales), "vectors": len(vectors)})
    folder.add(folder.path / RESULT)


STAGE = Stage(
    "distill",
    ("select", "smooth", "quantize"),
    lambda recipe: recipe.quantize.distill is not None,
    _identity,
    run,
    lambda _: (FILE, RESULT, f"{HIDDEN}/*"),
    guards=("check",),
    title="Tuning scales and norms",
    asked_by="quantize.distill",
)
