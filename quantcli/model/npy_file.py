"""The tensors of a checkpoint in dictionaries of arrays, one .npy file a kind of tensor, and read back as a checkpoint.

NumPy has no bfloat16, so tensors in it are stored as float32; bfloat16.json names them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, TensorEntry, read_json, replacing
from quantcli.model.npy_dictionary import DictionaryWriter, StoredArray, read_places
from quantcli.model.npy_names import FILES, ROUNDED, WEIGHTS, name_of, place_of
from quantcli.model.writer import PlannedTensor

_KINDS = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8",
          "b1": "BOOL"}  # fmt: skip
_PIECE = 1 << 20  # elements that are converted at a time


def write_dictionaries(folder: Path, planned: Sequence[PlannedTensor], produce: Callable[[str], Tensor]) -> list[Path]:
    """Write the planned tensors, each let go before the next is asked for, unless all files are there; the files.

    They appear when all are complete, the one with the weights last. Raises ModelError for a tensor that NumPy has no
    type for.
    """
    places = {tensor.name: place_of(tensor.name) for tensor in planned}
    rounded = [tensor.name for tensor in planned if tensor.dtype == torch.bfloat16]
    names = sorted({file for file, _ in places.values()})
    files = [folder / name for name in (*names, *([ROUNDED] if rounded else []))]
    if all(file.exists() for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        opened: dict[str, IO[bytes]] = {}
        for file in sorted(files, key=lambda file: file.name != WEIGHTS):  # what is opened first appears last
            opened[file.name] = stack.enter_context(stack.enter_context(replacing(file)).open("wb"))
        writers = {name: DictionaryWriter(opened[name]) for name in names}
        for expected in planned:
            tensor = produce(expected.name)
            if (tensor.dtype, tuple(tensor.shape)) != (expected.dtype, expected.shape):
                raise ValueError(f"{expected.name}: {tensor.dtype} {tuple(tensor.shape)} was planned as {expected}")
            tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            name, key = places[expected.name]
            try:
                writers[name].add(key, tensor.detach().cpu().numpy())
            except TypeError as error:
                raise ModelError(f"{expected.name} is {tensor.dtype}, which NumPy has no type for.") from error
        for writer in writers.values():
            writer.close()
        if rounded:
            opened[ROUNDED].write((json.dumps({"bfloat16": rounded}, indent=1) + "\n").encode())
    return files


@dataclass(frozen=True)
class _Entry(TensorEntry):
    """A tensor whose elements take more room in the file than its dtype does."""

    stored_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.stored_bytes


class NpyCheckpoint(Checkpoint):
    """A model directory whose weights are in dictionaries of arrays, under the names of tensors.

    Tensors that bfloat16.json names are read in bfloat16. Raises ModelError for a damaged file, a tensor in a file
    where it does not belong or in two, and a bfloat16.json that does not fit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = [directory / name for name in FILES if (directory / name).is_file()]
        self.places: dict[str, StoredArray] = {}
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            for key, place in read_places(file).items():
                name = name_of(file.name, key)
                if name in self.places or place_of(name) != (file.name, key):
                    raise ModelError(f"{file} holds {key[:100]}, which does not belong there.", "Export it again.")
                self.places[name] = place
                self.entries[name] = _Entry(name, file, place.shape, _KINDS[place.kind], place.nbytes)
        for name in self._names_rounded():
            entry = self.entries.get(name)
            if entry is None or entry.dtype != "F32":
                raise ModelError(f"{directory / ROUNDED} names {name[:100]}, which is no tensor of float32.",
                                 "Export it again.")  # fmt: skip
            self.entries[name] = _Entry(name, entry.file, entry.shape, "BF16", entry.nbytes)

    def _names_rounded(self) -> set[str]:
        path = self.directory / ROUNDED
        names = read_json(path).get("bfloat16") if path.exists() else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{path} has no list of tensors.", "Export it again.")
        return set(names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, as `entries` describes them."""
        found = {}
        for name in names:
            if name not in self.places:
                raise ModelError(f"{self.directory}: tensor {name} is missing.", "Export it again.")
            entry = self.entries[name]
            with entry.file.open("rb") as file:
                if entry.dtype == "BF16":
                    found[name] = _rounded(name, self.places[name], file)
                else:
                    found[name] = torch.from_numpy(self.places[name].read(file))
        return found


def _rounded(name: str, place: StoredArray, file: IO[bytes]) -> Tensor:
    """A tensor of bfloat16 that is stored in float32, of which a part at a time is in memory."""
    flat = torch.empty(prod(place.shape), dtype=torch.bfloat16)
    for piece, target in zip(place.pieces(file, _PIECE), flat.split(_PIECE), strict=False):  # none of nothing
        stored = torch.from_numpy(piece)
        if not torch.equal(stored.view(torch.int32), target.copy_(stored).float().view(torch.int32)):
            raise ModelError(f"{file.name}: {name} holds values that are not bfloat16.", "Export it again.")
    return torch.from_numpy(place.shaped(flat.view(torch.int16).numpy())).view(torch.bfloat16)
