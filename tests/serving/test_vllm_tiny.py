"""vLLM, on the CPU, serves tiny random models of what would take it too long in a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, save_tiny_model

pytestmark = pytest.mark.serving

Run = Callable[..., Path]


def save_narrow_model(folder: Path) -> Path:
    return save_tiny_model("llama", folder / "model", dtype=torch.bfloat16, with_tokenizer=True, hidden_size=128,
                           intermediate_size=128, max_position_embeddings=1024)  # fmt: skip


def test_vllm_serves_fp8_weights_and_dynamic_activations(run: Run, served: Callable[..., Any], tmp_path: Path) -> None:
    # tiny: without AMX-FP8 vLLM multiplies 0.03 codes a nanosecond, so that 17 tokens, to which it fills up each pass,
    # would take a real model of 135 million parameters a minute
    output = run("fp8", "w8a8-fp8", save_narrow_model(tmp_path), (8, 64), "model.sanity_check=off")
    found = served(output, "The water")
    # a random model, whose windows differ by what both round at other places
    assert abs(found.difference) < max(0.01, 3 * found.error)
    assert found.error < 0.01


def test_vllm_serves_weights_that_were_folded_rotated_and_clipped(
    run: Run, served: Callable[..., Any], tmp_path: Path
) -> None:
    changes = ["model.sanity_check=off", "calibration.samples=4", "calibration.sequence_length=64",
               "quantize.weights.group_size=64", "smooth.rotation={}"]  # fmt: skip
    output = run("folded", "w4a16-awq", save_narrow_model(tmp_path), (8, 64), *changes)
    found = served(output, "The water")
    assert abs(found.difference) < max(0.01, 3 * found.error)
    assert found.error < 0.01


def test_vllm_serves_biases_that_took_a_shift(run: Run, served: Callable[..., Any], tmp_path: Path) -> None:
    model = save_tiny_model("opt", tmp_path / "model", dtype=torch.bfloat16, with_tokenizer=True, hidden_size=128,
                            word_embed_proj_dim=128, ffn_dim=128, max_position_embeddings=1024)  # fmt: skip
    changes = ["model.sanity_check=off", "calibration.samples=4", "calibration.sequence_length=64"]
    output = run("shifted", "w8a8", model, (8, 64), *changes, "smooth={method: outlier_suppression, shift: true}")
    groups = [
        group for file in sorted((output / "smooth").glob("block-*.json")) for group in json.loads(file.read_text())
    ]
    assert any(group.get("shifted") for group in groups)
    found = served(output, "The water")
    assert abs(found.difference) < max(0.01, 3 * found.error)


def test_vllm_finds_zero_points_of_tokens_where_the_configuration_says_so(
    run: Run, served: Callable[..., Any], tmp_path: Path
) -> None:
    """The kernels for it are compared in test_vllm_integer_inputs.py; this is whether they are taken."""
    model, plain = save_narrow_model(tmp_path), ["model.sanity_check=off", "smooth=null", "calibration=null"]
    found = {}
    for symmetric in ("true", "false"):
        changes = [*plain, f"quantize.activations.symmetric={symmetric}", "quantize.weights.granularity=tensor"]
        found[symmetric] = served(run("zero-points", "w8a8-dynamic", model, (8, 64), *changes), "The water")
    assert abs(found["false"].difference) < max(0.01, 3 * found["false"].error)
    assert found["false"].error < 0.01
    assert found["false"].reported != found["true"].reported
    assert found["false"].perplexity != found["true"].perplexity


@pytest.mark.parametrize(
    ("granularity", "said"),
    [("channel", "narrow() cannot be applied to a 0-dim tensor"), ("tensor", "static_scaled_fp8_quant")],
)
def test_vllm_fails_with_static_fp8_inputs(
    granularity: str, said: str, run: Run, in_vllm: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Where this fails, vLLM has learned it: then formats/engines.py and docs/formats.md are out of date."""
    model = save_narrow_model(tmp_path)
    changes = ["model.sanity_check=off", "calibration.samples=4", "calibration.sequence_length=64"]
    output = run("fp8-static", "w8a8-fp8-static", model, None, *changes, f"quantize.weights.granularity={granularity}")
    status, printed = loaded(output, in_vllm, tmp_path)
    assert status != 0
    assert said in printed


def test_vllm_serves_static_fp8_inputs_with_the_operations_that_its_cpu_build_lacks(
    run: Run, served: Callable[..., Any], tmp_path: Path
) -> None:
    """What stops it above are two operations; serve_static_fp8.py does without them, and the rest is vLLM's."""
    model = save_narrow_model(tmp_path)
    changes = ["model.sanity_check=off", "calibration.samples=4", "calibration.sequence_length=64"]
    output = run("fp8-static", "w8a8-fp8-static", model, (8, 64), *changes, "quantize.weights.granularity=tensor")
    found = served(output, "The water", script="serve_static_fp8.py")
    assert abs(found.difference) < max(0.01, 3 * found.error)
    assert found.error < 0.01


