"""Whose a directory is, and that two runs never share one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcli.errors import OutputError, RoomError
from quantcli.pipeline.rundir import (
    RunDirectory,
    StageFolder,
    append_line,
    check_place,
    open_run,
    read_lines,
    room_errors,
)

Tree = dict[str, str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("models/tiny", "in one another"),
        ("models/tiny/run", "in one another"),
        ("models", "in one another"),
        ("link", "in one another"),
        ("models/tiny/../tiny/x", "in one another"),
        ("models/tiny/config.json", "in one another"),
        ("file", "is a file"),
        ("notes", r"something else \(diary.txt\)"),
        ("project", r"something else \(recipe.yaml\)"),
        ("foreign", "run.json that is foreign or damaged"),
    ],
)
def test_places_that_are_not_ours(
    tmp_path: Path, model: Path, tree: Callable[[Path], Tree], output: str, why: str
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(model)
    for name, content in {"notes/diary.txt": "", "project/recipe.yaml": "model:\n", "foreign/run.json": "[]"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=why), open_run(tmp_path / output, model):
        pass
    assert tree(tmp_path) == before


def test_an_empty_directory_and_a_half_made_run_are_taken(tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    half = tmp_path / "half"
    half.mkdir()
    (half / ".run.json.4711.part").write_text("{")  # killed at the first write
    for path in (tmp_path / "empty", half, tmp_path / "new" / "deep"):
        with open_run(path, model):
            pass
        assert sorted(os.listdir(path)) == ["run.json"]
        check_place(path, model)


def test_a_second_run_is_refused_whatever_is_deleted(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "run"
    with open_run(path, model):
        for file in path.rglob("*"):
            if file.name != "run.json":
                file.unlink()
        with pytest.raises(OutputError, match="Another run is using"), open_run(path, model):
            pass
    with open_run(path, model):
        pass


def test_a_record_cannot_make_a_run_delete_what_lies_outside(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    folder = StageFolder(tmp_path / "stage")
    folder.path.mkdir()
    record = {
        "fingerprint": "old",
        "files": {"../victim.txt": "", str(victim): ""},
        "sizes": {},
        "writes": ["../*", str(tmp_path / "*")],
    }
    (folder.path / "stage.json").write_text(json.dumps(record))
    folder.begin("new", ())
    assert victim.read_text() == "precious"


def test_files_of_another_fingerprint_go_with_what_a_kill_left_unrecorded(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    folder.begin("one", ("block-*.bin", "hidden/*"))
    for name in ("block-0.bin", "block-1.bin", "hidden/state", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder.add(tmp_path / "block-0.bin")
    StageFolder(tmp_path).begin("one", ("block-*.bin",))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "block-0.bin",
        "block-1.bin",
        "hidden",
        "mine.txt",
        "stage.json",
    ]
    StageFolder(tmp_path).begin("two", ("block-*.bin",))
    assert "block-1.bin" not in os.listdir(tmp_path)
    assert "mine.txt" in os.listdir(tmp_path)


@pytest.mark.parametrize("kill", range(4))
@pytest.mark.parametrize("later", ["one", "two", "three"])
@pytest.mark.parametrize("edits", [False, True])
def test_a_recipe_is_edited_only_if_somebody_edited_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: int, later: str, edits: bool
) -> None:
    """Whichever of the renames of a write a kill comes before, and whatever recipe comes next."""
    RunDirectory(tmp_path).write_recipe("one")
    RunDirectory(tmp_path).write_recipe("one")
    left, replace = [kill], os.replace

    def killing(*places: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*places)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        if kill < 3:
            with pytest.raises(KeyboardInterrupt):
                RunDirectory(tmp_path).write_recipe("two")
        else:
            RunDirectory(tmp_path).write_recipe("two")
    recipe, kept = tmp_path / "recipe.yaml", tmp_path / "recipe.edited.yaml"
    assert recipe.read_text() == ("two" if kill > 1 else "one")
    if edits:
        recipe.write_text("mine")
    assert RunDirectory(tmp_path).write_recipe(later) == (kept if edits else None)
    assert recipe.read_text() == later
    assert kept.exists() == edits
    assert not edits or kept.read_text() == "mine"


def test_every_edit_of_a_recipe_is_kept(tmp_path: Path) -> None:
    for edit in ("first", "second", "first", "third"):
        RunDirectory(tmp_path).write_recipe("ours")
        (tmp_path / "recipe.yaml").write_text(edit)
        RunDirectory(tmp_path).write_recipe("ours")
    kept = {file.name: file.read_text() for file in tmp_path.glob("recipe*.yaml")}
    assert kept.pop("recipe.yaml") == "ours"
    assert kept == {
        "recipe.edited.yaml": "first",
        "recipe.edited-2.yaml": "second",
        "recipe.edited-3.yaml": "third",
    }


def test_the_digest_of_a_recipe_that_an_earlier_version_wrote_is_known(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("one")
    digest = hashlib.sha256(b"one").hexdigest()
    (tmp_path / "run.json").write_text(json.dumps({"kind": "quantcli run", "stages": {}, "recipe": digest}))
    assert not RunDirectory(tmp_path).write_recipe("two")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), RoomError),
        (OSError(30, "Read-only file system"), OutputError),
        (MemoryError(), RoomError),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), RoomError),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), RoomError),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_what_the_system_refuses(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind), room_errors(tmp_path):
        raise error


def test_lines_belong_to_one_fingerprint_though_nobody_recorded_them(tmp_path: Path) -> None:
    def begun(fingerprint: str) -> Path:
        folder = StageFolder(tmp_path / "stage")
        folder.begin(fingerprint, ["lines.jsonl"])
        return folder.journal("lines.jsonl")

    append_line(begun("first"), {"number": 1})
    assert read_lines(begun("first")) == [{"number": 1}]
    folder = StageFolder(tmp_path / "stage")
    folder.begin("first", ["lines.jsonl"])
    folder.finish()  # as by a version that left the file out of its record
    append_line(begun("second"), {"number": 2})
    assert read_lines(begun("second")) == [{"number": 2}]
