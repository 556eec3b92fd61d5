"""The tokens of a run: its calibration samples, without those that were found to mislead, and those it evaluates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantcli.pipeline.batches import beginning, calibration_tokens, data_identity, rows_of, texts_of
from quantcli.pipeline.context import Context
from quantcli.recipe.data import PerplexitySection

if TYPE_CHECKING:
    from quantcli.calibration.tokens import TokenSet
    from quantcli.evaluation.protocols import EvaluationText

Item = TypeVar("Item")

SELECTION = "selection.json"


def calibration_samples(context: Context, *, every: bool = False) -> TokenSet:
    """The samples of the recipe's calibration section; with `every`, also those that stage `select` dropped."""
    section, evaluation = context.recipe.calibration, context.recipe.evaluate
    assert section is not None
    length = evaluation.perplexity.sequence_length if evaluation and evaluation.perplexity else None
    found = calibration_tokens(section, context.tokenizer(), length)
    if every or "select" not in context.results:
        return found
    content = json.loads((context.folder("select") / SELECTION).read_text(encoding="utf-8"))
    samples = [found.samples[index] for index in content["kept"]]
    return replace(found, samples=samples, tokens=sum(map(len, samples)))


def spread(samples: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the samples (or of tokens' places), evenly spaced and in order; all if no more, or without a count."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // count] for index in range(count)]


def windows_of(section: PerplexitySection, tokenizer: Any) -> EvaluationText:
    """The windows that a section of evaluation text asks for."""
    from quantcli.evaluation.protocols import evaluation_windows

    rows = None if section.protocol == "standard" else rows_of(section, tokenizer)
    return evaluation_windows(
        texts_of(section, tokenizer) if rows is None else rows,
        tokenizer,
        section.protocol,
        section.sequence_length,
        section.windows,
        stride=section.stride,
        begin=beginning(tokenizer, section.bos, "evaluate.perplexity.bos") if section.protocol == "standard" else (),
        batch=section.batch_size,
        wikitext=section.dataset == "wikitext2",
        table=rows is not None,
    )


def protocol_facts(section: PerplexitySection, text: EvaluationText, scored: int) -> dict[str, Any]:
    """What a perplexity depends on beside the model, for the record that holds it. `scored`: predictions that count.

    `data` names the text and holds the digest of its contents; `tokens_digest` is of the tokens, which are the same
    from whatever file they come.
    """
    path = Path(section.path) if section.path else None
    chosen = path is None or (path.is_dir() and section.dataset in ("wikitext2", "boolq"))  # one of several splits
    data = {"dataset": section.dataset, "file": path.name if path else None,
            "split": section.split if chosen else None, "subset": section.subset, "field": section.field,
            "digest": data_identity(section)["text"]}  # fmt: skip
    masked = {"token": text.masked_token, "predictions": text.tokens - scored}
    return {
        "protocol": text.protocol,
        "description": text.description,
        "data": data,
        "sequence_length": section.sequence_length,
        "stride": section.stride,
        "begin": text.begin,
        "batch_size": text.batch,
        "masked": None if text.masked_token is None else masked,
        "tokens_digest": text.digest(),
    }
