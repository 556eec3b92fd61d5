"""Paths on the command line: the home directory, none, pipes, and links that lead nowhere."""

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

import quantcli as api

Command = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory beside the current one."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_a_tilde_is_the_home_directory_in_every_command(
    quantcli: Command, finished: Path, tiny_llama: Path, home: Path
) -> None:
    run, export = home / "run", "~/run/export/compressed-tensors"
    shutil.copytree(finished, run)
    (home / "model").symlink_to(tiny_llama)
    assert quantcli("convert", export, "--to", "dense", "--output=~/dense").status == 0
    assert (home / "dense" / "config.json").is_file()
    assert quantcli("verify", "~/run").status == 0
    assert quantcli("inspect", "~/run").status == 0
    assert quantcli("report", "~/run", "--output=~/page.html").status == 0
    assert (home / "page.html").is_file()
    assert quantcli("recipes", "copy", "w8a16", "~/mine.yaml").status == 0
    assert quantcli("plan", "~/mine.yaml", "--model=~/model").status == 0
    score = ("--set", "evaluate.perplexity.sequence_length=64", "--set", "evaluate.perplexity.windows=2")
    assert quantcli("eval-ppl", f"--checkpoint={export}", "--model=~/model", *score).status == 0
    assert list(Path.cwd().iterdir()) == []


def test_an_empty_path_is_not_the_current_directory(quantcli: Command, finished: Path, home: Path) -> None:
    shutil.copytree(finished, "run")
    os.chdir("run")
    for words in (("verify", ""), ("inspect", ""), ("report", ""), ("eval-ppl", "--checkpoint", "")):
        refused = quantcli(*words)
        assert refused.status == 2
        assert refused.err.startswith("A path on the command line is empty.")
    assert quantcli("verify", ".").status == 0


def test_a_recipe_from_a_pipe(finished: Path, tiny_llama: Path, home: Path) -> None:
    text = f"model: {{path: {tiny_llama}}}\nquantize: {{}}\nevaluate: null\noutput: out\n"
    command = [sys.executable, "-m", "quantcli", "plan"]
    piped = subprocess.run(
        [*command, "/dev/stdin", "--json"], input=text, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert piped.returncode == 0, piped.stderr
    assert json.loads(piped.stdout)["architecture"] == "LlamaForCausalLM"
    wrong = subprocess.run([*command, "/dev/stdin"], input="quantise: 1\n", capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "/dev/stdin:1: quantise: unknown key." in wrong.stderr


def test_paths_of_a_recipe_from_a_pipe_start_here(tiny_llama: Path, home: Path) -> None:
    os.mkfifo("pipe.yaml")
    Path("model").symlink_to(tiny_llama)
    child = os.fork()
    if child == 0:
        Path("pipe.yaml").write_text("model: {path: ./model}\nquantize: {}\n")
        os._exit(0)
    assert api.plan("pipe.yaml").model == Path.cwd() / "model"
    os.waitpid(child, 0)


def test_a_plan_needs_no_output_in_python_either(tiny_llama: Path) -> None:
    assert api.plan("w8a16", model=str(tiny_llama)).schemes
