"""vLLM, on the CPU, serves a real model with 8-bit inputs, and computes what eval-ppl says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.quant.activation import (
    int8_linear,
    quantize_per_token,
    quantize_per_token_asymmetric,
    quantize_static,
)
from quantcli.quant.float8 import cut_fp8, quantize_fp8

pytestmark = pytest.mark.serving

# What is compared does not depend on how good scales are: few samples, and folds like those of auto without its search
# of a minute.
QUICK = ["calibration.samples=2", "smooth={method: iterative}"]
RUNS = {
    "W8A8 dynamic": ["w8a8-dynamic"],
    # whose kernel for CPUs cuts e4m3 towards zero (below), where the evaluation rounds to nearest if it is not told
    "W8A8 dynamic, fp8 cache": [
        "w8a8-dynamic", "quantize.kv_cache={type: float}", "export.engines=[vllm-cpu]",
    ],
    "W8A8 dynamic, MLP in W4A16 g64": [
        "w8a8-dynamic",
        'quantize.overrides=[{match: "*.mlp.*", scheme: W4A16, weights: {group_size: 64, importance: none}}]',
    ],
    "W8A8 dynamic asym": ["w8a8-dynamic", "quantize.activations.symmetric=false"],
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
    output = run("integer-inputs", recipe, smollm2, (10, 512), *QUICK, *changes)
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


Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def kernels(
    tmp_path_factory: pytest.TempPathFactory, in_vllm: Callable[..., tuple[int, str]]
) -> tuple[Tensors, Tensors]:
    """What engine_kernels.py was given and what it made of it."""
    generator, place = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("kernels")
    given = {
        "x": (torch.randn(96, 576, generator=generator) * 3).bfloat16(),
        "far": far_from_zero(),
        "codes": torch.randint(-128, 128, (192, 576), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(192, 1, generator=generator) * 0.01 + 1e-4,
        "input_scale": torch.tensor([0.0371]),
        "input_zero_point": torch.tensor([-23], dtype=torch.int8),
        "bias": torch.randn(192, generator=generator).bfloat16(),
    }
    save_file(given, place / "given.safetensors")
    status, printed = in_vllm("engine_kernels.py", place / "given.safetensors", place / "made.safetensors")
    assert status == 0, printed[-3000:]
    return given, load_file(place / "made.safetensors")


def far_from_zero() -> torch.Tensor:
    """Tokens of one sign, tokens whose ranges are far from zero, and two whose values are all equal."""
    x = torch.randn(48, 576, generator=torch.Generator().manual_seed(1)) * 3
    x[:16] = x[:16].abs()
    x[16:32] += 40
    x[32:] -= 25
    x[46], x[47] = 0, 3
    return x.bfloat16()


def test_linears_are_those_of_the_engine(kernels: tuple[Tensors, Tensors]) -> None:
    """Codes, scales and outputs of vLLM's kernels and of the simulation, on the same inputs."""
    given, made = kernels
    x, scale, zero = given["x"], given["input_scale"], given["input_zero_point"]
    for mode, zero_point in (("static", torch.zeros_like(zero)), ("asymmetric", zero)):
        assert torch.equal(made[f"{mode}.x_codes"], quantize_static(x, scale, zero_point))
    codes, scales = quantize_per_token(x)
    asymmetric_codes, asymmetric_scales, zeros = quantize_per_token_asymmetric(x)
    assert torch.equal(made["dynamic.x_scale"], scales)
    assert torch.equal(made["dynamic_asymmetric.x_scale"], asymmetric_scales)
    assert torch.equal(made["dynamic_asymmetric.x_zero_point"], zeros)
    # the kernel multiplies by 1 / s where the simulation divides, which moves codes at ties by one
    for mode, own in (("dynamic", codes), ("dynamic_asymmetric", asymmetric_codes)):
        moved = made[f"{mode}.x_codes"].int() - own.int()
        assert moved.abs().max() <= 1
        assert (moved != 0).float().mean() < 1e-3
    for mode, zero_value in (("dynamic", None), ("dynamic_asymmetric", zeros), ("static", None), ("asymmetric", -23)):
        x_codes, x_scale = made[f"{mode}.x_codes"], made[f"{mode}.x_scale"].view(-1, 1)
        for result, bias in ((f"{mode}.y", None), (f"{mode}.y_bias", given["bias"])):
            expected = int8_linear(
                x_codes, x_scale, zero_value, given["codes"], given["weight_scale"], bias, torch.bfloat16
            )
            # the order of the two scales' float32 products is the kernel's own: a few outputs are one step away
            torch.testing.assert_close(made[result], expected, rtol=2**-7, atol=0)
            assert (made[result] != expected).float().mean() < 1e-3


def test_zero_points_of_tokens_are_those_of_the_engine_wherever_their_values_lie(
    kernels: tuple[Tensors, Tensors],
) -> None:
    given, made = kernels
    x, different = given["far"], slice(46)
    codes, scales, zeros = quantize_per_token_asymmetric(x)
    assert torch.equal(made["far.x_scale"][different], scales[different])
    assert torch.equal(made["far.x_zero_point"][different], zeros[different])
    assert int(zeros.min()) < -128
    assert int(zeros.max()) > 127
    # values far from zero have few digits left, so that many lie between two codes
    exact = x[different].double() / scales[different].double() + zeros[different]
    moved = made["far.x_codes"][different].int() - codes[different].int()
    assert moved.abs().max() <= 1
    assert ((exact[moved != 0] % 1 - 0.5).abs() < 1e-3).all()
    weight = (given["codes"], given["weight_scale"])
    for result, bias in (("far.y", None), ("far.y_bias", given["bias"])):
        own = int8_linear(
            made["far.x_codes"], made["far.x_scale"], made["far.x_zero_point"], *weight, bias, torch.bfloat16
        )
        torch.testing.assert_close(made[result], own, rtol=2**-7, atol=0)
        # a token of equal values is multiplied by a scale of 0
        equal = torch.zeros(2, 192, dtype=torch.bfloat16) if bias is None else bias.expand(2, 192)
        assert torch.equal(made[result][46:], equal)
        assert torch.equal(int8_linear(codes, scales, zeros, *weight, bias, torch.bfloat16)[46:], equal)
