"""Bringing a run up to date: which stages a recipe wants, which of them must run, and what came of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from quantcli.errors import GateError, ModelError, RecipeError, RoomError
from quantcli.formats.table import quantized_as
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.allocation import budgeted
from quantcli.pipeline.batches import texts_of
from quantcli.pipeline.context import Context, Listener, Stage
from quantcli.pipeline.gates import Gate, Worst, judged, message_of, worst_linears, write_reports
from quantcli.pipeline.plan import Plan, make_plan, reads_calibration
from quantcli.pipeline.report import write_page, write_summary
from quantcli.pipeline.rundir import (
    EDITED_RECIPE,
    RECIPE,
    RunDirectory,
    StageFolder,
    check_place,
    is_run,
    open_run,
    room_errors,
)
from quantcli.pipeline.source import known_positions, locate_model, model_identity
from quantcli.pipeline.stages import (
    allocate,
    calibrate,
    check,
    distill,
    eval_ppl,
    eval_tasks,
    export,
    generate,
    layers,
    quantize,
    reference,
    reference_tasks,
    search,
    select,
    sensitivity,
    smooth,
    throughput,
    verify,
)
from quantcli.pipeline.tasks import require_readable
from quantcli.pipeline.throughput import require_engine
from quantcli.recipe import resolved_yaml
from quantcli.recipe.data import CalibrationSection, PerplexitySection
from quantcli.recipe.schema import Recipe

STAGES: tuple[Stage, ...] = (
    check.STAGE,
    select.STAGE,
    smooth.STAGE,
    calibrate.STAGE,
    sensitivity.STAGE,
    search.STAGE,
    allocate.STAGE,
    quantize.STAGE,
    distill.STAGE,
    export.STAGE,
    verify.STAGE,
    reference.STAGE,
    eval_ppl.STAGE,
    reference_tasks.STAGE,
    eval_tasks.STAGE,
    layers.STAGE,
    generate.STAGE,
    throughput.STAGE,
)
"""In order. A new stage is a file in stages/ and a line here."""

LAYOUT = 2
"""Raised when the meaning of a stage's files changes between releases, so that older ones are not taken for current."""
_VERSIONED = ("quantcli", "torch", "transformers", "compressed-tensors")


@dataclass(frozen=True)
class RunResult:
    """What a run did: directory, plan, records of the stages (fingerprint, files, seconds, reused), scores, memory."""

    path: Path
    plan: Plan
    stages: dict[str, dict[str, Any]]
    perplexity: dict[str, Any] | None
    peak_memory: int
    smoothing: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    sizes: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    throughput: dict[str, Any] | None = None
    gates: tuple[Gate, ...] = ()
    worst: Worst | None = None

    def to_json(self) -> dict[str, Any]:
        exported = self.stages.get("export", {}).get("files", {})
        return {
            "output": str(self.path),
            "stages": {name: {k: v for k, v in r.items() if k != "files"} for name, r in self.stages.items()},
            "size_before": self.plan.size_before,
            "size_after": self.plan.size_after,
            "bits_per_weight": round(self.plan.bits_per_weight, 3),
            "exports": sorted({str(self.path / "export" / Path(file).parts[0]) for file in exported}),
            "perplexity": self.perplexity,
            "tasks": self.tasks,
            "throughput": self.throughput,
            "gates": [gate.to_json() for gate in self.gates],
            "worst_linears": list(self.worst.linears) if self.worst else [],
            "smoothing": self.smoothing,
            "experts": self.experts,
            "allocation": self.allocation,
            "sizes": self.sizes,
            "peak_memory": self.peak_memory,
        }


class MissedGate(GateError):
    """A quality gate that was missed. The run is complete all the same: `result` holds it."""

    def __init__(self, message: str, remedy: str, result: RunResult) -> None:
        super().__init__(message, remedy)
        self.result = result


def plan_recipe(recipe: Recipe) -> Plan:
    """What the recipe would do, from configuration files alone."""
    plan = _plan(recipe, locate_model(recipe.model, weights=False))
    if recipe.evaluate is not None and recipe.evaluate.throughput is not None:
        require_engine(recipe, plan)
    return plan


