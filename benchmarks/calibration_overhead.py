"""What observing the inputs of linears adds to the time of plain forward passes. Results go to BENCHMARKS.md by hand.

python benchmarks/calibration_overhead.py MODEL SAMPLES [--length 512] [--blocks 6] [--repeats 5]

SAMPLES samples of built-in text go through the first blocks of the model, in the dtype of its checkpoint. Each block
takes each batch plainly, and with what calibration gathers for static `minmax` (extremes), for static `histogram`
(value counts too) and at most (second moments too), in turn and `repeats` times, so that all meet the same load of the
machine. Wall: median and quartiles of the ratios to the plain pass beside it. CPU: the ratio of
the processor time of all threads, over all passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantcli.calibration.builtin_text import builtin_documents
from quantcli.calibration.statistics import InputStatistics
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Block
from quantcli.model.structure_cache import find_structure

BATCH_TOKENS = 2048
OBSERVED = {  # counts, moments
    "static minmax": (False, False),
    "static histogram": (True, False),
    "all": (True, True),
}


def token_batches(model: Path, samples: int, length: int) -> list[Tensor]:
    """Token ids [samples, length], as many samples a batch as calibration takes."""
    text = "\n\n".join(builtin_documents())[: samples * length * 12]
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text, verbose=False).input_ids)
    return list(ids[: samples * length].view(samples, length).split(max(1, BATCH_TOKENS // length)))


@contextmanager
def observed(module: nn.Module, block: Block, gathered: dict[str, InputStatistics]) -> Iterator[None]:
    handles = []
    for name, into in gathered.items():

        def hook(_module: nn.Module, args: tuple[Any, ...], _into: InputStatistics = into) -> None:
            _into.update(args[0])

        handles.append(module.get_submodule(name.removeprefix(f"{block.name}.")).register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(model: Path, samples: int, length: int, blocks: int, repeats: int) -> None:
    structure = find_structure(model)
    stream = BlockStream(Skeleton(model, structure), token_batches(model, samples, length))
    states = list(stream.start())
    wall: dict[str, list[float]] = {label: [] for label in OBSERVED}
    processor = {label: [0.0, 0.0] for label in OBSERVED}
    for index, block in enumerate(structure.blocks[:blocks]):
        with stream.block(index) as module:
            stream.run(index, 0, states[0])  # the first pass of a block reads its weights
            for _ in range(repeats):
                gathered = {
                    label: {s.name: InputStatistics(s.width, counts=counts, moments=moments) for s in block.inputs}
                    for label, (counts, moments) in OBSERVED.items()
                }
                for batch, hidden in enumerate(states):
                    forward = partial(stream.run, index, batch, hidden)
                    for label, into in gathered.items():
                        plain = timed(forward)
                        with observed(module, block, into):
                            watched = timed(forward)
                        wall[label].append(watched[0] / plain[0])
                        for total, seconds in enumerate((plain[1], watched[1])):
                            processor[label][total] += seconds
            states = [stream.run(index, batch, hidden) for batch, hidden in enumerate(states)]
    print(f"{samples} x {length} tokens, {torch.get_num_threads()} threads")
    print("| observed | wall | quartiles | CPU |\n|---|---|---|---|")
    for label, found in wall.items():
        low, median, high = statistics.quantiles(found)
        print(f"| {label} | {median:.3f} | {low:.3f} to {high:.3f} | {processor[label][1] / processor[label][0]:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    measure(**vars(parser.parse_args()))
