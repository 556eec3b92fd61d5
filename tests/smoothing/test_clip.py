"""Bounds of weights: the best of the tried ones for each row and group, by a slow search over real outputs."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.quant.grid import WeightGrid, dequantize
from quantcli.quant.minmax import minmax
from quantcli.smoothing import clip
from quantcli.smoothing.clip import COARSE_RATIOS, RATIOS, clamped, clip_bounds
from quantcli.smoothing.objective import Target

GRID = WeightGrid(4, True, "group", 8, torch.float32, True)


def quantized(weight: Tensor) -> Tensor:
    return dequantize(minmax(weight, GRID, None))


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 24, generator=generator)
    weight[:, 5] = 6  # an outlier in each row whose input is nearly always small
    tokens = torch.randn(200, 24, generator=generator)
    tokens[:, 5] *= 0.01
    return weight, tokens


def test_the_bound_is_the_best_of_those_tried_by_a_search_over_outputs() -> None:
    weight, tokens = example()
    bounds = clip_bounds(weight, tokens, quantized, 8, sweeps=0)
    for row in range(6):
        for group in range(3):
            part = slice(8 * group, 8 * group + 8)
            losses = {}
            for ratio in RATIOS:
                bound = float(weight[row, part].abs().max()) * ratio
                trial = weight.clone()
                trial[row, part] = trial[row, part].clamp(-bound, bound)
                lost = (quantized(trial)[row, part] - weight[row, part]).double()
                losses[bound] = float((tokens[:, part].double() @ lost).square().sum())
            best = min(losses, key=losses.__getitem__)
            chosen = min(losses, key=lambda bound: abs(bound - float(bounds[row, group])))
            assert losses[chosen] <= losses[best] * (1 + 1e-4)


def related() -> tuple[Tensor, Tensor]:
    """Inputs of different groups that go together, so that errors can cancel each other."""
    generator = torch.Generator().manual_seed(4)
    causes = torch.randn(200, 6, generator=generator)
    return torch.randn(6, 24, generator=generator), causes @ torch.randn(6, 24, generator=generator)


def lost(weight: Tensor, tokens: Tensor, bounds: Tensor) -> Tensor:
    """What each row's output loses: float64 [out]."""
    error = (quantized(clamped(weight, bounds)) - weight).double()
    return (tokens.double() @ error.t()).square().sum(0)


def test_no_bound_of_a_group_can_be_changed_for_the_better_behind_the_sweeps() -> None:
    weight, tokens = related()
    bounds = clip_bounds(weight, tokens, quantized, 8, sweeps=100)
    least = lost(weight, tokens, bounds)
    for row in range(6):
        for group in range(3):
            for ratio in RATIOS:
                other = bounds.clone()
                other[row, group] = weight[row, 8 * group : 8 * group + 8].abs().max() * ratio
                assert lost(weight, tokens, other)[row] >= least[row] * (1 - 1e-4)


def test_errors_of_groups_cancel() -> None:
    weight, tokens = related()
    alone, joint = (lost(weight, tokens, clip_bounds(weight, tokens, quantized, 8, sweeps=n)) for n in (0, 2))
    assert (joint <= alone * (1 + 1e-4)).all()
    assert joint.sum() < 0.8 * alone.sum()


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 60),
    causes=st.integers(1, 24),
    sweeps=st.integers(1, 4),
    spread=st.floats(0, 2),
)
def test_joint_bounds_lose_no_more_on_their_tokens_than_each_group_alone(
    seed: int, tokens: int, causes: int, sweeps: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 24, generator=generator) * torch.exp(spread * torch.randn(24, generator=generator))
    inputs = torch.randn(tokens, causes, generator=generator) @ torch.randn(causes, 24, generator=generator)
    alone, joint = (lost(weight, inputs, clip_bounds(weight, inputs, quantized, 8, sweeps=n)) for n in (0, sweeps))
    size = (inputs.double() @ weight.double().t()).square().sum(0)
    assert (joint <= alone * (1 + 1e-4) + 1e-9 * size).all()


def test_joint_bounds_are_close_to_the_best_of_all_combinations() -> None:
    """Of 125 a row, of which five rows of six get the best."""
    weight, tokens = related()
    largest = weight.unflatten(1, (3, 8)).abs().amax(2)
    every = [lost(weight, tokens, largest * torch.tensor(one)) for one in product(COARSE_RATIOS, repeat=3)]
    best = torch.stack(every).amin(0)
    joint, alone = (
        lost(weight, tokens, clip_bounds(weight, tokens, quantized, 8, COARSE_RATIOS, sweeps=n)) for n in (2, 0)
    )
    assert (joint >= best * (1 - 1e-4)).all()
    assert int((joint <= best * (1 + 1e-4)).sum()) >= 5
    assert joint.sum() < 1.1 * best.sum()
    assert alone.sum() > 1.15 * best.sum()


def tensor_quantized(weight: Tensor) -> Tensor:
    return dequantize(minmax(weight, WeightGrid(4, True, "tensor", None, torch.float32, True), None))


@pytest.mark.parametrize("tokens", [10, 200])
def test_one_scale_for_all_rows_has_one_bound_which_is_judged_on_all_of_them(tokens: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(6, 24, generator=generator), torch.randn(tokens, 24, generator=generator)
    weight[2, 5] = 6  # the step of every row
    inputs[:, 5] *= 0.01
    target = Target(tensor_quantized, 4, one_scale=True, clipped=True)
    bounds = target.bounds(weight, inputs)
    assert bounds.shape == (1, 1)
    losses = {}
    for ratio in RATIOS:
        bound = 6 * ratio
        error = (tensor_quantized(weight.clamp(-bound, bound)) - weight).double()
        losses[bound] = float((inputs.double() @ error.t()).square().sum())
    chosen = min(losses, key=lambda bound: abs(bound - float(bounds)))
    assert losses[chosen] <= min(losses.values()) * (1 + 1e-4)
    assert float(bounds) < 6
    assert torch.equal(clamped(weight, bounds), weight.clamp(-float(bounds), float(bounds)))


def test_rows_have_the_same_bounds_when_few_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, tokens = related()
    whole = clip_bounds(weight, tokens, quantized, 8)
    monkeypatch.setattr(clip, "_ELEMENTS", 1)
    assert torch.equal(clip_bounds(weight, tokens, quantized, 8), whole)


def test_an_outlier_that_meets_small_inputs_is_clipped_and_the_output_gains() -> None:
    weight, tokens = example()
    bounds = clip_bounds(weight, tokens, quantized, 8)
    assert (bounds[:, 0] < weight[:, :8].abs().amax(1)).all()
    output = tokens @ weight.t()
    plain = (tokens @ quantized(weight).t() - output).square().sum()
    better = (tokens @ quantized(clamped(weight, bounds)).t() - output).square().sum()
    assert better < 0.5 * plain


def test_clamped_holds_every_group_within_its_bound_and_changes_nothing_inside() -> None:
    weight, _ = example()
    bounds = torch.full((6, 3), 1.5)
    held = clamped(weight, bounds)
    assert held.abs().max() <= 1.5
    inside = weight.abs() <= 1.5
    assert torch.equal(held[inside], weight[inside])


def test_without_groups_there_is_one_bound_a_row() -> None:
    weight, tokens = example()
    grid = WeightGrid(4, True, "channel", None, torch.float32, True)
    bounds = clip_bounds(weight, tokens, lambda w: dequantize(minmax(w, grid, None)), None)
    assert bounds.shape == (6, 1)
    assert torch.equal(clamped(weight, weight.abs().amax(1, keepdim=True)), weight)
