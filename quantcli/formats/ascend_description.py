"""What the description of an AscendV1 checkpoint says, read back: types of linears and of attention, and what else
changes the function of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.quant.scheme import AttentionScheme, Scheme

TYPES = (
    "FLOAT", "W4A16", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8", "W8A8S", "WFP8AFP8_DYNAMIC", "W4A8_DYNAMIC"
)  # fmt: skip
"""Types of linears in ascending order: model_quant_type is the last that occurs."""
SECOND = "weight_scale_second"
"""The scales of groups, whole numbers, of W4A8 in two stages."""

_OF_ATTENTION = ("C8", "FAQuant")
_REMEDY = "Take the description that belongs to these weights, or export it again."
_SCHEMES = {
    "W8A16": Scheme(8),
    "W8A8_DYNAMIC": Scheme(8, activations="dynamic"),
    "W8A8_MIX": Scheme(8, activations="mix"),
    "W8A8": Scheme(8, activations="static"),
    "W8A8S": Scheme(8, activations="static", sparse=True),
    "WFP8AFP8_DYNAMIC": Scheme(8, activations="dynamic", type="float"),
    "W4A8_DYNAMIC": Scheme(4, activations="dynamic"),
}


def described_in(
    file: Path, checkpoint: Checkpoint, weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """Scheme of each quantized linear, and of attention, from the description `file` and the offsets.

    `weights` maps every linear to the checkpoint name of its weight. Raises ModelError for a type that is not read, a
    linear that has none, and what else changes the function of the model and is not read.
    """
    description = read_json(file)
    _refuse_unread(file, description)
    kinds: dict[str, str] = {}
    for module, weight in weights.items():
        kind = description.get(weight)
        if kind not in TYPES:
            raise _unread(file, weight, kind)
        kinds[module] = kind
    attention = attention_of(file, checkpoint, description)
    own = "" if attention is None else "FAQuant" if attention.heads else "C8"
    for name, kind in description.items():
        if "." in name and kind in _OF_ATTENTION and kind != own:
            raise ModelError(f"{file}: {name} has the type {kind}, which no entry says of the model.",
                             "Have kv_cache_type or fa_quant_type in the file.")  # fmt: skip
    schemes, whole = schemes_of(checkpoint, weights, kinds), description.get("model_quant_type")
    quantized = sorted({*kinds.values()} - {"FLOAT"})
    # msModelSlim calls models of some types FLOAT
    if quantized and whole in TYPES and whole not in ("FLOAT", *quantized):
        raise ModelError(f"{file}: model_quant_type is {whole}, and linears are {', '.join(quantized)}.", _REMEDY)
    check_group_size(file, description.get("group_size"), schemes)
    return schemes, attention


def check_group_size(file: Path, said: object, schemes: Mapping[str, Scheme]) -> None:
    """Raise ModelError where `file` says another size of groups than linears have, if it says one."""
    for module, scheme in schemes.items():
        if said is not None and scheme.group_size not in (None, said):
            raise ModelError(f"{file}: group_size is {said!r}, and {module} has groups of {scheme.group_size}.",
                             _REMEDY)  # fmt: skip


def _refuse_unread(file: Path, description: Mapping[str, Any]) -> None:
    """Raise ModelError for types of tensors that are not read, and for what else changes the function: products of
    attention in 8 bits, sums between devices in int8, and rotations of activations while serving."""
    for name, kind in description.items():
        if name.endswith(".quant_type") and kind != "FLOAT":
            raise ModelError(f"{file}: {name} is {kind!r}, and quantcli does not read attention that is quantized so.",
                             "Quantize again without; FAQuant and C8 are read.")  # fmt: skip
        if "." in name and isinstance(kind, str) and kind not in (*TYPES, *_OF_ATTENTION):
            raise _unread(file, name, kind)
    if kind := description.get("reduce_quant_type"):
        raise ModelError(f"{file}: reduce_quant_type is {kind!r}, and quantcli does not read linears that are split "
                         "among devices with quantized sums.", "Quantize again without simulate_tp.")  # fmt: skip
    metadata = description.get("metadata")
    rotations = metadata.get("quarot") if isinstance(metadata, dict) else None
    for key in ("heads_rotation", "kronecker_rotation"):
        found = rotations.get(key) if isinstance(rotations, dict) else None
        if found.get("layers") if isinstance(found, dict) else found:
            raise ModelError(f"{file}: metadata.quarot.{key} names layers whose activations are rotated while serving, "
                             "which quantcli does not read.", "Quantize again without online rotations.")  # fmt: skip


def _unread(file: Path, name: str, kind: object) -> ModelError:
    if kind is None:
        return ModelError(f"{file}: {name} is not described.", "Copy the file that belongs to these weights.")
    return ModelError(f"{file}: {name} has the type {str(kind)[:100]!r}, which quantcli does not read.",
                      f"Types that it reads: {', '.join(TYPES)}.")  # fmt: skip


def schemes_of(checkpoint: Checkpoint, weights: Mapping[str, str], kinds: Mapping[str, str]) -> dict[str, Scheme]:
    """Scheme of each linear that is not FLOAT, from its type and its offsets."""
    quantized = {
        module: _of_shapes(checkpoint, weights[module], kind) for module, kind in kinds.items() if kind != "FLOAT"
    }
    offsets = {
        module: f"{weights[module].removesuffix('.weight')}.{'input' if scheme.observed else 'weight'}_offset"
        for module, scheme in quantized.items()
        if scheme.observed or scheme.activations == "none"
    }
    values = checkpoint.read(offsets.values())
    moved = {module for module, name in offsets.items() if bool(values[name].any())}
    # a zero point may happen to be 0, so that inputs are symmetric only if they are in the whole model
    asymmetric = any(quantized[module].observed for module in moved)
    return {
        module: replace(
            scheme,
            symmetric=scheme.activations != "none" or module not in moved,
            activations_symmetric=not (scheme.observed and asymmetric),
        )
        for module, scheme in quantized.items()
    }


def _of_shapes(checkpoint: Checkpoint, weight: str, kind: str) -> Scheme:
    """The scheme of a type, with the granularity that the shapes of codes and scales tell."""
    prefix = weight.removesuffix(".weight")
    codes = checkpoint.entries.get(weight)
    scale, second = (checkpoint.entries.get(f"{prefix}.{name}") for name in ("weight_scale", SECOND))
    scheme = Scheme(4) if kind == "W4A16" else _SCHEMES[kind]
    if scale is not None and scale.shape == (1,):
        return replace(scheme, granularity="tensor")
    by_group = {"W4A16": scale, "W4A8_DYNAMIC": second}.get(kind)
    if kind == "W4A16" and (codes is None or scale is None or len(scale.shape) != 2):
        raise ModelError(f"{checkpoint.directory}: {weight} has no codes or no weight_scale.", "Export it again.")
    if codes is None or by_group is None or len(by_group.shape) != 2 or (kind == "W4A16" and by_group.shape[1] == 1):
        return scheme
    return replace(scheme, granularity="group", group_size=codes.shape[-1] // max(1, by_group.shape[1]))


def attention_of(file: Path, checkpoint: Checkpoint, description: Mapping[str, Any]) -> AttentionScheme | None:
    """The scheme of attention by what the description says and the offsets of the cache."""
    kind = description.get("fa_quant_type"), description.get("kv_cache_type", description.get("kv_quant_type"))
    if kind == (None, None):
        return None
    if kind == ("FAQuant", None):
        return AttentionScheme(heads=True)
    if kind != (None, "C8"):
        raise ModelError(f"{file}: attention of type {' and '.join(map(str, kind))} is "
                         "not supported.", "Known types: C8, FAQuant.")  # fmt: skip
    offsets = checkpoint.read(name for name in checkpoint.entries if name.endswith(".kv_cache_offset"))
    return AttentionScheme(kv="int8", kv_symmetric=not any(bool(offset.any()) for offset in offsets.values()))
