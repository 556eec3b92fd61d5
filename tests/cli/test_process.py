"""The command as a process: how it starts, and how it ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RecipeFile = Callable[..., Path]

_REPORT = """
import sys
from quantcli.cli import run_command
status = run_command(sys.argv[1:])
heavy = {"torch", "transformers", "pydantic", "numpy"} & set(sys.modules)
print(status, *sorted(heavy), file=sys.stderr)
"""


def imported(*arguments: str | Path) -> list[str]:
    """Heavy packages that a command imports."""
    command = [sys.executable, "-c", _REPORT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status, *heavy = done.stderr.splitlines()[-1].split()
    assert status == "0", done.stderr
    return heavy


def test_help_and_recipes_start_light() -> None:
    assert imported("--help") == []
    assert "torch" not in imported("recipes", "list")


def test_a_plan_of_a_known_model_imports_no_torch(finished: Path) -> None:
    heavy = imported("plan", finished / "recipe.yaml", "--json")
    assert "torch" not in heavy
    assert "transformers" not in heavy


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),  # a spin count would take precedence
    ],
)
def test_threads_that_wait_leave_a_shared_core_soon(own: dict[str, str], expected: str) -> None:
    script = "import os; from quantcli.cli import run_command; run_command(['--version'])"
    script += "; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=plain | own, check=True)
    assert done.stdout.splitlines()[-1] == expected


def start(file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "quantcli", "run", str(file), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    # a shell that runs the tests in the background has them ignore SIGINT, and their children too
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=_heed_sigint)


def _heed_sigint() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_so_and_goes_on(
    recipe_file: RecipeFile, quantcli: Any, prose: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    much = tmp_path / "much.txt"  # takes seconds to observe, so that the signal comes in time on any machine
    much.write_text(prose.read_text() * 300)
    text = {"calibration.path": str(much), "calibration.samples": 1500, "calibration.sequence_length": 96}
    file = recipe_file(**text)
    process = start(file)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Observing"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.splitlines()[-1] == "Interrupted. The same command goes on where it stopped."
    assert "Traceback" not in err
    assert out == ""
    assert not list((file.parent / "run").rglob(".*.part"))
    outcome = quantcli("calibrate", file, "--json")
    assert json.loads(outcome.out)["stages"]["check"]["reused"] is True


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f'"{sys.executable}" -m quantcli schema | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == ""
