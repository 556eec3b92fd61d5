"""Time and memory, beside llm-compressor where its environment is named. Results go to BENCHMARKS.md by hand.

python benchmarks/bench.py [startup] [memory] [gptq] [--peer-python PEER/bin/python] [--work DIRECTORY] [--repeats 3]

startup   `quantcli --help` and `quantcli plan` of a 70B configuration without weights, after one warm-up
memory    W8A16 of a random 1.1B Llama (22 layers) and of one with 44 layers: wall time and peak resident memory
gptq      stage quantize of w4a16-gptq, and of it asymmetric, of the 1.1B Llama with 16 x 512 tokens: the same two; when
          asked for by name, since it takes minutes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
QUANTCLI = [sys.executable, "-m", "quantcli"]
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident GB) of a command. Raises CalledProcessError with its output if it fails."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            output.seek(0)
            raise subprocess.CalledProcessError(status, command, output.read().decode())
    return seconds, usage.ru_maxrss * 1024 / 1e9


def scored(checkpoint: Path, section: dict[str, object]) -> float:
    """The perplexity of a checkpoint by `quantcli eval-ppl`, on the text of this section `evaluate.perplexity`."""
    command = [*QUANTCLI, "eval-ppl", "--checkpoint", str(checkpoint), "--json", "--quiet"]
    command += ["--set", f"evaluate.perplexity={json.dumps(section)}"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return float(found["quantized"]["value"])


def report(label: str, runs: list[tuple[float, float]]) -> None:
    seconds = sorted(run[0] for run in runs)
    print(
        f"| {label} | {statistics.median(seconds):.2f} | {seconds[0]:.2f} | {max(r[1] for r in runs):.3f} |", flush=True
    )


def startup(work: Path, repeats: int) -> None:
    model = work / "llama-70b"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(LLAMA_70B))
    for label, command in (
        ("quantcli --help", [*QUANTCLI, "--help"]),
        ("quantcli plan w8a16, 70B", [*QUANTCLI, "plan", "w8a16", "--model", str(model)]),
    ):
        first = measured(command)
        report(f"{label}, first time", [first])
        report(label, [measured(command) for _ in range(repeats)])


def random_llama(work: Path, layers: int) -> Path:
    """A Llama of random weights in `work`; one that is there is taken."""
    model = work / f"llama-{layers}"
    if not model.exists():
        measured([sys.executable, str(HERE / "random_llama.py"), str(model), "--layers", str(layers)])
    return model


def gptq(work: Path, layers: int) -> None:
    model, out = random_llama(work, layers), work / "gptq"
    for label, asymmetric in (("w4a16-gptq", "false"), ("w4a16-gptq, asymmetric", "true")):
        command = [*QUANTCLI, "quantize", "w4a16-gptq", "--model", str(model), "--output", str(out), "--quiet"]
        command += ["--set", "calibration.samples=16", "--set", f"quantize.gptq.asymmetric={asymmetric}"]
        report(f"{label}, {layers} layers", [measured([*command, "--set", "model.sanity_check=off"])])
        shutil.rmtree(out)


def memory(work: Path, repeats: int, peer: str | None) -> None:
    for layers in (22, 44):
        model = random_llama(work, layers)
        contestants = {
            "quantcli run w8a16": [*QUANTCLI, "run", "w8a16", "--model", str(model), "--set", "evaluate=null"]
        }
        contestants["quantcli run w8a16"] += ["--set", "quantize.weights.granularity=channel", "--quiet", "--output"]
        if peer and layers == 22:
            contestants["llm-compressor W8A16"] = [peer, str(HERE / "peer_w8a16.py"), str(model)]
        runs: dict[str, list[tuple[float, float]]] = {label: [] for label in contestants}
        for _ in range(repeats):
            for label, command in contestants.items():  # taking turns, so that both meet the same noise
                out = work / "out"
                runs[label].append(measured([*command, str(out)]))
                shutil.rmtree(out)
        for label, found in runs.items():
            report(f"{label}, {layers} layers", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["startup", "memory"], choices=["startup", "memory", "gptq"])
    parser.add_argument("--peer-python", help="Python of an environment with llmcompressor.")
    parser.add_argument("--work", type=Path, help="Folder for models and outputs; kept.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22, help="Of the model of `gptq`; 22: 1.1B.")
    arguments = parser.parse_args()
    folder = arguments.work or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    print("| what | median s | best s | peak GB |\n|---|---|---|---|", flush=True)
    if "startup" in arguments.what:
        startup(folder, arguments.repeats)
    if "memory" in arguments.what:
        memory(folder, arguments.repeats, arguments.peer_python)
    if "gptq" in arguments.what:
        gptq(folder, arguments.layers)
