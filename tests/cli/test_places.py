"""Paths that are no checkpoint: what each is, and which one to name in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_exports import export_tiny

from quantcli.quant.scheme import Scheme

FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)


def said(outcome: Any, status: int, *parts: str) -> None:
    assert outcome.status == status, outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err
    for foreign in ("Traceback", "model.path", "the recipe"):
        assert foreign not in outcome.err, outcome.err


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    """An export away from its run."""
    return Path(shutil.copytree(finished / "export" / "compressed-tensors", tmp_path / "moved"))


def test_a_run_is_no_checkpoint(quantcli: Callable[..., Any], finished: Path, tmp_path: Path) -> None:
    export = finished / "export" / "compressed-tensors"
    for command in (["eval-ppl", "--checkpoint", finished], ["convert", finished, "--to", "gptq", "--output", "o"]):
        said(quantcli(*command), 3, f"{finished} is a run directory, not a checkpoint", str(export))
    said(quantcli("eval-ppl", "--checkpoint", finished / "export"), 3, "without a config.json", str(export))
    said(quantcli("eval-ppl", "--checkpoint", export, "--model", finished), 3, "is a run directory", str(export))
    said(quantcli("verify", finished / "export"), 2, "neither a run directory nor a checkpoint", str(export))


def test_what_is_not_there_and_what_is_empty(quantcli: Callable[..., Any], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for command in (["eval-ppl", "--checkpoint", nowhere], ["convert", nowhere, "--to", "awq", "--output", "o"]):
        said(quantcli(*command), 3, f"There is no checkpoint at {nowhere}", "Check the path")
    said(quantcli("eval-ppl", "--checkpoint", tmp_path), 3, f"{tmp_path} is a directory without a config.json")


def test_what_verify_and_inspect_have_no_use_for(
    quantcli: Callable[..., Any], finished: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    said(quantcli("verify", tmp_path / "nowhere"), 2, f"There is nothing at {tmp_path / 'nowhere'}", "Check the path")
    said(quantcli("verify", tiny_llama), 2, f"{tiny_llama} is not a quantized checkpoint", "Name a run")
    export = finished / "export" / "compressed-tensors"
    said(quantcli("inspect", finished / "export"), 3, "is neither a model, a checkpoint nor a run", str(export))


def test_a_conversion_to_a_place_that_cannot_be_made(
    quantcli: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    export = finished / "export" / "compressed-tensors"
    for place in (tmp_path / "file" / "below", Path("/proc/quantcli")):
        outcome = quantcli("convert", export, "--to", "ascend", "--output", place)
        said(outcome, 2, f"{place} cannot be made", "Choose another --output")
    assert (tmp_path / "file").read_text() == "text"


def test_what_is_no_recipe(
    quantcli: Callable[..., Any], finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = quantcli("plan", finished)
    assert outcome.status == 2
    recipe = outcome.err.partition("Name its recipe: ")[2].strip().rstrip(".")
    assert quantcli("plan", recipe).status == 0
    for model in (tiny_llama, tiny_llama / "model.safetensors"):
        outcome = quantcli("run", model)
        assert outcome.status == 2
        assert f"{model} is a model, not a recipe. A model comes behind --model" in outcome.err
    monkeypatch.chdir(tmp_path)
    Path("w8a16").mkdir()  # a run that is called as its recipe is in nobody's way
    assert quantcli("plan", "w8a16", "--model", tiny_llama).status == 0


def test_a_file_of_llama_cpp(quantcli: Callable[..., Any], tmp_path: Path) -> None:
    folder = export_tiny(tmp_path, FOUR, dtype=torch.bfloat16, form="gguf", with_tokenizer=True).folder
    file = folder / "model.gguf"
    alone = Path(shutil.copy(file, tmp_path / "alone.gguf"))
    convert = ["--to", "awq", "--output", tmp_path / "out"]
    said(quantcli("verify", file), 2, f"{file} is neither", f"Name the directory that it is in: {folder}")
    said(quantcli("verify", alone), 2, f"{alone} is neither", "A .gguf file alone is read as a float model")
    said(quantcli("convert", file, *convert), 3, f"{file} is a file", f"Name the directory that it is in: {folder}")
    said(quantcli("convert", alone, *convert), 3, f"{alone} is a file", "quantcli eval-ppl --checkpoint scores it")
    assert quantcli("verify", folder).status == 0


def test_a_file_of_llama_cpp_behind_a_link(quantcli: Callable[..., Any], tmp_path: Path) -> None:
    """The hub's cache has links with names to files without, whatever the command."""
    folder = export_tiny(tmp_path, FOUR, dtype=torch.bfloat16, form="gguf", with_tokenizer=True).folder
    (tmp_path / "blobs").mkdir()
    shutil.copy(folder / "model.gguf", tmp_path / "blobs" / "4711")
    link = tmp_path / "model.gguf"
    link.symlink_to("blobs/4711")
    found = json.loads(quantcli("inspect", link, "--json").out)
    assert found["kind"] == "float model"
    assert json.loads(quantcli("inspect", tmp_path / "blobs" / ".." / "model.gguf", "--json").out) == found
    assert quantcli("plan", "w8a16", "--model", link).status == 0
    assert quantcli("eval-ppl", "--checkpoint", link, "--set", "evaluate.perplexity.sequence_length=64").status == 0


def test_an_export_that_was_moved_has_no_recipe(quantcli: Callable[..., Any], moved: Path) -> None:
    assert quantcli("verify", moved).status == 0
    config = (moved / "config.json").read_text()
    (moved / "config.json").write_text(config + " ")
    said(quantcli("verify", moved), 5, "config.json is not what was exported", "Copy it again")
    (moved / "config.json").unlink()
    said(quantcli("verify", moved), 5, "config.json is missing", "Copy it again")


@pytest.mark.parametrize("command", ["plan", "verify", "inspect", "convert", "plan w8a16 --model"])
def test_a_name_that_no_file_can_have(command: str, quantcli: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--to", "awq", "--output", tmp_path / "out"] if command == "convert" else []
    said(quantcli(*command.split(), "x" * 300, *options), 2, "…: File name too long.", "Check the path")
