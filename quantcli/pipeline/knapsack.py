"""One option for each of several items: the least total error within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

CELLS = 1 << 15
"""Steps into which the budget is divided, where costs have no common divisor that divides it into fewer."""


def knapsack(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option c_i of each item i for which Σ errors[i][c_i] is least under Σ costs[i][c_i] ≤ budget.

    The multiple-choice knapsack problem, by dynamic programming over what the budget holds beyond the cheapest options:
    best[b] is the least error of the items so far that cost at most b more than their cheapest. It is exact where costs
    are multiples of a unit of which there are at most CELLS; else costs are rounded up to the CELLS-th part, and what
    that leaves is spent by taking, as long as one fits, the option that lessens the error most. Of equal errors the
    cheapest option is taken.

    Args:
        errors: finite, at least 0; for each item one of each of its options.
        costs: whole numbers, in the same shape.

    Raises:
        ValueError: even the cheapest options cost more than the budget.
    """
    import numpy as np

    cheapest = [min(row) for row in costs]
    room = budget - sum(cheapest)
    if room < 0:
        raise ValueError(f"the cheapest options cost {sum(cheapest)}, more than {budget}")
    orders = [sorted(range(len(row)), key=lambda option, row=row: row[option]) for row in costs]  # type: ignore[misc]
    extra = [
        [row[option] - least for option in order] for row, least, order in zip(costs, cheapest, orders, strict=True)
    ]
    unit = max(gcd(*(cost for row in extra for cost in row)), -(-room // CELLS), 1)
    cells = room // unit
    best = np.zeros(cells + 1)
    taken = np.zeros((len(extra), cells + 1), np.int16)
    for item, (row, order) in enumerate(zip(extra, orders, strict=True)):
        reached = np.full((len(row), cells + 1), np.inf)
        for position, (cost, option) in enumerate(zip(row, order, strict=True)):
            steps = -(-cost // unit)
            if steps <= cells:
                reached[position, steps:] = best[: cells + 1 - steps] + errors[item][option]
        taken[item] = reached.argmin(axis=0)
        best = reached.min(axis=0)
    chosen, left = [0] * len(extra), cells
    for item in reversed(range(len(extra))):
        position = int(taken[item, left])
        chosen[item] = orders[item][position]
        left -= -(-extra[item][position] // unit)
    return _filled(chosen, errors, costs, budget)


def _filled(
    chosen: list[int], errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> list[int]:
    """`chosen`, with what the budget still allows spent where one change of an item lessens the error most."""
    chosen = list(chosen)
    left = budget - sum(row[option] for row, option in zip(costs, chosen, strict=True))
    while True:
        gain, change = 0.0, None
        for item, current in enumerate(chosen):
            for option, error in enumerate(errors[item]):
                less = errors[item][current] - error
                if less > gain and costs[item][option] - costs[item][current] <= left:
                    gain, change = less, (item, option)
        if change is None:
            return chosen
        item, option = change
        left -= costs[item][option] - costs[item][chosen[item]]
        chosen[item] = option
