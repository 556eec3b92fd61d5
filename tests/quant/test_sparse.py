from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.quant.grid import WeightGrid, dequantize
from quantcli.quant.methods import weight_error
from quantcli.quant.minmax import minmax
from quantcli.quant.sparse import SparseMode, sparse_weight

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden" / "A"
CHANNEL = WeightGrid(8)
TENSOR = WeightGrid(8, granularity="tensor")
MODES: list[SparseMode] = ["co_sparse", "low_bit", "low_bit_sigma"]

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="recorded outputs are not beside this checkout")


def weights_with_outliers(out_features: int = 12, in_features: int = 80) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight[2] *= 4
    weight[3, 7] = 20
    weight[4, 9] = -15
    return weight


def recorded(case: str) -> dict[str, Tensor]:
    """The tensors of a case, with those that stand in another case's file."""
    tensors = load_file(GOLDEN / case / "weights.safetensors")
    elsewhere = json.loads((GOLDEN / case / "meta.json").read_text()).get("tensors_from", {})
    for other, names in elsewhere.items():
        others = load_file(GOLDEN / other / "weights.safetensors")
        tensors |= {name: others[name] for name in names}
    return tensors


def quantized_linears(tensors: dict[str, Tensor]) -> list[str]:
    return sorted(name.removesuffix(".deq_scale") for name in tensors if name.endswith(".deq_scale"))


def stored_deq_scale(tensors: dict[str, Tensor], linear: str) -> Tensor:
    """float32 input_scale * weight_scale, from the int64 that holds its bits."""
    return tensors[f"{linear}.deq_scale"].to(torch.int32).view(torch.float32)


@needs_golden
@pytest.mark.parametrize(
    ("case", "linears", "granularity", "mode", "fraction"),
    [
        ("w8a8s_cosparse_w4", 14, "channel", "co_sparse", 0.011),
        ("w8a8s_cosparse_w8", 14, "channel", "co_sparse", 0.011),
        ("w8a8s_lowbit_f10", 14, "channel", "low_bit", 0.1),
        ("w8a8s_lowbit_f10_mm1", 14, "tensor", "low_bit", 0.1),
        ("w8a8s_lowbit_sigma_L2", 12, "channel", "low_bit_sigma", 0.01),
    ],
)
def test_codes_and_scales_are_those_recorded(
    case: str, linears: int, granularity: Literal["channel", "tensor"], mode: SparseMode, fraction: float
) -> None:
    """All codes, all scales to the bit, and the integer bias that follows from the codes."""
    model = load_file(GOLDEN / "model" / "model.safetensors")
    tensors = recorded(case)
    names = quantized_linears(tensors)
    assert len(names) == linears
    for name in names:
        grid = WeightGrid(8, granularity=granularity)
        codes, scale, _ = sparse_weight(model[f"{name}.weight"], grid, mode=mode, fraction=fraction)
        assert torch.equal(codes, tensors[f"{name}.weight"]), name
        assert torch.equal(scale.flatten() * tensors[f"{name}.input_scale"], stored_deq_scale(tensors, name)), name
        bias = -tensors[f"{name}.input_offset"] * codes.sum(1)
        assert torch.equal(bias.to(torch.int32), tensors[f"{name}.quant_bias"]), name


@needs_golden
def test_the_rule_holds_for_weights_that_were_smoothed_before() -> None:
    """With the recorded smoothing applied first: all codes; scales to rounding, as the factors come from a quotient."""
    model = load_file(GOLDEN / "model" / "model.safetensors")
    tensors = recorded("w8a8s_lowbit_smooth")
    norm_of = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm")
    norm_of |= dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm")
    for name in quantized_linears(tensors):
        weight = model[f"{name}.weight"]
        parent, kind = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
        if kind in norm_of:
            norm = f"{parent}.{norm_of[kind]}.weight"
            weight = weight * (model[norm] / tensors[norm])
        codes, scale, _ = sparse_weight(weight, CHANNEL, mode="low_bit", fraction=0.1)
        assert torch.equal(codes, tensors[f"{name}.weight"]), name
        recorded_scale = stored_deq_scale(tensors, name) / tensors[f"{name}.input_scale"]
        torch.testing.assert_close(scale.flatten(), recorded_scale, rtol=4e-7, atol=0)


def slow_scales(weight: Tensor, mode: SparseMode, fraction: float, sigma_factor: float) -> list[float]:
    """The scale of each row by sorting Python floats."""
    rows = [[abs(value) for value in row] for row in weight.tolist()]
    everything = sorted((value for row in rows for value in row), reverse=True)
    scales = []
    for row in rows:
        if mode == "co_sparse":
            limit = everything[int(fraction * len(everything)) - 1]
        elif mode == "low_bit":
            limit = sorted(row, reverse=True)[int(fraction * len(row)) - 1]
        else:
            limit = sigma_factor * statistics.stdev(row)
        scales.append(max(value for value in row if value <= limit) / 7)
    return scales


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("fraction", "sigma_factor"), [(0.03, 3.0), (0.07, 3.5), (0.1, 4.0)])
def test_a_slow_reference_finds_the_same(mode: SparseMode, fraction: float, sigma_factor: float) -> None:
    weight = weights_with_outliers()
    expected = slow_scales(weight, mode, fraction, sigma_factor)
    channel = sparse_weight(weight, CHANNEL, mode=mode, fraction=fraction, sigma_factor=sigma_factor)
    torch.testing.assert_close(channel.scale.flatten(), torch.tensor(expected), rtol=1e-6, atol=0)
    codes = (weight.double() / channel.scale.double()).round().clamp(-128, 127)
    assert torch.equal(channel.codes.double(), codes)
    tensor = sparse_weight(weight, TENSOR, mode=mode, fraction=fraction, sigma_factor=sigma_factor)
    assert tensor.scale.item() == pytest.approx(max(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1])
