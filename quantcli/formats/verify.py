"""Checking an exported checkpoint against the store and the float checkpoint, by other code than wrote it.

Tensors are read with safetensors and unpacked with the format's own library; config.json is read as a stranger would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import VerificationError
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
    folder: Path, store: Store, source: Checkpoint, weights: Mapping[str, str], cast: torch.dtype | None
) -> Verified:
    """Check that the checkpoint holds the store's codes and scales exactly, and the float model's other tensors.

    Every linear of the store is quantized and nothing else is; no scale is zero or not finite; configuration and
    tensors agree. Raises VerificationError with the module and the difference.
    """
    checkpoint = Checkpoint(folder)
    config = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(config, dict):
        raise VerificationError(f"{folder}: config.json has no quantization_config.", "Export again.")
    left = dict(checkpoint.entries)
    by_prefix: dict[str, dict[str, str]] = {}
    for name in left:
        prefix, _, suffix = name.rpartition(".")
        by_prefix.setdefault(prefix, {})[suffix] = name
    with linear_workers() as workers:
        jobs = []
        for module, scheme in store.schemes.items():
            _check_scheme(module, config, scheme)
            parts = by_prefix.get(weights[module].removesuffix(".weight"), {})
            parts.pop("bias", None)
            jobs.append(workers.submit(_check_module, module, checkpoint, parts, store, scheme))
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
        found = checkpoint.read([name])[name]
        if found.dtype != wanted.dtype or not torch.equal(found.view(-1).view(torch.uint8), _bytes(wanted)):
            raise VerificationError(f"{folder}: tensor {name} differs from the float model's.", "Export again.")
        del left[name]
    if left:
        raise VerificationError(f"{folder}: holds {next(iter(left))}, which belongs to nothing.", "Export again.")
    return Verified(len(store.schemes), len(source.entries) - len(quantized), checkpoint.nbytes)


def _check_module(module: str, checkpoint: Checkpoint, parts: Mapping[str, str], store: Store, scheme: Scheme) -> None:
    tensors = checkpoint.read(parts.values())
    _check_linear(module, {suffix: tensors[name] for suffix, name in parts.items()}, store.read(module), scheme)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_linear(module: str, tensors: dict[str, Tensor], expected: StoredLinear, scheme: Scheme) -> None:
    wanted: dict[str, Tensor | None] = {
        "weight_scale": expected.weight.scale,
        "input_scale": expected.input_scale,
        "input_zero_point": expected.input_zero_point,
    }
    codes = tensors.pop("weight", None)
    if "weight_packed" in tensors:
        shape = torch.Size(tensors.pop("weight_shape").tolist())
        codes = _unpack(tensors.pop("weight_packed"), scheme.bits, shape)
        if "weight_zero_point" in tensors:
            packed = tensors.pop("weight_zero_point")
            rows, columns = expected.weight.scale.shape
            found = _unpack(packed.t().contiguous(), scheme.bits, torch.Size([columns, rows])).t()
            _same(module, "zero points", found, expected.weight.zero_point)
    if codes is None or codes.dtype != torch.int8:
        raise VerificationError(f"{module} is not quantized in the checkpoint.", "Export again.")
    _same(module, "codes", codes, expected.weight.codes)
    for name, value in wanted.items():
        found = tensors.pop(name, None)
        _same(module, name, found if found is None or value is None else found.view(value.shape), value)
        if found is not None and name.endswith("scale"):
            _usable(module, name, found)
    if tensors:
        raise VerificationError(f"{module} has {next(iter(tensors))}, which its scheme does not.", "Export again.")


def _unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Signed codes int8 from packed words: by the format's own library, which is slow, but for bytes and half bytes."""
    if bits not in (4, 8):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        return unpack_from_int32(packed, bits, shape).to(torch.int8)
    octets = packed.numpy().view(np.uint8)
    if bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=-1).reshape(len(octets), -1)
    # subtracting the offset modulo 256 gives the two's complement of the signed code
    return torch.from_numpy((octets[:, : shape[1]] - np.uint8(1 << (bits - 1))).view(np.int8))


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


def _check_scheme(module: str, config: dict[str, Any], scheme: Scheme) -> None:
    """config.json, read literally, must give this linear this scheme."""
    if module in config.get("ignore", []):
        raise VerificationError(f"{module} is quantized, but config.json ignores it.", "Export again.")
    for group in _groups(config, module):
        weights, inputs = group["weights"], group.get("input_activations")
        claimed = (
            weights["num_bits"], weights["symmetric"], weights["strategy"], weights.get("group_size"),
            "none" if inputs is None else "dynamic" if inputs.get("dynamic") else "static",
        )  # fmt: skip
        if claimed == (scheme.bits, scheme.symmetric, scheme.granularity, scheme.group_size, scheme.activations):
            return
    raise VerificationError(f"{module}: config.json does not describe its scheme {scheme.name}.", "Export again.")


def _groups(config: dict[str, Any], module: str) -> Iterator[dict[str, Any]]:
    for group in config.get("config_groups", {}).values():
        if "Linear" in group.get("targets", []) or module in group.get("targets", []):
            yield group
