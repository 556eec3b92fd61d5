"""verify: whether a checkpoint on disk is what was quantized."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, QuantcliError, RecipeError, VerificationError
from quantcli.formats.sums import SUMS, check_digests, check_strangers, check_sums
from quantcli.model.checkpoint import read_json
from quantcli.model.untrusted import brings_code
from quantcli.pipeline.rundir import RECIPE, RECORD, STAGE_RECORD, is_run
from quantcli.pipeline.source import where_checkpoints_are

if TYPE_CHECKING:
    from quantcli.formats.export import Source
    from quantcli.formats.store import Store
    from quantcli.model.structure import Structure
    from quantcli.quant.scheme import Scheme
    from quantcli.recipe.schema import Recipe


def verify_path(path: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Check the exports of a run, or one checkpoint.

    A checkpoint inside a run is compared with the store it was written from, the store with the plan, and every file
    with its recorded digest; one that stands alone, whoever made it, is checked against itself and its checksums, if it
    has any, and tensors that are of no parameter of the model are reported. Code of a model runs only with
    `trust_remote_code`, whatever the recipe of a run says, since that comes with what is judged. Raises
    VerificationError with the file or module and the difference.
    """
    resolved = path.resolve()
    if is_run(resolved):
        return _verify_run(resolved, None, trust_remote_code)
    run = resolved.parent.parent
    if resolved.parent.name == "export" and is_run(run):
        return _verify_run(run, resolved.name, trust_remote_code)
    if not path.exists():
        raise RecipeError(f"There is nothing at {path}.", "Check the path.")
    if not any((path / name).is_file() for name in ("config.json", SUMS)):
        raise RecipeError(f"{path} is neither a run directory nor a checkpoint.", where_checkpoints_are(path))
    return _verify_alone(path, trust_remote_code)


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
    turned = [linear.name for linear in structure.matrices() if linear.transposed]
    found = verify_checkpoint(
        folder, store, source.checkpoint, source.weights, source.cast, form, source.tied, split, turned
    )
    score = check_prompt(folder, form, store, source, structure, trust_remote_code=trust_remote_code)
    return {**asdict(found), "prompt": score, "files": digests}


def _verify_run(run: Path, only: str | None, trust_remote_code: bool) -> dict[str, Any]:
    from quantcli.model.structure_cache import find_structure
    from quantcli.pipeline.smoothed import smoothed_checkpoint
    from quantcli.pipeline.source import locate_model
    from quantcli.pipeline.stages.export import source_of
    from quantcli.pipeline.tuned import finished_checkpoint, finished_store
    from quantcli.recipe import load_recipe

    record, recipe = read_json(run / RECORD).get("stages", {}), load_recipe(run / RECIPE)
    if "export" not in record:
        raise _without_export(run, recipe)
    named = list(recipe.export.formats if recipe.export else ())
    files = record["export"].get("files", {})
    # the recipe's first, then those of earlier ones, which came from the same store
    formats = [only] if only else list(dict.fromkeys([*named, *(name.partition("/")[0] for name in files)]))
    for name in formats:  # before anything is computed
        check_digests(run / "export" / name, export_digests(run, name))
    files = read_json(run / "export" / STAGE_RECORD)["files"]
    if record["export"].get("files", files) != files:
        raise VerificationError(f"{run}: {RECORD} and export/{STAGE_RECORD} differ about the files of the export.",
                                "Run the recipe again.")  # fmt: skip
    model = locate_model(recipe.model)
    recipe = _as_trusted(recipe, model, trust_remote_code)
    trust = recipe.model.trust_remote_code
    structure = find_structure(model, dtype=recipe.model.dtype, trust_remote_code=trust)
    smoothed = smoothed_checkpoint(recipe, model, structure, run / "smooth")
    source = source_of(recipe, structure, finished_checkpoint(recipe, smoothed, run))
    store = finished_store(recipe, run)
    check_planned(store.schemes, _settled_schemes(recipe, model, run))
    found = {name: verify_export(run, name, store, source, structure, trust_remote_code=trust) for name in formats}
    for facts in found.values():
        facts["files"] = len(facts["files"])
    return {f"{name}: {key}": value for name, facts in found.items() for key, value in facts.items()}


