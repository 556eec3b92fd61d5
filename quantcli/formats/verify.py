"""Checking an exported checkpoint against the store and the float checkpoint, by other code than wrote it.

Tensors are read with safetensors and unpacked apart from the writer's code; config.json is read as a stranger would.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats.store import Store, StoredLinear
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.workers import linear_workers
from quantcli.quant.scheme import Scheme


@dataclass(frozen=True)
class Verified:
    """What was found in order: counts of quantized linears, of other tensors, and of bytes."""

    linears: int
    other_tensors: int
    nbytes: int


def verify_checkpoint(
    folder: Path,
    store: Store,
    source: Checkpoint,
    weights: Mapping[str, str],
    cast: torch.dtype | None,
) -> Verified:
    """Check that the checkpoint holds the store's codes and scales exactly, and the float model's other tensors.

    Every linear of the store is quantized and nothing else is; no scale is zero or not finite; quantization_config says
    what the tensors are. Files beside the weights are not looked at. Raises VerificationError with the module and the
    difference.
    """
    with _damage():
        checkpoint = Checkpoint(folder)
        config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict):
        raise VerificationError(f"{folder}: config.json has no quantization_config.", "Export again.")
    _check_configuration(config, store, source, weights)
    left = dict(checkpoint.entries)
    by_prefix: dict[str, dict[str, str]] = {}
    for name in left:
        prefix, _, suffix = name.rpartition(".")
        by_prefix.setdefault(prefix, {})[suffix] = name
    with linear_workers() as workers:
        jobs = []
        for module in store.schemes:
            parts = by_prefix.get(weights[module].removesuffix(".weight"), {})
            parts.pop("bias", None)
            jobs.append(workers.submit(_check_module, module, checkpoint, parts, store))
            for name in parts.values():
                del left[name]
        try:
            for job in jobs:
                job.result()
        finally:
            workers.shutdown(cancel_futures=True)
    quantized = {weights[module] for module in store.schemes}
    for name in source.entries:
        if name in quantized:
            continue
        if name not in left:
            raise VerificationError(f"{folder}: tensor {name} of the float model is missing.", "Export again.")
        original = source.read([name])[name]
        wanted = original.to(cast) if cast is not None and original.is_floating_point() else original
        with _damage():
            found = checkpoint.read([name])[name]
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape) or not torch.equal(_bytes(found), _bytes(wanted)):
            raise VerificationError(f"{folder}: tensor {name} differs from the float model's.", "Export again.")
        del left[name]
    if left:
        raise VerificationError(f"{folder}: holds {next(iter(left))}, which belongs to nothing.", "Export again.")
    return Verified(len(store.schemes), len(source.entries) - len(quantized), checkpoint.nbytes)


@contextmanager
def _damage() -> Iterator[None]:
    """What cannot be read of an export is a failed verification, not a bad model of the user's."""
    try:
        yield
    except ModelError as error:
        raise VerificationError(error.message, "Export again.") from error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_module(module: str, checkpoint: Checkpoint, parts: Mapping[str, str], store: Store) -> None:
    with _damage():
        tensors = checkpoint.read(parts.values())
    found = {suffix: tensors[name] for suffix, name in parts.items()}
    _check_linear(module, found, store.read(module), store.schemes[module])


def _check_linear(module: str, tensors: dict[str, Tensor], expected: StoredLinear, scheme: Scheme) -> None:
    codes, scale, zero_point = expected.weight
    whole = scheme.granularity == "tensor"
    wanted = {
        "weight_scale": scale.view(1) if whole else scale,
        "input_scale": expected.input_scale,
        "input_zero_point": expected.input_zero_point,
    }
    if scheme.activations != "none":
        wanted["weight"] = codes
    else:
        wanted |= {"weight_packed": codes, "weight_shape": torch.tensor(codes.shape)}
        _unpack_in_place(module, tensors, "weight_packed", scheme.bits, codes.shape)
        if zero_point is not None:
            wanted["weight_zero_point"] = zero_point.view(1) if whole else zero_point.t()
        if zero_point is not None and not whole:
            packed = tensors.get("weight_zero_point")
            if packed is not None and packed.ndim == 2:
                tensors["weight_zero_point"] = packed.t().contiguous()
            _unpack_in_place(module, tensors, "weight_zero_point", scheme.bits, zero_point.t().shape)
    for name, value in wanted.items():
        found = tensors.pop(name, None)
        _same(module, name, found, value)
        if found is not None and name.endswith("scale"):
            _usable(module, name, found)
    if tensors:
        raise VerificationError(f"{module} has {next(iter(tensors))}, which its scheme does not.", "Export again.")


