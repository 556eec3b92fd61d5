"""export: write the checkpoints that serving engines load, from the store and the float checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.formats.common import DESCRIPTIONS
from quantcli.formats.sums import SUMS
from quantcli.model.structure import Structure
from quantcli.model.untrusted import checkpoint_entries
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder
from quantcli.pipeline.tuned import finished_checkpoint, finished_store
from quantcli.recipe.schema import ExportSection, Recipe

if TYPE_CHECKING:
    from quantcli.formats.export import Source
    from quantcli.model.checkpoint import Checkpoint


# What may lie beside the weights of a checkpoint is copied under its own name; the rest are names of ours, the first
# three behind the stem of the format.
_WEIGHTS = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json", ".gguf")


def _identity(context: Context) -> dict[str, Any]:
    assert context.recipe.export is not None
    section = context.recipe.export
    # named only where it matters, so that exports of other formats stay as they are
    modes = {"restrict_permissions": True} if any(_is_restricted(section, form) for form in section.formats) else {}
    sizes = {"shard_size": section.shard_size} if any(_is_cut(section, form) for form in section.formats) else {}
    order = {"order": "blocks"}  # that of tensors in shards, by which earlier versions had another
    return {"formats": list(section.formats), "dtype": context.recipe.model.dtype, **order, **modes, **sizes}


def _part(context: Context, form: str) -> dict[str, Any]:
    """What the export in one format depends on, named in the recipe or not."""
    from quantcli.formats.table import FORMATS

    section = context.recipe.export
    assert section is not None
    restricted = form in FORMATS and _is_restricted(section, form)
    size = {"shard_size": section.shard_size} if form in FORMATS and _is_cut(section, form) else {}
    return {"dtype": context.recipe.model.dtype, "restrict_permissions": restricted, **size}


def _is_restricted(section: ExportSection, form: str) -> bool:
    """Whether the files of a format get modes of their own."""
    from quantcli.formats.permissions import restricts
    from quantcli.formats.table import FORMATS

    return section.restrict_permissions and restricts(FORMATS[form])


def _is_cut(section: ExportSection, form: str) -> bool:
    """Whether the weights of a format are cut into files of a size that the recipe names."""
    from quantcli.formats.table import FORMATS

    return section.shard_size is not None and not hasattr(FORMATS[form], "write_weights")


def float_source(context: Context) -> Source:
    """The float checkpoint that everything but the quantized linears comes from."""
    checkpoint = finished_checkpoint(context.recipe, context.checkpoint, context.run.path)
    return source_of(context.recipe, context.plan.structure, checkpoint)


def source_of(recipe: Recipe, structure: Structure, checkpoint: Checkpoint) -> Source:
    """`float_source` of a run that has no context any more."""
    import torch

    from quantcli.formats.export import Source, tied_head
    from quantcli.model.names import weight_tensors

    trust, dtype = recipe.model.trust_remote_code, recipe.model.dtype
    weights = weight_tensors(checkpoint.directory, structure, checkpoint.entries, trust_remote_code=trust)
    cast = None if dtype == "auto" else getattr(torch, dtype)
    return Source(checkpoint, weights, cast, tied_head(structure, checkpoint))


def run(context: Context, folder: StageFolder) -> None:
    """Writes one folder a format, each ready to serve. Those that are there from the same store stay as they are, also
    of formats that the recipe does not name any more."""
    from quantcli.formats.export import export_checkpoint
    from quantcli.formats.permissions import restricted
    from quantcli.formats.table import FORMATS

    section = context.recipe.export
    assert section is not None
    store, source = finished_store(context.recipe, context.run.path), float_source(context)
    for name in section.formats:
        if name in folder.parts:
            continue
        stem = FORMATS[name].STEM
        for shard in sorted((folder.path / name).glob(f"{stem}-*-of-*.safetensors")):
            folder.adopt(shard)
        for single in ("safetensors", "gguf"):
            for file in sorted((folder.path / name).glob(f"{stem}.{single}")):
                folder.adopt(file)
        for own in getattr(FORMATS[name], "FILES", ()):
            folder.adopt(folder.path / name / own)
        size = section.shard_size
        ahead = context.folder("quantize") if context.recipe.quantize.distill is None else None
        files = export_checkpoint(folder.path / name, FORMATS[name], store, source, context.linears, size, ahead)
        for file, digest in restricted(folder.path / name, files) if _is_restricted(section, name) else files:
            folder.add(file, digest)
            context.emit("file", format=name, file=file.name, bytes=file.stat().st_size)
        folder.finish_part(name)
    for pattern in (f".{form}-*.safetensors.*.part" for form in FORMATS):
        for left in context.folder("quantize").glob(pattern):  # of a format that came out as it was
            left.unlink()


def writer_ahead(context: Context, place: Path) -> Callable[[], None] | None:
    """What writes the shards of the recipe's exports into `place` as soon as the store that is made there has their
    blocks; None where stages to come change what they hold, or nothing is to be exported. The store has a manifest."""
    from quantcli.formats.export import write_finished_shards
    from quantcli.formats.store import Store
    from quantcli.formats.table import FORMATS

    section = context.recipe.export
    if section is None or not context.exports or context.recipe.quantize.distill is not None:
        return None
    store, untuned = Store(place), float_source(context)

    def write() -> None:
        source = float_source(context) if context.recipe.quantize.tunes_vectors else untuned
        for name in section.formats:
            write_finished_shards(place, FORMATS[name], store, source, context.linears, section.shard_size)

    return write


def weight_files(stem: str) -> list[str]:
    """Patterns of the weights of an export, and their index."""
    return [stem + ending for ending in _WEIGHTS]


def checkpoint_files(model: Path, stem: str) -> list[str]:
    """Patterns of what an export of a model may write: weights and their index, config.json, what it copies."""
    beside = [file for file in checkpoint_entries(model) if file.suffix not in (".safetensors", ".md")]
    names = [escape(file.relative_to(model).as_posix()) for file in beside]
    return list(dict.fromkeys([*weight_files(stem), "config.json", SUMS, *names]))


def _writes(context: Context) -> tuple[str, ...]:
    from quantcli.formats.table import FORMATS

    assert context.recipe.export is not None
    forms = context.recipe.export.formats
    names = {
        form: [
            *checkpoint_files(context.model, FORMATS[form].STEM),
            *getattr(FORMATS[form], "FILES", ()),
            *DESCRIPTIONS,
        ]
        for form in forms
    }
    return tuple(f"{form}/{name}" for form in forms for name in names[form])


STAGE = Stage(
    "export",
    ("smooth", "quantize", "distill"),
    lambda recipe: recipe.export is not None,
    _identity,
    run,
    _writes,
    part=_part,
    title="Writing checkpoints",
    asked_by="export",
)
