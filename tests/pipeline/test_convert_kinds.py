"""Conversions keep what is beside integer weights, bit for bit: scales of attention, FP8 codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_exports import export_tiny

from quantcli.errors import RecipeError
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme

STATIC = Scheme(8, activations="static", activations_symmetric=False)
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
