"""What a configuration says of a checkpoint is held against its tensors, and refused where it is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_exports import Export, export_tiny

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats.sums import SUMS
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.inspect import inspect_path
from quantcli.pipeline.standalone import open_checkpoint, score_recipe
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme
from quantcli.recipe import load_recipe

FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)

ASYMMETRIC = Scheme(8, activations="dynamic", activations_symmetric=False)


def made(place: Path, form: str, scheme: Scheme = FOUR, **changes: Any) -> Export:
    """An export without checksums, as others leave them out."""
    export = export_tiny(place, scheme, dtype=torch.bfloat16, form=form, with_tokenizer=True, **changes)
    (export.folder / SUMS).unlink()
    return export


def say(folder: Path, **changes: Any) -> None:
    """Change quantization_config in config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


HADAMARD = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("transform_config", {"config_groups": {"u": HADAMARD}}, "rotations that engines apply"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "'sparse-24-bitmask'"),
        ("sparsity_config", {"sparsity_structure": "2:4"}, "are not supported"),
    ],
)
def test_what_would_change_the_function_is_refused(
    key: str, value: dict[str, Any], reason: str, prose: Path, tmp_path: Path
) -> None:
    folder = made(tmp_path, "compressed-tensors").folder
    say(folder, **{key: value})
    said = rf"config.json: quantization_config.{key}: .*{reason}"
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 1}
    recipe = {"model": {"path": str(folder)}, "quantize": {}, "evaluate": {"perplexity": text}, "output": "unused"}
    with pytest.raises(ModelError, match=said):
        score_recipe(load_recipe(recipe))
    with pytest.raises(ModelError, match=said):
        convert_checkpoint(folder, "awq", tmp_path / "out")
    with pytest.raises(VerificationError, match=said):
        verify_path(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group_size": 0}, r"quantization_config\.config_groups\.group_0\.weights: .*group_size .*positive"),
        ({"num_bits": "many"}, r"quantization_config\.config_groups\.group_0\.weights\.num_bits: .*integer"),
    ],
)
def test_a_value_that_is_not_valid_is_named(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = made(tmp_path, "compressed-tensors").folder
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"] |= changes
    say(folder, config_groups=groups)
    refused(folder, reason)


def test_what_changes_nothing_is_read(tmp_path: Path) -> None:
    folder = made(tmp_path, "compressed-tensors").folder
    for transforms in ({}, None, {"config_groups": {}}):
        for sparsity in ({}, None, {"format": "dense", "global_sparsity": 0.1}):
            say(folder, transform_config=transforms, sparsity_config=sparsity)
            assert len(open_checkpoint(folder)[1].schemes) == 14


def test_zero_points_of_tokens_are_read_of_others(tmp_path: Path, prose: Path) -> None:
    """Only the configuration says of them, so that of a symmetric checkpoint makes one, scored by other inputs."""
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 2}

    def scored() -> float:
        recipe = {"model": {"path": str(folder)}, "quantize": {}, "evaluate": {"perplexity": text}, "output": "unused"}
        value: float = score_recipe(load_recipe(recipe))["quantized"]["value"]
        return value

    folder = made(tmp_path / "made", "compressed-tensors", Scheme(8, activations="dynamic")).folder
    symmetric = scored()
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] |= {"symmetric": False}
    say(folder, config_groups=groups)
    assert {scheme.name for scheme in open_checkpoint(folder)[1].schemes.values()} == {"W8A8 dynamic asym"}
    assert verify_path(folder)["linears"] == 14
    asymmetric = scored()
    assert asymmetric != symmetric
    wanted = made(tmp_path / "own", "compressed-tensors", ASYMMETRIC).folder
    assert json.loads((wanted / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    folder = wanted
    assert scored() == asymmetric
    with pytest.raises(RecipeError, match=r"ascend cannot hold .* it holds symmetric dynamic activations"):
        convert_checkpoint(wanted, "ascend", tmp_path / "out")


@pytest.mark.parametrize("scheme", [Scheme(4, activations="dynamic"), Scheme(8, activations="dynamic", type="float")])
def test_zero_points_of_tokens_beside_other_weights_are_refused(scheme: Scheme, tmp_path: Path) -> None:
    folder = made(tmp_path, "compressed-tensors", scheme).folder
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] |= {"symmetric": False}
    say(folder, config_groups=groups)
    refused(folder, "asymmetric ones beside 8-bit weights without groups")


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(folder)
    assert str(folder / "config.json") in caught.value.message
    with pytest.raises(VerificationError, match=reason):
        verify_path(folder)


@pytest.mark.parametrize(
    ("form", "said", "reason"),
    [
        ("gptq", {"bits": 8}, r"\.bits is 8 for .*q_proj, and its tensors have 4 bits"),
        ("gptq", {"group_size": 64}, r"\.group_size is 64 for .*q_proj, and its tensors have groups of 32"),
        ("gptq", {"group_size": -1}, r"\.group_size is -1 for .*, and its tensors have groups of 32"),
        ("gptq", {"group_size": 0}, r"\.group_size is 0 for "),
        ("gptq", {"dynamic": {"+:.*down_proj": {"bits": 8}}}, r"\.bits is 8 for .*down_proj, and .* 4 bits"),
        ("gptq", {"dynamic": {r"-:.*\.mlp\..*": {}}}, r"\.dynamic leaves .*gate_proj in float"),
        ("gptq", {"modules_in_block_to_quantize": [["mlp.up_proj"]]}, r"modules_in_block.* leaves .*q_proj in float"),
        ("gptq", {"dynamic": {"(a+)+": {"bits": 8}}}, "may take for ever to match"),
        ("awq", {"group_size": 64}, r"\.group_size is 64 for .*q_proj, and its tensors have groups of 32"),
        ("awq", {"modules_to_not_convert": ["down_proj"]}, r"\.modules_to_not_convert leaves .*down_proj in float"),
        ("awq", {"modules_to_not_convert": [UP]}, rf"\.modules_to_not_convert leaves {UP} in float"),
    ],
)
def test_bits_and_groups_are_those_of_the_tensors(form: str, said: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = made(tmp_path, form).folder
    assert verify_path(folder)["linears"] == 14
    say(folder, **said)
    refused(folder, reason)


def test_one_scale_a_channel_is_no_group(tmp_path: Path) -> None:
    folder = made(tmp_path, "gptq", Scheme(4, float16_scales=True)).folder
    for size in (-1, 128):  # 128 inputs have one scale in either case, as have 64
        say(folder, group_size=size)
        assert len(open_checkpoint(folder)[1].schemes) == 14
    say(folder, group_size=32)
    refused(folder, r"\.group_size is 32 for .*, and its tensors have one scale a channel")


@pytest.mark.parametrize(
    "said",
    [
        {"bits": 8, "dynamic": {r".*\.(?:0|1)\..*": {"bits": 4}}},
        {"bits": 8, "dynamic": {r"+:model\.layers\.\d\.mlp": {"bits": 4}, ".*": {"bits": 4, "sym": True}}},
        {"dynamic": {r"+:.*down_proj": {}, "-:.*down_proj": {}, r"-:^lm_head$": {}}},  # the first rule holds
        {"group_size": 64, "dynamic": {".*": {"group_size": 32}}},
        {"modules_in_block_to_quantize": [["self_attn"], ["gate_proj", "up_proj"], ["mlp.down_proj"]]},
        {"desc_act": True, "damp_percent": 0.1, "static_groups": False, "true_sequential": True},
    ],
)
def test_modules_may_have_settings_of_their_own(said: dict[str, Any], tmp_path: Path) -> None:
    folder = made(tmp_path, "gptq").folder
    say(folder, **said)
    assert verify_path(folder)["linears"] == 14


@pytest.mark.parametrize("left", [["gate"], ["lm_head"], None, [DOWN]])
def test_parts_of_names_are_whole_ones(left: list[str] | None, tmp_path: Path) -> None:
    kept = left if left == [DOWN] else []
    folder = made(tmp_path, "awq", kept=kept or ()).folder
    say(folder, modules_to_not_convert=left)
    assert verify_path(folder)["linears"] == 14 - len(kept or ())


def test_autoround_names_linears_of_their_own(tmp_path: Path) -> None:
    folder = made(tmp_path, "gptq").folder
    of_autoround = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"}
    say(
        folder, **of_autoround, bits=8, extra_config={UP: {"bits": 8}, r".*_proj": {"bits": 4}, "lm_head": {"bits": 16}}
    )
    refused(folder, rf"\.bits is 8 for {UP}, and its tensors have 4 bits")
    say(folder, extra_config={r"layers\.\d+\.": {"bits": 4, "group_size": 32}})
    assert len(open_checkpoint(folder)[1].schemes) == 14
    say(folder, bits=4, extra_config={DOWN: {"bits": 16}})
    refused(folder, rf"\.extra_config leaves {DOWN} in float")


@pytest.mark.parametrize(("form", "key"), [("gptq", "dynamic"), ("awq", "modules_to_not_convert")])
def test_what_is_in_float_is_said_to_be(form: str, key: str, tmp_path: Path) -> None:
    folder = made(tmp_path, form, kept=[DOWN]).folder
    assert verify_path(folder)["linears"] == 13
    say(folder, **{key: None, "modules_in_block_to_quantize": None})
    assert len(open_checkpoint(folder)[1].schemes) == 13
    with pytest.raises(VerificationError, match=rf"does not leave {DOWN} in float, and its tensors are not quantized"):
        verify_path(folder)


@pytest.mark.parametrize(
    ("form", "said", "reason"),
    [
        ("ascend", {"model_quant_type": "W8A8"}, "model_quant_type is W8A8, and linears are W4A16"),
        ("mindie", {"model_quant_type": "W8A8"}, "model_quant_type is W8A8, and linears are W4A16"),
        ("ascend", {"group_size": 64}, r"group_size is 64, and .*q_proj has groups of 32"),
        ("ascend", {"group_size": 0}, r"group_size is 0, and .*q_proj has groups of 32"),
        ("ascend", {"model_quant_type": "FLOAT"}, ""),  # as msModelSlim says of some types
        ("ascend", {"group_size": None}, ""),
    ],
)
def test_a_description_says_of_the_whole_what_its_linears_are(
    form: str, said: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = made(tmp_path, form, Scheme(4, granularity="group", group_size=32)).folder
    (file,) = folder.glob("quant_model_description*.json")
    file.chmod(0o600)
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    if not reason:
        assert verify_path(folder)["linears"] == 14
        return
    with pytest.raises(ModelError, match=reason) as caught:
        open_checkpoint(folder)
    assert str(file) in caught.value.message
    with pytest.raises(VerificationError, match=reason):
        verify_path(folder)


def test_mindie_says_the_size_of_groups_in_config_json(tmp_path: Path) -> None:
    folder = made(tmp_path, "mindie", Scheme(4, granularity="group", group_size=32)).folder
    assert verify_path(folder)["linears"] == 14
    say(folder, group_size=64)
    refused(folder, r"group_size is 64, and .*q_proj has groups of 32")


def test_older_gptq_has_its_settings_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = made(tmp_path, "gptq").folder
    config = json.loads((folder / "config.json").read_text())
    wanted = {name: scheme.name for name, scheme in open_checkpoint(folder)[1].schemes.items()}
    said = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    older = {key: said[key] for key in ("bits", "group_size", "sym", "desc_act")} | {"damp_percent": 0.01}
    file = folder / "quantize_config.json"
    file.write_text(json.dumps(older))
    assert {name: scheme.name for name, scheme in open_checkpoint(folder)[1].schemes.items()} == wanted
    assert verify_path(folder)["linears"] == 14
    assert inspect_path(folder)["kind"] == "quantized checkpoint (gptq)"
    assert convert_checkpoint(folder, "compressed-tensors", tmp_path / "out")["linears"] == 14
    file.write_text(json.dumps(older | {"bits": 8}))
    with pytest.raises(ModelError, match=r"quantize_config.json: quantization_config.bits is 8 for"):
        open_checkpoint(folder)


def test_such_a_file_beside_a_float_model_says_nothing(tmp_path: Path) -> None:
    model = made(tmp_path, "gptq").model
    (model / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert open_checkpoint(model)[1].form is None
