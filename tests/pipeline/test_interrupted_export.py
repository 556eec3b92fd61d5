"""An export that is killed, or finds no room, leaves nothing that passes for a checkpoint, and is finished later."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from gguf import GGUFWriter
from test_resume import Moments, counted
from tiny_exports import export_tiny

import quantcli
from quantcli.cli import run_command
from quantcli.errors import OutputError
from quantcli.formats.sums import SUMS, check_sums
from quantcli.model import writer
from quantcli.model.npy_dictionary import DictionaryWriter
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme

Recipe = dict[str, Any]
Tree = dict[str, str]
FORMATS = ["compressed-tensors", "gptq"]
OWN_FILES = ["numpy", "gguf"]
"""Formats whose consumers read no config.json."""


def in_child(work: Callable[[], Any]) -> int:
    """The wait status of a child that does the work and exits with what it returns."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def killed_at_write(number: int) -> None:
    """From here on, the n-th piece that is written to a file of tensors is the last."""
    written = iter(range(1, number))
    put = writer._put

    def last(*args: Any) -> None:
        if next(written, None) is None:
            args[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        put(*args)

    writer._put = last


def whole_or_nothing(folder: Path) -> bool:
    """Whether a checkpoint is there; one that an engine would load has to be whole."""
    if not (folder / "config.json").exists():
        return False
    assert check_sums(folder)
    return True


@pytest.fixture
def quantized(static_recipe: Callable[[Path], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe with two exports of several shards, run up to the codes; `before` holds that state."""
    recipe = static_recipe(tmp_path / "run")
    weights = {"bits": 4, "granularity": "group", "group_size": 32}
    recipe |= {"quantize": {"weights": weights}, "export": {"formats": FORMATS, "shard_size": "40kB"}, "evaluate": None}
    del recipe["calibration"], recipe["evaluate"]
    quantcli.run_stage("quantize", recipe)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    return recipe


def again(recipe: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]) -> Tree:
    """The bytes of the export after another start; the state before it comes back."""
    run = Path(recipe["output"])
    quantcli.run_stage("export", recipe)
    assert verify_path(run)[f"{recipe['export']['formats'][-1]}: linears"] == 21
    found = tree(run / "export")
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "before", run)
    return found


def test_killed_anywhere_an_export_is_whole_or_absent(
    quantized: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    run = Path(quantized["output"])
    moments = Moments()
    with counted(moments):
        quantcli.run_stage("export", quantized)
    wanted = again(quantized, tmp_path, tree)
    assert sum(name.endswith(".safetensors") for name in wanted) > 6
    for piece in (5, 60):

        def killed_within_a_file(piece: int = piece) -> None:
            killed_at_write(piece)
            quantcli.run_stage("export", quantized)

        assert os.WIFSIGNALED(in_child(killed_within_a_file))
        assert not any(whole_or_nothing(run / "export" / form) for form in FORMATS if form == "gptq")
        assert again(quantized, tmp_path, tree) == wanted
    for moment in range(3, moments.count, 13):

        def killed(moment: int = moment) -> None:
            with counted(Moments(moment)):
                quantcli.run_stage("export", quantized)

        assert os.WIFSIGNALED(in_child(killed))
        for form in FORMATS:
            whole_or_nothing(run / "export" / form)
        assert again(quantized, tmp_path, tree) == wanted, f"killed at moment {moment} of {moments.count}"


def test_a_file_that_was_changed_after_a_kill_is_refused(
    quantized: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    run = Path(quantized["output"])
    wanted = again(quantized, tmp_path, tree)

    def killed() -> None:
        killed_at_write(60)
        quantcli.run_stage("export", quantized)

    assert os.WIFSIGNALED(in_child(killed))
    record = json.loads((run / "export" / "stage.json").read_text())
    first = run / "export" / next(iter(record["files"]))
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputError, match=f"{first.name} was changed"):
        quantcli.run_stage("export", quantized)
    quantcli.run_stage("export", quantized, overwrite=True)
    assert tree(run / "export") == wanted


def own_files(export: Path) -> Tree:
    """The weights that consumers of NumPy dictionaries and of GGUF would load, by name; empty where there are none."""
    arrays, models = sorted((export / "numpy").glob("*.npy")), sorted((export / "gguf").glob("*.gguf"))
    loaded = [*(arrays if export / "numpy" / "quant_weight.npy" in arrays else ()), *models]
    return {str(file.relative_to(export)): hashlib.sha256(file.read_bytes()).hexdigest() for file in loaded}


def killed_at_array(number: int) -> None:
    """From here on, the n-th array that is written to a file of either kind is the last, and only half of it."""
    written = iter(range(1, number))

    def short(add: Callable[..., None], stream: Callable[[Any], IO[bytes]]) -> Callable[..., None]:
        def last(*args: Any) -> None:
            if next(written, None) is None:
                stream(args[0]).write(args[-1].tobytes()[::2])
                stream(args[0]).flush()
                os.kill(os.getpid(), signal.SIGKILL)
            add(*args)

        return last

    DictionaryWriter.add = short(DictionaryWriter.add, lambda writer: writer.file)
    GGUFWriter.write_tensor_data = short(GGUFWriter.write_tensor_data, lambda writer: writer.fout[0])


def test_killed_anywhere_weights_that_are_read_without_config_json_are_whole_or_absent(
    quantized: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    run, recipe = Path(quantized["output"]), {**quantized, "export": {"formats": OWN_FILES}}
    moments = Moments()
    with counted(moments):
        quantcli.run_stage("export", recipe)
    weights = own_files(run / "export")
    assert {Path(name).suffix for name in weights} == {".npy", ".gguf"}
    wanted = again(recipe, tmp_path, tree)

    def whole(left: Tree) -> bool:
        arrays = {name for name in weights if name.endswith(".npy")}
        return left.items() <= weights.items() and (not arrays & set(left) or arrays <= set(left))

    for number in (1, 40, 80):

        def killed_within_a_file(number: int = number) -> None:
            killed_at_array(number)
            quantcli.run_stage("export", recipe)

        assert os.WIFSIGNALED(in_child(killed_within_a_file))
        assert whole(own_files(run / "export"))
        assert any(file.stat().st_size for file in (run / "export").rglob(".*.part"))
        assert again(recipe, tmp_path, tree) == wanted
    for moment in range(2, moments.count, 7):

        def killed(moment: int = moment) -> None:
            with counted(Moments(moment)):
                quantcli.run_stage("export", recipe)

        assert os.WIFSIGNALED(in_child(killed))
        assert whole(own_files(run / "export")), f"killed at moment {moment} of {moments.count}"
        assert again(recipe, tmp_path, tree) == wanted


def test_killed_while_an_older_export_goes_it_is_whole_or_absent(quantized: Recipe, tmp_path: Path) -> None:
    run = Path(quantized["output"])
    quantcli.run_stage("export", quantized)
    record = json.loads((run / "export" / "stage.json").read_text())
    parts = dict.fromkeys(record["parts"], "of another store")
    (run / "export" / "stage.json").write_text(json.dumps(record | {"parts": parts}))
    (tmp_path / "older").mkdir()
    shutil.copytree(run, tmp_path / "older" / "run")
    changed = {**quantized, "export": {"formats": ["gptq", "compressed-tensors"]}}
    for moment in range(2, 40, 6):

        def killed(moment: int = moment) -> None:
            with counted(Moments(moment)):
                quantcli.run_stage("export", changed)

        assert os.WIFSIGNALED(in_child(killed))
        for form in FORMATS:
            whole_or_nothing(run / "export" / form)
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "older" / "run", run)


def limited(command: list[str]) -> int:
    """The exit status of a command that may write files of 20 kB."""

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return run_command(command)

    return os.waitstatus_to_exitcode(in_child(work))


def test_an_export_without_room_ends_with_6_and_leaves_no_pieces(
    quantized: Recipe, tmp_path: Path, tree: Callable[[Path], Tree]
) -> None:
    run, file = Path(quantized["output"]), tmp_path / "recipe.yaml"
    file.write_text(json.dumps(quantized))
    wanted = again(quantized, tmp_path, tree)
    assert limited(["export", str(file), "--quiet"]) == 6
    assert not list(run.rglob("*.part"))
    assert not list((run / "export").rglob("config.json"))
    assert again(quantized, tmp_path, tree) == wanted


@pytest.fixture
def source(tmp_path: Path) -> Path:
    scheme = Scheme(4, granularity="group", group_size=32, float16_scales=True)
    return export_tiny(tmp_path / "made", scheme, dtype=torch.bfloat16, with_tokenizer=True).folder


def test_a_conversion_without_room_leaves_nothing(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    command = ["convert", str(source), "--to", "gptq", "--output", str(place / "out")]
    assert limited(command) == 6
    assert not list(place.iterdir())
    assert run_command(command) == 0
    before = {file.name: file.read_bytes() for file in (place / "out").iterdir()}
    assert limited([*command[:3], "awq", *command[4:], "--overwrite"]) == 6  # what was there stays
    assert {file.name: file.read_bytes() for file in (place / "out").iterdir()} == before
    assert [entry.name for entry in place.iterdir()] == ["out"]


def test_a_killed_conversion_is_cleared_away_by_the_next(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    out = place / "out"

    def killed() -> None:
        killed_at_write(20)
        convert_checkpoint(source, "gptq", out)

    assert os.WIFSIGNALED(in_child(killed))
    (left,) = place.iterdir()
    assert left.name.endswith(".part")
    (place / f".out.{os.getpid()}.part").mkdir()  # of a process that lives
    (place / ".out.mine.part").mkdir()
    convert_checkpoint(source, "gptq", out)
    assert sorted(entry.name for entry in place.iterdir() if entry != out) == [".out.mine.part"]
    assert whole_or_nothing(out)


def test_a_conversion_killed_on_moving_is_finished_with_overwrite(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_checkpoint(source, "gptq", out)
    (out / "notes.txt").write_text("mine")
    moments = Moments()
    with counted(moments):
        convert_checkpoint(source, "awq", out, overwrite=True)
    for back in range(1, 10):

        def killed(back: int = back) -> None:
            with counted(Moments(moments.count - back)):
                convert_checkpoint(source, "awq", out, overwrite=True)

        assert os.WIFSIGNALED(in_child(killed))
        if not (out / "config.json").exists():
            with pytest.raises(OutputError, match="say --overwrite"):
                convert_checkpoint(source, "gptq", out)
        convert_checkpoint(source, "gptq", out, overwrite=True)
        assert whole_or_nothing(out)
        assert verify_path(out)["linears"] == 14
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / SUMS).is_file()
