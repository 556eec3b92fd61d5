"""The header of a GGUF file, walked before other code trusts it. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The gguf package takes counts and lengths as they stand: of an array that claims 2^60 elements behind the end of the
file it makes as many Python objects. Here every length is compared with what is left of the file, and what takes memory
in the package (an array element about 500 bytes) is counted.
"""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path
from typing import BinaryIO

from quantcli.errors import ModelError

MAXIMUM_ELEMENTS = 2 << 20
"""Elements of all arrays: tokens, their scores and types and the merges of a large vocabulary are 1.3 million."""
MAXIMUM_ENTRIES = 1 << 18
"""Keys, and tensors."""
MAXIMUM_NAME = 1 << 16
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4


def check_header(path: Path) -> None:
    """Raise ModelError unless the header is whole, of reasonable size and true to the size of the file.

    Keys and tensor names are there once; tensors lie in the file and do not overlap.
    """
    try:
        with path.open("rb") as file:
            _Walk(file).header()
    except (_Damage, OSError) as error:
        raise ModelError(f"{path} is no complete GGUF file: {error}.", "Download it again.") from error


class _Damage(Exception):
    """What is wrong with the header."""


class _Walk:
    """A position in the file that cannot leave it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        self.position = file.seek(0)
        self.elements = 0
        self.order = "<"

    def header(self) -> None:
        if self.take(4) != b"GGUF":
            raise _Damage("it does not begin with GGUF")
        if self.number("I") & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > MAXIMUM_ENTRIES:
            raise _Damage(f"{tensors} tensors and {keys} keys are more than any model has")
        alignment = 32
        seen: set[bytes] = set()
        for _ in range(keys):
            key = self.name(seen)
            begin = self.position
            self.value(self.number("I"))
            if key == b"general.alignment" and self.position - begin == 4 + 4:
                self.move(-4)
                alignment = self.number("I")
        if not 0 < alignment <= 1 << 20:
            raise _Damage(f"the alignment is {alignment}")
        self.tensors(tensors, alignment)

    def tensors(self, count: int, alignment: int) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        spans = []
        seen: set[bytes] = set()
        for _ in range(count):
            name = self.name(seen)
            dimensions = self.number("I")
            if dimensions > _DIMENSIONS:
                raise _Damage(f"tensor {_text(name)} has {dimensions} dimensions")
            shape = [self.number("Q") for _ in range(dimensions)]
            kind, offset = self.number("I"), self.number("Q")
            try:
                block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise _Damage(f"tensor {_text(name)} is of type {kind}, which is not known") from None
            if prod(shape) % block:
                raise _Damage(f"tensor {_text(name)} has {prod(shape)} values in blocks of {block}")
            spans.append((offset, offset + prod(shape) // block * nbytes, name))
        room = self.size - -(-self.position // alignment) * alignment
        end = 0
        for begin, behind, name in sorted(spans):
            if begin < end or behind > room:
                where = "overlaps another" if begin < end else "ends behind the file"
                raise _Damage(f"tensor {_text(name)} {where}")
            end = behind

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.move(self.number("Q"))
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            self.elements += count
            if self.elements > MAXIMUM_ELEMENTS:
                raise _Damage(f"arrays of {self.elements} elements are more than any model has")
            if inner == _STRING:
                for _ in range(count):
                    self.move(self.number("Q"))
            else:
                self.move(count * self.scalar(inner))  # the format has arrays of arrays, and no model
        else:
            self.move(self.scalar(kind))

    def scalar(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise _Damage(f"a value of type {kind} is not known")
        return _SCALARS[kind]

    def name(self, seen: set[bytes]) -> bytes:
        length = self.number("Q")
        if length > MAXIMUM_NAME:
            raise _Damage(f"a name of {length} bytes is longer than any")
        name = self.take(length)
        if name in seen:
            raise _Damage(f"{_text(name)} is there twice")
        seen.add(name)
        return name

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(self.order + kind, self.take(struct.calcsize(f"<{kind}")))
        return int(value)

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise _Damage(f"it ends at {self.size} bytes, where {count} more are due behind {self.position}")
        self.position += count
        return self.file.read(count)

    def move(self, count: int) -> None:
        if not 0 <= self.position + count <= self.size:
            raise _Damage(f"it ends at {self.size} bytes, where {count} more are due behind {self.position}")
        self.position = self.file.seek(self.position + count)


def _text(name: bytes) -> str:
    return repr(name[:100].decode("utf-8", errors="replace"))
