"""Writing safetensors files tensor by tensor, so that a shard need not fit in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from quantcli.model.checkpoint import DTYPE_BYTES, replacing

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: what it will be, known before it exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[DTYPE_NAMES[self.dtype]]


def write_safetensors(
    path: Path, planned: Sequence[PlannedTensor], produce: Callable[[str], Tensor], metadata: dict[str, str]
) -> str:
    """Write the planned tensors and return the sha256 of the file.

    `produce(name)` is asked for one tensor at a time, in the order of `planned`, and each is let go before the next is
    asked for. The file appears under its name only when complete. Format: https://github.com/huggingface/safetensors#format.
    Raises ValueError if what is produced differs from the plan.
    """
    digest = sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        _put(file, digest.update, _header(planned, metadata))
        for expected in planned:
            tensor = produce(expected.name)
            if PlannedTensor(expected.name, tensor.dtype, tuple(tensor.shape)) != expected:
                raise ValueError(f"{path}: {tensor.dtype} {tuple(tensor.shape)} was planned as {expected}")
            _put(file, digest.update, tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], form: str) -> str:
    """The same for tensors that are there already; `form` names what the file is. Returns the sha256."""
    planned = [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return write_safetensors(path, planned, tensors.__getitem__, {"format": form})


def _put(file: IO[bytes], digest: Callable[[bytes | memoryview], None], data: bytes | memoryview) -> None:
    file.write(data)
    digest(data)


def _header(planned: Sequence[PlannedTensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for tensor in planned:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def split_shards(planned: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Consecutive runs of tensors of at most `limit` bytes each (a tensor above it gets a shard of its own).

    Inside a shard, tensors whose size is no multiple of 8 bytes come last, wide elements first: every tensor then
    starts at a multiple of its element size, which readers that map the file rely on.
    """
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes

    def place(tensor: PlannedTensor) -> tuple[bool, int]:
        odd = tensor.nbytes % 8 != 0
        return odd, -tensor.dtype.itemsize if odd else 0

    return [sorted(shard, key=place) for shard in shards]


def shard_names(count: int, stem: str = "model") -> list[str]:
    """File names as transformers and the serving engines expect them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(directory: Path, shards: Sequence[Sequence[PlannedTensor]], stem: str = "model") -> list[Path]:
    """The index that maps each tensor to its shard, as the files written: none for a single file."""
    if len(shards) == 1:
        return []
    names = shard_names(len(shards), stem)
    content = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard)},
        "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    index = directory / f"{stem}.safetensors.index.json"
    with replacing(index) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [index]
