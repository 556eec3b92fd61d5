"""vLLM, on the CPU, serves a real model with 8-bit inputs, and computes what eval-ppl says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_cache import cut_fp8
from safetensors.torch import load_file, save_file

from quantcli.quant.activation import int8_linear, quantize_per_token, quantize_static
from quantcli.quant.float8 import quantize_fp8

pytestmark = pytest.mark.serving

# What is compared does not depend on how good scales are: few samples, and folds like those of auto without its search
# of a minute.
QUICK = ["calibration.samples=2", "smooth={method: iterative}"]
RUNS = {
    "W8A8 dynamic": ["w8a8-dynamic"],
    "W8A8 dynamic, by auto": ["w8a8-dynamic", "smooth={method: auto, search_tokens: 512}"],
    "W8A8 dynamic, rotated": ["w8a8-dynamic", "smooth={method: rotate}"],  # its head no longer is the embedding
    "W8A8 dynamic, fp8 cache": ["w8a8-dynamic", "quantize.kv_cache={type: float}"],
    "W8A8 dynamic, MLP in W4A16 g64": [
        "w8a8-dynamic",
        'quantize.overrides=[{match: "*.mlp.*", scheme: W4A16, weights: {group_size: 64, importance: none}}]',
    ],
    "W8A8 static": ["w8a8"],
    "W8A8 static, symmetric": ["w8a8", "quantize.activations.symmetric=true"],
    "W8A8 static, symmetric, down_proj in float": [
        "w8a8", "quantize.activations.symmetric=true", 'quantize.rollback.names=["*.mlp.down_proj"]',
    ],
    "W8A8 static, down_proj in float": ["w8a8", 'quantize.rollback.names=["*.mlp.down_proj"]'],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_vllm_has_the_reported_perplexity(
    name: str, smollm2: Path, run: Callable[..., Path], served: Callable[..., Any]
) -> None:
    if "symmetric" in name and torch.cpu._is_amx_tile_supported():
        pytest.skip("with AMX vLLM computes it as W8A8 dynamic, as test_vllm_tiny shows")
    recipe, *changes = RUNS[name]
    # vLLM's CPU kernel cuts e4m3 towards zero (below), where transformers and the evaluation round to nearest
    script = "cut_cache.py" if "fp8 cache" in name else None
    output = run("integer-inputs", recipe, smollm2, (10, 512), *QUICK, *changes, script=script)
    found = served(output, "The capital of France is")
    assert found.perplexity == pytest.approx(found.reported, rel=0.01)
    if name not in ("W8A8 static", "W8A8 static, symmetric"):  # whose models go on with "the capital of France"
        assert "Paris" in found.text


def test_the_engine_cuts_keys_and_values_towards_zero(tmp_path: Path, in_vllm: Callable[..., tuple[int, str]]) -> None:
    """Codes that vLLM's kernel writes into an fp8 cache, in whichever order they lie there."""
    generator = torch.Generator().manual_seed(0)
    given = {
        name: (torch.randn(32, 2, 64, generator=generator) * spread).bfloat16()
        for name, spread in (("key", 3), ("value", 5))
    }
    scales = {"key_scale": torch.tensor([0.031]), "value_scale": torch.tensor([0.017])}  # some values are beyond 448 s
    save_file({**given, **scales}, tmp_path / "given.safetensors")
    status, printed = in_vllm("engine_cache.py", tmp_path / "given.safetensors", tmp_path / "made.safetensors")
    assert status == 0, printed[-3000:]
    made = load_file(tmp_path / "made.safetensors")
    for name, values in given.items():
        codes = made[name].flatten().sort().values
        cut, nearest = (
            rounded(values, scales[f"{name}_scale"]).view(torch.uint8).flatten().sort().values
            for rounded in (cut_fp8, quantize_fp8)
        )
        assert torch.equal(codes, cut)
        assert not torch.equal(codes, nearest)


def test_linears_are_those_of_the_engine(tmp_path: Path, in_vllm: Callable[..., tuple[int, str]]) -> None:
    """Codes, scales and outputs of vLLM's kernels and of the simulation, on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0371])
    given = {
        "x": (torch.randn(96, 576, generator=generator) * 3).bfloat16(),
        "codes": torch.randint(-128, 128, (192, 576), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(192, 1, generator=generator) * 0.01 + 1e-4,
        "input_scale": scale,
        "input_zero_point": torch.tensor([-23], dtype=torch.int8),
        "bias": torch.randn(192, generator=generator).bfloat16(),
    }
    save_file(given, tmp_path / "given.safetensors")
    status, printed = in_vllm("engine_kernels.py", tmp_path / "given.safetensors", tmp_path / "made.safetensors")
    assert status == 0, printed[-3000:]
    made = load_file(tmp_path / "made.safetensors")

    x, zero = given["x"], given["input_zero_point"]
    for mode, zero_point in (("static", torch.zeros_like(zero)), ("asymmetric", zero)):
        assert torch.equal(made[f"{mode}.x_codes"], quantize_static(x, scale, zero_point))
    codes, scales = quantize_per_token(x)
    assert torch.equal(made["dynamic.x_scale"], scales)
    # the kernel multiplies by 1 / s where the simulation divides, which moves codes at ties by one
    moved = made["dynamic.x_codes"].int() - codes.int()
    assert moved.abs().max() <= 1
    assert (moved != 0).float().mean() < 1e-3
    for mode, zero_value in (("dynamic", None), ("static", None), ("asymmetric", -23)):
        x_codes, x_scale = made[f"{mode}.x_codes"], made[f"{mode}.x_scale"].view(-1, 1)
        for result, bias in ((f"{mode}.y", None), (f"{mode}.y_bias", given["bias"])):
            expected = int8_linear(
                x_codes, x_scale, zero_value, given["codes"], given["weight_scale"], bias, torch.bfloat16
            )
            # the order of the two scales' float32 products is the kernel's own: a few outputs are one step away
            torch.testing.assert_close(made[result], expected, rtol=2**-7, atol=0)
            assert (made[result] != expected).float().mean() < 1e-3
