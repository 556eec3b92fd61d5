"""Lazy reading of safetensors checkpoints: one file, or shards behind an index."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, QuantcliError
from quantcli.model.untrusted import MAXIMUM_JSON_BYTES, parse_object, read_regular

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAXIMUM_HEADER_BYTES = 32 << 20
"""A header has about 150 bytes a tensor: this is one of 200 000 tensors."""
DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is. `dtype` is the safetensors name, such as BF16."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Checkpoint:
    """The tensors of a model directory, found by reading headers only.

    Weights are read when asked for and belong to the caller. Files are opened for one call and closed again, so mapped
    pages do not add up in the resident memory. Raises ModelError for a missing or damaged file, for one that is not
    regular, for pickled weights and for an index that names a file outside the directory.

    Links to weights are followed wherever they lead: what is no safetensors file is refused by its header, and nothing
    but tensors is taken from one that is.
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
    """A JSON object from a regular file of bounded size. Raises ModelError with the place."""
    return parse_object(read_regular(path, MAXIMUM_JSON_BYTES), str(path))


def stored_dtype(directory: Path) -> str | None:
    """The data type of the first float tensor of a directory's weights, as configurations call it; None without any."""
    try:
        entries = Checkpoint(directory).entries.values()
    except QuantcliError:
        return None
    return next((FLOATS[entry.dtype] for entry in entries if entry.dtype in FLOATS), None)


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def clear_leftovers(output: Path, hours: float = 0) -> None:
    """Remove the folders .NAME.PROCESS.part that processes left beside `output` which were killed, if nothing was made
    in them for `hours`: in a place that machines share a process may live on another."""
    for folder in output.parent.glob(f".{escape(output.name)}.*.part"):
        number = folder.name.removesuffix(".part").rpartition(".")[2]
        old = time.time() - folder.stat().st_mtime >= 3600 * hours
        if old and number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


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
    others = sorted(file for file in directory.glob("*.safetensors") if not file.is_dir())
    if len(others) == 1:
        return others
    if others:
        raise ModelError(f"{directory} holds {len(others)} safetensors files and no {INDEX_NAME}.",
                         "Add the index that belongs to them.")  # fmt: skip
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickled:
        raise ModelError(f"{directory} holds pickled weights ({pickled[0]}), which can run code when they are read.",
                         "Save the model with save_pretrained, which writes safetensors, and use that "
                         "(docs/troubleshooting.md shows how).")  # fmt: skip
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
    """The tensors of a file in the order of their names, as safetensors lists them. Their bytes have to fill the file
    one behind the other, without gaps and overlaps."""
    try:
        if not file.is_file():
            raise _Damage("it is no regular file")
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END) - 8
            opened.seek(0)
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\xff"))
            if length > size:
                raise _Damage("the header is longer than the file")
            if length > MAXIMUM_HEADER_BYTES:
                raise _Damage(f"the header is larger than {MAXIMUM_HEADER_BYTES >> 20} MB, which no model needs")
            header = parse_object(opened.read(length), "its header")
    except OSError as error:
        raise _damaged(file, str(error)) from error
    except ModelError as error:
        raise _damaged(file, error.message.rstrip(".")) from error
    try:
        return _entries(file, header, size - length)
    except _Damage as error:
        raise _damaged(file, error.message) from error


class _Damage(ModelError):
    """What is wrong with a file of weights."""


def _damaged(file: Path, how: str) -> ModelError:
    return ModelError(f"{file} is truncated or damaged: {how}.", "Download it again.")


def _entries(file: Path, header: dict[str, Any], nbytes: int) -> list[TensorEntry]:
    found = []
    spans = []
    for name, content in header.items():
        if name == "__metadata__":
            if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
                raise _Damage("__metadata__ does not map names to texts")
            continue
        if not isinstance(content, dict) or content.keys() != {"dtype", "shape", "data_offsets"}:
            raise _Damage(f"tensor {_short(name)} is not described by dtype, shape and data_offsets")
        dtype, shape, span = content["dtype"], content["shape"], content["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise _Damage(f"tensor {_short(name)} has the dtype {_short(dtype)}, which is not known")
        if not _sizes(shape) or not _sizes(span) or len(span) != 2:
            raise _Damage(f"tensor {_short(name)} has the shape {_short(shape)} at {_short(span)}")
        entry = TensorEntry(name, file, tuple(shape), dtype)
        if span[1] - span[0] != entry.nbytes:
            raise _Damage(f"tensor {_short(name)} has {span[1] - span[0]} bytes, and its shape {entry.nbytes}")
        found.append(entry)
        spans.append((span[0], span[1], name))
    end = 0
    for begin, behind, name in sorted(spans):
        if begin != end:
            raise _Damage(f"tensor {_short(name)} begins at {begin}, where {end} is due")
        end = behind
    if end != nbytes:
        raise _Damage(f"the tensors have {end} bytes, and the file {nbytes}")
    return sorted(found, key=lambda entry: entry.name)


def _short(value: object) -> str:
    return repr(value)[:200]


def _sizes(values: object) -> bool:
    """Whether a value of a header is a list of few numbers that are not negative. True is no number."""
    return isinstance(values, list) and len(values) < 32 and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_index(directory: Path, entries: dict[str, TensorEntry]) -> None:
    index = _index_file(directory)
    if index is None:
        return
    for name, file in _weight_map(index).items():
        if name not in entries or entries[name].file.name != file:
            raise ModelError(f"{index} says that {name} is in {file}, where it is not.", "Download it again.")
