"""A quantized checkpoint that lost what describes it is no float model; a float model may have tensors of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import export_tiny
from tiny_models import save_tiny_model
from torch import Tensor

from quantcli.errors import ModelError, QuantcliError
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.engine import plan_recipe, run_recipe
from quantcli.pipeline.inspect import inspect_path
from quantcli.pipeline.standalone import open_checkpoint, score_recipe
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme
from quantcli.recipe import load_recipe

FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)
STATIC = Scheme(8, activations="static", activations_symmetric=False)
EXPORTS = {
    "int8": ("compressed-tensors", STATIC, "weight", "I8"),
    "int8 weights alone": ("compressed-tensors", Scheme(8), "weight_packed", "I32"),
    "fp8": ("compressed-tensors", Scheme(8, type="float", activations="dynamic"), "weight", "F8_E4M3"),
    "packed": ("compressed-tensors", FOUR, "weight_packed", "I32"),
    "ascend": ("ascend", STATIC, "weight", "I8"),
    "ascend of dynamic inputs": ("ascend", Scheme(8, activations="dynamic"), "weight", "I8"),
    "mindie": ("mindie", Scheme(8), "weight", "I8"),
    "gptq": ("gptq", FOUR, "qweight", "I32"),
    "awq": ("awq", FOUR, "qweight", "I32"),
    "modelopt": ("modelopt", Scheme(8, granularity="tensor", activations="static", type="float"), "weight", "F8_E4M3"),
}
UP = "model.layers.1.mlp.up_proj"


def recipe(model: Path, prose: Path, output: Path) -> Any:
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 4}
    content = {"model": {"path": str(model)}, "quantize": {}, "evaluate": {"perplexity": text}}
    return load_recipe(content | {"export": {"formats": ["dense"]}, "output": str(output)})


def refused(model: Path, prose: Path, match: str) -> None:
    """Nothing takes the directory for a float model."""
    output = model.parent / "unused"
    asked = recipe(model, prose, output)
    uses: list[Callable[[], Any]] = [
        lambda: score_recipe(asked), lambda: plan_recipe(asked), lambda: run_recipe(asked),
        lambda: inspect_path(model), lambda: verify_path(model), lambda: convert_checkpoint(model, "awq", output),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(QuantcliError, match=match) as caught:
            use()
        assert caught.value.exit_code in (3, 5)
        assert "Put the files back that were written with these weights" in str(caught.value)
        assert len(str(caught.value)) < 500
    assert not output.exists()


def without_description(place: Path, form: str, scheme: Scheme, **options: Any) -> Path:
    folder = export_tiny(place, scheme, dtype=torch.bfloat16, form=form, with_tokenizer=True, **options).folder
    for name in ("SHA256SUMS", "quantize_config.json", "hf_quant_config.json", "quant_model_description*.json"):
        for file in folder.glob(name):
            file.unlink()
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_codes_are_not_taken_for_weights(name: str, tmp_path: Path, prose: Path, tiny_llama: Path) -> None:
    form, scheme, suffix, dtype = EXPORTS[name]
    folder = without_description(tmp_path, form, scheme)
    found = rf"model\.layers\.0\.self_attn\.q_proj\.{suffix} holds codes \({dtype}\), not floats"
    missing = r"neither a quantization_config in config\.json nor a quant_model_description\.json"
    refused(folder, prose, f"{re.escape(str(folder))}: {found}.*{missing}")
    with pytest.raises(ModelError, match=found):  # beside a checkpoint
        score_recipe(recipe(tiny_llama, prose, tmp_path / "unused"), str(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_codes_of_an_embedding_are_not_taken_for_weights(
    dtype: torch.dtype, prefix: str, tmp_path: Path, prose: Path, tiny_llama: Path
) -> None:
    """In a quantized checkpoint, and in one that would pass for a float model."""
    quantized = export_tiny(tmp_path, Scheme(8), dtype=torch.bfloat16, with_tokenizer=True).folder
    (quantized / "SHA256SUMS").unlink()
    model = Path(shutil.copytree(tiny_llama, tmp_path / "float"))
    for folder in (quantized, model):
        tensors = {name if prefix else name.removeprefix("model."): t for name, t in tensors_of(folder).items()}
        tensors[f"{prefix}embed_tokens.weight"] = (tensors[f"{prefix}embed_tokens.weight"] * 50).to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = r"embed_tokens\.weight holds codes \((I8|F8_E4M3)\)"
    refused(model, prose, found)
    asked = recipe(quantized, prose, tmp_path / "unused")
    for use in (
        lambda: score_recipe(asked),
        lambda: verify_path(quantized),
        lambda: convert_checkpoint(quantized, "dense", tmp_path / "unused"),
    ):
        with pytest.raises(QuantcliError, match=rf"{found}.*leaves it in float"):
            use()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_codes_of_experts_are_not_taken_for_weights(tmp_path: Path, prose: Path) -> None:
    folder = without_description(tmp_path, "compressed-tensors", Scheme(8, activations="dynamic"), family="mixtral")
    refused(folder, prose, r"holds codes \(I8\), not floats")


def test_a_quantized_model_beside_a_checkpoint_is_refused(tmp_path: Path, prose: Path, tiny_llama: Path) -> None:
    folder = export_tiny(tmp_path, Scheme(8), dtype=torch.bfloat16, with_tokenizer=True).folder
    with pytest.raises(ModelError, match=r"already quantized \(compressed-tensors\)"):
        score_recipe(recipe(tiny_llama, prose, tmp_path / "unused"), str(folder))


def changed(model: Path, place: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    folder = Path(shutil.copytree(model, place))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def rounded_to_float8(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].to(torch.float8_e5m2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (rounded_to_float8, rf"{UP}\.weight holds codes \(F8_E5M2\)"),
        *(
            (lambda t, name=name: t.update({f"{UP}.{name}": torch.ones(1)}), rf"{UP}\.{name} is no tensor of a linear")
            for name in ("weight_scale", "input_scale", "weight_scale_inv", "weight_offset", "lora_A.weight")
        ),
    ],
)
def test_what_changes_a_linear_is_not_left_out(
    change: Callable[[dict[str, Tensor]], object], match: str, tmp_path: Path, tiny_llama: Path, prose: Path
) -> None:
    refused(changed(tiny_llama, tmp_path / "model", change), prose, match)


def with_tensors_of_no_parameter(tensors: dict[str, Tensor]) -> None:
    """Of older transformers, of layers that predict further tokens, and of whoever."""
    for block in (0, 1, 2):
        tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors[f"model.layers.{block}.self_attn.masked_bias"] = torch.ones(1)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    tensors["model.layers.3.mlp.up_proj.weight_scale"] = torch.ones(96, 1)
    tensors["value_head.summary.weight"] = torch.ones(1, 64)
    tensors["steps"] = torch.ones(1, dtype=torch.int64)


def test_tensors_of_no_parameter_do_not_matter(tmp_path: Path, tiny_llama: Path, prose: Path) -> None:
    folder = changed(tiny_llama, tmp_path / "model", with_tensors_of_no_parameter)
    assert inspect_path(folder)["kind"] == "float model"
    plan_recipe(recipe(folder, prose, tmp_path / "unused"))
    found, expected = (score_recipe(recipe(path, prose, tmp_path / "unused")) for path in (folder, tiny_llama))
    assert found["quantized"] == expected["quantized"]


@pytest.mark.parametrize(
    "family", ["llama-tied", "gpt2", "opt", "falcon", "phi3", "mixtral", "qwen2-moe", "deepseek-v3", "gemma3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_models_are_read(family: str, dtype: torch.dtype, tmp_path: Path, prose: Path) -> None:
    """DeepSeek has a buffer beside the weight of its routers."""
    model = save_tiny_model(family, tmp_path / "model", dtype=dtype)
    open_checkpoint(model)
    plan_recipe(recipe(model, prose, tmp_path / "unused"))


def test_a_plan_needs_no_weights(tmp_path: Path, tiny_llama: Path, prose: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    plan_recipe(recipe(folder, prose, tmp_path / "unused"))
    (folder / "model.safetensors").write_bytes(b"half of")
    plan_recipe(recipe(folder, prose, tmp_path / "unused"))
    with pytest.raises(ModelError, match="truncated or damaged"):
        run_recipe(recipe(folder, prose, tmp_path / "unused"))
