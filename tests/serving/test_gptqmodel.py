"""transformers loads our GPTQ and AWQ checkpoints through GPTQModel, and computes what their codes say.

GPTQMODEL_PYTHON names the Python of an environment with GPTQModel (make serve-test makes one).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_exports import Export, export_tiny, shuffle_groups, weights

from quantcli.calibration.datasets import load_texts
from quantcli.evaluation.protocols import evaluation_windows
from quantcli.quant.grid import dequantize

pytestmark = pytest.mark.serving

HERE = Path(__file__).parent
GPTQMODEL_PYTHON = os.environ.get("GPTQMODEL_PYTHON") and os.path.abspath(os.environ["GPTQMODEL_PYTHON"])
TOKENS = [list(range(3, 35)), [7, 80, 1, 95, 41, 0, 2, 77]]
DOWN = "model.layers.1.mlp.down_proj"


TINY = {
    "gptq W4 g32": weights(4),
    "gptq W4": weights(4, group_size=None),
    "gptq W8 g32": weights(8),
    "gptq W3 g32": weights(3),
    "gptq W2 g64": weights(2, group_size=64),
    "gptq W4 g32 asym": weights(4, symmetric=False),
    "gptq W3 g32 asym": weights(3, symmetric=False),
    "gptq W8 asym": weights(8, symmetric=False, group_size=None),
    "awq W4 g32": weights(4),
    "awq W4": weights(4, group_size=None),
    "awq W4 g32 asym": weights(4, symmetric=False),
}
REAL = {
    "gptq": ["quantize.weights.group_size=64"],
    "awq": ["quantize.weights.group_size=64", "quantize.weights.symmetric=false"],
}
WINDOWS, LENGTH = 2, 512


def ask(questions: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The answers of in_transformers.py."""
    if not GPTQMODEL_PYTHON:
        pytest.skip("GPTQMODEL_PYTHON is not set")
    asked, answers = folder / "questions.json", folder / "answers.json"
    asked.write_text(json.dumps(questions))
    command = [GPTQMODEL_PYTHON, str(HERE / "in_transformers.py"), str(asked), str(answers)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(answers.read_text())
    return found


def in_float16(export: Export) -> dict[str, Any]:
    return {"checkpoint": str(export.folder), "dtype": "float16", "windows": TOKENS, "logits": True}


@torch.no_grad()
def logits_of_codes(export: Export) -> list[torch.Tensor]:
    """The logits of the float model with the weights that the export's codes stand for."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export.model, dtype=torch.float32)
    reader = export.reader()
    for name in reader.schemes:
        model.get_submodule(name).weight.copy_(dequantize(reader.read_linear(name).weight, torch.float32))
    return [model.eval()(torch.tensor([window])).logits[0] for window in TOKENS]


def test_logits_are_those_of_the_codes(tmp_path: Path) -> None:
    exports = {
        name: export_tiny(tmp_path / name, scheme, dtype=torch.float16, form=name.split()[0], kept=[DOWN])
        for name, scheme in TINY.items()
    }
    other = exports["gptq W4 g32 desc_act"] = export_tiny(tmp_path / "order", weights(4), dtype=torch.float16,
                                                          form="gptq", kept=[DOWN])  # fmt: skip
    shuffle_groups(other.folder, desc_act=True)
    asked = [in_float16(export) for export in exports.values()]
    for (name, export), found in zip(exports.items(), ask(asked, tmp_path), strict=True):
        assert (found["missing"], found["linears"]) == ([], 2), name  # DOWN and the head
        for wanted, given in zip(logits_of_codes(export), map(torch.tensor, found["logits"]), strict=True):
            error = float((given - wanted).norm() / wanted.norm())
            print(f"{name}: {error:.1e}")
            # its kernel of four bits computes in bfloat16 even so
            assert error < (0.02 if "W4 g32" in name else 0.004), name


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_quantized_experts_are_left_random(form: str, tmp_path: Path) -> None:
    """Where this fails, transformers has learned them, and formats/engines.yaml and docs/formats.md are out of date."""
    routers = [f"model.layers.{index}.mlp.{gate}" for index in range(2) for gate in ("gate", "shared_expert_gate")]
    changes = {"moe_intermediate_size": 128, "kept": routers}
    export = export_tiny(tmp_path, weights(4), "qwen2-moe", dtype=torch.float16, form=form, **changes)
    (found,) = ask([in_float16(export)], tmp_path)
    assert found["missing"] == [
        f"model.layers.{index}.mlp.experts.{part}" for index in range(2) for part in ("down_proj", "gate_up_proj")
    ]


@pytest.mark.parametrize("form", REAL)
def test_the_reported_perplexity(form: str, smollm2: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    changes = ["calibration=null", "quantize.weights.importance=none", f"export.formats=[{form}]", *REAL[form]]
    output = run("gptqmodel", "w4a16", smollm2, (WINDOWS, LENGTH), *changes)
    results = json.loads((output / "eval-ppl" / "results.json").read_text())
    checkpoint = output / "export" / form
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    windows = evaluation_windows(load_texts("builtin", split="test"), tokenizer, "standard", LENGTH, WINDOWS).windows
    (found,) = ask([{"checkpoint": str(checkpoint), "dtype": "float32", "windows": windows, "logits": False}], tmp_path)
    perplexity = math.exp(sum(found["nll"]) / sum(len(window) - 1 for window in windows))
    print(f"reported {results['quantized']['value']:.4f}, GPTQModel {perplexity:.4f}")
    assert perplexity == pytest.approx(results["quantized"]["value"], rel=0.01)
