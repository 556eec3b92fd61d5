"""The float checkpoint with what stage `smooth` found folded into its weights, as every later stage reads it.

The stage's folder holds one safetensors file a block, `block-00000.safetensors`, float32: `X.scale` [C] and, if
channels are shifted too, `X.shift` [C] for each shared input X that is folded; an input without them stays as it is.
Where a shift needs a bias that the architecture lacks, that bias is added: which ones follows from the shifts.
`L.clip.int4` [out, groups], or [1, 1] for a weight of one scale, are bounds that the weight of linear L is held within
when it is quantized to these codes, and only then.
`rotation.json` holds the rotation that comes before, if there is one: scales are those of the rotated model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, read_json, replacing
from quantcli.model.structure import Structure, biased
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.model.folding import Fold
    from quantcli.model.rotation import ModelRotation
    from quantcli.quant.scheme import Scheme

ROTATION = "rotation.json"
CLIP = "clip"


def smoothed_checkpoint(recipe: Recipe, model: Path, structure: Structure, folder: Path) -> Checkpoint:
    """The checkpoint of `model`, changed on reading by what stage `smooth` left in `folder` if the recipe has one.

    Raises ModelError if a file of the stage is missing, damaged or of another model.
    """
    from quantcli.model.folding import missing_biases

    checkpoint, section = Checkpoint(model), recipe.smooth
    if section is None:
        return checkpoint
    names = changeable_tensors(recipe, checkpoint, structure)
    if section.rotation is not None:
        checkpoint = rotated_checkpoint(checkpoint, structure, read_rotation(folder), names)
    if section.scales:
        folds = [fold for index in range(len(structure.blocks)) for fold in read_folds(folder, index, structure)]
        biases = missing_biases(structure, folds)
        checkpoint = biased_checkpoint(checkpoint, structure, biases, names)
        names |= added_names(checkpoint)
        checkpoint = folded_checkpoint(checkpoint, biased(structure, biases), folds, names)
    return checkpoint


def rotated_checkpoint(
    checkpoint: Checkpoint, structure: Structure, rotation: ModelRotation, names: dict[str, str]
) -> Checkpoint:
    """The checkpoint read as that of the rotated model. `names` maps parameters to its tensors.

    A tied head becomes a tensor of its own; one that the file holds in spite of tying is what is rotated.
    """
    from quantcli.model.folding import Added, TransformedCheckpoint
    from quantcli.model.rotation import rotation_changes

    changes, added = rotation_changes(structure, rotation, _reader(checkpoint, names))
    heads = {
        name: Added(name if name in checkpoint else names[tensor.origin], tensor.change)
        for name, tensor in added.items()
    }
    return TransformedCheckpoint(checkpoint, {names[name]: change for name, change in changes.items()}, heads)


def biased_checkpoint(
    checkpoint: Checkpoint, structure: Structure, biases: Collection[str], names: Mapping[str, str]
) -> Checkpoint:
    """The checkpoint with zeros for biases that the model lacks, beside the weights that `names` maps to its tensors:
    what they add is up to the folds."""
    from quantcli.model.folding import Added, TransformedCheckpoint

    shapes, added = biased(structure, biases).parameters, {}
    for bias in biases:
        weight = names[f"{bias.removesuffix('.bias')}.weight"]
        added[f"{weight.removesuffix('.weight')}.bias"] = Added(weight, None, shapes[bias], bias)
    return TransformedCheckpoint(checkpoint, {}, added) if added else checkpoint


def added_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensor of every bias that was added to the checkpoint, by its parameter."""
    from quantcli.model.folding import added_tensors

    return {added.parameter: name for name, added in added_tensors(checkpoint).items() if added.parameter}


def folded_checkpoint(
    checkpoint: Checkpoint, structure: Structure, folds: Iterable[Fold], names: dict[str, str]
) -> Checkpoint:
    """The checkpoint read with the folds in its weights. `names` maps parameters to its tensors."""
    from quantcli.model.folding import TransformedCheckpoint, fold_changes

    changes = fold_changes(structure, folds, _reader(checkpoint, names))
    return TransformedCheckpoint(checkpoint, {names[name]: change for name, change in changes.items()})


def folds_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


