"""Statistics of channels against what whole tensors give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.calibration.channel_statistics import ChannelStatistics
from quantcli.errors import DataError


def reference(samples: list[Tensor]) -> tuple[Tensor, float]:
    """centred_maximum and spread by loops in double precision."""
    channels = samples[0].shape[1]
    centred, spread = [-math.inf] * channels, 0.0
    for i, sample in enumerate(samples):
        seen = torch.cat(samples[: i + 1]).double()
        differences = []
        for c in range(channels):
            middle = (float(seen[:, c].max()) + float(seen[:, c].min())) / 2
            column = [float(v) - middle for v in sample[:, c]]
            centred[c] = max(centred[c], *column)
            differences += column
        mean = math.fsum(differences) / len(differences)
        spread = max(spread, math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(differences) - 1)))
    return torch.tensor(centred), spread


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_against_loops(seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randn(length, 4, generator=generator) * 3 + 1 for length in lengths]
    statistics = ChannelStatistics(4, by_sample=True)
    for sample in samples:
        statistics.update(sample.unsqueeze(0))
    whole = torch.cat(samples)
    assert torch.equal(statistics.minimum, whole.amin(0))
    assert torch.equal(statistics.maximum, whole.amax(0))
    torch.testing.assert_close(statistics.mean_absolute, whole.double().abs().mean(0).float())
    centred, spread = reference(samples)
    torch.testing.assert_close(statistics.centred_maximum, centred)
    assert statistics.spread == pytest.approx(spread, rel=1e-5)
    assert statistics.count == len(whole)
    assert statistics.sample_extremes is not None
    lows, highs = statistics.sample_extremes
    assert torch.equal(lows, torch.stack([sample.amin(0) for sample in samples]))
    assert torch.equal(highs, torch.stack([sample.amax(0) for sample in samples]))
    assert ChannelStatistics(4).sample_extremes is None


def test_batches_are_samples_in_order() -> None:
    x = torch.randn(6, 7, 3, generator=torch.Generator().manual_seed(0))
    whole, parts, backwards = (ChannelStatistics(3) for _ in range(3))
    whole.update(x)
    for part in (x[:1], x[1:4], x[4], x[5:]):
        parts.update(part)
    backwards.update(x.flip(0))
    for name in ("minimum", "maximum", "mean_absolute", "centred_maximum"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert (whole.spread, whole.count) == (parts.spread, parts.count)
    assert not torch.equal(whole.centred_maximum, backwards.centred_maximum)  # the middle is the one so far


def test_half_precision_is_widened_first() -> None:
    x = (torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(1)) * 10).to(torch.bfloat16)
    half, wide = ChannelStatistics(3), ChannelStatistics(3)
    half.update(x)
    wide.update(x.float())
    assert torch.equal(half.mean_absolute, wide.mean_absolute)
    assert half.spread == wide.spread


def test_values_that_are_not_finite_count_as_zero() -> None:
    x = torch.tensor([[[1.0, math.nan], [math.inf, -2.0]]])
    statistics = ChannelStatistics(2)
    statistics.update(x)
    assert statistics.non_finite == 2
    assert statistics.minimum.tolist() == [0.0, -2.0]
    assert statistics.maximum.tolist() == [1.0, 0.0]
    assert statistics.mean_absolute.tolist() == [0.5, 1.0]
    assert statistics.centred_maximum.tolist() == [0.5, 1.0]


def test_nothing_seen_and_one_value_give_zeros() -> None:
    statistics = ChannelStatistics(1)
    statistics.update(torch.zeros(0, 5, 1))
    assert (statistics.count, statistics.spread) == (0, 0.0)
    assert statistics.centred_maximum.tolist() == [0.0]
    statistics.update(torch.tensor([[[5.0]]]))
    assert (statistics.maximum.tolist(), statistics.centred_maximum.tolist()) == ([5.0], [0.0])
    assert statistics.spread == 0.0


@pytest.mark.parametrize("shape", [(4, 3), (3,), (1, 4, 5), (1, 1, 4, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="no samples of the 2 channels"):
        ChannelStatistics(2).update(torch.zeros(shape))
