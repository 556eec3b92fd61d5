"""The page of a run: what it came to, what to beware of, and where the losses are. One file that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from quantcli.report.charts import Line, heat_map, panels, size_bars
from quantcli.report.distributions import distributions
from quantcli.report.gains import HEADINGS, gain_rows
from quantcli.report.layers import grid_of, kind_of
from quantcli.report.markup import Markup, element, facts, folded, joined, table
from quantcli.report.numbers import MISSING, TYPESET, fixed, percent, ratio, seconds, short, size, typeset
from quantcli.report.outcome import outcome_rows, scheme_rows, stored_sizes, throughput_setting
from quantcli.report.style import SCRIPT, STYLE

PARTS = ("codes", "scales and zero points", "float linears", "output head", "embeddings", "norms, biases and other")
"""Parts of a checkpoint, in the order in which a bar shows them."""
MISSED = "missed gate"
"""The kind of a problem that a missed gate is."""

WORST = "worst linears"
"""The kind of what is said of missed gates together: the linears that are hurt most."""
_SHOWN = 4  # messages of a kind that stand in the open
_MOST_ROWS = 3000  # linears in the table of all
_PANELS = 8


def run_page(run: Mapping[str, Any]) -> str:
    """The page of a run, from what `pipeline.run_facts` gathers."""
    title = f"{run['name']}: {run['plan']['architecture']}"
    body = [
        _header(run),
        problems(run["problems"]),
        _tiles(run),
        _section("Outcome", facts(_outcome(run))),
        distributions(run["result"].get("perplexity")),
        _gains(run["result"]),
        _errors(run),
        _ranges(run),
        _generation(run.get("generation")),
        _sizes(run),
        _schemes(run),
        _numbers(run["results"]),
        _calibration(run),
        _provenance(run),
    ]
    return page(title, body)


def page(title: str, body: Iterable[Markup | None]) -> str:
    """A whole HTML document. Its policy forbids whatever would ask a network, whoever wrote the texts in it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    ]
    content = [element("main", body), element("script", Markup(SCRIPT))]
    return "<!doctype html>\n" + element("html", element("head", head), element("body", content), lang="en") + "\n"


def _section(title: str, *content: Any, look: str | None = None) -> Markup:
    return element("section", element("h2", title), content, class_=look)


def _note(*content: Any) -> Markup:
    return element("p", content, class_="note")


def _header(run: Mapping[str, Any]) -> Markup:
    counts = _counts(run["plan"]["linears"])
    shown = ", ".join(f"{count} {scheme}" for scheme, count in counts.items())
    return element(
        "header",
        element("h1", run["name"]),
        _note(f"{run['plan']['architecture']}, {run['plan']['dtype']}, from ", element("code", run["plan"]["model"])),
        _note(f"Linears: {shown}"),
    )


