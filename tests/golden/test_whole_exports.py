"""From a recipe to files: what an export has against what msModelSlim recorded, but for the differences that are meant.

Those stand in one table, in docs/coming-from-msmodelslim.md. Every case here says which of its rows it shows, and shows
no others; every row is shown by some case.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msmodelslim as golden
import pytest
import torch
from safetensors.torch import load_file
from test_ascend_tensors import GOLDEN, recorded
from torch import Tensor

from quantcli.pipeline import engine
from quantcli.recipe import load_recipe

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded outputs beside the checkout")

DOCS = Path(__file__).parents[2] / "docs" / "coming-from-msmodelslim.md"
TITLE = "## Differences in the files of AscendV1"
OLDER = {"file names", "group size"}  # v0
NEWER = {"file names", "empty entries"}  # v1
CASES: dict[tuple[str, str], set[str]] = {
    ("A", "w8a8_act1_mm0"): OLDER,
    ("B", "w8a8_act1_mm0"): OLDER,
    ("A", "w8a8_dynamic"): OLDER,
    ("A_bf16", "w8a8_dynamic"): OLDER | {"data types"},
    ("A", "v1_w8a8_dynamic"): NEWER,
    ("A", "v1_w8a8_static_asym"): NEWER | {"derived scales"},
    ("A", "w8a8s_cosparse_w8"): OLDER | {"derived scales"},
    ("A", "v1_w4a8_minmax"): NEWER | {"type of the model", "sums"},
    ("B", "v1_w4a8_minmax"): NEWER | {"type of the model", "sums"},
    ("A", "m1_w8a8"): OLDER | {"biases of norms"},
}
PARTS = (".weight_scale", ".weight_offset", ".input_scale", ".input_offset")


def documented() -> set[str]:
    """The first column of the table."""
    section = DOCS.read_text(encoding="utf-8").partition(f"{TITLE}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)
    return {row.strip() for row in rows[1:]}


def test_the_table_has_the_rows_that_cases_show() -> None:
    assert documented() == set().union(*CASES.values())


@pytest.mark.parametrize(("model", "case"), CASES, ids=[f"{model}-{case}" for model, case in CASES])
def test_an_export_is_the_recorded_directory(model: str, case: str, tmp_path: Path) -> None:
    recipe = golden.recipe_with_model(model, case, tmp_path) | {"export": {"formats": ["ascend"]}}
    engine.run_recipe(load_recipe(recipe), until="export")
    folder = Path(recipe["output"]) / "export" / "ascend"
    ours = load_file(folder / "quant_model_weights.safetensors")
    theirs, described = recorded(model, case)
    found = set()
    written = golden.meta_of(model, case)["files_written"]
    assert "quant_model_description.json" in written
    if {name for name in written if ".safetensors" in name} != {file.name for file in folder.glob("*.safetensors*")}:
        found.add("file names")
    found |= without_biases(theirs, described)
    found |= compared_tensors(ours, theirs, model, smoothed=bool(golden.smoothing_of(model, case)))
    found |= compared_entries(json.loads((folder / "quant_model_description.json").read_text()), described)
    assert found == CASES[model, case]


def without_biases(tensors: dict[str, Tensor], description: dict[str, Any]) -> set[str]:
    """Take out the biases of norms, which are zeros."""
    biases = [name for name in tensors if name.endswith("norm.bias")]
    for name in biases:
        assert not tensors.pop(name).any()
        assert description.pop(name) == "FLOAT"
    return {"biases of norms"} if biases else set()


def compared_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], model: str, smoothed: bool) -> set[str]:
    found = set()
    assert theirs.keys() <= ours.keys()
    if more := ours.keys() - theirs.keys():
        assert all(name.endswith((".weight_scale", ".weight_offset")) for name in more)
        found.add("derived scales")
    exact = model in ("A", "B")
    tolerance = (3e-6 if smoothed else 4e-7) if exact else 2**-7
    for name, wanted in theirs.items():
        tensor = ours[name]
        assert tensor.shape == wanted.shape, name
        if tensor.dtype != wanted.dtype:
            assert (tensor.dtype, wanted.dtype) == (torch.float32, torch.bfloat16), name
            assert name.endswith(PARTS), name
            found.add("data types")
        if name.endswith(".deq_scale"):
            one, other = (t.to(torch.int32).view(torch.float32) for t in (tensor, wanted))
            torch.testing.assert_close(one, other, rtol=3 * tolerance, atol=0)
        elif name.endswith(".scale_bias"):
            torch.testing.assert_close(tensor, wanted, rtol=2e-6, atol=2e-6 * float(wanted.abs().max()))
            found |= set() if torch.equal(tensor, wanted) else {"sums"}
        elif wanted.dtype == torch.int8:  # codes of folded weights, and of divisions in 16 bits, fall to either side
            off = (tensor.int() - wanted.int()).abs()
            share = (1e-3 if smoothed else 0.0) if exact else 0.12
            assert float((off > 0).float().mean()) <= share, name
        elif wanted.dtype == torch.int32:  # quant_bias, a rounded sum of integers and bias / deq_scale
            assert int((tensor - wanted).abs().max()) <= (256 if smoothed else 1), name
        else:
            torch.testing.assert_close(tensor.double(), wanted.double(), rtol=tolerance, atol=0)
    return found


def compared_entries(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    found = set()
    if empty := [name for name, kind in theirs.items() if kind == {}]:
        found.add("empty entries")
    if "group_size" not in theirs:
        assert ours.pop("group_size") == 0
        found.add("group size")
    if ours["model_quant_type"] != theirs["model_quant_type"]:
        assert (ours.pop("model_quant_type"), theirs.pop("model_quant_type")) == ("W4A8_DYNAMIC", "FLOAT")
        found.add("type of the model")
    derived = {name for name in ours.keys() - theirs.keys() if name.endswith((".weight_scale", ".weight_offset"))}
    left = {name: kind for name, kind in ours.items() if name not in derived}
    assert left == {name: kind for name, kind in theirs.items() if name not in empty}
    return found
