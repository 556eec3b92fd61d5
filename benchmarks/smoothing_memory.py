"""Peak memory of stage smooth, beside the bytes of what has to be in memory; models of 4 and of 8 blocks.

    python benchmarks/smoothing_memory.py [--work DIRECTORY] [--layers 4 8] [--methods auto] [--samples 8]

Random Llamas (hidden 2048: a block of 44 M weights) are smoothed for W8A8 with a scale a token, each in a fresh
process: once with the hidden states of all samples in memory, once with `model.cache_memory` too small for them, so
that they lie in a file. The peak is VmHWM, Python and its libraries included: `base` is that of a process that has only
imported them. Block and activations, one generation of them, in bfloat16. Rows go to BENCHMARKS.md by hand.
"""

from __future__ import annotations

import argparse
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from bench import random_llama
from evaluation_memory import IMPORTS, INT8, peak
from random_llama import HIDDEN, shapes

CACHES = {"memory": "1GiB", "a file": "1MiB"}


def recipe(model: Path, method: str, cache: str, output: Path, calibration: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"path": str(model), "sanity_check": "off", "cache_memory": CACHES[cache]},
            "calibration": calibration, "smooth": {"method": method}, "evaluate": None, "output": str(output),
            "quantize": {"weights": INT8, "activations": {"bits": 8, "scope": "token"}}}  # fmt: skip


def main(work: Path, layers: list[int], methods: list[str], calibration: dict[str, Any]) -> None:
    block = 2 * sum(prod(shape) for name, shape in shapes(1).items() if ".layers.0." in name)
    states = 2 * calibration["samples"] * calibration["sequence_length"] * HIDDEN
    parts = {"block": block, "activations": states, "base": peak(IMPORTS)}
    print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items()))
    print("| blocks | method | activations in | peak MB |\n|---|---|---|---:|", flush=True)
    for count in layers:
        model = random_llama(work, count)
        for method in methods:
            for number, cache in enumerate(CACHES):
                content = recipe(model, method, cache, work / f"smooth-{method}-{count}-{number}", calibration)
                found = peak(f"import quantcli\nquantcli.run_stage('smooth', {content!r})")
                print(f"| {count} | `{method}` | {cache} | {found / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder for models and runs; kept.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--methods", nargs="+", default=["auto"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    folder = (arguments.work or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, arguments.layers, arguments.methods,
         {"samples": arguments.samples, "sequence_length": arguments.length})  # fmt: skip
