"""8-bit caches and heads against definitions written out in float64 and by enumeration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.quant.attention import (
    AttentionScales,
    dequantize_int8,
    fp8_scale,
    int8_channel_scales,
    int8_head_scales,
    quantize_int8,
    recall_window,
    round_trip,
)
from quantcli.quant.float8 import decoded_fp8, quantize_fp8


def tensor(seed: int, batch: int = 2, heads: int = 3, tokens: int = 7, size: int = 4) -> Tensor:
    """[batch, heads, tokens, size] whose channels differ in scale and lie off centre."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.logspace(-2, 2, heads * size).view(1, heads, 1, size)
    shift = torch.randn(1, heads, 1, size, generator=generator)
    return (torch.randn(batch, heads, tokens, size, generator=generator) + shift) * channels


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin((0, 2)).flatten(), x.amax((0, 2)).flatten()


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_are_quantized_one_by_one(symmetric: bool) -> None:
    x = tensor(0)
    scale, offset = int8_channel_scales(*extremes(x), symmetric)
    codes = quantize_int8(x, scale, offset)
    values = dequantize_int8(codes, scale, offset)
    for head in range(3):
        for channel in range(4):
            column = x[:, head, :, channel].double()
            low, high = min(column.min().item(), 0.0), max(column.max().item(), 0.0)
            s = max(-low, high) / 127 if symmetric else (high - low) / 255
            z = 0 if symmetric else round(-low / s) - 128
            index = head * 4 + channel
            assert scale[index].item() == pytest.approx(s, rel=4e-7)
            assert (0 if offset is None else offset[index].item()) == z
            stored = scale[index].item()  # float32
            # codes at ties may go either way in float32
            exact = (column / stored + z).clamp(-128, 127)
            assert ((codes[:, head, :, channel].double() - exact).abs() <= 0.5 + 1e-4).all()
            expected = (codes[:, head, :, channel].double() - z) * stored
            torch.testing.assert_close(values[:, head, :, channel].double(), expected, rtol=2e-7, atol=0)
    step = scale.view(1, 3, 1, 4)
    assert ((values - x).abs() <= step * 0.5001 + (0 if symmetric else step * 0.5)).all(), "the range is covered"


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_stays_zero_and_one_sided_channels_use_all_codes(sign: int) -> None:
    x = sign * (torch.rand(1, 1, 50, 1) + 3)
    scale, offset = int8_channel_scales(*extremes(x), symmetric=False)
    assert offset is not None
    assert offset.tolist() == [-128.0 if sign > 0 else 127.0]
    codes = quantize_int8(torch.cat([x, torch.zeros(1, 1, 1, 1)], 2), scale, offset)
    assert dequantize_int8(codes, scale, offset)[0, 0, -1] == 0
    assert codes.max() - codes.min() == 255


def test_a_channel_of_zeros_has_scale_one() -> None:
    zeros = torch.zeros(2)
    for symmetric in (True, False):
        scale, _ = int8_channel_scales(zeros, zeros, symmetric)
        assert scale.tolist() == [1.0, 1.0]
    assert fp8_scale(zeros, zeros).tolist() == [1.0]
    assert int8_head_scales(zeros, zeros).tolist() == [[1.0], [1.0]]


def test_scales_are_rounded_to_the_stored_dtype_before_offsets_and_codes() -> None:
    low, high = torch.tensor([-1.0]), torch.tensor([2.7])
    exact, _ = int8_channel_scales(low, high, False)
    scale, offset = int8_channel_scales(low, high, False, torch.bfloat16)
    assert scale != exact
    assert scale == exact.bfloat16().float()
    assert offset is not None
    assert offset.item() == round(1 / scale.item()) - 128
    assert fp8_scale(low, high, torch.bfloat16) == (high / 448).bfloat16().float()


def test_rounding_is_of_the_sum_with_ties_to_even() -> None:
    scale, offset = torch.tensor([1.0]), torch.tensor([1.0])
    x = torch.tensor([0.5, 1.5, -0.5, 1e9, -1e9]).view(1, 1, 5, 1)
    assert quantize_int8(x, scale, offset).flatten().tolist() == [2, 2, 0, 127, -128]
    assert quantize_int8(x, scale).flatten().tolist() == [0, 2, 0, 127, -128]