def _unpack_in_place(module: str, tensors: dict[str, Tensor], name: str, bits: int, shape: torch.Size) -> None:
    """Replace packed words by signed codes int8: by the format's own library where speed allows, which is not for 4
    and 8 bits."""
    packed = tensors.get(name)
    if packed is None:
        return
    if packed.dtype != torch.int32 or packed.shape != (shape[0], -(-shape[1] * bits // 32)):
        raise VerificationError(f"{module}: {name} is {packed.dtype} {tuple(packed.shape)}, not the codes of "
                                f"{tuple(shape)}.", "Export again.")  # fmt: skip
    if bits not in (4, 8):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        tensors[name] = unpack_from_int32(packed, bits, shape).to(torch.int8)
        return
    octets = packed.contiguous().numpy().view(np.uint8)
    if bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=-1).reshape(len(octets), -1)
    # subtracting the offset modulo 256 gives the two's complement of the signed code
    tensors[name] = torch.from_numpy((octets[:, : shape[1]] - np.uint8(1 << (bits - 1))).view(np.int8))


def _same(module: str, what: str, found: Tensor | None, expected: Tensor | None) -> None:
    if (found is None) != (expected is None):
        raise VerificationError(f"{module}: {what} {'missing' if found is None else 'unexpected'}.", "Export again.")
    if found is None or expected is None:
        return
    if found.dtype != expected.dtype or found.shape != expected.shape or not torch.equal(found, expected):
        raise VerificationError(f"{module}: {what} in the checkpoint differ from the store's.", "Export again.")


def _usable(module: str, name: str, scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        raise VerificationError(f"{module}: {name} holds a zero or a value that is not finite.", "Quantize again.")


def _check_configuration(
    config: Mapping[str, Any], store: Store, source: Checkpoint, weights: Mapping[str, str]
) -> None:
    """quantization_config, read literally, must give every linear of the store its scheme, and no other linear one."""
    ignored = config.get("ignore")
    if not isinstance(ignored, list):
        raise VerificationError("config.json: quantization_config.ignore is no list.", "Export again.")
    names = {tensor: module for module, tensor in weights.items()}
    matrices = {n for n, e in source.entries.items() if n.endswith(".weight") and len(e.shape) == 2}
    in_float = {names.get(name, name.removesuffix(".weight")) for name in matrices} - set(store.schemes)
    in_float |= set(store.kept)
    for module in store.schemes:
        if any(_matches(entry, module) for entry in ignored):
            raise VerificationError(f"{module} is quantized, but config.json ignores it.", "Export again.")
    for module in sorted(in_float.symmetric_difference(ignored)):
        how = "is in float, but config.json does not ignore it" if module in in_float else "is ignored without reason"
        raise VerificationError(f"{module} {how}.", "Export again.")
    for module, scheme in store.schemes.items():
        group = next((g for g in _groups(config) if any(_matches(t, module) for t in g.get("targets") or ())), None)
        if group is None or not _describes(config, group, scheme):
            raise VerificationError(
                f"{module}: config.json does not describe its scheme {scheme.name}.", "Export again."
            )


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _matches(entry: object, module: str) -> bool:
    if isinstance(entry, str) and entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return entry in (module, "Linear")


def _describes(config: Mapping[str, Any], group: Mapping[str, Any], scheme: Scheme) -> bool:
    """Whether the group says all of the scheme and nothing else that an engine would act on."""
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": scheme.granularity,
               "group_size": scheme.group_size, "dynamic": False}  # fmt: skip
    inputs = None
    if scheme.activations != "none":
        dynamic = scheme.activations == "dynamic"
        inputs = {"num_bits": 8, "type": "int", "symmetric": scheme.activations_symmetric,
                  "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}  # fmt: skip
    form = "pack-quantized" if inputs is None else "int-quantized"
    said_of_all = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return (
        _said(config, {"config_groups", "ignore"}) == said_of_all
        and _said(group, {"targets", "weights", "input_activations"}) == {"format": form}
        and _said(group.get("weights")) == _said(weights)
        and _said(group.get("input_activations")) == _said(inputs)
    )


def _said(entries: object, apart: Collection[str] = ()) -> object:
    """The entries that mean something: null is the default, and codes of zero points are int8 in any case."""
    if not isinstance(entries, Mapping):
        return entries
    said = {key: value for key, value in entries.items() if value is not None and key not in apart}
    return {key: value for key, value in said.items() if (key, value) != ("zp_dtype", "torch.int8")}
