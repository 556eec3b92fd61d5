"""Whatever is damaged in an export is found: every byte of the weights, and every claim about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_exports import SCHEMES, Export, flip_bit

from quantcli.errors import ModelError, VerificationError

Exported = Callable[..., Export]
NAMES = ["W8A16", "W4A16 g32 asym", "W4A16 tensor asym", "W3A16 g32 asym", "W8A8 dynamic", "W8A8 static asym",
         "W4A8 dynamic g32", "W8A8 fp8 static tensor", "W8A16 fp8"]  # fmt: skip
UP = "model.layers.1.mlp.up_proj"


def copy_of(made: Export, place: Path) -> Export:
    shutil.rmtree(place / "copy", ignore_errors=True)
    shutil.copytree(made.folder, place / "copy")
    return Export(place / "copy", made.model, made.structure, made.store, made.source)


def change_tensors(made: Export, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = made.folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_config(made: Export, change: Callable[[dict[str, Any]], Any]) -> None:
    file = made.folder / "config.json"
    content = json.loads(file.read_text())
    change(content["quantization_config"])
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_copy_is_in_order(name: str, exported: Exported, tmp_path: Path) -> None:
    made = copy_of(exported(name), tmp_path)
    change_tensors(made, lambda tensors: None)
    change_config(made, lambda config: None)
    assert made.verify().linears == 14


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_tensor_is_found(
    name: str, exported: Exported, tmp_path: Path, place: float, bit: int
) -> None:
    made = copy_of(exported(name), tmp_path)
    file = made.folder / "model.safetensors"
    flip_bit(file, place, bit)
    with pytest.raises(VerificationError):
        made.verify()


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_every_small_tensor_is_found(name: str, exported: Exported, tmp_path: Path) -> None:
    """Shapes, zero points and input scales are so small that chance seldom meets them."""
    original = exported(name)
    small = {key for key, t in load_file(original.folder / "model.safetensors").items() if UP in key and t.nbytes < 512}
    assert bool(small) == (name != "W8A8 dynamic")
    for key in small:

        def flip(tensors: dict[str, torch.Tensor], key: str = key) -> None:
            tensors[key].view(-1).view(torch.uint8)[0] ^= 1

        made = copy_of(original, tmp_path)
        change_tensors(made, flip)
        with pytest.raises(VerificationError, match="up_proj"):
            made.verify()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_renamed_recast_reshaped_or_foreign_tensor_is_found(
    name: str, exported: Exported, tmp_path: Path
) -> None:
    original = exported(name)
    parts = [key for key in load_file(original.folder / "model.safetensors") if key.startswith(f"{UP}.")]
    for key in [*parts, "model.norm.weight"]:
        damages: list[Callable[[dict[str, torch.Tensor]], Any]] = [
            lambda tensors, key=key: tensors.pop(key),
            lambda tensors, key=key: tensors.update({key + "x": tensors.pop(key)}),
            lambda tensors, key=key: tensors.update({key: tensors[key].to(torch.float64)}),
            lambda tensors, key=key: tensors.update({key: tensors[key][None]}),
            lambda tensors, key=key: tensors.update({key: tensors[key][:0]}),
        ]
        for damage in damages:
            made = copy_of(original, tmp_path)
            change_tensors(made, damage)
            with pytest.raises(VerificationError):
                made.verify()
    for foreign in (f"{UP}.weight_g_idx", "model.layers.1.extra.weight", "lm_head.weight_scale"):
        made = copy_of(original, tmp_path)
        change_tensors(made, lambda tensors, foreign=foreign: tensors.update({foreign: torch.ones(3)}))
        with pytest.raises(VerificationError):
            made.verify()


@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W8A16", "W8A8 static asym"])
def test_scales_that_no_engine_can_use_are_found_even_if_the_store_has_them(
    name: str, value: float, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = copy_of(exported(name), tmp_path)
    suffix = "weight_scale" if name == "W8A16" else "input_scale"
    change_tensors(made, lambda tensors: tensors[f"{UP}.{suffix}"].view(-1)[:1].fill_(value))
    with pytest.raises(VerificationError, match=suffix):
        made.verify()
    read = made.store.read

    def damaged_store(module: str) -> Any:
        stored = read(module)
        if module == UP:
            scale = stored.weight.scale if name == "W8A16" else stored.input_scale
            assert scale is not None
            scale.view(-1)[:1].fill_(value)
        return stored

    monkeypatch.setattr(made.store, "read", damaged_store)
    with pytest.raises(VerificationError, match=suffix):
        made.verify()


def test_damaged_files_are_verification_errors_too(exported: Exported, tmp_path: Path) -> None:
    def truncate(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    damages: list[Callable[[Path], Any]] = [
        truncate,
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 40),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").unlink(),
    ]
    for damage in damages:
        made = copy_of(exported("W8A16"), tmp_path)
        damage(made.folder)
        with pytest.raises(VerificationError):
            made.verify()


def group(config: dict[str, Any]) -> dict[str, Any]:
    (only,) = config["config_groups"].values()
    return only


OTHER_TYPE = {"int": "float", "float": "int"}
CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bits": lambda c: group(c)["weights"].update(num_bits=5),
    "type": lambda c: group(c)["weights"].update(type=OTHER_TYPE[group(c)["weights"]["type"]]),
    "symmetric": lambda c: group(c)["weights"].update(symmetric=not group(c)["weights"]["symmetric"]),
    "strategy": lambda c: group(c)["weights"].update(strategy="block"),
    "group size": lambda c: group(c)["weights"].update(group_size=16),
    "dynamic": lambda c: group(c)["weights"].update(dynamic=True),
    "actorder": lambda c: group(c)["weights"].update(actorder="group"),
    "no weights": lambda c: group(c).update(weights=None),
    "outputs": lambda c: group(c).update(output_activations=group(c)["weights"]),
    "group format": lambda c: group(c).update(format="naive-quantized"),
    "format": lambda c: c.update(format="dense"),
    "status": lambda c: c.update(quantization_status="frozen"),
    "method": lambda c: c.update(quant_method="gptq"),
    "cache": lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "int"}),
    "fp8 cache": lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float"}),
    "sparsity": lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
    "no target": lambda c: group(c).update(targets=[]),
    "other target": lambda c: group(c).update(targets=["Conv1d"]),
    "no groups": lambda c: c.update(config_groups={}),
    "groups as a list": lambda c: c.update(config_groups=[group(c)]),
    "no ignore": lambda c: c.pop("ignore"),
    "quantized but ignored": lambda c: c["ignore"].append(UP),
    "quantized but ignored by expression": lambda c: c["ignore"].append(r"re:.*up_proj$"),
    "every linear ignored": lambda c: c["ignore"].append("Linear"),
    "in float but not ignored": lambda c: c["ignore"].remove("lm_head"),
    "ignored without reason": lambda c: c["ignore"].append("model.layers.9.mlp.up_proj"),
}
INPUT_CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no inputs": lambda c: group(c).update(input_activations=None),
    "input bits": lambda c: group(c)["input_activations"].update(num_bits=4),
    "input type": lambda c: group(c)["input_activations"].update(
        type=OTHER_TYPE[group(c)["input_activations"]["type"]]
    ),
    "input symmetric": lambda c: group(c)["input_activations"].update(
        symmetric=not group(c)["input_activations"]["symmetric"]
    ),
    "input strategy": lambda c: group(c)["input_activations"].update(strategy="group"),
    "input dynamic": lambda c: group(c)["input_activations"].update(
        dynamic=not group(c)["input_activations"]["dynamic"]
    ),
}


@pytest.mark.parametrize("claim", CLAIMS | INPUT_CLAIMS)
@pytest.mark.parametrize(
    "name",
    ["W8A16", "W4A16 g32 asym", "W8A8 dynamic", "W8A8 dynamic asym", "W8A8 static asym", "W4A8 dynamic g32",
     "W8A8 fp8 static"],
)  # fmt: skip
def test_a_false_claim_of_the_configuration_is_found(name: str, claim: str, exported: Exported, tmp_path: Path) -> None:
    made = copy_of(exported(name), tmp_path)
    if claim in INPUT_CLAIMS and SCHEMES[name].activations == "none":
        change_config(made, lambda c: group(c).update(input_activations={"num_bits": 8, "dynamic": True}))
    else:
        change_config(made, (CLAIMS | INPUT_CLAIMS)[claim])
    with pytest.raises(VerificationError, match=r"config\.json|ignored"):
        made.verify()


def test_float8_codes_that_are_no_numbers_are_not_read(exported: Exported, tmp_path: Path) -> None:
    made = copy_of(exported("W8A8 fp8 dynamic"), tmp_path)
    for pattern in (0x7F, 0xFF):
        change_tensors(made, lambda tensors: tensors[f"{UP}.weight"].view(torch.uint8)[3].fill_(pattern))  # noqa: B023
        with pytest.raises(ModelError, match=r"up_proj\.weight holds codes that are no numbers"):
            made.reader().read_linear(UP)


@pytest.mark.parametrize(
    "claim",
    ["type", "dynamic", "actorder", "no weights", "outputs", "group format", "status", "cache", *INPUT_CLAIMS],
)
def test_our_own_reader_refuses_what_it_would_misread(claim: str, exported: Exported, tmp_path: Path) -> None:
    # fp8 weights alone are float-quantized too, as other tools write them, and int8 ones have either kind of inputs
    others = {"no inputs": ("W8A8 dynamic",), "input symmetric": ("W4A8 dynamic", "W8A8 fp8 dynamic")}
    for name in others.get(claim, ("W8A8 dynamic", "W8A8 fp8 dynamic")):
        made = copy_of(exported(name), tmp_path)
        change_config(made, (CLAIMS | INPUT_CLAIMS)[claim])
        with pytest.raises(ModelError, match="quantization_config"):
            made.reader()


@pytest.mark.parametrize(
    "claim",
    [
        lambda c: group(c)["input_activations"].update(num_bits=6),
        lambda c: group(c)["input_activations"].update(symmetric=False),
        lambda c: group(c)["input_activations"].update(dynamic=False, strategy="tensor"),
        lambda c: group(c)["weights"].update(symmetric=False),
        lambda c: group(c).update(format="naive-quantized"),
    ],
)
def test_our_own_reader_refuses_other_kinds_of_w4a8(
    claim: Callable[[dict[str, Any]], Any], exported: Exported, tmp_path: Path
) -> None:
    made = copy_of(exported("W4A8 dynamic g32"), tmp_path)
    assert made.reader().schemes
    change_config(made, claim)
    with pytest.raises(ModelError, match="scheme that is not supported"):
        made.reader()


PACKED = ["W4A8 dynamic", "W4A8 dynamic g32", "W4A4 dynamic g32", "W8A8 dynamic g32"]


def a_byte_a_code(made: Export) -> None:
    """The export as llm-compressor stores it, by the compressor of the format's own library."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]:
            bits, shape = made.store.schemes[name].bits, torch.Size(tensors.pop(f"{name}.weight_shape").tolist())
            tensors[f"{name}.weight"] = unpack_from_int32(tensors.pop(f"{name}.weight_packed"), bits, shape)

    change_tensors(made, unpack)
    change_config(made, lambda c: (c.update(format="int-quantized"), group(c).update(format="int-quantized")))


