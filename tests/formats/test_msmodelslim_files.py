"""What msModelSlim writes and quantcli does not: it is read as the formulas say, or refused by every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import export_tiny
from torch import Tensor

from quantcli.errors import ModelError, QuantcliError, RecipeError, VerificationError
from quantcli.formats import ascend
from quantcli.formats.sums import SUMS
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.standalone import open_checkpoint, score_recipe
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe import load_recipe

Tensors = dict[str, Tensor]
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
STATIC = Scheme(8, activations="static", activations_symmetric=False)
W4A8 = Scheme(4, activations="dynamic")


def made(
    place: Path,
    scheme: Scheme,
    change: Callable[[Tensors], object],
    form: str = "ascend",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """An export of a tiny model with other tensors, and without checksums."""
    folder = export_tiny(place, scheme, dtype=dtype, form=form, with_tokenizer=True, **options).folder
    (folder / SUMS).unlink()
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    for description in folder.glob("quant_model_description*.json"):
        content = json.loads(description.read_text())
        kinds = {name: content.get(name, content.get(f"{name.rpartition('.')[0]}.weight", "FLOAT")) for name in tensors}
        facts = {key: value for key, value in content.items() if "." not in key}
        if any(name.endswith(".weight_scale_second") for name in tensors):
            facts["group_size"] = 32
        description.write_text(json.dumps(facts | kinds))
    return folder


def described(folder: Path, change: dict[str, Any]) -> None:
    content = json.loads((folder / ascend.DESCRIPTION).read_text())
    (folder / ascend.DESCRIPTION).write_text(json.dumps(content | change))


def scored(checkpoint: Path, prose: Path) -> float | None:
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 2}
    recipe = {"model": {"path": str(checkpoint)}, "quantize": {}, "evaluate": {"perplexity": text}, "output": "unused"}
    found: float | None = score_recipe(load_recipe(recipe))["quantized"]
    return found


def refused_by_all(folder: Path, prose: Path, match: str, form: str = "compressed-tensors") -> None:
    """eval-ppl, convert and verify end with an error of one of their types that says so, and nothing is written."""
    output = folder.parent / "converted"
    for use, kind in [
        (lambda: scored(folder, prose), ModelError),
        (lambda: convert_checkpoint(folder, form, output), ModelError),
        (lambda: verify_path(folder), VerificationError),
    ]:
        with pytest.raises(QuantcliError, match=match) as caught:
            use()
        assert isinstance(caught.value, kind)
        assert "Download" not in str(caught.value)
    assert not output.exists()


# ------------------------------------------------------------------------------------------- W4A8 in two stages


def unpacked(packed: Tensor) -> Tensor:
    """Codes of 4 bits, of which two outputs share a byte, float64."""
    byte = packed.int() & 255
    nibbles = torch.stack((byte & 15, byte >> 4), 1).flatten(0, 1)
    return torch.where(nibbles > 7, nibbles - 16, nibbles).double()


def in_two_stages(tensors: Tensors) -> None:
    """A scale a row in float, and for each of its groups of 32 a whole number."""
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        codes = tensors[name.replace("weight_scale", "weight")]
        shape = (2 * codes.shape[0], codes.shape[1] // 32)
        tensors[f"{name}_second"] = torch.randint(1, 18, shape, generator=generator).float()
        tensors[name.replace("_scale", "_offset_second")] = torch.zeros(shape, dtype=torch.int64)
        values = unpacked(codes).unflatten(1, (-1, 32)) * (tensors[name] * tensors[f"{name}_second"])[..., None]
        sums = tensors[name.replace("weight_scale", "scale_bias")]
        sums.copy_(8 * values.flatten(1).unflatten(1, (sums.shape[1], -1)).sum(2))


def test_two_scales_of_a_group_are_their_product(tmp_path: Path, prose: Path) -> None:
    folder = made(tmp_path, W4A8, in_two_stages)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    _, checkpoint, _ = open_checkpoint(folder)
    scheme = Scheme(4, granularity="group", group_size=32, activations="dynamic")
    assert set(checkpoint.schemes.values()) == {scheme}
    codes = unpacked(tensors[f"{UP}.weight"])
    second = tensors[f"{UP}.weight_scale_second"].double().repeat_interleave(32, 1)
    wanted = codes * second * tensors[f"{UP}.weight_scale"].double()
    found = checkpoint.read([f"{UP}.weight"])[f"{UP}.weight"].double()
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)
    assert verify_path(folder)["linears"] == 14
    convert_checkpoint(folder, "compressed-tensors", tmp_path / "converted")
    assert scored(folder, prose) == scored(tmp_path / "converted", prose)
    with pytest.raises(RecipeError, match="not a group"):
        convert_checkpoint(folder, "ascend", tmp_path / "again")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("scheme", "part", "moves"), [
    (STATIC, "quant_bias", {1: True, 3: False}),
    (W4A8, "scale_bias", {0.001: True, 0.05: False}),
])  # fmt: skip
def test_what_is_added_to_products_has_to_be_of_the_codes(
    scheme: Scheme, part: str, moves: dict[float, bool], family: str, tmp_path: Path
) -> None:
    """The evaluation does not read it, and engines do: quant_bias has the bias of Qwen's q_proj in it."""
    for move, right in moves.items():

        def moved(tensors: Tensors, move: float = move) -> None:
            values = tensors[f"{Q}.{part}"]
            values.view(-1)[3] += move if part == "quant_bias" else move * values.abs().max()

        folder = made(tmp_path / str(move), scheme, moved, family=family)
        if right:
            assert verify_path(folder)["linears"] == 14
        else:
            with pytest.raises(VerificationError, match=rf"q_proj\.{part} is not that of the codes"):
                verify_path(folder)


