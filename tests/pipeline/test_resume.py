"""A run that is killed and started again ends in the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import quantcli

Recipe = dict[str, Any]
Tree = dict[str, str]

VARYING = {"run.json", "summary.json", "report.html", "events.jsonl"}  # times, and what happened


class Moments:
    """Counts the moments at which a directory changes: before a rename, before a removal. Kills the process at one."""

    def __init__(self, fatal: int | None = None) -> None:
        self.count = 0
        self.fatal = fatal

    def pass_one(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def counted(moments: Moments) -> Iterator[None]:
    rename, remove = os.replace, os.unlink

    def replace(*args: Any, **kwargs: Any) -> None:
        moments.pass_one()
        rename(*args, **kwargs)

    def unlink(*args: Any, **kwargs: Any) -> None:
        moments.pass_one()
        remove(*args, **kwargs)

    os.replace, os.unlink = replace, unlink  # type: ignore[assignment]
    try:
        yield
    finally:
        os.replace, os.unlink = rename, remove


def killed_run(recipe: Recipe, moment: int) -> None:
    """Run in a child that dies without a word at its n-th moment."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with counted(Moments(moment)):
                quantcli.run(recipe)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run ended before its moment came"


def artifacts(tree: Callable[[Path], Tree], run: Path) -> Tree:
    return {name: digest for name, digest in tree(run).items() if name not in VARYING}


def record(run: Path) -> dict[str, Any]:
    """run.json without what differs from run to run."""
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    for stage in content["stages"].values():
        del stage["seconds"], stage["peak_memory"]
    return content


def kill_at(step: int, recipe: Recipe, tree: Callable[[Path], Tree], run: Path) -> None:
    """Kill a run at every `step`-th moment, each time from nothing, and run it again."""
    quantcli.plan(recipe)  # the structure is in the cache from here
    counter = Moments()
    with counted(counter):
        quantcli.run(recipe)
    expected, expected_record = artifacts(tree, run), record(run)
    left = [name for name in expected if "hidden" in name or name.endswith(".part")]
    kept = ["reference/states/hidden-00003.bin", "reference/states/hidden.json"]
    assert left == (kept if recipe.get("evaluate") else [])
    for moment in range(1, counter.count + 1, step):
        shutil.rmtree(run)
        killed_run(recipe, moment)
        quantcli.run(recipe)
        assert artifacts(tree, run) == expected, f"killed at moment {moment} of {counter.count}"
        assert record(run) == expected_record, f"killed at moment {moment} of {counter.count}"
        for line in (run / "events.jsonl").read_text().splitlines():
            assert isinstance(json.loads(line), dict)


class Copies(Moments):
    """Copies a directory at every moment, into numbered ones: what a kill at that moment would leave, as only the
    thread that counts changes what is there."""

    def __init__(self, directory: Path, place: Path) -> None:
        super().__init__()
        self.directory = directory
        self.place = place

    def pass_one(self) -> None:
        super().pass_one()
        assert threading.current_thread() is threading.main_thread()
        shutil.copytree(self.directory, self.place / str(self.count))


def test_killed_runs_end_in_the_same_bytes(
    static_recipe: Callable[[Path], Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill_at(17, static_recipe(run), tree, run)


def test_what_a_killed_run_leaves_is_not_taken_for_that_of_a_changed_recipe(
    static_recipe: Callable[[Path], Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = static_recipe(run)
    changed = {**recipe, "calibration": {**recipe["calibration"], "seed": 7}}
    with_evaluation = {**recipe, "evaluate": {"perplexity": {**recipe["evaluate"]["perplexity"], "windows": 3}}}
    quantcli.run(recipe)
    expected = artifacts(tree, run)
    counter = Moments()
    shutil.rmtree(run)
    with counted(counter):
        quantcli.run(changed)
    for number, moment in enumerate(range(8, counter.count, 29)):
        shutil.rmtree(run)
        killed_run((changed, with_evaluation)[number % 2], moment)
        quantcli.run(recipe)
        assert artifacts(tree, run) == expected, f"killed at moment {moment} of {counter.count}"


@pytest.mark.slow
def test_what_a_kill_at_any_moment_leaves_ends_in_the_same_bytes(
    static_recipe: Callable[[Path], Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    from tiny_models import save_tiny_model

    run = tmp_path / "run"
    recipe = static_recipe(run)
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)  # of two blocks
    recipe["model"]["path"] = str(model)
    run.mkdir()
    copies = Copies(run, tmp_path / "copies")
    with counted(copies):
        quantcli.run(recipe)
    expected, expected_record = artifacts(tree, run), record(run)
    assert copies.count > 100
    for moment in range(1, copies.count + 1):
        shutil.rmtree(run)
        (copies.place / str(moment)).rename(run)
        quantcli.run(recipe)
        assert artifacts(tree, run) == expected, f"killed at moment {moment} of {copies.count}"
        assert record(run) == expected_record, f"killed at moment {moment} of {copies.count}"
        for line in (run / "events.jsonl").read_text().splitlines():
            assert isinstance(json.loads(line), dict)


@pytest.mark.slow
def test_twenty_kills_of_the_command(
    static_recipe: Callable[[Path], Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    """The command itself, on a model with some work in it, at any time after its directory is there. Another process
    goes on, which has started up already."""
    from tiny_models import save_tiny_model

    run = tmp_path / "run"
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    recipe = static_recipe(run)
    recipe["model"]["path"] = str(save_tiny_model("llama", tmp_path / "model", with_tokenizer=True, **sizes))
    recipe["calibration"] |= {"samples": 16, "sequence_length": 64}
    recipe["evaluate"]["perplexity"] |= {"windows": None}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "quantcli", "run", str(file), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def duration_or_kill(after: float | None) -> float | None:
        """Seconds from the moment the directory is there to the end; none where it was killed before."""
        process = subprocess.Popen(command, env=environment)
        while not run.exists() and process.poll() is None:
            time.sleep(0.01)
        began = time.monotonic()
        try:
            assert process.wait(after) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
        return time.monotonic() - began

    duration_or_kill(None)  # the cache of the structure is warm from here
    shutil.rmtree(run)
    duration = duration_or_kill(None)
    assert duration is not None
    expected, expected_record = artifacts(tree, run), record(run)
    generator = random.Random(0)
    killed = 0
    while killed < 20:
        delay = generator.uniform(0, duration)
        shutil.rmtree(run)
        ended = duration_or_kill(delay)
        if ended is None:
            killed += 1
            quantcli.run(recipe)
        else:
            duration = ended  # the machine is less busy than it was
        assert artifacts(tree, run) == expected, f"killed after {delay:.2f} of {duration:.2f} s"
        assert record(run) == expected_record
