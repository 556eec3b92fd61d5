"""The page that compares runs: size against loss, the numbers side by side, and what differs in their recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from quantcli.report.charts import heat_map
from quantcli.report.layers import Grid, grid_of
from quantcli.report.markup import Markup, element, table
from quantcli.report.numbers import MISSING, TYPESET, fixed, percent, rate, ratio, seconds, short, size, with_error
from quantcli.report.outcome import throughput_setting
from quantcli.report.page import MISSED, WORST, flat, page
from quantcli.report.scatter import Point, pareto_chart, unbeaten

Run = Mapping[str, Any]

_CHARTS = (("kl_divergence", "KL divergence", True), ("perplexity", "perplexity", False))
_MAPS = 6  # heat maps on a page
_SAME = 1e-3  # relative difference of float perplexities up to which they are of one model and text


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """What runs come to, beside each other. A number is None where a run did not measure it.

    `comparable` names the runs that scored the same tokens with the same float model: those are in the charts, and
    `front` holds of each chart the runs that none beats in size and loss together.
    """
    rows = [_row(run, name) for run, name in zip(runs, _names(runs), strict=True)]
    group = _comparable(rows)
    notes = []
    outside = [row["run"] for row in rows if row["protocol"] is not None and row["run"] not in group]
    if outside:
        notes.append(f"{', '.join(outside)}: measured on other text, by another protocol or from another float model "
                     f"than {', '.join(group)}; perplexities and divergences of the two cannot be compared, and only "
                     "those of the latter are in the charts.")  # fmt: skip
    without = [row["run"] for row in rows if row["protocol"] is None]
    if without:
        notes.append(f"{', '.join(without)}: nothing was measured. Add evaluate.perplexity to the recipe.")
    front = {}
    for key, _, _ in _CHARTS:
        points = _points([row for row in rows if row["run"] in group], key)
        front[key] = [point.name for point in unbeaten(points)]
    return {"runs": rows, "comparable": group, "front": front, "notes": notes, "differences": _differences(runs)}


def _names(runs: Sequence[Run]) -> list[str]:
    """The name of each directory, with its parents as far as needed to tell them apart."""
    paths = [str(run["path"]).rstrip("/").split("/") for run in runs]
    depth = 1
    while len({tuple(path[-depth:]) for path in paths}) < len(paths) and depth < max(map(len, paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def _row(run: Run, name: str) -> dict[str, Any]:
    result, scores = run["result"], run["result"].get("perplexity") or {}
    exports: dict[str, Any] = {name: found for name, found in run["sizes"].items() if name != "float"}
    sizes: Mapping[str, Any] = exports.get(scores.get("checkpoint", "")) or next(iter(exports.values()), {})
    original, quantized = scores.get("float_model") or {}, scores.get("quantized") or {}
    counts: dict[str, int] = {}
    for linear in run["plan"]["linears"]:
        counts[linear["scheme"]] = counts.get(linear["scheme"], 0) + 1
    protocol = None
    if scores:
        # of these the digest tells tokens and beginnings of windows apart, also where counts are the same
        protocol = [scores.get(key) for key in ("protocol", "sequence_length", "windows", "tokens", "stride",
                                                "batch_size", "tokens_digest")]  # fmt: skip
        protocol.append(scores.get("arithmetic", "engine"))
    return {
        "run": name,
        "path": run["path"],
        "schemes": counts,
        "size": sizes.get("bytes", result["size_after"]),
        "float_size": (run["sizes"].get("float") or {}).get("bytes", result["size_before"]),
        "ratio": sizes.get("ratio"),
        "bits_per_weight": sizes.get("bits_per_weight", run["plan"].get("bits_per_weight")),
        "perplexity": quantized.get("value"),
        "perplexity_error": quantized.get("error"),
        "float_perplexity": original.get("value"),
        **{key: scores.get(key) for key in ("increase", "increase_error", "kl_divergence", "kl_error", "agreement")},
        "protocol": protocol,
        "tasks": _task_metrics(result),
        **_speeds(result.get("throughput")),
        "seconds": sum(record.get("seconds") or 0.0 for record in result["stages"].values()),
        "peak_memory": result["peak_memory"],
        "warnings": sum(each["kind"] not in ("note", MISSED, WORST) for each in run["problems"]),
        "missed_gates": sum(each["kind"] == MISSED for each in run["problems"]),
        "measured": {f"{stage}.{key}": v for stage, content in run["results"].items() for key, v in flat(content)},
    }


def _task_metrics(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """ "task metric" → both models' value and 95 % interval, and the change with its error, of each task's metrics."""
    kept = ("float_model", "quantized", "change", "change_error", "change_interval")
    return {
        f"{task} {name}".replace("_", " "): {"questions": found["questions"], **{key: metric[key] for key in kept}}
        for task, found in ((result.get("tasks") or {}).get("tasks") or {}).items()
        for name, metric in found.get("metrics", {}).items()
    }


def _speeds(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Medians of the quantized model in a serving engine, and their change from the float model in the same sitting."""
    if not found:
        return dict.fromkeys(("prefill", "decode", "served_memory", "prefill_change", "decode_change"))
    served, change = found["quantized"], found["change"]
    return {
        **{key: served[key]["median"] for key in ("prefill", "decode")},
        "served_memory": served["peak_memory"],
        **{f"{key}_change": change[key] for key in ("prefill", "decode")},
    }


