"""A real model as GGUF in llama.cpp: the same tokens, and the perplexity that the run reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers

from quantcli.calibration.datasets import load_texts
from quantcli.evaluation.protocols import evaluation_windows

HERE = Path(__file__).parent
WINDOWS, LENGTH = 4, 512

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]

RUNS = {
    "Q8_0": ["w8a16"],
    "Q4_0": ["w4a16", "quantize.weights.group_size=64"],
    "Q4_1": ["w4a16", "quantize.weights.group_size=32", "quantize.weights.symmetric=false"],
}
QUICK = ["calibration=null", "quantize.weights.method=minmax", "quantize.weights.importance=none",
         "export.formats=[gguf]"]  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_llama_cpp_has_the_reported_perplexity(
    kind: str, smollm2: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, *changes = RUNS[kind]
    output = run("gguf", recipe, smollm2, (WINDOWS, LENGTH), *QUICK, *changes)
    results = json.loads((output / "eval-ppl" / "results.json").read_text())
    export = output / "export" / "gguf"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    texts = load_texts("builtin", split="test")
    windows = evaluation_windows(texts, tokenizer, "standard", LENGTH, WINDOWS).windows
    questions, answers = tmp_path / "questions.json", tmp_path / "answers.json"
    questions.write_text(json.dumps({"texts": texts[:20], "windows": windows}))
    script = [sys.executable, HERE / "llama_cpp.py", export / "model.gguf", questions, answers]
    finished = subprocess.run(list(map(str, script)), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(answers.read_text())
    assert found["tokens"] == [tokenizer.encode(text) for text in texts[:20]]
    served = math.exp(sum(found["nll"]) / sum(len(window) - 1 for window in windows))
    assert served == pytest.approx(results["quantized"]["value"], rel=0.02)
