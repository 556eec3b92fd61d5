"""Memory of tensors that come and go, kept by the process in place of being asked of the system each time.

glibc gives the free end of its heap back as soon as it is a few megabytes long, and large blocks at once. A forward
pass frees and asks for the same activations in every layer: clearing their new pages costs a fifth of its time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_MMAPS = 65536  # glibc's own
KEPT_BYTES = 128 << 20
"""Free memory at the end of the heap that stays the process's."""
HEAP_BLOCK_BYTES = 32 << 20
"""The largest block that the heap serves: what glibc itself would go up to."""
SMALL_BLOCK_BYTES = 128 << 10
"""The same before any block was freed."""


@cache
def keep_freed_memory() -> None:
    """Once a process, for the C libraries that can be told."""
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)


@contextmanager
def large_blocks_kept(size: int) -> Iterator[None]:
    """While the body runs, blocks of any size come from the heap, which keeps up to `size` bytes that are free.

    For logits, whose pieces are larger than what the heap serves otherwise: their new pages cost a quarter of the time
    of a head and its scores.
    """
    mallopt, trim = _function("mallopt"), _function("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, size)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _MMAPS)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """While the body runs, each block of more than SMALL_BLOCK_BYTES comes from the system and goes back at once.

    For large blocks that are freed at once between small ones that stay, such as matrices of modules whose parameters
    go to the meta device: in the heap they would leave holes in whose pages, a few more with every block of the model,
    later tensors come to lie.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, SMALL_BLOCK_BYTES)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)


def release_freed_memory() -> None:
    """Give free memory back wherever it lies in the heap, also between blocks that are in use.

    Behind passes whose activations were kept for a while, what is free lies in pieces that the next large matrix does
    not fit into.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc, where that is what the process uses."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
