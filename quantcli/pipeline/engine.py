"""Bringing a run up to date: which stages a recipe wants, which of them must run, and what came of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from quantcli.errors import QuantcliError, RecipeError, RoomError
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.pipeline.allocation import budgeted
from quantcli.pipeline.batches import texts_of
from quantcli.pipeline.context import Context, Listener, Stage
from quantcli.pipeline.plan import Plan, make_plan, reads_calibration
from quantcli.pipeline.report import write_page, write_summary
from quantcli.pipeline.result import RunResult, process_peak, run_result, with_gates
from quantcli.pipeline.rundir import (
    RECIPE,
    RunDirectory,
    StageFolder,
    check_place,
    is_run,
    open_run,
    room_errors,
)
from quantcli.pipeline.source import (
    beyond_positions,
    float_structure,
    known_positions,
    locate_model,
    model_identity,
    require_positions,
)
from quantcli.pipeline.stages import (
    allocate,
    calibrate,
    check,
    curvature,
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
    curvature.STAGE,
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
_CHECKPOINTS = {smooth.STAGE.name: f"{smooth.MODEL}/", export.STAGE.name: ""}
"""Stages with files for others, and how the names of those begin: one that somebody changed is not replaced unasked."""
_VERSIONED = ("quantcli", "torch", "transformers", "compressed-tensors")


def plan_recipe(recipe: Recipe) -> Plan:
    """What the recipe would do, from configuration files alone; `warnings` are what a run of it would refuse that
    depends on the model's size, so that a plan of a small one still shows the rest."""
    model = locate_model(recipe.model, weights=False)
    plan = _plan(recipe, model)
    refused = [beyond_positions(model, key, section) for key, section in _sequences(recipe, None)]
    plan = replace(plan, warnings=tuple(f"A run refuses this: {error}" for error in refused if error is not None))
    if recipe.evaluate is not None and recipe.evaluate.throughput is not None:
        require_engine(recipe, plan)
    return plan


