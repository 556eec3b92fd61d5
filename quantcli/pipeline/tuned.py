"""What was tuned beside the codes, as stages behind read it: scales in the store, norms and biases in the checkpoint.

`tuned.safetensors` of stage `distill` holds `X.scale` and `X.input_scale` of linears X, in the dtypes of the store, and
vectors of the model by the names of their tensors in the checkpoint, float32. It is empty where tuning did not help.
Vectors that stage `quantize` tuned with the roundings of a block are in the block's file of the store, likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import ModelError
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store
    from quantcli.model.checkpoint import Checkpoint

FILE = "tuned.safetensors"


def write_tuned(folder: Path, scales: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> str:
    """Write what was tuned; returns the sha256."""
    from quantcli.model.writer import write_tensors

    tensors = {name: tensor.detach().cpu() for name, tensor in {**scales, **vectors}.items()}
    return write_tensors(folder / FILE, tensors, "quantcli-tuned")


def finished_store(recipe: Recipe, run: Path) -> Store:
    """The store of a run as exports hold it."""
    from quantcli.formats.store import Store

    return Store(run / "quantize", None if recipe.quantize.distill is None else run / "distill" / FILE)


def finished_checkpoint(recipe: Recipe, checkpoint: Checkpoint, run: Path) -> Checkpoint:
    """The float checkpoint of a run, smoothed, as exports hold what is not quantized.

    Raises ModelError if a file of what was tuned is missing, damaged or of another model.
    """
    from quantcli.model.folding import TransformedCheckpoint

    vectors = tuned_vectors(recipe, checkpoint, run)
    if recipe.quantize.distill is not None:
        vectors |= _vectors(run / "distill" / FILE, checkpoint)
    if not vectors:
        return checkpoint
    return TransformedCheckpoint(checkpoint, {name: partial(_instead, v) for name, v in vectors.items()})


def tuned_vectors(recipe: Recipe, checkpoint: Checkpoint, run: Path) -> dict[str, Tensor]:
    """The vectors that stage `quantize` tuned, by the names of their tensors in the checkpoint, float32.

    Raises ModelError as `finished_checkpoint`.
    """
    if not recipe.quantize.tunes_vectors:
        return {}
    files = sorted((run / "quantize").glob("block-*.safetensors"))
    return {name: vector for file in files for name, vector in _vectors(file, checkpoint).items()}


def _vectors(file: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    rerun = f"Delete the folder of stage {file.parent.name} and run again."
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name in checkpoint]  # noqa: SIM118
            vectors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", rerun) from error
    for name, vector in vectors.items():
        if tuple(vector.shape) != tuple(checkpoint.entries[name].shape):
            raise ModelError(f"{file}: {name} has shape {tuple(vector.shape)}, not that of the model.", rerun)
    return vectors


def _instead(tuned: Tensor, _stored: Tensor) -> Tensor:
    return tuned.clone()
