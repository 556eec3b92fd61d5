"""The choice within a budget, against every choice that there is."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.pipeline import knapsack as module
from quantcli.pipeline.knapsack import knapsack

Table = list[list[tuple[float, int]]]
"""(error, cost) of each option of each item."""

tables = st.lists(
    st.lists(st.tuples(st.integers(0, 50).map(float), st.integers(0, 30)), min_size=1, max_size=4),
    min_size=1,
    max_size=6,
)


def solved(table: Table, budget: int) -> tuple[float, int]:
    """(error, cost) of what `knapsack` chooses."""
    errors = [[error for error, _ in row] for row in table]
    costs = [[cost for _, cost in row] for row in table]
    chosen = knapsack(errors, costs, budget)
    assert len(chosen) == len(table)
    pairs = [row[option] for row, option in zip(table, chosen, strict=True)]
    return sum(error for error, _ in pairs), sum(cost for _, cost in pairs)


def by_force(table: Table, budget: int) -> float:
    """The least error of all choices within the budget."""
    sums = ((sum(e for e, _ in pairs), sum(c for _, c in pairs)) for pairs in itertools.product(*table))
    return min(error for error, cost in sums if cost <= budget)


@given(tables, st.integers(0, 100))
def test_the_least_error_within_the_budget_is_found(table: Table, slack: int) -> None:
    budget = sum(min(cost for _, cost in row) for row in table) + slack
    error, cost = solved(table, budget)
    assert cost <= budget
    assert error == by_force(table, budget)


@given(tables, st.integers(0, 100), st.integers(1, 9))
def test_with_coarse_cells_it_keeps_the_budget_and_wastes_little(table: Table, slack: int, cells: int) -> None:
    """Rounding up loses less than a cell an item: with so much less to spend, nothing better can be reached."""
    least = sum(min(cost for _, cost in row) for row in table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CELLS", cells)
        error, cost = solved(table, least + slack)
    assert cost <= least + slack
    lost = len(table) * (-(-slack // cells))
    assert error <= by_force(table, max(least, least + slack - lost))


def test_what_is_left_over_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one cell nothing dearer than the cheapest option fits the table; what does fit the budget is taken then."""
    monkeypatch.setattr(module, "CELLS", 1)
    assert solved([[(9.0, 0), (1.0, 7)], [(5.0, 0), (2.0, 5)], [(4.0, 0), (3.0, 3)]], 11) == (9.0, 10)


def test_of_equal_errors_the_cheapest_is_taken() -> None:
    assert knapsack([[1.0, 1.0, 1.0]], [[7, 3, 5]], 10) == [1]


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest options cost 5, more than 4"):
        knapsack([[0.0, 1.0], [0.0]], [[4, 2], [3]], 4)


def test_a_large_model_takes_seconds() -> None:
    """400 groups with five candidates, costs without a common divisor. The bound is far above what it takes."""
    errors = [[1.0 / (bits + item % 7) for bits in (3, 4, 5, 8, 16)] for item in range(400)]
    costs = [[(1_000_003 + 97 * item) * bits for bits in (3, 4, 5, 8, 16)] for item in range(400)]
    started = time.perf_counter()
    chosen = knapsack(errors, costs, sum(row[2] for row in costs))
    assert time.perf_counter() - started < 60
    spent = sum(row[option] for row, option in zip(costs, chosen, strict=True))
    assert 0.999 * sum(row[2] for row in costs) < spent <= sum(row[2] for row in costs)
