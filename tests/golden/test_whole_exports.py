"""From a recipe to files: what an export has against what msModelSlim recorded, but for the differences that are meant.

Those stand in one place, the two tables of docs/coming-from-msmodelslim.md: defects that are not imitated, and
differences in files. Every case here says which of their rows it shows, and shows no others; every row is shown by some
case, by a refusal, or by a test that is named. Every recorded export is compared, refused, or out for a reason.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import msmodelslim as golden
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ascend_tensors import GOLDEN, recorded
from torch import Tensor

from quantcli.errors import RecipeError
from quantcli.pipeline import engine
from quantcli.recipe import load_recipe

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded outputs beside the checkout")

DOCS = Path(__file__).parents[2] / "docs" / "coming-from-msmodelslim.md"
TITLES = ("## Defects that are not imitated", "## Differences in the files of AscendV1")

OLDER = {"file names", "group size"}  # v0
GROUPS = {"file names"}  # v0, with a size of groups
NEWER = {"file names", "empty entries"}  # v1
DERIVED = {"derived scales"}
W4A8 = NEWER | {"type of the model", "sums"}
TENSOR = OLDER | {"a scale a tensor"}
HISTOGRAM = OLDER | {"truncated histogram"}
BIASES = OLDER | {"biases of norms"}
HALF = OLDER | {"data types"}
SOLVED = NEWER | {"solvers"}
HQQ = {"solvers", "data types of HQQ"}

# The rows that cases show, and the cases: model/case, of several models A,B/case.
SHOWN: list[tuple[set[str], str]] = [
    (OLDER, "A,B/w8a8_act1_mm0 A,B/w8a8_dynamic A/w8a8_dynamic_datafree A,B/w8a8_act1_disable A/w8a8_act1_disable_L3"),
    (OLDER, "A,B/w8a8_act1_last_linear A,B/w8a8_kv_sym A,B/w8a8_kv_asym A,B/w8a8_fa A/w8a8_pdmix"),
    (OLDER, "A,B,A_bf16,A_fp16/w8a16_minmax_sym A,B/w8a16_minmax_asym A,B/w4a16_pc_minmax_sym A/w4a16_pc_minmax_asym"),
    (GROUPS, "A,B/w4a16_g32_sym A,B/w4a16_g32_asym A/w4a16_g64_sym_nodown"),
    (GROUPS | {"scales of groups"}, "A_bf16,A_fp16/w4a16_g32_sym"),
    (HALF, "A_bf16,A_fp16/w8a8_act1_mm0 A_bf16,A_fp16/w8a8_dynamic A_bf16,A_fp16/w8a8_kv_sym A_bf16,A_fp16/w8a8_pdmix"),
    (HALF | HISTOGRAM, "A_bf16/w8a8_act2_mm0"),
    (TENSOR, "A,B/w8a8_act1_mm1 A/w8a16_minmax_sym_mm1"),
    (HISTOGRAM, "A,B/w8a8_act2_mm0 A,B/w8a8_act3_mm0 A/w8a8_act3_long"),
    (HISTOGRAM | TENSOR, "A/w8a8_act2_mm1 A/w8a8_act3_mm1"),
    (OLDER | {"dynamic inputs"}, "A/w8a8_mixcfg"),
    (OLDER | DERIVED, "A/w8a8s_cosparse_w4 A/w8a8s_cosparse_w8 A/w8a8s_lowbit_f10"),
    (TENSOR | DERIVED, "A/w8a8s_lowbit_f10_mm1"),
    (BIASES, "A,B/m1_w8a8 A,B/m4_w8a8_dynamic"),
    (BIASES | {"searches"}, "A/m2_w8a8_act3"),
    (OLDER | {"searches"}, "A/m6_w8a8"),
    (GROUPS | {"biases of norms", "searches"}, "A/m3_w4a16_g32"),
    (GROUPS | {"solvers"}, "A/w4a16_g32_gptq_asym A,B/w4a16_g32_gptq_sym"),
    (OLDER | {"solvers"}, "A/w4a16_pc_gptq_sym A/w8a16_gptq_asym A,B/w8a16_gptq_sym"),
    (GROUPS | HQQ, "A/w4a16_g32_hqq_asym A/w4a16_g32_hqq_sym"),
    (OLDER | HQQ, "A/w4a16_pc_hqq_asym A/w8a16_hqq_sym A,B/w8a16_hqq_asym"),
    (NEWER, "A,B/v1_default_w8a16 A,B/v1_default_w8a8 A,B/v1_w8a8_dynamic A/v1_fp8_dynamic A/v1_w8a16_ssz"),
    (NEWER | DERIVED, "A,B/v1_w8a8_static_asym A,B/v1_w8a8_static_asym_layerwise A,B/v1_w8a8_static_mean"),
    (NEWER | DERIVED, "A/v1_w8a8_static_sym"),
    (NEWER | DERIVED | {"clipped histogram"}, "A/v1_w8a8_static_hist"),
    (NEWER | {"dynamic inputs"}, "A,B/v1_w8a8_pdmix"),
    (NEWER | {"cache of the last sample"}, "A,B/v1_kvcache_int8 A,B/v1_kvcache_int8_asym"),
    (NEWER | {"signs of v1"}, "A,B/v1_iter_smooth_w8a8"),
    (W4A8, "A,B/v1_w4a8_minmax A,B/v1_w4a8_ssz"),
    (W4A8 - {"sums"} | {"solvers"}, "A/v1_w4a8_gptq A/v1_autoround_w4a8_i20"),
    (SOLVED, "A/v1_w8a16_gptq A,B/v1_w8a8_gptq A/v1_autoround_w8a8_i10"),
]
OTHER_FORMATS: list[tuple[str, set[str], str]] = [
    ("mindie", set(), "A,B/w8a8_act1_L1 B/w8a8_act1_L3"),
    ("numpy", set(), "A/w8a8_act1_mm0"),
    ("numpy", {"keys of NumPy files"}, "B/w8a8_act1_mm0"),
]


class Compared(NamedTuple):
    form: str
    model: str
    case: str
    rows: frozenset[str]


def _cases(names: str) -> list[tuple[str, str]]:
    """(model, case) of names as above."""
    parted = (name.split("/") for name in names.split())
    return [(model, case) for models, case in parted for model in models.split(",")]


CASES = [
    Compared(form, *name, frozenset(rows))
    for form, rows, names in [*(("ascend", *shown) for shown in SHOWN), *OTHER_FORMATS]
    for name in _cases(names)
]

REFUSED = {
    ("A", "w4a8_dynamic_g32"): ("two stages", "4-bit weights beside 8-bit inputs with one scale a channel or tensor"),
    ("A", "w4a8_dynamic_g32_datafree"): ("two stages", "4-bit weights beside 8-bit inputs with one scale a channel"),
    ("A", "w8a8_act1_L3"): ("joined linears", "q_proj is FLOAT and .*v_proj W8A8, and engines that load mindie join"),
    ("A", "w8a8s_lowbit_sigma_L2"): ("joined linears", "gate_proj is FLOAT and .*up_proj W8A8S, and engines"),
}
"""Exports that are not written here: the row that says so, and what the error says."""

FAILED_THERE = {
    ("A", "w8a8s_lowbit_f01"): "fractions below one weight",
    ("B", "w8a8s_lowbit_f01"): "fractions below one weight",
    ("A", "w4a16_g64_sym"): "groups that do not divide",
    ("B", "w4a16_g64_sym"): "groups that do not divide",
}
"""Cases that ended in an error there, and are written here."""

ELSEWHERE = {
    "all-zero groups": "tests/quant/test_weight_methods.py::test_a_group_of_zeros_gets_scale_one",
    "scores of inputs": "tests/quant/test_observers.py::test_kurtosis_and_quantile_score_of_all_values",
    "scheme of a ranking": "tests/pipeline/test_sensitivity.py::test_errors_are_those_of_the_whole_model_in_float64",
}
"""Rows that no recorded file shows, and the tests that do."""

_ALONE = "it smooths and quantizes nothing: an export of float weights; test_msmodelslim compares scales where it can"
_ROTATED = "its rotation comes from another generator of random numbers"
_SCALED = "microscaling formats are not written"
DELIBERATELY_OUT = {
    "nf4_b64": "NF4 has no counterpart",
    "w8a8_tp2": "tensor-parallel scales have no counterpart: checkpoints do not depend on the number of devices",
    "w8a8s_lowbit_smooth": "the loss that chooses its smoothing is not known; test_recorded_directories reads it",
    "v1_autoround_w4a4_i20": "4-bit activations are not written in AscendV1; test_msmodelslim compares what comes out",
    "v1_float_sparse": "float weights with zeros have no counterpart",
    "v1_w4a4_mxfp4": _SCALED,
    "v1_w4a4_mxfp4_fouroversix": _SCALED,
    "v1_w4a8_mxfp": _SCALED,
    "v1_w8a8_mxfp8": _SCALED,
    "v1_quarot": _ROTATED,
    "v1_quarot_w8a8": _ROTATED,
    "v1_smooth_quant": _ALONE,
    "v1_smooth_quant_default_adapter": _ALONE,
    "v1_iter_smooth": _ALONE,
    "v1_iter_smooth_asym": _ALONE,
    "v1_iter_smooth_a05_normlinear": _ALONE,
    "v1_iter_smooth_default_adapter": _ALONE,
    "v1_flex_smooth": _ALONE,
    "v1_flex_smooth_a07_b03": _ALONE,
    "v1_flex_smooth_default_adapter": _ALONE,
    "v1_flex_awq_ssz": _ALONE,
    "v1_awq": _ALONE,
    "v1_awq_w4": _ALONE,
    "v1_kv_smooth": _ALONE,
}
"""Recorded exports that are not compared, and why."""

PARTS = (".weight_scale", ".weight_offset", ".input_scale", ".input_offset", ".kv_cache_scale", ".kv_cache_offset")
WEIGHTS = (".weight", ".weight_scale", ".weight_offset", ".scale_bias")
INPUTS = (".input_scale", ".input_offset")
PRODUCTS = (".deq_scale", ".quant_bias")
VALUES = {
    "solvers": (*WEIGHTS, *PRODUCTS),
    "truncated histogram": (*INPUTS, *PRODUCTS),
    "clipped histogram": (*INPUTS, *PRODUCTS),
    "dynamic inputs": (*INPUTS, *PRODUCTS),
    "searches": ("",),
    "signs of v1": ("",),
}
"""Rows that are differences of values: the tensors of linears, by how their names end, that have others."""
SIXTEEN = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


def documented() -> list[str]:
    """The first columns of the tables."""
    text, names = DOCS.read_text(encoding="utf-8"), []
    for title in TITLES:
        section = text.partition(f"{title}\n")[2].partition("\n## ")[0]
        names += [row.strip() for row in re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]]
    return names


def test_the_tables_have_the_rows_that_are_shown() -> None:
    shown = set().union(*(case.rows for case in CASES)) | {row for row, _ in REFUSED.values()}
    assert sorted(documented()) == sorted(shown | set(FAILED_THERE.values()) | ELSEWHERE.keys())


@pytest.mark.parametrize("row", ELSEWHERE)
def test_rows_that_no_file_shows_have_tests(row: str) -> None:
    file, _, name = ELSEWHERE[row].partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")


def test_every_recorded_export_is_compared_refused_or_out_for_a_reason() -> None:
    exports = {
        (model, case)
        for model, case, entry in golden.index()
        if entry["status"] == "ok" and golden.meta_of(model, case).get("files_written")
    }
    compared, out = {(case.model, case.case) for case in CASES}, set()
    for model, case in exports:
        places = [(model, case) in compared, (model, case) in REFUSED, case in DELIBERATELY_OUT]
        assert sum(places) == 1, (model, case)
        out |= {case} if places[2] else set()
    assert exports >= compared | REFUSED.keys()
    assert out == DELIBERATELY_OUT.keys()
    assert all(DELIBERATELY_OUT.values())


def recipe(model: str, case: str, form: str, root: Path) -> dict[str, Any]:
    whole = golden.recipe_with_model(model, case, root, golden.samples_of(case))
    return whole | {"export": {"formats": [form]}, "output": f"{whole['output']}-{form}"}


def exported(model: str, case: str, form: str, root: Path) -> Path:
    whole = recipe(model, case, form, root)
    engine.run_recipe(load_recipe(whole), until="export")
    return Path(whole["output"]) / "export" / form


ASCEND = [case for case in CASES if case.form != "numpy"]


@pytest.mark.parametrize(("form", "model", "case", "rows"), ASCEND, ids=[f"{c.model}-{c.case}" for c in ASCEND])
def test_an_export_is_the_recorded_directory(
    form: str, model: str, case: str, rows: frozenset[str], root: Path
) -> None:
    folder = exported(model, case, form, root)
    (weights,), (description,) = folder.glob("*.safetensors"), folder.glob("quant_model_description*.json")
    ours, entries = load_file(weights), json.loads(description.read_text())
    theirs, described = recorded(model, case)
    found = compared_files(folder, set(golden.meta_of(model, case)["files_written"]))
    found |= without_biases(theirs, described)
    found |= compared_forms(ours, theirs)
    found |= compared_values(ours, theirs, described, model, case, rows)
    found |= compared_entries(entries, described)
    if golden.samples_of(case) != slice(None):  # what the tool kept, on which alone it is run here
        found.add("cache of the last sample")
    assert found == rows


def compared_files(folder: Path, theirs: set[str]) -> set[str]:
    """The tool also writes a generation_config.json where the model has none, and v1 the recipe."""
    ours = {file.name for file in folder.iterdir()}
    beside = theirs - ours - {"generation_config.json"}
    weights = {name for name in beside if ".safetensors" in name}
    assert beside - weights <= {"default_best_practice.yaml"}
    return {"file names"} if beside else set()


def without_biases(tensors: dict[str, Tensor], description: dict[str, Any]) -> set[str]:
    """Take out the biases of norms, which are zeros."""
    biases = [name for name in tensors if name.endswith("norm.bias")]
    for name in biases:
        assert not tensors.pop(name).any()
        assert description.pop(name) == "FLOAT"
    return {"biases of norms"} if biases else set()


def compared_forms(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """Names, shapes and data types; theirs get the shapes of ours where the difference is meant."""
    found = set()
    assert theirs.keys() <= ours.keys()
    if more := ours.keys() - theirs.keys():
        assert all(name.endswith((".weight_scale", ".weight_offset")) for name in more)
        found.add("derived scales")
    for name, wanted in theirs.items():
        tensor = ours[name]
        if tensor.shape != wanted.shape:
            assert wanted.shape == (1,), name
            assert name.endswith((".weight_scale", ".weight_offset", ".deq_scale")), name
            assert len(tensor.unique()) == 1, name
            theirs[name] = wanted.expand(tensor.shape)
            found.add("a scale a tensor")
        if tensor.dtype != wanted.dtype:
            assert name.endswith(PARTS), name
            found.add(kind_of_cast(tensor.dtype, wanted.dtype, ours["model.norm.weight"].dtype))
    return found


def kind_of_cast(ours: torch.dtype, theirs: torch.dtype, model: torch.dtype) -> str:
    """The row that a part in another data type shows."""
    if theirs == torch.float16 and ours == model == torch.float32:
        return "data types of HQQ"
    assert model in SIXTEEN
    assert (ours, theirs) in ((torch.float32, model), (model, torch.float32))
    return "data types" if theirs == model else "scales of groups"


def compared_values(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    described: dict[str, str],
    model: str,
    case: str,
    rows: frozenset[str],
) -> set[str]:
    """The rows of values that differ, beyond the tolerances of the recorded numbers."""
    found = set()
    for name, wanted in theirs.items():
        linear = described[name] != "FLOAT"
        meant = [row for row in rows & VALUES.keys() if name.endswith(VALUES[row]) and (linear or VALUES[row] == ("",))]
        try:
            if compared(name, ours, wanted, described[name], model, case):
                found.add("sums")
        except AssertionError:
            if not meant:
                raise
            found |= set(meant)
    return found


def compared(name: str, tensors: dict[str, Tensor], wanted: Tensor, kind: str, model: str, case: str) -> bool:
    """Assert that a tensor of ours is the recorded one as nearly as the numbers of both allow: True for other sums."""
    tensor, part = tensors[name], f".{name.rpartition('.')[2]}"
    scales, inputs, share, _ = golden.TOLERANCE[model]
    exact, smoothed = not share, bool(golden.smoothing_of(model, case))
    if smoothed:  # codes of folded weights, too, fall to either side
        scales, inputs, share = max(scales, 3e-6), max(inputs, 3e-6), max(share, 1e-3)
    if "ssz" in case:
        scales = golden.SSZ
    if part == ".deq_scale":
        one, other = (bits_as_float(t) for t in (tensor, wanted))
        torch.testing.assert_close(one, other, rtol=scales + inputs + max(scales, 4e-7), atol=0)
    elif part == ".scale_bias":
        rate = max(2e-6, scales if "ssz" in case else 0)
        torch.testing.assert_close(tensor, wanted, rtol=rate, atol=rate * float(wanted.abs().max()))
        return not torch.equal(tensor, wanted)
    elif part == ".quant_bias":  # a rounded sum of integers and bias / deq_scale
        compared_sums(name, tensors, wanted, 256 if smoothed else 1, exact)
    elif wanted.dtype == torch.int8:
        one, other = (codes(t, kind) for t in (tensor, wanted))
        off = (one - other).abs()
        assert int(off.max()) <= (1 if share else 0), name
        assert float((off > 0).float().mean()) <= share, name
    elif part.endswith("_offset"):
        assert float((tensor.double() - wanted.double()).abs().max()) <= (0 if exact else 4), name
    else:
        rate = inputs if part == ".input_scale" else scales if kind != "FLOAT" or smoothed else 0
        torch.testing.assert_close(tensor.double(), wanted.double(), rtol=rate, atol=0)
    return False


def compared_sums(name: str, tensors: dict[str, Tensor], wanted: Tensor, most: int, exact: bool) -> None:
    """quant_bias; where codes and offsets may differ from theirs, that it is the sum over ours (A_* have no biases)."""
    tensor, prefix = tensors[name], name.rpartition(".")[0]
    assert tensor.shape == wanted.shape
    if exact:
        assert int((tensor - wanted).abs().max()) <= most, name
        return
    offset = int(tensors[f"{prefix}.input_offset"])
    assert torch.equal(tensor, -offset * tensors[f"{prefix}.weight"].sum(1, dtype=torch.int32)), name


def bits_as_float(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else scale.to(torch.int32).view(torch.float32)


def codes(tensor: Tensor, kind: str) -> Tensor:
    """int32, of both nibbles where codes have 4 bits."""
    return torch.stack(((tensor << 4) >> 4, tensor >> 4)).int() if kind.startswith("W4") else tensor.int()


def compared_entries(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    found = set()
    if empty := [name for name, kind in theirs.items() if kind == {}]:
        found.add("empty entries")
    if "group_size" in ours and "group_size" not in theirs:
        assert ours.pop("group_size") == 0
        found.add("group size")
    if ours["model_quant_type"] != theirs["model_quant_type"]:
        assert (ours.pop("model_quant_type"), theirs.pop("model_quant_type")) == ("W4A8_DYNAMIC", "FLOAT")
        found.add("type of the model")
    derived = {name for name in ours.keys() - theirs.keys() if name.endswith((".weight_scale", ".weight_offset"))}
    left = {name: kind for name, kind in ours.items() if name not in derived}
    assert left == {name: kind for name, kind in theirs.items() if name not in empty}
    return found


ARRAYS = [case for case in CASES if case.form == "numpy"]


@pytest.mark.parametrize(("form", "model", "case", "rows"), ARRAYS, ids=[f"{c.model}-{c.case}" for c in ARRAYS])
def test_dictionaries_are_the_recorded_ones(form: str, model: str, case: str, rows: frozenset[str], root: Path) -> None:
    folder = exported(model, case, form, root)
    ours = {file.name: np.load(file, allow_pickle=True).item() for file in folder.glob("*.npy")}
    meta, (theirs, described) = golden.meta_of(model, case), recorded(model, case)
    others, found = ours.pop("others.npy", {}), set()
    assert set(ours) == set(meta["files_written_numpy"])
    if others:  # biases, which the tool gives the keys of weights
        assert others.keys() == {name for name in theirs if name.endswith(".bias")}
        found.add("keys of NumPy files")
    keys = {f"{file}/{key}" for file, entries in ours.items() for key in entries}
    taken = {f"quant_weight.npy/{name.removesuffix('.bias')}" for name in others}
    assert keys == {*meta["numpy_keys_equal_to_weights"], *meta["numpy_keys_equal_to_model"], *taken}
    tensors, kinds = {}, {}
    for key in keys:
        file, _, name = key.partition("/")
        part = "weight" if file == "quant_weight.npy" else file.removesuffix(".npy")
        place = name if file == "anti_fp_norm.npy" else f"{name}.{part}"
        array = ours[file][name]
        if key in meta["numpy_keys_equal_to_weights"]:
            assert [place, str(array.dtype), list(array.shape)] == meta["numpy_keys_equal_to_weights"][key]
        tensors[place], kinds[place] = torch.from_numpy(array), described[place]
    for name, array in others.items():
        tensors[name], kinds[name] = torch.from_numpy(array), described[name]
    assert tensors.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (tensors[name].dtype, tensors[name].shape) == (wanted.dtype, wanted.shape), name
        compared(name, tensors, wanted, kinds[name], model, case)
    assert found == rows


@pytest.mark.parametrize(("model", "case"), REFUSED, ids=[f"{model}-{case}" for model, case in REFUSED])
def test_an_export_that_is_not_written_is_refused(model: str, case: str, root: Path) -> None:
    form = "mindie" if golden.meta_of(model, case)["save_type"] == ["safe_tensor"] else "ascend"
    with pytest.raises(RecipeError, match=REFUSED[model, case][1]):
        engine.run_recipe(load_recipe(recipe(model, case, form, root)), until="export")


@pytest.mark.parametrize(("model", "case"), FAILED_THERE, ids=[f"{model}-{case}" for model, case in FAILED_THERE])
def test_what_failed_there_is_written(model: str, case: str, root: Path) -> None:
    assert golden.meta_of(model, case)["status"] != "ok"
    folder = exported(model, case, "ascend", root)
    ours = load_file(folder / "quant_model_weights.safetensors")
    described = json.loads((folder / "quant_model_description.json").read_text())
    down = ours["model.layers.0.mlp.down_proj.weight_scale"]
    if FAILED_THERE[model, case] == "groups that do not divide":
        assert (described["model_quant_type"], described["group_size"]) == ("W4A16", 32)
        assert down.shape == (64, 160 // 32)
    else:  # no weight of a row is an outlier: all codes have 4 bits
        assert described["model_quant_type"] == "W8A8S"
        sizes = [
            int(ours[name].abs().max())
            for name, kind in described.items()
            if kind == "W8A8S" and name.endswith(".weight")
        ]
        assert max(sizes) <= 8
