"""Orthogonal matrices that spread outliers, for any size, applied without ever forming them.

A Hadamard matrix of order h has entries ±1 and orthogonal rows; divided by √h it is orthogonal, and a channel goes
into all channels with equal weight. Kronecker products of such matrices are such matrices. Orders come from Sylvester
(powers of two) and from Paley's two constructions (https://en.wikipedia.org/wiki/Paley_construction) over GF(p) and
GF(p²). An odd factor for which no order fits is filled with the orthonormal DCT-II, which spreads almost as evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

import torch
from torch import Tensor

# Products with larger factors cost more than they gain; 64 keeps a factor and a piece of the input in the cache.
LARGEST_POWER_OF_TWO = 64
LARGEST_PALEY_ORDER = 512


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix R [size, size], the same for the same size, seed and kind.

    Plain: R = diag(s)·H with H = ⊗ Hᵢ/√hᵢ and random signs s (QuaRot, https://arxiv.org/abs/2404.00456). The signs come
    first, so that no fixed direction, such as the mean of the channels, is gathered in one channel.

    keeps_ones: R = Hᵀ·diag(1, s)·H. The first row of H is constant, so R maps the all-ones direction to itself and
    x ↦ x − mean(x) commutes with it, which LayerNorm needs. An entry is a sum of `size` random signs over `size`: an
    outlier spreads as normal numbers do, to within √(2 ln size) of evenly.

    The cost of applying it is the sum of `factors` multiplications an element (twice that with keeps_ones); nothing
    larger is stored than the largest factor, squared: 512, or an odd prime of the size that no Hadamard matrix covers.

    Raises:
        ValueError: size is not positive.
    """

    size: int
    seed: int
    keeps_ones: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of a rotation must be positive, got {self.size}")

    @property
    def factors(self) -> tuple[int, ...]:
        """The orders of the Kronecker factors; their product is `size`."""
        return kronecker_factors(self.size)

    @cached_property
    def signs(self) -> Tensor:
        """s [size] float64, ±1."""
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.size,), generator=generator).double() * 2.0 - 1.0
        if self.keeps_ones:
            signs[0] = 1.0
        return signs

    def apply(self, x: Tensor) -> Tensor:
        """x R over the last dimension, x [..., size] float32 or float64; the same dtype and device.

        Raises:
            ValueError: another last dimension or dtype.
        """
        signs = self._signs_like(x)
        if self.keeps_ones:
            return _multiply(_multiply(x, self.factors, transposed=True) * signs, self.factors)
        return _multiply(x * signs, self.factors)

    def apply_transposed(self, x: Tensor) -> Tensor:
        """x Rᵀ over the last dimension, which undoes `apply`."""
        if self.keeps_ones:
            return self.apply(x)  # Hᵀ·diag·H is symmetric
        return _multiply(x, self.factors, transposed=True) * self._signs_like(x)

    def _signs_like(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != self.size or x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a rotation of {self.size} takes float32 or float64 [..., {self.size}], "
                             f"got {x.dtype} {tuple(x.shape)}")  # fmt: skip
        return self.signs.to(x)


