"""Bringing a run up to date: which stages a recipe wants, which of them must run, and what came of it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import GateError, ModelError, RecipeError, RoomError
from quantcli.model.checkpoint import read_json
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.context import Context, Listener, Stage
from quantcli.pipeline.plan import Plan, make_plan
from quantcli.pipeline.rundir import RunDirectory, open_run, room_errors
from quantcli.pipeline.source import locate_model, model_identity
from quantcli.pipeline.stages import calibrate, check, eval_ppl, export, quantize, verify
from quantcli.recipe import resolved_yaml
from quantcli.recipe.schema import Recipe

STAGES: tuple[Stage, ...] = (
    check.STAGE,
    calibrate.STAGE,
    quantize.STAGE,
    export.STAGE,
    verify.STAGE,
    eval_ppl.STAGE,
)
"""In order. A new stage is a file in stages/ and a line here."""

LAYOUT = 1
"""Raised when the meaning of a stage's files changes, so that files of older versions are not taken for current."""
_VERSIONED = ("torch", "transformers", "compressed-tensors")


@dataclass(frozen=True)
class RunResult:
    """What a run did: directory, plan, records of the stages (fingerprint, files, seconds, `reused`), scores, peak memory."""

    path: Path
    plan: Plan
    stages: dict[str, dict[str, Any]]
    perplexity: dict[str, Any] | None
    peak_memory: int

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.path),
            "stages": {name: {k: v for k, v in r.items() if k != "files"} for name, r in self.stages.items()},
            "size_before": self.plan.size_before,
            "size_after": self.plan.size_after,
            "exports": sorted(
                {str(self.path / "export" / Path(f).parent) for f in self.stages.get("export", {}).get("files", {})}
            ),
            "perplexity": self.perplexity,
            "peak_memory": self.peak_memory,
        }


def plan_recipe(recipe: Recipe) -> Plan:
    """What the recipe would do, from configuration files alone."""
    return _plan(recipe, locate_model(recipe.model, weights=False))


def _plan(recipe: Recipe, model: Path) -> Plan:
    config = model / "config.json"
    if config.is_file() and (already := read_json(config).get("quantization_config")) is not None:
        method = already.get("quant_method", "some method") if isinstance(already, dict) else "some method"
        raise ModelError(f"{model} is already quantized ({method}).", "Start from the float model.")
    section = recipe.model
    structure = find_structure(model, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    return make_plan(recipe, model, structure)


def run_recipe(recipe: Recipe, *, until: str | None = None, listener: Listener | None = None) -> RunResult:
    """Bring the run directory up to date, as far as stage `until` (all stages by default).

    A stage runs when its fingerprint differs from the recorded one or a file of it is missing; one that was interrupted
    goes on behind its finished blocks. Raises the error of the stage that fails; GateError when a quality gate does.
    """
    if until is not None:
        _require_stage(until, recipe)
    model = locate_model(recipe.model)
    plan = _plan(recipe, model)
    path = Path(recipe.output)
    with open_run(path, model) as run, room_errors(path):
        _require_disk(run, plan)
        run.write_recipe(resolved_yaml(recipe))
        context = Context(recipe, model, plan, run, choose_device(recipe.model.device), listener)
        context.emit("plan", linears=len(plan.schemes), kept=len(plan.kept), notes=list(plan.notes))
        _bring_up_to_date(context, until)
        result = RunResult(path, plan, context.results, _perplexity(context), _peak_memory())
    _check_gates(recipe, result)
    return result


def _bring_up_to_date(context: Context, until: str | None) -> None:
    fingerprints: dict[str, str] = {}
    base = {
        "layout": LAYOUT,
        "model": model_identity(context.model),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    for stage in STAGES:
        if stage.wanted(context.recipe) and (until is None or _leads_to(stage.name, until)):
            context.stage = stage.name
            before = {name: fingerprints[name] for name in stage.after if name in fingerprints}
            identity = [base, stage.name, stage.identity(context), before]
            fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
            fingerprints[stage.name] = fingerprint
            _run_stage(context, stage, fingerprint)


def _run_stage(context: Context, stage: Stage, fingerprint: str) -> None:
    folder = context.run.stage(stage.name)
    recorded = context.run.record.get("stages", {}).get(stage.name, {})
    if recorded.get("fingerprint") == fingerprint and folder.complete(fingerprint):
        context.emit("reused")
        context.results[stage.name] = {**recorded, "reused": True}
        return
    started = time.perf_counter()
    context.emit("started")
    folder.begin(fingerprint)
    context.results[stage.name] = {}
    stage.run(context, folder)
    folder.finish()
    record = {
        "fingerprint": fingerprint,
        "files": dict(sorted(folder.files.items())),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory": _peak_memory(),
        "versions": {name: importlib.metadata.version(name) for name in ("quantcli", *_VERSIONED)},
    }
    context.run.finish_stage(stage.name, record)
    context.results[stage.name] = {**record, "reused": False}
    context.emit("finished", seconds=record["seconds"])


def _leads_to(name: str, until: str) -> bool:
    needed, frontier = {until}, [until]
    by_name = {stage.name: stage for stage in STAGES}
    while frontier:
        for before in by_name[frontier.pop()].after:
            if before not in needed:
                needed.add(before)
                frontier.append(before)
    return name in needed


def _require_stage(name: str, recipe: Recipe) -> None:
    stage = next((stage for stage in STAGES if stage.name == name), None)
    if stage is None:
        raise RecipeError(f"There is no stage {name!r}.", f"Stages: {', '.join(s.name for s in STAGES)}.")
    if not stage.wanted(recipe):
        section = {"calibrate": "a scheme that needs calibration", "export": "export", "verify": "export",
                   "eval-ppl": "evaluate.perplexity"}.get(name, name)  # fmt: skip
        raise RecipeError(f"This recipe has nothing for stage {name}.", f"It would need {section}.")


def _require_disk(run: RunDirectory, plan: Plan) -> None:
    """Refuse before work begins what cannot fit. A finished run needs little; only a new one is checked."""
    import shutil

    if run.record.get("stages"):
        return
    free = shutil.disk_usage(run.path).free
    if free < plan.estimate.disk:
        needed = plan.estimate.disk / 1e9
        raise RoomError(f"{run.path} has {free / 1e9:.1f} GB free, and the run needs about {needed:.1f} GB.",
                        "Free some, or choose another output.")  # fmt: skip


def choose_device(wanted: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU. Raises RecipeError for a device that is absent."""
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


def _check_gates(recipe: Recipe, result: RunResult) -> None:
    gates = recipe.evaluate.gates if recipe.evaluate else None
    scores = result.perplexity
    if gates is None or scores is None:
        return
    for name, bound, found in (
        ("perplexity_increase", gates.perplexity_increase, scores["increase"]),
        ("kl_divergence", gates.kl_divergence, scores["kl_divergence"]),
    ):
        if bound is not None and not (found is not None and found <= bound):
            shown = "undefined" if found is None else f"{found:.4g}"
            raise GateError(f"evaluate.gates.{name}: {shown} is above {bound:.4g}.",
                            f"The run is complete in {result.path}; try a milder scheme or roll back more.")  # fmt: skip


def _peak_memory() -> int:
    """Bytes; getrusage counts kilobytes on Linux and bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
