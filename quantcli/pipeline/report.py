"""What a run directory says of its run, gathered for its page from files alone: the model may be gone by then."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from quantcli.errors import OutputError, RecipeError
from quantcli.model.checkpoint import read_json, replacing
from quantcli.pipeline.gates import FOLDER, Gate, Worst, worst_sentences
from quantcli.pipeline.rundir import PAGE, RECIPE, RECORD, SUMMARY, current_events, is_run, room_errors, write_json

_GATE = tuple(field.name for field in fields(Gate))
_FACTS = ("event", "stage", "module", "scheme")
_OBSERVED = re.compile(r"block-(\d+)\.safetensors")


def write_summary(path: Path, plan: Mapping[str, Any], result: Mapping[str, Any], command: str | None) -> None:
    """What the page needs beside the files of stages: the settled plan, sizes, and the command."""
    stages = {name: {k: v for k, v in r.items() if k != "reused"} for name, r in result["stages"].items()}
    peak = max((record["peak_memory"] or 0 for record in stages.values()), default=0)
    kept = {key: value for key, value in result.items() if key != "output"}
    kept |= {"stages": stages, "peak_memory": peak}
    write_json(path / SUMMARY, {"command": command, "plan": dict(plan), "result": kept})


def write_page(path: Path, output: Path | None = None) -> Path:
    """Write the page of a run, `report.html` in its directory if no other file is named; returns where it is."""
    from quantcli.report.page import run_page

    return _write(output or path / PAGE, run_page(run_facts(path)))


def report_paths(paths: list[Path], output: Path | None, *, overwrite: bool) -> dict[str, Any]:
    """Write the page of a run, or of several the comparison; returns what it says as plain data, and where it is.

    A page goes into the run's directory, a comparison to `comparison.html` where the command is given, if no output
    is named. Raises RecipeError for a path that is no run, OutputError for a file that is there already.
    """
    runs = [path.resolve() for path in paths]
    if len(set(runs)) < len(runs):
        raise RecipeError("A run is named twice.", "Name each once.")
    own = len(runs) == 1 and (output is None or output.resolve() == runs[0] / PAGE)
    target = output or (paths[0] / PAGE if own else Path("comparison.html"))
    if not own and target.exists() and not overwrite:
        raise OutputError(f"{target} exists.", "Name another file by --output, or add --overwrite.")
    facts = [run_facts(path) for path in runs]
    if len(runs) == 1:
        write_page(runs[0], target)
        return {"page": str(target), **_outcome(facts[0])}
    from quantcli.report.comparison import compare, comparison_page

    found = compare(facts)
    _write(target, comparison_page(facts, found))
    return {"page": str(target), **found}


def _outcome(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("run", "path", "command", "problems", "errors", "sizes", "generation")
    return {"run": facts["name"], **{key: facts[key] for key in kept if key in facts}, **facts["result"]}


def _write(target: Path, content: str) -> Path:
    with room_errors(target):
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise OutputError(f"{target} cannot be written.", "Name a file in a directory that exists.")
        with replacing(target) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return target


def run_facts(path: Path) -> dict[str, Any]:
    """Everything that the page of a run shows, as plain data. Raises RecipeError for a directory that has none."""
    if not is_run(path):
        raise RecipeError(f"{path} is no run directory.", "Name the output of `quantcli run`.")
    if not (path / SUMMARY).is_file():
        raise RecipeError(f"{path} holds no {SUMMARY}: no run has come to its end there.",
                          f"Finish it: quantcli run {shlex.quote(str(path / RECIPE))}")  # fmt: skip
    record, summary = read_json(path / RECORD), read_json(path / SUMMARY)
    plan, result = summary["plan"], dict(summary["result"])
    events = current_events(path, result["stages"])
    place = {linear["name"]: linear["block"] for linear in plan["linears"]}
    schemes = {linear["name"]: linear["scheme"] for linear in plan["linears"]}
    linear_facts = {
        event["module"]: {key: value for key, value in event.items() if key not in _FACTS}
        for event in events
        if event["event"] == "linear" and schemes.get(event["module"]) == event["scheme"]
    }
    smoothing = _smoothing(path, place) if "smooth" in result["stages"] else []
    result["exports"] = [str(path / "export" / Path(name).name) for name in result.get("exports", ())]
    recipe = path / RECIPE
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    return {
        "name": path.resolve().name,
        "path": str(path),
        "command": summary.get("command"),
        "plan": plan,
        "result": result,
        "blocks": plan["blocks"],
        "seed": record.get("seed"),
        "device": record.get("device"),
        "versions": record.get("versions"),
        "recipe": text,
        "recipe_keys": _recipe_keys(text),
        "sizes": result.get("sizes") or {},
        "results": {name: _without_lists(read_json(file)) for name, file in _results(path, result)},
        "linear_facts": linear_facts,
        "errors": _errors(path, result, linear_facts),
        "smoothing": smoothing,
        "ranges": _smoothed_ranges(smoothing) or _observed_ranges(path, result, place),
        "problems": [*_missed(path, result), *_problems(plan, events, linear_facts)],
        "generation": _optional(path / "generate" / "generated.json") if "generate" in result["stages"] else None,
        "calibration": _calibration(path, result, events, _recipe_keys(text).get("calibration")),
    }


def _recipe_keys(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):  # edited by hand since
        return {}
    return content if isinstance(content, dict) else {}


def _optional(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _results(path: Path, result: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    for stage in result["stages"]:
        file = path / stage / "results.json"
        if file.is_file():
            yield stage, file


def _without_lists(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if not isinstance(value, list)}


def _errors(path: Path, result: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The loss of each linear by the best measure that the run has, and what that measure is."""
    for stage, file, text in (
        ("layers", "errors.json", "evaluation"),
        ("sensitivity", "sensitivity.json", "calibration"),
    ):
        content = _optional(path / stage / file) if stage in result["stages"] else None
        linears = (content or {}).get("linears", ())
        found = {e["name"]: e["output_error"] for e in linears if e.get("output_error") is not None}
        if found:
            return {
                "name": "Output error",
                "description": f"‖ŷ − y‖² / ‖y‖² of what each linear puts out, quantized (ŷ) and in float (y), for "
                f"the same inputs: those that {text} text gives it in the float model. 0.01 is an error of a tenth of "
                "the output.",
                "values": found,
            }
    return {
        "name": "Weight error",
        "description": "Relative squared error of the weights as their method reports it: weighed by the second "
        "moments of the inputs where it knows them, so that it is the expected error of the output.",
        "values": {name: fact["error"] for name, fact in facts.items() if fact.get("error") is not None},
    }