@pytest.mark.parametrize("name", PACKED)
def test_codes_of_few_bits_are_read_a_byte_each(name: str, exported: Exported, tmp_path: Path) -> None:
    made = copy_of(exported(name), tmp_path)
    a_byte_a_code(made)
    reader = made.reader()
    assert {scheme.name for scheme in reader.schemes.values()} == {SCHEMES[name].name}
    for module in made.store.schemes:
        found, stored = reader.read_linear(module), made.store.read(module)
        assert torch.equal(found.weight.codes, stored.weight.codes)
        assert torch.equal(found.weight.scale.float(), stored.weight.scale.float())
    assert not any(entry.endswith("weight_scale") for entry in reader.entries)


def test_bytes_that_are_no_codes_of_their_bits_and_other_layouts_than_said_are_refused(
    exported: Exported, tmp_path: Path
) -> None:
    made = copy_of(exported("W4A8 dynamic g32"), tmp_path)
    change_config(made, lambda c: group(c).update(format="int-quantized"))
    with pytest.raises(ModelError, match="is int-quantized, but its tensors are not"):
        made.reader()
    change_config(made, lambda c: group(c).update(format="pack-quantized"))
    a_byte_a_code(made)
    change_tensors(made, lambda tensors: tensors[f"{UP}.weight"][0, :1].fill_(8))
    with pytest.raises(ModelError, match=r"up_proj: weight holds codes outside of -8 to 7"):
        made.reader().read_linear(UP)