def write_folds(folder: Path, index: int, folds: Iterable[Fold], clips: Mapping[str, Tensor] | None = None) -> str:
    """Write scales, shifts and clips (by `clip_name`) of a block, or an empty file; returns the sha256."""
    from quantcli.model.writer import write_tensors

    tensors: dict[str, Tensor] = {}
    for fold in folds:
        tensors[f"{fold.linears[0]}.scale"] = fold.scale.float()
        if fold.shift is not None:
            tensors[f"{fold.linears[0]}.shift"] = fold.shift.float()
    tensors |= {name: bounds.float().cpu() for name, bounds in (clips or {}).items()}
    return write_tensors(folds_file(folder, index), tensors, "quantcli-folds")


def read_folds(folder: Path, index: int, structure: Structure) -> list[Fold]:
    """The folds of a block. Raises ModelError for a file that is missing, damaged or of another model."""
    from quantcli.model.folding import Fold

    file = folds_file(folder, index)
    tensors = _load(file, lambda name: name.split(".")[-2] != CLIP)
    folds = []
    for shared in structure.blocks[index].groups:
        scale, shift = (tensors.pop(f"{shared.name}.{part}", None) for part in ("scale", "shift"))
        if scale is not None and shared.producer is not None:
            folds.append(Fold(shared.producer, shared.linears, scale, shift))
        elif scale is not None or shift is not None:
            raise ModelError(f"{file} scales the input of {shared.name}, which cannot be folded.", _RERUN)
    if tensors:
        raise ModelError(f"{file} holds {next(iter(tensors))}, which belongs to no input of the block.", _RERUN)
    return folds


def clip_name(linear: str, scheme: Scheme) -> str:
    """What bounds of a weight are stored as: those for codes of four bits ruin eight."""
    return f"{linear}.{CLIP}.{scheme.type}{scheme.bits}{'' if scheme.symmetric else '_asym'}"


def read_clip(folder: Path, index: int, linear: str, scheme: Scheme) -> Tensor | None:
    """The bounds of the weight of a linear in a block, if they were found for the codes of this scheme."""
    wanted = clip_name(linear, scheme)
    return _load(folds_file(folder, index), lambda name: name == wanted).get(wanted)


def _load(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", _RERUN) from error


_RERUN = "Delete the folder of stage smooth and run again."


def write_rotation(folder: Path, rotation: ModelRotation) -> None:
    with replacing(folder / ROTATION) as temporary:
        temporary.write_text(json.dumps(asdict(rotation), indent=1) + "\n", encoding="utf-8")


def read_rotation(folder: Path) -> ModelRotation:
    """The rotation of a run. Raises ModelError for a file that is missing or says something else."""
    from quantcli.model.rotation import ModelRotation

    try:
        return ModelRotation(**read_json(folder / ROTATION))
    except TypeError as error:
        raise ModelError(f"{folder / ROTATION} describes no rotation: {error}.", _RERUN) from error


def _reader(checkpoint: Checkpoint, names: dict[str, str]) -> Callable[[str], Tensor]:
    return lambda parameter: checkpoint.read([names[parameter]])[names[parameter]]


def changeable_tensors(recipe: Recipe, checkpoint: Checkpoint, structure: Structure) -> dict[str, str]:
    """The checkpoint's name of every parameter that a fold or a rotation may change."""
    from quantcli.model.names import parameter_tensors

    trust = recipe.model.trust_remote_code
    changeable = _changeable(structure)
    return parameter_tensors(checkpoint.directory, structure, checkpoint.entries, changeable, trust_remote_code=trust)


def _changeable(structure: Structure) -> Iterator[str]:
    """The parameters that a fold or a rotation may change: those of linears and norms, and the embeddings. Linears of
    experts, which are no parameters, have the names that checkpoints give them."""
    linears = {linear.name: linear for linear in structure.matrices()}
    own = [f"{name}.weight" for name in linears] + [f"{name}.bias" for name in linears if linears[name].bias]
    norms = [] if structure.final_norm is None else [structure.final_norm.name]
    for block in structure.blocks:
        norms += [norm.name for norm in (block.residual.norms if block.residual else ())]
        norms += [s.producer.name for s in block.groups if s.producer is not None and s.producer.kind == "norm"]
    own += [
        f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias") if f"{norm}.{leaf}" in structure.parameters
    ]
    yield from dict.fromkeys([*own, *structure.embeddings])
