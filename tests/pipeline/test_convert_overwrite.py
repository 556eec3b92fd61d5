"""What goes when another checkpoint is written in its place, and what stays, whoever made it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_interrupted_export import in_child
from test_resume import Moments, counted
from tiny_exports import export_tiny

from quantcli.errors import OutputError
from quantcli.formats import export
from quantcli.formats.sums import SUMS
from quantcli.pipeline import convert
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.replaced import named_files
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme

Tree = dict[str, str]
FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)
SAVED = ["tokenizer.model", "vocab.json", "special_tokens_map.json", "hf_quant_config.json", "pytorch_model.bin",
         "chat_template.jinja", "additional_chat_templates/tools.jinja"]  # fmt: skip
NAMED = ["modeling_own.py", "tokenization_own.py", "old-a.safetensors", "old-b.safetensors"]
MINE = ["notes.txt", "README.md", "train.py", "logs/run.json", "lora/adapter.safetensors"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("source"), FOUR, with_tokenizer=True).folder


@pytest.fixture
def foreign(source: Path, tmp_path: Path) -> Path:
    """A checkpoint that another tool wrote: no checksums, shards and code under names of its own."""
    folder = Path(shutil.copytree(source, tmp_path / "foreign"))
    (folder / SUMS).unlink()
    (folder / "model.safetensors").rename(folder / "old-a.safetensors")
    for name in [*SAVED, *NAMED[:2], NAMED[3], *MINE]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    shards = {"weight_map": {"a": "old-a.safetensors", "b": "old-b.safetensors", "c": "../outside.safetensors"}}
    (folder / "old.safetensors.index.json").write_text(json.dumps(shards))
    for file, modules in [
        ("config.json", {"AutoModel": "modeling_own.Own", "AutoConfig": "someone/else--train.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.Slow", None]}),
    ]:
        content = json.loads((folder / file).read_text()) | {"auto_map": modules}
        (folder / file).write_text(json.dumps(content))
    (tmp_path / "outside.safetensors").write_text("mine")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_without_checksums_goes_whole_and_alone(source: Path, foreign: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, "gptq", tmp_path / "new")
    found = convert_checkpoint(source, "gptq", foreign, overwrite=True)
    assert names(foreign) == names(tmp_path / "new") | {*MINE}
    assert all((foreign / name).read_text() == name for name in MINE)
    assert (tmp_path / "outside.safetensors").read_text() == "mine"
    assert found["beside"] == "train.py: not replaced, and engines may read it; move it elsewhere"
    (foreign / "train.py").unlink()
    assert verify_path(foreign)["linears"] == 14
    assert convert_checkpoint(source, "awq", foreign, overwrite=True)["beside"] is None


def test_a_kill_leaves_nothing_that_the_next_conversion_does_not_finish(
    source: Path, foreign: Path, tmp_path: Path
) -> None:
    first, moments = Path(shutil.copytree(foreign, tmp_path / "first")), Moments()
    with counted(moments):
        convert_checkpoint(source, "gptq", first, overwrite=True)
    kills = 0
    for back in range(2, moments.count, 6):
        folder = Path(shutil.copytree(foreign, tmp_path / str(back)))

        def killed(back: int = back, folder: Path = folder) -> None:
            with counted(Moments(moments.count - back)):
                convert_checkpoint(source, "gptq", folder, overwrite=True)

        assert os.WIFSIGNALED(in_child(killed))
        if names(folder) == names(foreign):  # nothing was moved yet
            break
        kills += 1
        convert_checkpoint(source, "gptq", folder, overwrite=True)
        assert names(folder) == names(first)
    assert kills > 2


@pytest.mark.parametrize("name", ["tokenizer.model", "generation_config.json"])
def test_a_directory_with_the_name_of_a_file_is_refused_before_anything_goes(
    source: Path, foreign: Path, tree: Callable[[Path], Tree], name: str
) -> None:
    (foreign / name).unlink()
    (foreign / name / "mine").mkdir(parents=True)
    before = tree(foreign)
    with pytest.raises(OutputError, match=f"{name} is a directory where a file belongs"):
        convert_checkpoint(source, "gptq", foreign, overwrite=True)
    assert tree(foreign) == before


@pytest.mark.parametrize("content", ["[]", "{", '{"auto_map": 3, "weight_map": []}', '{"auto_map": {"a": "../x.Y"}}'])
def test_configurations_that_say_nothing_name_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.py").write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_text(content)
    assert named_files(folder) == set()


def test_shards_of_another_number_go_with_their_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 10_000)
        convert_checkpoint(source, "gptq", tmp_path / "out")
    (tmp_path / "out" / SUMS).unlink()
    convert_checkpoint(source, "gptq", tmp_path / "out", overwrite=True)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_conversions_into_one_place_the_later_replaces_nothing_unasked(
    source: Path, tmp_path: Path, tree: Callable[[Path], Tree], monkeypatch: pytest.MonkeyPatch,
    there: bool, overwrite: bool
) -> None:  # fmt: skip
    """The first to be finished begins when the other has looked at the place and found nothing there."""
    output = tmp_path / "out"
    if there:
        output.mkdir()
    write = convert._written

    def write_later(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(convert, "_written", write)
            assert in_child(lambda: convert_checkpoint(source, "awq", output) and None) == 0
        return write(*arguments)

    monkeypatch.setattr(convert, "_written", write_later)
    if overwrite:
        convert_checkpoint(source, "gptq", output, overwrite=True)
    else:
        with pytest.raises(OutputError, match="holds a checkpoint already"):
            convert_checkpoint(source, "gptq", output)
    monkeypatch.undo()
    convert_checkpoint(source, "gptq" if overwrite else "awq", tmp_path / "alone")
    assert tree(output) == tree(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]
