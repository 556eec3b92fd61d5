"""Memory of tensors that come and go, kept by the process in place of being asked of the system each time.

glibc gives the free end of its heap back as soon as it is a few megabytes long, and large blocks at once. A forward
pass frees and asks for the same activations in every layer: clearing their new pages costs a fifth of its time.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 128 << 20
"""Free memory at the end of the heap that stays the process's."""
HEAP_BLOCK_BYTES = 32 << 20
"""The largest block that the heap serves: what glibc itself would go up to."""


@cache
def keep_freed_memory() -> None:
    """Once a process, for the C libraries that can be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
