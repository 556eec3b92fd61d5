"""Output errors of a group against a slow reference, and the expected noise against measured errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from test_smoothing_methods import group_from
from torch import Tensor

from quantcli.quant.activation import quantize_static, static_parameters
from quantcli.quant.observers import Observed, activation_range
from quantcli.smoothing.clip import COARSE_RATIOS as COARSE
from quantcli.smoothing.group import Group
from quantcli.smoothing.objective import (
    ExpectedNoise,
    Reduction,
    Target,
    output_error,
    quantized_input,
    token_shares,
)

Activations = Literal["none", "static", "dynamic"]


def by_row(bits: int) -> Target:
    high = 2 ** (bits - 1) - 1

    def weight(w: Tensor) -> Tensor:
        step = w.abs().amax(1, keepdim=True) / high
        return (w / step).round() * step

    return Target(weight=weight, bits=bits)


def gaussian(tokens: int = 96, channels: int = 32) -> Group:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator) + 0.3
    return group_from(x, *(torch.randn(rows, channels, generator=generator) for rows in (24, 40)))


def scale_of(group: Group, seed: int = 1) -> Tensor:
    return (torch.randn(group.tokens.shape[1], generator=torch.Generator().manual_seed(seed)) * 0.7).exp()


def slow_error(group: Group, scale: Tensor, target: Target, reduction: Reduction) -> float:
    """One value at a time where it is quantized, in float64."""
    x = (group.tokens.double() / scale.double()).tolist()
    if target.activations == "dynamic" and not target.symmetric:
        for row in x:
            step = (max(row) - min(row)) / 255
            zero = round(-128 - min(row) / step)
            row[:] = [(min(127, max(-128, round(value / step) + zero)) - zero) * step for value in row]
    elif target.activations == "dynamic":
        for row in x:
            step = max(abs(value) for value in row) / 127
            row[:] = [round(value / step) * step for value in row]
    if target.activations == "static":
        low = min(0.0, float((group.minimum / scale).min()))
        high = max(0.0, float((group.maximum / scale).max()))
        if target.symmetric:
            step, zero = max(high, -low) / 127, 0
        else:
            step = (high - low) / 255
            zero = round(-128 - low / step)
        for row in x:
            row[:] = [(min(127, max(-128, round(value / step) + zero)) - zero) * step for value in row]
    quantized = torch.tensor(x, dtype=torch.float64)
    outputs = [group.tokens.double() @ w.double().t() for w in group.weights]
    energy = [sum(float(y[t].square().sum()) for y in outputs) for t in range(len(x))]
    median = sorted(energy)[(len(energy) - 1) // 2]
    massive = [e > 100 * median for e in energy]
    share = torch.tensor([min(1.0, median / e) for e in energy], dtype=torch.float64)
    share[torch.tensor(massive)] *= 5 * len(energy) / max(sum(massive), 1)
    total, whole = 0.0, sum(float(y.square().sum()) for y in outputs)
    for w, y in zip(group.weights, outputs, strict=True):
        squares = (quantized @ target.weight(w.double() * scale.double()).t() - y).square()
        if reduction == "mean":
            total += float(squares.mean())
        elif reduction == "joint":
            total += float(squares.sum()) / whole
        else:
            total += float((share * squares.sum(1)).sum() / (share * y.square().sum(1)).sum())
    return total


@pytest.mark.parametrize("reduction", ["mean", "joint", "token"])
@pytest.mark.parametrize(
    ("activations", "symmetric"),
    [("none", True), ("static", True), ("static", False), ("dynamic", True), ("dynamic", False)],
)
def test_the_error_is_that_of_the_slow_reference(
    activations: Activations, symmetric: bool, reduction: Reduction
) -> None:
    group = gaussian()
    group = replace(group, tokens=group.tokens.clone())
    group.tokens[3] *= 50  # a token whose output is far larger than the others'
    group = group_from(group.tokens, *group.weights)
    target = replace(by_row(8), activations=activations, symmetric=symmetric)
    for scale in (torch.ones(32), scale_of(group)):
        found = output_error(group, [target, target], reduction)(scale)
        assert found == pytest.approx(slow_error(group, scale, target, reduction), rel=0.02)


def fp8(w: Tensor, step: Tensor) -> Tensor:
    return (w / step).clamp(-448, 448).to(torch.float8_e4m3fn).to(w.dtype) * step


def fp8_target(activations: Activations) -> Target:
    return Target(lambda w: fp8(w, w.abs().amax(1, keepdim=True) / 448), 8, activations=activations, type="float")


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_inputs_of_float_codes_are_rounded_as_such(activations: Activations) -> None:
    group, scale = gaussian(), scale_of(gaussian())
    x, target = group.tokens / scale, fp8_target(activations)
    ends = x.abs().amax(1, keepdim=True) if activations == "dynamic" else x.abs().amax()
    lost = [fp8(x, ends / 448) @ target.weight(w * scale).t() - group.tokens @ w.t() for w in group.weights]
    expected = sum(float(each.square().mean()) for each in lost)
    assert output_error(group, [target, target], "mean")(scale) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_expected_noise_of_float_codes_is_about_the_error(activations: Activations) -> None:
    group, target = gaussian(), fp8_target(activations)
    noise, error = ExpectedNoise(group, [target, target]), output_error(group, [target, target], "token")
    for scale in (torch.ones(32), scale_of(group), scale_of(group) ** 12):
        assert 0.4 < float(noise(scale.log())) / error(scale) < 2.5


@pytest.mark.parametrize("reduction", ["mean", "joint", "token"])
def test_every_linear_counts_under_its_own_scheme(reduction: Reduction) -> None:
    """Those that stay in float make no error, and errors add up over schemes; likewise the expected noise."""
    group, scale = gaussian(), scale_of(gaussian())
    few, many = replace(by_row(4), activations="dynamic"), by_row(8)
    each = [(few, None), (None, many)]
    tried: list[tuple[Any, Tensor]] = [
        (lambda targets: output_error(group, targets, reduction), scale),
        (lambda targets: ExpectedNoise(group, targets), scale.log()),
    ]
    for error, at in tried:
        first, second = (float(error(targets)(at)) for targets in each)
        assert first > 10 * second > 0
        assert float(error((few, many))(at)) == pytest.approx(first + second, rel=1e-5)
        assert float(error((None, None))(at)) == 0


def test_a_linear_that_is_clipped_is_judged_with_bounds_of_its_scaled_weight() -> None:
    """Every bound tried for every row by itself."""
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(64, 16, generator=generator), torch.randn(24, 16, generator=generator)
    group, target = group_from(x, w), replace(by_row(3), group_size=16, clipped=True)
    scale = scale_of(group)
    total = 0.0
    for row in w * scale:
        trials = [target.weight(row.clamp(-ratio * row.abs().max(), ratio * row.abs().max())[None]) for ratio in COARSE]
        total += min(float(((x / scale) @ (trial[0] - row)).square().mean()) for trial in trials)
    assert output_error(group, [target], "mean")(scale) == pytest.approx(total / len(w), rel=1e-4)
    assert total / len(w) < 0.9 * output_error(group, [replace(target, clipped=False)], "mean")(scale)


def test_outputs_of_shifted_inputs_are_those_before_the_shift() -> None:
    """Errors of a shifted group compare with those of the group as it was."""
    group, target = gaussian(), by_row(4)
    shift = torch.full((32,), 5.0)
    far = replace(group, tokens=group.tokens + shift, minimum=group.minimum + shift, maximum=group.maximum + shift)
    back = replace(far, tokens=far.tokens - shift, minimum=group.minimum, maximum=group.maximum, shift=shift)
    for w in group.weights:
        lost = back.tokens @ (target.weight(w) - w).T
        one = replace(back, weights=(w,))
        expected = float(lost.square().sum() / (far.tokens @ w.T).square().sum())
        assert output_error(one, [target], "joint")(torch.ones(32)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_that_is_the_mean_of_samples_is_judged_as_such(symmetric: bool) -> None:
    """Against the range methods of the stage that sets it, of inputs that are scaled already."""
    group = gaussian()
    x = group.tokens.view(4, -1, group.tokens.shape[1]).clone()
    x[1] *= 7  # so that means and extremes differ
    group = replace(group, tokens=x.flatten(0, 1), sample_extremes=torch.stack((x.amin(1), x.amax(1))))
    group = replace(group, minimum=group.tokens.amin(0), maximum=group.tokens.amax(0))
    scale = scale_of(group)
    scaled = x / scale
    observed = Observed(scaled.amin((1, 2)), scaled.amax((1, 2)), None, 0.0)
    for averaged, aggregation in ((True, "mean"), (False, "max")):
        target = replace(by_row(8), activations="static", symmetric=symmetric, averaged=averaged)
        low, high = activation_range(observed, "minmax", symmetric=symmetric, aggregation=aggregation)
        step, zero = static_parameters(low, high, symmetric, "int")
        expected = (quantize_static(group.tokens / scale, step, zero, "int").float() - zero.float()) * step
        torch.testing.assert_close(quantized_input(group, scale, target), expected)
    noises = [
        ExpectedNoise(group, [replace(by_row(8), activations="static", symmetric=symmetric, averaged=averaged)] * 2)
        for averaged in (True, False)
    ]
    assert noises[0](scale.log()) < noises[1](scale.log())


def test_a_large_token_counts_as_the_median() -> None:
    outputs = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.0], [4.0]])]
    assert token_shares(outputs).tolist() == pytest.approx([1, 1, 4 / 25])


def test_massive_tokens_count_together_as_much_as_five_times_the_others() -> None:
    """Other tokens attend to them: what moves them moves all. Each error is relative to its token's size still."""
    energy = torch.tensor([1.0] * 9 + [99.0, 400.0, 1e6])
    shares = token_shares([energy.sqrt().unsqueeze(1)])
    assert shares[:10].tolist() == pytest.approx([1] * 9 + [1 / 99])
    assert (shares[10:] * energy[10:]).tolist() == pytest.approx([5 * 12 / 2] * 2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_expected_noise_is_about_the_error(activations: Activations, symmetric: bool, bits: int) -> None:
    group = gaussian()
    target = replace(by_row(bits), activations=activations, symmetric=symmetric)
    noise, error = ExpectedNoise(group, [target, target]), output_error(group, [target, target], "token")
    for scale in (torch.ones(32), scale_of(group)):
        assert 0.5 < float(noise(scale.log())) / error(scale) < 2


def test_expected_noise_of_one_scale_is_about_the_error() -> None:
    """Rows that are smaller than the largest by far lose as much as it does, of their own linear alone."""
    group = gaussian()
    weights = [w * torch.logspace(0, -2, len(w)).unsqueeze(1) for w in group.weights]
    weights[1] *= 30
    group = group_from(group.tokens, *weights)

    def whole(w: Tensor) -> Tensor:
        step = w.abs().amax() / 127
        return (w / step).round() * step

    target = Target(weight=whole, bits=8, one_scale=True)
    noise, error = ExpectedNoise(group, [target, target]), output_error(group, [target, target], "token")
    for scale in (torch.ones(32), scale_of(group)):
        assert 0.5 < float(noise(scale.log())) / error(scale) < 2
    by_rows = ExpectedNoise(group, [replace(target, one_scale=False)] * 2)
    assert float(by_rows(torch.zeros(32))) < 0.5 * float(noise(torch.zeros(32)))


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_a_common_factor_of_all_scales_changes_nothing(activations: Activations, group_size: int | None) -> None:
    group = gaussian()
    target = replace(by_row(8), activations=activations, group_size=group_size, symmetric=False)
    noise, scale = ExpectedNoise(group, [target, target]), scale_of(group)
    expected = float(noise(scale.log()))
    for factor in (1e-3, 7.0, 1e3):
        assert float(noise((scale * factor).log())) == pytest.approx(expected, rel=1e-4)


def test_inputs_of_one_sign_make_half_the_steps_with_a_zero_point_a_token() -> None:
    """Which is a quarter of the noise of inputs, here all of it."""
    group = gaussian()
    group = group_from(group.tokens.abs() + 0.1, *group.weights)
    target = Target(weight=lambda weight: weight, bits=16, activations="dynamic")
    found = [
        (
            float(ExpectedNoise(group, [own, own])(torch.zeros(32))),
            output_error(group, [own, own], "token")(torch.ones(32)),
        )
        for own in (target, replace(target, symmetric=False))
    ]
    for symmetric, asymmetric in zip(*found, strict=True):
        assert asymmetric == pytest.approx(symmetric / 4, rel=0.2)


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_that_of_finite_differences(activations: Activations, symmetric: bool, one_scale: bool) -> None:
    single = gaussian(tokens=24, channels=12)
    # in float64, so that differences are not lost in rounding
    group = group_from(single.tokens.double(), *(w.double() for w in single.weights))
    noise = ExpectedNoise(
        group, [replace(by_row(8), activations=activations, symmetric=symmetric, one_scale=one_scale)] * 2
    )
    at = scale_of(group).double().log().requires_grad_()
    noise(at).backward()
    assert at.grad is not None
    assert at.grad.abs().max() > 0
    with torch.no_grad():
        for channel in range(12):
            move = torch.zeros(12, dtype=torch.float64)
            move[channel] = 1e-6
            slope = float(noise(at + move) - noise(at - move)) / 2e-6
            assert float(at.grad[channel]) == pytest.approx(slope, rel=1e-3, abs=1e-9)
