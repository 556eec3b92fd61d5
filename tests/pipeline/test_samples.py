"""Which calibration samples a stage looks at."""

from __future__ import annotations

import pytest

from quantcli.pipeline.samples import spread
from quantcli.recipe.smoothing import SmoothSection


@pytest.mark.parametrize(
    ("count", "expected"),
    [(None, [0, 1, 2, 3, 4, 5, 6, 7]), (8, [0, 1, 2, 3, 4, 5, 6, 7]), (9, [0, 1, 2, 3, 4, 5, 6, 7]),
     (4, [0, 2, 4, 6]), (3, [0, 2, 5]), (1, [0])],
)  # fmt: skip
def test_samples_are_spread_evenly(count: int | None, expected: list[int]) -> None:
    assert spread([[i] for i in range(8)], count) == [[i] for i in expected]


def test_auto_looks_at_some_samples_unless_inputs_have_ranges_and_other_methods_at_all() -> None:
    """An extreme that was not seen spoils a static scale: with 24 of 64 samples a model lost four times as much."""
    assert SmoothSection().looks_at(ranges=False) == 24
    assert SmoothSection(method="balance").looks_at(ranges=False) == 16
    assert SmoothSection().looks_at(ranges=True) is None
    assert SmoothSection(method="smoothquant").looks_at(ranges=False) is None
    assert SmoothSection(method="awq", samples=5).looks_at(ranges=True) == 5
    assert SmoothSection(samples=64).looks_at(ranges=False) == 64
