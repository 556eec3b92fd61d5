"""Charts of a run as static SVG. Colours are classes of the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.report.layers import Cell, Grid
from quantcli.report.markup import Markup, element
from quantcli.report.numbers import percent, short, size, tick

STEPS = 9
"""Colours of a heat map, from the least value to the largest: classes heat0 to heat8."""
_WIDTH = 960


def heat_map(grid: Grid, scale: tuple[float, float] | None = None) -> Markup:
    """Blocks from left to right, kinds of linear from top to bottom; the colour is the logarithm of the value.

    A cell of many linears, the experts of a layer, has the largest of their values. One in float is an empty frame.
    The `scale` of several maps can be given; otherwise it fits this one.
    """
    left = 12 + 7.0 * max((len(kind) for kind in grid.rows), default=0)
    top, height, gap = 6, 24, 2
    step = (_WIDTH - left - 8) / max(1, grid.blocks)
    width = min(step, 40.0)
    low, high = scale or grid.bounds()
    parts: list[Markup] = []
    for row, (kind, cells) in enumerate(grid.rows.items()):
        y = top + row * (height + gap)
        parts.append(element("text", kind, x=left - 8, y=y + height / 2 + 4, class_="label end"))
        for block, cell in cells.items():
            x = left + block * width
            parts.append(_cell(kind, block, cell, low, high, (x, y, width - 1, height)))
    bottom = top + len(grid.rows) * (height + gap)
    for block in range(0, grid.blocks, _nice(26 / width)):
        parts.append(element("text", block, x=left + (block + 0.5) * width, y=bottom + 14, class_="label middle"))
    parts.append(element("text", "block", x=left - 8, y=bottom + 14, class_="label end"))
    parts.append(_legend(left, bottom + 34, low, high))
    chart = _svg(parts, bottom + 70, f"{grid.name} by block and kind of linear")
    return element("div", chart, class_="scroll chart")


def _cell(kind: str, block: int, cell: Cell, low: float, high: float, box: tuple[float, float, float, float]) -> Markup:
    x, y, width, height = box
    schemes = ", ".join(cell.schemes)
    worst = cell.worst
    if worst is None:
        colour, shown = ("float", "") if not cell.quantized else ("unknown", ", not measured")
    else:
        colour, shown = f"heat{heat_step(worst, low, high)}", f": {short(worst)}"
    many = f", worst of {len(cell.names)}" if len(cell.names) > 1 else ""
    hint = element("title", f"block {block}, {kind}{shown} ({schemes}{many})")
    return element("rect", hint, x=x, y=y, width=width, height=height, rx=2, class_=colour)


def heat_step(value: float, low: float, high: float) -> int:
    """The colour of a value on a logarithmic scale from `low` to `high`."""
    if value <= low:
        return 0
    share = math.log(value / low) / math.log(high / low)
    return min(STEPS - 1, int(share * STEPS))


def _nice(least: float) -> int:
    """The first of 1, 2, 5, 10, 20, … that is not less."""
    return next(factor * 10**power for power in range(9) for factor in (1, 2, 5) if factor * 10**power >= least)


def _legend(x: float, y: float, low: float, high: float) -> Markup:
    width = 32
    boxes = [element("rect", x=x + i * width, y=y, width=width, height=12, class_=f"heat{i}") for i in range(STEPS)]
    right = x + STEPS * width
    ends = [
        element("text", f"≤ {short(low, 1)}", x=x, y=y + 26, class_="label"),
        element("text", short(math.sqrt(low * high), 1), x=(x + right) / 2, y=y + 26, class_="label middle"),
        element("text", short(high, 1), x=right, y=y + 26, class_="label end"),
        element("rect", x=right + 24, y=y, width=20, height=12, rx=2, class_="float"),
        element("text", "in float", x=right + 50, y=y + 10, class_="label"),
    ]
    return element("g", boxes, ends)


@dataclass(frozen=True)
class Line:
    """A line over blocks; a block without a value is a gap. `look` is a class of the style sheet."""

    name: str
    look: str
    values: Mapping[int, float]


def panels(charts: Mapping[str, Sequence[Line]], blocks: int, what: str) -> Markup:
    """A small chart for each kind of input, all of one logarithmic scale, so that they can be compared."""
    values = [v for lines in charts.values() for line in lines for v in line.values.values() if v > 0]
    if not values:
        return Markup("")
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    high = high if high > low else low * 10
    drawn = [_panel(title, lines, blocks, (low, high), what) for title, lines in charts.items()]
    return element("div", drawn, class_="panels")


def _panel(title: str, lines: Sequence[Line], blocks: int, scale: tuple[float, float], what: str) -> Markup:
    width, height, left, top, bottom = 460, 190, 46, 26, 24
    low, high = (math.log10(end) for end in scale)
    step = (width - left - 12) / max(1, blocks - 1)

    def place(block: int, value: float) -> tuple[float, float]:
        share = (math.log10(max(value, scale[0])) - low) / (high - low)
        return left + block * step, height - bottom - share * (height - top - bottom)

    parts: list[Markup] = [element("text", title, x=left, y=14, class_="panel-title")]
    decades = range(round(low), round(high) + 1)
    every = 1 if len(decades) <= 5 else 2
    for exponent in decades[::every]:
        _, y = place(0, 10.0**exponent)
        parts.append(element("line", x1=left, x2=width - 12, y1=y, y2=y, class_="grid"))
        parts.append(element("text", tick(10.0**exponent), x=left - 6, y=y + 4, class_="label end"))
    for block in range(0, blocks, _nice(50 / step)):
        x, _ = place(block, scale[0])
        parts.append(element("text", block, x=x, y=height - 8, class_="label middle"))
    for line in lines:
        points = {block: place(block, value) for block, value in sorted(line.values.items()) if value > 0}
        drawn = ""
        for block, (x, y) in points.items():
            drawn += f"{'L' if block - 1 in points else 'M'}{x:.1f} {y:.1f}"
        parts.append(element("path", element("title", f"{line.name}, {what}"), d=drawn, class_=f"line {line.look}"))
        for block, (x, y) in points.items():
            hint = element("title", f"block {block}, {line.name}: {short(line.values[block])}")
            parts.append(element("circle", hint, cx=x, cy=y, r=2.2, class_=f"dot {line.look}"))
    view = f"0 0 {width} {height}"
    return element("svg", parts, viewBox=view, role="img", aria_label=f"{title}: {what} by block")


def size_bars(bars: Mapping[str, Mapping[str, int]], parts: Sequence[str]) -> Markup:
    """A bar a checkpoint, cut into its parts, whose colours are the classes part0, part1, … in the order of `parts`."""
    largest = max((sum(bar.values()) for bar in bars.values()), default=0) or 1
    left, height, gap, drawn = 170, 26, 12, []
    for row, (name, bar) in enumerate(bars.items()):
        y, x = row * (height + gap) + 4, float(left)
        whole = sum(bar.values())
        drawn.append(element("text", name, x=left - 10, y=y + height / 2 + 4, class_="label end"))
        for index, part in enumerate(parts):
            width = bar.get(part, 0) / largest * (_WIDTH - left - 100)
            if width > 0:
                hint = element("title", f"{name}, {part}: {size(bar[part])} ({percent(bar[part] / whole)})")
                drawn.append(
                    element("rect", hint, x=x, y=y, width=max(width - 1, 0.5), height=height, class_=f"part{index}")
                )
                x += width
        drawn.append(element("text", size(whole), x=x + 8, y=y + height / 2 + 4, class_="label strong"))
    return element("div", _svg(drawn, len(bars) * (height + gap) + 4, "Bytes by part"), class_="scroll chart")


def _svg(parts: Sequence[Any], height: float, label: str) -> Markup:
    return element("svg", parts, viewBox=f"0 0 {_WIDTH} {height:.0f}", class_="wide", role="img", aria_label=label)
