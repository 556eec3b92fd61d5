"""Exports in formats that a recipe no longer names stay for as long as the store is theirs, and go with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.errors import OutputError
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path

Recipe = dict[str, Any]
Tree = Callable[[Path], dict[str, str]]


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    recipe = static_recipe(tmp_path / "run") | {"quantize": {"weights": {"bits": 8, "granularity": "channel"}}}
    del recipe["calibration"], recipe["evaluate"]
    return recipe


def exported(recipe: Recipe, *formats: str, **quantize: Any) -> tuple[set[str], list[str]]:
    """Run it; the formats that are there, and the notes of the export."""
    events: list[dict[str, Any]] = []
    changed = recipe | {"export": {"formats": list(formats)}, "quantize": recipe["quantize"] | quantize}
    result = quantcli.run(changed, listener=events.append)
    exports = {Path(place).name for place in result.to_json()["exports"]}
    assert exports == {file.parent.name for file in (result.path / "export").glob("*/config.json")}
    return exports, [event["text"] for event in events if event["event"] == "note" and event["stage"] == "export"]


def written(recipe: Recipe) -> dict[str, int]:
    return {
        str(file): file.stat().st_mtime_ns for file in (Path(recipe["output"]) / "export").glob("*/*") if file.is_file()
    }


def test_other_formats_of_the_same_store_stay_as_they_are(recipe: Recipe) -> None:
    first = exported(recipe, "compressed-tensors", "ascend", "dense")
    assert first == ({"compressed-tensors", "ascend", "dense"}, [])
    before = written(recipe)
    assert exported(recipe, "dense") == first
    assert written(recipe) == before
    assert exported(recipe, "mindie", "dense")[0] == {"compressed-tensors", "ascend", "dense", "mindie"}
    assert before.items() <= written(recipe).items()
    assert exported(recipe, "mindie", "dense")[1] == []
    run = Path(recipe["output"])
    assert len({key.partition(":")[0] for key in verify_path(run)}) == 4
    assert verify_path(run / "export" / "ascend")["ascend: linears"] == 21


def test_those_of_another_store_go_and_it_is_said(recipe: Recipe, tree: Tree, tmp_path: Path) -> None:
    exported(recipe, "compressed-tensors", "ascend")
    exports, notes = exported(recipe, "dense", weights={"bits": 8, "granularity": "tensor"})
    assert exports == {"dense"}
    (note,) = notes
    assert "ascend, compressed-tensors came from what has changed and are not in the recipe: they are removed" in note
    fresh = recipe | {"output": str(tmp_path / "fresh")}
    exported(fresh, "dense", weights={"bits": 8, "granularity": "tensor"})
    assert tree(Path(recipe["output"]) / "export") == tree(tmp_path / "fresh" / "export")


def test_other_permissions_make_another_export(recipe: Recipe) -> None:
    exported(recipe, "ascend", "dense")
    loose = recipe | {"export": {"formats": ["dense"], "restrict_permissions": False}}
    quantcli.run(loose)
    assert {file.parent.name for file in (Path(recipe["output"]) / "export").glob("*/config.json")} == {"dense"}


def test_another_size_of_shards_makes_another_export_of_formats_that_have_them(recipe: Recipe) -> None:
    formats = ["compressed-tensors", "ascend", "numpy"]
    exported(recipe, *formats)
    folder = Path(recipe["output"]) / "export"
    one = {file: file.stat().st_mtime_ns for file in (folder / "numpy").iterdir()}
    assert len([*(folder / "ascend").glob("*.safetensors")]) == 1
    quantcli.run(recipe | {"export": {"formats": formats, "shard_size": "135kB"}})
    for form in formats[:2]:
        sizes = [file.stat().st_size for file in (folder / form).glob("*.safetensors")]
        assert len(sizes) > 1
        assert max(sizes) < 140_000  # with its header
        assert verify_path(folder / form)
    assert {file: file.stat().st_mtime_ns for file in (folder / "numpy").iterdir()} == one


def test_half_an_export_and_a_damaged_one_do_not_stay(recipe: Recipe) -> None:
    exported(recipe, "compressed-tensors", "ascend", "dense")
    folder = Path(recipe["output"]) / "export"
    record = json.loads((folder / "stage.json").read_text())
    del record["parts"]["ascend"]  # as a run that was killed leaves it
    (folder / "stage.json").write_text(json.dumps(record | {"complete": False}))
    (folder / "compressed-tensors" / "tokenizer.json").unlink()
    assert exported(recipe, "dense")[0] == {"dense"}
    assert not (folder / "ascend").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model-00001-of-00002.safetensors", "dense"])
def test_files_of_the_user_in_the_place_of_an_export_are_left_alone(
    recipe: Recipe, tree: Tree, tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    """A checkpoint of another model, one of its files, or one by `convert` there: nothing of it becomes the run's."""
    exported(recipe, "compressed-tensors")
    run = Path(recipe["output"])
    place = run / "export" / "dense"
    if name == "dense":
        convert_checkpoint(run / "export" / "compressed-tensors", "dense", place)
    else:
        place.mkdir()
        (place / name).write_bytes((tiny_llama / name.replace("-00001-of-00002", "")).read_bytes() + b" ")
    before = tree(run)
    for _ in range(2):
        with pytest.raises(OutputError, match="in the way"):
            exported(recipe, "compressed-tensors", "dense")
        assert tree(run) == before
    place.rename(tmp_path / "elsewhere")
    assert exported(recipe, "compressed-tensors", "dense")[0] == {"compressed-tensors", "dense"}
    assert verify_path(run)["dense: linears"] == 21


def test_a_file_that_appears_beside_a_finished_export_is_not_overwritten(recipe: Recipe, tiny_llama: Path) -> None:
    exported(recipe, "compressed-tensors", "dense")
    run = Path(recipe["output"])
    (file,) = (run / "export" / "dense").glob("*.safetensors")
    foreign = file.with_name("model-00001-of-00002.safetensors")
    foreign.write_bytes(b"mine")
    with pytest.raises(OutputError, match="in the way"):
        exported(recipe, "dense", weights={"bits": 8, "granularity": "tensor"})
    assert foreign.read_bytes() == b"mine"


def test_a_changed_file_of_a_format_that_stays_is_no_more_removed_than_others(recipe: Recipe) -> None:
    exported(recipe, "compressed-tensors", "dense")
    config = Path(recipe["output"]) / "export" / "compressed-tensors" / "config.json"
    config.write_text(mine := config.read_text() + " ")
    with pytest.raises(OutputError, match=r"config\.json was changed"):
        exported(recipe, "dense", "ascend")
    assert config.read_text() == mine


def test_files_whose_record_is_lost_are_made_again(recipe: Recipe, tree: Tree) -> None:
    """They are known by the record of the run, but not for which recipe they are: none is adopted."""
    exported(recipe, "compressed-tensors", "dense")
    run = Path(recipe["output"])
    found = tree(run / "export")
    (run / "export" / "stage.json").unlink()
    (config := run / "export" / "dense" / "config.json").write_text("of another")
    with pytest.raises(OutputError, match=r"config\.json was changed"):
        exported(recipe, "compressed-tensors", "dense")
    config.unlink()
    exported(recipe, "compressed-tensors", "dense")
    assert tree(run / "export") == found
    assert verify_path(run)["dense: linears"] == 21
    assert config.read_text() != "of another"