def test_the_fraction_bounds_the_codes_beyond_four_bits(fraction: float, dtype: torch.dtype) -> None:
    """co_sparse: fewer than k in the matrix have |w| above the threshold; low_bit: fewer than k in each row."""
    weight = weights_with_outliers(40, 200).to(dtype)
    matrix = sparse_weight(weight, CHANNEL, mode="co_sparse", fraction=fraction)
    wide = matrix.codes.abs() > 7
    assert 0 < int(wide.sum()) < int(fraction * weight.numel())
    threshold = weight.float().abs().flatten().sort(descending=True).values[int(fraction * weight.numel()) - 1]
    assert bool((weight.float().abs()[wide] > threshold).all())
    rows = sparse_weight(weight, CHANNEL, mode="low_bit", fraction=fraction)
    assert int((rows.codes.abs() > 7).sum(1).max()) < int(fraction * 200)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [CHANNEL, TENSOR])
def test_scaling_and_the_order_of_rows_carry_over(mode: SparseMode, grid: WeightGrid) -> None:
    weight = weights_with_outliers()
    codes, scale, _ = sparse_weight(weight, grid, mode=mode, fraction=0.05)
    for factor in (-1.0, 2.0**-20, 2.0**20):
        other = sparse_weight(weight * factor, grid, mode=mode, fraction=0.05)
        assert torch.equal(other.codes, codes * (-1 if factor < 0 else 1))
        assert torch.equal(other.scale, scale * abs(factor))
    back = sparse_weight(weight.flip(0), grid, mode=mode, fraction=0.05)
    assert torch.equal(back.codes.flip(0), codes)
    assert torch.equal(back.scale.flip(0), scale)


@pytest.mark.parametrize("mode", MODES)
def test_outliers_cost_less_than_in_four_bits(mode: SparseMode) -> None:
    """The point of the method: 4-bit codes for most weights at a smaller error than 4 bits for all."""
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    weight[::4, 10] = 12
    error = weight_error(weight, sparse_weight(weight, CHANNEL, mode=mode, fraction=0.02))
    assert error < weight_error(weight, minmax(weight, WeightGrid(4))) / 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", [CHANNEL, TENSOR])
def test_zero_weights_get_scale_one(mode: SparseMode, grid: WeightGrid) -> None:
    codes, scale, _ = sparse_weight(torch.zeros(3, 40), grid, mode=mode)
    assert not codes.any()
    assert bool((scale == 1).all())


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_an_inlier_keep_their_weights(mode: SparseMode) -> None:
    """Zero rows among others, rows with one weight, rows that lie wholly above the matrix's threshold."""
    weight = torch.randn(60, 50, generator=torch.Generator().manual_seed(2))
    weight[0] = 0
    weight[1] = 0
    weight[1, 3] = -0.7
    weight[2] = 100
    quantized = sparse_weight(weight, CHANNEL, mode=mode, fraction=0.1)
    assert quantized.scale[0].item() == 1
    values = dequantize(quantized)
    assert not values[0].any()
    torch.testing.assert_close(values[1:3], weight[1:3])


@pytest.mark.parametrize("mode", MODES)
def test_a_row_too_short_for_the_fraction_is_plain_four_bits(mode: SparseMode) -> None:
    """Where the fraction gives no weight at all, none is an outlier (msModelSlim stops with an index error)."""
    weight = torch.tensor([[0.5], [-3.0]])
    quantized = sparse_weight(weight, CHANNEL, mode=mode, fraction=0.01)
    if mode == "co_sparse":
        assert torch.equal(quantized.codes, torch.tensor([[7], [-7]], dtype=torch.int8))
    torch.testing.assert_close(dequantize(quantized), weight)


def test_scales_are_rounded_before_codes() -> None:
    weight = weights_with_outliers().to(torch.bfloat16)
    grid = WeightGrid(8, scale_dtype=torch.bfloat16)
    codes, scale, _ = sparse_weight(weight, grid, mode="low_bit", fraction=0.1)
    assert scale.dtype == torch.bfloat16
    assert torch.equal(codes.float(), (weight.float() / scale.float()).round().clamp(-128, 127))


@pytest.mark.parametrize("fraction", [0.0, 0.0099, 0.11, -0.05, float("nan")])
def test_a_fraction_outside_its_limits_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in 0\.01\.\.0\.1"):
        sparse_weight(weights_with_outliers(), CHANNEL, fraction=fraction)


@pytest.mark.parametrize("factor", [2.9, 4.1, float("nan")])
def test_a_sigma_factor_outside_its_limits_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_factor must be in 3\.0\.\.4\.0"):
        sparse_weight(weights_with_outliers(), CHANNEL, mode="low_bit_sigma", sigma_factor=factor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(mode: SparseMode, value: float) -> None:
    weight = weights_with_outliers()
    weight[5, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        sparse_weight(weight, CHANNEL, mode=mode)


@pytest.mark.parametrize(
    "grid", [WeightGrid(4), WeightGrid(8, symmetric=False), WeightGrid(8, granularity="group", group_size=16)]
)
def test_other_grids_are_refused(grid: WeightGrid) -> None:
    with pytest.raises(ValueError, match="symmetric 8-bit grid"):
        sparse_weight(weights_with_outliers(), grid)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="co_sparse, low_bit, low_bit_sigma"):
        sparse_weight(weights_with_outliers(), CHANNEL, mode="nonuniform")  # type: ignore[arg-type]
