"""Codes as a dense bit stream in int32 words, the layout of compressed-tensors' pack-quantized format.

A code q of b bits is stored as v = q + 2^(b-1). Along a row the v follow each other from the lowest bit of the first
word on, without gaps: 32 values take b words, and for 3, 5, 6 and 7 bits a value may cross a word's border. What is
left of the last word is zero. (Byte views of words are taken, so the host has to be little-endian.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Widening to int64 takes 8 bytes a code, so that path works on runs of rows.
_WIDE_ELEMENTS = 1 << 20


def packed_columns(columns: int, bits: int) -> int:
    """Words a row takes: ceil(columns * bits / 32)."""
    return -(-columns * bits // 32)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, columns] with values in [-2^(b-1), 2^(b-1)-1] to int32 [rows, ceil(columns * b / 32)].

    Raises ValueError for bits outside 2..8, a tensor that is no int8 matrix, or codes that do not fit.
    """
    _check(codes, torch.int8, bits)
    rows, columns = codes.shape
    offset = 1 << (bits - 1)
    if codes.numel() and bits < 8:
        low, high = int(codes.amin()), int(codes.amax())
        if low < -offset or high >= offset:
            raise ValueError(f"codes from {low} to {high} do not fit {bits} bits")
    words = packed_columns(columns, bits)
    # The padding has the code of v = 0, so that the rest of the last word is zero bits.
    per_chunk = 32 // bits if bits in (2, 4, 8) else 32
    codes = _row_major(pad(codes, (0, -columns % per_chunk), value=-offset) if columns % per_chunk else codes)
    if bits == 8:
        return (codes.view(torch.int32) ^ _repeated(0x80)).view(rows, words)
    if bits in (2, 4):
        stream = codes.view(torch.uint8) + offset
        width = bits
        while width < 8:
            stream = _merge_pairs(stream, width)
            width *= 2
        return stream.view(torch.int32).view(rows, words)
    packed = torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    padded_words = codes.shape[1] // 32 * bits
    for start in range(0, rows, step := _wide_rows(codes.shape[1])):
        # Eight values take exactly b bytes: gather them in one int64 and keep its b low bytes.
        eights = (codes[start : start + step].long() + offset).view(-1, 8)
        stream = (eights << _shifts(bits, codes.device)).sum(1, keepdim=True).view(torch.uint8)[:, :bits]
        stream = stream.reshape(-1).view(torch.int32).view(-1, padded_words)
        packed[start : start + step] = stream[:, :words]
    return packed


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_int32`: int32 [rows, ceil(columns * b / 32)] to int8 [rows, columns].

    Raises ValueError for bits outside 2..8, a tensor that is no int32 matrix, or another number of words a row.
    """
    _check(packed, torch.int32, bits)
    rows, words = packed.shape
    if words != packed_columns(columns, bits):
        raise ValueError(f"{columns} codes of {bits} bits take {packed_columns(columns, bits)} words, got {words}")
    packed = _row_major(packed)
    if bits == 8:
        return (packed ^ _repeated(0x80)).view(torch.int8)[:, :columns].contiguous()
    if bits in (2, 4):
        stream = packed.view(torch.uint8)
        width = 4
        while width >= bits:
            stream = _split_pairs(stream, width)
            width //= 2
        return stream.view(torch.int8).sub_(1 << (bits - 1))[:, :columns].contiguous()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    packed = pad(packed, (0, -words % bits))
    padded_columns = packed.shape[1] // bits * 32
    for start in range(0, rows, step := _wide_rows(padded_columns)):
        eights = pad(packed[start : start + step].view(torch.uint8).reshape(-1, bits), (0, 8 - bits)).view(torch.int64)
        values = (eights >> _shifts(bits, packed.device)) & ((1 << bits) - 1)
        codes[start : start + step] = (values - (1 << (bits - 1))).view(-1, padded_columns)[:, :columns]
    return codes


def _row_major(matrix: Tensor) -> Tensor:
    """The matrix with the strides that a view in another dtype asks for.

    A transposed column counts as contiguous with strides of 1 and 1, and such a view refuses it.
    """
    return matrix.reshape(-1).view(matrix.shape)


def _merge_pairs(stream: Tensor, width: int) -> Tensor:
    """uint8 pairs (a, b) of `width` bits to single bytes a | b << width; a pair is read at once as one int16."""
    pairs = stream.view(torch.int16)
    return (pairs | (pairs >> (8 - width))).to(torch.uint8)


def _split_pairs(stream: Tensor, width: int) -> Tensor:
    """The inverse of `_merge_pairs`: bytes to pairs of bytes of `width` bits each."""
    pairs = stream.to(torch.int16)
    return ((pairs | (pairs << (8 - width))) & (((1 << width) - 1) * 0x0101)).view(torch.uint8)


def _repeated(byte: int) -> int:
    """The byte in all four places of a word, as a signed int32."""
    return int.from_bytes(bytes([byte] * 4), "little", signed=True)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8 * bits, bits, device=device)


def _wide_rows(columns: int) -> int:
    return max(1, _WIDE_ELEMENTS // max(1, columns))


def _check(tensor: Tensor, dtype: torch.dtype, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise ValueError(f"expected a matrix of {dtype}, got {tensor.dtype} of shape {list(tensor.shape)}")
