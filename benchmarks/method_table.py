"""Methods for weights at every number of bits: perplexity, KL, seconds and memory, beside llm-compressor.

python benchmarks/method_table.py MODEL CALIBRATION_TEXT EVALUATION_TEXT [--bits 8 4 3 2] [--samples 16] [--windows 8]
    [--methods NAME …] [--peer-python PEER/bin/python] [--work DIR]

Symmetric, groups of 64, inputs in float; smoothed by `balance` where a method says so. Texts are files, read as
wikitext-2's. Perplexity and KL are those of `quantcli eval-ppl --checkpoint EXPORT --model MODEL`, for exports of both
tools. Seconds are those of each tool's own clock around quantization (of quantcli smooth, calibrate, curvature and
quantize), memory is the most of the process. A line is printed as a run ends; an export that is there is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import measured

HERE = Path(__file__).parent
QUANTCLI = [sys.executable, "-m", "quantcli"]
WITHOUT_DATA = {"minmax": [], "mse": [], "hqq": [], "ssz": []}
METHODS: dict[str, list[str]] = {
    **{name: [f"quantize.weights.method={name}"] for name in WITHOUT_DATA},
    "mse, second moment": ["quantize.weights.method=mse", "quantize.weights.importance=second_moment"],
    "gptq": ["quantize.weights.method=gptq"],
    "gptq, asymmetric": ["quantize.weights.method=gptq", "quantize.gptq.asymmetric=true"],
    "gptq, asymmetric, outputs": [
        "quantize.weights.method=gptq",
        "quantize.gptq.asymmetric=true",
        "quantize.gptq.output_samples=16",
    ],
    "signround": ["quantize.weights.method=signround"],
}
METHODS |= {f"balance, {name}": ["smooth={method: balance}", *METHODS[name]] for name in METHODS if "gptq" in name}


def quantized(arguments: argparse.Namespace, bits: int, method: str, output: Path) -> tuple[float, float]:
    """(seconds, peak GB) of a run that leaves an export in `output`."""
    calibration = "null"
    if method not in WITHOUT_DATA:
        path = arguments.calibration.resolve()
        calibration = f"{{dataset: wikitext2, path: {path}, samples: {arguments.samples}, sequence_length: 512}}"
    changes = [
        f"quantize.weights={{bits: {bits}, granularity: group, group_size: 64, symmetric: true}}",
        f"calibration={calibration}", "evaluate=null", *METHODS[method],
    ]  # fmt: skip
    command = [*QUANTCLI, "run", "w4a16", "--quiet", "--model", arguments.model, "--output", str(output)]
    _, peak = measured([*command, *(part for change in changes for part in ("--set", change))])
    stages = json.loads((output / "run.json").read_text(encoding="utf-8"))["stages"]
    counted = ("smooth", "calibrate", "curvature", "quantize")
    return sum(stages[name]["seconds"] for name in counted if name in stages), peak


def by_peer(arguments: argparse.Namespace, bits: int, output: Path) -> tuple[float, float]:
    """The same of llm-compressor's GPTQ, by its own clock."""
    script = [arguments.peer_python, str(HERE / "peer_gptq.py"), arguments.model, str(arguments.calibration)]
    command = [*script, str(output / "export"), str(bits), "64", "16", str(arguments.samples)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("quantize "))
    words = line.replace(",", "").split()
    return float(words[1]), float(words[4])


def scores(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    text = f"dataset: wikitext2, path: {arguments.evaluation.resolve()}, windows: {arguments.windows}"
    command = [*QUANTCLI, "eval-ppl", "--checkpoint", str(checkpoint), "--model", arguments.model, "--quiet", "--json"]
    command += ["--set", f"evaluate.perplexity={{{text}, sequence_length: 1024}}"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def line(arguments: argparse.Namespace, bits: int, method: str) -> str:
    output = arguments.work / f"{Path(arguments.model).name}-w{bits}-{method.replace(', ', '-').replace(' ', '-')}"
    took = output.with_suffix(".json")
    peer = method == "llm-compressor, GPTQ"
    if not took.exists():
        seconds, peak = by_peer(arguments, bits, output) if peer else quantized(arguments, bits, method, output)
        took.write_text(json.dumps([seconds, peak]), encoding="utf-8")
    seconds, peak = json.loads(took.read_text(encoding="utf-8"))
    found = scores(arguments, output / "export" / ("" if peer else "compressed-tensors"))
    numbers = [f"{found['quantized']['value']:.3f}", f"{found['kl_divergence']:.4f}", f"{seconds:.1f}", f"{peak:.2f}"]
    return f"| {bits} | {method} | {' | '.join(numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--peer-python", default=None, help="Python of an environment with llmcompressor")
    parser.add_argument("--work", type=Path, default=None, help="where exports go; temporary if not set")
    arguments = parser.parse_args()
    methods = [*(["llm-compressor, GPTQ"] if arguments.peer_python else []), *arguments.methods]
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or Path(temporary)
        arguments.work.mkdir(parents=True, exist_ok=True)
        print("| bits | method | perplexity | KL | seconds | GB |\n|---|---|---:|---:|---:|---:|", flush=True)
        for bits in arguments.bits:
            for method in methods:
                try:
                    print(line(arguments, bits, method), flush=True)
                except subprocess.CalledProcessError as error:
                    print(f"| {bits} | {method} | failed: {(error.output or '')[-300:]!r} |", flush=True)


if __name__ == "__main__":
    main()
