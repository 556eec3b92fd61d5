"""verify: whether a checkpoint on disk is what was quantized."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats.sums import check_digests, check_strangers, check_sums
from quantcli.model.checkpoint import read_json
from quantcli.pipeline.rundir import RECIPE, RECORD, STAGE_RECORD, is_run

if TYPE_CHECKING:
    from quantcli.formats.export import Source
    from quantcli.formats.store import Store
    from quantcli.model.structure import Structure


def verify_path(path: Path) -> dict[str, Any]:
    """Check the exports of a run, or one checkpoint.

    A checkpoint inside a run is compared with the store it was written from, and every file with its recorded digest;
    one that stands alone is checked against itself and its checksums, if it has any. Raises VerificationError with the
    file or module and the difference.
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


def export_digests(run: Path, form: str) -> dict[str, str]:
    """The recorded digests of one exported checkpoint, by file name. Raises VerificationError where there are none."""
    try:
        files = read_json(run / "export" / STAGE_RECORD).get("files")
    except ModelError as error:
        raise VerificationError(error.message, "Run the recipe again to export it.") from error
    found = files.items() if isinstance(files, dict) else ()
    digests = {name.removeprefix(f"{form}/"): digest for name, digest in found if name.startswith(f"{form}/")}
    if not digests:
        raise VerificationError(f"{run} has no record of the files of {form}.", "Run the recipe again to export it.")
    return digests


def verify_export(
    run: Path, form: str, store: Store, source: Source, structure: Structure, *, trust_remote_code: bool
) -> dict[str, Any]:
    """What was found in order in one export of a run: counts, the score of a fixed prompt, the digests of its files.

    Files are those that were recorded, and no others that an engine may read; tensors and configuration those of the
    store and the float checkpoint; logits of a fixed prompt those of the store. Raises VerificationError.
    """
    from quantcli.formats.verify import verify_checkpoint
    from quantcli.pipeline.prompt import check_prompt

    folder, digests = run / "export" / form, export_digests(run, form)
    check_digests(folder, digests)
    check_strangers(folder, digests)
    check_sums(folder)
    split = [linear.name for linear in structure.matrices() if linear.splits_input]
    found = verify_checkpoint(folder, store, source.checkpoint, source.weights, source.cast, form, source.tied, split)
    score = check_prompt(folder, form, store, source, structure, trust_remote_code=trust_remote_code)
    return {**asdict(found), "prompt": score, "files": digests}


def _verify_run(run: Path, only: str | None) -> dict[str, Any]:
    from quantcli.model.structure_cache import find_structure
    from quantcli.pipeline.smoothed import smoothed_checkpoint
    from quantcli.pipeline.source import locate_model
    from quantcli.pipeline.stages.export import source_of
    from quantcli.pipeline.tuned import finished_checkpoint, finished_store
    from quantcli.recipe import load_recipe

    record = read_json(run / RECORD).get("stages", {})
    if "export" not in record:
        raise VerificationError(f"{run} holds no finished export.", f"Run it: quantcli export {run / RECIPE}")
    recipe = load_recipe(run / RECIPE)
    formats = [only] if only else list(recipe.export.formats if recipe.export else ())
    for name in formats:  # before anything is computed
        check_digests(run / "export" / name, export_digests(run, name))
    files = read_json(run / "export" / STAGE_RECORD)["files"]
    if record["export"].get("files", files) != files:
        raise VerificationError(f"{run}: {RECORD} and export/{STAGE_RECORD} differ about the files of the export.",
                                "Run the recipe again.")  # fmt: skip
    section = recipe.model
    model = locate_model(section)
    structure = find_structure(model, dtype=section.dtype, trust_remote_code=section.trust_remote_code)
    smoothed = smoothed_checkpoint(recipe, model, structure, run / "smooth")
    source = source_of(recipe, structure, finished_checkpoint(recipe, smoothed, run))
    store = finished_store(recipe, run)
    trust = section.trust_remote_code
    found = {name: verify_export(run, name, store, source, structure, trust_remote_code=trust) for name in formats}
    for facts in found.values():
        facts["files"] = len(facts["files"])
    return {f"{name}: {key}": value for name, facts in found.items() for key, value in facts.items()}


def _verify_alone(path: Path) -> dict[str, Any]:
    import torch

    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.structure_cache import find_structure

    files = check_sums(path)
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
    sums = "it has no checksums" if files is None else f"and the checksums of its {files} files"
    return {"linears": len(checkpoint.schemes), "checked against": f"itself (no run beside it; {sums})"}
