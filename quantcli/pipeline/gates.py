"""Quality gates: which bounds of a recipe a run keeps, which fallbacks it took, and what that looks like in CI."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from quantcli.formats.common import WEIGHT_SUFFIXES
from quantcli.model.checkpoint import read_json, replacing
from quantcli.pipeline.rundir import current_events, write_json
from quantcli.pipeline.stages import layers, quantize
from quantcli.recipe.evaluation import GatesSection
from quantcli.report.gains import HEADINGS, gain_rows
from quantcli.report.outcome import data_name, stored_sizes, throughput_setting

FOLDER = "gates"
WORST = 5
"""Linears that a missed gate names."""

PERCENTAGES = {"perplexity_increase", "agreement", "task_drop", "size_ratio"}
"""Gates whose values are fractions, which recipes and sentences give in percent."""

OF_OUTPUTS = {"perplexity_increase", "kl_divergence", "agreement", "task_drop"}
"""Gates whose values come from errors of what linears put out."""

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class Gate:
    """A bound and what was found. `value` is null where it is not defined, `reason` says why if that is known; `least`
    marks a lower bound; `error` is the standard error of the value, where there is one; `parts` are what a sum of
    fallbacks is made of; `named`, of one that is missed, are the linears that took a fallback, or what is largest."""

    name: str
    bound: float
    value: float | None
    least: bool = False
    error: float | None = None
    reason: str = ""
    parts: Mapping[str, int] = field(default_factory=dict)
    named: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.least else self.value <= self.bound

    @property
    def missed_by(self) -> float | None:
        """How far the value lies beyond its bound; null where it keeps it or is not defined."""
        return None if self.passed or self.value is None else abs(self.value - self.bound)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "missed_by": self.missed_by}

    def sentence(self) -> str:
        """What was found, and by how much it misses the bound."""
        place = f"evaluate.gates.{self.name}:"
        if self.value is None:
            return f"{place} {self.reason or 'the value is undefined'}."
        parts = ", ".join(f"{kind} {count}" for kind, count in self.parts.items())
        shown, bound = self.shown_value() + (f" ({parts})" if parts else ""), self._amount(self.bound)
        if self.missed_by is None:
            return f"{place} {shown} keeps {bound}."
        beyond = "below" if self.least else "above"
        return f"{place} {shown} is {beyond} {bound}, by {self._amount(self.missed_by, digits=4)}." + (
            f" {self.shown_names()}" if self.named else ""
        )

    def shown_names(self) -> str:
        more = f" and {len(self.named) - WORST} more" if len(self.named) > WORST else ""
        said = "Concerned" if self.name.startswith("fallbacks.") else "Largest"
        return f"{said}: {', '.join(self.named[:WORST])}{more}."

    def shown_value(self) -> str:
        """The value with its error and unit."""
        if self.value is None:
            return "undefined"
        error = f" ± {self._amount(self.error, digits=2)}" if self.error is not None else ""
        return self._amount(self.value) + error

    def shown_bound(self) -> str:
        return f"{'≥' if self.least else '≤'} {self._amount(self.bound)}"

    def _amount(self, value: float, digits: int = 6) -> str:
        kind = self.name.partition(" ")[0]
        if kind in PERCENTAGES:
            return f"{100 * value:.{digits}g}%"
        if kind == "size":
            unit, name = next(((u, n) for u, n in UNITS if value >= u), (1, "B"))
            return f"{value / unit:.{digits}g} {name}"
        return f"{value:.{digits}g}"


def judged(gates: GatesSection, result: Mapping[str, Any], run: Path, export: Path) -> list[Gate]:
    """The gates of the recipe whose values are in `result`, which is what `run --json` prints; of fallbacks what
    `run` recorded, of sizes what lies in `export`."""
    found: list[Gate] = []
    if (scores := result["perplexity"]) is not None:
        found += of_scores(gates, scores)
    if gates.task_drop is not None:
        for task, outcome in ((result["tasks"] or {}).get("tasks") or {}).items():
            if not outcome.get("metrics"):
                reason = "cannot be judged, since the task has no metric between 0 and 1 for each question"
                found.append(Gate(f"task_drop ({task})", gates.task_drop, None, reason=reason))
            for metric, numbers in outcome.get("metrics", {}).items():
                change = numbers["change"]
                worse = 1.0 if numbers.get("lower_is_better") else -1.0
                drop = None if change is None else 0.0 + worse * change  # not −0
                found.append(
                    Gate(f"task_drop ({task}, {metric})", gates.task_drop, drop, error=numbers["change_error"])
                )
    found += _of_size(gates, result, export)
    taken = _taken(run, result["stages"])
    counts = _counted(taken)
    for kind, bound in gates.fallbacks:
        if bound is not None:
            total = sum(counts.values()) if kind == "all" else counts.get(kind, 0)
            gate = Gate(f"fallbacks.{kind}", bound, total, parts=counts if kind == "all" else {})
            concerned = [event for event in taken if not gate.passed and kind in ("all", event["fallback"])]
            named = dict.fromkeys(name for event in concerned for name in event.get("modules", ()))
            found.append(replace(gate, named=tuple(named)))
    return found


def of_scores(gates: GatesSection, scores: Mapping[str, Any]) -> Iterator[Gate]:
    """The gates of what both models predict of the same text."""
    for name, bound, least, error in (
        ("perplexity_increase", gates.perplexity_increase, False, "increase_error"),
        ("kl_divergence", gates.kl_divergence, False, "kl_error"),
        ("agreement", gates.agreement, True, "agreement_error"),
    ):
        key = "increase" if name == "perplexity_increase" else name
        if bound is not None:
            yield Gate(name, bound, scores[key], least, scores[error])


def set_gates(gates: GatesSection) -> list[str]:
    """The names of the gates that have a bound."""
    bounds = gates.model_dump(exclude_none=True, exclude={"fallbacks"})
    return [*bounds, *(f"fallbacks.{kind}" for kind, bound in gates.fallbacks if bound is not None)]


def _of_size(gates: GatesSection, result: Mapping[str, Any], export: Path) -> Iterator[Gate]:
    """Sizes are bytes of the files with the export's weights."""
    if gates.bits_per_weight is not None:
        yield Gate("bits_per_weight", gates.bits_per_weight, result["bits_per_weight"])
    size = sum(file.stat().st_size for file in export.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if gates.size is not None:
        yield Gate("size", gates.size, size)
    if gates.size_ratio is not None:
        yield Gate("size_ratio", gates.size_ratio, size / stored_sizes(result)[0])


def fallbacks(run: Path, stages: Iterable[str]) -> dict[str, int]:
    """How often `stages`, those of the run, took each kind of fallback as they last ran, from its events."""
    return _counted(_taken(run, stages))


def _counted(taken: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Kind of fallback → how often its warnings say that it was taken."""
    counts: dict[str, int] = {}
    for event in taken:
        counts[event["fallback"]] = counts.get(event["fallback"], 0) + event.get("count", 1)
    return counts


def _taken(run: Path, stages: Iterable[str]) -> list[dict[str, Any]]:
    """The warnings of fallbacks. A stage that was interrupted and went on counts from its first beginning; the same
    warning counts once."""
    warnings: dict[str, dict[str, dict[str, Any]]] = {}
    finished: set[str] = set()
    for event in current_events(run, stages):
        stage, kind = event.get("stage", ""), event.get("event")
        if kind == "started" and stage in finished:
            warnings.pop(stage, None)
            finished.discard(stage)
        elif kind == "finished":
            finished.add(stage)
        elif kind == "warning" and "fallback" in event:
            warnings.setdefault(stage, {})[event["text"]] = event
    return [event for told in warnings.values() for event in told.values()]


@dataclass(frozen=True)
class Worst:
    """The linears that quantization hurts most, worst first, and by which measure."""

    measure: str
    linears: tuple[tuple[str, float], ...] = ()


def worst_linears(run: Path, stages: Container[str], schemes: Mapping[str, str]) -> Worst:
    """The linears with the largest errors of those that have a scheme now (`schemes`: name → scheme).

    Where `stages`, those of this run, have measured what exported linears put out, by that: relative squared errors for
    the float model's inputs. Else by the errors recorded when the linears were last quantized: relative squared errors
    of weights, weighed as their method weighs them, which know nothing of what happened to the files since.
    """
    file = run / layers.STAGE.name / layers.RESULT
    if layers.STAGE.name in stages and file.is_file():
        rows = [(entry["name"], entry.get("output_error")) for entry in read_json(file)["linears"]]
        measure = "output error"
    else:
        events = current_events(run, (quantize.STAGE.name,))
        rows = [(e["module"], e.get("error")) for e in events if e["event"] == "linear"
                and schemes.get(e["module"]) == e["scheme"]]  # fmt: skip
        measure = "weight error"
    errors = {name: float(error) for name, error in rows if error is not None and name in schemes}
    return Worst(measure, tuple(sorted(errors.items(), key=lambda item: -item[1])[:WORST]))


def write_reports(run: Path, gates: Sequence[Gate], result: Mapping[str, Any], worst: Worst) -> None:
    """gates.json, junit.xml and summary.md in the folder `gates` of the run."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    rows = [gate.to_json() for gate in gates]
    found = {"worst_linears": worst.linears, "worst_by": worst.measure}
    write_json(folder / "gates.json", {"gates": rows, "fallbacks": fallbacks(run, result["stages"]), **found})
    for name, text in (("junit.xml", junit(gates, worst)), ("summary.md", summary(gates, result, worst))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def remove_reports(run: Path) -> None:
    for name in ("gates.json", "junit.xml", "summary.md"):
        (run / FOLDER / name).unlink(missing_ok=True)


def junit(gates: Sequence[Gate], worst: Worst) -> str:
    """A JUnit test suite with a case for every gate."""
    missed = sum(not gate.passed for gate in gates)
    suite = ElementTree.Element("testsuite", name="quantcli gates", tests=str(len(gates)), failures=str(missed))
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", classname="quantcli.gates", name=gate.name)
        if gate.passed:
            ElementTree.SubElement(case, "system-out").text = gate.sentence()
        else:
            failure = ElementTree.SubElement(case, "failure", message=gate.sentence())
            linears = worst.linears if hurt_by_error([gate]) else ()
            failure.text = "\n".join([gate.sentence(), *(f"{name}: {worst.measure} {e:.4g}" for name, e in linears)])
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def summary(gates: Sequence[Gate], result: Mapping[str, Any], worst: Worst) -> str:
    """GitHub-flavoured Markdown: the gates, what was measured, and the linears that are hurt most if one is missed."""
    missed = [gate for gate in gates if not gate.passed]
    verdict = f"{len(missed)} of {len(gates)} gates missed" if missed else f"all {len(gates)} gates kept"
    lines = [f"### Quantization: {verdict}", "", "| gate | bound | found | |", "|---|---:|---:|---|"]
    for gate in gates:
        verdict = "kept" if gate.passed else "**missed**"
        lines.append(f"| `{gate.name}` | {gate.shown_bound()} | {gate.shown_value()} | {verdict} |")
    named = [f"`{gate.name}`: {gate.shown_names()}" for gate in missed if gate.named]
    lines += [line for each in named for line in ("", each)]
    if (scores := result["perplexity"]) is not None:
        plain, quantized = scores["float_model"]["value"], scores["quantized"]["value"]
        lines += ["", f"Perplexity {_shown(plain)} → {_shown(quantized)}, KL divergence "
                  f"{_shown(scores['kl_divergence'])}, same top token {_shown(scores['agreement'])}. "
                  f"{scores['description']}{f' Text: {name}.' if (name := data_name(scores)) else ''}"]  # fmt: skip
    before, after = stored_sizes(result)
    lines += ["", f"Size {before / 1e6:.1f} MB → {after / 1e6:.1f} MB."]
    if speed := result.get("throughput"):
        lines += ["", f"Speed and memory: {throughput_setting(speed)}."]
    if rows := gain_rows(result):
        lines += ["", f"| {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    if hurt_by_error(missed) and worst.linears:
        lines += [
            "",
            f"Linears that are hurt most, by {worst.measure}:",
            "",
            f"| linear | {worst.measure} |",
            "|---|---:|",
        ]
        lines += [f"| `{name}` | {error:.4g} |" for name, error in worst.linears]
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.5g}"


def message_of(missed: Sequence[Gate], worst: Worst) -> str:
    """What a missed gate says: each, by how much, and which linears are hurt most."""
    return " ".join([*(gate.sentence() for gate in missed), *worst_sentences(missed, worst)])


def hurt_by_error(gates: Sequence[Gate]) -> bool:
    """Whether any of the gates has to do with what linears put out: fallbacks and sizes have not."""
    return any(gate.name.partition(" ")[0] in OF_OUTPUTS for gate in gates)


def worst_sentences(missed: Sequence[Gate], worst: Worst) -> list[str]:
    """The worst linears as a sentence; none if no error is known, or none of the gates has to do with errors."""
    if not hurt_by_error(missed):
        return []
    named = ", ".join(f"{name} {error:.3g}" for name, error in worst.linears)
    return [f"Largest {worst.measure}s: {named}."] if named else []
