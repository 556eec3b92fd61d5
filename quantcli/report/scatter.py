"""The chart of a comparison: size against loss, and the runs that no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from quantcli.report.markup import Markup, element
from quantcli.report.numbers import round_size, short, size, tick

_Place = tuple[float, float]
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 400, 76, 24, 18, 58


@dataclass(frozen=True)
class Point:
    """A model: its name, bytes, and what is lost, with its standard error where that is known."""

    name: str
    size: float
    loss: float
    error: float | None = None
    look: str = "run"


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that none beats: no other is at most as large and loses at most as much, and is better in one. Of
    equal ones the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.size, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """`pareto_front` with all of equal points."""
    places = [(point.size, point.loss) for point in pareto_front(points)]
    found = [point for point in points if (point.size, point.loss) in places]
    return sorted(found, key=lambda point: places.index((point.size, point.loss)))


def pareto_chart(points: Sequence[Point], loss: str, *, logarithmic: bool = False) -> Markup:
    """Size to the right, `loss` upwards, the front as a line. With few values above zero the scale is linear."""
    logarithmic = logarithmic and all(point.loss > 0 for point in points)
    sizes = _Axis.around([point.size for point in points], False, zero=True)
    spans = [0.0 if logarithmic else abs(point.error or 0.0) for point in points]
    ends = [point.loss + sign * span for point, span in zip(points, spans, strict=True) for sign in (-1, 1)]
    losses = _Axis.around(ends, logarithmic)
    front = pareto_front(points)

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + sizes.share(point.size) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - losses.share(point.loss) * (_HEIGHT - _TOP - _BOTTOM)

    parts: list[Markup] = []
    for mark in losses.marks():
        y = _HEIGHT - _BOTTOM - losses.share(mark) * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", tick(mark), x=_LEFT - 8, y=y + 6, class_="label axis end"))
    for mark in sizes.marks():
        x = _LEFT + sizes.share(mark) * (_WIDTH - _LEFT - _RIGHT)
        parts.append(element("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="grid"))
        parts.append(element("text", round_size(mark), x=x, y=_HEIGHT - _BOTTOM + 22, class_="label axis middle"))
    parts.append(element("text", "size of the checkpoint", x=_WIDTH - _RIGHT, y=_HEIGHT - 8, class_="label axis end"))
    steps = "".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(map(place, front)))
    parts.append(element("path", d=steps, class_="line front"))
    halves = {
        point: abs(point.error) * (_HEIGHT - _TOP - _BOTTOM) / losses.span
        for point in points
        if point.error and not logarithmic
    }
    # what no label is to lie on: the front, points, whiskers, and the labels before it
    lines = list(pairwise(map(place, front)))
    for point, reach in halves.items():
        x, y = place(point)
        lines.append(((x, y - reach), (x, y + reach)))
    taken = [_Box(x - 7, x + 7, y - 7, y + 7) for x, y in map(place, points)]
    winners = unbeaten(points)
    for point in sorted(points, key=lambda p: p.loss):
        x, y = place(point)
        if half := halves.get(point):
            parts.append(
                element(
                    "line",
                    element("title", "± one standard error"),
                    x1=x,
                    x2=x,
                    y1=y - half,
                    y2=y + half,
                    class_="whisker",
                )
            )
        best = " best" if point in winners else ""
        hint = element("title", f"{point.name}: {size(point.size)}, {loss} {short(point.loss, 4)}")
        parts.append(element("circle", hint, cx=x, cy=y, r=6, class_=f"point {point.look}{best}"))
        parts.append(_label(point.name, x, y, taken, lines))
    return element(
        "figure",
        element("figcaption", f"{loss[0].upper()}{loss[1:]} against size"),
        element("svg", parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{loss} against size"),
    )


class _Box(NamedTuple):
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def crossed(self, start: _Place, end: _Place) -> bool:
        """Whether the straight line from start to end enters it (Liang and Barsky's clipping)."""
        (x, y), dx, dy = start, end[0] - start[0], end[1] - start[1]
        enters, leaves = 0.0, 1.0
        for step, room in ((-dx, x - self.left), (dx, self.right - x), (-dy, y - self.top), (dy, self.bottom - y)):
            if step < 0:
                enters = max(enters, room / step)
            elif step > 0:
                leaves = min(leaves, room / step)
            elif room < 0:
                return False
        return enters <= leaves


def _label(name: str, x: float, y: float, taken: list[_Box], lines: Sequence[tuple[_Place, _Place]]) -> Markup:
    """The name beside its point, where it covers the least of what is drawn, and as near as that allows."""
    shown = name if len(name) <= 34 else f"{name[:33]}…"
    width = 11 * len(shown)  # of w8a8 in a wide font
    found: list[tuple[int, bool, float, _Box]] = []
    for away in range(12):
        level = (y + 5,) if not away else ()  # beside a point near the end of a steep line it is free, above it is not
        for baseline in (y - 7 - 17 * away, y + 19 + 17 * away, *level):
            for right in (True, False):
                left = x + 9 if right else x - 9 - width
                box = _Box(left, left + width, baseline - 12, baseline + 4)
                inside = left >= 0 and box.right <= _WIDTH and box.top >= 0 and box.bottom <= _HEIGHT - _BOTTOM
                covered = sum(map(box.meets, taken)) + sum(box.crossed(*line) for line in lines)
                found.append((covered + 100 * (not inside), right, baseline, box))
    _, right, baseline, box = min(found, key=lambda each: each[0])  # the first of equals
    taken.append(box)
    return element(
        "text", shown, x=x + 9 if right else x - 9, y=baseline, class_="label axis" if right else "label axis end"
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def around(values: Sequence[float], logarithmic: bool, zero: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if logarithmic:
            return _Axis(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 1.0001)), True)
        margin = 0.08 * ((high - low) or abs(high) or 1)
        return _Axis(0.0 if zero else low - margin, high + margin, False)

    @property
    def span(self) -> float:
        return self.high - self.low

    def share(self, value: float) -> float:
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / self.span

    def marks(self) -> list[float]:
        """Round numbers along the axis."""
        if self.logarithmic:
            decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) <= 3 else (1,)
            marks = [factor * 10.0**decade for decade in decades for factor in factors]
        else:
            rough = self.span / 5
            unit = 10 ** math.floor(math.log10(rough))
            step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
            first = math.ceil(self.low / step - 1e-9)
            marks = [round(i * step, 12) for i in range(first, first + 8)]
        return [mark for mark in marks if self.low <= mark <= self.high * (1 + 1e-9)]
