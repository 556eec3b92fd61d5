"""What a configuration says of a checkpoint is held against its tensors, and refused where it is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_exports import Export, export_tiny

from quantcli.errors import ModelError, VerificationError
from quantcli.formats.sums import SUMS
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.standalone import open_checkpoint, score_recipe
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme
from quantcli.recipe import load_recipe

FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)


def made(place: Path, form: str, scheme: Scheme = FOUR, **changes: Any) -> Export:
    """An export without checksums, as others leave them out."""
    export = export_tiny(place, scheme, dtype=torch.bfloat16, form=form, with_tokenizer=True, **changes)
    (export.folder / SUMS).unlink()
    return export


def say(folder: Path, **changes: Any) -> None:
    """Change quantization_config in config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


HADAMARD = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("transform_config", {"config_groups": {"u": HADAMARD}}, "rotations that engines apply"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "'sparse-24-bitmask'"),
        ("sparsity_config", {"sparsity_structure": "2:4"}, "are not supported"),
    ],
)
def test_what_would_change_the_function_is_refused(
    key: str, value: dict[str, Any], reason: str, prose: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path, "compressed-tensors").folder
    say(folder, **{key: value})
    said = rf"config.json: quantization_config.{key}: .*{reason}"
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 1}
    recipe = {"model": {"path": str(folder)}, "quantize": {}, "evaluate": {"perplexity": text}, "output": "unused"}
    with pytest.raises(ModelError, match=said):
        score_recipe(load_recipe(recipe))
    with pytest.raises(ModelError, match=said):
        convert_checkpoint(folder, "awq", tmp_path / "out")
    with pytest.raises(VerificationError, match=said):
        verify_path(folder)


def test_what_changes_nothing_is_read(tmp_path: Path) -> None:
    folder = made(tmp_path, "compressed-tensors").folder
    for transforms in ({}, None, {"config_groups": {}}):
        for sparsity in ({}, None, {"format": "dense", "global_sparsity": 0.1}):
            say(folder, transform_config=transforms, sparsity_config=sparsity)
            assert len(open_checkpoint(folder)[1].schemes) == 14
