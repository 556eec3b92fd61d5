"""check: is the float model sane? A broken tokenizer or damaged weights show on a few hundred tokens."""

from __future__ import annotations

import math
from typing import Any

from quantcli.calibration.builtin_text import builtin_documents
from quantcli.errors import ModelError
from quantcli.pipeline.batches import batched, data_identity, texts_of
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.plan import reads_calibration
from quantcli.pipeline.rundir import StageFolder, six_digits_or_none, write_json
from quantcli.pipeline.source import known_positions, require_known_tokens
from quantcli.recipe.data import CalibrationSection, PerplexitySection
from quantcli.recipe.schema import Recipe

RESULT = "sanity.json"
TOKENS = 512
# Ordinary text has 1.2 to 2 tokens a word; one token a character gives more than 5. A sane model's perplexity on prose
# is below 100; a model that reads through a wrong tokenizer is at thousands.
MOST_TOKENS_A_WORD = 4.0
HIGHEST_PERPLEXITY = 1000.0


def _section(recipe: Recipe) -> CalibrationSection | PerplexitySection | None:
    """The text that the model will be run on, or the built-in one where it is only asked tasks; None when it is not run
    at all."""
    if recipe.calibration is not None and reads_calibration(recipe):
        return recipe.calibration
    if recipe.evaluate is None or recipe.evaluate.perplexity is not None:
        return None if recipe.evaluate is None else recipe.evaluate.perplexity
    # an installation of Python may lack that text
    return PerplexitySection() if recipe.evaluate.tasks and builtin_documents() else None


def _wanted(recipe: Recipe) -> bool:
    return recipe.model.sanity_check != "off" and _section(recipe) is not None


def _identity(context: Context) -> dict[str, Any]:
    section = _section(context.recipe)
    assert section is not None
    return {"text": data_identity(section)["text"], "mode": context.recipe.model.sanity_check,
            "dtype": context.recipe.model.dtype, "device": context.device}  # fmt: skip


def run(context: Context, folder: StageFolder) -> None:
    """Perplexity and tokens a word of the float model on the first tokens of the text. Raises ModelError if absurd."""
    from quantcli.calibration.tokens import tokenize

    section = _section(context.recipe)
    assert section is not None
    tokenizer = context.tokenizer()
    length = min(TOKENS, known_positions(context.model) or TOKENS)
    found = tokenize(
        tokenizer, texts_of(section, tokenizer), samples=1, sequence_length=length, packing="packed", seed=0
    )
    require_known_tokens(found.samples, context.plan.structure.vocabulary)
    if found.tokens_per_word > MOST_TOKENS_A_WORD:
        _report(context, f"The tokenizer cuts this text into {found.tokens_per_word:.1f} tokens a word; sane ones need "
                "1 to 2. It was probably converted wrongly.")  # fmt: skip
    perplexity = _perplexity(context, found.samples)
    if not perplexity < HIGHEST_PERPLEXITY:
        _report(context, f"The float model's perplexity on the first {found.tokens} tokens is {perplexity:.0f}, and a "
                "sane model's is below 100. Its tokenizer or its weights are probably broken.")  # fmt: skip
    result = {
        "tokens": found.tokens,
        "tokens_per_word": round(found.tokens_per_word, 3),
        "perplexity": six_digits_or_none(perplexity),
    }
    context.emit("sanity", **result)
    write_json(folder.path / RESULT, result)
    folder.add(folder.path / RESULT)


def _report(context: Context, problem: str) -> None:
    if context.recipe.model.sanity_check == "stop":
        raise ModelError(problem, "If it is meant to be so, set model.sanity_check: warn.")
    context.emit("warning", fallback="insane_model", text=problem)


def _perplexity(context: Context, samples: list[list[int]]) -> float:
    from torch.nn.functional import cross_entropy

    from quantcli.model.stream import BlockStream

    (batch,) = batched(samples)
    stream = BlockStream(context.skeleton(original=True), [batch])
    (hidden,) = stream.start()
    for index in range(context.blocks):
        with stream.block(index):
            hidden = stream.run(index, 0, hidden)
    total = 0.0
    with stream.head():
        for positions, logits in stream.logits(hidden[:, :-1]):
            labels = batch[0, 1:][positions].to(logits.device)
            total += cross_entropy(logits[0], labels, reduction="sum").item()
    mean = total / (batch.shape[1] - 1)
    return math.exp(mean) if mean < 700 and not math.isnan(mean) else math.inf


STAGE = Stage(
    "check",
    (),
    _wanted,
    _identity,
    run,
    lambda _: (RESULT,),
    title="Checking that the float model is sane",
    asked_by="model.sanity_check",
)
