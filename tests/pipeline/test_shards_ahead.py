"""Shards of an export are written as the blocks in them finish, and are those that stage `export` would write."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from test_interrupted_export import in_child
from test_resume import Moments, counted
from tiny_models import save_tiny_model

import quantcli
from quantcli.pipeline.verify import verify_path

Recipe = dict[str, Any]
Tree = dict[str, str]
FORMATS = ["compressed-tensors", "gptq", "ascend"]
LAYERS = 12
"""So many that the tenth block comes before the second by the alphabet."""


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    recipe = static_recipe(tmp_path / "run")
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True, num_hidden_layers=LAYERS)
    weights = {"bits": 4, "granularity": "group", "group_size": 32}
    recipe |= {"model": {**recipe["model"], "path": str(model)}, "quantize": {"weights": weights}, "evaluate": None,
               "export": {"formats": FORMATS, "shard_size": "60kB"}}  # fmt: skip
    del recipe["calibration"]
    return recipe


def waiting(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "quantize").glob(".*.part"))


def by_hand(recipe: Recipe, run: Path, tree: Callable[[Path], Tree]) -> Tree:
    """The exports of another run, whose store was finished before."""
    recipe = {**recipe, "output": str(run)}
    quantcli.run_stage("quantize", recipe)
    assert waiting(run) == []
    quantcli.run_stage("export", recipe)
    return tree(run / "export")


def test_shards_are_there_while_blocks_are_to_come(
    recipe: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    run, seen = Path(recipe["output"]), {}

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "block" and event["stage"] == "quantize":
            seen[event["index"]] = waiting(run)

    quantcli.run(recipe, listener=listen)
    found = tree(run / "export")
    shards = {form: sum(name.startswith(form) and name.endswith(".safetensors") for name in found) for form in FORMATS}
    assert min(shards.values()) > 4
    for index, names in seen.items():
        for form in FORMATS:
            done = sum(name.startswith(f".{form}-") for name in names)
            assert done >= (index + 1) / LAYERS * shards[form] - 2, f"{form} behind block {index}"
    assert sorted(seen) == list(range(LAYERS))
    assert waiting(run) == []
    verify_path(run)
    assert found == by_hand(recipe, tmp_path / "other", tree)


def test_a_shard_has_blocks_that_follow_each_other(recipe: Recipe) -> None:
    quantcli.run(recipe)
    for form in FORMATS:
        blocks = []
        for file in sorted((Path(recipe["output"]) / "export" / form).glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
            own = {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}
            assert not own or own == set(range(min(own), max(own) + 1))
            blocks += [[min(own), max(own)]] if own else []
        assert all(one[1] <= other[0] for one, other in pairwise(blocks))


@pytest.mark.parametrize("moment", [8, 25, 60, 90])
def test_a_run_killed_among_them_ends_in_the_same_files(
    moment: int, recipe: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    run = Path(recipe["output"])

    def killed() -> None:
        with counted(Moments(moment)):
            quantcli.run(recipe)

    status = in_child(killed)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    quantcli.run(recipe)
    assert waiting(run) == []
    verify_path(run)
    assert tree(run / "export") == by_hand(recipe, tmp_path / "other", tree)


def test_so_are_shards_with_norms_that_were_tuned_with_the_codes(
    recipe: Recipe, static_recipe: Callable[[Path], Recipe], tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    weights = {"bits": 3, "granularity": "group", "group_size": 32, "method": "signround"}
    calibration = {**static_recipe(tmp_path)["calibration"], "samples": 16, "sequence_length": 64}
    recipe |= {"calibration": calibration, "quantize": {"weights": weights, "signround": {"norm_rate": 0.002}}}
    recipe["export"] = {"formats": ["compressed-tensors", "dense"], "shard_size": "60kB"}
    seen: set[str] = set()
    quantcli.run(recipe, listener=lambda event: seen.update(waiting(Path(recipe["output"]))))
    assert len(seen) > 8
    events = map(json.loads, (Path(recipe["output"]) / "events.jsonl").read_text().splitlines())
    assert sum("tuned_vectors" in event for event in events) > LAYERS
    verify_path(Path(recipe["output"]))
    assert tree(Path(recipe["output"]) / "export") == by_hand(recipe, tmp_path / "other", tree)


def test_one_file_is_written_when_all_is_there(recipe: Recipe) -> None:
    seen = []
    recipe["export"] = {"formats": ["compressed-tensors", "gguf"]}
    quantcli.run(recipe, listener=lambda event: seen.extend(waiting(Path(recipe["output"]))))
    assert seen == []


def test_what_stages_to_come_change_waits_for_them(
    recipe: Recipe, static_recipe: Callable[[Path], Recipe], tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    """Shards that an interrupted run left are not those of a recipe with distillation, which starts from its codes."""
    run, calibration = Path(recipe["output"]), static_recipe(tmp_path)["calibration"]
    recipe |= {"calibration": calibration, "export": {"formats": ["compressed-tensors"], "shard_size": "60kB"}}
    kept: list[Path] = []

    def keep(event: dict[str, Any]) -> None:
        if event["event"] == "finished" and event["stage"] == "quantize":
            kept.extend(shutil.copy(file, tmp_path) for file in (run / "quantize").glob(".*.part"))

    quantcli.run(recipe, listener=keep)
    assert kept
    tuned = {**recipe, "quantize": {**recipe["quantize"], "distill": {"norm_rate": 0.1, "scale_rate": 0.05}}}
    for file in kept:
        shutil.copy(file, run / "quantize")
    quantcli.run(tuned)
    assert json.loads((run / "quantize" / "stage.json").read_text())["complete"]
    assert waiting(run) == []
    verify_path(run)
