"""What a GPTQ or AWQ export has to hold, found from the store by other code than wrote it: bit by bit, in NumPy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantcli.errors import VerificationError
from quantcli.formats.declared import Declared
from quantcli.formats.store import Store, StoredLinear
from quantcli.model.structure import Structure
from quantcli.quant.scheme import Scheme

if TYPE_CHECKING:
    from quantcli.formats.reader import QuantizedCheckpoint

_CHUNK = 1 << 20
"""Values whose bits, a byte each, are laid out at a time."""


def expected_gptq(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None) -> dict[str, Tensor | None]:
    """The tensors that stand for X.weight, by suffix. Symmetric ones are of v1: their zero points are one less."""
    codes, scale, _ = stored.weight
    middle = 1 << (scheme.bits - 1)
    groups = scale.shape[1]
    words = _packed(_unsigned(codes, middle), scheme.bits)
    zeros = _zeros(stored, middle, middle - 1)
    return {
        "qweight": torch.from_numpy(np.ascontiguousarray(words.T)),
        "qzeros": torch.from_numpy(_packed(np.ascontiguousarray(zeros.T), scheme.bits)),
        "scales": _scales(scale),
        "g_idx": torch.from_numpy(np.repeat(np.arange(groups, dtype=np.int32), codes.shape[1] // groups)),
    }


def expected_awq(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None) -> dict[str, Tensor | None]:
    """The same of AWQ; symmetric weights have zero points of 8."""
    codes, scale, _ = stored.weight
    return {
        "qweight": _nibbles(_unsigned(codes, 8).T),
        "qzeros": _nibbles(_zeros(stored, 8, 8).T),
        "scales": _scales(scale),
    }


def check_gptq(config: Mapping[str, Any], beside: Mapping[str, Any], store: Store) -> None:
    """quantization_config, and the same file beside config.json, say the one scheme and what stays in float."""
    found = config.get("quantization_config")
    if found != beside:
        raise VerificationError("quantize_config.json and config.json differ.", "Export again.")
    scheme = _only(store)
    wanted: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "bits": scheme.bits,
        "group_size": -1 if scheme.granularity == "channel" else scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": any(re.search(r"\.\d+\.", name) is None for name in store.schemes),
    }
    _check_entries(beside, wanted, {"dynamic", "modules_in_block_to_quantize"})
    inside = [name for name in store.schemes if re.search(r"\.\d+\.", name)]
    left = [name for name in store.kept if re.search(r"\.\d+\.", name)]
    rules = [rule for rule in beside.get("dynamic", {}) if rule.startswith("-:")]
    for name in (*inside, *left):
        skipped = any(re.match(rule[2:], name) for rule in rules)
        if skipped != (name in left):
            raise VerificationError(f"{name}: quantization_config.dynamic does not say that it is "
                                    f"{'in float' if name in left else 'quantized'}.", "Export again.")  # fmt: skip
    named = [name for names in beside.get("modules_in_block_to_quantize", []) for name in names]
    if sorted(named) != (sorted(inside) if left else []) or len(rules) != len(beside.get("dynamic", {})):
        raise VerificationError("quantization_config does not name the quantized linears.", "Export again.")


def check_awq(config: Mapping[str, Any], store: Store, in_float: set[str]) -> None:
    """quantization_config says the one scheme, and names what stays in float: `in_float`."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise VerificationError("config.json has no quantization_config.", "Export again.")
    scheme = _only(store)
    wanted: dict[str, Any] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": -1 if scheme.granularity == "channel" else scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": sorted(in_float),
    }
    _check_entries(found, wanted, set())


def check_configuration_alone(
    checkpoint: QuantizedCheckpoint, structure: Structure, weights: Mapping[str, str]
) -> None:
    """Without a store: quantization_config leaves in float what is, of linears that other blocks have quantized.

    Which kinds of linears there are to quantize is the tools' own knowledge. Raises VerificationError.
    """
    declared = Declared(checkpoint.directory, checkpoint.config["quantization_config"])
    kinds = {re.sub(r"\d+", "", name) for name in checkpoint.schemes}
    for linear in structure.linears():
        if linear.name in checkpoint.schemes or re.sub(r"\d+", "", linear.name) not in kinds:
            continue
        prefix = weights.get(linear.name, linear.name).removesuffix(".weight")
        if not isinstance(declared.settings(linear.name, prefix), str):
            raise VerificationError(f"{declared.file}: quantization_config does not leave {linear.name} in float, and "
                                    "its tensors are not quantized.", "Name it there, or quantize again.")  # fmt: skip


def _check_entries(found: Mapping[str, Any], wanted: Mapping[str, Any], apart: set[str]) -> None:
    for key in {*wanted, *found} - apart:
        # True is not 1 in JSON
        if (type(found.get(key)), found.get(key)) != (type(wanted.get(key)), wanted.get(key)):
            raise VerificationError(f"quantization_config.{key} is not that of the store.", "Export again.")


def _only(store: Store) -> Scheme:
    schemes = set(store.schemes.values())
    if len(schemes) != 1:
        raise VerificationError(f"The store has {len(schemes)} schemes, and the format holds one.", "Export again.")
    return schemes.pop()


def _unsigned(signed: Tensor, middle: int) -> NDArray[np.uint8]:
    return (signed.numpy().astype(np.int16) + middle).astype(np.uint8)


def _zeros(stored: StoredLinear, middle: int, symmetric: int) -> NDArray[np.uint8]:
    """Zero points as they are stored, [out, groups]."""
    zero_point = stored.weight.zero_point
    if zero_point is None:
        return np.full(tuple(stored.weight.scale.shape), symmetric, dtype=np.uint8)
    return _unsigned(zero_point, middle)


def _scales(scale: Tensor) -> Tensor:
    """float16 [groups, out]: the store's very values."""
    wide = scale.float().numpy()
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), wide):
        raise VerificationError("A scale of the store is no float16 value.", "Quantize for this format again.")
    return torch.from_numpy(np.ascontiguousarray(half.T))


def _nibbles(values: NDArray[np.uint8]) -> Tensor:
    """[rows, n] to int32 [rows, n/8]: of each eight the outputs 0, 2, 4, 6, 1, 3, 5, 7, the first in the low bits."""
    words = np.zeros((len(values), values.shape[1] // 8), dtype=np.uint32)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """[rows, n] to int32 [rows, n·bits/32]: the low bits of each value one after another, lowest first."""
    rows, count = values.shape
    words = np.empty((rows, count * bits // 32), dtype=np.int32)
    step = max(1, _CHUNK // count)
    for start in range(0, rows, step):
        part = values[start : start + step]
        stream = np.unpackbits(part[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(part), -1)
        words[start : start + step] = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return words
