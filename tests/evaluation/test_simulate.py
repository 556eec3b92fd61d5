"""The simulated int8 linear against its formula in float64, and the module that it takes the place of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quantcli.evaluation import simulate
from quantcli.evaluation.simulate import QuantizedProduct, simulated

MODES = ("dynamic", "dynamic asymmetric", "static symmetric", "static asymmetric")


def make(
    mode: str, bias: bool, granularity: str = "channel", seed: int = 0, bits: tuple[int, int] = (8, 8)
) -> tuple[nn.Module, QuantizedProduct]:
    """A block with one linear of 48 → 24, and integer weights to put in its place; bits of weights and inputs."""
    generator = torch.Generator().manual_seed(seed)
    block = nn.ModuleDict({"proj": nn.Linear(48, 24, bias=bias)})
    if bias:
        nn.init.normal_(block["proj"].bias, generator=generator)
    codes = torch.randint(-1 << (bits[0] - 1), 1 << (bits[0] - 1), (24, 48), generator=generator, dtype=torch.int8)
    shape = {"channel": (24, 1), "tensor": (1, 1), "group": (24, 3)}[granularity]
    scale = torch.rand(shape, generator=generator) * 0.01 + 1e-3
    static = mode.startswith("static")
    return block, QuantizedProduct(
        codes,
        scale,
        torch.tensor([0.03]) if static else None,
        torch.tensor([-17], dtype=torch.int8) if mode == "static asymmetric" else None,
        bits[1],
        mode != "dynamic asymmetric",
    )


def reference(x: Tensor, weights: QuantizedProduct, bias: Tensor | None) -> Tensor:
    """y = (q(x) − z)·sx · (Wq·sw)ᵀ + b in float64 from the float32 scales."""
    x = x.float()
    largest = 2 ** (weights.input_bits - 1) - 1
    zero: int | Tensor
    if weights.input_scale is None and not weights.input_symmetric:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / 255
        zero = torch.round(-128 - low / scale)
    elif weights.input_scale is None:
        scale = x.abs().amax(-1, keepdim=True) / largest
        zero = 0
    else:
        scale = weights.input_scale
        zero = 0 if weights.input_zero_point is None else int(weights.input_zero_point)
    codes = (torch.round(x / scale) + zero).clamp(-largest - 1, largest)
    inputs = (codes.double() - zero) * scale.double()
    columns = weights.scale.repeat_interleave(48 // weights.scale.shape[1], 1)
    y = inputs @ (weights.codes.double() * columns.double()).t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_output_is_the_formula_to_float32_rounding(mode: str, bias: bool, granularity: str) -> None:
    block, weights = make(mode, bias, granularity)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)) * 2
    with simulated(block, {"proj": weights}):
        found = block["proj"](x)
    expected = reference(x, weights, block["proj"].bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [(4, 8), (4, 4), (8, 4)], ids=["W4A8", "W4A4", "W8A4"])
@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_bits_and_scales_of_groups_follow_the_formula(
    bits: tuple[int, int], granularity: str, dtype: torch.dtype
) -> None:
    block, weights = make("dynamic", True, granularity, bits=bits)
    block.to(dtype)
    x = (torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    with simulated(block, {"proj": weights}):
        found = block["proj"](x)
    rounding = 1e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), reference(x, weights, block["proj"].bias), rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end(mode: str, dtype: torch.dtype) -> None:
    block, weights = make(mode, bias=True)
    block.to(dtype)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    with simulated(block, {"proj": weights}):
        found = block["proj"](x)
    assert found.dtype == dtype
    exact = reference(x, weights, block["proj"].bias)
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((found.double() - exact).abs() <= 0.51 * spacing + 1e-6).all()


def test_one_token_and_none_and_the_keyword_of_a_linear() -> None:
    block, weights = make("dynamic", bias=True)
    x = torch.randn(3, 48)
    with simulated(block, {"proj": weights}):
        whole = block["proj"](input=x)
        assert torch.equal(block["proj"](x[1]), whole[1])
        assert block["proj"](x[:0].view(2, 0, 48)).shape == (2, 0, 24)


@pytest.mark.parametrize("mode", ["dynamic", "dynamic asymmetric"])
def test_a_token_of_zeros_gives_the_bias(mode: str) -> None:
    block, weights = make(mode, bias=True)
    with simulated(block, {"proj": weights}):
        assert torch.equal(block["proj"](torch.zeros(1, 48))[0], block["proj"].bias)


@pytest.mark.parametrize("mode", MODES)
def test_an_input_that_linears_share_is_quantized_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a", "b", "c")
    made = [make(mode, bias=False) for _ in names]
    block = nn.ModuleDict({name: linears["proj"] for name, (linears, _) in zip(names, made, strict=True)})
    weights = {name: each for name, (_, each) in zip(names, made, strict=True)}
    if mode.startswith("static"):  # another scale, other codes
        weights["c"] = replace(weights["c"], input_scale=torch.tensor([0.05]))
    if mode == "dynamic asymmetric":
        weights["c"] = replace(weights["c"], input_symmetric=True)
    calls: list[str] = []
    for name in ("quantize_per_token", "quantize_per_token_asymmetric", "quantize_static"):
        function = getattr(simulate, name)
        monkeypatch.setattr(simulate, name, lambda *a, _f=function, **k: calls.append("") or _f(*a, **k))
    x, other = torch.randn(5, 48), torch.randn(5, 48)
    with simulated(block, weights):
        found = [block[name](each) for each in (x, other, x.clone()) for name in names]
    assert len(calls) == (3 if mode == "dynamic" else 6)
    for output, (each, name) in zip(found, [(e, n) for e in (x, other, x) for n in names], strict=True):
        torch.testing.assert_close(output.double(), reference(each, weights[name], None), rtol=1e-6, atol=1e-6)


def test_the_module_is_itself_again_afterwards() -> None:
    block, weights = make("static symmetric", bias=False)
    x = torch.randn(3, 48)
    before = block["proj"](x)
    with simulated(block, {"proj": weights}):
        assert not torch.equal(block["proj"](x), before)
    assert torch.equal(block["proj"](x), before)
    with pytest.raises(RuntimeError), simulated(block, {"proj": weights}):
        block["proj"](x[:, :3])
    assert torch.equal(block["proj"](x), before)
