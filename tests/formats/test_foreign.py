"""Checkpoints that llm-compressor and AutoRound have made score as transformers scores them (foreign/make.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from quantcli.pipeline.standalone import score_recipe
from quantcli.recipe import load_recipe

FOREIGN = Path(__file__).parent / "foreign"
SCORES = json.loads((FOREIGN / "scores.json").read_text(encoding="utf-8"))
COMPRESSED = [name for name in SCORES if name.startswith("llm-compressor")]


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_foreign", FOREIGN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "arithmetic", "close"),
    [*((name, "engine", 1e-3) for name in SCORES), *((name, "transformers", 1e-5) for name in COMPRESSED)],
)
def test_it_scores_as_by_transformers_in_the_tool_s_own_environment(
    name: str, arithmetic: str, close: float, tmp_path: Path
) -> None:
    make = maker()
    text = {"dataset": "text", "path": str(FOREIGN / "text.txt"), "sequence_length": make.LENGTH}
    text["arithmetic"] = arithmetic
    checkpoint = make.in_float32(FOREIGN / name, tmp_path)
    recipe = {"model": {"path": str(checkpoint), "sanity_check": "off"}, "quantize": {}}
    found = score_recipe(load_recipe(recipe | {"evaluate": {"perplexity": text}, "output": "unused"}))
    assert found["quantized"]["value"] == pytest.approx(SCORES[name]["perplexity"], rel=close)


@pytest.mark.parametrize("name", COMPRESSED)
def test_what_is_recorded_is_what_transformers_finds(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    found = maker().perplexity(FOREIGN / name)
    assert found == pytest.approx(SCORES[name]["perplexity"], rel=1e-5)
