"""Runs that miss gates of fallbacks, by the command line: what they say, and the status they end with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_contexts import changed

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
    said = [each for each in run_facts(tmp_path / "run")["problems"] if each["text"].startswith("Group size 128 ")]
    assert [each["kind"] for each in said] == ["warning"]
    assert ran(changed(recipe, quantize__weights__group_size=32))[0] == 0
