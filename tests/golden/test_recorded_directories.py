"""Directories as msModelSlim writes them are read: opened by their content, verified alone, and converted.

Tensors are the recorded ones under the recorded names, `config.json` is the model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_ascend_tensors import GOLDEN, recorded, stored_linear
from torch import Tensor

from quantcli.errors import ModelError, RecipeError
from quantcli.formats.ascend import type_name
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Structure, biased
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.served import block_as_served
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded outputs beside the checkout")

# model, case, type, and whether scales have to be derived, and norms have biases of zeros
CASES = [
    ("A", "v1_w8a8_static_asym", "W8A8", True, False),
    ("B", "v1_w8a8_static_mean", "W8A8", True, False),
    ("A", "w8a8s_cosparse_w8", "W8A8S", True, False),
    ("A", "m1_w8a8", "W8A8", False, True),
    ("B", "m4_w8a8_dynamic", "W8A8_DYNAMIC", False, True),
    ("A_bf16", "w8a8_act1_mm0", "W8A8", False, False),
    ("A_fp16", "w8a8_pdmix", "W8A8_MIX", False, False),
    ("A", "v1_w4a8_minmax", "W4A8_DYNAMIC", False, False),
    ("A", "v1_w8a16_ssz", "W8A16", False, False),
]
SIXTEEN_BITS = ["w8a8_act1_mm0", "w8a8_pdmix", "w8a8_kv_sym", "w8a8_dynamic", "w8a16_minmax_sym"]
"""Of models of 16 bits, in which the first generation of the tool stores what it derives from scales, too."""
IDS = [f"{model}-{case}" for model, case, *_ in CASES]


def directory(place: Path, model: str, case: str) -> tuple[Path, dict[str, Tensor]]:
    tensors, description = recorded(model, case)
    place.mkdir()
    shutil.copy(GOLDEN / model / "model" / "config.json", place)
    (place / "quant_model_description.json").write_text(json.dumps(description))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "quant_model_weight.safetensors")
    return place, tensors


@pytest.mark.parametrize(("model", "case", "kind", "derived", "biased"), CASES, ids=IDS)
def test_recorded_codes_and_scales_are_read(
    model: str, case: str, kind: str, derived: bool, biased: bool, tmp_path: Path
) -> None:
    folder, tensors = directory(tmp_path / "made", model, case)
    structure, checkpoint, _ = open_checkpoint(folder)
    assert {type_name(scheme) for scheme in checkpoint.schemes.values()} == {kind}
    assert checkpoint.schemes.keys() == {n.removesuffix(".weight") for n, t in tensors.items() if t.dtype == torch.int8}
    assert derived == (f"{next(iter(checkpoint.schemes))}.weight_scale" not in tensors)
    for name, scheme in checkpoint.schemes.items():
        if derived:
            deq_scale = tensors[f"{name}.deq_scale"]
            assert deq_scale.dtype == torch.int64
            served = deq_scale.to(torch.int32).view(torch.float32)
            scale = (served / tensors[f"{name}.input_scale"]).view(-1, 1)
            parts = tensors | {f"{name}.weight_scale": scale, f"{name}.weight_offset": torch.zeros_like(scale)}
        else:
            parts = tensors
        wanted, found = stored_linear(parts, name, scheme), checkpoint.read_linear(name)
        assert torch.equal(found.weight.codes, wanted.weight.codes), name
        torch.testing.assert_close(found.weight.scale.float(), wanted.weight.scale.float(), rtol=1.2e-7, atol=0)
        if scheme.observed:
            assert found.input_scale is not None
            assert wanted.input_scale is not None
            assert torch.equal(found.input_scale.float(), wanted.input_scale)
    assert biased == any(name.endswith("norm.bias") for name in tensors)
    skeleton = Skeleton(folder, structure, checkpoint=checkpoint)
    assert skeleton.unused_tensors == []
    found_alone = verify_path(folder)
    assert found_alone["linears"] == len(checkpoint.schemes)
    assert "of no parameter" not in found_alone


def test_derived_scales_are_those_that_the_other_generation_saves(tmp_path: Path) -> None:
    folder, tensors = directory(tmp_path / "made", "A", "v1_w8a8_static_asym")
    _, checkpoint, _ = open_checkpoint(folder)
    saved, _ = recorded("A", "w8a8_act1_mm0")
    for name in checkpoint.schemes:
        assert torch.equal(tensors[f"{name}.weight"], saved[f"{name}.weight"])
        scale = checkpoint.read_linear(name).weight.scale
        torch.testing.assert_close(scale, saved[f"{name}.weight_scale"], rtol=1.2e-7, atol=0)


@pytest.mark.parametrize(
    ("model", "case"),
    [("A", "v1_w8a8_static_asym"), ("A", "m1_w8a8"), *((m, c) for m in ("A_bf16", "A_fp16") for c in SIXTEEN_BITS)],
)
def test_a_recorded_directory_is_converted(model: str, case: str, tmp_path: Path) -> None:
    folder, tensors = directory(tmp_path / "made", model, case)
    convert_checkpoint(folder, "ascend", tmp_path / "ascend")
    found = load_file(tmp_path / "ascend" / "quant_model_weights.safetensors")
    assert found.keys() - tensors.keys() == set() or case.startswith("v1")
    for name, tensor in tensors.items():
        if name.endswith("norm.bias"):
            assert name not in found
        elif case.startswith("v1") and name.endswith(".deq_scale"):  # from a scale that was derived from it
            one, other = (t.to(torch.int32).view(torch.float32) for t in (found[name], tensor))
            torch.testing.assert_close(one, other, rtol=1.2e-7, atol=0)
        else:
            assert torch.equal(found[name].double(), tensor.double()), name
    others = ["mindie", "numpy"]
    for form in others if case in ("w8a8_pdmix", "w8a8_kv_sym") else [*others, "compressed-tensors"]:
        convert_checkpoint(folder, form, tmp_path / form)
        assert verify_path(tmp_path / form)["linears"] == 14


@pytest.mark.parametrize(("model", "numpy_holds_them"), [("A_bf16", True), ("A_fp16", False)])
def test_recorded_scales_of_more_bits_than_the_format_has_are_not_rounded(
    model: str, numpy_holds_them: bool, tmp_path: Path
) -> None:
    folder, tensors = directory(tmp_path / "made", model, "w4a16_g32_sym")
    scales = {name: t for name, t in tensors.items() if name.endswith(".weight_scale")}
    assert {t.dtype for t in scales.values()} == {torch.float32}
    for form in ("ascend", "mindie", *([] if numpy_holds_them else ["numpy"])):
        with pytest.raises(ModelError, match=r"A scale of its codes is no b?float16 value"):
            convert_checkpoint(folder, form, tmp_path / form)
        assert not (tmp_path / form).exists()
    if numpy_holds_them:
        convert_checkpoint(folder, "numpy", tmp_path / "numpy")
        _, checkpoint, _ = open_checkpoint(tmp_path / "numpy")
        for name in checkpoint.schemes:
            assert torch.equal(checkpoint.read_linear(name).weight.scale, scales[f"{name}.weight_scale"])


def served_logits(folder: Path, tokens: Tensor, structure: Structure, checkpoint: QuantizedCheckpoint) -> Tensor:
    """[tokens, vocabulary] of the checkpoint as engines compute it."""
    stream = BlockStream(Skeleton(folder, structure, dtype="float32", checkpoint=checkpoint), [tokens.view(1, -1)])
    (hidden,) = stream.start()
    for index in range(len(structure.blocks)):
        with block_as_served(stream.skeleton, index, checkpoint, "prefill"):
            hidden = stream.run(index, 0, hidden)
    with stream.head():
        return torch.cat([piece[0] for _, piece in stream.logits(hidden)])


def test_a_recorded_shift_of_channels_is_computed(tmp_path: Path) -> None:
    """Norms and linears have biases that the model lacks; the logits are those of the tool's own simulation."""
    folder, tensors = directory(tmp_path / "made", "A", "w8a8s_lowbit_smooth")
    structure, checkpoint, _ = open_checkpoint(folder)
    biases = {name for name in tensors if name.endswith(".bias") and bool(tensors[name].any())}
    assert set(checkpoint.added_biases) == biases
    assert len(biases) == 2 * (2 + 5)
    (tokens,) = load_file(GOLDEN / "A" / "heldout.safetensors").values()
    (wanted,) = load_file(GOLDEN / "A" / "w8a8s_lowbit_smooth" / "logits.safetensors").values()
    found = served_logits(folder, tokens, structure, checkpoint)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    assert verify_path(folder)["linears"] == 14
    convert_checkpoint(folder, "ascend", tmp_path / "again")
    again = load_file(tmp_path / "again" / "quant_model_weights.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in biases)
    assert all(torch.equal(again[name], t) for name, t in tensors.items() if name.endswith(".quant_bias"))
    with pytest.raises(RecipeError, match="does not hold biases that the architecture lacks"):
        convert_checkpoint(folder, "compressed-tensors", tmp_path / "other")


@pytest.mark.parametrize("model", ["A", "B"])
def test_a_recorded_shift_in_float_is_the_same_function(model: str, tmp_path: Path) -> None:
    """What msModelSlim makes of norms and linears with symmetric: False, in the places where biases are added here."""
    saved, _ = recorded(model, "v1_iter_smooth_asym")
    tensors = load_file(GOLDEN / model / "model" / "model.safetensors") | saved
    for name, factor in load_file(GOLDEN / model / "v1_iter_smooth_asym" / "scales.safetensors").items():
        linear, _, kind = name.rpartition(".")
        if kind in ("row_times", "col_times"):
            tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * factor.unsqueeze(int(kind == "row_times"))
    shutil.copytree(GOLDEN / model / "model", tmp_path / "made")
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "made" / "model.safetensors")
    structure = find_structure(tmp_path / "made")
    added = [name for name in tensors if name.endswith(".bias") and name not in structure.parameters]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in added} >= {"input_layernorm", "gate_proj"}
    (tokens,) = load_file(GOLDEN / model / "heldout.safetensors").values()
    (wanted,) = load_file(GOLDEN / model / "logits_float.safetensors").values()
    skeleton = Skeleton(tmp_path / "made", biased(structure, added))
    with torch.inference_mode(), skeleton.resident(skeleton.model.state_dict()):
        found = skeleton.model(tokens.view(1, -1), use_cache=False).logits[0]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