def test_our_own_reader_names_a_misshapen_tensor(exported: Exported, tmp_path: Path) -> None:
    for name, suffix in [("W8A16", "weight_packed"), ("W8A16", "weight_shape"), ("W8A8 static asym", "input_scale")]:
        made = copy_of(exported(name), tmp_path)
        key = f"{UP}.{suffix}"
        change_tensors(made, lambda tensors, key=key: tensors.update({key: tensors[key].repeat_interleave(3, 0)}))
        with pytest.raises(ModelError, match=rf"up_proj\.{suffix} has shape"):
            made.reader().read_linear(UP)
    made = copy_of(exported("W8A16"), tmp_path)
    change_tensors(made, lambda tensors: tensors[f"{UP}.weight_shape"].copy_(torch.tensor([64, 128])))
    with pytest.raises(ModelError, match="weight_shape says"):
        made.reader().read_linear(UP)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        lambda c: c.update(num_hidden_layers=3),
        lambda c: c.update(tie_word_embeddings=0),  # 0 is not false
        lambda c: c.update(dtype="float32"),
        lambda c: c.update(sliding_window=8),
        lambda c: c.pop("rms_norm_eps"),
    ],
)
def test_a_configuration_of_another_model_is_found(
    change: Callable[[dict[str, Any]], Any], exported: Exported, tmp_path: Path
) -> None:
    made = copy_of(exported("W8A16"), tmp_path)
    file = made.folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=r"config\.json: \w+ is .*, not"):
        made.verify()
