"""Dictionaries of arrays in .npy files: what `numpy.save` makes of a dict, and `numpy.load` gives back with .item().

The file is a header of the .npy format (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html) and a
pickle: an object array without axes whose only element is the dict. A pickle is a program, and numpy runs it. Here it
is written operation by operation, so that arrays are written one at a time, and with the names that NumPy 1 and 2 both
know. It is read by walking over its operations: the few of which such dictionaries consist are followed, any other is
refused, and nothing is called. Of arrays the place in the file is noted, their bytes are left where they are.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
ITEM_BYTES = {"f8": 8, "f4": 4, "f2": 2, "i8": 8, "i4": 4, "i2": 2, "i1": 1, "u1": 1, "b1": 1}
"""Kinds of elements, by NumPy's codes, and their sizes."""
MAXIMUM_OPERATION_BYTES = 32 << 20
"""What a pickle may hold beside the bytes of arrays; an array takes about 120."""
_MAXIMUM_TEXT = 4096
_MAXIMUM_STACK = 1 << 16
_MAXIMUM_AXES = 8
_MAXIMUM_MEMO = 4 << 20

_RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_NAMES = {*_RECONSTRUCT, ("numpy", "ndarray"), ("numpy", "dtype")}


class DictionaryWriter:
    """Writes one dictionary into an open file, array by array; `close` makes it whole."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
        header += b" " * (-(len(MAGIC) + 4 + len(header) + 1) % 64) + b"\n"
        file.write(MAGIC + b"\x01\x00" + struct.pack("<H", len(header)) + header)
        file.write(b"\x80\x04" + _BEGIN_ARRAY + _shape(()) + _dtype("O") + b"\x89]}")  # not Fortran's order; [{

    def add(self, key: str, array: NDArray[Any]) -> None:
        """One entry; the array is little-endian and is written in C order."""
        import numpy as np

        data = np.ascontiguousarray(array)
        encoded, count = key.encode(), data.nbytes
        self.file.write(b"X" + struct.pack("<I", len(encoded)) + encoded)
        self.file.write(_BEGIN_ARRAY + _shape(array.shape) + _dtype(data.dtype.str.replace("|", "")) + b"\x89")
        self.file.write(b"B" + struct.pack("<I", count) if count < 1 << 32 else b"\x8e" + struct.pack("<Q", count))
        self.file.write(data.reshape(-1).view(np.uint8).data)
        self.file.write(b"tbs")  # the state as a tuple; the array takes it; the dict takes key and array

    def close(self) -> None:
        self.file.write(b"atb.")  # the list takes the dict; the state; the outer array takes it; the end


# _reconstruct(ndarray, (0,), b"b"), an empty array, and behind a mark the first part of its state, the version 1
_BEGIN_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01"


def _shape(shape: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", size) for size in shape) + b"t"


def _dtype(name: str) -> bytes:
    encoded = name.encode()
    return b"cnumpy\ndtype\nX" + struct.pack("<I", len(encoded)) + encoded + b"\x85R"


@dataclass
class StoredArray:
    """Where the elements of an array lie in a file: `kind` is one of ITEM_BYTES, `order` C or F."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int
    order: str = "C"

    def read(self, file: IO[bytes]) -> NDArray[Any]:
        """The array, from the file opened anew. Raises ModelError if the file has become shorter."""
        import numpy as np

        return self.shaped(next(self.pieces(file, prod(self.shape)), np.empty(0, f"<{self.kind}")))

    def shaped(self, elements: NDArray[Any]) -> NDArray[Any]:
        """The array of all elements, in the order in which they are stored."""
        return elements.reshape(self.shape, order=self.order)  # type: ignore[call-overload]

    def pieces(self, file: IO[bytes], most: int) -> Iterator[NDArray[Any]]:
        """The elements in the order in which they are stored, at most `most` at a time. Raises as `read`."""
        import numpy as np

        file.seek(self.offset)
        for start in range(0, prod(self.shape), max(most, 1)):
            count = min(most, prod(self.shape) - start)
            data = np.fromfile(file, dtype=np.dtype(f"<{self.kind}"), count=count)
            if len(data) != count:
                raise ModelError(f"{file.name} ends inside an array.", "Export it again.")
            yield data


