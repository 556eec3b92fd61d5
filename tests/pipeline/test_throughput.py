"""Speed and memory in a serving engine. A script that answers as the engine's would stands for it here; tests/serving
has the real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, read
from transformers import LlamaConfig

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.pipeline.throughput import SCRIPT, Engine, cache_size, compared, serve, summarized
from quantcli.recipe.comparison import ThroughputSection

Recipe = dict[str, Any]

ENGINE = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    print({version!r})
    sys.exit()
asked = json.load(open(sys.argv[2]))
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(asked) + "\\n")
if {fails!r}:
    print("loading weights", file=sys.stderr)
    print("(EngineCore pid=7) ValueError: there is no such kernel", file=sys.stderr)
    print("shutting down", file=sys.stderr)
    sys.exit(1)
own = "export" in asked["checkpoint"]
first = 0.25 if own else 0.5
answer = {{"prefill": [first] * asked["repeats"], "whole": [first + (1.0 if own else 2.0)] * asked["repeats"],
          "peak_memory": 600 if own else 800, "load_seconds": 1.0, "device": "cpu"}}
json.dump(answer, open(sys.argv[3], "w"))
"""


def engine(place: Path, version: str = "0.32.0+cpu", *, fails: bool = False) -> Path:
    """A program that is taken for the Python of an environment with vLLM; what it is asked is kept in calls.jsonl."""
    program = place / "python"
    values = {"python": sys.executable, "version": version, "calls": str(place / "calls.jsonl"), "fails": fails}
    program.write_text(ENGINE.format(**values), encoding="utf-8")
    program.chmod(0o755)
    return program


def calls(place: Path) -> list[dict[str, Any]]:
    file = place / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def served(recipe: Recipe, program: Path | str, **values: Any) -> Recipe:
    section = {"python": str(program), "prompt_tokens": 24, "new_tokens": 5, "batch": 3, "repeats": 2, **values}
    return changed(
        recipe,
        quantize={"activations": {"bits": 8, "scope": "token"}},
        evaluate__throughput=section,
        evaluate__output_error=None,
        evaluate__generate=None,
        evaluate__gates={"kl_divergence": 100.0},
    )