def test_fp8_is_the_nearest_of_all_codes() -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[torch.isfinite(grid)]
    x = torch.cat([tensor(1).flatten(), torch.tensor([0.0, 1e-4, 1e9])]).view(1, 1, -1, 1)
    scale = torch.tensor([0.37])
    found = (decoded_fp8(quantize_fp8(x, scale)) * scale).flatten().double() / 0.37
    for value, ours in zip((x.flatten().double() / 0.37).tolist(), found.tolist(), strict=True):
        nearest = (grid - min(value, 448.0)).abs().min().item()
        assert abs(ours - min(value, 448.0)) == pytest.approx(nearest, rel=1e-5, abs=1e-6 * abs(ours))
    largest = x.abs().amax().view(1)
    assert quantize_fp8(x, fp8_scale(-largest, largest)).float().max() == 448


def slow_window(values: list[float], ratio: float) -> tuple[float, float]:
    ordered = sorted(values)
    covered = max(1, int(ratio * len(ordered)))
    best = None
    for begin in range(len(ordered) - covered + 1):
        window = (ordered[begin], ordered[begin + covered - 1])
        if best is None or window[1] - window[0] < best[1] - best[0]:
            best = window
    assert best is not None
    return best


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda n: st.lists(st.lists(st.integers(-50, 50), min_size=n, max_size=n), min_size=1, max_size=4)
    ),
    ratio=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0]),
)
def test_recall_window_is_the_narrowest(rows: list[list[int]], ratio: float) -> None:
    low, high = recall_window(torch.tensor(rows, dtype=torch.float32), ratio)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == [slow_window(row, ratio) for row in rows]


def test_recall_window_leaves_out_what_makes_it_wide() -> None:
    values = torch.linspace(-1, 1, 20_000)
    values[7] = 90.0
    low, high = recall_window(values[torch.randperm(20_000)].view(1, -1), 0.9999)
    assert -1 <= low.item() < -0.999
    assert 0.999 < high.item() <= 1
    with pytest.raises(ValueError, match="ratio"):
        recall_window(values.view(1, -1), 1.1)


def test_heads_have_scales_of_their_own() -> None:
    query, key, value = tensor(2, heads=6), tensor(3), tensor(4, size=5)
    scales = AttentionScales(
        "heads",
        fa_q_scale=torch.linspace(0.01, 0.2, 6).view(6, 1),
        fa_k_scale=torch.tensor([[0.01], [0.1], [1.0]]),
        fa_v_scale=torch.tensor([[0.02], [0.2], [2.0]]),
    )
    found = round_trip(query, key, value, scales)
    tensors = scales.tensors()
    for x, y, name in zip((query, key, value), found, ("fa_q_scale", "fa_k_scale", "fa_v_scale"), strict=True):
        for head, s in enumerate(tensors[name].flatten()):
            assert torch.equal(y[:, head], (x[:, head] / s).round().clamp(-128, 127) * s)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_cache_leaves_queries_alone_and_keeps_the_dtype(kind: str) -> None:
    query, key, value = (tensor(i).bfloat16() for i in range(3))
    if kind == "int8":
        scales = AttentionScales("int8", torch.full((12,), 0.5), torch.full((12,), 0.5))
    else:
        scales = AttentionScales("fp8", torch.tensor([0.3]), torch.tensor([0.2]))
    new_query, new_key, new_value = round_trip(query, key, value, scales)
    assert new_query is query
    for new, old in ((new_key, key), (new_value, value)):
        assert new.dtype == torch.bfloat16
        assert not torch.equal(new, old)


def test_scales_that_do_not_belong_together_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="int8 scales cannot consist of k_scale"):
        AttentionScales("int8", one)
    with pytest.raises(ValueError, match="fp8"):
        AttentionScales("fp8", one, one, one, one)
    with pytest.raises(ValueError, match="int8"):
        AttentionScales("int8", one, one, one)
    x = tensor(0)
    with pytest.raises(ValueError, match="do not fit 3 heads of size 4"):
        round_trip(x, x, x, AttentionScales("int8", torch.ones(11), torch.ones(12)))
