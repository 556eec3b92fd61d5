"""Properties that hold of every smoothing method, and slow references of single ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.errors import DataError
from quantcli.smoothing.awq import awq
from quantcli.smoothing.group import ErrorOf, Group, shared_maximum, shared_mean
from quantcli.smoothing.methods import SMOOTHING_METHODS
from quantcli.smoothing.outliers import cbq, outlier_suppression
from quantcli.smoothing.strength import flex, iterative, smoothquant


def group_from(x: Tensor, *weights: Tensor, channels: list[int] | None = None) -> Group:
    """The group of inputs [tokens, C] seen as one sample."""
    middle = (x.amax(0) + x.amin(0)) / 2
    return Group(
        weights=weights,
        channels=torch.arange(x.shape[1]) if channels is None else torch.tensor(channels),
        minimum=x.amin(0),
        maximum=x.amax(0),
        mean_absolute=x.abs().mean(0),
        centred_maximum=x.amax(0) - middle,
        spread=float((x - middle).std()),
        tokens=x,
        ranges=(x.shape[1],) * len(weights),
    )


def random_group(seed: int, channels: list[int] | None = None, outlier: int | None = 5) -> Group:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 16, generator=generator)
    if outlier is not None:
        x[:, outlier] *= 60
    weights = [torch.randn(rows, 16, generator=generator) * 0.1 for rows in (12, 20)]
    return group_from(x, *weights, channels=channels)


def int8_error(group: Group) -> tuple[list[Tensor], ErrorOf]:
    """An error with one scale for all inputs and one a row of the weights; and the scales that it was asked about."""
    asked: list[Tensor] = []

    def rounded(values: Tensor, step: Tensor) -> Tensor:
        return (values / step.clamp(min=1e-12)).round() * step

    def error(scale: Tensor) -> float:
        asked.append(scale.clone())
        x = group.tokens / scale
        x = rounded(x, x.abs().amax() / 127)
        lost, whole = 0.0, 0.0
        for weight in group.weights:
            y, scaled = group.tokens @ weight.T, weight * scale
            lost += float((x @ rounded(scaled, scaled.abs().amax(1, keepdim=True) / 127).T - y).square().sum())
            whole += float(y.square().sum())
        return lost / whole if whole else 0.0

    return asked, error


SHARED = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]


@pytest.mark.parametrize("name", SMOOTHING_METHODS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([-12, -3, 0, 4]), dead=st.booleans())
def test_scales_are_positive_finite_and_shared(name: str, seed: int, power: int, dead: bool) -> None:
    group = random_group(seed, SHARED)
    x, weights = group.tokens * 10.0**power, [w.clone() for w in group.weights]
    if dead:
        x[:, [2, 6]] = 0  # nothing ever enters producer channel 2
        for weight in weights:
            weight[:, [3, 7]] = 0  # nobody reads channel 3
    group = group_from(x, *weights, channels=SHARED)
    scale = SMOOTHING_METHODS[name].find(group, int8_error(group)[1]).scale
    assert scale.dtype == torch.float32
    assert bool((scale.isfinite() & (scale > 0)).all())
    for channel in range(8):
        (first, second) = scale[group.channels == channel].tolist()
        assert first == second


@pytest.mark.parametrize("name", SMOOTHING_METHODS)
def test_channel_without_input_is_left_alone(name: str) -> None:
    group = random_group(3)
    x = group.tokens.clone()
    x[:, 7] = 0
    group = group_from(x, *group.weights)
    assert float(SMOOTHING_METHODS[name].find(group, int8_error(group)[1]).scale[7]) == 1.0


@pytest.mark.parametrize("name", SMOOTHING_METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_outlier_gets_the_largest_scale(name: str, seed: int) -> None:
    group = random_group(seed)
    scale = SMOOTHING_METHODS[name].find(group, int8_error(group)[1]).scale
    assert int(scale.argmax()) == 5
    assert float(scale[5]) > 1.5 * float(scale.median())


@pytest.mark.parametrize("name", ["outlier_suppression", "awq", "flex"])
@pytest.mark.parametrize("seed", range(3))
def test_searches_return_the_least_error_that_they_saw(name: str, seed: int) -> None:
    group = random_group(seed)
    asked, error = int8_error(group)
    found = SMOOTHING_METHODS[name].find(group, error)
    assert len(asked) <= 100
    assert len({tuple(scale.tolist()) for scale in asked}) == len(asked)
    losses = [error(scale) for scale in list(asked)]
    best = losses.index(min(losses))
    assert torch.equal(found.scale, asked[best])
    assert found.facts["error"] == losses[best]


@pytest.mark.parametrize("name", SMOOTHING_METHODS)
def test_sign_of_the_weights_does_not_matter(name: str) -> None:
    """Nor does it of the largest: a signed maximum would see 0.01 where the weight is -3."""
    group = random_group(1)
    weight = torch.full((8, 16), 0.01)
    weight[0] = -3.0 * torch.linspace(1, 2, 16)
    one, other = (group_from(group.tokens, sign * weight) for sign in (1, -1))
    found = SMOOTHING_METHODS[name].find
    assert torch.equal(found(one, int8_error(one)[1]).scale, found(other, int8_error(other)[1]).scale)
    if name == "smoothquant":
        expected = (group.tokens.abs().amax(0) / weight[0].abs()).sqrt()
        torch.testing.assert_close(found(one, int8_error(one)[1]).scale, expected)


def exact_powers(group: Group, alpha: float, beta: float) -> Tensor:
    """A^α / Wmax^β in Python's double precision, channel by channel."""
    result = []
    for c in range(group.tokens.shape[1]):
        inputs = max(abs(float(v)) for v in group.tokens[:, c])
        weights = max(abs(float(v)) for w in group.weights for v in w[:, c])
        result.append(inputs**alpha / weights**beta)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_powers_against_double_precision(alpha: float) -> None:
    group = random_group(11)
    expected = exact_powers(group, alpha, 1 - alpha)
    for method in (smoothquant, iterative):
        scale = method(group, int8_error(group)[1], alpha=alpha).scale
        torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)
    scale = flex(group, int8_error(group)[1], alpha=alpha, beta=0.2).scale
    torch.testing.assert_close(scale.double(), exact_powers(group, alpha, 0.2), rtol=1e-6, atol=0)


