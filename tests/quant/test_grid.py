from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from quantcli.quant.grid import (
    QuantizedWeight,
    WeightGrid,
    dequantize,
    float_blocks,
    quantize_codes,
    stored_scale,
)


def test_codes_follow_the_formula_weight_by_weight() -> None:
    """Against a float64 loop; scales are powers of two, so that w / s has no rounding of its own."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    weight[0, :4] = torch.tensor([0.5, 1.5, 2.5, -0.5])  # ties go to the even code
    scale = torch.tensor([[0.25, 1.0, 0.5]]).repeat(5, 1)
    scale[0] = 1.0
    zero = torch.tensor([[1, -3, 0]], dtype=torch.int8).repeat(5, 1)
    grid = WeightGrid(3, symmetric=False, granularity="group", group_size=4)
    codes = quantize_codes(weight, scale, zero, grid)
    values = dequantize(QuantizedWeight(codes, scale, zero))
    for i in range(5):
        for j in range(12):
            s, z = float(scale[i, j // 4]), int(zero[i, j // 4])
            expected = min(3, max(-4, round(float(weight[i, j]) / s) + z))
            assert int(codes[i, j]) == expected
            assert float(values[i, j]) == (expected - z) * s


def test_dequantize_rounds_once() -> None:
    """127 * 0.010041 in float32, then bfloat16; rounding the scale to bfloat16 first would give another number."""
    scale = torch.tensor([[0.010041]])
    quantized = QuantizedWeight(torch.tensor([[127]], dtype=torch.int8), scale, None)
    expected = torch.tensor(127 * float(scale)).to(torch.bfloat16)
    assert dequantize(quantized, torch.bfloat16).item() == expected.item() != (127 * scale.bfloat16()).item()


def test_per_tensor_scale_reaches_every_row_of_every_block() -> None:
    weight = torch.arange(-6.0, 6.0).repeat(3, 1)
    codes = quantize_codes(weight, torch.tensor([[2.0]]), None, WeightGrid(4, granularity="tensor"))
    assert codes.tolist() == [[round(w / 2) for w in range(-6, 6)]] * 3


def test_blocks_cover_the_matrix_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.quant.grid._CPU_ELEMENTS_PER_THREAD", 64)
    weight = torch.randn(37, 24, dtype=torch.bfloat16)
    blocks = [block.clone() for _, block in float_blocks(weight, 3)]
    assert len(blocks) > 1
    assert torch.equal(torch.cat(blocks).view(37, 24), weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_scale_is_never_zero_nor_infinite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scale = stored_scale(torch.tensor([0.0, 1e-45, -1e-45, 3.3e38, -3.3e38, 0.01]), dtype)
    assert scale[0] == 1
    assert bool((scale != 0).all() and scale.isfinite().all())
    assert torch.equal(scale, scale.to(dtype).float())
    assert scale.sign().tolist() == [1, 1, -1, 1, -1, 1]
    if dtype == torch.float16:
        assert scale[1:5].tolist() == [info.tiny, -info.tiny, info.max, -info.max]


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4, "granularity": "group"},
        {"bits": 4, "group_size": 64},
        {"bits": 4, "granularity": "row"},
        {"bits": 4, "granularity": "group", "group_size": 0},
        {"bits": 4, "scale_dtype": torch.float64},
    ],
)
def test_grid_refuses_nonsense(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bits|group_size|granularity|scale_dtype"):
        WeightGrid(**arguments)


def test_range_of_the_grid() -> None:
    assert [(WeightGrid(b).qmin, WeightGrid(b).qmax) for b in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
    assert math.log2(WeightGrid(5).qmax - WeightGrid(5).qmin + 1) == 5
