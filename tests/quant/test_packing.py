from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.quant.packing import pack_int32, packed_columns, unpack_int32

BITS = range(2, 9)


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


def slow_row(codes: list[int], bits: int) -> list[int]:
    """The row as one Python integer, cut into words."""
    stream = sum((code + (1 << (bits - 1))) << (bits * i) for i, code in enumerate(codes))
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 140), st.integers(0, 1000))
@settings(deadline=None, max_examples=200)
def test_packed_row_is_one_long_integer(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == [
        slow_row(row, bits) for row in codes.tolist()
    ]
    assert torch.equal(unpack_int32(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_compressed_tensors_library(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for columns in (1, 3, 7, 31, 32, 33, 64, 100, 576):
        codes = random_codes(5, columns, bits, columns)
        packed = pack_int32(codes, bits)
        assert torch.equal(packed, helpers.pack_to_int32(codes, bits))
        assert torch.equal(helpers.unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
def test_views_of_other_tensors_are_packed_by_value(bits: int) -> None:
    """Zero points are packed along the output dimension, which callers do by a transpose."""
    codes = random_codes(64, 24, bits, 0)
    transposed = pack_int32(codes.t(), bits)
    assert torch.equal(transposed, pack_int32(codes.t().contiguous(), bits))
    column = pack_int32(codes[:, :1].contiguous().t(), bits)  # contiguous to torch, with strides of 1 and 1
    assert torch.equal(column, pack_int32(codes[:, 0].clone()[None], bits))
    assert torch.equal(unpack_int32(column.t().contiguous().t(), bits, 64), codes[:, :1].t())
    wide = pack_int32(random_codes(10, 64, bits, 1), bits)
    assert torch.equal(unpack_int32(wide[::2], bits, 64), unpack_int32(wide, bits, 64)[::2])


@pytest.mark.parametrize("bits", [3, 7])
def test_row_runs_join_without_a_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(11, 50, bits, 2)
    packed = pack_int32(codes, bits)
    monkeypatch.setattr("quantcli.quant.packing._WIDE_ELEMENTS", 150)
    assert torch.equal(pack_int32(codes, bits), packed)
    assert torch.equal(unpack_int32(packed, bits, 50), codes)


def test_refusals() -> None:
    codes = random_codes(2, 8, 4, 0)
    with pytest.raises(ValueError, match="do not fit 3 bits"):
        pack_int32(torch.tensor([[4]], dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="bits must be"):
        pack_int32(codes, 9)
    with pytest.raises(ValueError, match="matrix"):
        pack_int32(codes.float(), 4)
    with pytest.raises(ValueError, match="take 1 words, got 2"):
        unpack_int32(torch.zeros(1, 2, dtype=torch.int32), 4, 8)