def test_products_of_scales_that_another_format_does_not_hold_are_not_written(tmp_path: Path) -> None:
    """They are scored and made dense as float32, which packed weights of a bfloat16 model have no place for."""
    folder = made(tmp_path, W4A8, in_two_stages, dtype=torch.bfloat16)
    assert verify_path(folder)["linears"] == 14
    convert_checkpoint(folder, "dense", tmp_path / "dense")
    with pytest.raises(ModelError, match="no bfloat16 value"):
        convert_checkpoint(folder, "compressed-tensors", tmp_path / "converted")


@pytest.mark.parametrize("name", ["weight_offset", "weight_offset_second"])
def test_offsets_that_the_scheme_does_not_have_are_refused(name: str, tmp_path: Path, prose: Path) -> None:
    def moved(tensors: Tensors) -> None:
        in_two_stages(tensors)
        tensors[f"{Q}.{name}"][3, 0] = 1

    folder = made(tmp_path, W4A8, moved)
    refused_by_all(folder, prose, rf"{Q}: {name} is not zero")


def test_offsets_of_heads_are_refused(tmp_path: Path, prose: Path) -> None:
    name = "model.layers.1.self_attn.fa_k.offset"
    change = {"attention": AttentionScheme(heads=True)}
    folder = made(tmp_path, Scheme(8), lambda tensors: tensors[name].fill_(2), **change)
    refused_by_all(folder, prose, f"{name} is not zero", "dense")


# ------------------------------------------------------------------------------------------- one scale a tensor

WHOLE = {
    "W8A16": Scheme(8, granularity="tensor"),
    "W8A16 asym": Scheme(8, granularity="tensor", symmetric=False),
    "W4A16": Scheme(4, granularity="tensor"),
    "W8A8": Scheme(8, granularity="tensor", activations="static", activations_symmetric=False),
    "W8A8S": Scheme(8, granularity="tensor", activations="static", activations_symmetric=False, sparse=True),
    "W8A8_DYNAMIC": Scheme(8, granularity="tensor", activations="dynamic"),
    "W8A8_MIX": Scheme(8, granularity="tensor", activations="mix", activations_symmetric=False),
}


def one_scale(tensors: Tensors, derived: bool) -> None:
    for name in list(tensors):
        if name.endswith(("weight_scale", "weight_offset", "deq_scale")):
            tensors[name] = tensors[name].view(-1)[:1].clone()
            if derived and "weight_" in name:
                del tensors[name]


