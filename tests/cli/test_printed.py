"""What comes from files of strangers is printed, and does nothing to the terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from quantcli.console import show_facts
from quantcli.printed import PlainConsole, printable

TITLE = "\x1b]0;owned\x07"


def rewrite(folder: Path, name: str, mark: str) -> None:
    """The checkpoint with one tensor under a name that holds `mark`."""
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.{mark}"] = tensors.pop(f"{name}.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("verbose", [(), ("--verbose",)])
def test_names_of_tensors_and_configurations_move_no_cursor(
    quantcli: Callable[..., Any], tiny_llama: Path, tmp_path: Path, verbose: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    rewrite(model, "model.layers.1.mlp.up_proj", TITLE)
    config = json.loads((model / "config.json").read_text())
    run = ("run", "w8a16", "--model", model, "--output", tmp_path / "out", "--set", "evaluate=null", *verbose)
    failed = quantcli(*run)
    assert failed.status == 3
    (model / "config.json").write_text(json.dumps(config | {"model_type": TITLE}))
    unknown = quantcli("inspect", model, *verbose)
    assert unknown.status == 3
    assert "\\x1b]0;owned\\x07" in unknown.err
    unmatched = quantcli("plan", "w8a16", "--model", tiny_llama, "--set", f"quantize.rollback.names=['re:{TITLE}']")
    for outcome in (failed, unknown, unmatched):
        assert outcome.status
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", outcome.out + outcome.err), outcome


@given(st.text())
def test_a_text_without_control_characters_is_printed_as_it_is(text: str) -> None:
    plain = "".join(character for character in text if character.isprintable())
    assert printable(plain) == plain
    assert printable(printable(text)) == printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printable(text))


def test_a_table_shows_them_whole(capsys: pytest.CaptureFixture[str]) -> None:
    show_facts(TITLE, {f"key{TITLE}": f"one{TITLE}two"})
    assert "one\\x1b]0;owned\\x07two" in capsys.readouterr().out


def test_a_table_keeps_its_own_sequences() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=60, color_system="standard")
    table = Table(title=Text(TITLE))
    table.add_row(Text(f"one{TITLE}\ntwo", style="red"))
    console.print(table)
    with Progress(console=console) as bars:
        bars.add_task(TITLE, total=1)
    assert "one\\x1b]0;" in file.getvalue()
    assert "\x1b[31m" in file.getvalue()  # the table's own red
    assert "\x1b[?25l" in file.getvalue()  # the cursor that the bar hides
    assert "\x1b]" not in file.getvalue()
