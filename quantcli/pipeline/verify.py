"""verify and inspect of what lies on disk, whoever made it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.pipeline.rundir import RECIPE


def verify_path(path: Path) -> dict[str, Any]:
    """Check the exports of a run, or one checkpoint.

    A checkpoint inside a run is compared with the store it was written from; one that stands alone is checked against
    itself. Raises VerificationError with the module and the difference.
    """
    run = next((folder for folder in (path, path.parent.parent) if (folder / RECIPE).is_file()), None)
    if run is not None:
        return _verify_run(run, None if run == path else path.name)
    if not (path / "config.json").is_file():
        raise RecipeError(f"{path} is neither a run directory nor a checkpoint.", "Name one of them.")
    return _verify_alone(path)


def _verify_run(run: Path, only: str | None) -> dict[str, Any]:
    import torch

    from quantcli.formats.store import Store
    from quantcli.formats.verify import verify_checkpoint
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.names import weight_tensors
    from quantcli.model.structure_cache import find_structure
    from quantcli.pipeline.source import locate_model
    from quantcli.recipe import load_recipe

    recipe = load_recipe(run / RECIPE)
    section = recipe.model
    model = locate_model(section)
    structure = find_structure(model, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    source = Checkpoint(model)
    weights = weight_tensors(model, structure, source.entries, trust_remote_code=section.trust_remote_code)
    cast = None if section.dtype == "auto" else getattr(torch, section.dtype)
    formats = [only] if only else list(recipe.export.formats if recipe.export else ())
    missing = [name for name in formats if not (run / "export" / name / "config.json").is_file()]
    if missing or not formats:
        raise VerificationError(
            f"{run} holds no finished export{' ' + missing[0] if missing else ''}.", "Run it first."
        )
    store = Store(run / "quantize")
    found = {n: asdict(verify_checkpoint(run / "export" / n, store, source, weights, cast)) for n in formats}
    return {f"{name}: {key}": value for name, facts in found.items() for key, value in facts.items()}


def _verify_alone(path: Path) -> dict[str, Any]:
    import torch

    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.structure_cache import find_structure

    structure = find_structure(path)
    linears = {linear.name: linear for linear in structure.linears()}
    try:
        checkpoint = QuantizedCheckpoint(path, linears, {name: f"{name}.weight" for name in linears})
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
