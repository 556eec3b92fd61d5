"""Calibration and evaluation tokens as batches for a block stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.recipe.schema import CalibrationSection, PerplexitySection

if TYPE_CHECKING:
    from torch import Tensor

BATCH_TOKENS = 2048
"""Tokens in a batch: enough to keep matrix products busy, few enough that a batch's activations stay small."""


def batched(samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """Samples, in order, as token ids [samples, tokens] of equal length, without padding."""
    import torch

    batches = []
    for length, run in groupby(samples, key=len):
        same = list(run)
        step = max(1, BATCH_TOKENS // length)
        batches += [torch.tensor(same[i : i + step]) for i in range(0, len(same), step)]
    return batches


def texts_of(section: CalibrationSection | PerplexitySection) -> list[str]:
    """The documents that a section of a recipe names."""
    from quantcli.calibration.datasets import load_texts

    return load_texts(section.dataset, path=_path(section), field=section.field, split=section.split)


def data_identity(section: CalibrationSection | PerplexitySection) -> dict[str, Any]:
    """The section without its path, and a digest of the text in its place."""
    from quantcli.calibration.datasets import data_fingerprint

    digest = data_fingerprint(section.dataset, _path(section), section.field, section.split)
    return {**section.model_dump(exclude={"path"}), "text": digest}


def _path(section: CalibrationSection | PerplexitySection) -> Path | None:
    return Path(section.path) if section.path else None
