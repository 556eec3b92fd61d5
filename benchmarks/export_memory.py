"""Peak memory of exporting and of verifying each format, each in a process of its own.

python benchmarks/export_memory.py [--work DIRECTORY] [--layers 22]

A random Llama (22 layers: 1.1B) is quantized by min-max, to 4 bits in groups of 64 and to 8 bits a channel. The store
of the first is exported as compressed-tensors, gptq, awq, gguf and dense, that of the second as ascend,
mindie, numpy, compressed-tensors and gguf. The peak is VmHWM of a process that does one thing, Python and its libraries
included. Rows go to BENCHMARKS.md by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = [("w4", "compressed-tensors"), ("w4", "gptq"), ("w4", "awq"), ("w4", "gguf"), ("w4", "dense"),
         ("w8", "ascend"), ("w8", "mindie"), ("w8", "numpy"), ("w8", "compressed-tensors"), ("w8", "gguf")]  # fmt: skip
WEIGHTS: dict[str, dict[str, Any]] = {
    "w4": {"bits": 4, "granularity": "group", "group_size": 64, "method": "minmax"},
    "w8": {"bits": 8, "granularity": "channel", "method": "minmax"},
}


def recipe(work: Path, name: str) -> dict[str, Any]:
    """The recipe whose store all formats of this width share."""
    formats = sorted({form for width, form in CASES if width == name})
    return {"model": {"path": str(work / "model")}, "quantize": {"weights": WEIGHTS[name]},
            "export": {"formats": formats}, "output": str(work / name)}  # fmt: skip


def one(work: Path, name: str, form: str, what: str) -> None:
    """Export or verify one format; prints seconds and the peak in bytes."""
    from quantcli.formats.export import export_checkpoint
    from quantcli.formats.table import FORMATS
    from quantcli.formats.verify import verify_checkpoint
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.structure_cache import find_structure
    from quantcli.pipeline.prompt import check_prompt
    from quantcli.pipeline.stages.export import source_of
    from quantcli.pipeline.tuned import finished_store
    from quantcli.recipe import load_recipe

    started = time.perf_counter()
    loaded, model, folder = load_recipe(recipe(work, name)), work / "model", work / f"{name}-{form}"
    structure, store = find_structure(model), finished_store(loaded, work / name)
    source = source_of(loaded, structure, Checkpoint(model))
    if what == "export":
        linears = {linear.name: linear for linear in structure.matrices()}
        for _ in export_checkpoint(folder, FORMATS[form], store, source, linears):
            pass
    else:
        verify_checkpoint(folder, store, source.checkpoint, source.weights, source.cast, form, source.tied)
        check_prompt(folder, form, store, source, structure)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}))


def main(work: Path, layers: int) -> None:
    if not (work / "model").exists():
        subprocess.run([sys.executable, HERE / "random_llama.py", work / "model", "--layers", str(layers)], check=True)
    for name in WEIGHTS:
        file = work / f"{name}.yaml"
        file.write_text(json.dumps(recipe(work, name)), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "quantcli", "quantize", str(file), "--quiet"], check=True)
    print("| codes | format | GB on disk | export, peak GB | s | verify, peak GB | s |\n|---|---|---|---|---|---|---|")
    for name, form in CASES:
        row = []
        for what in ("export", "verify"):
            command = [sys.executable, __file__, "--work", str(work), "--one", name, form, what]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            row += [f"{found['peak'] / 1e9:.3f}", f"{found['seconds']:.1f}"]
        size = sum(file.stat().st_size for file in (work / f"{name}-{form}").iterdir())
        print("|", " | ".join([name, form, f"{size / 1e9:.2f}", *row]), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder for the model and all outputs; kept.")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--one", nargs=3, metavar=("CODES", "FORMAT", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    place = (arguments.work or Path(tempfile.mkdtemp())).absolute()
    place.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        one(place, *arguments.one)
    else:
        main(place, arguments.layers)
