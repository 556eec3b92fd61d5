"""Threads that work on one linear each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def linear_workers(device: str = "cpu") -> ThreadPoolExecutor:
    """A pool of as many threads as torch would use for one operation, each without threads inside.

    Elementwise work on one matrix after another scales better so: nothing waits at the end of every operation for a
    core that others use. On an accelerator one thread keeps the order of its launches.
    """
    if device != "cpu":
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
