"""Second moments between channels against float64, and which batches the second pass is checked on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantcli.calibration.hessian import HELD_OUT, MOST_ATTENDED, WIDE, Hessian, attended, shares


def batches(width: int, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Inputs whose channels are mixed and of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) * 0.5 * width**-0.5
    size = (torch.randn(width, generator=generator) * 2).exp()
    return [torch.randn(*shape, width, generator=generator) @ mix * size for shape in shapes]


def slow_moments(inputs: list[Tensor], others: list[Tensor] | None = None) -> Tensor:
    """E[x yᵀ] in float64; y is x unless given."""
    x, y = (torch.cat([t.double().flatten(0, -2) for t in each]) for each in (inputs, others or inputs))
    return x.t() @ y / len(x)


def relative(found: Tensor, wanted: Tensor, inputs: list[Tensor]) -> float:
    """The largest distance, each against the geometric mean of the two second moments."""
    diagonal = slow_moments(inputs).diagonal()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    return float(((found.double() - wanted) * unit * unit[:, None]).abs().max())


WIDTHS = [1, 5, 255, 515, WIDE, WIDE + 7]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_moments_are_those_of_all_tokens(width: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [batch.to(dtype) for batch in batches(width, (2, 9), (1, 30), (17,))]
    hessian = Hessian(width, "cpu")
    for batch in inputs:
        hessian.update(batch)
    assert hessian.tokens == 65
    assert hessian.pulls(torch.eye(width)) is None
    found = hessian.moments()
    assert found.dtype == torch.float32
    assert torch.equal(found, found.t())
    assert relative(found, slow_moments(inputs), inputs) < tolerance


def test_batches_of_any_cut_give_the_same() -> None:
    (whole,) = batches(20, (64,))
    one, many = Hessian(20, "cpu"), Hessian(20, "cpu")
    one.update(whole)
    for piece in whole.split((1, 30, 2, 31)):
        many.update(piece)
    assert relative(many.moments(), one.moments().double(), [whole]) < 1e-6


def test_no_tokens_give_zeros() -> None:
    assert torch.equal(Hessian(4, "cpu").moments(), torch.zeros(4, 4))


def test_a_batch_with_values_that_are_not_finite_shows() -> None:
    (x,) = batches(6, (10,))
    x[3, 2] = torch.inf
    hessian = Hessian(6, "cpu")
    hessian.update(x)
    assert not bool(torch.isfinite(hessian.moments().diagonal()).all())


@pytest.mark.parametrize("count", [2, HELD_OUT, 2 * HELD_OUT + 3])
def test_every_batch_of_the_second_pass_is_on_one_of_two_sides(count: int) -> None:
    """The other pass differs by one channel of its own in each batch, which tells where the batch went."""
    inputs = batches(count, *[(1, 6 + i) for i in range(count)])
    hessian = Hessian(count, "cpu")
    for index, x in enumerate(inputs):
        y = x.clone()
        y[..., index] += 1
        hessian.update(x, y)
    drifts = hessian.pulls(torch.eye(count))
    assert drifts is not None
    sides = [{i for i in range(count) if bool(drift[:, i].any())} for drift in drifts]
    assert sides[0].isdisjoint(sides[1])
    assert sides[0] | sides[1] == set(range(count))
    assert sides[1] == set(range(1, count, HELD_OUT)), "one of so many, from the second on"
    for side, drift in zip(sides, drifts, strict=True):
        chosen = [inputs[i] for i in sorted(side)]
        marks = [torch.zeros_like(inputs[i]).index_fill_(-1, torch.tensor(i), 1.0) for i in sorted(side)]
        torch.testing.assert_close(drift.double(), slow_moments(chosen, marks), rtol=1e-5, atol=1e-6)


def test_drifts_are_of_the_batches_that_have_another_pass() -> None:
    inputs = batches(9, (2, 7), (1, 30), (1, 11), (3, 4))
    others = [x + torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(inputs)]
    hessian = Hessian(9, "cpu")
    for index, (x, y) in enumerate(zip(inputs, others, strict=True)):
        hessian.update(x, y if index < 2 else None)
    drifts = hessian.pulls(torch.eye(9))
    assert drifts is not None
    for drift, index in zip(drifts, (0, 1), strict=True):
        wanted = slow_moments([inputs[index]], [others[index] - inputs[index]])
        torch.testing.assert_close(drift.double(), wanted, rtol=1e-4, atol=1e-4)
    assert relative(hessian.moments(), slow_moments(inputs), inputs) < 1e-5


def test_one_batch_of_another_pass_leaves_none_to_check_it_on() -> None:
    x, y = batches(5, (8,), (8,))
    hessian = Hessian(5, "cpu")
    hessian.update(x, y)
    hessian.update(y)
    assert hessian.pulls(torch.eye(5)) is None


@pytest.mark.parametrize("direct", [False, True])
def test_shares_weigh_what_is_compared_and_nothing_else(direct: bool) -> None:
    """What the outputs lack is the same whether it is summed itself, or found from what the inputs lack."""
    generator = torch.Generator().manual_seed(5)
    width = WIDE + 8
    weight = torch.randn(3, width, generator=generator)
    hessian, plain = (Hessian(width, "cpu", weight if direct else None) for _ in range(2))
    sides: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], []]
    for batch in range(3):
        x, y = torch.randn(2, 2, 5, width, generator=generator)
        lack, share = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, generator=generator)
        hessian.update(x, y, lack, share)
        plain.update(x, y, lack)
        sides[batch == 1].append((x, (y - x) @ weight.t() + lack, share))
    compared, pulls = hessian.compared_moments(), hessian.pulls(weight)
    assert compared is not None
    assert pulls is not None

    def mean(side: list[tuple[Tensor, Tensor, Tensor]], right: Callable[..., Tensor]) -> Tensor:
        parts = [(a.unsqueeze(-1) * x).flatten(0, 1).double().t() @ right(x, e).flatten(0, 1).double()
                 for x, e, a in side]  # fmt: skip
        return torch.stack(parts).sum(0) / (10 * len(side))

    def close(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)

    close(compared, mean(sides[0] + sides[1], lambda x, e: x))
    for pull, side in zip(pulls, sides, strict=True):
        close(pull, mean(side, lambda x, e: e))
    assert torch.equal(hessian.moments(), plain.moments())
    assert plain.compared_moments() is None
    hessian.forget_compared()
    assert hessian.compared_moments() is None


def test_sums_of_float16_inputs_do_not_leave_its_range() -> None:
    inputs = [(32 * batch / batch.abs().max()).half() for batch in batches(24, (2, 700), (1, 1500))]
    inputs[0][0, 0, 3] = 400.0  # a massive activation, whose square is beyond 65504
    others = [batch + 1 for batch in inputs]
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    for given in (None, weight.half()):
        hessian = Hessian(24, "cpu", given)
        for batch, other in zip(inputs, others, strict=True):
            hessian.update(batch, other, torch.ones(*batch.shape[:-1], 7).half())
        pulls = hessian.pulls(weight)
        assert pulls is not None
        assert all(bool(torch.isfinite(pull).all()) for pull in pulls)
        assert relative(hessian.moments(), slow_moments(inputs), inputs) < 1e-5


@pytest.mark.parametrize("direct", [False, True])
def test_importance_counts_in_everything(direct: bool) -> None:
    """As if each token, what it is in the other pass and what is lacking were that much larger."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(3, 12, generator=generator)
    weighed, larger = (Hessian(12, "cpu", weight if direct else None) for _ in range(2))
    for _ in range(3):
        x, y = torch.randn(2, 2, 5, 12, generator=generator)
        lack, share = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, generator=generator)
        importance = torch.rand(2, 5, generator=generator) * 100
        root = importance.sqrt().unsqueeze(-1)
        weighed.update(x, y, lack, share, importance)
        larger.update(x * root, y * root, lack * root, share)
    assert weighed.tokens == larger.tokens
    torch.testing.assert_close(weighed.moments(), larger.moments())
    torch.testing.assert_close(weighed.compared_moments(), larger.compared_moments())
    for one, other in zip(weighed.pulls(weight) or [None], larger.pulls(weight) or (), strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_of_small_values_count_by_that() -> None:
    values = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], [[30.0, 40.0], [0.0, 2.5], [5.0, 0.0]]])
    assert attended(values).dtype == torch.float32
    assert attended(values).tolist() == [pytest.approx([1, 25, MOST_ATTENDED]), [1, 1, 1]], "the median is 2.5²"
    assert shares(values).tolist() == [pytest.approx([0.25, 1, 1]), pytest.approx([0.0025, 1, 0.25])]
    assert attended(torch.zeros(2, 3, 4)).tolist() == [[1.0] * 3] * 2


def test_what_a_sink_is_off_by_counts() -> None:
    """A token of which a weight makes nothing, among many of which it makes something."""
    generator = torch.Generator().manual_seed(0)
    weight, noise = torch.randn(2, 8, 16, generator=generator)
    x = torch.randn(1, 400, 16, generator=generator)
    x[0, 0] = 20 * torch.linalg.svd(weight).Vh[-1]
    errors = []
    for importance in (None, attended(x @ weight.t())):
        hessian = Hessian(16, "cpu")
        hessian.update(x, importance=importance)
        errors.append(float(((noise @ hessian.moments()) * noise).sum()))
    sink = float((x[0, 0] @ noise.t()).square().sum()) / 400
    assert errors[1] - errors[0] > (MOST_ATTENDED - 1) * sink > errors[0]