@lru_cache(maxsize=64)
def kronecker_factors(size: int) -> tuple[int, ...]:
    """Orders whose product is `size`: Hadamard orders as far as possible, then odd factors, the least of those.

    Among equals, the cheapest to multiply with. A power of two is cut into factors of at most LARGEST_POWER_OF_TWO.
    """
    odd = size // (size & -size)
    if odd == 1:
        return _powers_of_two(size)
    plans = [(*_powers_of_two(size // odd), *_odd_factors(odd))]
    for order in range(12, min(size, LARGEST_PALEY_ORDER) + 1, 4):
        if size % order == 0 and order & (order - 1) and _paley_field(order):
            plans.append(tuple(sorted((*kronecker_factors(size // order), order))))
    return min(plans, key=lambda plan: (math.prod(f for f in plan if f % 2), sum(plan), plan))


@lru_cache(maxsize=64)
def orthogonal_factor(order: int) -> Tensor:
    """An orthogonal matrix [order, order] float64 whose first row is constant and positive.

    A Hadamard matrix over √order where one is known: powers of two and Paley's orders; else the DCT-II. Not to be
    changed in place.
    """
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < order:
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        return matrix / math.sqrt(order)
    field = _paley_field(order)
    return _dct(order) if field is None else _paley(order, *field) / math.sqrt(order)


def _multiply(x: Tensor, factors: Sequence[int], transposed: bool = False) -> Tensor:
    """x (⊗ M) or x (⊗ M)ᵀ over the last dimension: each factor on its own axis of the dimension taken apart."""
    shape, before = x.shape, 1
    for order in factors:
        matrix = orthogonal_factor(order).to(x)
        matrix = matrix if transposed else matrix.T  # a column of inputs is multiplied from the left
        after = shape[-1] // (before * order)
        x = x.reshape(-1, order) @ matrix.T if after == 1 else matrix @ x.reshape(-1, order, after)
        before *= order
    return x.reshape(shape)


def _powers_of_two(size: int) -> tuple[int, ...]:
    """`size`, a power of two, as factors of nearly equal size; none for 1."""
    bits = size.bit_length() - 1
    count = -(-bits // (LARGEST_POWER_OF_TWO.bit_length() - 1))
    return tuple(1 << (bits * (i + 1) // count - bits * i // count) for i in range(count))


def _odd_factors(odd: int) -> tuple[int, ...]:
    """Prime factors, ascending."""
    primes, divisor = [], 3
    while odd > 1:
        if divisor * divisor > odd:
            divisor = odd
        while odd % divisor == 0:
            primes.append(divisor)
            odd //= divisor
        divisor += 2
    return tuple(primes)


def _paley_field(order: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(pᵏ), k = 1 or 2, from which Paley makes a Hadamard matrix of this order, if there is one.

    Construction I: order = q + 1, q ≡ 3 mod 4. Construction II: order = 2(q + 1), q ≡ 1 mod 4.
    """
    if order % 4:
        return None
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        root = math.isqrt(q)
        for p, power in ((q, 1), (root, 2)):
            if p > 2 and p**power == q and q % 4 == remainder and _odd_factors(p) == (p,):
                return p, power
    return None


def _paley(order: int, p: int, power: int) -> Tensor:
    """The Hadamard matrix of Paley, columns signed so that the first row is all ones."""
    q = p**power
    # Q[a, b] = χ(a − b): 1 for squares of the field, −1 for the others, 0 on the diagonal
    elements = torch.tensor(list(product(range(p), repeat=power)))
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1.0
    core[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    core[1:, 1:] = _character(elements[:, None] - elements[None], p)
    identity = torch.eye(q + 1, dtype=torch.float64)
    if order == q + 1:
        matrix = core + identity
    else:
        matrix = torch.kron(core, _pair(1, 1, 1, -1)) + torch.kron(identity, _pair(1, -1, -1, -1))
    return matrix * matrix[0]


def _character(elements: Tensor, p: int) -> Tensor:
    """χ of elements [..., k] of GF(p) or GF(p²), as float64.

    An element a + b√n of GF(p²), n no square mod p, is a square exactly if its norm a² − n b² is one mod p.
    """
    legendre = torch.full((p,), -1.0, dtype=torch.float64)
    legendre[torch.arange(1, p) ** 2 % p] = 1.0
    legendre[0] = 0.0
    if elements.shape[-1] == 1:
        return legendre[elements[..., 0] % p]
    no_square = int((legendre < 0).nonzero()[0])
    return legendre[(elements[..., 0] ** 2 - no_square * elements[..., 1] ** 2) % p]


def _pair(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(2, 2)


def _dct(order: int) -> Tensor:
    """DCT-II: row k is √(2/n)·cos(π(i + ½)k/n), row 0 is 1/√n."""
    position = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi / order * position[:, None] * (position[None] + 0.5)) * math.sqrt(2.0 / order)
    matrix[0] = 1.0 / math.sqrt(order)
    return matrix
