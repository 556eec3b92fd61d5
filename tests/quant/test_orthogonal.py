from __future__ import annotations

import math
from functools import reduce

import pytest
import torch

from quantcli.quant.orthogonal import Rotation, kronecker_factors, orthogonal_factor

SIZES = [1, 2, 3, 13, 26, 36, 64, 96, 100, 117, 171, 576, 896]
LARGE = [1536, 2048, 3200, 4864, 6656, 11008, 16384, 18944]


def matrix_of(rotation: Rotation) -> torch.Tensor:
    """R by its definition, written out."""
    factors = [orthogonal_factor(order) for order in rotation.factors]
    mixing = reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64))
    if rotation.keeps_ones:
        return mixing.T @ torch.diag(rotation.signs) @ mixing
    return torch.diag(rotation.signs) @ mixing


def peak(x: torch.Tensor) -> float:
    return float(x.abs().max() / x.square().mean().sqrt())


@pytest.mark.parametrize("order", [4, 12, 20, 28, 36, 44, 52, 60, 64, 100, 108, 140, 148])
def test_hadamard_factors(order: int) -> None:
    matrix = orthogonal_factor(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-14, atol=0)
    assert bool((matrix[0] > 0).all())


@pytest.mark.parametrize("order", [3, 13, 43])
def test_odd_factors_are_cosines(order: int) -> None:
    matrix = orthogonal_factor(order)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)
    assert matrix[0].tolist() == [1 / math.sqrt(order)] * order
    assert float(matrix.abs().max()) <= math.sqrt(2 / order)


@pytest.mark.parametrize(
    ("size", "factors"),
    [
        (4096, (64, 64)),
        (576, (4, 12, 12)),  # 9 needs two factors of 3·4
        (1536, (8, 12, 16)),
        (3584, (8, 16, 28)),
        (6656, (8, 16, 52)),  # 52 = 2 (25 + 1), of GF(25)
        (18944, (8, 16, 148)),
        (11008, (16, 16, 43)),  # no Paley matrix has an order of 43·2^n below the bound
        (117, (3, 3, 13)),
    ],
)
def test_factors(size: int, factors: tuple[int, ...]) -> None:
    assert kronecker_factors(size) == factors


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_matrix_written_out(size: int, keeps_ones: bool) -> None:
    rotation = Rotation(size, seed=3, keeps_ones=keeps_ones)
    matrix = matrix_of(rotation)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.apply_transposed(x), x @ matrix.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.apply(x.float()), (x @ matrix).float(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("size", LARGE)
def test_large_sizes_keep_products_and_are_undone(size: int, keeps_ones: bool) -> None:
    rotation = Rotation(size, seed=0, keeps_ones=keeps_ones)
    x = torch.randn(6, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = rotation.apply(x)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(rotation.apply_transposed(y), x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("size", [64, 576, *LARGE])
def test_spreads_outliers(size: int, keeps_ones: bool) -> None:
    rotation = Rotation(size, seed=0, keeps_ones=keeps_ones)
    channels = torch.zeros(3, size, dtype=torch.float64)
    channels[[0, 1, 2], [0, size // 3, size - 1]] = 1.0
    even = math.sqrt(2.0) if any(order % 2 for order in rotation.factors) else 1.0
    # each entry is a sum of random signs if ones are kept: 2 in 10^9 such sums exceed six deviations
    bound = 6.0 * even if keeps_ones else even + 1e-9
    for channel in channels:
        assert peak(channel) == pytest.approx(math.sqrt(size))
        assert peak(rotation.apply(channel)) <= bound
    x = torch.randn(16, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, size // 3] *= 100.0
    assert peak(rotation.apply(x)) < 0.6 * peak(x)


@pytest.mark.parametrize("size", [64, 1536, 4096])
def test_does_not_gather_what_is_equal_in_all_channels(size: int) -> None:
    assert peak(Rotation(size, seed=0).apply(torch.ones(size, dtype=torch.float64))) < 5.0


@pytest.mark.parametrize("size", [13, 64, 768, 8192])
def test_commutes_with_the_removal_of_the_mean(size: int) -> None:
    rotation = Rotation(size, seed=5, keeps_ones=True)
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(ones), ones, rtol=0, atol=1e-12)
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 2.0
    turned = rotation.apply(x)
    torch.testing.assert_close(turned.mean(-1), x.mean(-1), rtol=0, atol=1e-12)
    assert float((turned - x).abs().mean()) > 0.5  # and yet it is no identity


def test_the_seed_decides() -> None:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for keeps_ones in (False, True):
        first = Rotation(96, 7, keeps_ones).apply(x)
        assert torch.equal(first, Rotation(96, 7, keeps_ones).apply(x))
        assert not torch.allclose(first, Rotation(96, 8, keeps_ones).apply(x))
    # the same on every machine and in every version: runs are resumed and exports verified by it
    assert Rotation(12, 0).signs.tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1]


def test_refuses_what_it_cannot_turn() -> None:
    with pytest.raises(ValueError, match="positive"):
        Rotation(0, 0)
    with pytest.raises(ValueError, match=r"takes float32 or float64 \[..., 8\]"):
        Rotation(8, 0).apply(torch.ones(2, 4))
    with pytest.raises(ValueError, match="bfloat16"):
        Rotation(8, 0).apply_transposed(torch.ones(8, dtype=torch.bfloat16))
