"""verify: read every export back with an independent reader and check it against the store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.stages.export import float_source
from quantcli.pipeline.tuned import finished_store
from quantcli.pipeline.verify import check_digests, export_digests

RESULT = "verified.json"


def _identity(context: Context) -> dict[str, Any]:
    return {}


def run(context: Context, folder: StageFolder) -> None:
    """Writes verified.json. Raises VerificationError for the first difference."""
    from quantcli.formats.verify import verify_checkpoint

    assert context.recipe.export is not None
    store, source = finished_store(context.recipe, context.run.path), float_source(context)
    found: dict[str, Any] = {}
    for name in context.recipe.export.formats:
        export = context.folder("export") / name
        check_digests(export, export_digests(context.run.path, name))
        found[name] = asdict(
            verify_checkpoint(export, store, source.checkpoint, source.weights, source.cast, name, source.tied)
        )
        context.emit("verified", format=name, **found[name])
    write_json(folder.path / RESULT, found)
    folder.add(folder.path / RESULT)


STAGE = Stage(
    "verify",
    ("smooth", "quantize", "distill", "export"),
    lambda recipe: recipe.export is not None,
    _identity,
    run,
    lambda _: (RESULT,),
)
