"""Numbers as they are read: set as in print on the page, plain in a terminal.

On the page a minus is a minus sign and % stands behind a no-break space. Every kind of number has its decimals there:
percentages and ratios two, perplexities, bits and bits a weight three, divergences and whatever else has no kind three
significant digits, and an error as many as what it is the error of.
"""

from __future__ import annotations

import math
import re

MISSING = "–"
NO_BREAK = "\u00a0"


class Plain:
    """Numbers that are searched, cut out and compared: percentages of as many decimals as asked for, hyphens."""

    sign = "%"
    """The percent sign with what stands before it."""

    def percent(self, value: float | None, decimals: int = 2, *, signed: bool = False) -> str:
        return "undefined" if value is None else f"{value:{'+' if signed else ''}.{decimals}%}"

    def fixed(self, value: float | None) -> str:
        return "undefined" if value is None else f"{value:.3f}"

    def divergence(self, value: float | None, error: float | None) -> str:
        return " ± ".join("undefined" if number is None else f"{number:.4f}" for number in (value, error))

    def tail(self, value: float | None) -> str:
        """One number of a distribution of divergences."""
        return "undefined" if value is None else f"{value:.3g}"

    def seconds(self, value: float) -> str:
        return f"{value:.1f} s"


class Typeset(Plain):
    """Numbers of the page."""

    sign = f"{NO_BREAK}%"

    def percent(self, value: float | None, decimals: int = 2, *, signed: bool = False) -> str:
        return percent(value, signed=signed)

    def fixed(self, value: float | None) -> str:
        return fixed(value)

    def divergence(self, value: float | None, error: float | None) -> str:
        return with_error(value, error)

    def tail(self, value: float | None) -> str:
        return short(value)

    def seconds(self, value: float) -> str:
        return seconds(value)


PLAIN, TYPESET = Plain(), Typeset()


def minus(shown: str) -> str:
    """A number, with minus signs in the place of hyphens."""
    return shown.replace("-", "−")


def typeset(message: str) -> str:
    """A message that was written plainly, with its percentages and negative numbers as the page has them."""
    return re.sub(r"(?<=\d)%", TYPESET.sign, re.sub(r"(?<![^\s(])-(?=\d)", "−", message))


def short(value: float | None, digits: int = 3) -> str:
    """Some significant digits; with a power of ten where the number is small or large; a dash for None."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -6 < exponent < 6:
        return minus(f"{value:.{max(0, digits - 1 - exponent)}f}")
    return minus(f"{value / 10**exponent:.{digits - 1}f}e{exponent}")


def tick(value: float) -> str:
    """A round number, as at the ticks of an axis."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    return minus(f"{value:g}" if -3 <= exponent <= 4 else f"{value / 10.0**exponent:g}e{exponent}")


def fixed(value: float | None, decimals: int = 3) -> str:
    """As many decimals as asked for: of perplexities, bits and bits a weight three."""
    return MISSING if value is None or not math.isfinite(value) else minus(f"{value:.{decimals}f}")


def ratio(value: float | None) -> str:
    """How many times as much."""
    return MISSING if value is None else f"{fixed(value, 2)}{NO_BREAK}×"


def with_error(value: float | None, error: float | None, decimals: int | None = None) -> str:
    """A number and its standard error, to as many decimals. Where none are asked for, as many as show three significant
    digits of the number and one of the error."""
    shown = short(value) if decimals is None else fixed(value, decimals)
    if error is None or shown == MISSING:
        return shown
    if "e" in shown:
        return f"{shown} ± {short(error, 2)}"
    if decimals is None:
        decimals = len(shown.partition(".")[2])
        decimals = max(decimals, -math.floor(math.log10(error))) if 1e-6 < error < math.inf else decimals
    return f"{fixed(value, decimals)} ± {fixed(error, decimals)}"


def percent(value: float | None, *, signed: bool = False) -> str:
    """A percentage, with its sign where it is a change; what rounds to zero has none."""
    if value is None or not math.isfinite(value):
        return MISSING
    shown = f"{100 * value:{'+' if signed else ''}.2f}"
    return f"{minus(shown) if float(shown) else '0.00'}{TYPESET.sign}"


def size(count: float | None) -> str:
    """Bytes in units of 1000."""
    if count is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{2 if count < 10 * factor else 1}f} {unit}"
    return f"{count:.0f} B"


def round_size(count: float) -> str:
    """Bytes that are a round number of their unit, as at the ticks of an axis."""
    unit, factor = next(((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= f), ("B", 1.0))
    return f"{count / factor:g} {unit}"


def rate(value: float | None) -> str:
    """Something a second, to four digits; never with a power of ten."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def seconds(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
