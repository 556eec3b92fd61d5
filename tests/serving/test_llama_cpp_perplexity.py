"""A real model as GGUF in llama.cpp: the same tokens, and the perplexity that the run reports."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

from quantcli.calibration.datasets import load_texts
from quantcli.evaluation.protocols import evaluation_windows

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"
WINDOWS, LENGTH = 6, 512

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is not there"),
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]

RUNS = {
    "Q8_0": ["w8a16"],
    "Q4_0": ["w4a16", "--set", "quantize.weights.group_size=64"],
    "Q4_1": ["w4a16", "--set", "quantize.weights.group_size=32", "--set", "quantize.weights.symmetric=false"],
}
QUICK = ["--set", "calibration=null", "--set", "quantize.weights.method=minmax", "--set", "export.formats=[gguf]",
         "--set", "quantize.weights.importance=none", "--set", f"evaluate.perplexity.windows={WINDOWS}",
         "--set", f"evaluate.perplexity.sequence_length={LENGTH}",
         "--set", "evaluate.output_error=null", "--set", "evaluate.generate=null"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: the model is converted from its GGUF file once."""
    return tmp_path_factory.mktemp("llama-cpp")


@pytest.mark.parametrize("kind", RUNS)
def test_llama_cpp_has_the_reported_perplexity(kind: str, place: Path) -> None:
    recipe, *changes = RUNS[kind]
    output = place / kind
    command = [sys.executable, "-m", "quantcli", "run", recipe, "--quiet", "--model", str(MODEL)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    subprocess.run([*command, "--output", str(output), *QUICK, *changes], check=True, env=environment)
    results = json.loads((output / "eval-ppl" / "results.json").read_text())
    export = output / "export" / "gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    texts = load_texts("builtin", split="test")
    windows = evaluation_windows(texts, tokenizer, "standard", LENGTH, WINDOWS).windows
    questions, answers = output / "questions.json", output / "answers.json"
    questions.write_text(json.dumps({"texts": texts[:20], "windows": windows}))
    script = [sys.executable, HERE / "llama_cpp.py", export / "model.gguf", questions, answers]
    finished = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(answers.read_text())
    assert found["tokens"] == [tokenizer.encode(text) for text in texts[:20]]
    served = math.exp(sum(found["nll"]) / sum(len(window) - 1 for window in windows))
    assert served == pytest.approx(results["quantized"]["value"], rel=0.02)
