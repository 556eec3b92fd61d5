"""Which serving engines load which scheme in which format: the reader of engines.yaml and of its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from quantcli.formats.compressed_tensors import layout_name
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

TABLE, SOURCES = (Path(__file__).with_name(name) for name in ("engines.yaml", "engine_sources.yaml"))

UNPACKING = frozenset({"transformers"})
"""Engines that unpack weights on loading: they compute with any scheme, and gain no speed by it."""

Part = Literal["format", "linears", "attention", "experts", "biases"]

_SCHEME = {field.name for field in fields(Scheme)} | {"int8_products", "scheme", "inputs", "marlin_groups"}
_BEHIND_GATES = {"architecture", "with_down", "down"}
FACTS: dict[Part, frozenset[str]] = {
    "format": frozenset(),
    "linears": frozenset(_SCHEME | {"multiples_of_32", "odd", "of_experts", "outside", "one_layout"} | _BEHIND_GATES),
    "attention": frozenset({"kv", "heads", "scheme"}),
    "experts": frozenset(_SCHEME | {"in_float", "alike", "alone", "most"}),
    "biases": frozenset(),
}
"""What rows may ask for, and name in their notes, besides the fields of a scheme:

scheme: its name. inputs: `float` or `8-bit`. marlin_groups: groups of 32, 64 or 128, or one scale a channel or tensor.
multiples_of_32: the widths of all its linears are; odd: one of which they are not. of_experts: all its linears are of
experts; outside: one that is not. architecture: that of the model; with_down: a linear is called down_proj, as what
reads a product with a gate; down: one of them. one_layout: all schemes of the model are stored in one layout of
compressed-tensors. in_float: the experts are. alike: all layers have their experts in one scheme. alone: nothing is
quantized but the cache. most: no other scheme has more linears.
"""


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a checkpoint. `source` is where that was read: what it is, and its address."""

    engine: str
    loads: bool
    note: str = ""
    source: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table. `when`: fact → values that it may have."""

    engines: tuple[str, ...]
    formats: tuple[str, ...]
    of: Part
    loads: bool
    source: str
    note: str
    when: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Table:
    """engines.yaml. `names`: what users read, by what recipes write; `joins`: (engine, format) → source."""

    names: Mapping[str, str]
    rows: tuple[Row, ...]
    joined: tuple[tuple[str, ...], ...]
    joins: Mapping[tuple[str, str], str]
    sources: Mapping[str, str]

    def rows_of(self, engine: str, form: str, part: Part) -> list[Row]:
        return [row for row in self.rows if row.of == part and engine in row.engines and form in row.formats]

    def reads(self, engine: str, form: str) -> bool:
        return not self.rows_of(engine, form, "format")


@cache
def table() -> Table:
    content, read_in = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in (TABLE, SOURCES))
    sources = {key: f"{source['what']}, {source['url']}" for key, source in read_in.items()}
    return Table(
        names={key: engine["name"] for key, engine in content["engines"].items()},
        rows=tuple(_row(row, sources) for row in content["rows"]),
        joined=tuple(map(tuple, content["joined"])),
        joins={
            (engine, form): sources[group["source"]]
            for group in content["joins"]
            for engine in group["engines"]
            for form in group["formats"]
        },
        sources=sources,
    )


def _row(content: Mapping[str, Any], sources: Mapping[str, str]) -> Row:
    when = {
        key: tuple(value) if isinstance(value, list) else (value,) for key, value in content.get("when", {}).items()
    }
    engines, formats = (tuple(content[key]) for key in ("engines", "formats"))
    source, note = sources[content["source"]], content.get("note", "")
    return Row(engines, formats, content["of"], content["loads"], source, note, when)


def verdicts(
    linears: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None = None,
    formats: Sequence[str] = ("compressed-tensors",),
    kept: Collection[str] = (),
    experts: Sequence[Collection[str]] = (),
    *,
    biases: bool = False,
    architecture: str = "",
) -> list[Verdict]:
    """For each engine that reads one of the formats, whether it loads a checkpoint of these linears and this attention.

    A mixed model is loaded by an engine only if every scheme is; the note is about the first that is not. `kept` are
    linears that stay in float beside them; `experts` the linears of the experts of each layer; `biases` says that some
    may be added to the architecture's, and `architecture` is its class. An engine that reads several of the formats is
    named with each.
    """
    read = [(form, engine) for form in formats for engine in table().names if table().reads(engine, form)]
    times = Counter(engine for _, engine in read)
    found = []
    for form, engine in read:
        verdict = _verdict(engine, form, linears, attention, kept, experts, architecture, biases=biases)
        found.append(replace(verdict, engine=f"{verdict.engine} ({form})") if times[engine] > 1 else verdict)
    return found


def refusal(
    engine: str,
    linears: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    formats: Sequence[str],
    kept: Collection[str] = (),
    experts: Sequence[Collection[str]] = (),
    architecture: str = "",
) -> str:
    """Why an engine, by its name in recipes, loads none of these formats, with the source; empty if it loads one."""
    causes = []
    for form in formats:
        unread = table().rows_of(engine, form, "format")
        if unread:
            verdict = Verdict(engine, False, unread[0].note, unread[0].source)
        else:
            verdict = _verdict(engine, form, linears, attention, kept, experts, architecture)
        if verdict.loads:
            return ""
        causes.append(f"{form}: {verdict.note} ({verdict.source})")
    return f"{table().names[engine]} does not load this export. {'; '.join(causes)}."


def _verdict(
    engine: str,
    form: str,
    linears: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    kept: Collection[str],
    experts: Sequence[Collection[str]],
    architecture: str,
    *,
    biases: bool = False,
) -> Verdict:
    name, joined = table().names[engine], table().joins.get((engine, form), "")
    asked = list(_asked(linears, attention, {name for layer in experts for name in layer}, architecture))
    found = [(facts["scheme"], *_decide(engine, form, part, facts)) for part, facts in asked]
    for scheme, row, note in found:
        if not row.loads:
            return Verdict(name, False, f"{scheme}: {note}" if len(found) > 1 else note, row.source)
    schemes = {**dict.fromkeys(kept), **{linear.name: scheme for linear, scheme in linears}}
    if joined and (split := _split(schemes)):
        return Verdict(name, False, f"joins {split}, which have different schemes", joined)
    of_experts: dict[Scheme | None, None] = {}
    for layer in experts:
        own = {schemes.get(name) for name in layer}
        if len(own) > 1 and joined:
            return Verdict(name, False, "gives all experts of a layer one scheme", joined)
        of_experts |= dict.fromkeys(own)
    counts = Counter(scheme for _, scheme in linears)
    for expert in of_experts:
        row, note = _decide(engine, form, "experts", _facts_of_experts(expert, of_experts, counts))
        if not row.loads:
            return Verdict(name, False, note, row.source)
        found.append(("", row, note))
    if biases:
        row, note = _decide(engine, form, "biases", {})
        if not row.loads:
            return Verdict(name, False, note, row.source)
        found.append(("", row, note))
    notes = [note for _, _, note in found]
    return Verdict(name, True, _once(notes, "; "), _once([row.source for _, row, _ in found], "; "))


def _once(texts: Sequence[str], between: str) -> str:
    return between.join(dict.fromkeys(filter(None, texts)))


def _decide(engine: str, form: str, part: Part, facts: Mapping[str, Any]) -> tuple[Row, str]:
    """The first row that holds, and its note. That there is one for all that can be made is a matter of the table."""
    for row in table().rows_of(engine, form, part):
        if all(facts[key] in values for key, values in row.when.items()):
            return row, row.note.format_map(facts)
    raise LookupError(f"engines.yaml has no row of {engine}, {form} and {part} for {facts}")


def _asked(
    linears: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    inside: Collection[str],
    architecture: str,
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """What is asked of a table for each scheme of linears, and for attention. `inside`: the linears of experts."""
    by_scheme: dict[Scheme, list[Linear]] = {}
    for linear, scheme in linears:
        by_scheme.setdefault(scheme, []).append(linear)
    layouts = {layout_name(scheme) for scheme in by_scheme}
    for scheme, members in by_scheme.items():
        odd = next((m.name for m in members if m.in_features % 32 or m.out_features % 32), "")
        outside = next((m.name for m in members if m.name not in inside), "")
        down = next((m.name for m in members if m.name.endswith(".down_proj")), "")
        yield "linears", {
            **_facts(scheme), "multiples_of_32": not odd, "odd": odd, "of_experts": not outside, "outside": outside,
            "one_layout": len(layouts) == 1, "architecture": architecture, "with_down": bool(down), "down": down,
        }  # fmt: skip
    if attention is not None:
        yield "attention", {"kv": attention.kv, "heads": attention.heads, "scheme": attention.name}


def _facts(scheme: Scheme) -> dict[str, Any]:
    return {
        **asdict(scheme),
        "scheme": scheme.name,
        "int8_products": scheme.int8_products,
        "inputs": "float" if scheme.activations == "none" else f"{scheme.activation_bits}-bit",
        "marlin_groups": scheme.group_size in (None, 32, 64, 128),
    }


def _facts_of_experts(
    scheme: Scheme | None, schemes: Collection[Scheme | None], counts: Mapping[Scheme, int]
) -> dict[str, Any]:
    """Of experts in one of `schemes`; `counts`: how many linears of the model have each. None stands for float."""
    facts: dict[str, Any] = dict.fromkeys(_SCHEME) if scheme is None else _facts(scheme)
    most = max(counts.values(), default=0)
    return facts | {
        "scheme": "float" if scheme is None else scheme.name,
        "in_float": scheme is None,
        "alike": len(schemes) == 1,
        "alone": not counts,
        "most": scheme is None or counts[scheme] == most,
    }


def _split(schemes: Mapping[str, Scheme | None]) -> str:
    """Two linears of one joined group that have different schemes (None: float), as words; empty if there are none."""
    for name, scheme in schemes.items():
        parent, dot, own = name.rpartition(".")
        for group in table().joined:
            for other in (f"{parent}{dot}{part}" for part in group if own in group):
                if schemes.get(other, scheme) != scheme:
                    return f"{name} and {other}"
    return ""
