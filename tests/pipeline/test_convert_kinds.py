"""Conversions keep what is beside integer codes, bit for bit: their scales, those of attention, FP8 codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import export_tiny

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats.store import StoredLinear
from quantcli.formats.verify_ascend import expected_linear
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.grid import QuantizedWeight
from quantcli.quant.scheme import AttentionScheme, Scheme

STATIC = Scheme(8, activations="static", activations_symmetric=False)
FP8 = Scheme(8, granularity="tensor", activations="static", type="float")
C8, C8_ASYM = AttentionScheme(kv="int8"), AttentionScheme(kv="int8", kv_symmetric=False)
HEADS, FP8_CACHE = AttentionScheme(heads=True), AttentionScheme(kv="fp8")
# family, scheme, attention, formats; AscendV1 comes first, since it rounds scales to the model's dtype
CASES: dict[str, tuple[str, Scheme, AttentionScheme | None, list[str]]] = {
    "int8 cache": ("qwen2", STATIC, C8, ["ascend", "mindie", "numpy", "ascend"]),
    "asymmetric int8 cache": ("llama", Scheme(8), C8_ASYM, ["ascend", "numpy", "mindie"]),
    "int8 products a head": ("llama", Scheme(8, activations="dynamic"), HEADS, ["ascend", "mindie", "numpy", "ascend"]),
    "fp8 cache": ("llama", STATIC, FP8_CACHE, ["compressed-tensors", "compressed-tensors"]),
    "fp8": ("llama", Scheme(8, activations="dynamic", type="float"), None, ["ascend", "compressed-tensors", "ascend"]),
    "static fp8, fp8 cache": (
        "llama", Scheme(8, activations="static", type="float"), FP8_CACHE, ["compressed-tensors"] * 2,
    ),
    "static fp8 a tensor, fp8 cache": (
        "qwen2", FP8, FP8_CACHE, ["compressed-tensors", "modelopt", "modelopt", "compressed-tensors"],
    ),
    "fp8 a token": (
        "llama", Scheme(8, activations="dynamic", type="float"), None,
        ["ascend", "modelopt", "compressed-tensors", "modelopt"],
    ),
    "fp8 weights": ("llama", Scheme(8, type="float"), None, ["compressed-tensors"] * 2),
}  # fmt: skip


def held(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Codes, scales and zero points of every linear and attention module; codes as bytes, all else in float32."""
    _, opened, _ = open_checkpoint(checkpoint)
    found: dict[str, torch.Tensor | None] = {}
    for name in opened.schemes:
        stored = opened.read_linear(name)
        codes, scale, zero_point = stored.weight
        found |= {
            f"{name} codes": codes.view(torch.uint8),
            f"{name} scale": scale.float(),
            f"{name} zero point": zero_point,
            f"{name} input scale": stored.input_scale,
            f"{name} input zero point": stored.input_zero_point,
        }
    for module in opened.attention_modules:
        found |= {f"{module} {part}": values.float() for part, values in opened.read_attention(module).items()}
    return {name: values for name, values in found.items() if values is not None}


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_keeps(case: str, tmp_path: Path) -> None:
    family, scheme, attention, route = CASES[case]
    first = export_tiny(tmp_path / "first", scheme, family, dtype=torch.bfloat16, attention=attention, form=route[0],
                        with_tokenizer=True)  # fmt: skip
    source, wanted = first.folder, held(first.folder)
    parts = sum(".self_attn " in name for name in wanted)
    assert bool(parts) == (attention is not None)
    for number, form in enumerate(route[1:]):
        output = tmp_path / f"{number}-{form}"
        facts = convert_checkpoint(source, form, output)
        assert facts["linears"] == len(first.store.schemes)
        assert facts["left_out"] is None
        found = held(output)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert torch.equal(found[name], values), name
        _, opened, _ = open_checkpoint(output)
        assert opened.attention == attention
        assert verify_path(output)["linears"] == facts["linears"]
        source = output