def test_models_take_turns_and_results_go_wherever_a_reader_looks(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    recipe = served(static_recipe(tmp_path / "run"), engine(tmp_path))
    result = quantcli.run(recipe)
    asked = calls(tmp_path)
    export = str(tmp_path / "run" / "export" / "compressed-tensors")
    model = recipe["model"]["path"]
    assert [each["checkpoint"] for each in asked] == [model, export, export, model]
    assert all(each["prompts"] == asked[0]["prompts"] and each["cache"] == asked[0]["cache"] for each in asked)
    assert [len(prompt) for prompt in asked[0]["prompts"]] == [24, 24, 24]
    assert {each["dtype"] for each in asked} == {"bfloat16"}

    found = read(recipe, "throughput", "results.json")
    for name, first, behind, memory in (("float_model", 0.5, 2.0, 800), ("quantized", 0.25, 1.0, 600)):
        assert found[name]["prefill"] == dict.fromkeys(("high", "median", "low"), 3 * 24 / first)
        assert found[name]["decode"] == dict.fromkeys(("high", "median", "low"), 3 * 4 / behind)
        assert (found[name]["first_token"], found[name]["peak_memory"]) == (first, memory)
    assert found["change"] == {"prefill": 1.0, "decode": 1.0, "peak_memory": -0.25}
    assert result.to_json()["throughput"] == found

    page = (tmp_path / "run" / "report.html").read_text()
    summary = (tmp_path / "run" / "gates" / "summary.md").read_text()
    assert "| prefill, tokens/s ↑ | 144 | 288 | +100.00% |" in summary
    assert "144 (144 to 144) → 288 (288 to 288) tokens/s, +100.00\u00a0%" in page
    assert "3 prompts of 24 tokens, 5 new ones, 2 × 2 times each" in page

    # measured once; other text on the page is no reason to measure again, another number of tokens is
    assert quantcli.run(recipe).stages["throughput"]["reused"]
    quantcli.run(changed(recipe, evaluate__throughput__new_tokens=9, output=str(tmp_path / "run")))
    assert len(calls(tmp_path)) == 8
    other = changed(recipe, output=str(tmp_path / "other"), evaluate__throughput=None)
    quantcli.run(other)
    from quantcli.pipeline.report import report_paths

    rows = report_paths([tmp_path / "run", tmp_path / "other"], tmp_path / "both.html", overwrite=False)["runs"]
    assert (rows[0]["prefill"], rows[0]["decode_change"], rows[1]["prefill"]) == (288, 1.0, None)
    assert "Speed in a serving engine" in (tmp_path / "both.html").read_text()


def test_what_cannot_be_measured_is_refused_before_anything_is_done(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    recipe, program = static_recipe(tmp_path / "run"), engine(tmp_path)
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    weights_alone = changed(served(recipe, program), quantize={"weights": {"bits": 8}})
    ascend = changed(served(recipe, program), export={"formats": ["ascend"]})
    for refused, message in (
        (served(recipe, tmp_path / "absent"), "absent cannot be run: No such file"),
        (served(recipe, bare), "there is no vLLM beside"),
        (served(recipe, program, prompt_tokens=250, new_tokens=7), "257 together, and the model has 256 positions"),
        (weights_alone, "has no kernel for packed 8-bit weights"),
        (ascend, "it reads none of ascend"),
    ):
        for action in (quantcli.run, quantcli.plan):
            with pytest.raises(RecipeError, match=message) as error:
                action(refused)
            assert error.value.remedy
    assert not (tmp_path / "run").exists()
    assert calls(tmp_path) == []
    # what is not measured need not be possible
    quantcli.run_stage("export", weights_alone)


def test_the_first_format_that_the_engine_loads_is_served(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    recipe = served(static_recipe(tmp_path / "run"), engine(tmp_path), rounds=1)
    recipe = changed(recipe, export={"formats": ["ascend", "dense"]}, evaluate__perplexity=None, evaluate__gates=None)
    quantcli.run_stage("throughput", recipe)
    assert read(recipe, "throughput", "results.json")["checkpoint"] == "dense"


def test_an_engine_that_fails_says_why(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    recipe = served(static_recipe(tmp_path / "run"), engine(tmp_path, fails=True))
    with pytest.raises(ModelError, match="ValueError: there is no such kernel") as error:
        quantcli.run_stage("throughput", recipe)
    assert "vllm-float.log" in error.value.remedy
    assert "loading weights" in (tmp_path / "run" / "throughput" / "vllm-float.log").read_text()


HANGING = """#!{python}
import json, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if {stubborn} else signal.SIG_DFL)
below = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n"
                          "open({pid!r} + '.ready', 'w').close(); time.sleep(600)"])
while not __import__("os").path.exists({pid!r} + ".ready"):
    time.sleep(0.01)
for step in range({steps}):
    time.sleep(0.3)
    print("loading shard", step, flush=True)
json.dump(below.pid, open({pid!r}, "w"))
if {steps} > 1:
    below.kill()
    json.dump({{"step": step}}, open(sys.argv[3], "w"))
    sys.exit()
time.sleep(600)
"""


def hanging(place: Path, *, steps: int = 1, stubborn: bool = False) -> Engine:
    """An engine that says something, starts a process that hears no signal, and hangs. With more steps it answers."""
    program = place / "python"
    values = {"python": sys.executable, "pid": str(place / "pid"), "steps": steps, "stubborn": stubborn}
    program.write_text(HANGING.format(**values), encoding="utf-8")
    program.chmod(0o755)
    return Engine(str(program), "0.32.0", True)


def answer(engine: Engine, place: Path, timeout: int) -> dict[str, Any]:
    section = ThroughputSection(timeout=timeout)
    return serve(engine, section, place, [[1]], place / "log", dtype="bfloat16", cache_bytes=0, trust_remote_code=False)


def is_running(place: Path) -> bool:
    """Whether the process of the file `pid` runs; one that has ended and waits for its parent does not."""
    status = Path(f"/proc/{json.loads((place / 'pid').read_text())}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_engine_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ModelError, match=r"wrote nothing for 2 s, serving .*, and was ended") as error:
        answer(hanging(tmp_path), tmp_path, 2)
    assert 2 <= time.monotonic() - begun < 10
    assert "evaluate.throughput.timeout" in error.value.remedy
    assert "loading shard 0" in (tmp_path / "log").read_text()
    until(lambda: not is_running(tmp_path))  # a signal takes its time


def test_an_engine_that_goes_on_saying_something_is_waited_for(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert answer(hanging(tmp_path, steps=8), tmp_path, 2) == {"step": 7}
    assert time.monotonic() - begun > 2


def test_an_interrupted_run_leaves_no_engine_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.pipeline.throughput._GRACE", 1)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(KeyboardInterrupt):
            answer(hanging(tmp_path, stubborn=True), tmp_path, 600)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    until(lambda: not is_running(tmp_path))  # a signal takes its time


def test_an_engine_ends_behind_a_run_that_was_killed(tmp_path: Path) -> None:
    vllm = tmp_path / "packages" / "vllm"
    vllm.mkdir(parents=True)
    hang = f"import json, os, time\njson.dump(os.getpid(), open({str(tmp_path / 'pid')!r}, 'w'))\ntime.sleep(600)\n"
    (vllm / "__init__.py").write_text(hang)
    (tmp_path / "asked.json").write_text("{}")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "asked.json"), str(tmp_path / "answered.json")]
    start = f"import subprocess, time\nsubprocess.Popen({command}, start_new_session=True)\ntime.sleep(600)"
    environment = os.environ | {"PYTHONPATH": str(vllm.parent)}
    with subprocess.Popen([sys.executable, "-c", start], env=environment) as parent:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").stat().st_size > 0)
        assert is_running(tmp_path)
        parent.kill()
    until(lambda: not is_running(tmp_path))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_rates_are_medians_and_quartiles_over_all_rounds() -> None:
    section = ThroughputSection(prompt_tokens=100, new_tokens=11, batch=2)
    answers = [
        {"prefill": [1.0, 2.0], "whole": [2.0, 5.0], "peak_memory": 7},
        {"prefill": [4.0], "whole": [3.0], "peak_memory": None},
    ]
    found = summarized(answers, section)
    assert found["prefill"] == pytest.approx({"high": 200 / 1.5, "median": 100, "low": 200 / 3})
    # seconds behind the first token: 1, 3 and, by noise, -1; their lower quartile is 0
    assert found["decode"] == {"high": None, "median": 20.0, "low": 10.0}
    assert (found["first_token"], found["peak_memory"]) == (2.0, 7)
    assert compared(found, found | {"peak_memory": None}) == {"prefill": 0.0, "decode": 0.0, "peak_memory": None}


def test_the_cache_holds_every_token_of_every_prompt() -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    section = ThroughputSection(prompt_tokens=500, new_tokens=30, batch=4)
    token = torch.zeros(3, 2, 2, 16, dtype=torch.bfloat16).nbytes
    assert cache_size(config, section) >= 4 * 640 * token
