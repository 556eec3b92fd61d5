"""What a person sees: progress while a run works, and tables when it is done. Progress goes to standard error."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from quantcli.printed import PlainConsole, printable
from quantcli.report.numbers import size
from quantcli.report.outcome import outcome_rows, protocol_line, scheme_rows

if TYPE_CHECKING:
    from quantcli.pipeline.context import Listener
    from quantcli.pipeline.plan import Plan
    from quantcli.pipeline.result import RunResult


@cache
def _title(stage: str) -> str:
    """What a stage does, in words."""
    from quantcli.pipeline.engine import STAGES

    return next((each.title for each in STAGES if each.name == stage), stage)


@contextmanager
def progress(*, quiet: bool, verbose: bool) -> Iterator[Listener | None]:
    """A listener that shows events: bars on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        yield None
        return
    console = PlainConsole(stderr=True)
    if console.is_terminal and not verbose:
        with _bars(console) as listener:
            yield listener
    else:
        yield _lines(console, verbose)


@contextmanager
def _bars(console: PlainConsole) -> Iterator[Listener]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        shown: dict[str, TaskID] = {}  # the bar of the stage at work, by its description

        def bar(text: str, total: int | None) -> TaskID:
            if text not in shown:
                for task in shown.values():
                    bars.remove_task(task)
                shown.clear()
                shown[text] = bars.add_task(text, total=total, rate="")
            return shown[text]

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "block":
                text = " ".join(filter(None, (_title(event["stage"]), event.get("model"))))
                rate = f"{event['seconds']:.1f} s a block"
                bars.update(bar(text, event["of"]), total=event["of"], completed=event["index"] + 1, rate=rate)
            elif (sentence := _sentence(event)) is not None:
                console.print(sentence, markup=False, highlight=False)
            if event["event"] == "started":
                bar(_title(event["stage"]), None)

        yield listen


def _lines(console: PlainConsole, verbose: bool) -> Listener:
    last = time.monotonic()

    def listen(event: dict[str, Any]) -> None:
        nonlocal last
        text = _sentence(event)
        if text is None and event["event"] == "block":
            final = event["index"] + 1 == event["of"]
            if final or verbose or time.monotonic() - last > 10:
                model = f" ({event['model']})" if "model" in event else ""
                text = f"  block {event['index'] + 1} of {event['of']}{model}, {event['seconds']:.1f} s"
                last = time.monotonic()
        if text is None and verbose:
            text = "  " + " ".join(f"{key}={value}" for key, value in event.items() if key != "stage")
        if text is not None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    return listen


def _sentence(event: dict[str, Any]) -> str | None:
    match event["event"]:
        case "started":
            return _title(event["stage"])
        case "reused":
            return f"{_title(event['stage'])}: up to date"
        case "finished":
            return f"  {event['seconds']:.1f} s"
        case "tokens":
            return f"  {event['tokens']} tokens in {event['samples']} sequence{'s' * (event['samples'] != 1)}"
        case "sanity":
            return f"  perplexity {event['perplexity']:.4g}, {event['tokens_per_word']:.2f} tokens a word"
        case "warning" | "note":
            return f"  {event['event'].capitalize()}: {event['text']}"
        case "plan":
            kept = f"{event['kept']} {'stays' if event['kept'] == 1 else 'stay'} in float"
            return "\n".join([f"{event['linears']} linears to quantize, {kept}", *event["notes"]])
        case "group" if event["number"] == event["of"] or event["number"] % 10 == 0:
            return f"  {event['number']} of {event['of']} groups of linears measured"
        case "trial":
            increase, divergence = event["perplexity_increase"], event["kl_divergence"]
            shown = "undefined" if increase is None else f"{increase:+.2%}"
            return f"  trial {event['number']}: {event['rolled_back']} linears rolled back, perplexity {shown}, KL " + (
                f"{'undefined' if divergence is None else f'{divergence:.4g}'} on {event['windows']} windows"
            )
        case "found":
            return f"  {event['rolled_back']} linears are rolled back; as a plain recipe: {event['recipe']}"
        case "distilled":
            return f"  KL divergence on samples kept apart: {event['kl_before']:.4g}, tuned {event['kl_after']:.4g}"
        case "allocated":
            shared = ", ".join(f"{count} linears {name}" for name, count in event["linears"].items())
            return f"  {event['bits_per_weight']:.4g} bits a weight: {shared}; as a plain recipe: {event['recipe']}"
        case "answered" if event["number"] == event["of"] or event["number"] % 50 == 0:
            return f"  {event['number']} of {event['of']} questions answered ({event['model']})"
        case "served":
            return f"  {event['number']} of {event['of']} ({event['model']}), {event['seconds']:.1f} s"
        case "verified":
            return f"  {event['linears']} linears and {event['other_tensors']} other tensors are as they should be"
    return None