@pytest.mark.parametrize(
    ("scheme", "attention", "form", "reason"),
    [
        (STATIC, C8, "compressed-tensors", "cannot hold C8"),
        (Scheme(8), HEADS, "compressed-tensors", "cannot hold FA int8"),
        (STATIC, FP8_CACHE, "ascend", "cannot hold KV fp8"),
        (Scheme(8, type="float"), None, "ascend", "fp8"),
        (Scheme(8, activations="dynamic", type="float"), None, "numpy", "fp8"),
        (Scheme(8, activations="dynamic", type="float"), None, "mindie", "fp8"),
        (Scheme(8, type="float"), None, "gptq", "fp8"),
        (Scheme(8, type="float"), None, "modelopt", "beside fp8 inputs"),
        (Scheme(8, activations="static", type="float"), None, "modelopt", "a scale a tensor"),
        (STATIC, FP8_CACHE, "modelopt", "not integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_other_format_lacks_is_refused(
    scheme: Scheme, attention: AttentionScheme | None, form: str, reason: str, tmp_path: Path
) -> None:
    source = export_tiny(
        tmp_path, scheme, dtype=torch.bfloat16, attention=attention,
        form="ascend" if attention in (C8, HEADS) else "compressed-tensors", with_tokenizer=True,
    )  # fmt: skip
    with pytest.raises(RecipeError, match=reason):
        convert_checkpoint(source.folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_float16_scales_of_a_bfloat16_model_are_kept_or_refused(form: str, tmp_path: Path) -> None:
    """As AutoRound and GPTQModel write them: scales are not rounded on the way, but refused where they would be."""
    source = export_tiny(tmp_path, Scheme(4, granularity="group", group_size=32), dtype=torch.float16, form=form,
                         with_tokenizer=True)  # fmt: skip
    path = source.folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "bfloat16"}))
    wanted = held(source.folder)
    for other in ("ascend", "mindie", "compressed-tensors"):
        with pytest.raises(ModelError, match=r"_proj: A scale of its codes is no bfloat16 value"):
            convert_checkpoint(source.folder, other, tmp_path / other)
        assert not (tmp_path / other).exists()
    convert_checkpoint(source.folder, "numpy", tmp_path / "numpy")
    found = held(tmp_path / "numpy")
    for name, values in wanted.items():
        assert torch.equal(found[name], values), name
    assert verify_path(tmp_path / "numpy")["linears"] == len(source.store.schemes)


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(8)], ids=lambda scheme: scheme.name)
def test_verification_sees_scales_that_the_format_does_not_hold(scheme: Scheme) -> None:
    codes, scale = torch.zeros(2, 4, dtype=torch.int8), torch.tensor([[0.1], [0.25]])
    stored = StoredLinear(QuantizedWeight(codes, scale, None))
    with pytest.raises(VerificationError, match="no bfloat16 value"):
        expected_linear(stored, scheme, "bfloat16", None)
    exact = expected_linear(stored, scheme, "float32", None)["weight_scale"]
    assert exact is not None
    assert torch.equal(exact, scale)


def test_bfloat16_scales_of_static_inputs_are_multiplied_in_float32(tmp_path: Path) -> None:
    """As llm-compressor writes them and vLLM multiplies: deq_scale has the bits of the product, not of its factors."""
    source = export_tiny(tmp_path, STATIC, dtype=torch.bfloat16, form="compressed-tensors", with_tokenizer=True)
    file = source.folder / "model.safetensors"
    tensors = load_file(file)
    kept = (".weight_scale", ".input_scale")
    tensors |= {name: t.bfloat16() for name, t in tensors.items() if name.endswith(kept)}
    save_file(tensors, file, {"format": "pt"})
    convert_checkpoint(source.folder, "ascend", tmp_path / "ascend")
    found = load_file(tmp_path / "ascend" / "quant_model_weights.safetensors")
    for module in source.store.schemes:
        factors = (tensors[f"{module}.{name}"].double().view(-1) for name in ("weight_scale", "input_scale"))
        product = next(factors) * next(factors)
        assert torch.equal(found[f"{module}.deq_scale"].double(), product), module  # 8 bits by 8 bits fit 24
        assert not torch.equal(product, product.bfloat16().double())


@pytest.mark.parametrize("form", ["compressed-tensors", "mindie"])
def test_files_are_of_the_size_that_is_asked_for(form: str, tmp_path: Path) -> None:
    source = export_tiny(tmp_path, Scheme(8), dtype=torch.bfloat16, form="ascend", with_tokenizer=True)
    convert_checkpoint(source.folder, form, tmp_path / "one")
    convert_checkpoint(source.folder, form, tmp_path / "many", shard_bytes=40_000)
    (one,), many = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("one", "many"))
    whole, parts = load_file(one), [load_file(file) for file in many]
    assert len(parts) > 3
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 40_000
        assert all(torch.equal(whole[name], tensor) for name, tensor in part.items())
    assert verify_path(tmp_path / "many")["linears"] == len(source.store.schemes)
