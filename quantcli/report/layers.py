"""Linears by block and kind: what a chart over layers is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def kind_of(name: str, block: int, blocks: int) -> str:
    """What a linear is within its block, with * for the numbers of experts: mlp.experts.*.up_proj.

    The output head, whose block is one behind the last, is called by its own name.
    """
    if block >= blocks:
        return name
    inside = re.sub(rf"^.*?\.{block}\.", "", name, count=1)
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", inside)


@dataclass
class Cell:
    """The linears of one kind in one block: one, or the experts of a layer."""

    names: list[str] = field(default_factory=list)
    schemes: dict[str, int] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)

    @property
    def worst(self) -> float | None:
        return max(self.values, default=None)

    @property
    def quantized(self) -> bool:
        return any(scheme != "float" for scheme in self.schemes)


@dataclass(frozen=True)
class Grid:
    """Rows: kinds of linear in the order of a block. Columns: blocks. `name` says what the values are."""

    name: str
    blocks: int
    rows: dict[str, dict[int, Cell]]

    @property
    def values(self) -> list[float]:
        return [cell.worst for row in self.rows.values() for cell in row.values() if cell.worst is not None]

    def bounds(self) -> tuple[float, float]:
        """Powers of ten, or halves of them, from the least value to the largest, but for the least twentieth,
        which would take most colours where it lies apart; (1, 10) without any above zero."""
        found = sorted(math.log10(value) for value in self.values if value > 0)
        if not found:
            return 1.0, 10.0
        low, high = math.floor(2 * found[len(found) // 20]) / 2, math.ceil(2 * found[-1]) / 2
        return 10**low, 10 ** max(high, low + 0.5)


def grid_of(name: str, linears: Iterable[Mapping[str, Any]], values: Mapping[str, float | None], blocks: int) -> Grid:
    """The grid of a value a linear. What belongs to no block is left out, and so are kinds that nothing is done to."""
    rows: dict[str, dict[int, Cell]] = {}
    for linear in linears:
        block = linear["block"]
        if block >= blocks:
            continue
        cell = rows.setdefault(kind_of(linear["name"], block, blocks), {}).setdefault(block, Cell())
        cell.names.append(linear["name"])
        cell.schemes[linear["scheme"]] = cell.schemes.get(linear["scheme"], 0) + 1
        value = values.get(linear["name"])
        if value is not None and math.isfinite(value):
            cell.values.append(value)
    kept = {kind: row for kind, row in rows.items() if any(cell.quantized or cell.values for cell in row.values())}
    return Grid(name, blocks, kept)
