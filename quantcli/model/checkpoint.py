"""Lazy reading of safetensors checkpoints: one file, or shards behind an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# A JSON file of a real model is at most a few MB; this bound keeps a hostile one from filling the memory.
MAXIMUM_JSON_BYTES = 256 << 20
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is. `dtype` is the safetensors name, such as BF16."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES.get(self.dtype, 1)


class Checkpoint:
    """The tensors of a model directory, found by reading headers only.

    Weights are read when asked for and belong to the caller. Files are opened for one call and closed again, so mapped
    pages do not add up in the resident memory. Raises ModelError for a missing or damaged file, for pickled weights and
    for an index that names a file outside the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _weight_files(directory)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for entry in _read_header(file):
                if entry.name in self.entries:
                    raise ModelError(f"{file}: tensor {entry.name} is also in {self.entries[entry.name].file.name}.")
                self.entries[entry.name] = entry
        _check_index(directory, self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, in the dtype and shape that the file holds."""
        from safetensors import SafetensorError, safe_open

        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.entries:
                raise ModelError(f"{self.directory}: tensor {name} is missing.", "Download the checkpoint again.")
            wanted.setdefault(self.entries[name].file, []).append(name)
        tensors = {}
        for file, inside in wanted.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in inside:
                        tensors[name] = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: {error}.", "The file changed while it was read; start again.") from error
        return tensors

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises ModelError with the place."""
    try:
        if path.stat().st_size > MAXIMUM_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAXIMUM_JSON_BYTES >> 20} MB, which no model needs.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the body ends well and disappears when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _index_file(directory: Path) -> Path | None:
    """The index of the shards: of the usual name, or the only one of another."""
    if (directory / INDEX_NAME).is_file():
        return directory / INDEX_NAME
    others = list(directory.glob("*.safetensors.index.json")) if not (directory / SINGLE_NAME).is_file() else []
    return others[0] if len(others) == 1 else None


def _weight_files(directory: Path) -> list[Path]:
    index, single = _index_file(directory), directory / SINGLE_NAME
    if index is not None:
        names = set(_weight_map(index).values())
        files = [_inside(directory, name, index) for name in sorted(names)]
        missing = [file.name for file in files if not os.path.isfile(file)]  # False, too, for an impossible name
        if missing:
            raise ModelError(f"{index} names {missing[0]}, which is not there ({len(missing)} missing).",
                             "Download the checkpoint again.")  # fmt: skip
        return files
    if single.is_file():
        return [single]
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise ModelError(f"{directory} holds {len(others)} safetensors files and no {INDEX_NAME}.",
                         "Add the index that belongs to them.")  # fmt: skip
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickled:
        raise ModelError(f"{directory} holds pickled weights ({pickled[0]}), which can run code when they are read.",
                         "Save the model with save_pretrained, which writes safetensors, and use that.")  # fmt: skip
    raise ModelError(f"{directory} holds no safetensors weights.", f"Expected {SINGLE_NAME} or {INDEX_NAME}.")


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(v, str) for v in mapping.values()):
        raise ModelError(f"{index} has no usable weight_map.", "Download the checkpoint again.")
    return mapping


def _inside(directory: Path, name: str, index: Path) -> Path:
    # The hub's cache links files to a store elsewhere, so links are followed; the name itself may not leave.
    if Path(name).name != name or name in {".", ".."} or not name.endswith(".safetensors"):
        raise ModelError(f"{index} names {name!r}, which is not a safetensors file beside it.",
                         "Do not use this checkpoint.")  # fmt: skip
    return directory / name


def _read_header(file: Path) -> list[TensorEntry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            entries = []
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                view = opened.get_slice(name)
                entries.append(TensorEntry(name, file, tuple(view.get_shape()), view.get_dtype()))
            return entries
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged: {error}.", "Download it again.") from error


def _check_index(directory: Path, entries: dict[str, TensorEntry]) -> None:
    index = _index_file(directory)
    if index is None:
        return
    for name, file in _weight_map(index).items():
        if name not in entries or entries[name].file.name != file:
            raise ModelError(f"{index} says that {name} is in {file}, where it is not.", "Download it again.")
