"""reference-tasks: the float model's answers, once for all that is compared with it."""

from __future__ import annotations

from typing import Any

from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.stages.reference import taken_over
from quantcli.pipeline.tasks import run_task, task_file, task_identity
from quantcli.recipe.schema import Recipe


def wanted(recipe: Recipe) -> bool:
    return recipe.evaluate is not None and bool(recipe.evaluate.tasks)


def _identity(context: Context) -> dict[str, Any]:
    assert context.recipe.evaluate is not None
    tasks = [task_identity(section) for section in context.recipe.evaluate.tasks]
    return {"tasks": tasks, "dtype": context.recipe.model.dtype, "device": context.device}


def run(context: Context, folder: StageFolder) -> None:
    """Writes a file a task: what came of each question. They are taken over from another run as hidden states are."""
    from quantcli.pipeline.sequences import Model

    assert context.recipe.evaluate is not None
    if not folder.files and taken_over(context, folder, ""):
        return
    model = Model("float", context.skeleton(original=True), None, "prefill")
    for section in context.recipe.evaluate.tasks:
        file = folder.path / task_file(section)
        if not folder.adopt(file):
            write_json(file, run_task(context, section, model, folder.path))
            folder.add(file)


def _writes(context: Context) -> tuple[str, ...]:
    assert context.recipe.evaluate is not None
    return (*(task_file(section) for section in context.recipe.evaluate.tasks), "hidden-*/*")


STAGE = Stage(
    "reference-tasks",
    (),
    wanted,
    _identity,
    run,
    _writes,
    guards=("check",),
    title="Putting tasks to the float model",
    asked_by="evaluate.tasks",
)