def _plan(recipe: Recipe, model: Path) -> Plan:
    section = recipe.model
    structure = float_structure(model, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    plan = make_plan(recipe, model, structure)
    return plan if recipe.quantize.target is None else budgeted(recipe, plan)


def run_recipe(
    recipe: Recipe,
    *,
    until: str | None = None,
    listener: Listener | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Bring the run directory up to date, as far as stage `until` (all stages by default).

    Stage `sensitivity` can be asked for though the recipe rolls nothing back by rank. The page of the run, report.html,
    is written last, with the `command` that asked for it.

    A stage runs when its fingerprint differs from the recorded one or a file of it is missing; one that was interrupted
    goes on behind its finished blocks. What can be known to be wrong is refused before anything is written, and so is a
    file of an export that somebody changed since the run wrote it, which only `overwrite` replaces. Raises the error of
    the stage that fails, and MissedGate, with the result, when a quality gate is missed.
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
    _require_readable(recipe, plan, until)
    _require_positions(recipe, model, until)
    if throughput.STAGE.wanted(recipe) and (until is None or throughput.STAGE.name in _needed(until)):
        require_engine(recipe, plan)
    with open_run(path, model) as run:
        ranking = until == sensitivity.STAGE.name
        follows = export.STAGE.wanted(recipe) and (until is None or export.STAGE.name in _needed(until))
        context = Context(
            recipe, model, plan, run, device, listener, ranking=ranking, overwrite=overwrite, exports=follows
        )
        if follows:
            run.stage(export.STAGE.name).refuse_foreign(export.STAGE.writes(context))  # before hours of work
        for stage in STAGES if not overwrite else ():
            needed = stage.wanted(recipe) and (until is None or stage.name in _needed(until))
            if needed and stage.name in _CHECKPOINTS:
                run.stage(stage.name).refuse_edited(_CHECKPOINTS[stage.name])
        _write_recipe(context, recipe)
        run.record |= {
            "layout": LAYOUT,
            "model": str(model),
            "device": device,
            "seed": recipe.calibration.seed if recipe.calibration else 0,
            "versions": _versions(),
        }
        context.emit("plan", linears=len(plan.schemes), kept=len(plan.kept), notes=list(plan.notes))
        _bring_up_to_date(context, until)
        result, missed = with_gates(recipe, run_result(context))
        write_summary(path, context.plan.to_json(), result.to_json(), command)
        write_page(path)
    if missed is not None and (until is None or export.STAGE.name in _needed(until)):
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
    """Run what `until` needs. Of the stages that it does not need those count as well that are up to date."""
    base = {"layout": LAYOUT, "model": model_identity(context.model), "versions": _versions()}
    for stage in STAGES:
        asked = stage.wanted(context.recipe) or stage.name in _asked(context)
        needed = asked and (until is None or stage.name in _needed(until))
        if needed or (asked and stage.name in context.run.record["stages"]):
            context.stage = stage.name
            # by content, not by their fingerprints: files that come out the same need no new work behind them
            before: dict[str, Any] = {
                name: context.results[name]["files"] for name in stage.reads if name in context.results
            }
            if export.STAGE.name in before and context.recipe.export is not None:
                before["formats"] = list(context.recipe.export.formats)  # the first of them is measured
            try:
                fingerprint = _fingerprint([base, stage.name, stage.identity(context), before])
            except (QuantcliError, OSError):
                if needed:
                    raise
                continue  # its text or its engine is gone
            if needed:
                _run_stage(context, stage, fingerprint, partial(_part, context, stage, [base, before]))
            elif not _reused(context, stage, fingerprint):
                continue
            if stage.settle is not None:
                stage.settle(context)
            if stage.plain is not None:
                _write_recipe(context, stage.plain(context), stage.name)


def _write_recipe(context: Context, recipe: Recipe, stage: str = "") -> None:
    if (kept := context.run.write_recipe(resolved_yaml(recipe), stage)) is not None:
        path = context.folder(stage) / RECIPE
        context.emit("note", text=f"{path} was edited since the last run; it is now {kept.name}.")


def _fingerprint(identity: list[Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _part(context: Context, stage: Stage, reads: list[Any], name: str) -> str:
    """The fingerprint of a folder of the stage by its name; empty where its folders have none."""
    return "" if stage.part is None else _fingerprint([*reads, stage.name, name, stage.part(context, name)])


def _asked(context: Context) -> set[str]:
    """Stages that run though the recipe has no use for them, because what they find is what was asked for."""
    return {calibrate.STAGE.name, sensitivity.STAGE.name} if context.ranking else set()


def _reused(context: Context, stage: Stage, fingerprint: str) -> bool:
    """Whether the stage is up to date. Then its record is among the results."""
    folder = context.run.stage(stage.name)
    recorded = context.run.record["stages"].get(stage.name, {})
    if not folder.complete(fingerprint):
        return False
    if recorded.get("fingerprint") != fingerprint:  # killed between the stage's record and the run's
        recorded = _stage_record(fingerprint, folder, None, None)
        _record(context, stage.name, recorded)
    # what readers are up to date with is what the files hold, not what was once written
    files = {**recorded["files"], **folder.changed()}
    context.results[stage.name] = {**recorded, "files": files, "reused": True}
    return True


def _run_stage(context: Context, stage: Stage, fingerprint: str, part: Callable[[str], str]) -> None:
    again = False
    if stage.name in _CHECKPOINTS:
        _make_room(context, stage.name, fingerprint)
    if _reused(context, stage, fingerprint):
        again = stage.unfinished is not None and stage.unfinished(context)
        if not again:
            context.emit("reused")
            return
    folder = context.run.stage(stage.name)
    folder.refuse_foreign(stage.writes(context))  # while the records still say what is the run's own
    records = context.run.record["stages"]
    started = time.perf_counter()
    # what this one has no events of, an interrupted run before it has
    context.emit("started", resumed=folder.begun(fingerprint) and not again)
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
    record = _stage_record(fingerprint, folder, round(time.perf_counter() - started, 2), process_peak())
    _record(context, stage.name, record)
    context.results[stage.name] = {**record, "reused": False}
    context.emit("finished", seconds=record["seconds"], peak_memory=record["peak_memory"])


def _make_room(context: Context, name: str, fingerprint: str) -> None:
    """Remove files of a checkpoint that somebody changed, if that was asked for, so that they are made again; else
    refuse them where files are going to be removed or written. Where none are, stage `verify` finds an export's."""
    folder, below = context.run.stage(name), _CHECKPOINTS[name]
    if not context.overwrite:
        if not folder.complete(fingerprint):
            folder.refuse_edited(below, by_content=True)
        return
    edited = folder.edited(below, by_content=True)
    for name in edited:
        context.emit("note", text=f"{folder.path / name} was changed since the run wrote it; it is replaced.")
    folder.remove(edited)


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
        raise RecipeError(f"This recipe has nothing for stage {name}.", f"It would need {stage.asked_by}.")


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


def _require_readable(recipe: Recipe, plan: Plan, until: str | None) -> None:
    """Refuse damaged weights, as far as headers tell, links that are not copied, and text that is not there, of what
    stage `until` needs."""
    from quantcli.formats.export import companions
    from quantcli.model.names import weight_tensors

    checkpoint, trust = Checkpoint(plan.model), recipe.model.trust_remote_code
    weight_tensors(plan.model, plan.structure, checkpoint.entries, trust_remote_code=trust)
    if recipe.export is not None:
        companions(plan.model)
    if recipe.calibration is not None and reads_calibration(recipe):
        texts_of(recipe.calibration)
    if (section := _measured_on(recipe, until)) is not None:
        texts_of(section)
    asked = until is None or {reference_tasks.STAGE.name, eval_tasks.STAGE.name} & _needed(until)
    for task in recipe.evaluate.tasks if recipe.evaluate is not None and asked else ():
        require_readable(task)


def _measured_on(recipe: Recipe, until: str | None) -> PerplexitySection | None:
    """The text that stage `until` measures on, if it does."""
    readers = {stage.name for stage in (search.STAGE, reference.STAGE, layers.STAGE) if stage.wanted(recipe)}
    measures = until is None or bool(readers & _needed(until))
    return recipe.evaluate.perplexity if recipe.evaluate is not None and measures else None


def _require_positions(recipe: Recipe, model: Path, until: str | None) -> None:
    """Refuse sequences that are longer than the model has positions for, of the sections that stage `until` needs."""
    for key, section in _sequences(recipe, until):
        require_positions(model, key, section)


def _sequences(recipe: Recipe, until: str | None) -> Iterator[tuple[str, CalibrationSection | PerplexitySection]]:
    """The sections, by their keys, whose text stage `until` needs."""
    if recipe.calibration is not None and reads_calibration(recipe):
        yield "calibration", recipe.calibration
    if (section := _measured_on(recipe, until)) is not None:
        yield "evaluate.perplexity", section


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
