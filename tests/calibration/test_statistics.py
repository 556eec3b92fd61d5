"""Input statistics against float64 over all tokens at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.calibration import statistics
from quantcli.calibration.statistics import InputStatistics, add_compensated
from quantcli.errors import DataError

MOMENTS = ("mean_absolute", "second_moment")
EXTREMES = ("minimum", "maximum", "absolute_maximum")


def reference(x: Tensor) -> dict[str, Tensor]:
    """The definitions, in float64, over [tokens, channels]."""
    wide = x.double()
    return {
        "minimum": wide.amin(0),
        "maximum": wide.amax(0),
        "absolute_maximum": wide.abs().amax(0),
        "mean_absolute": wide.abs().mean(0),
        "second_moment": (wide * wide).mean(0),
    }


def gather(batches: list[Tensor], channels: int) -> InputStatistics:
    result = InputStatistics(channels)
    for batch in batches:
        result.update(batch)
    return result


def activations(seed: int, tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Channels of scales from 1e-3 to 1e3, off centre, some elements far out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator) + torch.randn(channels, generator=generator)
    x = x * torch.logspace(-3, 3, channels)[torch.randperm(channels, generator=generator)]
    x[torch.rand(x.shape, generator=generator) < 0.01] *= 30
    return x.to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(sum),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_statistics_equal_the_definitions(seed: int, channels: int, sizes: list[int], dtype: torch.dtype) -> None:
    x = activations(seed, sum(sizes), channels, dtype).clamp(-6e4, 6e4)
    result = gather(list(x.split(sizes)), channels)
    expected = reference(x)
    assert result.count == sum(sizes)
    assert result.non_finite == 0
    for name in EXTREMES:
        assert torch.equal(getattr(result, name).double(), expected[name]), name
    for name in MOMENTS:
        torch.testing.assert_close(getattr(result, name).double(), expected[name], rtol=1e-6, atol=0)


def test_division_into_chunks_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(0, 600, 24, torch.bfloat16).reshape(3, 200, 24)
    whole = gather([x], 24).to_tensors()
    monkeypatch.setattr(statistics, "_CPU_CHUNK", 24 * 7)
    pieces = gather([x], 24).to_tensors()
    for name in ("count", *EXTREMES):
        assert torch.equal(pieces[name], whole[name])
    for name in MOMENTS:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-6, atol=0)


def test_the_input_is_left_as_it_was_and_needs_no_layout() -> None:
    x = activations(1, 50, 8, torch.float32)
    before = x.clone()
    transposed = gather([x.t().contiguous().t()], 8).to_tensors()
    assert torch.equal(x, before)
    for name, tensor in gather([x], 8).to_tensors().items():
        torch.testing.assert_close(transposed[name], tensor, rtol=1e-6, atol=0)


def test_storage_returns_the_same_and_goes_on() -> None:
    x = activations(2, 300, 16, torch.bfloat16)
    half = gather([x[:150]], 16)
    stored = half.to_tensors()
    restored = InputStatistics.from_tensors(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in restored.to_tensors().items())
    restored.update(x[150:])
    expected = reference(x)
    for name in MOMENTS:
        torch.testing.assert_close(getattr(restored, name).double(), expected[name], rtol=1e-6, atol=0)
    assert restored.count == 300


def test_non_finite_elements_are_counted_and_kept_out() -> None:
    x = activations(3, 40, 4, torch.bfloat16)
    x[1, 0], x[2, 1], x[3, 1], x[4, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    result = gather([x[:20], x[20:]], 4)
    assert result.non_finite == 4
    zeroed = torch.where(torch.isfinite(x), x, 0)
    for name, expected in reference(zeroed).items():
        torch.testing.assert_close(getattr(result, name).double(), expected, rtol=1e-6, atol=0)


def test_no_token_gives_zeros_that_can_be_stored() -> None:
    empty = gather([torch.zeros(0, 5)], 5)
    assert empty.count == 0
    restored = InputStatistics.from_tensors(empty.to_tensors())
    restored.update(-torch.ones(2, 5))
    assert restored.maximum.tolist() == [-1.0] * 5  # the stored zero was no observation


def test_wrong_width_and_damaged_storage_are_refused() -> None:
    with pytest.raises(DataError, match=r"shape \[2, 3\] do not end in the 4 channels"):
        InputStatistics(4).update(torch.zeros(2, 3))
    stored = gather([torch.ones(2, 3)], 3).to_tensors()
    with pytest.raises(DataError, match="lack maximum"):
        InputStatistics.from_tensors({name: tensor for name, tensor in stored.items() if name != "maximum"})
    with pytest.raises(DataError, match="do not fit"):
        InputStatistics.from_tensors(stored | {"maximum": torch.ones(4)})


def test_compensated_sum_keeps_what_float32_alone_loses() -> None:
    total = lost = torch.zeros(3)
    plain = torch.zeros(3)
    addend = torch.tensor([1e-3, 0.1, 3.3])
    for _ in range(20_000):
        total, lost = add_compensated(total, lost, addend)
        plain = plain + addend
    expected = addend.double() * 20_000
    torch.testing.assert_close(total.double(), expected, rtol=1.2e-7, atol=0)
    assert ((plain.double() - expected).abs() > 1e-5 * expected).any()
