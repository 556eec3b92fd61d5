"""What ends a command from outside, and the status and word that it leaves with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli import cli
from quantcli.pipeline import convert, engine

Command = Callable[..., Any]


def test_an_exit_of_a_library_is_no_broken_pipe(
    quantcli: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: Any) -> None:
        sys.exit(0)

    monkeypatch.setattr(engine, "plan_recipe", leave)
    found = quantcli("plan", "w8a16", "--model", tiny_llama)
    assert found.status == 1
    assert "Internal error: something ended the command by SystemExit: 0" in found.err


def test_a_reader_that_goes_away_while_a_command_prints() -> None:
    """The text is longer than what a pipe holds."""
    command = f'"{sys.executable}" -m quantcli schema | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode in (0, 141), done.stderr) == (True, "")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [(("run", "w8a16"), True), (("eval-ppl", "--checkpoint", "."), False), (("convert", ".", "--to", "awq"), False)],
)
def test_only_a_run_is_said_to_go_on(
    quantcli: Any,
    tiny_llama: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    goes_on: bool,
) -> None:  # fmt: skip
    def interrupted(*_: Any, **__: Any) -> None:
        raise cli._Interrupted(2)

    monkeypatch.chdir(tiny_llama)
    monkeypatch.setattr(engine, "run_recipe", interrupted)
    monkeypatch.setattr(convert, "convert_checkpoint", interrupted)
    monkeypatch.setattr("quantcli.pipeline.standalone.score_recipe", interrupted)
    place = ("--model", tiny_llama) if words[0] == "run" else ()
    found = quantcli(*words, *place, "--output", tmp_path / "out")
    assert found.status == 130
    assert found.err.startswith("Interrupted.")
    assert ("goes on where it stopped" in found.err) == goes_on


def test_a_link_that_leads_back_to_itself(quantcli: Command, finished: Path, tiny_llama: Path, here: Path) -> None:
    for one, other in (("loop", "loop"), ("to", "fro"), ("fro", "to")):
        Path(one).symlink_to(other)
    export = finished / "export" / "compressed-tensors"
    for place in ("loop", "to", "loop/below"):
        for words in (
            ("verify", place),
            ("inspect", place),
            ("report", place),
            ("convert", export, "--to", "dense", "--output", place),
            ("convert", place, "--to", "dense", "--output", "out"),
            ("run", "w8a16", "--model", tiny_llama, "--output", place),
            ("plan", "w8a16", "--model", place),
            ("plan", f"{place}.yaml" if place == "loop" else place, "--model", tiny_llama),
            ("eval-ppl", "--checkpoint", place),
        ):
            found = quantcli(*words)
            assert found.status in (2, 3), found
            assert "Internal error" not in found.err
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["fro", "loop", "to"]


def test_a_record_without_stages_is_no_run(quantcli: Command, finished: Path, tiny_llama: Path, here: Path) -> None:
    run = Path(shutil.copytree(finished, "run"))
    record = json.loads((run / "run.json").read_text())
    kinds: list[dict[str, Any]] = [
        {},
        {"stages": None},
        {"stages": {"export": 3}},
        {"stages": {"export": {"files": 1}}},
    ]
    for other in kinds:
        (run / "run.json").write_text(json.dumps({k: v for k, v in record.items() if k != "stages"} | other))
        for words in (
            ("run", run / "recipe.yaml", "--output", run), ("verify", run), ("inspect", run), ("report", run),
            ("eval-ppl", "--checkpoint", run), ("run", "w8a16", "--model", tiny_llama, "--output", run),
        ):  # fmt: skip
            found = quantcli(*words)
            assert found.status in (2, 3), (words, found)
            assert "Internal error" not in found.err


def test_a_user_without_a_home(tiny_llama: Path, finished: Path, tmp_path: Path) -> None:
    """As in a container that runs under a number of its own."""
    from tiny_exports import export_tiny

    from quantcli.quant.scheme import Scheme

    scheme = Scheme(4, granularity="group", group_size=32, float16_scales=True)
    file = export_tiny(tmp_path, scheme, form="gguf", with_tokenizer=True).folder / "model.gguf"
    alone = Path(shutil.copy(file, tmp_path / "alone.gguf"))
    without = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    code = "import pwd, quantcli.cli as c, sys; pwd.getpwuid = lambda n: {}[n]; sys.exit(c.run_command(sys.argv[1:]))"
    for path, status, said in ((tiny_llama, 0, "float model"), (alone, 2, "Set XDG_CACHE_HOME")):
        command = [sys.executable, "-c", code, "inspect", str(path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
        assert found.returncode == status, found.stderr
        assert said in found.stdout + found.stderr
