"""Numbers as a page shows them."""

from __future__ import annotations

import math


def short(value: float | None, digits: int = 3) -> str:
    """Some significant digits; with a power of ten where the number is small or large; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -6 < exponent < 6:
        return f"{value:.{max(0, digits - 1 - exponent)}f}"
    return f"{value / 10**exponent:.{digits - 1}f}e{exponent}"


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}%}".replace("%", "\u00a0%").replace("-", "−")


def size(count: float | None) -> str:
    """Bytes in units of 1000."""
    if count is None:
        return "–"
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
        return "–"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
