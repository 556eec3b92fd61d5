"""The table of smoothing methods. A new one is one function and one entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from quantcli.smoothing.awq import awq
from quantcli.smoothing.balance import balance
from quantcli.smoothing.group import Found
from quantcli.smoothing.outliers import cbq, outlier_suppression
from quantcli.smoothing.strength import flex, iterative, smoothquant


class SmoothingMethod(NamedTuple):
    """find: (group, error, options as keywords) -> Found. kinds: groups that it takes unless told otherwise. moments:
    whether it reads `Group.moments`."""

    find: Callable[..., Found]
    kinds: tuple[Literal["norm", "linear"], ...]
    moments: bool = False


SMOOTHING_METHODS: dict[str, SmoothingMethod] = {
    "smoothquant": SmoothingMethod(smoothquant, ("norm",)),
    "outlier_suppression": SmoothingMethod(outlier_suppression, ("norm",)),
    "awq": SmoothingMethod(awq, ("norm",)),
    "iterative": SmoothingMethod(iterative, ("norm", "linear")),
    "cbq": SmoothingMethod(cbq, ("norm",)),
    "flex": SmoothingMethod(flex, ("norm", "linear")),
    "balance": SmoothingMethod(balance, ("norm", "linear"), moments=True),
}
