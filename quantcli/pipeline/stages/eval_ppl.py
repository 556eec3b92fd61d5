"""eval-ppl: perplexity of the float model and of the exported checkpoint on the same tokens, block by block."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quantcli.model.checkpoint import replacing
from quantcli.pipeline.batches import data_identity, evaluation_batches
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.samples import protocol_facts
from quantcli.pipeline.served import advance, exported_model, head_as_served
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from quantcli.evaluation.protocols import EvaluationText
    from quantcli.evaluation.scores import Pieces, WindowScores
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream

RESULTS = "results.json"
TOKENS = "tokens.safetensors"
HIDDEN = {"float": "hidden-float", "quantized": "hidden-quantized"}


def _wanted(recipe: Recipe) -> bool:
    return recipe.evaluate is not None and recipe.evaluate.perplexity is not None


def _identity(context: Context) -> dict[str, Any]:
    assert context.recipe.evaluate is not None
    assert context.recipe.evaluate.perplexity is not None
    return {"perplexity": data_identity(context.recipe.evaluate.perplexity), "dtype": context.recipe.model.dtype,
            "device": context.device}  # fmt: skip


def run(context: Context, folder: StageFolder) -> None:
    """Writes results.json and tokens.safetensors, the scores of every token. Reads the weights from the export, through
    its reader, never from the store; of the float model the hidden states that stage `reference` kept."""
    import torch
    from safetensors.torch import save_file

    from quantcli.evaluation.scores import COLUMNS, per_token, summarize, text_scores, with_distributions
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.stages.reference import float_states

    assert context.recipe.evaluate is not None
    assert context.recipe.export is not None
    section = context.recipe.evaluate.perplexity
    assert section is not None
    if RESULTS in folder.files:
        for hidden in HIDDEN.values():
            HiddenCache(folder.path / hidden, [], torch.float32).clear()
        return
    text = context.evaluation_text
    context.emit("tokens", samples=len(text.windows), tokens=text.tokens, protocol=section.protocol)
    if len(text.windows) == 1:
        context.emit("note", text="The evaluation text fills one window alone, so that no error of its scores can be "
                     "told. Take a longer text, or a shorter evaluate.perplexity.sequence_length.")  # fmt: skip
    batches = evaluation_batches(text.windows)
    form = context.recipe.export.formats[0]
    quantized, exported = exported_model(context)
    original = context.skeleton(original=True)
    streams = {"float": BlockStream(original, batches), "quantized": BlockStream(quantized, batches)}
    kept = float_states(context, streams["float"])
    own = ["quantized"] if kept is not None else ["float", "quantized"]
    caches = {name: context.hidden_cache(folder.path / HIDDEN[name], streams[name]) for name in own}
    for name, cache in caches.items():
        read = exported if name == "quantized" else None
        advance(name, streams[name], cache, read, section.phase, context.emit, section.arithmetic)
    states = caches if kept is None else {"float": kept, **caches}
    with head_as_served(quantized, exported, section.phase, section.arithmetic):
        windows = windows_scored(streams, states, text, batches)
    scores = with_distributions(summarize(windows, quantized=True, batch=text.batch), windows)
    columns = {name: values.contiguous() for name, values in zip(COLUMNS, per_token(windows).unbind(1), strict=True)}
    with replacing(folder.path / TOKENS) as temporary:
        save_file(columns, temporary)
    folder.add(folder.path / TOKENS)
    result = {
        **protocol_facts(section, text, scores.tokens),
        "arithmetic": section.arithmetic,
        "checkpoint": form,
        **{key: finite(value) for key, value in asdict(scores).items()},
        "per_text": finite(text_scores(windows, text, quantized=True)),
    }
    context.emit("perplexity", **{key: value for key, value in result.items() if key != "per_window"})
    write_json(folder.path / RESULTS, result)
    folder.add(folder.path / RESULTS)
    for cache in caches.values():
        cache.clear()


def windows_scored(
    streams: dict[str, BlockStream], caches: dict[str, HiddenCache], text: EvaluationText, batches: list[Any]
) -> list[WindowScores]:
    """Per-window scores of the models `float` and, if it is there, `quantized`, from the hidden states that left their
    last blocks."""
    from quantcli.evaluation.scores import score_windows
    from quantcli.model.heap import large_blocks_kept
    from quantcli.model.stream import HEAD_BYTES

    def logits(name: str) -> Pieces:
        return lambda batch, sample, first: streams[name].logits(
            caches[name].get(batch)[sample : sample + 1, first - 1 : -1], None
        )

    with ExitStack() as heads:
        heads.enter_context(large_blocks_kept(2 * HEAD_BYTES))
        for stream in streams.values():
            heads.enter_context(stream.head())
        quantized = logits("quantized") if "quantized" in streams else None
        return score_windows(batches, logits("float"), quantized, text.masked_token, text.first)


def finite(value: Any) -> Any:
    """The value with null in the place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [finite(v) for v in value]
    return {k: finite(v) for k, v in value.items()} if isinstance(value, dict) else value


def _writes(context: Context) -> tuple[str, ...]:
    return (RESULTS, TOKENS, *(f"{folder}/*" for folder in HIDDEN.values()))


STAGE = Stage(
    "eval-ppl",
    ("reference", "export"),
    _wanted,
    _identity,
    run,
    _writes,
    guards=("check", "verify"),
    title="Scoring",
    asked_by="evaluate.perplexity",
)
