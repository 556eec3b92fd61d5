"""A checkpoint away from its run is checked against itself: whatever the model, whichever names its tensors have."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import export_tiny

from quantcli.errors import ModelError, VerificationError
from quantcli.formats.sums import SUMS
from quantcli.model.gguf_file import GgufCheckpoint
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme

W8, DYNAMIC = Scheme(8), Scheme(8, activations="dynamic")
G32 = Scheme(4, granularity="group", group_size=32)
Tensors = dict[str, torch.Tensor]


def alone(folder: Path) -> Path:
    """The checkpoint without its checksums, so that only its content speaks."""
    (folder / SUMS).unlink(missing_ok=True)
    return folder


def weights_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def rewritten(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights_file(folder), {"format": "pt"})
    for index in folder.glob("*.index.json"):
        index.unlink()


def described(folder: Path, change: dict[str, Any], without: str = "") -> None:
    (file,) = folder.glob("quant_model_description*.json")
    content = json.loads(file.read_text()) | change
    content.pop(without, None)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "deepseek-v3"])
@pytest.mark.parametrize(("form", "scheme"), [("compressed-tensors", G32), ("ascend", DYNAMIC), ("mindie", W8)])
def test_experts_are_in_order_and_one_that_is_missing_is_found(
    family: str, form: str, scheme: Scheme, tmp_path: Path
) -> None:
    made = export_tiny(tmp_path, scheme, family, dtype=torch.bfloat16, form=form)
    folder = alone(made.folder)
    assert verify_path(folder)["linears"] == len(made.store.schemes)
    tensors = load_file(weights_file(folder))
    expert = next(name for name in made.store.schemes if ".experts." in name)
    rewritten(folder, {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{expert}.")})
    with pytest.raises(VerificationError, match=expert):
        verify_path(folder)


@pytest.mark.parametrize("form", ["compressed-tensors", "ascend"])
def test_names_without_the_prefix_of_the_base_model(form: str, tmp_path: Path) -> None:
    folder = alone(export_tiny(tmp_path, DYNAMIC, dtype=torch.bfloat16, form=form).folder)
    rewritten(folder, {n.removeprefix("model."): tensor for n, tensor in load_file(weights_file(folder)).items()})
    if form == "ascend":
        file = folder / "quant_model_description.json"
        entries = json.loads(file.read_text())
        file.write_text(json.dumps({name.removeprefix("model."): kind for name, kind in entries.items()}))
    found = verify_path(folder)
    assert found["linears"] == 14
    assert "of no parameter" not in found


@pytest.mark.parametrize("form", ["compressed-tensors", "ascend", "gguf"])
def test_a_configuration_of_other_sizes_than_the_tensors_is_found(form: str, tmp_path: Path) -> None:
    scheme = Scheme(8, float16_scales=form == "gguf")
    folder = alone(export_tiny(tmp_path, scheme, dtype=torch.bfloat16, form=form, with_tokenizer=True).folder)
    assert verify_path(folder)["linears"] == 14
    file = folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"vocab_size": 600}))
    with pytest.raises(VerificationError, match=r"weight has shape \(512, 64\) in the checkpoint and \(600, 64\)"):
        verify_path(folder)
    with pytest.raises(ModelError, match=r"export: model\.embed_tokens\.weight has shape \(512, 64\)"):
        convert_checkpoint(folder, "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if form != "gguf":
        file.write_text(json.dumps(content))
        rewritten(folder, load_file(weights_file(folder)) | {"model.norm.weight": torch.ones(63)})
        with pytest.raises(VerificationError, match=r"norm\.weight has shape \(63,\) in the checkpoint and \(64,\)"):
            verify_path(folder)
        with pytest.raises(ModelError, match=r"norm\.weight has shape \(63,\)"):
            convert_checkpoint(folder, "dense", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "how"),
    [
        # of bfloat16 a signalling NaN and an infinity, and of float32 what is too large for bfloat16
        ("model.embed_tokens.weight", b"\x81\x7f", "holds values that are not finite"),
        ("model.embed_tokens.weight", b"\x80\xff", "holds values that are not finite"),
        ("model.norm.weight", b"\xff\xff\x7f\x7f", "holds values that are not finite"),
        ("model.layers.1.mlp.up_proj.weight", b"\x00\x7c", "a scale is zero or not finite"),
        ("model.layers.1.mlp.up_proj.weight", b"\x00\x00", "a scale is zero or not finite"),
    ],
)
@pytest.mark.parametrize("form", ["compressed-tensors", "dense", "gguf"])
def test_a_damaged_gguf_file_is_named_and_not_what_is_made_of_it(
    form: str, name: str, value: bytes, how: str, tmp_path: Path
) -> None:
    scheme = Scheme(8, granularity="group", group_size=32, float16_scales=True)
    folder = alone(export_tiny(tmp_path, scheme, dtype=torch.bfloat16, form="gguf", with_tokenizer=True).folder)
    content, place = (folder / "model.gguf").read_bytes(), GgufCheckpoint(folder).places[name].offset
    (folder / "model.gguf").write_bytes(content[:place] + value + content[place + len(value) :])
    message = rf"{folder}: {name.removesuffix('.weight')}\S* {how}"
    with pytest.raises(ModelError, match=message):
        convert_checkpoint(folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(VerificationError, match=message):
        verify_path(folder)


@pytest.mark.parametrize(
    ("form", "attention", "part"),
    [
        ("compressed-tensors", AttentionScheme(kv="fp8"), "k_scale"),
        ("ascend", AttentionScheme(kv="int8"), "v_proj.kv_cache_scale"),
        ("ascend", AttentionScheme(heads=True), "fa_q.scale"),
    ],
)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scales_of_attention_are_read(
    form: str, attention: AttentionScheme, part: str, value: float, tmp_path: Path
) -> None:
    folder = alone(export_tiny(tmp_path, W8, dtype=torch.bfloat16, form=form, attention=attention).folder)
    assert verify_path(folder)["attention modules"] == 2
    tensors = load_file(weights_file(folder))
    tensors[f"model.layers.1.self_attn.{part}"].flatten()[:1] = value
    rewritten(folder, tensors)
    with pytest.raises(VerificationError, match=r"layers.1.self_attn: .*_scale is zero or not finite"):
        verify_path(folder)


@pytest.mark.parametrize(
    ("form", "attention", "left_out", "named"),
    [
        ("compressed-tensors", AttentionScheme(kv="fp8"), "*.?_scale", "layers.0.self_attn.k_scale"),
        ("compressed-tensors", AttentionScheme(kv="fp8"), "*.1.self_attn.?_scale", "layers.1.self_attn.k_scale"),
        ("compressed-tensors", AttentionScheme(kv="fp8"), "*.1.self_attn.v_scale", "layers.1.self_attn.v_scale"),
        ("numpy", AttentionScheme(kv="int8"), "*.kv_cache_*", "layers.0.self_attn.k_proj.kv_cache_scale"),
    ],
)
def test_scales_of_a_cache_that_are_missing_are_named(
    form: str, attention: AttentionScheme, left_out: str, named: str, tmp_path: Path
) -> None:
    """Such a cache would be left in float, or by engines be given scales of 1."""
    folder = alone(export_tiny(tmp_path, DYNAMIC, dtype=torch.bfloat16, form=form, attention=attention).folder)
    assert verify_path(folder)["attention modules"] == 2
    if form == "numpy":
        for file in folder.glob("kv_cache_*.npy"):
            file.unlink()
    else:
        tensors = load_file(weights_file(folder))
        rewritten(folder, {name: tensor for name, tensor in tensors.items() if not fnmatchcase(name, left_out)})
    with pytest.raises(VerificationError, match=rf"{named} is missing"):
        verify_path(folder)
    with pytest.raises(ModelError, match=rf"{named} is missing"):
        convert_checkpoint(folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ascend_may_quantize_the_cache_of_some_layers(tmp_path: Path) -> None:
    """Its engines take the layers whose scales are there."""
    scheme = AttentionScheme(kv="int8")
    folder = alone(export_tiny(tmp_path, W8, dtype=torch.bfloat16, form="ascend", attention=scheme).folder)
    tensors, file = load_file(weights_file(folder)), folder / "quant_model_description.json"
    left = {name for name in tensors if ".layers.0." in name and ".kv_cache_" in name}
    rewritten(folder, {name: tensor for name, tensor in tensors.items() if name not in left})
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({name: kind for name, kind in entries.items() if name not in left}))
    assert verify_path(folder)["attention modules"] == 1


def test_tensors_of_no_parameter_are_reported(tmp_path: Path) -> None:
    folder = alone(export_tiny(tmp_path, W8, form="compressed-tensors").folder)
    assert "of no parameter" not in verify_path(folder)
    rewritten(folder, load_file(weights_file(folder)) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    assert verify_path(folder)["of no parameter"] == "1 tensors, such as model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("form", ["ascend", "mindie"])
def test_descriptions_are_complete_and_of_one_mind(form: str, tmp_path: Path) -> None:
    folder = alone(export_tiny(tmp_path, W8, "qwen2", form=form, kept=["model.layers.1.mlp.down_proj"]).folder)
    (file,) = folder.glob("quant_model_description*.json")
    whole = file.read_text()
    assert verify_path(folder)["linears"] == 13
    for name in (
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.up_proj.weight_scale",
        "lm_head.weight",
    ):
        described(folder, {}, without=name)
        with pytest.raises(VerificationError, match=name):
            verify_path(folder)
        file.write_text(whole)
    described(folder, {"model.layers.0.mlp.up_proj.weight_zero": "W8A16"})
    with pytest.raises(VerificationError, match=r"up_proj.weight_zero, which is not there"):
        verify_path(folder)
    file.write_text(whole)
    described(folder, {"model.layers.0.mlp.up_proj.weight_offset": "FLOAT"})
    with pytest.raises(VerificationError, match=r"up_proj.weight_offset is FLOAT, and the weight W8A16"):
        verify_path(folder)


def test_linears_that_engines_join_have_one_type(tmp_path: Path) -> None:
    folder = alone(export_tiny(tmp_path, W8, form="ascend", kept=["model.layers.1.mlp.up_proj"]).folder)
    with pytest.raises(VerificationError, match=r"gate_proj is W8A16 and .*up_proj is FLOAT, and engines join them"):
        verify_path(folder)


def test_a_tied_head_is_described(tmp_path: Path) -> None:
    folder = alone(export_tiny(tmp_path, W8, "llama-tied", form="ascend").folder)
    verify_path(folder)
    tensors = load_file(weights_file(folder))
    del tensors["lm_head.weight"]
    rewritten(folder, tensors)
    described(folder, {}, without="lm_head.weight")
    with pytest.raises(VerificationError, match=r"lm_head.weight is not described"):
        verify_path(folder)