def _as_trusted(recipe: Recipe, model: Path, trusted: bool) -> Recipe:
    """The recipe of a run that lets code run only if who verifies does, too. Raises RecipeError where that is missing:
    without its code the model may be another."""
    if recipe.model.trust_remote_code and not trusted and brings_code(model):
        raise RecipeError(f"{model} brings code of its own, which this run was made with.",
                          "Read that code, then say --trust-remote-code.")  # fmt: skip
    section = recipe.model.model_copy(update={"trust_remote_code": recipe.model.trust_remote_code and trusted})
    return recipe.model_copy(update={"model": section})


def _settled_schemes(recipe: Recipe, model: Path, run: Path) -> dict[str, Scheme]:
    """The scheme of every linear that the plan of a finished run quantizes, what its stages found included."""
    from quantcli.pipeline.engine import settled_plan

    try:
        plan = settled_plan(recipe, model, run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{run}: what its stages found cannot be read: {error}.",
                                "Run the recipe again.") from error  # fmt: skip
    return {name: scheme for name, (_, scheme) in plan.schemes.items()}


def _without_export(run: Path, recipe: Recipe) -> QuantcliError:
    """Why there is nothing to verify, and what makes it; files of an export that does not count are a fault."""
    command = f"quantcli export {shlex.quote(str(run / RECIPE))}"
    if recipe.export is None:
        remedy = f"Name a format and export: {command} --set 'export.formats=[compressed-tensors]'"
        return RecipeError(f"{run} has no export: its recipe says export: null.", remedy)
    if not any((run / "export").glob("*/*")):
        return RecipeError(f"{run} has no export yet.", f"Export it: {command}")
    return VerificationError(f"{run} holds no finished export of its recipe.", f"Run it: {command}")


def check_planned(found: Mapping[str, Scheme], planned: Mapping[str, Scheme]) -> None:
    """Every planned linear is quantized under its scheme, and no other is. Raises VerificationError."""
    for name in [*planned, *found]:
        if found.get(name) != planned.get(name):
            one, other = (side[name].name if name in side else "float" for side in (found, planned))
            raise VerificationError(f"The store has another scheme than the plan: {name} is {one}, not {other}.",
                                    "Quantize again.")  # fmt: skip


def _verify_alone(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    from quantcli.formats.verify_ascend import FORMS, check_added_alone, check_description_alone
    from quantcli.formats.verify_gptq import check_configuration_alone
    from quantcli.pipeline.sound import check_linear, check_others
    from quantcli.pipeline.standalone import open_checkpoint

    files = check_sums(path)
    try:
        structure, checkpoint, weights = open_checkpoint(path, trust_remote_code=trust_remote_code)
        if checkpoint.form is None:
            raise RecipeError(f"{path} is not a quantized checkpoint.", "Name a run, or one of its exports.")
        for name in checkpoint.schemes:
            stored = check_linear(checkpoint, name)
            if checkpoint.form.NAME in FORMS:
                check_added_alone(checkpoint, name, stored)
        skeleton = check_others(structure, checkpoint, weights, trust_remote_code=trust_remote_code)
        if checkpoint.form.NAME in FORMS[:2]:
            check_description_alone(checkpoint, structure, weights)
        elif checkpoint.form.NAME in ("gptq", "awq"):
            check_configuration_alone(checkpoint, structure, weights)
    except ModelError as error:
        raise VerificationError(str(error)) from error
    sums = "it has no checksums" if files is None else f"and the checksums of its {files} files"
    found = {"linears": len(checkpoint.schemes), "checked against": f"itself (no run beside it; {sums})"}
    if checkpoint.attention_modules:
        found["attention modules"] = len(checkpoint.attention_modules)
    if disputed := checkpoint.disputed:
        found["zero points"] = disputed
    if unused := skeleton.unused_tensors:
        found["of no parameter"] = f"{len(unused)} tensors, such as {unused[0]}"
    return found
