"""Peak memory of evaluating an export, beside the bytes of what has to be in memory; models of 4 and of 8 blocks.

    python benchmarks/evaluation_memory.py [--work DIRECTORY] [--layers 4 8] [--windows 4] [--length 1024]

Random Llamas (hidden 2048: a block of 44 M weights) are quantized by min-max, to 8 bits with float and with int8 inputs
and to 4 bits. Then stage `reference`, the float model, and stage `eval-ppl`, the export, run in a fresh process each;
the peak is VmHWM, Python and its libraries included: `base` is that of a process that has only imported them. Block and
head in bfloat16; activations: the hidden states of all windows between two blocks, of which there are two generations,
and of the float model one. Rows go to BENCHMARKS.md by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from bench import random_llama
from random_llama import HIDDEN, VOCABULARY, shapes

INT8 = {"bits": 8, "granularity": "channel", "method": "minmax"}
QUANTIZE: dict[str, dict[str, Any]] = {
    "W8A16": {"weights": INT8},
    "W8A8": {"weights": INT8, "activations": {"bits": 8, "scope": "token"}},
    "W4A16": {"weights": {"bits": 4, "granularity": "group", "group_size": 64, "method": "minmax"}},
}
IMPORTS = "import safetensors.torch, transformers, transformers.models.llama.modeling_llama"
PEAK = """
from pathlib import Path
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024)
"""


def peak(code: str) -> int:
    """Bytes of VmHWM of a fresh process that runs this."""
    command = [sys.executable, "-c", code + PEAK]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def recipe(model: Path, name: str, output: Path, text: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"path": str(model), "sanity_check": "off"}, "quantize": QUANTIZE[name], "output": str(output),
            "evaluate": {"perplexity": text, "generate": None, "output_error": None}}  # fmt: skip


def main(work: Path, layers: list[int], text: dict[str, Any]) -> None:
    block = 2 * sum(prod(shape) for name, shape in shapes(1).items() if ".layers.0." in name)
    states = 2 * text["windows"] * text["sequence_length"] * HIDDEN
    parts = {"block": block, "head": 2 * VOCABULARY * HIDDEN, "activations": states, "base": peak(IMPORTS)}
    print(", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items()))
    print("| blocks | stage | checkpoint GB | peak MB |\n|---|---|---:|---:|", flush=True)
    for count in layers:
        model = random_llama(work, count)
        for name in QUANTIZE:
            content = recipe(model, name, work / f"{name}-{count}", text)
            # one of them runs the float model; the others would take it over
            stages = ["reference", "eval-ppl"] if name == next(iter(QUANTIZE)) else ["eval-ppl"]
            for stage in ["export", "reference", "eval-ppl"]:
                found = peak(f"import quantcli\nquantcli.run_stage({stage!r}, {content!r})")
                if stage in stages:
                    place = model if stage == "reference" else Path(content["output"]) / "export"
                    size = sum(file.stat().st_size for file in place.rglob("*.safetensors"))
                    label = "float, reference" if stage == "reference" else f"{name}, eval-ppl"
                    print(f"| {count} | {label} | {size / 1e9:.2f} | {found / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder for models and runs; kept.")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    folder = (arguments.work or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    main(folder, arguments.layers, {"windows": arguments.windows, "sequence_length": arguments.length})