def _counts(linears: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for linear in linears:
        counts[linear["scheme"]] = counts.get(linear["scheme"], 0) + 1
    return counts


def problems(found: Sequence[Mapping[str, str]]) -> Markup:
    """Missed gates, then fallbacks and warnings, then notes; many of a stage and kind are folded."""
    missed = [each for each in found if each["kind"] == MISSED]
    serious = [each for each in found if each["kind"] not in ("note", MISSED, WORST)]
    notes = [each for each in found if each["kind"] == "note"]
    if not found:
        return element("section", element("h2", "No warnings, no fallbacks"), class_="calm")
    heads = [f"{len(missed)} missed gate{'s' * (len(missed) != 1)}"] if missed else []
    if serious:
        heads.append("1 warning or fallback" if len(serious) == 1 else f"{len(serious)} warnings and fallbacks")
    heads = heads or ["No warnings, no fallbacks"]
    heads += [f"{len(notes)} note{'s' * (len(notes) != 1)}"] if notes else []
    content = [element("ul", [element("li", element("b", "Missed gate: "), typeset(each["text"])) for each in missed])]
    content += [element("p", each["text"]) for each in found if each["kind"] == WORST]
    look = "warnings" if missed or serious else None
    return _section(", ".join(heads), content * bool(missed), _messages(serious), _messages(notes), look=look)


def _messages(found: Sequence[Mapping[str, str]]) -> Iterator[Markup]:
    ordered = sorted(found, key=lambda each: (each["stage"], each["kind"]))
    for (stage, kind), group in groupby(ordered, key=lambda each: (each["stage"], each["kind"])):
        items = [
            element("li", f"{kind.capitalize()}: " if kind != "note" else None, each["text"], " ",
                    element("span", stage, class_="stage") if stage else None)
            for each in group
        ]  # fmt: skip
        yield element("ul", items[:_SHOWN])
        if len(items) > _SHOWN:
            yield folded(f"{len(items) - _SHOWN} more of stage {stage or 'plan'}", element("ul", items[_SHOWN:]))


def _tiles(run: Mapping[str, Any]) -> Markup:
    result, sizes = run["result"], run["sizes"]
    tiles: list[tuple[str, str]] = []
    if scores := result.get("perplexity"):
        low, high = (percent(bound, signed=True) for bound in scores.get("increase_interval") or (None, None))
        interval = "" if MISSING in (low, high) else f", 95{TYPESET.sign} interval {low} to {high}"
        tiles.append((percent(scores.get("increase"), signed=True), f"perplexity{interval}"))
        tiles.append((short(scores.get("kl_divergence")), "KL divergence, nats a token"))
        tiles.append((percent(scores.get("agreement")), "same top token"))
    before, after = stored_sizes({**result, "sizes": sizes})
    tiles.append((ratio(before / max(1, after)), "smaller checkpoint"))
    bits = next((entry["bits_per_weight"] for entry in sizes.values() if entry.get("bits_per_weight")), None)
    tiles.append((fixed(bits or run["plan"].get("bits_per_weight")), "bits a quantized weight"))
    tiles.append((seconds(_whole_time(result)), "time of all stages"))
    return element("div", [_tile(value, label) for value, label in tiles], class_="tiles")


def _tile(value: str, label: str) -> Markup:
    return element("div", element("b", value), element("span", label), class_="tile")


def _whole_time(result: Mapping[str, Any]) -> float:
    return sum(record.get("seconds") or 0.0 for record in result["stages"].values())


def _outcome(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for label, value in outcome_rows({**run["plan"], "notes": []}, run["result"], TYPESET):
        yield label, element("code", value) if label == "checkpoint" else value
    for engine in run["plan"].get("engines", ()):
        yield engine["engine"], ("loads it: " if engine["loads"] else "does not load it: ") + engine["note"]


def _gains(result: Mapping[str, Any]) -> Markup | None:
    """What was measured of both models, side by side. Nothing if it was the sizes alone, which have a section."""
    rows = [(*before, typeset(change)) for *before, change in gain_rows(result)]
    if len(rows) <= len(result.get("exports", ())):
        return None
    speed = result.get("throughput")
    how = f"Speed and memory: {throughput_setting(speed)}; medians." if speed else None
    inner = table(HEADINGS, rows, numbers=range(1, len(HEADINGS)))
    return _section("Before and after", _note(how) if how else None, inner)


def _errors(run: Mapping[str, Any]) -> Markup | None:
    """The heat map, and the linears that lose most."""
    errors, blocks = run["errors"], run["blocks"]
    if not errors["values"]:
        return None
    grid = grid_of(errors["name"], run["plan"]["linears"], errors["values"], blocks)
    known = [linear for linear in run["plan"]["linears"] if linear["name"] in errors["values"]]
    worst = sorted(known, key=lambda linear: -errors["values"][linear["name"]])[:10]
    rows = [
        (
            element("code", linear["name"]),
            linear["scheme"],
            short(errors["values"][linear["name"]]),
            linear["reason"] or _by_rule(linear["scheme"]),
        )
        for linear in worst
    ]
    return _section(
        f"{errors['name']} by layer",
        _note(errors["description"]),
        heat_map(grid) if grid.rows else None,
        element("h3", "Where most is lost"),
        table(("linear", "scheme", errors["name"].lower(), "why this scheme"), rows, numbers=[2]),
    )


def _ranges(run: Mapping[str, Any]) -> Markup | None:
    """Largest input of each group of linears by block, before and after smoothing."""
    ranges = run["ranges"]
    if not ranges:
        return None
    charts: dict[str, list[Line]] = {}
    blocks = run["blocks"]
    smoothed = any(entry.get("before") is not None for entry in ranges)
    for key, name, look in (("before", "before smoothing", "before"), ("after", "after smoothing", "after")):
        for title, values in _by_kind(ranges, key, blocks).items():
            charts.setdefault(title, []).append(Line(name if smoothed else "largest input", look, values))
    shown = dict(list(charts.items())[:_PANELS])
    keys = [("before", "before smoothing"), ("after", "after smoothing")] if smoothed else [("after", "as calibrated")]
    legend = [(Markup("&emsp;"), element("span", class_=f"key {look}"), name) for look, name in keys]
    left = f" The first {_PANELS} of {len(charts)} kinds." if len(charts) > _PANELS else ""
    return _section(
        "Activation ranges" + (" before and after smoothing" if smoothed else ""),
        _note(f"Largest absolute input value over the calibration text, by block.{left}", legend),
        panels(shown, blocks, "largest input"),
        _smoothing_table(run["smoothing"], blocks) if run["smoothing"] else None,
    )


def _by_kind(ranges: Iterable[Mapping[str, Any]], key: str, blocks: int) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for entry in ranges:
        value = entry.get(key)
        if value is not None and entry["block"] < blocks:
            values = found.setdefault(_group_name(entry["linears"], entry["block"], blocks), {})
            values[entry["block"]] = max(value, values.get(entry["block"], 0.0))
    return found


def _group_name(linears: Sequence[str], block: int, blocks: int) -> str:
    kinds = list(dict.fromkeys(kind_of(name, block, blocks) for name in linears))
    others = [kind.rpartition(".")[2] for kind in kinds[1:4]]
    return ", ".join([kinds[0], *others]) + (", …" if len(kinds) > 4 else "")


_STRENGTHS = ("alpha", "beta", "ratio", "threshold")
_MEASURES = {"largest": "largest", "ratio": "of the median", "error": "error"}
"""Of a group's input: the largest magnitude, its ratio to the median channel's, and the error of the outputs."""


def _smoothing_table(outcomes: Sequence[Mapping[str, Any]], blocks: int) -> Markup:
    rows = []
    for outcome in outcomes:
        if not outcome["kept"]:
            what = f"as found: {outcome['cause']}"
        else:
            found = [f"{key} {short(outcome[key])}" for key in _STRENGTHS if outcome.get(key) is not None]
            what = ", ".join(part for part in (outcome.get("chosen", ""), *found) if part)
        numbers = [outcome.get(f"{key}_{when}") for key in _MEASURES for when in ("before", "after")]
        name = element("code", _group_name(outcome["linears"], outcome["block"], blocks))
        rows.append((outcome["block"], name, outcome["fold"], what, *[(short(n), n) for n in numbers]))
    measures = [heading for key in _MEASURES.values() for heading in (f"{key} before", "after")]
    headings = ("block", "linears", "fold", "scale", *measures)
    inner = table(headings, rows[:_MOST_ROWS], numbers=[0, *range(4, len(headings))], sortable=True)
    return folded(f"All {len(outcomes)} groups of linears", inner)


def _generation(found: Mapping[str, Any] | None) -> Markup | None:
    if found is None:
        return None
    if found.get("skipped"):
        return _section("Generated text", _note(found["skipped"]))
    pairs = []
    for entry in found["prompts"]:
        common = _common(entry["float"]["text"], entry["quantized"]["text"])
        answers = [
            element("div", element("span", title), element("p", _marked(entry[key]["text"], common), dir="auto"),
                    class_="answer")
            for key, title in (("float", "float"), ("quantized", "quantized"))
        ]  # fmt: skip
        pairs += [element("p", entry["prompt"], class_="prompt", dir="auto"), element("div", answers, class_="pair")]
    how = "as a chat" if found.get("chat_template") else "as plain text"
    same = sum(entry["float"]["tokens"] == entry["quantized"]["tokens"] for entry in found["prompts"])
    note = (
        f"Greedy decoding, at most {found['max_new_tokens']} tokens, prompts {how}. {same} of {len(found['prompts'])} "
        "are equal; what comes behind the first difference is marked. A difference is no fault in itself: where two "
        "tokens are nearly as likely, little decides between them."
    )
    return _section("Generated text, float and quantized", _note(note), pairs)


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def _marked(answer: str, common: int) -> list[Any]:
    return [answer[:common], element("mark", answer[common:]) if answer[common:] else None]


def _sizes(run: Mapping[str, Any]) -> Markup | None:
    sizes = run["sizes"]
    if not sizes:
        return None
    names = list(sizes)
    rows = []
    for index, part in enumerate(PARTS):
        row = [sizes[name]["parts"].get(part, 0) for name in names]
        if any(row):
            key = element("span", class_=f"key part{index}")
            rows.append([element("span", key, part), *[(size(n) if n else MISSING, n) for n in row]])
    rows.append([element("b", "together"), *[element("b", size(sizes[name]["bytes"])) for name in names]])
    rows.append(["smaller than the float model", *[ratio(sizes[name].get("ratio")) for name in names]])
    for label, fact in (("bits a quantized weight, scales included", "bits_per_weight"),
                        ("bits a parameter, everything included", "bits_per_parameter")):  # fmt: skip
        rows.append([label, *[fixed(sizes[name].get(fact)) for name in names]])
    bars = {name: sizes[name]["parts"] for name in names}
    return _section("Size", size_bars(bars, PARTS), table(("part", *names), rows, numbers=range(1, len(names) + 1)))


def _schemes(run: Mapping[str, Any]) -> Markup:
    linears = run["plan"]["linears"]
    grouped = [(element("code", name), count, shape, scheme, reason or _by_rule(scheme))
               for name, count, shape, scheme, reason in scheme_rows(linears)]  # fmt: skip
    headings = ("linears", "count", "shape", "scheme", "why")
    errors = run["errors"]["values"]
    names = sorted({key for found in run["linear_facts"].values() for key in found})
    rows = []
    for linear in linears[:_MOST_ROWS]:
        found = run["linear_facts"].get(linear["name"], {})
        value = errors.get(linear["name"])
        cells = [_fact(found.get(name)) for name in names]
        rows.append((element("code", linear["name"]), linear["scheme"], (short(value), value), *cells))
    more = f", the first {_MOST_ROWS} here" if len(linears) > _MOST_ROWS else ""
    every = table(("linear", "scheme", run["errors"]["name"].lower(), *[name.replace("_", " ") for name in names]),
                  rows, numbers=range(2, 3 + len(names)), sortable=True)  # fmt: skip
    return _section(
        "Which scheme each linear got",
        table(headings, grouped, numbers=[1]),
        folded(f"All {len(linears)} linears, with what was found of each{more}", every),
        look="long",
    )


def _by_rule(scheme: str) -> str:
    return "the recipe's scheme" if scheme != "float" else ""


def _fact(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "yes" if value else ""
    return (short(float(value)), value) if isinstance(value, (int, float)) else str(value)


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """Whatever was measured, by its name in the stage's results.json."""
    rows = [(stage, element("code", name), value) for stage, content in results.items()
            for name, value in flat(content)]  # fmt: skip
    if not rows:
        return None
    shown = [(stage, name, short(value, 5) if isinstance(value, float) else str(value)) for stage, name, value in rows]
    return _section("Everything measured", folded(f"{len(rows)} values", table(("stage", "name", "value"), shown)))


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of all single values in nested mappings; lists are left out."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        elif not isinstance(value, list):
            yield name, value


def _calibration(run: Mapping[str, Any]) -> Markup | None:
    return _section("Calibration", facts(run["calibration"])) if run["calibration"] else None


def _provenance(run: Mapping[str, Any]) -> Markup:
    stages = [
        (name, (seconds(record.get("seconds")), record.get("seconds")), size(record.get("peak_memory")))
        for name, record in run["result"]["stages"].items()
    ]
    rows: list[tuple[str, Any]] = [("command", element("code", run["command"]))] if run.get("command") else []
    rows += [("seed", run.get("seed")), ("device", run.get("device"))]
    rows += [("run directory", element("code", run["path"]))]
    rows += [(name, version) for name, version in (run.get("versions") or {}).items()]
    return joined([
        _section("Time and memory", table(("stage", "time", "peak memory of the process"), stages, numbers=[1, 2])),
        _section("How this came about", facts(rows),
                 folded("The recipe as resolved", element("pre", run.get("recipe", "")))),
    ])  # fmt: skip
