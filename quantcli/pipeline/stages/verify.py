"""verify: read every export back with an independent reader and check it against the store."""

from __future__ import annotations

from typing import Any

from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.stages.export import float_source
from quantcli.pipeline.tuned import finished_store
from quantcli.pipeline.verify import check_planned, verify_export

RESULT = "verified.json"


def _identity(context: Context) -> dict[str, Any]:
    return {}


def run(context: Context, folder: StageFolder) -> None:
    """Writes verified.json. Raises VerificationError for the first difference."""
    assert context.recipe.export is not None
    store, source = finished_store(context.recipe, context.run.path), float_source(context)
    check_planned(store.schemes, {name: scheme for name, (_, scheme) in context.plan.schemes.items()})
    trust, structure = context.recipe.model.trust_remote_code, context.plan.structure
    found: dict[str, Any] = {}
    for name in context.recipe.export.formats:
        facts = verify_export(context.run.path, name, store, source, structure, trust_remote_code=trust)
        found[name] = facts
        context.emit("verified", format=name, **{key: value for key, value in facts.items() if key != "files"})
    write_json(folder.path / RESULT, found)
    folder.add(folder.path / RESULT)


STAGE = Stage(
    "verify",
    ("smooth", "quantize", "distill", "export"),
    lambda recipe: recipe.export is not None,
    _identity,
    run,
    lambda _: (RESULT,),
    title="Reading the export back",
    asked_by="export",
)
