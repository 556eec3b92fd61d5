"""Freed memory that stays the process's, counted in page faults of a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from quantcli.model.heap import keep_freed_memory

def cycle():  # six tensors of 15 MiB that exist at once, every page of them written
    return [torch.ones(15 << 18) for _ in range(6)]

keep_freed_memory()
for _ in range(10):  # until the heap is as large as it gets
    cycle()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    cycle()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_tensors_that_come_again_find_their_pages() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000  # new pages for all would be 115,200
