"""Learned rounding of blocks that leave nothing to learn from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_contexts import changed
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

import quantcli

Recipe = dict[str, Any]


@pytest.mark.parametrize("scope", [None, "token"])
def test_a_block_that_adds_nothing_is_left_as_it_is(
    scope: str | None, static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    """As blocks are before an expanded model (LLaMA Pro) is trained: what they add is no measure of an error."""
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    for writer in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{writer}.weight"].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = changed(
        static_recipe(tmp_path / "run"), model__path=str(model), export=None, evaluate=None,
        calibration__samples=16, quantize={"weights": {"bits": 8, "method": "signround"}},
    )  # fmt: skip
    if scope is not None:
        recipe = changed(recipe, quantize__activations={"bits": 8, "scope": scope})
    quantcli.run(recipe)
    lines = Path(recipe["output"], "events.jsonl").read_text(encoding="utf-8").splitlines()
    linears = [event for event in map(json.loads, lines) if event["event"] == "linear"]
    first = [event for event in linears if event["module"].startswith("model.layers.0.")]
    assert [(event["tuned_from"], event["tuned_to"]) for event in first] == [(0, 0)] * 7
    assert all(0 < event["tuned_from"] < math.inf for event in linears if event not in first)