def _comparable(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest set of runs that scored the same tokens with the same float model; the first of equal ones."""
    groups: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if row["protocol"] is None:
            continue
        for group in groups:
            if _alike(group[0], row):
                group.append(row)
                break
        else:
            groups.append([row])
    return [row["run"] for row in max(groups, key=len, default=[])]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    mine, theirs = one["float_perplexity"], other["float_perplexity"]
    if mine is None or theirs is None:
        return one["protocol"] == other["protocol"] and mine is theirs
    return one["protocol"] == other["protocol"] and abs(mine - theirs) <= _SAME * mine


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    return [Point(row["run"], row["size"], row[key], _error(row, key)) for row in rows if row[key] is not None]


def _error(row: Mapping[str, Any], key: str) -> float | None:
    """The standard error by which runs on the same tokens differ: of perplexity that of the increase, over the float
    model's, since how hard the text is does not tell them apart."""
    if key == "kl_divergence":
        error: float | None = row["kl_error"]
        return error
    error, original = row["increase_error"], row["float_perplexity"]
    return None if error is None or original is None else error * original


def _differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys of the recipes that are not the same in all → their values, in the order of the runs.

    A section that one has and another does not is "given" and None; its keys are told only where those that have it
    differ.
    """
    recipes = [dict(flat_recipe(run["recipe_keys"])) for run in runs]
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        known = [recipe[key] for recipe in recipes if key in recipe]
        sections = [any(other.startswith(f"{key}.") for other in recipe) for recipe in recipes]
        if key != "output" and (any(sections) or any(value != known[0] for value in known)):
            values = zip(recipes, sections, strict=True)
            found[key] = ["given" if section else recipe.get(key) for recipe, section in values]
    return found


def flat_recipe(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a recipe; lists and empty sections are values."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat_recipe(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def comparison_page(runs: Sequence[Run], found: Mapping[str, Any]) -> str:
    """The page of `compare`."""
    rows = found["runs"]
    body = [
        element(
            "header",
            element("h1", f"{len(rows)} runs compared"),
            element("p", ", ".join(sorted({run["plan"]["architecture"] for run in runs})), class_="note"),
        ),
        _notes(found["notes"]),
        _charts(found),
        element("section", element("h2", "Numbers"), _numbers(rows, found["front"]), class_="dense"),
        _tasks(rows),
        _served(runs, rows),
        _recipes(rows, found["differences"]),
        _maps(runs, rows),
        _measured(rows),
        element(
            "section",
            element("h2", "Where they are"),
            table(("run", "directory"), [(row["run"], element("code", row["path"])) for row in rows]),
        ),
    ]
    return page(f"{len(rows)} runs compared", body)


def _notes(notes: Sequence[str]) -> Markup | None:
    if not notes:
        return None
    items = element("ul", [element("li", note) for note in notes])
    return element("section", element("h2", "Beware"), items, class_="warnings")


def _charts(found: Mapping[str, Any]) -> Markup | None:
    rows = [row for row in found["runs"] if row["run"] in found["comparable"]]
    drawn = []
    for key, label, logarithmic in _CHARTS:
        points = _points(rows, key)
        if points:
            origin = rows[0]["float_perplexity"] if key == "perplexity" else None
            if origin is not None:
                points.append(Point("float", rows[0]["float_size"], origin, look="origin"))
            drawn.append(pareto_chart(points, label, logarithmic=logarithmic))
    if not drawn:
        return None
    note = element("p", "Left and low is good. Filled points, on the broken line, are those that no other run beats in "
                   "size and loss together.", class_="note")  # fmt: skip
    return element("section", element("h2", "Size against loss"), note, element("div", drawn, class_="panels"))


def _numbers(rows: Sequence[Mapping[str, Any]], front: Mapping[str, Sequence[str]]) -> Markup:
    best = {name for names in front.values() for name in names}
    headings = ["run", "linears", "size", "bits a weight", "perplexity", "increase", "KL divergence",
                "same top token", "time", "warnings"]  # fmt: skip
    missed = any(row["missed_gates"] for row in rows)
    headings += ["missed gates"] * missed
    cells = [
        (
            element("b", row["run"]) if row["run"] in best else row["run"],
            _lines(*(f"{count} {scheme}" for scheme, count in row["schemes"].items())),
            (_lines(size(row["size"]), ratio(row["float_size"] / max(1, row["size"]))), row["size"]),
            (fixed(row["bits_per_weight"]), row["bits_per_weight"]),
            (_measure(row["perplexity"], row["perplexity_error"], 3), row["perplexity"]),
            (percent(row["increase"], signed=True), row["increase"]),
            (_measure(row["kl_divergence"], row["kl_error"]), row["kl_divergence"]),
            (percent(row["agreement"]), row["agreement"]),
            (seconds(row["seconds"]), row["seconds"]),
            row["warnings"],
            *([row["missed_gates"]] * missed),
        )
        for row in rows
    ]
    return table(headings, cells, numbers=range(2, len(headings)), sortable=True)


def _measure(value: float | None, error: float | None, decimals: int | None = None) -> list[Markup]:
    """A number, and its error in a line of its own: beside it the columns would be wider than the page."""
    shown, _, behind = with_error(value, error, decimals).partition(" ± ")
    return _lines(shown, f"± {behind}" if behind else "")


def _lines(*shown: str) -> list[Markup]:
    return [element("div", line, class_="whole") for line in shown if line]


def _tasks(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Every metric of every task that a run was asked, with 95 % intervals, and its change from the float model."""

    def shown(model: Mapping[str, Any]) -> tuple[str, float | None]:
        low, high = model["interval"]
        return f"{percent(model['value'])} ({percent(low)} to {percent(high)})", model["value"]

    cells = [
        (
            name,
            row["run"],
            shown(metric["float_model"]),
            shown(metric["quantized"]),
            (
                f"{percent(metric['change'], signed=True)} ± {percent(metric['change_error'])} "
                f"({' to '.join(percent(end, signed=True) for end in metric['change_interval'])})",
                metric["change"],
            ),
            metric["questions"],
        )
        for name in dict.fromkeys(name for row in rows for name in row["tasks"])
        for row in rows
        if (metric := row["tasks"].get(name))
    ]
    if not cells:
        return None
    note = element("p", f"In brackets 95{TYPESET.sign} intervals. The change is paired, question by question, with its "
                   "standard error; runs compare where they were asked the same questions.", class_="note")  # fmt: skip
    headings = ("metric", "run", "float", "quantized", "change", "questions")
    inner = table(headings, cells, numbers=range(2, 6), sortable=True)
    return element("section", element("h2", "Tasks"), note, inner, class_="dense")


def _served(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Speed and memory in a serving engine, of the runs that measured them, each with what it was measured in."""
    cells = [
        (
            row["run"],
            *[(f"{rate(row[key])} ({percent(row[f'{key}_change'], signed=True)})", row[key])
              for key in ("prefill", "decode")],
            (size(row["served_memory"]), row["served_memory"]),
            throughput_setting(run["result"]["throughput"]),
        )
        for run, row in zip(runs, rows, strict=True)
        if run["result"].get("throughput")
    ]  # fmt: skip
    if not cells:
        return None
    note = element("p", "Tokens a second, and the change from the float model, which was served in the same sitting. "
                   "Changes can be compared between machines, rates cannot.", class_="note")  # fmt: skip
    headings = ("run", "prefill", "decode", "memory in use", "measured in")
    inner = table(headings, cells, numbers=range(1, 4), sortable=True)
    return element("section", element("h2", "Speed in a serving engine"), note, inner, class_="dense")


def _recipes(rows: Sequence[Mapping[str, Any]], differences: Mapping[str, Sequence[Any]]) -> Markup | None:
    if not differences:
        return None
    cells = [(element("code", key), *map(_as_written, values)) for key, values in differences.items()]
    names = [row["run"] for row in rows]
    return element("section", element("h2", "What differs in the recipes"), table(("key", *names), cells))


def _as_written(value: Any) -> str:
    """A value as a recipe has it; what is not set in a row of a list is left out."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_written(v)}' for key, v in value.items() if v is not None)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return MISSING if value is None else str(value)


def _maps(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """A heat map for each run, all of one scale; runs that have the commonest measure."""
    named: dict[str, list[tuple[str, Grid]]] = {}
    for run, row in zip(runs, rows, strict=True):
        errors = run["errors"]
        grid = grid_of(errors["name"], run["plan"]["linears"], errors["values"], run["blocks"])
        if grid.values:
            named.setdefault(errors["name"], []).append((row["run"], grid))
    if not named:
        return None
    measure, grids = max(named.items(), key=lambda item: len(item[1]))
    grids = grids[:_MAPS]
    bounds = [grid.bounds() for _, grid in grids]
    scale = min(low for low, _ in bounds), max(high for _, high in bounds)
    drawn = [(element("h3", name), heat_map(grid, scale)) for name, grid in grids]
    left_out = len(rows) - len(grids)
    note = f"{left_out} runs are left out: they have no such measure, or are too many." if left_out else None
    heading = element("h2", f"{measure} by layer, on one scale")
    return element("section", heading, element("p", note, class_="note") if note else None, drawn, class_="long")


def _measured(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    keys = dict.fromkeys(key for row in rows for key in row["measured"])
    if not keys:
        return None

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return element("span", value, class_="words")
        return "" if value is None else short(value, 5) if isinstance(value, float) else str(value)

    cells = [(element("code", key), *[shown(row["measured"].get(key)) for row in rows]) for key in keys]
    names = [row["run"] for row in rows]
    inner = table(("value", *names), cells, numbers=range(1, len(names) + 1))
    folded = element("details", element("summary", f"{len(cells)} values"), inner)
    return element("section", element("h2", "Everything measured"), folded)
