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


HOLES = """
import ctypes, torch
from quantcli.model.heap import keep_freed_memory, large_blocks_apart

class Heap(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap

def free_below_the_top():
    found = mallinfo()
    return found.fordblks - found.keepcost

keep_freed_memory()
small = []
before = free_below_the_top()
with large_blocks_apart():
    for _ in range(32):  # matrices of 4 MiB that go at once, between small objects that stay
        torch.empty(1 << 20)
        small.append([torch.zeros(256) for _ in range(64)])
print(free_below_the_top() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.33"), reason="the C library does not say what is free in its heap"
)
def test_blocks_that_go_at_once_leave_no_holes() -> None:
    found = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 4 << 20  # with holes 128 MiB were free, in whose pages later tensors come to lie


LOGITS = """
import resource, torch
from pathlib import Path
from quantcli.model.heap import keep_freed_memory, large_blocks_kept

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        [torch.ones(12 << 20) for _ in range(2)]  # two tensors of 48 MiB, above what the heap serves otherwise
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

keep_freed_memory()
before = resident()
with large_blocks_kept(256 << 20):
    faults(5)
    print(faults(5))
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_blocks_find_their_pages_until_they_are_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", LOGITS], capture_output=True, text=True, check=True)
    faults, left = map(int, found.stdout.split())
    assert faults < 1000  # new pages for all would be 122,880
    assert left < 40 << 20  # of 96 MiB