def _smoothing(path: Path, place: Mapping[str, int]) -> list[dict[str, Any]]:
    """What came of each group of linears that stage smooth looked at, with its block."""
    outcomes = []
    for file in sorted((path / "smooth").glob("block-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        outcomes += [{**outcome, "block": place.get(outcome["input"], 0)} for outcome in content]
    return outcomes


def _smoothed_ranges(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "block": outcome["block"],
            "linears": outcome["linears"],
            "before": outcome["largest_before"],
            "after": outcome["largest_after" if outcome["kept"] else "largest_before"],
        }
        for outcome in outcomes
        if "largest_before" in outcome
    ]


def _observed_ranges(path: Path, result: Mapping[str, Any], place: Mapping[str, int]) -> list[dict[str, Any]]:
    """The largest absolute value of each input that stage calibrate observed."""
    from safetensors import safe_open

    manifest = path / "calibrate" / "manifest.json"
    if "calibrate" not in result["stages"] or not manifest.is_file():
        return []
    readers: dict[tuple[int, str], list[str]] = {}
    for linear, entry in read_json(manifest)["linears"].items():
        readers.setdefault((entry["block"], entry["input"]), []).append(linear)
    found = []
    for file in sorted((path / "calibrate").glob("block-*.safetensors")):
        named = _OBSERVED.fullmatch(file.name)
        assert named is not None
        block = int(named[1])
        with safe_open(file, framework="np") as opened:
            keys = set(opened.keys())
            for (index, name), linears in readers.items():
                if index == block and f"{name}.absolute_maximum" in keys:
                    largest = float(opened.get_tensor(f"{name}.absolute_maximum").max())
                    found.append({"block": block, "linears": linears, "before": None, "after": largest})
    return found


def _missed(path: Path, result: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Gates that the run missed: bound, what was found, by how much; then the linears that are hurt most."""
    gates = [Gate(**{key: gate[key] for key in _GATE if key in gate}) for gate in result.get("gates", ())]
    missed = [gate for gate in gates if not gate.passed]
    for gate in missed:
        yield {"kind": "missed gate", "stage": "", "text": gate.sentence()}
    written = _optional(path / FOLDER / "gates.json")
    if missed and written:
        worst = Worst(written.get("worst_by", "error"), tuple((n, e) for n, e in written["worst_linears"]))
        for text in worst_sentences(missed, worst):
            yield {"kind": "worst linears", "stage": "", "text": text}


def _problems(
    plan: Mapping[str, Any], events: list[dict[str, Any]], facts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, str]]:
    """Warnings, fallbacks (linears that are not treated as the recipe asks) and notes, each once."""
    found: dict[tuple[str, str, str], None] = {}
    for event in events:
        if event["event"] in ("warning", "note"):
            found[event["event"], event["stage"], event["text"]] = None
    data_free = [name for name, fact in facts.items() if fact.get("data_free")]
    if data_free:
        shown = ", ".join(data_free[:3]) + (", …" if len(data_free) > 3 else "")
        found["fallback", "quantize", f"{len(data_free)} linears are quantized without calibration: {shown}."] = None
    warned = {text for kind, _, text in found if kind == "warning"}
    for note in (note for note in plan["notes"] if note not in warned):
        found["note", "", note] = None
    return [{"kind": kind, "stage": stage, "text": text} for kind, stage, text in found]


def _calibration(
    path: Path, result: Mapping[str, Any], events: list[dict[str, Any]], section: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    """What was run through the model to decide something, and whether the float model is sane."""
    rows = []
    for event in events:
        if event["event"] == "tokens" and "protocol" not in event:
            documents = f" from {event['documents']} documents" if event.get("documents") else ""
            rows.append((event["stage"], f"{event['tokens']} tokens in {event['samples']} sequences{documents}"))
    if rows and section:
        sources = section.get("mix") or [section]
        named = ", ".join(" ".join(str(s[key]) for key in ("dataset", "path") if s.get(key)) for s in sources)
        rows.insert(0, ("text", f"{named}; seed {section.get('seed', 0)}"))
    stages, sanity = result["stages"], _optional(path / "check" / "sanity.json")
    if sanity and "check" in stages:
        perplexity = "undefined" if sanity.get("perplexity") is None else f"{sanity['perplexity']:.4g}"
        rows.append(("float model", f"perplexity {perplexity} and {sanity.get('tokens_per_word', 0):.3g} tokens a word "
                     f"on {sanity.get('tokens')} tokens"))  # fmt: skip
    selection = _optional(path / "select" / "selection.json") if "select" in stages else None
    if selection:
        rows.append(("select", f"{len(selection['kept'])} sequences kept"))
    if experts := result.get("experts"):
        rows.append(("experts", f"{experts['observed']} observed, {len(experts['few'])} with fewer than "
                     f"{experts['least']} tokens"))  # fmt: skip
    return rows
