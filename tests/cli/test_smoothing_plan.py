"""What `plan` says and refuses of outlier suppression."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RecipeFile = Callable[..., Path]


def test_a_plan_shows_the_method_in_one_line(
    quantcli: Any, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = recipe_file(smooth={"anti_method": "m4", "exclude": ["*.0.*"]})
    out = quantcli("plan", file).out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["smoothing", "iterative (alpha 0.9); not *.0.*"] in rows
    assert json.loads(quantcli("plan", file, "--json").out)["smoothing"] == "iterative (alpha 0.9); not *.0.*"
    without = quantcli("plan", file, "--set", "smooth=null")
    assert "smoothing" not in without.out
    assert json.loads(quantcli("plan", file, "--set", "smooth=null", "--json").out)["smoothing"] is None


@pytest.mark.parametrize("pattern", ["model.layers.1.input_layernorm", "*.mlp.down_proj", "re:.*norm", "*.2.*"])
def test_linears_and_norms_can_be_excluded(quantcli: Any, recipe_file: RecipeFile, pattern: str) -> None:
    assert quantcli("plan", recipe_file(smooth={"exclude": [pattern]})).status == 0


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.1.input_layernrm", "model.layers.1.input_layernorm"),
        ("model.layers.1.mlp.down", "model.layers.1.mlp.down_proj"),
        ("lm_head", ""),  # no fold reaches it
        ("down_proj", ""),
    ],
)
def test_a_pattern_that_excludes_nothing_is_refused(
    quantcli: Any, recipe_file: RecipeFile, pattern: str, near: str
) -> None:
    outcome = quantcli("plan", recipe_file(smooth={"exclude": [pattern]}))
    assert outcome.status == 2
    assert f"smooth.exclude: '{pattern}' matches no linear or norm of this model." in outcome.err
    assert near in outcome.err


def test_calibration_is_not_called_needless_where_smoothing_reads_it(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(quantize={"weights": {"bits": 8}}, smooth={"method": "awq"})
    note = "needs no calibration data"
    assert note not in " ".join(quantcli("plan", file).out.split())
    for other in ("smooth=null", "smooth.method=rotate"):
        assert note in " ".join(quantcli("plan", file, "--set", other).out.split())
