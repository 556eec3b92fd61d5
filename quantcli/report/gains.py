"""What quantization gained and cost, in the rows of the tables by which Golden Stick reports an algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from quantcli.report.numbers import rate

HEADINGS = ("", "float", "quantized", "change")

Row = tuple[str, str, str, str]


def gain_rows(result: Mapping[str, Any]) -> list[Row]:
    """(metric, float, quantized, change) of what was measured: size, perplexity, tasks, speed and memory.

    Metrics end in ↓ or ↑, the good direction. Sizes, speeds and memory change by a ratio, perplexities and metrics by a
    difference. What Golden Stick calls full-scale and incremental performance is prefill and decode.
    """
    return [*_sizes(result), *_scores(result), *_speeds(result)]


def _sizes(result: Mapping[str, Any]) -> Iterator[Row]:
    sizes = result.get("sizes") or {}
    exports = {name: found for name, found in sizes.items() if name != "float"}
    for name, found in exports.items():
        label = "checkpoint, GB ↓" if len(exports) == 1 else f"checkpoint {name}, GB ↓"
        before, after = sizes["float"]["bytes"] / 1e9, found["bytes"] / 1e9
        digits = max(3, 3 - math.floor(math.log10(min(before, after)))) if min(before, after) > 0 else 3
        yield _row(label, before, after, f"{{:.{digits}f}}".format, relative=True)


def _scores(result: Mapping[str, Any]) -> Iterator[Row]:
    if scores := result.get("perplexity"):
        before, after = scores["float_model"]["value"], scores["quantized"]["value"]
        yield _row(f"perplexity ({scores['protocol']}) ↓", before, after, "{:.3f}".format, relative=False)
    for task, found in ((result.get("tasks") or {}).get("tasks") or {}).items():
        for name, metric in found.get("metrics", {}).items():
            before, after = (_times(metric[model]["value"], 100) for model in ("float_model", "quantized"))
            arrow = "↓" if metric.get("lower_is_better") else "↑"
            yield _row(f"{task} {name}, % {arrow}".replace("_", " "), before, after, "{:.2f}".format, relative=False)


def _speeds(result: Mapping[str, Any]) -> Iterator[Row]:
    if not (found := result.get("throughput")):
        return
    models = found["float_model"], found["quantized"]
    for key in ("prefill", "decode"):
        before, after = (model[key]["median"] for model in models)
        yield _row(f"{key}, tokens/s ↑", before, after, rate, relative=True)
    before, after = (_times(model["peak_memory"], 1e-9) for model in models)
    yield _row("memory in use, GB ↓", before, after, "{:.3f}".format, relative=True)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _row(
    label: str, before: float | None, after: float | None, shown: Callable[[float], str], *, relative: bool
) -> Row:
    one, other = ("–" if value is None else shown(value) for value in (before, after))
    if before is None or after is None or (relative and not before):
        return label, one, other, "–"
    change = f"{after / before - 1:+.2%}" if relative else f"{'+' if after >= before else ''}{shown(after - before)}"
    return label, one, other, change
