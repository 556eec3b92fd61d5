"""`auto` never loses on the tokens that it judges by, and finds outliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from test_objective import by_row
from test_smoothing_methods import SHARED, group_from, random_group

from quantcli.smoothing.auto import MEASURED, _trials, auto, downhill
from quantcli.smoothing.awq import awq
from quantcli.smoothing.group import Group
from quantcli.smoothing.objective import ExpectedNoise, output_error
from quantcli.smoothing.outliers import cbq, outlier_suppression
from quantcli.smoothing.strength import flex, iterative, smoothquant

Activations = Literal["none", "static", "dynamic"]


@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
@pytest.mark.parametrize("bits", [4, 8])
def test_auto_is_never_worse_than_nothing(activations: Activations, bits: int) -> None:
    """Whether there are outliers or not, and whether scales have to be shared or not."""
    target = replace(by_row(bits), activations=activations)
    for seed in range(3):
        for channels in (None, SHARED):
            group = random_group(seed, channels, outlier=5 if seed % 2 else None)
            found = auto(group, group, [target, target])
            error = output_error(group, [target, target], "token")
            assert error(found.scale) <= error(torch.ones(16))
            assert error(found.scale) == pytest.approx(found.facts["error"], rel=1e-5)
            assert bool((torch.isfinite(found.scale) & (found.scale > 0)).all())


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_auto_finds_a_planted_outlier(activations: Activations) -> None:
    group = random_group(1, outlier=5)
    target = replace(by_row(8), activations=activations)
    found = auto(group, group, [target, target])
    others = torch.cat([found.scale[:5], found.scale[6:]])
    assert int(found.scale.argmax()) == 5
    assert found.scale[5] > 3 * others.max()
    error = output_error(group, [target, target], "token")
    assert error(found.scale) < 0.5 * error(torch.ones(16))


@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_auto_tries_every_method(activations: Activations) -> None:
    """Its error is no larger than that of the scale of any, each at its own strength, but for what searches alone."""
    target = replace(by_row(8), activations=activations)
    for seed in range(4):
        group = random_group(seed, outlier=5 if seed % 2 else None)
        trials = _trials(group, [target, target])
        assert {"outlier_suppression", "cbq", "none"} < set(trials)
        assert len(trials) == MEASURED + 3
        error = output_error(group, [target, target], "token")
        least = min(error(make(group)) for make in trials.values())
        assert auto(group, group, [target, target]).facts["error"] <= least
        for method in (smoothquant, iterative):
            assert least <= 1.1 * error(method(group, error).scale)
        for method in (outlier_suppression, awq, cbq, flex):
            assert least <= 1.25 * error(method(group, error).scale), method


@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_channels_of_one_producer_share_a_scale(activations: Activations) -> None:
    group = random_group(2, SHARED)
    scale = auto(group, group, [replace(by_row(4), activations=activations)] * 2).scale
    for producer in set(SHARED):
        own = scale[group.channels == producer]
        assert torch.equal(own, own[:1].expand_as(own))
    assert scale.unique().numel() > 1


def test_a_descent_is_judged_by_tokens_that_it_has_not_seen() -> None:
    """Tokens that are unlike the others lead a descent astray: what it found is not kept."""
    group = random_group(1, outlier=5)
    target = replace(by_row(8), activations="dynamic")
    odd = group.tokens[:8].clone()
    odd[:, 5] /= 60
    odd[:, 11] *= 60
    astray = replace(group, fitted=odd)
    found = auto(astray, astray, [target, target])
    assert "descent" in str(auto(group, group, [target, target]).facts["chosen"])
    assert "descent" not in str(found.facts["chosen"])
    assert found.facts["error"] == pytest.approx(output_error(group, [target, target], "token")(found.scale), rel=1e-5)


def test_a_descent_that_starts_from_nothing_moves() -> None:
    """All scales are 1 there, as that of a channel without input is, which stays."""
    group = random_group(1, outlier=5)
    x = group.tokens.clone()
    x[:, 2] = 0
    dead = group_from(x, *group.weights)
    noise = ExpectedNoise(dead, [replace(by_row(8), activations="dynamic")] * 2)
    moved = downhill(torch.ones(16), dead, noise)
    assert float(noise(moved.log())) < 0.9 * float(noise(torch.zeros(16)))
    assert moved[2] == 1


def test_auto_sees_the_range_that_is_the_mean_of_samples() -> None:
    """A channel that is massive in one sample of many: by extremes it sets the step, by their mean it does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 10, 16, generator=generator)
    x[0, 0, 5] = 400.0
    group = group_from(x[1:].flatten(0, 1), *random_group(1).weights)
    group = replace(group, maximum=x.amax((0, 1)), sample_extremes=torch.stack((x.amin(1), x.amax(1))))
    target = replace(by_row(8), activations="static")
    extremes, mean = (auto(group, group, [each, each]).scale for each in (target, replace(target, averaged=True)))
    assert extremes[5] / extremes.median() > 3 * mean[5] / mean.median()


def test_dead_channels_get_a_usable_scale() -> None:
    group = random_group(3)
    x, weights = group.tokens.clone(), [w.clone() for w in group.weights]
    x[:, 2] = 0
    for weight in weights:
        weight[:, 7] = 0
    dead: Group = group_from(x, *weights)
    scale = auto(dead, dead, [replace(by_row(8), activations="dynamic")] * 2).scale
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