MODELOPT = ["model.sanity_check=off", "export.formats=[modelopt]"]
STATIC = [*MODELOPT, "calibration.samples=4", "calibration.sequence_length=64", "quantize.weights.granularity=tensor"]
DOWN = 'quantize.rollback.names=["*.down_proj"]'
BY_MODELOPT: dict[str, tuple[str, str, list[str]]] = {
    "static": ("qwen2", "w8a8-fp8-static", STATIC),
    "static, fp8 cache": ("qwen2", "w8a8-fp8-static", [*STATIC, "quantize.kv_cache={type: float}",
                                                       "evaluate.perplexity.arithmetic=vllm-cpu"]),
    "static, behind LlamaMLP": ("llama", "w8a8-fp8-static", [*STATIC, DOWN]),
    "dynamic": ("llama", "w8a8-fp8", MODELOPT),
}  # fmt: skip


def save_model_of_modelopt(family: str, folder: Path) -> Path:
    return save_tiny_model(family, folder / "model", dtype=torch.bfloat16, with_tokenizer=True, hidden_size=128,
                           intermediate_size=128, max_position_embeddings=1024, num_attention_heads=4,
                           num_key_value_heads=2)  # fmt: skip


@pytest.mark.parametrize("case", BY_MODELOPT)
def test_vllm_serves_fp8_of_modelopt(case: str, run: Run, served: Callable[..., Any], tmp_path: Path) -> None:
    """Static FP8 inputs, too, by vLLM as it is: in this format codes of joined linears stay as they are."""
    family, recipe, changes = BY_MODELOPT[case]
    output = run(
        f"modelopt-{list(BY_MODELOPT).index(case)}", recipe, save_model_of_modelopt(family, tmp_path), (8, 64), *changes
    )
    found = served(output, "The water")
    assert abs(found.difference) < max(0.01, 3 * found.error)
    assert found.error < 0.01


def test_vllm_has_no_operation_for_static_fp8_inputs_behind_its_llama_mlp(
    run: Run, in_vllm: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Where this fails, vLLM has learned it: then formats/engines.yaml and docs/formats.md are out of date."""
    output = run("down-static", "w8a8-fp8-static", save_model_of_modelopt("llama", tmp_path), None, *STATIC)
    status, printed = loaded(output, in_vllm, tmp_path, "modelopt")
    assert status != 0
    assert "silu_and_mul_quant" in printed


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="without AMX vLLM computes with the static scale")
def test_vllm_with_amx_takes_a_scale_a_token_for_symmetric_static_inputs(
    run: Run, served: Callable[..., Any], tmp_path: Path
) -> None:
    model, plain = save_narrow_model(tmp_path), ["model.sanity_check=off", "smooth=null", "calibration.samples=4"]
    dynamic = served(run("integers", "w8a8-dynamic", model, (8, 64), *plain), "The water")
    static = served(run("integers", "w8a8", model, (8, 64), *plain, "quantize.activations.symmetric=true"), "The water")
    assert (static.perplexity, static.text) == (dynamic.perplexity, dynamic.text)
    assert static.reported != dynamic.reported


def loaded(
    output: Path, in_vllm: Callable[..., tuple[int, str]], folder: Path, form: str = "compressed-tensors"
) -> tuple[int, str]:
    """What comes of loading an export in vLLM and asking it for a few words: exit status, and what was printed."""
    questions = folder / "questions.json"
    questions.write_text(json.dumps({"prompts": ["The water"], "windows": []}))
    return in_vllm("serve.py", output / "export" / form, questions, folder / "answers.json")


WIDE = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128, "max_position_embeddings": 1024}  # fmt: skip


def run_experts(family: str, run: Run, folder: Path, *changes: str) -> Path:
    """The run directory of a tiny random mixture of experts in W4A16 g64."""
    known = {key: WIDE[key] for key in WIDE if key in FAMILIES[family][1] or not key.startswith(("moe", "shared"))}
    model = save_tiny_model(family, folder / "model", dtype=torch.bfloat16, with_tokenizer=True, **known)
    settings = ["calibration=null", "quantize.weights.group_size=64", "quantize.weights.importance=none"]
    return run(family, "w4a16", model, (8, 128), "model.sanity_check=off", *settings, *changes)


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_vllm_serves_experts_in_float_beside_quantized_linears(
    family: str, run: Run, served: Callable[..., Any], tmp_path: Path
) -> None:
    output = run_experts(family, run, tmp_path, 'quantize.rollback.names=["*.experts.*"]')
    found = served(output, "The water")
    assert found.perplexity == pytest.approx(found.reported, rel=0.01)


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX vLLM has a kernel for them")
def test_vllm_has_no_kernel_for_quantized_experts_without_amx(
    run: Run, in_vllm: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    output = run_experts("mixtral", run, tmp_path)
    status, printed = loaded(output, in_vllm, tmp_path)
    assert status != 0
    assert "No WNA16 MoE backend supports the deployment configuration" in printed
