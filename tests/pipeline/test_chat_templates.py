"""Further chat templates, in a folder beside the weights, are part of an export as the first is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from transformers import AutoTokenizer

import quantcli
from quantcli.errors import ModelError, VerificationError
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path

Recipe = dict[str, Any]
TEMPLATES = {"default": "{% for m in messages %}{{ m.content }}{% endfor %}", "tools": "{{ tools }}", "rag": "{{ d }}"}
BESIDE = ["chat_template.jinja", "additional_chat_templates/rag.jinja", "additional_chat_templates/tools.jinja"]


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tiny_llama: Path, tmp_path: Path) -> Recipe:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(model)
    assert all((model / name).is_file() for name in BESIDE)
    recipe = static_recipe(tmp_path / "run")
    del recipe["calibration"], recipe["evaluate"]
    recipe["model"]["path"] = str(model)
    return recipe | {"quantize": {"weights": {"bits": 8, "granularity": "channel"}}}


def templates(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_every_format_has_them_and_they_are_verified(recipe: Recipe, tmp_path: Path) -> None:
    formats = ["compressed-tensors", "ascend", "mindie", "numpy", "dense"]
    run = quantcli.run(recipe | {"export": {"formats": formats}}).path
    verify_path(run)
    for form in formats:
        folder = run / "export" / form
        assert templates(folder) == TEMPLATES
        assert all(f"  {name}\n" in (folder / "SHA256SUMS").read_text() for name in BESIDE)
        mode = (folder / "additional_chat_templates").stat().st_mode & 0o777
        assert mode == folder.stat().st_mode & 0o777
    alone = Path(shutil.copytree(run / "export" / "compressed-tensors", tmp_path / "alone"))
    verify_path(alone)
    convert_checkpoint(alone, "ascend", tmp_path / "converted")
    convert_checkpoint(alone, "ascend", tmp_path / "converted", overwrite=True)
    verify_path(tmp_path / "converted")
    assert templates(tmp_path / "converted") == TEMPLATES
    for folder in (run / "export" / "compressed-tensors", alone):
        strange = folder / "additional_chat_templates" / "strange.jinja"
        strange.write_text("{{ x }}")
        with pytest.raises(VerificationError, match=r"strange\.jinja was not exported"):
            verify_path(folder)
        strange.unlink()
        (folder / BESIDE[1]).write_text("{{ x }}")
        with pytest.raises(VerificationError, match=r"rag\.jinja is not what was exported"):
            verify_path(folder)


def test_they_come_and_go_with_the_model(recipe: Recipe) -> None:
    run = quantcli.run(recipe).path
    folder = run / "export" / "compressed-tensors"
    (Path(recipe["model"]["path"]) / BESIDE[1]).write_text("{{ another }}")
    assert not quantcli.run(recipe).stages["export"]["reused"]
    assert templates(folder) == TEMPLATES | {"rag": "{{ another }}"}
    shutil.rmtree(Path(recipe["model"]["path"]) / "additional_chat_templates")
    quantcli.run(recipe)
    assert not (folder / "additional_chat_templates").exists()
    verify_path(run)


def test_those_of_strangers_are_checked_as_other_files(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password")
    link = Path(recipe["model"]["path"]) / "additional_chat_templates" / "evil.jinja"
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"evil\.jinja leads out of the model"):
        quantcli.run(recipe)


@pytest.mark.parametrize("summed", [True, False], ids=["with checksums", "of others"])
def test_those_of_a_checkpoint_that_is_replaced_go(recipe: Recipe, tmp_path: Path, summed: bool) -> None:
    """And so does what else its checksums name; what a user has put there stays."""
    (Path(recipe["model"]["path"]) / "added_tokens.json").write_text("{}")
    old = quantcli.run(recipe).path / "export" / "compressed-tensors"
    output = Path(shutil.copytree(old, tmp_path / "converted"))
    (output / "notes.txt").write_text("mine")
    if not summed:
        (output / "SHA256SUMS").unlink()
        (output / "added_tokens.json").unlink()
    source = Path(shutil.copytree(old, tmp_path / "source"))
    for name in ("SHA256SUMS", "added_tokens.json", *BESIDE):
        (source / name).unlink()
    convert_checkpoint(source, "ascend", output, overwrite=True)
    verify_path(output)
    assert not any((output / name).exists() for name in ("added_tokens.json", *BESIDE, "additional_chat_templates"))
    assert (output / "notes.txt").read_text() == "mine"
    assert templates(output) is None
