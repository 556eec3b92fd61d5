"""The command line, and vLLM beside it, as tests of serving use them.

VLLM_PYTHON names the Python of an environment with vLLM (make serve-test makes one).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import transformers

from quantcli.evaluation.scores import WindowScores, mean_and_error
from quantcli.pipeline.samples import windows_of
from quantcli.recipe.data import PerplexitySection

HERE = Path(__file__).parent
VLLM_PYTHON = os.environ.get("VLLM_PYTHON") and os.path.abspath(os.environ["VLLM_PYTHON"])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real model, as a GGUF file."""
    model = HERE.parents[1] / "models" / "SmolLM2-135M-Instruct.gguf"
    if not model.exists():
        pytest.skip(f"{model} is not there")
    return model


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Bring a run directory up to date with a recipe by the command line, less what only the report shows; its path.

    `windows` are number and length of those that are scored; without them nothing is.
    Recipes of one model follow each other in one directory, where they find what the float model puts out.
    """
    place = tmp_path_factory.mktemp("runs")

    def bring(directory: str, recipe: str, model: Path, windows: tuple[int, int] | None, *settings: str) -> Path:
        few = ["evaluate=null"]
        if windows is not None:
            number, length = windows
            few = [f"evaluate.perplexity.windows={number}", f"evaluate.perplexity.sequence_length={length}",
                   "evaluate.output_error=null", "evaluate.generate=null"]  # fmt: skip
        options = [part for setting in (*few, *settings) for part in ("--set", setting)]
        command = [sys.executable, "-m", "quantcli", "run", recipe, "--quiet", "--model", str(model)]
        subprocess.run([*command, "--output", str(place / directory), *options], check=True)
        return place / directory

    return bring


@pytest.fixture(scope="session")
def in_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[int, str]]]:
    """Run a script of this directory in a process that has imported vLLM: exit status, and what it printed."""
    if not VLLM_PYTHON:
        pytest.skip("VLLM_PYTHON is not set")
    place, numbers = tmp_path_factory.mktemp("vllm"), count()
    command = [VLLM_PYTHON, str(HERE / "forks.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": place}
    with (place / "forks.log").open("w+") as own, subprocess.Popen(command, stderr=own, **pipes) as forks:

        def ask(script: str, *arguments: Path) -> tuple[int, str]:
            log = place / f"{next(numbers)}.log"
            asked = {"script": str(HERE / script), "arguments": list(map(str, arguments)), "log": str(log)}
            if forks.poll() is None:
                print(json.dumps(asked), file=forks.stdin, flush=True)
            for line in forks.stdout:
                reply = json.loads(line)
                if reply["log"] == str(log):  # else of a test whose time was up
                    return reply["status"], log.read_text(errors="replace")
            own.seek(0)
            raise AssertionError(f"forks.py ended: {own.read()[-3000:]}")

        yield ask
        forks.stdin.close()


@dataclass(frozen=True)
class Served:
    """Perplexity by eval-ppl and by vLLM of the same windows; mean difference of their nats a token and its error; what
    vLLM goes on with behind the prompt."""

    reported: float
    perplexity: float
    difference: float
    error: float
    text: str


@pytest.fixture
def served(in_vllm: Callable[..., tuple[int, str]], tmp_path: Path) -> Callable[..., Served]:
    """What vLLM makes of the checkpoint that a run directory's eval-ppl has read, and of a prompt."""

    def serve(output: Path, prompt: str, script: str = "serve.py") -> Served:
        results = json.loads((output / "eval-ppl" / "results.json").read_text())
        checkpoint = output / "export" / results["checkpoint"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        scored = results["per_window"]
        asked = PerplexitySection(sequence_length=results["sequence_length"], windows=len(scored))
        windows = windows_of(asked, tokenizer).windows
        counted = [WindowScores(tokens=len(window) - 1) for window in windows]
        assert [row[0] for row in scored] == [window.tokens for window in counted]

        questions, answers = tmp_path / "questions.json", tmp_path / "answers.json"
        questions.write_text(json.dumps({"prompts": [prompt], "windows": windows}))
        status, printed = in_vllm(script, checkpoint, questions, answers)
        assert status == 0, printed[-3000:]
        found: dict[str, Any] = json.loads(answers.read_text())
        mean, _ = mean_and_error(found["nll"], counted)
        difference, error = mean_and_error([a - row[2] for a, row in zip(found["nll"], scored, strict=True)], counted)
        reported, text = results["quantized"]["value"], found["texts"][0]
        print(f"reported {reported:.4f}, vLLM {math.exp(mean):.4f}, {math.expm1(difference):+.3%} ± {error:.3%}; "
              f"{found['seconds']:.0f} s, {found['peak_memory'] / 1e9:.1f} GB; {text!r}")  # fmt: skip
        return Served(reported, math.exp(mean), difference, error, text)

    return serve
