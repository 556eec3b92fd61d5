"""verify: whether a checkpoint on disk is what was quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.model.checkpoint import read_json
from quantcli.pipeline.rundir import RECIPE, RECORD, STAGE_RECORD, file_digest, is_run


def verify_path(path: Path) -> dict[str, Any]:
    """Check the exports of a run, or one checkpoint.

    A checkpoint inside a run is compared with the store it was written from, and every file with its recorded digest;
    one that stands alone is checked against itself. Raises VerificationError with the module and the difference.
    """
    resolved = path.resolve()
    if is_run(resolved):
        return _verify_run(resolved, None)
    run = resolved.parent.parent
    if resolved.parent.name == "export" and is_run(run):
        return _verify_run(run, resolved.name)
    if not (path / "config.json").is_file():
        raise RecipeError(f"{path} is neither a run directory nor a checkpoint.", "Name one of them.")
    return _verify_alone(path)


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise VerificationError unless every file, by its name relative to the folder, has its recorded sha256."""
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise VerificationError(f"{file} is missing.", "Run the recipe again to export it.")
        if file_digest(file) != digest:
            raise VerificationError(f"{file} is not what was exported.", "Delete it and run the recipe again.")


def export_digests(run: Path, form: str) -> dict[str, str]:
    """The recorded digests of one exported checkpoint, by file name."""
    files = read_json(run / "export" / STAGE_RECORD)["files"]
    return {name.removeprefix(f"{form}/"): digest for name, digest in files.items() if name.startswith(f"{form}/")}


def _verify_run(run: Path, only: str | None) -> dict[str, Any]:
    from quantcli.formats.verify import verify_checkpoint
    from quantcli.model.structure_cache import find_structure
    from quantcli.pipeline.smoothed import smoothed_checkpoint
    from quantcli.pipeline.source import locate_model
    from quantcli.pipeline.stages.export import source_of
    from quantcli.pipeline.tuned import finished_checkpoint, finished_store
    from quantcli.recipe import load_recipe

    if "export" not in read_json(run / RECORD).get("stages", {}):
        raise VerificationError(f"{run} holds no finished export.", f"Run it: quantcli export {run / RECIPE}")
    recipe = load_recipe(run / RECIPE)
    formats = [only] if only else list(recipe.export.formats if recipe.export else ())
    for name in formats:
        check_digests(run / "export" / name, export_digests(run, name))
    section = recipe.model
    model = locate_model(section)
    structure = find_structure(model, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    smoothed = smoothed_checkpoint(recipe, model, structure, run / "smooth")
    source = source_of(recipe, structure, finished_checkpoint(recipe, smoothed, run))
    store = finished_store(recipe, run)
    found = {
        name: asdict(
            verify_checkpoint(
                run / "export" / name, store, source.checkpoint, source.weights, source.cast, name, source.tied
            )
        )
        for name in formats
    }
    return {f"{name}: {key}": value for name, facts in found.items() for key, value in facts.items()}


def _verify_alone(path: Path) -> dict[str, Any]:
    import torch

    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.structure_cache import find_structure

    structure = find_structure(path)
    linears = {linear.name: linear for linear in structure.matrices()}
    try:
        checkpoint = QuantizedCheckpoint(path, linears, {name: f"{name}.weight" for name in linears})
        if checkpoint.form is None:
            raise VerificationError(f"{path} is not a quantized checkpoint.", "Name a run, or one of its exports.")
        for name in checkpoint.schemes:
            stored = checkpoint.read_linear(name)
            linear = linears[name]
            if tuple(stored.weight.codes.shape) != (linear.out_features, linear.in_features):
                raise VerificationError(
                    f"{name}: codes have shape {tuple(stored.weight.codes.shape)}.", "Export it again."
                )
            for scale in (stored.weight.scale, stored.input_scale):
                if scale is not None and not bool((torch.isfinite(scale) & (scale != 0)).all()):
                    raise VerificationError(f"{name}: a scale is zero or not finite.", "Quantize it again.")
    except ModelError as error:
        raise VerificationError(str(error)) from error
    missing = [name for name in structure.parameters if name not in checkpoint]
    if missing:
        raise VerificationError(f"{path}: {missing[0]} is missing.", "Export it again.")
    return {"linears": len(checkpoint.schemes), "checked against": "itself (no run beside it)"}
