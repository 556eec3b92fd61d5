"""eval-tasks: the exported model's answers beside the float model's."""

from __future__ import annotations

from typing import Any

from quantcli.model.checkpoint import read_json
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.served import exported_model
from quantcli.pipeline.stages.eval_ppl import finite
from quantcli.pipeline.stages.reference_tasks import wanted
from quantcli.pipeline.tasks import run_task, task_file, task_identity

RESULTS = "results.json"


def _identity(context: Context) -> dict[str, Any]:
    assert context.recipe.evaluate is not None
    perplexity = context.recipe.evaluate.perplexity
    tasks = [task_identity(section) for section in context.recipe.evaluate.tasks]
    return {"tasks": tasks, "phase": perplexity.phase if perplexity else "prefill", "device": context.device}


def run(context: Context, folder: StageFolder) -> None:
    """Writes a file a task, what came of each question, and results.json: for each task both models' metrics with
    intervals and the paired change."""
    from quantcli.evaluation.tasks import compared
    from quantcli.pipeline.sequences import Model

    evaluate = context.recipe.evaluate
    assert evaluate is not None
    skeleton, exported = exported_model(context)
    phase = evaluate.perplexity.phase if evaluate.perplexity else "prefill"
    model = Model("quantized", skeleton, exported, phase)
    results: dict[str, Any] = {}
    for section in evaluate.tasks:
        file = folder.path / task_file(section)
        if not folder.adopt(file):
            write_json(file, run_task(context, section, model, folder.path))
            folder.add(file)
        before, after = read_json(context.folder("reference-tasks") / file.name), read_json(file)
        found: dict[str, Any] = {"description": before["description"]}
        if before["samples"] and before["samples"][0]:
            found |= compared(before["samples"], after["samples"], before.get("lower_is_better", ()))
        if "aggregates" in before:
            found["lm_eval"] = {"float_model": before["aggregates"], "quantized": after["aggregates"]}
        results[section.task] = finite(found)
        context.emit(
            "task", task=section.task, **{k: v for k, v in results[section.task].items() if k != "description"}
        )
    write_json(folder.path / RESULTS, {"tasks": results})
    folder.add(folder.path / RESULTS)


def _writes(context: Context) -> tuple[str, ...]:
    assert context.recipe.evaluate is not None
    return (RESULTS, *(task_file(section) for section in context.recipe.evaluate.tasks), "hidden-*/*")


STAGE = Stage(
    "eval-tasks",
    ("reference-tasks", "export"),
    wanted,
    _identity,
    run,
    _writes,
    guards=("check", "verify"),
    title="Putting tasks to the export",
    asked_by="evaluate.tasks",
)
