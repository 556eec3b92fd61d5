"""Shrinkage of second moments, against loops in float64, and what it is worth where tokens are few."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantcli.quant import shrinkage
from quantcli.quant.gptq import factored
from quantcli.quant.grid import WeightGrid
from quantcli.quant.refine import output_error
from quantcli.quant.search import mse
from quantcli.quant.shrinkage import shrunk
from quantcli.quant.solver import solved

WIDTH = 128


def root(power: float = 1.0) -> Tensor:
    """R of inputs x = z R, z of variance one: mixed channels of different size, whose spectrum falls by a power."""
    generator = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))
    spectrum = torch.arange(1, WIDTH + 1).float() ** (-power / 2)
    return (turned * spectrum) @ turned.t() * torch.randn(WIDTH, generator=generator).exp()


def inputs(tokens: int, seed: int = 1, power: float = 1.0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) @ root(power)


def moments(x: Tensor) -> Tensor:
    return x.t() @ x / len(x)


def slow_share(x: Tensor) -> float:
    h, n = (x.double().t() @ x.double() / len(x)).tolist(), len(x)
    variances = squares = 0.0
    for i in range(len(h)):
        for j in range(len(h)):
            if i != j and h[i][i] > 0 and h[j][j] > 0:
                r = h[i][j] / math.sqrt(h[i][i] * h[j][j])
                variances += (1 - r**2) ** 2 / n
                squares += r**2
    return min(1.0, variances / squares)


@pytest.mark.parametrize("tokens", [4, 32, 1000])
@pytest.mark.parametrize("rows", [1024, 50])
def test_it_is_what_loops_find(tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrinkage, "ROWS", rows)
    x = inputs(tokens)
    x[:, 5] = 0
    h = moments(x)
    found, share = shrunk(h.clone(), tokens)
    assert share == pytest.approx(slow_share(x), rel=1e-4)
    assert torch.equal(found.diagonal(), h.diagonal())
    off = ~torch.eye(WIDTH, dtype=torch.bool)
    torch.testing.assert_close(found[off], h[off] * (1 - share))


def test_the_more_tokens_the_less() -> None:
    shares = [shrunk(moments(inputs(n)), n)[1] for n in (8, 64, 512, 20_000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.3
    assert shares[-1] < 0.01


def test_what_damping_does_already_is_left_to_it() -> None:
    h = moments(inputs(512))
    share = shrunk(h.clone(), 512)[1]
    found, none = shrunk(h.clone(), 512, damping=share / 2)
    assert torch.equal(found, h)
    assert none == 0
    assert shrunk(h.clone(), 512, damping=0.49 * share)[1] == share


def test_channels_without_anything_in_common_lose_what_chance_gave_them() -> None:
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    found, share = shrunk(moments(x), 64)
    assert share > 0.9
    assert (found - found.diagonal().diag()).abs().max() < 0.1


@pytest.mark.parametrize("hessian", [torch.zeros(4, 4), torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))])
def test_nothing_off_the_diagonal_is_left_alone(hessian: Tensor) -> None:
    found, share = shrunk(hessian.clone(), 3)
    assert torch.equal(found, hessian)
    assert share == 0


@pytest.mark.parametrize("tokens", [16, 64, 128, 256])
@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_solved_so_weights_lose_less_on_other_tokens(tokens: int, power: float) -> None:
    """Less than when solved without, and less than when found without any token; most where tokens are as many as
    channels."""
    weight = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(2))
    grid = WeightGrid(4, True, "group", 32, torch.float32)
    whole, h = root(power).t() @ root(power), moments(inputs(tokens, power=power))

    def lost(hessian: Tensor) -> float:
        return float(output_error(weight, solved(weight, grid, factored(hessian), 2)[0], whole).sum())

    without, found = lost(h.clone()), lost(shrunk(h.clone(), tokens)[0])
    assert found < (0.8 if tokens == WIDTH else 1.0) * without
    assert found < float(output_error(weight, mse(weight, grid, None), whole).sum())