def test_one_given_exponent_is_kept() -> None:
    group = random_group(2)
    asked, error = int8_error(group)
    assert flex(group, error, alpha=0.62).facts["alpha"] == 0.62
    assert flex(group, error, beta=0.11).facts["beta"] == 0.11
    assert len(asked) == 42


def test_iterative_shares_the_mean_and_flex_the_extremes() -> None:
    """Two heads over one producer channel, A = 4 and 16, Wmax = 1 and 9."""
    group = group_from(torch.tensor([[4.0, -16.0]]), torch.tensor([[1.0, -9.0]]), channels=[0, 0])
    mean = (4.0**0.5 / 1 + 16.0**0.5 / 9**0.5) / 2
    asked, error = int8_error(group)
    assert iterative(group, error, alpha=0.5).scale.tolist() == pytest.approx([mean, mean])
    assert flex(group, error, alpha=0.5, beta=0.5).scale.tolist() == pytest.approx([4 / 3, 4 / 3])
    assert not asked


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-9, 9, width=32), st.booleans()), min_size=1, max_size=12))
def test_shared_values_against_loops(rows: list[tuple[int, float, bool]]) -> None:
    channels = torch.tensor([row[0] for row in rows])
    values, counted = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    for c, (channel, _, _) in enumerate(rows):
        same = [row for row in rows if row[0] == channel]
        taken = [value for _, value, counts in same if counts]
        assert float(shared_maximum(values, channels)[c]) == max(value for _, value, _ in same)
        mean = math.fsum(taken) / len(taken) if taken else 1.0
        assert float(shared_mean(values, channels, counted)[c]) == pytest.approx(mean, rel=1e-5, abs=1e-5)


def test_weak_outliers_are_left_to_smoothquant() -> None:
    group = random_group(4, outlier=None)
    group = group_from(group.tokens.clamp(-2, 2), *group.weights)
    asked, error = int8_error(group)
    assert torch.equal(outlier_suppression(group, error).scale, smoothquant(group, error).scale)
    assert not asked


def test_outlier_suppression_scales_outliers_only() -> None:
    group = random_group(4)
    scale = outlier_suppression(group, int8_error(group)[1]).scale
    chosen = scale != 1
    least = float(group.centred_maximum[chosen].min())
    assert least > float(group.centred_maximum[~chosen].max())
    assert least > group.spread
    expected = (group.centred_maximum / torch.cat(group.weights).abs().amax(0)).sqrt()
    torch.testing.assert_close(scale[chosen], expected[chosen])


def test_cbq_measures_outliers_by_the_largest_inlier() -> None:
    """Of 3, 8 and 9 over ones, all coarse outliers, the cut lies below 8; on the negative side there is nothing."""
    reach = torch.ones(20)
    reach[3], reach[5], reach[6] = 8, 3, 9
    group = group_from(torch.stack((reach, torch.zeros(20))), torch.ones(2, 20))
    expected = torch.ones(20)
    expected[3], expected[6] = (8 / 3) ** 0.7, 3**0.7
    torch.testing.assert_close(cbq(group, lambda _s: 0.0).scale, expected)


def test_awq_ratios_and_their_centre() -> None:
    group = random_group(8)
    asked, error = int8_error(group)
    found = awq(group, error)
    assert len(asked) == 20
    for i, scale in enumerate(asked):
        s = group.mean_absolute.double() ** (i / 20)
        torch.testing.assert_close(scale.double(), s / (s.max() * s.min()).sqrt(), rtol=1e-5, atol=0)
    assert torch.equal(found.scale, asked[round(20 * float(found.facts["ratio"]))])


@pytest.mark.parametrize("name", ["outlier_suppression", "awq", "flex"])
def test_error_that_is_never_finite_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="not finite"):
        SMOOTHING_METHODS[name].find(random_group(1), lambda _scale: math.nan)


@pytest.mark.parametrize("name", ["outlier_suppression", "awq", "flex"])
def test_first_of_equal_errors_counts(name: str) -> None:
    group = random_group(1)
    asked: list[Tensor] = []

    def error(scale: Tensor) -> float:
        asked.append(scale)
        return 1.0

    assert torch.equal(SMOOTHING_METHODS[name].find(group, error).scale, asked[0])