def read_places(path: Path) -> dict[str, StoredArray]:
    """The arrays of a dictionary by their keys; no element is read.

    Raises ModelError for another file, one that holds anything but a dictionary of numbers, a key twice, or an array
    that leaves the file.
    """
    with _damage(path):
        if not path.is_file():
            raise _Damage("it is no regular file")
        with path.open("rb") as file:
            return _Walk(file, os.fstat(file.fileno()).st_size).dictionary()


class _Damage(Exception):
    """What is wrong with a file."""


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (_Damage, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        how = str(error) if isinstance(error, _Damage | OSError) else f"its pickle is damaged ({error!r})"
        raise ModelError(f"{path} is no dictionary of arrays: {how}.", "Export it again.") from error


@dataclass(frozen=True)
class _Raw:
    """Bytes that stay in the file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Name:
    """A module's attribute, which is not imported."""

    parts: tuple[str, str]


@dataclass
class _Type:
    """numpy.dtype(name), and its byte order once it is told."""

    name: str

    def kind(self) -> str:
        order, kind = (self.name[0], self.name[1:]) if self.name[:1] in "<>|=" else ("|", self.name)
        if kind not in ITEM_BYTES or order == ">" or (order == "=" and ITEM_BYTES[kind] > 1):
            raise _Damage(f"it holds elements of type {self.name[:20]!r}")
        return kind


class _Array:
    """An array that is made; `place` or `content` when its state is there."""

    place: StoredArray | None = None
    content: Any = None


_MARK = object()


class _Walk:
    """One pass over the operations of a pickle: a stack of values, a memo, and no calls."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.taken = 0

    def dictionary(self) -> dict[str, StoredArray]:
        self._header()
        while (operation := self._bytes(1)) != b".":
            action = _ACTIONS.get(operation)
            if action is None:
                raise _Damage(f"its pickle does something else (operation {operation!r})")
            action(self)
            if len(self.stack) > _MAXIMUM_STACK:
                raise _Damage("its pickle is nested too deeply")
        if self.file.tell() != self.size:
            raise _Damage("something follows its pickle")
        (outer,) = self.stack
        if not isinstance(outer, _Array) or not isinstance(outer.content, dict):
            raise _Damage("its pickle holds something else")
        return outer.content

    def _header(self) -> None:
        if self._bytes(8) != MAGIC + b"\x01\x00":
            raise _Damage("it is no .npy file of version 1")
        header = self._bytes(self._number("<H")).decode("latin-1").replace(" ", "")
        if header.strip() != "{'descr':'|O','fortran_order':False,'shape':(),}":
            raise _Damage("it is no object without axes")

    def _bytes(self, count: int) -> bytes:
        self.taken += count
        if self.taken > MAXIMUM_OPERATION_BYTES:
            raise _Damage(f"its pickle takes more than {MAXIMUM_OPERATION_BYTES >> 20} MB beside its arrays")
        found = self.file.read(count)
        if len(found) < count:
            raise _Damage("it ends too early")
        return found

    def _number(self, layout: str) -> int:
        (value,) = struct.unpack(layout, self._bytes(struct.calcsize(layout)))
        return int(value)

    def _text(self, layout: str) -> None:
        count = self._number(layout)
        if count > _MAXIMUM_TEXT:
            raise _Damage("its pickle holds a text that is no name")
        self.stack.append(self._bytes(count).decode())

    def _raw(self, layout: str) -> None:
        count = self._number(layout)
        place = self.file.tell()
        if count > self.size - place:
            raise _Damage("it ends inside an array")
        self.file.seek(count, os.SEEK_CUR)
        self.stack.append(_Raw(place, count))

    def _line(self) -> str:
        found = self.file.readline(_MAXIMUM_TEXT)
        self.taken += len(found)
        return found.decode().removesuffix("\n")

    def _global(self) -> None:
        self._named(self._line(), self._line())

    def _stack_global(self) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self._named(module, attribute)

    def _named(self, module: object, attribute: object) -> None:
        if (module, attribute) not in _NAMES:
            raise _Damage(f"its pickle calls {str(module)[:40]}.{str(attribute)[:40]}")
        self.stack.append(_Name((str(module), str(attribute))))

    def _long(self) -> None:
        self.stack.append(int.from_bytes(self._bytes(self._number("B")), "little", signed=True))

    def _tuple(self, count: int) -> None:
        items = self.stack[len(self.stack) - count :] if count else []
        if len(items) < count:
            raise _Damage("its pickle is damaged")
        del self.stack[len(self.stack) - count :]
        self.stack.append(tuple(items))

    def _behind_mark(self) -> list[Any]:
        at = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _reduce(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not isinstance(made, _Name) or not isinstance(arguments, tuple):
            raise _Damage("its pickle calls something else")
        if made.parts in _RECONSTRUCT and arguments[:2] == (_Name(("numpy", "ndarray")), (0,)):
            self.stack.append(_Array())
        elif made.parts == ("numpy", "dtype") and isinstance(arguments[0], str):
            self.stack.append(_Type(arguments[0]))
        else:
            raise _Damage("its pickle makes something else than arrays")

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Type):
            order = state[1]
            if made.name[:1] not in "<>|=" and made.name[:1] != "O":
                made.name = order + made.name
            return
        if not isinstance(made, _Array) or made.place is not None or made.content is not None:
            raise _Damage("its pickle changes something else than a new array")
        _version, shape, kind, fortran, content = state
        if isinstance(content, list):
            if shape != () or len(content) != 1 or not kind.name.lstrip("|").startswith("O"):
                raise _Damage("it holds arrays of objects")
            (made.content,) = content
            return
        if len(shape) > _MAXIMUM_AXES or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise _Damage("an array has a shape that no tensor of a model has")
        nbytes = prod(shape) * ITEM_BYTES[kind.kind()]
        if content.nbytes != nbytes:
            raise _Damage("an array has another size than its shape says")
        made.place = StoredArray(shape, kind.kind(), content.offset, nbytes, "F" if fortran else "C")

    def _set(self, pairs: list[Any]) -> None:
        into = self.stack[-1]
        for key, array in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str) or not isinstance(array, _Array) or array.place is None:
                raise _Damage("it maps something else than names to arrays")
            if key in into:
                raise _Damage(f"the key {key[:100]!r} is there twice")
            into[key] = array.place

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _append(self) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _remember(self, at: int | None = None) -> None:
        if len(self.memo) > _MAXIMUM_MEMO:
            raise _Damage("its pickle remembers too much")
        self.memo[len(self.memo) if at is None else at] = self.stack[-1]


_ACTIONS: dict[bytes, Callable[[_Walk], Any]] = {
    b"\x80": lambda w: w._bytes(1),
    b"\x95": lambda w: w._bytes(8),
    b"c": _Walk._global,
    b"\x93": _Walk._stack_global,
    b"\x8c": lambda w: w._text("B"),
    b"X": lambda w: w._text("<I"),
    b"\x8d": lambda w: w._text("<Q"),
    b"C": lambda w: w._raw("B"),
    b"B": lambda w: w._raw("<I"),
    b"\x8e": lambda w: w._raw("<Q"),
    b"K": lambda w: w.stack.append(w._number("B")),
    b"M": lambda w: w.stack.append(w._number("<H")),
    b"J": lambda w: w.stack.append(w._number("<i")),
    b"\x8a": _Walk._long,
    b"N": lambda w: w.stack.append(None),
    b"\x88": lambda w: w.stack.append(True),
    b"\x89": lambda w: w.stack.append(False),
    b")": lambda w: w._tuple(0),
    b"\x85": lambda w: w._tuple(1),
    b"\x86": lambda w: w._tuple(2),
    b"\x87": lambda w: w._tuple(3),
    b"(": lambda w: w.stack.append(_MARK),
    b"t": lambda w: w.stack.append(tuple(w._behind_mark())),
    b"]": lambda w: w.stack.append([]),
    b"a": _Walk._append,
    b"}": lambda w: w.stack.append({}),
    b"s": _Walk._set_one,
    b"u": lambda w: w._set(w._behind_mark()),
    b"R": _Walk._reduce,
    b"b": _Walk._build,
    b"\x94": lambda w: w._remember(),
    b"q": lambda w: w._remember(w._number("B")),
    b"r": lambda w: w._remember(w._number("<I")),
    b"h": lambda w: w.stack.append(w.memo[w._number("B")]),
    b"j": lambda w: w.stack.append(w.memo[w._number("<I")]),
}
