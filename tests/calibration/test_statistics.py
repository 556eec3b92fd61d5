"""Input statistics against float64 over all tokens at once."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantcli.calibration import statistics
from quantcli.calibration.statistics import InputStatistics, add_compensated, inputs_observed
from quantcli.errors import DataError
from quantcli.model.structure import Block, SharedInput
from quantcli.pipeline.treatment import observed_of
from quantcli.quant.observers import activation_range, bin_values, code_errors

MOMENTS = ("second_moment",)
EXTREMES = ("minimum", "maximum", "absolute_maximum")


def reference(x: Tensor) -> dict[str, Tensor]:
    """The definitions, in float64, over [tokens, channels]."""
    wide = x.double()
    return {
        "minimum": wide.amin(0),
        "maximum": wide.amax(0),
        "absolute_maximum": wide.abs().amax(0),
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


def test_what_is_stored_is_what_was_gathered_and_gathering_goes_on() -> None:
    x = activations(2, 300, 16, torch.bfloat16)
    gathered = gather([x[:150]], 16)
    stored = gathered.to_tensors()
    observed = observed_of(stored)
    assert torch.equal(observed.sample_minimum, gathered.sample_minimum)
    assert torch.equal(observed.sample_maximum, gathered.sample_maximum)
    assert torch.equal(observed.counts, gathered.value_counts)  # type: ignore[arg-type]
    assert observed.range_parm == pytest.approx(gathered.range_parm, rel=1e-6)
    before = {name: tensor.clone() for name, tensor in stored.items()}
    gathered.update(x[150:])
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.items())
    expected = reference(x)
    for name in MOMENTS:
        torch.testing.assert_close(getattr(gathered, name).double(), expected[name], rtol=1e-6, atol=0)
    assert gathered.count == 300


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
    assert not any(bool(tensor.any()) for tensor in empty.to_tensors().values())
    empty.update(-torch.ones(2, 5))
    assert empty.maximum.tolist() == [-1.0] * 5  # the stored zero was no observation


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \[2, 3\] do not end in the 4 channels"):
        InputStatistics(4).update(torch.zeros(2, 3))


def test_what_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples together, one by one, and through small chunks: extremes, range_parm and counts are the same."""
    x = activations(4, 7 * 30, 12, torch.bfloat16).reshape(7, 30, 12)
    x[2, 3, 4], x[6, 0, 0] = torch.nan, -torch.inf
    clean = torch.where(torch.isfinite(x), x, 0)
    together = gather([x[:3], x[3:]], 12)
    assert together.sample_minimum.tolist() == clean.flatten(1).amin(1).tolist()
    assert together.sample_maximum.tolist() == clean.flatten(1).amax(1).tolist()
    monkeypatch.setattr(statistics, "_CPU_CHUNK", 12 * 7)
    single = gather(list(x), 12)
    for name in ("sample_minimum", "sample_maximum", "range_parm", "value_counts"):
        assert torch.equal(single.to_tensors()[name], together.to_tensors()[name]), name
    assert single.non_finite == together.non_finite == 2


def test_range_parm_is_its_definition_over_five_samples() -> None:
    x = activations(5, 8 * 20, 6, torch.float32).reshape(8, 20, 6)
    x[5:] *= 1e3  # later samples do not matter
    deviations = []
    for sample in x[:5].double():
        shift = sample.amax(0) + sample.amin(0)
        deviations.append((sample - shift).flatten().std(correction=1))
    expected = float(x[:5].double().abs().amax() / torch.stack(deviations).amax())
    whole = gather([x], 6)
    assert whole.range_parm == pytest.approx(expected, rel=1e-6)
    parts = gather([x[:2], x[2:]], 6)
    assert parts.range_parm == pytest.approx(expected, rel=1e-6)
    assert torch.equal(parts.sample_maximum, whole.sample_maximum)
    assert torch.equal(parts.to_tensors()["value_counts"], whole.to_tensors()["value_counts"])


def test_range_parm_without_spread() -> None:
    assert gather([torch.zeros(3, 4, 2)], 2).range_parm == 0
    constant = gather([torch.full((3, 4, 2), 2.5)], 2)
    assert constant.range_parm == math.inf
    assert observed_of(constant.to_tensors()).range_parm == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_counted_exactly(dtype: torch.dtype) -> None:
    x = activations(6, 200, 9, torch.float32).clamp(-6e4, 6e4).to(dtype)
    x[:10, 0], x[:7, 1] = 0.0, -0.0
    expected = Counter(x.bfloat16().flatten().tolist())  # 0.0 == -0.0
    counts = gather([x.view(4, 50, 9)], 9).to_tensors()["value_counts"]
    assert int(counts.sum()) == x.numel()
    found = counts.nonzero().squeeze(1)
    assert dict(zip(bin_values()[found].tolist(), counts[found].tolist(), strict=True)) == dict(expected)


