"""Peak memory of exporting and of verifying each format, each in a process of its own.

python benchmarks/export_memory.py [--work DIRECTORY] [--layers 22]

A random Llama (22 layers: 1.1B) is quantized by min-max as STORES has it, and each store exported in its formats. The
peak is VmHWM of a process that does one thing, Python and its libraries included. Rows go to BENCHMARKS.md by hand.
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
_BY_4 = {"bits": 4, "granularity": "group", "group_size": 64, "method": "minmax"}
_W8 = {"bits": 8, "granularity": "channel", "method": "minmax"}
_FLOAT = {"type": "float"}
STORES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "W4A16 g64": ({"weights": _BY_4}, ("compressed-tensors", "gptq", "awq", "gguf", "dense", "ascend")),
    "W8A16": ({"weights": _W8}, ("ascend", "mindie", "numpy", "compressed-tensors", "gguf")),
    "W8A8 static": ({"weights": _W8, "activations": {"bits": 8}}, ("ascend", "mindie", "numpy", "compressed-tensors")),
    "W4A8": (
        {"weights": _W8 | {"bits": 4}, "activations": {"bits": 8, "scope": "token"}},
        ("ascend", "compressed-tensors"),
    ),
    "FP8": (
        {"weights": _W8 | _FLOAT, "activations": {"bits": 8, "scope": "token"} | _FLOAT},
        ("compressed-tensors", "modelopt"),
    ),
}
"""What is quantized how, and the formats that its store is exported in."""


def recipe(work: Path, name: str) -> dict[str, Any]:
    """The recipe whose store all its formats share."""
    section, formats = STORES[name]
    text = {"calibration": {"dataset": "builtin", "samples": 2, "sequence_length": 512}} if "static" in name else {}
    return {"model": {"path": str(work / "model"), "sanity_check": "off"}, **text, "quantize": section,
            "export": {"formats": list(formats)}, "output": str(work / name.replace(" ", "-"))}  # fmt: skip


def place(work: Path, name: str, form: str) -> Path:
    return work / f"{name.replace(' ', '-')}-{form}"


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
    loaded, model, folder = load_recipe(recipe(work, name)), work / "model", place(work, name, form)
    structure, store = find_structure(model), finished_store(loaded, work / name.replace(" ", "-"))
    source = source_of(loaded, structure, Checkpoint(model))
    if what == "export":
        linears = {linear.name: linear for linear in structure.matrices()}
        for _ in export_checkpoint(folder, FORMATS[form], store, source, linears):
            pass
    else:
        split = [linear.name for linear in structure.matrices() if linear.splits_input]
        verify_checkpoint(folder, store, source.checkpoint, source.weights, source.cast, form, source.tied, split)
        check_prompt(folder, form, store, source, structure)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}))


def main(work: Path, layers: int) -> None:
    if not (work / "model").exists():
        subprocess.run([sys.executable, HERE / "random_llama.py", work / "model", "--layers", str(layers)], check=True)
    for name in STORES:
        file = work / f"{name.replace(' ', '-')}.yaml"
        file.write_text(json.dumps(recipe(work, name)), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "quantcli", "quantize", str(file), "--quiet"], check=True)
    print("| codes | format | GB on disk | export, peak GB | s | verify, peak GB | s |\n|---|---|---|---|---|---|---|")
    for name, form in [(name, form) for name, (_, formats) in STORES.items() for form in formats]:
        row = []
        for what in ("export", "verify"):
            command = [sys.executable, __file__, "--work", str(work), "--one", name, form, what]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            row += [f"{found['peak'] / 1e9:.3f}", f"{found['seconds']:.1f}"]
        size = sum(file.stat().st_size for file in place(work, name, form).iterdir())
        print("|", " | ".join([name, form, f"{size / 1e9:.2f}", *row]), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder for the model and all outputs; kept.")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--one", nargs=3, metavar=("CODES", "FORMAT", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = (arguments.work or Path(tempfile.mkdtemp())).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        one(folder, *arguments.one)
    else:
        main(folder, arguments.layers)
