"""Hidden states between two decoder blocks, kept in memory while small and in a mapped file when large."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.checkpoint import replacing


class HiddenCache:
    """The hidden states of every batch, one generation a block boundary.

    `get(i)` reads batch i as it enters the current block; `put(i, x)` sets it as it leaves; `commit(k)` makes what was
    put the input of block k and writes it to the folder, so that an interrupted run goes on from there. At most two
    generations exist at a time. Batches are [samples, tokens, width], all of one dtype. A generation of more than
    `limit` bytes lives in a memory-mapped file, of which one batch at a time is resident.
    """

    def __init__(self, folder: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, limit: int = 1 << 30):
        self.folder = folder
        self.shapes = [tuple(shape) for shape in shapes]
        self.dtype = dtype
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in self.shapes]
        self.offsets = [0, *np.cumsum(sizes).tolist()]
        self.mapped = self.offsets[-1] > limit
        self.memory: list[Tensor | None] = [None] * len(self.shapes)
        self.staged = list(self.memory)
        self.position = -1
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, index: int) -> Tensor:
        held = self.memory[index]
        return self._read(self._file(self.position), index) if held is None else held

    def put(self, index: int, value: Tensor) -> None:
        value = value.detach().to("cpu", self.dtype)
        if tuple(value.shape) != self.shapes[index]:
            raise ModelError(f"a decoder block turned hidden states {self.shapes[index]} into {tuple(value.shape)}.",
                             "Its architecture is not supported.")  # fmt: skip
        if not self.mapped:
            self.staged[index] = value
            return
        target = self._staging()
        if not target.exists() or target.stat().st_size != self.offsets[-1]:
            with target.open("wb") as file:
                file.truncate(self.offsets[-1])
        # Written, not mapped: a full disk is then an error and not a signal that kills the process.
        with target.open("r+b") as file:
            file.seek(self.offsets[index])
            file.write(_bytes(value))

    def commit(self, position: int, *, resumable: bool = True) -> None:
        """What was put becomes the input of block `position`, on disk too if a run is to go on from there."""
        if self.mapped:
            self._staging().replace(self._file(position))
        else:
            assert all(value is not None for value in self.staged), "every batch is put before a commit"
            if resumable:
                with replacing(self._file(position)) as temporary, temporary.open("wb") as file:
                    file.writelines(_bytes(value) for value in self.staged if value is not None)
            self.memory, self.staged = self.staged, [None] * len(self.shapes)
        if resumable:
            with replacing(self.folder / "hidden.json") as temporary:
                temporary.write_text(json.dumps(self._description(position)))
        self.position = position
        self._drop_others()

    def _drop_others(self) -> None:
        for other in set(self.folder.glob("hidden-*.bin")) - {self._file(self.position)}:
            other.unlink()

    def resume(self, finished: Sequence[bool] = ()) -> int | None:
        """The block boundary at which an earlier run stopped, or None if nothing usable is there.

        `finished` says of each block whether what the run writes of it is there: behind a block of which it is not,
        the states are of no use, since those that entered that block are gone.
        """
        try:
            content = json.loads((self.folder / "hidden.json").read_text())
            position = int(content["position"])
            usable = content == self._description(position) and self._file(position).stat().st_size == self.offsets[-1]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if not usable or not all(finished[:position]):
            return None
        self.position = position
        self._drop_others()  # a kill may have come before that
        if not self.mapped:
            self.memory = [self._read(self._file(position), i).clone() for i in range(len(self.shapes))]
        return self.position

    def clear(self) -> None:
        """Remove the files of this cache and the folder, if nothing else is in it."""
        for file in [*self.folder.glob("hidden-*.bin"), *self.folder.glob("*.part"), self.folder / "hidden.json"]:
            file.unlink(missing_ok=True)
        self.memory = [None] * len(self.shapes)
        self.staged = [None] * len(self.shapes)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _read(self, file: Path, index: int) -> Tensor:
        start, end = self.offsets[index], self.offsets[index + 1]
        view = np.memmap(file, np.uint8, "c", start, (end - start,))
        return torch.from_numpy(view).view(self.dtype).view(self.shapes[index])

    def _file(self, position: int) -> Path:
        return self.folder / f"hidden-{position:05d}.bin"

    def _staging(self) -> Path:
        return self.folder / "next.part"

    def _description(self, position: int) -> dict[str, object]:
        return {"position": position, "shapes": [list(shape) for shape in self.shapes], "dtype": str(self.dtype)}


def _bytes(value: Tensor) -> memoryview:
    return value.contiguous().view(-1).view(torch.uint8).numpy().data