def _plan(recipe: Recipe, model: Path) -> Plan:
    if (method := quantized_as(model)) is not None:
        raise ModelError(f"{model} is already quantized ({method}).", "Start from the float model.")
    section = recipe.model
    structure = find_structure(model, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    plan = make_plan(recipe, model, structure)
    return plan if recipe.quantize.target is None else budgeted(recipe, plan)


def run_recipe(
    recipe: Recipe, *, until: str | None = None, listener: Listener | None = None, command: str | None = None
) -> RunResult:
    """Bring the run directory up to date, as far as stage `until` (all stages by default).

    Stage `sensitivity` can be asked for though the recipe rolls nothing back by rank. The page of the run, report.html,
    is written last, with the `command` that asked for it.

    A stage runs when its fingerprint differs from the recorded one or a file of it is missing; one that was interrupted
    goes on behind its finished blocks. What can be known to be wrong is refused before anything is written. Raises the
    error of the stage that fails, and MissedGate, with the result, when a quality gate is missed.
    """
    if until is not None:
        _require_stage(until, recipe)
    model = locate_model(recipe.model, listener=listener)
    plan = _plan(recipe, model)
    device = choose_device(recipe.model.device)
    path = Path(recipe.output)
    with room_errors(path):
        check_place(path, model)
        _require_disk(path, plan)
    _require_readable(recipe, plan)
    _require_positions(recipe, model, until)
    if throughput.STAGE.wanted(recipe) and (until is None or throughput.STAGE.name in _needed(until)):
        require_engine(recipe, plan)
    with open_run(path, model) as run:
        context = Context(recipe, model, plan, run, device, listener, ranking=until == sensitivity.STAGE.name)
        if run.write_recipe(resolved_yaml(recipe)):
            context.emit("note", text=f"{path / RECIPE} was edited since the last run; it is now {EDITED_RECIPE}.")
        run.record |= {
            "layout": LAYOUT,
            "model": str(model),
            "device": device,
            "seed": recipe.calibration.seed if recipe.calibration else 0,
            "versions": _versions(),
        }
        context.emit("plan", linears=len(plan.schemes), kept=len(plan.kept), notes=list(plan.notes))
        _bring_up_to_date(context, until)
        scores, smoothing = _perplexity(context), _smoothing(context)
        found = _experts(context), _allocation(context)
        peak = _peak_of(context)
        measured = _sizes(context), _tasks(context), _throughput(context)
        result = RunResult(path, context.plan, context.results, scores, peak, smoothing, *found, *measured)
        result, missed = _judged(recipe, result)
        write_summary(path, context.plan.to_json(), result.to_json(), command)
        write_page(path)
    if missed is not None:
        raise missed
    return result


def settled_plan(recipe: Recipe, model: Path, run: Path) -> Plan:
    """The plan of the finished run in the directory `run`, with what its stages found; nothing is run or written."""
    context = Context(recipe, model, _plan(recipe, model), RunDirectory(run), "cpu")
    for stage in STAGES:
        if stage.settle is not None and stage.wanted(recipe):
            stage.settle(context)
    return context.plan


def rank_linears(recipe: Recipe, *, listener: Listener | None = None) -> dict[str, Any]:
    """How sensitive each linear is: the content of sensitivity.json, most sensitive linear first.

    A recipe without calibration section is given the default one, since there is nothing to rank by without data.
    """
    if recipe.calibration is None:
        section, longest = CalibrationSection(), known_positions(locate_model(recipe.model, weights=False))
        length = min(section.sequence_length, longest or section.sequence_length)
        section = section.model_copy(update={"sequence_length": length})
        recipe = recipe.model_copy(update={"calibration": section})
    result = run_recipe(recipe, until=sensitivity.STAGE.name, listener=listener)
    content: dict[str, Any] = read_json(result.path / sensitivity.STAGE.name / sensitivity.RESULT)
    return content


def _bring_up_to_date(context: Context, until: str | None) -> None:
    base = {"layout": LAYOUT, "model": model_identity(context.model), "versions": _versions()}
    for stage in STAGES:
        wanted = stage.wanted(context.recipe) or stage.name in _asked(context)
        if wanted and (until is None or stage.name in _needed(until)):
            context.stage = stage.name
            # by content, not by their fingerprints: files that come out the same need no new work behind them
            before = {name: context.results[name]["files"] for name in stage.reads if name in context.results}
            fingerprint = _fingerprint([base, stage.name, stage.identity(context), before])
            _run_stage(context, stage, fingerprint, partial(_part, context, stage, [base, before]))
            if stage.settle is not None:
                stage.settle(context)


def _fingerprint(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _part(context: Context, stage: Stage, reads: list[Any], name: str) -> str:
    """The fingerprint of a folder of the stage by its name; empty where its folders have none."""
    return "" if stage.part is None else _fingerprint([*reads, stage.name, name, stage.part(context, name)])


def _asked(context: Context) -> set[str]:
    """Stages that run though the recipe has no use for them, because what they find is what was asked for."""
    return {calibrate.STAGE.name, sensitivity.STAGE.name} if context.ranking else set()


def _run_stage(context: Context, stage: Stage, fingerprint: str, part: Callable[[str], str]) -> None:
    folder = context.run.stage(stage.name)
    records = context.run.record["stages"]
    recorded = records.get(stage.name, {})
    if folder.complete(fingerprint):
        context.emit("reused")
        if recorded.get("fingerprint") != fingerprint:  # killed between the stage's record and the run's
            recorded = _stage_record(fingerprint, folder, None, None)
            _record(context, stage.name, recorded)
        # what readers are up to date with is what the files hold, not what was once written
        files = {**recorded["files"], **folder.changed()}
        context.results[stage.name] = {**recorded, "files": files, "reused": True}
        return
    started = time.perf_counter()
    # what this one has no events of, an interrupted run before it has
    context.emit("started", resumed=folder.begun(fingerprint))
    for name in _readers(stage.name) & records.keys():
        del records[name]  # what a change has made out of date is no result of this run any more
    context.run.write_record()
    if gone := folder.begin(fingerprint, stage.writes(context), part):
        text = (
            f"{folder.path}: {', '.join(gone)} came from what has changed and are not in the recipe: they are removed."
        )
        context.emit("note", text=text)
    context.results[stage.name] = {}
    stage.run(context, folder)
    folder.finish()
    record = _stage_record(fingerprint, folder, round(time.perf_counter() - started, 2), _peak_memory())
    _record(context, stage.name, record)
    context.results[stage.name] = {**record, "reused": False}
    context.emit("finished", seconds=record["seconds"], peak_memory=record["peak_memory"])


def _stage_record(fingerprint: str, folder: StageFolder, seconds: float | None, memory: int | None) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "files": dict(sorted(folder.files.items())),
        "seconds": seconds,
        "peak_memory": memory,
        "versions": _versions(),
    }


def _record(context: Context, name: str, record: dict[str, Any]) -> None:
    records = {**context.run.record["stages"], name: record}
    context.run.record["stages"] = {stage.name: records[stage.name] for stage in STAGES if stage.name in records}
    context.run.write_record()


@cache
def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _versions() -> dict[str, str]:
    return {name: _version(name) for name in _VERSIONED}


def _readers(name: str) -> set[str]:
    """The stage and every stage that reads its files, directly or not."""
    found = {name}
    for stage in STAGES:  # in order: a reader comes behind what it reads
        if found & set(stage.reads):
            found.add(stage.name)
    return found


def _needed(name: str) -> set[str]:
    """The stage and every stage that must be up to date before it."""
    found = {name}
    for stage in reversed(STAGES):
        if stage.name in found:
            found |= {*stage.reads, *stage.guards}
    return found


def _require_stage(name: str, recipe: Recipe) -> None:
    stage = next((stage for stage in STAGES if stage.name == name), None)
    if stage is None:
        raise RecipeError(f"There is no stage {name!r}.", f"Stages: {', '.join(s.name for s in STAGES)}.")
    if not stage.wanted(recipe) and not (stage is sensitivity.STAGE and recipe.calibration is not None):
        section = {"calibrate": "a scheme that needs calibration", "sensitivity": "calibration", "smooth": "smooth",
                   "search": "quantize.rollback.target", "allocate": "quantize.target",
                   "select": "calibration.drop_outliers", "distill": "quantize.distill",
                   "export": "export", "verify": "export",
                   "reference": "evaluate.perplexity", "eval-ppl": "evaluate.perplexity",
                   "reference-tasks": "evaluate.tasks", "eval-tasks": "evaluate.tasks",
                   "layers": "evaluate.output_error", "generate": "evaluate.generate",
                   "throughput": "evaluate.throughput"}.get(name, name)  # fmt: skip
        raise RecipeError(f"This recipe has nothing for stage {name}.", f"It would need {section}.")


def _require_disk(path: Path, plan: Plan) -> None:
    """Refuse what cannot fit. A run that has begun needs less than the estimate; only a new one is checked."""
    if is_run(path):
        return
    place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    total, _, free = shutil.disk_usage(place)
    if free < plan.estimate.disk and total:  # a file system of no size, such as /proc, has another fault
        needed = plan.estimate.disk / 1e9
        raise RoomError(f"{place} has {free / 1e9:.3g} GB free, and the run needs about {needed:.3g} GB.",
                        "Free some, or choose another output.")  # fmt: skip


def _require_readable(recipe: Recipe, plan: Plan) -> None:
    """Refuse damaged weights, as far as headers tell, links that are not copied, and text that is not there."""
    from quantcli.formats.export import companions
    from quantcli.model.names import weight_tensors

    checkpoint, trust = Checkpoint(plan.model), recipe.model.trust_remote_code
    weight_tensors(plan.model, plan.structure, checkpoint.entries, trust_remote_code=trust)
    if recipe.export is not None:
        companions(plan.model)
    if recipe.calibration is not None and reads_calibration(recipe):
        texts_of(recipe.calibration)
    if recipe.evaluate is not None and recipe.evaluate.perplexity is not None:
        texts_of(recipe.evaluate.perplexity)
    for section in recipe.evaluate.tasks if recipe.evaluate is not None else ():
        require_readable(section)


def _require_positions(recipe: Recipe, model: Path, until: str | None) -> None:
    """Refuse sequences that are longer than the model has positions for, of the sections that stage `until` needs."""
    longest = known_positions(model)
    if longest is None:
        return
    calibration = recipe.calibration if reads_calibration(recipe) else None
    measures = until is None or {reference.STAGE.name, search.STAGE.name} & _needed(until)
    perplexity = recipe.evaluate.perplexity if recipe.evaluate and measures else None
    for key, section in (("calibration", calibration), ("evaluate.perplexity", perplexity)):
        # windows of protocol lm-eval hold one token more: the last that is predicted
        extra = int(isinstance(section, PerplexitySection) and section.protocol == "lm-eval")
        if section is not None and section.sequence_length > longest - extra:
            raise RecipeError(
                f"{key}.sequence_length: is {section.sequence_length}, and the model has {longest} positions.",
                f"Set it to {longest - extra} or less.",
            )


def choose_device(wanted: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises RecipeError for an absent device."""
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cpu":
        return "cpu"
    module = getattr(torch, kind, None)
    if module is None or not module.is_available() or int(index or 0) >= module.device_count():
        raise RecipeError(f"model.device: there is no {wanted} on this machine.", "Use --device cpu.")
    return wanted


def _perplexity(context: Context) -> dict[str, Any] | None:
    file = context.folder(eval_ppl.STAGE.name) / eval_ppl.RESULTS
    if eval_ppl.STAGE.name not in context.results or not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content.pop("per_window", None)
    return content


def _smoothing(context: Context) -> dict[str, Any] | None:
    """What stage smooth did: groups scaled by method, groups left by cause, what is rotated."""
    if smooth.STAGE.name not in context.results:
        return None
    return read_json(context.folder(smooth.STAGE.name) / smooth.MANIFEST)


def _experts(context: Context) -> dict[str, Any] | None:
    """How many experts were observed, and which saw fewer than the least number of tokens."""
    if calibrate.STAGE.name not in context.results:
        return None
    found: dict[str, Any] | None = read_json(context.folder(calibrate.STAGE.name) / calibrate.MANIFEST).get("experts")
    return found


def _allocation(context: Context) -> dict[str, Any] | None:
    """What stage allocate chose: linears by scheme, bits a weight, and the budget."""
    if allocate.STAGE.name not in context.results:
        return None
    found: dict[str, Any] = read_json(context.folder(allocate.STAGE.name) / allocate.RESULT)
    return {key: found[key] for key in ("target", "bits_per_weight", "size", "error", "linears")}


def _sizes(context: Context) -> dict[str, Any] | None:
    """Bytes of the float checkpoint and the exports, by part."""
    if export.STAGE.name not in context.results:
        return None
    from quantcli.pipeline.sizes import checkpoint_sizes

    return checkpoint_sizes(context)


def _tasks(context: Context) -> dict[str, Any] | None:
    """What came of each task: both models' metrics, and their difference."""
    if eval_tasks.STAGE.name not in context.results:
        return None
    return read_json(context.folder(eval_tasks.STAGE.name) / eval_tasks.RESULTS)


def _throughput(context: Context) -> dict[str, Any] | None:
    """Speed and memory of both models in a serving engine."""
    if throughput.STAGE.name not in context.results:
        return None
    return read_json(context.folder(throughput.STAGE.name) / throughput.RESULTS)


def _judged(recipe: Recipe, result: RunResult) -> tuple[RunResult, MissedGate | None]:
    """The result with its gates, which are also written, and what is to be raised if one is missed. Nothing is judged
    before there is an export."""
    section = recipe.evaluate.gates if recipe.evaluate else None
    if section is None or export.STAGE.name not in result.stages:
        return result, None
    assert recipe.export is not None
    found, measured = result.to_json(), result.path / export.STAGE.name / recipe.export.formats[0]
    gates = judged(section, found, result.path, measured)
    schemes = {name: treatment.scheme.name for name, treatment in result.plan.treatments.items()}
    worst = worst_linears(result.path, result.stages, schemes)
    with room_errors(result.path):
        write_reports(result.path, gates, found, worst)
    result = replace(result, gates=tuple(gates), worst=worst)
    missed = [gate for gate in gates if not gate.passed]
    remedy = f"The run is complete in {result.path}; try a milder scheme or roll back more."
    return result, MissedGate(message_of(missed, worst), remedy, result) if missed else None


def _peak_of(context: Context) -> int:
    """The most memory that any of the stages took, whenever it ran."""
    return max([_peak_memory(), *(record["peak_memory"] or 0 for record in context.results.values())])


def _peak_memory() -> int:
    """Bytes. What getrusage says is, on Linux, not less than what the process that started this one had."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
