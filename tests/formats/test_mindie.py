"""The older layout for MindIE: names that carry the type, what config.json adds, and damage of either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_exports import Export, export_tiny

from quantcli.errors import ModelError, VerificationError
from quantcli.formats import ascend, export, mindie
from quantcli.formats.engines import verdicts
from quantcli.model.structure import Linear
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme

STATIC = Scheme(8, activations="static", activations_symmetric=False)
G32 = Scheme(4, granularity="group", group_size=32)
C8, HEADS = AttentionScheme(kv="int8"), AttentionScheme(heads=True)
# type → scheme, attention, and what quantization_config says: kv_quant_type, fa_quant_type, group_size
CASES: dict[str, tuple[Scheme, AttentionScheme | None, tuple[str | None, str | None, int]]] = {
    "w8a8": (STATIC, C8, ("C8", None, 0)),
    "w8a8s": (Scheme(8, activations="static", sparse=True), None, (None, None, 0)),
    "w8a8_dynamic": (Scheme(8, activations="dynamic"), HEADS, (None, "FAQuant", 0)),
    "w8a8_mix": (Scheme(8, activations="mix"), None, (None, None, 0)),
    "w8a16": (Scheme(8, symmetric=False), None, (None, None, 0)),
    "w4a16": (G32, None, (None, None, 32)),
    "w4a8_dynamic": (Scheme(4, activations="dynamic"), None, (None, None, 0)),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_tensors_of_ascend_lie_under_the_older_names(kind: str, tmp_path: Path) -> None:
    scheme, attention, said = CASES[kind]
    made = export_tiny(tmp_path, scheme, "qwen2", dtype=torch.bfloat16, attention=attention, form="mindie")
    other = replace(made, folder=tmp_path / "ascend", form="ascend")
    other.write(other.folder)
    tensors = load_file(made.folder / f"quant_model_weight_{kind}.safetensors")
    wanted = load_file(other.folder / "quant_model_weights.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)
    described = json.loads((made.folder / f"quant_model_description_{kind}.json").read_text())
    by_ascend = json.loads((other.folder / ascend.DESCRIPTION).read_text())
    assert {name: described[name] for name in tensors} == {name: by_ascend[name] for name in tensors}
    beside = {name: value for name, value in described.items() if name not in tensors}
    about_attention = {"kv_cache_type": said[0], "fa_quant_type": said[1]}
    assert beside == {"model_quant_type": kind.upper()} | {k: v for k, v in about_attention.items() if v}
    config = json.loads((made.folder / "config.json").read_text())
    added = dict(zip(("kv_quant_type", "fa_quant_type", "group_size"), said, strict=True))
    wanted_config = json.loads((made.model / "config.json").read_text())
    assert config == wanted_config | {"quantize": kind, "quantization_config": added}
    reader, by_other = made.reader(), other.reader()
    assert (reader.schemes, reader.attention) == (by_other.schemes, by_other.attention)
    assert made.verify().linears == 14
    assert "itself" in verify_path(made.folder)["checked against"]


def test_shards_carry_the_type_in_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export_tiny(tmp_path, STATIC, form="mindie")
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    names = [file.name for file in made.write(tmp_path / "sharded")]
    count = sum(name.endswith(".safetensors") for name in names)
    assert count > 1
    assert names[0] == f"quant_model_weight_w8a8-00001-of-{count:05d}.safetensors"
    assert names[count] == "quant_model_weight_w8a8.safetensors.index.json"
    assert replace(made, folder=tmp_path / "sharded").verify().linears == 14


CLAIMS: dict[str, Any] = {
    "quantize": lambda c: c.update(quantize="w8a8s"),
    "no quantize": lambda c: c.pop("quantize"),
    "groups": lambda c: c["quantization_config"].update(group_size=64),
    "false for zero": lambda c: c["quantization_config"].update(group_size=False),
    "cache": lambda c: c["quantization_config"].update(kv_quant_type=None),
    "one more": lambda c: c["quantization_config"].update(quant_method="ascend"),
    "none": lambda c: c.pop("quantization_config"),
    "another model": lambda c: c.update(rms_norm_eps=0.5),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_tiny(tmp_path_factory.mktemp("whole"), STATIC, attention=C8, form="mindie")


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_claim_of_the_configuration_is_found(claim: str, whole: Export) -> None:
    file = whole.folder / "config.json"
    content = file.read_text()
    try:
        changed = json.loads(content)
        CLAIMS[claim](changed)
        file.write_text(json.dumps(changed))
        with pytest.raises(VerificationError, match=r"config\.json"):
            whole.verify()
    finally:
        file.write_text(content)


def test_files_under_other_names_are_found(whole: Export) -> None:
    for name, other in [("quant_model_weight_w8a8.safetensors", "quant_model_weights.safetensors"),
                        ("quant_model_description_w8a8.json", "quant_model_description_w8a16.json")]:  # fmt: skip
        (whole.folder / name).rename(whole.folder / other)
        with pytest.raises(VerificationError, match="quant_model_"):
            whole.verify()
        (whole.folder / other).rename(whole.folder / name)
    assert whole.verify().linears == 14


def test_a_description_that_is_not_that_of_the_tensors_is_found(whole: Export) -> None:
    file = whole.folder / "quant_model_description_w8a8.json"
    content = file.read_text()
    for change in ({"version": "1.0.0"}, {"group_size": 0}, {"model_quant_type": "W8A16"}, {"kv_quant_type": "C8"},
                   {"model.norm.weight": "W8A8"}):  # fmt: skip
        file.write_text(json.dumps(json.loads(content) | change))
        with pytest.raises(VerificationError, match="quant_model_description_w8a8"):
            whole.verify()
    file.write_text(content)
    (whole.folder / "quant_model_description_w8a16.json").write_text("{}")
    with pytest.raises(ModelError, match="2 files quant_model_description"):
        whole.reader()
    (whole.folder / "quant_model_description_w8a16.json").unlink()


def test_it_is_converted_from_and_to_ascend(whole: Export, tmp_path: Path) -> None:
    convert_checkpoint(whole.folder, "ascend", tmp_path / "ascend")
    convert_checkpoint(tmp_path / "ascend", "mindie", tmp_path / "mindie")
    one, other = ({file.name: file for file in folder.iterdir()} for folder in (whole.folder, tmp_path / "mindie"))
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(".json"):
            assert json.loads(one[name].read_text()) == json.loads(other[name].read_text())
        if name.endswith(".safetensors"):
            tensors = load_file(one[name])
            assert all(torch.equal(tensor, tensors[part]) for part, tensor in load_file(other[name]).items())
    # a type that changes leaves nothing of the other behind
    weights = export_tiny(tmp_path / "other", Scheme(8), form="ascend")
    convert_checkpoint(weights.folder, "mindie", tmp_path / "mindie", overwrite=True)
    assert [file.name for file in (tmp_path / "mindie").glob("*.safetensors")] == [
        "quant_model_weight_w8a16.safetensors"
    ]
    assert verify_path(tmp_path / "mindie")["linears"] == 14


def test_what_mindie_does_not_know_is_refused() -> None:
    linear, fp8 = Linear("x", 64, 64), Scheme(8, activations="dynamic", type="float")
    assert "fp8" in mindie.refusal(linear, fp8)
    assert "weights of 8 and 4" in mindie.refusal(linear, Scheme(3))
    assert not any(mindie.refusal(linear, scheme) for scheme, _, _ in CASES.values())
    assert [v.engine for v in verdicts([(linear, STATIC)], None, ["mindie"])] == ["MindIE"]
