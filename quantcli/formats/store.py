"""The neutral store: codes and scales of every quantized linear, one safetensors file a decoder block.

The quantize stage writes it, exporters read it, and nothing in it depends on how the codes were found. The tensors
of a linear X:

    X.codes              int8 [out, in]     codes q in the signed domain of their bits; fp8: float8_e4m3fn
    X.scale              [out, groups], [out, 1] or [1, 1], in the dtype that the checkpoint will hold
    X.zero_point         int8, shape of the scale; asymmetric weights only
    X.input_scale        float32 [1]; static activations only
    X.input_zero_point   int8 [1]; static asymmetric activations only

and of an attention module A whose cache or products are quantized, all float32:

    A.k_scale, A.v_scale      [kv_heads * head_size] (int8) or [1] (fp8)
    A.k_offset, A.v_offset    the same shape; asymmetric int8 only
    A.fa_q_scale, A.fa_k_scale, A.fa_v_scale   [heads, 1] or [kv_heads, 1]; int8 products a head

and norms and biases that were tuned with the codes, float32, by the names of their tensors in the float checkpoint.

manifest.json names the scheme of each quantized linear and the reason of each that stays in float. What belongs to no
block, the output head, is in a file behind the last block's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.checkpoint import read_json, replacing
from quantcli.model.writer import write_tensors
from quantcli.quant.grid import QuantizedWeight
from quantcli.quant.scheme import AttentionScheme, Scheme

MANIFEST = "manifest.json"
ATTENTION_PARTS = ("k_scale", "k_offset", "v_scale", "v_offset", "fa_q_scale", "fa_k_scale", "fa_v_scale")


@dataclass(frozen=True)
class StoredLinear:
    """What a checkpoint holds of a quantized linear. Input scale float32 [1], input zero point int8 [1]."""

    weight: QuantizedWeight
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    def to(self, device: torch.device | str) -> StoredLinear:
        """The same on a device."""
        inputs = (None if part is None else part.to(device) for part in (self.input_scale, self.input_zero_point))
        return StoredLinear(self.weight.to(device), *inputs)

    def tensors(self) -> dict[str, Tensor]:
        parts = {
            "codes": self.weight.codes,
            "scale": self.weight.scale,
            "zero_point": self.weight.zero_point,
            "input_scale": self.input_scale,
            "input_zero_point": self.input_zero_point,
        }
        return {name: tensor for name, tensor in parts.items() if tensor is not None}


def held_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in the dtype of a format, its very values. Raises ModelError if one is not among those of the dtype."""
    held = scale.to(dtype)
    if not bool((held.float() == scale.float()).all()):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"A scale of its codes is no {name} value, and this format stores {name}.",
                         "Quantize with this format in export.formats.")  # fmt: skip
    return held


def block_file(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"


def write_block(
    folder: Path,
    index: int,
    linears: Mapping[str, StoredLinear],
    attention: Mapping[str, Mapping[str, Tensor]] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> str:
    """Write the linears of one block, by attention module the tensors of ATTENTION_PARTS, and tuned `vectors` by the
    names of their tensors in the checkpoint; returns the sha256."""
    tensors = {f"{name}.{part}": t for name, stored in linears.items() for part, t in stored.tensors().items()}
    tensors |= {f"{name}.{part}": t for name, parts in (attention or {}).items() for part, t in parts.items()}
    tensors |= vectors or {}
    return write_tensors(block_file(folder, index), tensors, "quantcli-store")


def write_manifest(
    folder: Path,
    dtype: str,
    schemes: Mapping[str, tuple[int, Scheme]],
    kept: Mapping[str, str],
    attention: AttentionScheme | None = None,
    attention_modules: Mapping[str, int] | None = None,
) -> None:
    """`schemes` maps a linear to (block, scheme), `kept` a float linear to the reason; `dtype` is the model's.

    `attention_modules` maps each attention module that `attention` is about to its block.
    """
    content = {
        "version": 1,
        "dtype": dtype,
        "quantized": {name: {"block": block, **scheme.to_json()} for name, (block, scheme) in schemes.items()},
        "float": dict(kept),
        "attention": None if attention is None else attention.to_json() | {"modules": dict(attention_modules or {})},
    }
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class Store:
    """A finished store, read linear by linear. Of `tuned`, a safetensors file, scales take the place of stored ones."""

    def __init__(self, folder: Path, tuned: Path | None = None) -> None:
        content: dict[str, Any] = read_json(folder / MANIFEST)
        self.folder = folder
        self.tuned = tuned
        self.dtype: str = content["dtype"]
        self.kept: dict[str, str] = content["float"]
        self.blocks: dict[str, int] = {}
        self.schemes: dict[str, Scheme] = {}
        for name, entry in content["quantized"].items():
            self.blocks[name] = entry.pop("block")
            self.schemes[name] = Scheme.from_json(entry)
        self.attention: AttentionScheme | None = None
        self.attention_modules: dict[str, int] = {}
        if content.get("attention"):
            entry = dict(content["attention"])
            self.attention_modules = entry.pop("modules")
            self.attention = AttentionScheme.from_json(entry)

    def read(self, name: str) -> StoredLinear:
        """The stored codes and scales of one linear."""
        wanted = ("codes", "scale", "zero_point", "input_scale", "input_zero_point")
        parts = _parts(block_file(self.folder, self.blocks[name]), name, wanted)
        if self.tuned is not None:
            parts |= _parts(self.tuned, name, ("scale", "input_scale"))
        weight = QuantizedWeight(parts["codes"], parts["scale"], parts.get("zero_point"))
        return StoredLinear(weight, parts.get("input_scale"), parts.get("input_zero_point"))

    def read_attention(self, module: str) -> dict[str, Tensor]:
        """The scales of one attention module: those of ATTENTION_PARTS that its scheme has."""
        return _parts(block_file(self.folder, self.attention_modules[module]), module, ATTENTION_PARTS)


def _parts(file: Path, name: str, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            return {p: opened.get_tensor(f"{name}.{p}") for p in wanted if f"{name}.{p}" in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", "Delete it and run again.") from error