def show_result(result: RunResult) -> None:
    """The outcome table of a run, and the next step."""
    console = PlainConsole()
    table = Table(title=Text(str(result.path)), title_justify="left", show_header=False)
    for label, value in outcome_rows(result.plan.to_json(), result.to_json()):
        _add(table, label, value)
    console.print(table)
    console.print(f"Report: {result.path / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    loading = {verdict.engine for verdict in result.plan.engines if verdict.loads}
    for export in result.to_json()["exports"]:
        if command := _serving_command(export, loading, result.plan.own_code):
            console.print(f"Serve it: {command}", markup=False, highlight=False, soft_wrap=True)


def _serving_command(export: str, loading: Collection[str], own_code: bool) -> str:
    """What serves an export, of a model that may run its own code; empty where no such command is known, or its engine
    is not among those that load it."""
    form, place = Path(export).name, shlex.quote(export)
    if form == "gguf":
        return f"llama-server -m {shlex.quote(f'{export}/model.gguf')}"
    trust = " --trust-remote-code" * own_code
    if form == "ascend":
        return f"vllm serve {place} --quantization ascend{trust}"
    serves = form not in ("mindie", "numpy") and any(engine.startswith("vLLM on") for engine in loading)
    return f"vllm serve {place}{trust}" if serves else ""


def show_plan(plan: Plan, *, verbose: bool) -> None:
    """What a recipe would do. Linears of like name and scheme share a row; --verbose lists each."""
    console = PlainConsole()
    rows = list(scheme_rows(plan.to_json()["linears"], every=verbose))
    prefix = "" if verbose else _shared_prefix([name for name, *_ in rows if "*" in name])
    title = f"{plan.structure.architecture} in {plan.model}" + (f"; … is {prefix.removesuffix('.')}" if prefix else "")
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("linears", overflow="fold", no_wrap=verbose)
    for heading in ("count", "shape", "scheme"):
        table.add_column(heading, no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows if verbose else _joined(rows, prefix):
        _add(table, *row)
    console.print(table)
    for kind, texts in (("Note", plan.notes), ("Warning", plan.warnings)):
        for text in texts:
            console.print(f"{kind}: {text}", markup=False, highlight=False, soft_wrap=True)
    show_facts("", {
        **({"smoothing": plan.smoothing} if plan.smoothing else {}),
        "size": f"{size(plan.size_before)} → {size(plan.size_after)} "
                f"({plan.size_after / plan.size_before - 1:+.0%}), {plan.bits_per_weight:.2f} bits a quantized weight",
        "peak memory": f"about {plan.estimate.memory / 1e9:.1f} GB",
        "time": f"about {plan.estimate.seconds:.0f} s, with {plan.estimate.tokens} tokens run through the model",
        "disk": f"about {plan.estimate.disk / 1e9:.2f} GB",
        **{v.engine: ("loads it: " if v.loads else "does not load it: ") + v.note for v in plan.engines},
    })  # fmt: skip
    by_source: dict[str, list[str]] = {}
    for verdict in plan.engines:
        by_source.setdefault(verdict.source, []).append(verdict.engine)
    for source, engines in by_source.items():
        console.print(f"Source of {', '.join(engines)}: {source}", markup=False, highlight=False, soft_wrap=True)


def _shared_prefix(names: list[str]) -> str:
    """The leading parts, up to the block's number, that all names have in common: model.layers.*. of most models."""
    heads = {name[: name.rindex("*.") + 2] for name in names}
    return heads.pop() if len(heads) == 1 else ""


def _joined(rows: list[tuple[str, str, str, str, str]], prefix: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows that differ in their names alone as one, so that a plan fits a narrow terminal."""
    alike: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    for name, count, *rest in rows:
        short = f"… {name.removeprefix(prefix)}" if prefix and name.startswith(prefix) else name
        alike.setdefault((rest[0], rest[1], rest[2]), []).append((short, int(count)))
    for (shape, scheme, reason), members in alike.items():
        yield "\n".join(name for name, _ in members), str(sum(n for _, n in members)), shape, scheme, reason


def show_sensitivity(found: Mapping[str, Any], top: int) -> None:
    """The ranking of `quantcli sensitivity`, and a rollback block to paste."""
    console = PlainConsole()
    metric, rows = found["metric"], found["linears"]
    columns = [metric, *dict.fromkeys(key for row in rows for key in row if key not in ("name", metric))]
    prefix = commonprefix([row["name"] for row in rows]).rpartition(".")[0]  # noqa: RUF071 (cut at a dot)
    title = f"{min(top, len(rows))} of {len(rows)} linears, by {metric}" + (f"; … is {prefix}" if prefix else "")
    table = Table(title=Text(title), title_justify="left")
    table.add_column("linear", no_wrap=True)  # a name is what the table is for: others give way
    for column in columns:
        table.add_column(column.replace("_", "_\n"), justify="right", overflow="fold")
    for row in rows[:top]:
        name = f"…{row['name'].removeprefix(prefix)}" if prefix else row["name"]
        _add(table, name, *(f"{row[c]:.3g}" if row.get(c) is not None else "" for c in columns))
    console.print(table)
    lines = ["quantize:", "  rollback:", "    names:", *(f"      - {row['name']}" for row in rows[:top])]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_scores(found: Mapping[str, Any]) -> None:
    """What `quantcli eval-ppl --checkpoint` found."""

    def measured(pair: Mapping[str, Any]) -> str:
        return " ± ".join("undefined" if pair[key] is None else f"{pair[key]:.4f}" for key in ("value", "error"))

    schemes = ", ".join(f"{count} × {name}" for name, count in found["schemes"].items())
    facts = {"format": found["format"], "schemes": schemes or "none", "perplexity": measured(found["quantized"])}
    if found["zero_points"] is not None:
        facts["zero points"] = found["zero_points"]
    if found["float_model"] is not None:
        facts["float model"] = measured(found["float_model"])
        for key, form in (("increase", "+.2%"), ("kl_divergence", ".4f"), ("agreement", ".1%")):
            value, error = found[key], found[key.removesuffix("_divergence") + "_error"]
            facts[key.replace("_", " ")] = " ± ".join(
                "undefined" if v is None else format(v, f) for v, f in ((value, form), (error, form.removeprefix("+")))
            )
        if found["increase_interval"] is not None:
            ends = ("undefined" if end is None else f"{end:+.2%}" for end in found["increase_interval"])
            facts["increase"] += f" (95% interval {' to '.join(ends)})"
    for name, models in (found["per_text"] or {}).items():
        facts[name.replace("_", " ")] = measured(models["quantized"])
    for gate in found["gates"]:
        facts[f"gate {gate['name']}"] = f"{gate['bound']:g} {'kept' if gate['passed'] else 'missed'}"
    facts["protocol"] = f"{protocol_line(found)}, {found['dtype']}"
    facts["measured so"] = found["description"].removeprefix(f"Protocol {found['protocol']}: ")
    show_facts(found["checkpoint"], facts)


def show_report(found: Mapping[str, Any]) -> None:
    """Where `quantcli report` wrote a page; of several runs also the table."""
    console = PlainConsole()
    if "runs" in found:
        table = Table()
        table.add_column("run", overflow="fold")
        for heading in ("size", "perplexity", "increase", "KL divergence", "same top token"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in found["runs"]:
            forms = {"perplexity": ".3f", "increase": "+.2%", "kl_divergence": ".4f", "agreement": ".1%"}
            numbers = ["" if row[key] is None else format(row[key], form) for key, form in forms.items()]
            _add(table, row["run"], f"{row['size'] / 1e6:.1f} MB", *numbers)
        console.print(table)
        for note in found["notes"]:
            console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Wrote {found['page']}.", markup=False, highlight=False, soft_wrap=True)


def show_facts(title: str, facts: Mapping[str, Any]) -> None:
    """A two-column table, in words; what is None is left out."""
    table = Table(title=Text(title) if title else None, title_justify="left", show_header=False)
    table.add_column(overflow="fold", no_wrap=False)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value is not None:
            _add(table, *_in_words(key, value))
    PlainConsole().print(table)


def _in_words(key: str, value: Any) -> tuple[str, str]:
    """A fact of a JSON document as a person reads it; its name may stand behind that of a format."""
    before, _, name = key.rpartition(": ")
    text = ", ".join(f"{count} × {what}" for what, count in value.items()) if isinstance(value, Mapping) else str(value)
    if name in ("bytes", "nbytes"):
        name, text = "size", size(value)
    elif name == "prompt":
        name, text = "fixed prompt", f"log-likelihood {value:.4f} a token"
    return f"{before}: " * bool(before) + name.replace("_", " "), text


def _add(table: Table, *cells: str) -> None:
    """A row of texts as they are: what stands in brackets, in a path or a pattern, is no markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells))  # here, so that columns are as wide as what is shown