@pytest.mark.parametrize("name", WHOLE)
def test_one_scale_a_tensor_is_read_as_such(name: str, tmp_path: Path) -> None:
    """Whether [1], as msModelSlim has it with mm_tensor, or repeated, as here: the same weights."""
    kept: Tensors = {}
    (tmp_path / "whole").mkdir()
    folder = made(
        tmp_path / "whole", WHOLE[name], lambda tensors: kept.update(tensors) or one_scale(tensors, "S" in name)
    )
    _, checkpoint, weights = open_checkpoint(folder)
    assert {scheme.granularity for scheme in checkpoint.schemes.values()} == {"tensor"}
    (tmp_path / "channels").mkdir()
    _, repeated, _ = open_checkpoint(made(tmp_path / "channels", WHOLE[name], lambda tensors: None))
    for module in checkpoint.schemes:
        found, wanted = (side.read([weights[module]])[weights[module]] for side in (checkpoint, repeated))
        torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)
        one, other = checkpoint.read_linear(module), repeated.read_linear(module)
        assert one.weight.scale.shape == (1, 1)
        assert one.input_scale == other.input_scale
        assert one.input_zero_point == other.input_zero_point
    assert verify_path(folder)["linears"] == 14
    convert_checkpoint(folder, "ascend", tmp_path / "again")
    again = load_file(tmp_path / "again" / "quant_model_weights.safetensors")
    assert again.keys() == kept.keys()
    for key, tensor in again.items():
        if tensor.dtype == torch.int64:  # bits of float32, computed again from a scale that was derived from it
            assert int((tensor - kept[key]).abs().max()) <= 1
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, kept[key], rtol=2e-7, atol=0)
        else:
            assert torch.equal(tensor, kept[key]), key


def test_one_scale_a_tensor_is_read_from_dictionaries(tmp_path: Path) -> None:
    folder = export_tiny(tmp_path, WHOLE["W8A8"], dtype=torch.float32, form="numpy").folder
    _, repeated, weights = open_checkpoint(folder)
    wanted = repeated.read(weights.values())
    for name in (SUMS, "quantization.json"):
        (folder / name).unlink()
    for kind in ("weight_scale", "weight_offset", "deq_scale"):
        content = np.load(folder / f"{kind}.npy", allow_pickle=True).item()
        np.save(folder / f"{kind}.npy", {name: array.reshape(-1)[:1] for name, array in content.items()})  # type: ignore[arg-type]
    _, checkpoint, _ = open_checkpoint(folder)
    assert {scheme.granularity for scheme in checkpoint.schemes.values()} == {"tensor"}
    found = checkpoint.read(weights.values())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_the_file_contradicts_is_refused(tmp_path: Path, prose: Path) -> None:
    """A deq_scale that is another than engines would need for this weight_scale, and an offset that int8 has not."""
    for number, (key, value, match) in enumerate([
        ("weight_scale", 0.3, "deq_scale is not input_scale"),
        ("input_offset", 130.0, "input_offset is no integer from -128 to 127"),
        ("input_offset", 1.5, "input_offset is no integer from -128 to 127"),
    ]):  # fmt: skip
        place = tmp_path / str(number)
        place.mkdir()
        folder = made(place, STATIC, lambda tensors, key=key, value=value: tensors[f"{UP}.{key}"].fill_(value))
        refused_by_all(folder, prose, rf"{UP}: {match}")


# ------------------------------------------------------------------------------- what nothing is known to be done with

FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)
LEFT_OVER = {"ascend": W4A8, "mindie": Scheme(8), "compressed-tensors": FOUR, "gptq": FOUR, "awq": FOUR,
             "modelopt": Scheme(8, activations="dynamic", type="float")}  # fmt: skip


