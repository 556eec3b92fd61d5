"""The calibration samples of a run, without those that were found to mislead."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from quantcli.pipeline.batches import calibration_tokens
from quantcli.pipeline.context import Context

if TYPE_CHECKING:
    from quantcli.calibration.tokens import TokenSet

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
