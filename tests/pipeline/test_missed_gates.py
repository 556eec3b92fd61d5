"""Runs that miss gates of fallbacks, sizes and tasks, by the command line: what they say, and their exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_contexts import changed
from safetensors import safe_open

import quantcli
from quantcli.cli import run_command
from quantcli.pipeline.report import run_facts

Recipe = dict[str, Any]


@pytest.fixture
def ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Recipe], tuple[int, dict[str, Any], str]]:
    """(exit status, JSON, standard error) of `quantcli run` with a recipe."""

    def run(recipe: Recipe) -> tuple[int, dict[str, Any], str]:
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))
        capsys.readouterr()
        status = run_command(["run", str(file), "--json", "--quiet"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), " ".join(captured.err.split())

    return run


def test_groups_smaller_than_the_recipe_names_miss_a_gate(
    static_recipe: Callable[[Path], Recipe], ran: Callable[..., tuple[int, dict[str, Any], str]], tmp_path: Path
) -> None:
    weights = {"bits": 4, "granularity": "group"}
    recipe = changed(static_recipe(tmp_path / "run"), quantize={"weights": weights}, evaluate={
        "gates": {"fallbacks": {"smaller_groups": 0}}})  # fmt: skip
    del recipe["calibration"]
    status, content, _ = ran(recipe)
    assert (status, content["missed_gate"]) == (0, None), "no size is named"
    status, content, err = ran(changed(recipe, quantize__weights__group_size=128))
    assert status == 4
    (gate,) = content["gates"]
    assert gate["name"] == "fallbacks.smaller_groups"
    assert gate["value"] == sum(each["scheme"] != "float" for each in run_facts(tmp_path / "run")["plan"]["linears"])
    assert content["missed_gate"] in err
    assert gate["named"][0] == "model.layers.0.self_attn.q_proj"
    assert (
        f"model.layers.0.self_attn.v_proj, model.layers.0.self_attn.o_proj, model.layers.0.mlp.gate_proj and "
        f"{len(gate['named']) - 5} more." in err.replace("k_proj, ", "")
    )
    said = [each for each in run_facts(tmp_path / "run")["problems"] if each["text"].startswith("Group size 128 ")]
    assert [each["kind"] for each in said] == ["warning"]
    assert ran(changed(recipe, quantize__weights__group_size=32))[0] == 0


def test_a_checkpoint_that_is_too_large_says_what_takes_most_of_it(
    static_recipe: Callable[[Path], Recipe], ran: Callable[..., tuple[int, dict[str, Any], str]], tmp_path: Path
) -> None:
    rolled_back = ["*.down_proj"]
    gates = {"size": "1kB", "size_ratio": "1%", "bits_per_weight": 1}
    recipe = changed(static_recipe(tmp_path / "run"), evaluate__gates=gates, quantize={
        "weights": {"bits": 8}, "rollback": {"names": rolled_back}})  # fmt: skip
    status, content, err = ran(recipe)
    assert status == 4
    assert [gate["passed"] for gate in content["gates"]] == [False] * 3
    named = {gate["name"]: gate["named"] for gate in content["gates"]}
    with safe_open(tmp_path / "run" / "export" / "compressed-tensors" / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    sizes: dict[str, int] = {}
    for name, nbytes in tensors.items():
        sizes[name.rpartition(".")[0]] = sizes.get(name.rpartition(".")[0], 0) + nbytes
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:5]
    for name in ("size", "size_ratio"):
        assert [each.partition(" ")[0] for each in named[name]] == largest
    assert any(each.endswith(" (float)") for each in named["size"])
    assert all(each.endswith(" (W8A16)") for each in named["bits_per_weight"])
    assert f"Largest: {', '.join(named['size'])}." in err
    assert "output error" not in err + (tmp_path / "run" / "gates" / "junit.xml").read_text()


def test_answers_that_are_lost_miss_a_gate(
    static_recipe: Callable[[Path], Recipe], ran: Callable[..., tuple[int, dict[str, Any], str]], tmp_path: Path
) -> None:
    """Questions whose right answers are those of the float model: each that 2 bits change is lost."""
    file = tmp_path / "dev.jsonl"
    rows = [{"question": f"is {n} more than {n * n % 7}", "passage": f"The hill saw {n} sheep. " * (n % 5 + 1),
             "answer": True} for n in range(40)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = {"tasks": [{"task": "boolq", "path": str(file)}], "gates": {"task_drop": "0%"}}
    recipe = changed(static_recipe(tmp_path / "run"), quantize={"weights": {"bits": 2}}, evaluate=evaluate)
    del recipe["calibration"]
    quantcli.run_stage("reference-tasks", recipe)
    answers = json.loads((tmp_path / "run" / "reference-tasks" / "boolq.json").read_text())["samples"]
    for row, said in zip(rows, answers, strict=True):
        row["answer"] = said["answer"] == "yes"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, content, err = ran(recipe)
    (gate,) = content["gates"]
    accuracy = content["tasks"]["tasks"]["boolq"]["metrics"]["accuracy"]
    assert accuracy["float_model"]["value"] == 1
    assert status == 4
    assert gate["name"] == "task_drop (boolq, accuracy)"
    assert gate["value"] == pytest.approx(1 - accuracy["quantized"]["value"])
    assert gate["value"] > 0
    assert f"evaluate.gates.task_drop (boolq, accuracy): {100 * gate['value']:.6g}%" in err
    assert "Largest output errors: " in err or "Largest weight errors: " in err
    assert ran(changed(recipe, evaluate__gates__task_drop="100%"))[0] == 0
