"""Samples that stay: those of the smallest differences, by a count that is worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.calibration.selection import keep_samples
from quantcli.errors import DataError


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=40), st.floats(0, 1, exclude_max=True))
def test_no_dropped_sample_differs_less_than_one_that_stays(differences: list[float], share: float) -> None:
    kept = keep_samples(differences, share)
    dropped = set(range(len(differences))) - set(kept)
    assert kept == sorted(set(kept))
    assert kept
    assert len(dropped) == len(differences) - 1 or abs(len(dropped) - share * len(differences)) <= 0.5 + 1e-9
    for index in dropped:
        assert all((differences[k], k) < (differences[index], index) for k in kept)


@pytest.mark.parametrize(
    ("count", "share", "dropped"),
    [(10, 0.1, 1), (50, 0.1, 5), (4, 0.1, 0), (5, 0.1, 1), (10, 0.35, 4), (100, 0.29, 29), (3, 0.99, 2), (1, 0.9, 0)],
)
def test_the_number_dropped_is_the_share_rounded(count: int, share: float, dropped: int) -> None:
    # Largest first, so that what stays is the end.
    assert keep_samples([float(-i) for i in range(count)], share) == list(range(dropped, count))


def test_ties_drop_the_later_and_what_is_no_number_goes_first() -> None:
    assert keep_samples([2.0, 2.0, 1.0, 2.0], 0.5) == [0, 2]
    assert keep_samples([5.0, math.nan, 1.0, 9.0], 0.25) == [0, 2, 3]
    assert keep_samples([math.nan] * 3, 0.9) == [0]
    assert keep_samples([], 0.5) == []


@pytest.mark.parametrize("share", [-0.1, 1.0, 10, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(DataError, match="cannot be dropped"):
        keep_samples([1.0, 2.0], share)
