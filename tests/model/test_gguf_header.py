"""Headers of GGUF files that are not true are refused before other code trusts them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf import random_tensors, write_gguf

from quantcli.errors import ModelError
from quantcli.model import gguf_header
from quantcli.model.gguf import convert_gguf
from quantcli.model.gguf_header import check_header

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    place = tmp_path_factory.mktemp("gguf")
    return write_gguf(place / "tiny.gguf", "llama", random_tensors("llama", tied=True)).read_bytes()


def begin_of_tensors(data: bytes) -> int:
    return data.index(b"token_embd.weight") - 8


def put(data: bytes, place: int, kind: str, value: int) -> bytes:
    return data[:place] + struct.pack(f"<{kind}", value) + data[place + struct.calcsize(f"<{kind}") :]


def of_tensor(name: bytes, field: str, value: int) -> Callable[[bytes], bytes]:
    """Change a field behind the name of a tensor of two dimensions."""
    places = {"dimensions": (0, "I"), "first": (4, "Q"), "second": (12, "Q"), "type": (20, "I"), "offset": (24, "Q")}
    shift, kind = places[field]
    return lambda data: put(data, data.index(name) + len(name) + shift, kind, value)


EMBEDDING, HIDDEN = b"token_embd.weight", b"blk.0.attn_q.weight"
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda d: b"GGML" + d[4:], "begin with GGUF"),
    "tensor count": (lambda d: put(d, 8, "Q", 1 << 63), "more than any model"),
    "one tensor more": (lambda d: put(d, 8, "Q", d[8] + 1), "tensor|longer|ends at|twice"),
    "key count": (lambda d: put(d, 16, "Q", 1 << 40), "more than any model"),
    "key length": (lambda d: put(d, 24, "Q", 1 << 62), "longer than any"),
    "value type": (lambda d: put(d, 32 + d[24], "I", 77), "type 77"),
    "string length": (lambda d: put(d, 36 + d[24], "Q", 1 << 62), "ends at"),
    "key twice": (lambda d: d.replace(b"ggml.eos_token_id", b"ggml.bos_token_id"), "bos_token_id' is there twice"),
    "dimensions": (of_tensor(EMBEDDING, "dimensions", 1 << 31), "dimensions"),
    "shape": (of_tensor(EMBEDDING, "second", 1 << 63), "ends behind"),
    "block": (of_tensor(EMBEDDING, "first", 63), "in blocks of"),
    "type": (of_tensor(EMBEDDING, "type", 999), "type 999"),
    "offset": (of_tensor(HIDDEN, "offset", 1 << 60), "ends behind"),
    "overlap": (of_tensor(HIDDEN, "offset", 0), "overlaps"),
    "name twice": (lambda d: d.replace(b"blk.0.attn_k.weight", HIDDEN), "twice"),
    "tensors cut": (lambda d: d[:-64], "ends behind"),
    "header cut": (lambda d: d[: begin_of_tensors(d) + 40], "ends at"),
    "nothing": (lambda d: b"", "ends at"),
}  # fmt: skip


def test_a_whole_file_is_in_order(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    check_header(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_header_is_named(name: str, whole: bytes, tmp_path: Path) -> None:
    change, match = DAMAGES[name]
    file = tmp_path / "m.gguf"
    file.write_bytes(change(whole))
    with pytest.raises(ModelError, match=f"no complete GGUF file: .*({match})"):
        check_header(file)
    with pytest.raises(ModelError):
        convert_gguf(file, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


def test_an_array_larger_than_any(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    monkeypatch.setattr(gguf_header, "MAXIMUM_ELEMENTS", 100)
    with pytest.raises(ModelError, match="more than any model"):
        check_header(tmp_path / "m.gguf")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_a_mutated_header_is_converted_or_refused(
    whole: bytes, tmp_path: Path, place: float, value: bytes, cut: bool
) -> None:
    file = tmp_path / "m.gguf"
    at = int(place * (begin_of_tensors(whole) + 1500))
    file.write_bytes(whole[:at] + value + (b"" if cut else whole[at + len(value) :]))
    try:
        check_header(file)
        gguf.GGUFReader(file)  # of what is let through nothing may hang or fill the memory
    except (ModelError, ValueError, KeyError, IndexError, OverflowError):
        pass
