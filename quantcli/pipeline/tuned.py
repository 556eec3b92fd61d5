"""What stage `distill` found, as the stages behind it read it: scales in the store, norms and biases in the checkpoint.

`tuned.safetensors` holds `X.scale` and `X.input_scale` of linears X, in the dtypes of the store, and vectors of the
model by the names of their tensors in the checkpoint, float32. It is empty where tuning did not help.
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
_RERUN = "Delete the folder of stage distill and run again."


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

    Raises ModelError if the file of stage `distill` is missing, damaged or of another model.
    """
    from safetensors import SafetensorError, safe_open

    from quantcli.model.folding import TransformedCheckpoint

    if recipe.quantize.distill is None:
        return checkpoint
    file = run / "distill" / FILE
    try:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name in checkpoint]  # noqa: SIM118
            vectors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", _RERUN) from error
    for name, vector in vectors.items():
        if tuple(vector.shape) != tuple(checkpoint.entries[name].shape):
            raise ModelError(f"{file}: {name} has shape {tuple(vector.shape)}, not that of the model.", _RERUN)
    return TransformedCheckpoint(checkpoint, {name: partial(_instead, v) for name, v in vectors.items()})


def _instead(tuned: Tensor, _stored: Tensor) -> Tensor:
    return tuned.clone()
