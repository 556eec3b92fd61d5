"""Checkpoints that llm-compressor and AutoRound have made score as transformers scores them (foreign/make.py)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from quantcli.pipeline.standalone import score_recipe
from quantcli.recipe import load_recipe

FOREIGN = Path(__file__).parent / "foreign"
SCORES = json.loads((FOREIGN / "scores.json").read_text(encoding="utf-8"))
CLOSE = 1e-3


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_foreign", FOREIGN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=SCORES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_float32(name: str, place: Path) -> Path:
    copy = shutil.copytree(FOREIGN / name, place / name)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    (copy / "config.json").write_text(json.dumps(config | {key: "float32"}), encoding="utf-8")
    return copy


def test_it_scores_as_by_transformers_in_the_tool_s_own_environment(name: str, tmp_path: Path) -> None:
    text = {"dataset": "text", "path": str(FOREIGN / "text.txt"), "sequence_length": maker().LENGTH}
    recipe = {"model": {"path": str(in_float32(name, tmp_path)), "sanity_check": "off"}, "quantize": {}}
    found = score_recipe(load_recipe(recipe | {"evaluate": {"perplexity": text}, "output": "unused"}))
    assert found["quantized"]["value"] == pytest.approx(SCORES[name]["perplexity"], rel=CLOSE)


@pytest.mark.parametrize("name", [name for name in SCORES if name.startswith("llm-compressor")])
def test_what_is_recorded_is_what_transformers_finds(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    found = maker().perplexity(FOREIGN / name)
    assert found == pytest.approx(SCORES[name]["perplexity"], rel=1e-5)
