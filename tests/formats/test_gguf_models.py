"""The families that are written as GGUF: tensors and keys come back, and what llama.cpp cannot compute is refused.

That it computes them is in test_llama_cpp.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf as package
import pytest
import torch
import transformers
from tiny_exports import Export, export_tiny
from tiny_models import save_tiny_model, tiny_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantcli.errors import RecipeError, VerificationError
from quantcli.model import gguf_layout
from quantcli.model.discovery import discover
from quantcli.pipeline.plan import make_plan
from quantcli.quant.grid import dequantize
from quantcli.quant.scheme import Scheme
from quantcli.recipe.schema import Recipe

W8 = Scheme(8, float16_scales=True)
W4 = Scheme(4, granularity="group", group_size=64, float16_scales=True)
W4_ASYM = Scheme(4, symmetric=False, granularity="group", group_size=32, float16_scales=True)

GEMMA = {"query_pre_attn_scalar": 16}
GEMMA3 = {**GEMMA, "num_hidden_layers": 6, "layer_types": None}
FACTORS = {"short_factor": [1.0 + 0.1 * channel for channel in range(8)], "long_factor": [4.0] * 8}
LONGROPE = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("llama-tied", {}), ("llama", {"attention_bias": True}), ("qwen2", {"vocab_size": 520}), ("gemma", {}),
    ("gemma2", GEMMA), ("gemma3", GEMMA3), ("phi3", LONGROPE), ("granite", {"attention_bias": True}), ("olmo2", {}),
    ("smollm3", {}), ("starcoder2", {}), ("stablelm", {"use_qkv_bias": True}), ("cohere", {}), ("arcee", {}),
    ("seed_oss", {}), ("ernie4_5", {}), ("nemotron", {}), ("phi", {}),
]  # fmt: skip


def made(place: Path, scheme: Scheme, family: str, **changes: Any) -> Export:
    return export_tiny(place, scheme, family, form="gguf", dtype=torch.bfloat16, with_tokenizer=True, **changes)


def parts_of(export: Export) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in package.GGUFReader(export.folder / "model.gguf").tensors}


@pytest.mark.parametrize(("family", "changes"), OTHERS, ids=[family for family, _ in OTHERS])
def test_other_models_are_written_and_read(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    export = made(tmp_path, W4, family, **changes)
    export.verify()
    tied = transformers.AutoConfig.from_pretrained(export.model).tie_word_embeddings
    assert ("output.weight" in parts_of(export)) != tied
    reader = export.reader()
    for module in export.store.schemes:
        assert torch.equal(reader.read_linear(module).weight.codes, export.store.read(module).weight.codes)
    quantized = {export.source.weights[module] for module in export.store.schemes}
    for name in export.source.checkpoint.entries.keys() - quantized:
        assert torch.equal(reader.read([name])[name], export.source.read(name))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", GEMMA), ("gemma3", GEMMA3), ("phi3", {}), ("starcoder2", {}), ("stablelm", {}), ("nemotron", {})],
)
def test_transformers_reads_the_same_parameters_of_other_models(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """It knows for itself which norms are stored as one more than they are."""
    export = made(tmp_path, W8, family, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        export.folder, gguf_file="model.gguf", dtype=torch.float32
    )
    reader, read = export.reader(), model.state_dict()
    for parameter in export.structure.parameters:
        module = parameter.removesuffix(".weight")
        own = dequantize(reader.read_linear(module).weight) if module in reader.schemes else None
        assert torch.equal(read[parameter], reader.read([parameter])[parameter].float() if own is None else own)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {**GEMMA, "layer_types": ["full_attention"] * 2}, "layer_types: ['full_attention', 'full_att"),
        ("gemma2", {**GEMMA, "final_logit_softcapping": None}, "needs final_logit_softcapping, which is null"),
        ("gemma2", {**GEMMA, "tie_word_embeddings": False}, "tie_word_embeddings: False"),
        ("gemma2", {**GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
        ("gemma3", {**GEMMA3, "final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
        ("gemma3", {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "type linear in sliding layers"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True"),
        *((family, {"head_dim": 32}, "no room for 4 heads of 32 channels in a model of 64 channels")
          for family in ("qwen2", "phi3", "olmo2", "starcoder2", "cohere", "nemotron", "phi")),
        ("qwen2", {"rope_parameters": LLAMA3}, "type llama3"),
        ("olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings: True"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers: [1, 0, 1, 0]"),
        ("starcoder2", {"use_bias": False}, "use_bias: False"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_configurations_that_llama_cpp_has_no_keys_for_are_named(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    assert reason in gguf_layout.refusal(tiny_config(family, **changes).to_dict(), [])
    plain = {"gemma2": GEMMA, "gemma3": GEMMA3}.get(family, {})
    assert gguf_layout.refusal(tiny_config(family, **plain).to_dict(), []) == ""


def test_a_rotation_that_parts_the_head_from_the_embedding_is_refused_where_llama_cpp_has_one(tmp_path: Path) -> None:
    model = save_tiny_model("gemma", tmp_path / "model", with_tokenizer=True)
    recipe: dict[str, Any] = {
        "model": {"path": str(model)},
        "quantize": {"weights": {"bits": 8}, "activations": {"bits": 16}},
        "export": {"formats": ["gguf"]},
        "output": "unused",
    }
    make_plan(Recipe.model_validate(recipe), model, discover(model))
    with pytest.raises(RecipeError, match="tie_word_embeddings: False"):
        make_plan(Recipe.model_validate(recipe | {"smooth": {"method": "rotate"}}), model, discover(model))


@pytest.mark.parametrize(("layers", "scalar"), [(26, 256), (46, 144)])
def test_queries_of_the_largest_gemma_are_scaled_by_another_size(layers: int, scalar: int) -> None:
    size = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 256, "num_hidden_layers": layers}
    config = tiny_config("gemma2", **size, layer_types=None, query_pre_attn_scalar=scalar)
    assert gguf_layout.refusal(config.to_dict(), []) == ""


@pytest.mark.parametrize(
    ("original", "own"), [(64, {}), (256, {}), (64, {"attention_factor": 1.2}), (64, {"factor": 3.0})]
)
def test_longrope_scales_attention_as_transformers_does(original: int, own: dict[str, float]) -> None:
    rope = LONGROPE["rope_parameters"] | own
    config = tiny_config("phi3", rope_parameters=rope, original_max_position_embeddings=original)
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")
    keys = gguf_layout.rope_keys(config.to_dict())
    assert keys["rope.scaling.attn_factor"] == pytest.approx(expected)
    assert keys["rope.scaling.original_context_length"] == original


def test_yarn_without_a_factor_stretches_by_the_lengths_as_in_transformers() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 64}
    config = tiny_config("llama", rope_parameters=rope)
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, None)
    factor = gguf_layout.architecture_keys(config.to_dict())["llama.rope.scaling.factor"]
    assert factor == 4.0
    assert scale == pytest.approx(1 + 0.1 * math.log(factor))


@pytest.mark.parametrize("tensor", ["rope_factors_long.weight", "blk.1.attn_norm.weight", "blk.0.attn_qkv.weight"])
def test_a_flipped_bit_of_what_other_models_have_is_found(tensor: str, tmp_path: Path) -> None:
    export = made(tmp_path, W4_ASYM, "phi3", **LONGROPE)
    export.verify()
    file, part = export.folder / "model.gguf", parts_of(export)[tensor]
    data = bytearray(file.read_bytes())
    data[part.data_offset + part.n_bytes // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(VerificationError, match=tensor):
        export.verify()


@pytest.mark.parametrize("key", ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"])
def test_keys_of_gemma_that_say_something_else_are_found(key: str, tmp_path: Path) -> None:
    export = made(tmp_path, W8, "gemma2", **GEMMA)
    export.verify()
    file = export.folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: content[key] + 1}))
    with pytest.raises(VerificationError, match=key):
        export.verify()
