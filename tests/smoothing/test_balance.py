"""Scales that give a channel as much of its group's range as of its error: against slow minima, and GPTQ itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantcli.quant.gptq import factored
from quantcli.quant.grid import WeightGrid, dequantize
from quantcli.quant.solver import solved
from quantcli.smoothing.balance import POWER, balance
from quantcli.smoothing.group import Group

CHANNELS = 32


def correlated(seed: int, tokens: int = 4000) -> Tensor:
    """Second moments [CHANNELS, CHANNELS] of inputs that mix, some channels larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, CHANNELS, generator=generator) @ torch.randn(CHANNELS, CHANNELS, generator=generator)
    x = mixed * torch.randn(CHANNELS, generator=generator).mul(0.7).exp()
    return x.t() @ x / tokens


def group_of(
    moments: Tensor, *weights: Tensor, ranges: tuple[int | None, ...] = (), channels: Tensor | None = None
) -> Group:
    """The group of weights that read inputs of these moments."""
    nothing = torch.zeros(len(moments))
    return Group(
        weights=weights,
        channels=torch.arange(len(moments)) if channels is None else channels,
        minimum=nothing,
        maximum=nothing,
        mean_absolute=nothing,
        centred_maximum=nothing,
        spread=0.0,
        tokens=nothing[None],
        ranges=ranges or (16,) * len(weights),
        moments=moments.clone(),
        counted=10**9,
    )


def uneven(seed: int, rows: int = 24) -> Tensor:
    """Weights whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CHANNELS, generator=generator) * torch.randn(CHANNELS, generator=generator).mul(0.5).exp()


def log_loss(log: Tensor, group: Group) -> Tensor:
    """Σ_l ln L_l as the docstring has it, one group of one row after the other, in float64."""
    order, factor = (curvature := factored(group.moments)).order, curvature.factor.double()
    costs = {int(c): 1 / float(factor[i, i]) ** 2 for i, c in enumerate(order)}
    scale, total = log[group.channels].exp(), torch.zeros((), dtype=torch.float64)
    for weight, width in zip(group.weights, group.ranges, strict=True):
        lost = torch.zeros((), dtype=torch.float64)
        for start in range(0, CHANNELS if width else 0, width or 1):
            own = range(start, start + width)
            noise = sum(costs[c] / scale[c] ** 2 for c in own)
            for row in weight.double():
                lost = lost + noise * sum((row[c].abs() * scale[c]) ** POWER for c in own) ** (2 / POWER)
        total = total + lost.log() if width else total
    return total


@pytest.mark.parametrize("shared", [False, True])
def test_no_scale_has_a_noticeably_smaller_loss(shared: bool) -> None:
    channels = torch.arange(CHANNELS) // 2 if shared else torch.arange(CHANNELS)
    weights = uneven(1, rows=3), uneven(2, rows=2), uneven(3, rows=2)
    group = group_of(correlated(4), *weights, ranges=(16, None, 32), channels=channels)
    found = balance(group, lambda _scale: 0.0)
    start = torch.zeros(int(channels.max()) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([start], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = log_loss(start, group)
        loss.backward()
        return loss

    before = float(log_loss(torch.zeros_like(start), group))
    optimizer.step(closure)
    least = float(log_loss(start.detach(), group))
    first = torch.stack([(channels == c).nonzero()[0, 0] for c in range(len(start))])
    reached = float(log_loss(found.scale[first].double().log(), group))
    assert least < before - 0.2
    assert reached - least < 0.02 * (before - least)
    assert found.facts["loss"] == pytest.approx(torch.tensor((reached - before) / 2).exp().item(), rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_errs_less_behind_it(bits: int, seed: int) -> None:
    moments, weight = correlated(seed + 10), uneven(seed + 20)
    grid = WeightGrid(bits, granularity="group", group_size=16)

    def error(scale: Tensor) -> float:
        scaled, own = weight * scale, moments / (scale * scale[:, None])
        lost = scaled - dequantize(solved(scaled, grid, factored(own), 2)[0])
        return float(((lost @ own) * lost).sum())

    scale = balance(group_of(moments, weight), lambda _scale: 0.0).scale
    assert error(scale) < 0.9 * error(torch.ones(CHANNELS))


def test_scales_even_out_columns_where_all_channels_cost_the_same() -> None:
    sizes = torch.linspace(1, 4, CHANNELS)
    weight = torch.ones(8, CHANNELS) * sizes
    scale = balance(group_of(torch.eye(CHANNELS), weight), lambda _scale: 0.0).scale
    for group in range(2):
        scaled = (scale * sizes)[16 * group : 16 * group + 16]
        assert float(scaled.max() / scaled.min()) < 1.4  # 1.8 and 2.1 before; all the same for an infinite power
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-5)


def test_float_linears_and_what_tells_nothing_leave_scales_at_one() -> None:
    moments, weight = correlated(5), uneven(6)
    ones = torch.ones(CHANNELS)
    assert torch.equal(balance(group_of(moments, weight, ranges=(None,)), lambda _scale: 0.0).scale, ones)
    assert torch.equal(balance(group_of(moments, torch.zeros_like(weight)), lambda _scale: 0.0).scale, ones)
    assert torch.equal(balance(group_of(-moments, weight), lambda _scale: 0.0).scale, ones)
    alone = balance(group_of(moments, weight), lambda _scale: 0.0).scale
    beside = balance(group_of(moments, weight, uneven(7), ranges=(16, None)), lambda _scale: 0.0).scale
    assert torch.equal(alone, beside)


def test_a_channel_that_nobody_reads_or_that_holds_nothing_stays() -> None:
    moments, weight = correlated(8), uneven(9)
    weight[:, 3] = 0
    moments[5] = moments[:, 5] = 0
    scale = balance(group_of(moments, weight), lambda _scale: 0.0).scale
    assert float(scale[3]) == float(scale[5]) == 1.0
    assert float((scale[6:] / scale[6]).log().abs().max()) > 0.1


def test_few_tokens_are_drawn_to_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, weight = torch.randn(20, CHANNELS, generator=generator), uneven(1)
    group = replace(group_of(torch.eye(CHANNELS), weight), tokens=tokens, moments=None)
    moments = tokens.t() @ tokens / 20
    independent = group_of(torch.diag(moments.diagonal()), weight)
    kept, apart = (balance(each, lambda _scale: 0.0).scale for each in (group, independent))
    whole = balance(group_of(moments, weight), lambda _scale: 0.0).scale
    assert float((kept - apart).abs().max()) < 0.3 * float((whole - apart).abs().max())
