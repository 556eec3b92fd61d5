"""Every smoothing method under every scheme: perplexity and KL divergence, weights round-to-nearest.

python benchmarks/smoothing_table.py MODEL CALIBRATION_TEXT EVALUATION_TEXT [--samples 16] [--windows 4] [--work DIR]
    [--schemes NAME …] [--methods NAME …]

Texts are files, read as wikitext-2's. A line is printed as a run ends; a run directory with results is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BY_4 = "bits: 4, granularity: group, group_size: 64, symmetric: true, method: minmax"
TOKEN = "scope: token, symmetric: true"
SCHEMES = {
    "W8A8": ("w8a8", ["quantize.rollback=null"]),
    "W8A8 per token": ("w8a8-dynamic", []),
    "W4A16 g64": ("w4a16-awq", ["quantize.weights.group_size=64"]),
    "W4A8 g64 per token": (
        "w8a8-dynamic", [f"quantize.weights={{{BY_4}}}", f"quantize.activations={{bits: 8, {TOKEN}}}"],
    ),
    "W4A4 g64 per token": (
        "w8a8-dynamic",
        [f"quantize.weights={{{BY_4}}}", f"quantize.activations={{bits: 4, {TOKEN}}}"],
    ),
}  # fmt: skip
SMOOTHED = ("smoothquant", "outlier_suppression", "awq", "iterative", "cbq", "flex", "auto")
METHODS = {
    "none": "null",
    **{method: f"{{method: {method}}}" for method in SMOOTHED},
    "rotate": "{method: rotate}",
    **{f"rotation, {method}": f"{{method: {method}, rotation: {{}}}}" for method in SMOOTHED},
}


def run(arguments: argparse.Namespace, scheme: str, method: str) -> dict[str, Any]:
    """What eval-ppl found for the scheme and the method."""
    output = arguments.work / f"{scheme}, {method}".replace(", ", "-").replace(" ", "-")
    results = output / "eval-ppl" / "results.json"
    if not results.exists():
        recipe, changes = SCHEMES[scheme]
        text = "dataset: wikitext2, path: {}, sequence_length: {}"
        calibration = text.format(arguments.calibration.resolve(), 512) + f", samples: {arguments.samples}"
        evaluation = text.format(arguments.evaluation.resolve(), 1024) + f", windows: {arguments.windows}"
        changes = [
            *changes, f"smooth={METHODS[method]}", f"calibration={{{calibration}}}",
            f"evaluate={{perplexity: {{{evaluation}}}, output_error: null, generate: null}}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "quantcli", "run", recipe, "--quiet", "--model", arguments.model]
        command += ["--output", str(output), *(part for change in changes for part in ("--set", change))]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None, help="where run directories go; temporary if not set")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or Path(temporary)
        print("| scheme | smoothing | perplexity | KL |\n|---|---|---|---|")
        for scheme in arguments.schemes:
            for method in arguments.methods:
                try:
                    found = run(arguments, scheme, method)
                except subprocess.CalledProcessError as error:
                    sys.exit(f"{scheme}, {method}: {error.stdout[-2000:]}")
                value, divergence = found["quantized"]["value"], found["kl_divergence"]
                print(f"| {scheme} | {method} | {value:.3f} | {divergence:.4f} |", flush=True)


if __name__ == "__main__":
    main()
