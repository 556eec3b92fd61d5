"""Shots and filters of tasks of lm-evaluation-harness, against that library with its own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_contexts import changed
from test_task_stages import WORDS, Recipe, harness_task, no_other_tasks  # noqa: F401

import quantcli

FILTERS = """filter_list:
- {name: strict, filter: [{function: regex, regex_pattern: "(never said)"}, {function: take_first}]}
- {name: loose, filter: [{function: regex, regex_pattern: "(.*)"}, {function: take_first}]}
"""


@pytest.mark.usefixtures("no_other_tasks")
@pytest.mark.parametrize(("default", "shots", "used"), [(2, None, 2), (2, 1, 1), (None, None, 0), (0, 2, 0)])
def test_shots_and_filters_are_those_of_the_harness(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, default: int | None, shots: int | None, used: int
) -> None:
    """A task whose YAML says 0 shots keeps them, whatever is asked for, which is told. Each filter has metrics of its
    own."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"query": f"The {a} of the hill saw", "gold": "[invalid]" if a < "o" else "x"} for a in WORDS]
    place = harness_task(
        tmp_path / "tasks", "filtered", rows,
        "fewshot_split: test\noutput_type: generate_until\ndoc_to_text: '{{query}}'\ndoc_to_target: '{{gold}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 2, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
        + FILTERS + ("" if default is None else f"num_fewshot: {default}\n"),
    )  # fmt: skip
    task = {"task": "lm-eval/filtered", "path": str(place)} | ({} if shots is None else {"shots": shots})
    events: list[dict[str, Any]] = []
    evaluate = {"tasks": [task], "generate": None}
    recipe = changed(static_recipe(tmp_path / "run"), calibration=None, quantize={}, evaluate=evaluate)
    quantcli.run_stage("reference-tasks", recipe, listener=events.append)
    file = Path(recipe["output"]) / "reference-tasks" / "lm-eval-filtered.json"
    found = json.loads(file.read_text())
    lm = HFLM(pretrained=str(recipe["model"]["path"]), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=str(place), include_defaults=False)
    wanted = lm_eval.simple_evaluate(
        lm, tasks=["filtered"], task_manager=manager, bootstrap_iters=0, num_fewshot=shots, log_samples=True
    )
    assert wanted["n-shot"]["filtered"] == used
    assert f", {used} shot" in found["description"]
    assert len(found["samples"]) == len(WORDS)
    for name in ("exact_match,strict", "exact_match,loose"):
        mean = sum(sample[name] for sample in found["samples"]) / len(WORDS)
        assert found["aggregates"][name] == pytest.approx(mean) == pytest.approx(wanted["results"]["filtered"][name])
    assert found["aggregates"]["exact_match,strict"] > found["aggregates"]["exact_match,loose"]
    told = [event["text"] for event in events if event["event"] == "warning"]
    refused = ["evaluate.tasks: filtered is asked with 0 shots, as its definition says; shots: 2 has no effect on it."]
    assert told == (refused if used != (shots or used) else [])