def test_counting_rounds_ties_to_even_and_beyond_the_largest() -> None:
    """1 + 2^-8 lies between 1 and 1 + 2^-7 (odd); 1 + 3 * 2^-8 between that and 1 + 2^-6."""
    x = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [torch.finfo(torch.float32).max], [-1e-45]])
    result = gather([x], 1)
    assert result.non_finite == 0
    counts = result.to_tensors()["value_counts"]
    values = bin_values()[counts.nonzero().squeeze(1)].tolist()
    assert values == [0.0, 1.0, 1 + 2**-6, torch.finfo(torch.bfloat16).max]


def test_counts_and_moments_can_be_left_out() -> None:
    x = activations(7, 60, 4, torch.bfloat16).view(3, 20, 4)
    everything = gather([x], 4).to_tensors()
    plain = InputStatistics(4, counts=False, moments=False)
    plain.update(x)
    stored = plain.to_tensors()
    assert everything.keys() - stored.keys() == {"value_counts", "second_moment"}
    assert all(torch.equal(tensor, everything[name]) for name, tensor in stored.items())
    assert plain.value_counts is None
    assert plain.second_moment is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extremes_of_every_pattern(dtype: torch.dtype) -> None:
    """Each finite 16-bit pattern beside each of some others, as two tokens of one channel; zeros of both signs."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    for other in (0.0, -0.0, 1.5, -1.5, 6e4, -6e4, 1e-7, -1e-7):
        x = torch.stack((patterns, torch.full_like(patterns, other)))
        result = gather([x], len(patterns))
        assert torch.equal(result.minimum, x.float().amin(0)), other
        assert torch.equal(result.maximum, x.float().amax(0)), other
        assert result.non_finite == 0


def test_beyond_the_exact_values_some_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens however they are divided, and of the first of each sample their share."""
    monkeypatch.setattr(statistics, "EXACT_VALUES", 3 * 100 - 1)  # the first 100 tokens
    x = torch.arange(64 * 128).view(64, 128, 1).repeat(1, 1, 3) % 128  # every value is its position in the sample
    together = gather([x.float()], 3)
    pieces = gather([part.float() for part in x.view(-1, 3).split(77)], 3)
    parts = gather([x[:20].float(), x[20:].float()], 3)
    counts = together.value_counts
    assert counts is not None
    for other in (pieces, parts):
        assert torch.equal(other.to_tensors()["value_counts"], counts)
    by_position = counts[counts.nonzero().squeeze(1)]
    assert len(by_position) == 128
    assert torch.all((by_position / 3 - 64).abs() <= 2 * statistics.COUNTED)
    assert abs(int(counts.sum()) / x.numel() - 1) < 0.005


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_from_sampled_counts_err_as_little(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mse and histogram the expected squared error over all values is within 1 % of that of exact counts; the ends
    of percentile move by less than 2 % of the range, and the extremes not at all."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(256, 256, 64, generator=generator) * torch.logspace(-1, 1, 64) + 0.3
    x *= 1 + 0.2 * torch.randn(256, 256, 1, generator=generator)
    x[:, 0, 5] *= 20  # the first token of each sample has an outlier
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "EXACT_VALUES", x.numel())
        exact = observed_of(gather(list(x), 64).to_tensors())
    sampled = observed_of(gather(list(x), 64).to_tensors())
    assert torch.equal(sampled.sample_maximum, exact.sample_maximum)
    assert exact.counts is not None
    assert sampled.counts is not None
    assert not torch.equal(sampled.counts, exact.counts)
    seen = exact.counts.nonzero().squeeze(1)
    values, weights = bin_values()[seen], exact.counts[seen].float() / x.numel()
    for method in ("mse", "histogram"):
        ends = [activation_range(each, method, symmetric=symmetric) for each in (exact, sampled)]
        best, found = code_errors(values, weights, torch.tensor(ends), symmetric).tolist()
        assert 0 < found <= 1.01 * best, method
    low, high = activation_range(exact, "percentile", symmetric=symmetric)
    assert activation_range(sampled, "percentile", symmetric=symmetric) == pytest.approx(
        (low, high), abs=0.02 * (high - low)
    )


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


def test_samples_are_told_apart_where_a_block_flattens_them() -> None:
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor) -> Tensor:
            flat = self.first(hidden_states).reshape(-1, 4)
            return self.second(flat).reshape(hidden_states.shape)

    module, x = Flattening(), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    inputs = tuple(SharedInput((f"block.{name}",), 4) for name in ("first", "second"))
    with torch.no_grad(), inputs_observed(module, Block("block", (), inputs, ()), "cpu") as found:
        module(x)
        inside = module.first(x)
    for name, values in (("block.first", x), ("block.second", inside)):
        seen = found[name].to_tensors()
        torch.testing.assert_close(seen["sample_minimum"][:3], values.amin((1, 2)))
        torch.testing.assert_close(seen["sample_maximum"][:3], values.amax((1, 2)))