@pytest.mark.parametrize("form", LEFT_OVER)
@pytest.mark.parametrize("name", ["weight_scale_third", "linear.div.mul_scale", "kv_cache_scale"])
def test_a_tensor_of_a_linear_that_its_scheme_does_not_have_is_refused(
    form: str, name: str, tmp_path: Path, prose: Path
) -> None:
    folder = made(tmp_path, LEFT_OVER[form], lambda tensors: tensors.update({f"{Q}.{name}": torch.ones(2)}), form)
    refused_by_all(folder, prose, rf"{Q}.{name} is no tensor of W[48]A(8|16)[a-z0-9 ]*, as which {Q} is read")


def test_a_linear_that_is_multiplied_while_serving_is_refused(tmp_path: Path, prose: Path) -> None:
    """Smoothing that is not folded: the linear is a pair of a factor and a linear."""

    def divided(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{UP}.")]:
            tensors[name.replace(UP, f"{UP}.linear")] = tensors.pop(name)
        tensors[f"{UP}.div.mul_scale"] = torch.ones(64)

    folder = made(tmp_path, Scheme(8, activations="dynamic"), divided)
    refused_by_all(folder, prose, rf"{UP}\.(div|linear)\.[a-z_]* is no tensor of a linear in float")


def test_a_linear_in_float_has_a_weight_and_a_bias_alone(tmp_path: Path, prose: Path) -> None:
    folder = made(tmp_path, Scheme(8), lambda tensors: tensors.update({"lm_head.weight_scale": torch.ones(1)}))
    refused_by_all(folder, prose, "lm_head.weight_scale is no tensor of a linear in float")


ROTATED = {"max_tp_size": 4, "heads_rotation": {"layers": []}, "kronecker_rotation": {"layers": []}}
UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "rotation of heads": (
        {"metadata": {"quarot": ROTATED | {"heads_rotation": {"layers": ["model.layers.0.self_attn"]}}}},
        "heads_rotation names layers whose activations are rotated",
    ),
    "rotation of inputs": (
        {"metadata": {"quarot": ROTATED | {"kronecker_rotation": {"layers": ["model.layers.0.mlp"]}}}},
        "kronecker_rotation names layers whose activations are rotated",
    ),
    "rotation in another form": ({"metadata": {"quarot": {"heads_rotation": [0]}}}, "heads_rotation names layers"),
    "attention": (
        {"model.layers.1.self_attn.quant_type": "INT8_DYNAMIC"},
        r"layers.1.self_attn.quant_type is 'INT8_DYNAMIC', and quantcli does not read attention",
    ),
    "attention that no entry names": (
        {"model.layers.1.self_attn.fa_q.scale": "FAQuant"},
        "fa_q.scale has the type FAQuant, which no entry says of the model",
    ),
    "sums between devices": ({"reduce_quant_type": "per_channel"}, "does not read linears that are split among"),
    "4-bit inputs": ({f"{UP}.weight": "W4A4_DYNAMIC"}, "'W4A4_DYNAMIC', which quantcli does not read. Types that"),
    "microscaling": ({f"{UP}.weight": "W8A8_MXFP8"}, "has the type 'W8A8_MXFP8', which quantcli does not read"),
    "NF4": ({f"{UP}.weight_blocks": "NF4"}, "weight_blocks has the type 'NF4', which quantcli does not read"),
    "a type that is none": ({f"{UP}.weight": {}}, "has the type '{}', which quantcli does not read"),
    "no type": ({f"{UP}.weight": None}, f"{UP}.weight is not described"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_changes_the_function_and_is_not_read_is_refused(name: str, tmp_path: Path, prose: Path) -> None:
    folder = made(tmp_path, Scheme(8, activations="dynamic"), lambda tensors: None)
    change, match = UNREAD[name]
    described(folder, change)
    refused_by_all(folder, prose, match)


def test_what_changes_nothing_is_read(tmp_path: Path) -> None:
    """A rotation that weights hold, empty entries of modules, and attention in float."""
    folder = made(tmp_path, Scheme(8, activations="dynamic"), lambda tensors: None)
    told = {"metadata": {"quarot": ROTATED}, "optional": {"quarot": {}}, "model.layers.0.self_attn": {}}
    described(folder, told)
    assert verify_path(folder)["linears"] == 14
