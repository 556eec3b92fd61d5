"""The command line, called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from quantcli.cli import run_command


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def quantcli(capsys: pytest.CaptureFixture[str]) -> Command:
    """`quantcli("run", "w8a8", …)` gives the exit status and what went to standard output and standard error."""

    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        status = run_command([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def recipe_file(
    static_recipe: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The static recipe as a file, with changed keys; it writes to `run` beside it."""

    def write(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("recipe")
        content = static_recipe(folder / "run")
        for keys, value in changes.items():
            *path, last = keys.split(".")
            section = content
            for key in path:
                section = section.setdefault(key, {})
            section[last] = value
        file = folder / "recipe.yaml"
        file.write_text(json.dumps(content, indent=1))  # JSON is YAML
        return file

    return write


@pytest.fixture(scope="session")
def finished(recipe_file: Callable[..., Path]) -> Path:
    """The directory of a finished run. Tests must not change it."""
    file = recipe_file()
    assert run_command(["run", str(file), "--quiet"]) == 0
    return file.parent / "run"
