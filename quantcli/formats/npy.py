"""numpy, dictionaries of arrays in .npy files, for old consumers of msModelSlim's (save_type numpy).

Each kind of tensor has a file, a dictionary from the name of a linear to its array:

    quant_weight.npy                    codes int8 as in `formats.ascend`, and weights in float; keys X
    input_scale.npy, input_offset.npy, quant_bias.npy, deq_scale.npy, weight_scale.npy, weight_offset.npy; keys X
    kv_cache_scale.npy, kv_cache_offset.npy, fa_quant_scale.npy, fa_quant_offset.npy; keys are names of tensors
    anti_fp_norm.npy, others.npy        norms; biases and whatever else there is; keys are names of tensors

What the inputs of a linear become, and bits and groups, stand in none of them, but in quantization.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import ascend, ascend_description, common
from quantcli.model import npy_names
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear
    from quantcli.model.writer import PlannedTensor

NAME = "numpy"
STEM = "quant_weight"
FILES = (*npy_names.FILES, npy_names.ROUNDED)
"""All files of weights that there may be."""
WRITES_TIED_HEAD = True
ONE_SCHEME = False
FLOAT16_SCALES = False
RESTRICTED = True

decode = ascend.decode
takes_added_bias = ascend.takes_added_bias
attention_refusal = ascend.attention_refusal
attention_names = ascend.attention_names
attention_tensors = ascend.attention_tensors

RECORD = "quantization.json"


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if scheme.type == "float":
        return "is of arrays, and NumPy has no fp8"
    if scheme.bits == 4 and scheme.activations != "none":
        return "has no dictionary for scale_bias, as it was never written with W4A8"
    return ascend.refusal(linear, scheme)


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As `ascend.layout`, with float32 for the scales that are bfloat16 there."""
    tensors = ascend.layout(linear, scheme, dtype)
    return {suffix: (_in_numpy(kind), shape) for suffix, (kind, shape) in tensors.items()}


def reading(
    config: Mapping[str, Any], has: Callable[[str], bool]
) -> tuple[Callable[..., dict[str, tuple[str, tuple[int, ...]]]], Callable[..., StoredLinear]]:
    """`layout` and `decode` for a linear as msModelSlim may have written it, too: one scale a tensor as [1]."""

    def found(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = ascend.layout_of_others(linear, scheme, dtype)
        return {suffix: (_in_numpy(kind), shape) for suffix, (kind, shape) in tensors.items()}

    return found, decode


def _in_numpy(dtype: str) -> str:
    return "float32" if dtype == "bfloat16" else dtype


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout`: those of `ascend.encode`, but for scales of weights alone in a bfloat16 model, which are
    float32 here and so need not be bfloat16 values."""
    own = _in_numpy(dtype) if scheme.activations == "none" else dtype
    return ascend.encode(stored, scheme, own, bias, linear)


def write_weights(
    folder: Path,
    planned: Sequence[PlannedTensor],
    produce: Callable[[str], Tensor],
    schemes: Mapping[str, Scheme],
    origin: Path,
    config: Mapping[str, Any],
) -> list[Path]:
    """Write the dictionaries, unless they are there, and return them."""
    from quantcli.model.npy_file import write_dictionaries

    return write_dictionaries(folder, planned, produce)


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """quantization.json with the schemes, and config.json of the float model."""
    record = {"format": NAME, **common.recorded_schemes(store)}
    return {RECORD: record, "config.json": ascend.without_quantization(config)}


def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a directory holds a checkpoint of this format."""
    return (directory / npy_names.WEIGHTS).is_file() and not any(directory.glob("*.safetensors"))


def _by_channel(scheme: Scheme) -> Scheme:
    """One scale a tensor is written as one a channel, and is read so."""
    return replace(scheme, granularity="channel") if scheme.granularity == "tensor" else scheme


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """What quantization.json says, or without one, which dictionaries have each linear.

    Raises ModelError where several schemes have the same dictionaries, where quantization.json is not understood, and
    where weights are codes and it does not name them, or the other way round.
    """
    path = checkpoint.directory / RECORD
    if not os.path.lexists(path):  # anything else of that name is refused below
        kinds = {module: _inferred(checkpoint, module, weight) for module, weight in weights.items()}
        types: dict[str, str] = {}
        if any(name.endswith(".kv_cache_scale") for name in checkpoint.entries):
            types["kv_cache_type"] = "C8"
        if any(name.endswith(".fa_q.scale") for name in checkpoint.entries):
            types["fa_quant_type"] = "FAQuant"
        inferred = ascend_description.attention_of(checkpoint.directory, checkpoint, types)
        return ascend_description.schemes_of(checkpoint, weights, kinds), inferred
    said = read_json(path)
    linears, attention = said.get("linears"), said.get("attention")
    try:
        assert isinstance(linears, dict)
        schemes = {name: _by_channel(Scheme.from_json(entry)) for name, entry in linears.items()}
        heads = None if attention is None else AttentionScheme.from_json(attention)
    except (TypeError, AssertionError) as error:
        raise ModelError(f"{path} is not understood: {error}.", "Export it again.") from error
    for name, weight in weights.items():
        entry = checkpoint.entries.get(weight)
        if (entry is not None and entry.dtype == "I8") != (name in schemes):
            raise ModelError(f"{path} and {npy_names.WEIGHTS} disagree about {name}.", "Export it again.")
    if unknown := [name for name in schemes if name not in weights]:
        raise ModelError(f"{path}: {unknown[0]} is no linear of this model.", "Export it again.")
    return schemes, heads


def _inferred(checkpoint: Checkpoint, module: str, weight: str) -> str:
    """The type of a linear by the dictionaries that it is in.

    deq_scale is only of static inputs; scales of groups, and no scale of inputs, only of W4A16; offsets of weights
    beside a scale a channel only of W8A16. Otherwise W8A16, W4A16 and W8A8_DYNAMIC look alike.
    """
    directory, prefix = checkpoint.directory, weight.removesuffix(".weight")
    entry, scale = checkpoint.entries.get(weight), checkpoint.entries.get(f"{prefix}.weight_scale")
    static = f"{prefix}.deq_scale" in checkpoint.entries
    if entry is None or entry.dtype != "I8":
        if static or scale is not None:  # v0 of msModelSlim gives a bias the key of the weight
            raise ModelError(f"{directory}: {npy_names.WEIGHTS} holds no codes of {module}, but it has scales.",
                             "Save it with another save_type; a bias has taken their place.")  # fmt: skip
        return "FLOAT"
    if scale is None:
        raise ModelError(f"{directory}: {module} has no weight_scale.", "Save it with save_type ascendV1.")
    if static:
        return "W8A8"
    if len(scale.shape) == 2 and scale.shape[1] > 1:
        return "W4A16"
    offset = f"{prefix}.weight_offset"
    if offset in checkpoint.entries and bool(checkpoint.read([offset])[offset].any()):
        return "W8A16"
    raise ModelError(f"{directory} has no {RECORD}, and dictionaries do not say what inputs of {module} become.",
                     "Write one as docs/formats.md has it, and have config.json beside it.")  # fmt: skip
