"""The target of asymmetric calibration, against least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli.quant.compensate import compensation, step_of

ROWS, WIDTH, TOKENS = 7, 12, 200


def passes(seed: int = 0, drift: float = 0.3, noise: float = 0.03) -> tuple[Tensor, Tensor, Tensor]:
    """W, x behind float layers, x̂ behind quantized ones: mixed channels of different size, errors that go along."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * 0.3 * WIDTH**-0.5 + torch.eye(WIDTH)
    x = torch.randn(TOKENS, WIDTH, generator=generator) @ mix * torch.randn(WIDTH, generator=generator).exp()
    change = torch.eye(WIDTH) + drift * torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5
    apart = torch.randn(TOKENS, WIDTH, generator=generator) * noise
    return torch.randn(ROWS, WIDTH, generator=generator), x, x @ change + apart


def moments(x: Tensor, behind: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """H = E[x̂ x̂ᵀ] and P = E[x̂ ((x − x̂) Wᵀ)ᵀ]."""
    return behind.t() @ behind / len(behind), behind.t() @ (x - behind) @ weight.t() / len(behind)


def compensated(weight: Tensor, hessian: Tensor, pull: Tensor, damping: float) -> Tensor:
    """W*, all of the way."""
    return weight.float() + step_of(hessian, pull, damping)


def distance(weight: Tensor, behind: Tensor, outputs: Tensor) -> float:
    return float((behind.double() @ weight.double().t() - outputs.double()).square().sum())


def test_without_damping_it_is_the_least_squares_fit_of_the_float_outputs() -> None:
    for seed in range(5):
        weight, x, behind = passes(seed)
        wanted = np.linalg.lstsq(behind.double().numpy(), (x @ weight.t()).double().numpy(), rcond=None)[0].T
        found = compensated(weight, *moments(x, behind, weight), damping=1e-9)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)
        outputs = x @ weight.t()
        assert distance(found, behind, outputs) < 1.0001 * distance(torch.from_numpy(wanted), behind, outputs)
        assert distance(found, behind, outputs) < 0.5 * distance(weight, behind, outputs)


def test_damping_draws_each_channel_back_by_its_second_moment() -> None:
    """Least squares with one more row a channel, sqrt(tokens · damping · H_jj) (w* − w)_j."""
    weight, x, behind = passes()
    hessian, drift = moments(x, behind, weight)
    pull = torch.diag((TOKENS * 0.2 * hessian.diagonal()).sqrt()).double()
    left = torch.cat((behind.double(), pull))
    right = torch.cat(((x.double() @ weight.double().t()), pull @ weight.double().t()))
    wanted = torch.linalg.lstsq(left, right).solution.t()
    torch.testing.assert_close(compensated(weight, hessian, drift, 0.2).double(), wanted, rtol=1e-3, atol=1e-3)
    much = compensated(weight, hessian, drift, 1e6)
    torch.testing.assert_close(much, weight, rtol=1e-3, atol=1e-3)


def test_inputs_that_did_not_change_leave_the_weight() -> None:
    weight, x, _ = passes()
    hessian, drift = moments(x, x, weight)
    assert torch.equal(compensated(weight, hessian, drift, 0.01), weight)
    assert compensation(weight, hessian, drift, drift, 0.5)[1:] == (0, 0)


def test_channels_that_never_held_anything_keep_their_weights() -> None:
    weight, x, behind = passes()
    x[:, [0, 5]] = behind[:, [0, 5]] = 0
    found = compensated(weight, *moments(x, behind, weight), damping=0.01)
    assert torch.equal(found[:, [0, 5]], weight[:, [0, 5]])
    assert not torch.equal(found, weight)


def test_weights_of_16_bits_are_taken_in_float32() -> None:
    weight, x, behind = passes()
    short = weight.bfloat16()
    found = compensated(short, *moments(x, behind, short.float()), damping=0.01)
    assert found.dtype == torch.float32
    assert torch.equal(found, compensated(short.float(), *moments(x, behind, short.float()), damping=0.01))


def test_a_hessian_that_does_not_factor_is_refused() -> None:
    hessian = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    with pytest.raises(ValueError, match="does not factor with 5%"):
        compensated(torch.ones(1, 2), hessian, torch.zeros(2, 1), 0.05)


def test_no_damping_that_does_is_told_from_no_gain() -> None:
    hessian = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    weight, pull = torch.ones(1, 2), torch.ones(2, 1)
    with pytest.raises(ValueError, match="does not factor with 300%"):
        compensation(weight, hessian, pull, pull, 0.5)
    assert compensation(weight, hessian.clamp(max=1), pull, -pull, 0.5)[1:] == (0, 0)


def test_a_step_that_harms_is_not_taken() -> None:
    weight, x, behind = passes()
    hessian, drift = moments(x, behind, weight)
    assert compensation(weight, hessian, drift, drift, 0.5, (0.05,))[2] > 0.9
    target, damping, share = compensation(weight, hessian, drift, -drift, 0.5, (0.05,))
    assert torch.equal(target, weight)
    assert (damping, share) == (0, 0)
    assert compensation(weight, hessian, drift, drift * 5, 0.5, (0.05,))[2] == 1


def test_compensation_takes_the_damping_and_share_that_held_out_tokens_prefer() -> None:
    inside = 0
    for seed in range(20):
        weight, x, behind = passes(seed, drift=0.05, noise=0.2)
        fit, check = slice(0, 40), slice(40, 60)
        hessian, pull = moments(x[:60], behind[:60], weight)
        _, fitted = moments(x[fit], behind[fit], weight)
        _, held_out = moments(x[check], behind[check], weight)
        target, damping, share = compensation(weight, hessian, fitted, held_out, 1 / 3, (0.05, 0.5, 5.0))

        def lowered(tried: Tensor, hessian: Tensor = hessian, held_out: Tensor = held_out, w: Tensor = weight) -> float:
            step = (tried - w).double()
            return float(2 * (step * held_out.t()).sum() - ((step @ hessian.double()) * step).sum())

        best = max(
            lowered(torch.lerp(weight, compensated(weight, hessian, fitted, other), t / 50))
            for other in (0.05, 0.5, 5.0)
            for t in range(51)
        )
        if not share:
            assert best <= 1e-6
            assert torch.equal(target, weight)
            continue
        chosen = torch.lerp(weight, compensated(weight, hessian, fitted, damping), share)
        assert lowered(chosen) >= best - 1e-5
        wanted = torch.lerp(weight, compensated(weight, hessian, pull, damping), share)
        torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-4)
        shares = [t / 200 for t in range(201)]
        steps = [lowered(torch.lerp(weight, compensated(weight, hessian, fitted, damping), t)) for t in shares]
        assert share == pytest.approx(shares[int(np.argmax(steps))], abs=6e-3)
        inside += 0 < share < 1
    assert inside, "some of the shares are neither bound"
