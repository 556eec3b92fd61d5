"""Exports for Ascend have the modes that are documented, and are written again, replaced and verified with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import export_tiny

import quantcli
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme

Recipe = dict[str, Any]


@pytest.fixture(autouse=True)
def _open_umask() -> Any:
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Kinds of files → their mode, which all of a kind have."""
    found: dict[str, set[int]] = {"folder": {stat.S_IMODE(folder.stat().st_mode)}}
    for file in folder.iterdir():
        kind = "weights" if file.suffix in (".safetensors", ".npy") else "others"
        found.setdefault(kind, set()).add(stat.S_IMODE(file.stat().st_mode))
    assert all(len(values) == 1 for values in found.values()), found
    return {kind: values.pop() for kind, values in found.items()}


RESTRICTED = {"folder": 0o750, "weights": 0o400, "others": 0o600}
OPEN = {"folder": 0o775, "weights": 0o664, "others": 0o664}


def test_a_run_gives_and_takes_them(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    formats = ["ascend", "mindie", "numpy", "compressed-tensors"]
    recipe = static_recipe(tmp_path / "run") | {"quantize": {"weights": {"bits": 8}}, "export": {"formats": formats}}
    del recipe["evaluate"], recipe["calibration"]
    quantcli.run(recipe)
    export = tmp_path / "run" / "export"
    assert {form: modes(export / form) for form in formats} == {
        form: OPEN if form == "compressed-tensors" else RESTRICTED for form in formats
    }
    assert verify_path(export / "numpy")
    # one file gone: it is written again beside the others
    (export / "numpy" / "quant_weight.npy").unlink()
    quantcli.run(recipe)
    assert modes(export / "numpy") == RESTRICTED
    again = quantcli.run(recipe | {"export": {"formats": formats, "restrict_permissions": False}})
    assert again is not None
    assert {form: modes(export / form)["weights"] for form in formats} == dict.fromkeys(formats, 0o664)
    assert verify_path(tmp_path / "run")


@pytest.mark.parametrize("form", ["ascend", "mindie", "numpy"])
def test_a_conversion_gives_them_and_replaces_files_that_have_them(form: str, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, Scheme(8))
    convert_checkpoint(made.folder, form, tmp_path / "out")
    assert modes(tmp_path / "out") == RESTRICTED
    for _ in range(2):
        convert_checkpoint(made.folder, form, tmp_path / "out", overwrite=True)
        assert modes(tmp_path / "out") == RESTRICTED
    assert verify_path(tmp_path / "out")
    convert_checkpoint(tmp_path / "out", form, tmp_path / "open", restrict_permissions=False)
    assert modes(tmp_path / "open") == OPEN
    convert_checkpoint(tmp_path / "out", form, tmp_path / "open", overwrite=True)
    assert modes(tmp_path / "open") == RESTRICTED
    convert_checkpoint(tmp_path / "out", "compressed-tensors", tmp_path / "other")
    assert modes(tmp_path / "other") == OPEN
