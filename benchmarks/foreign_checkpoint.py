"""Checkpoints of other tools, scored by transformers and by `quantcli eval-ppl --checkpoint` on the same tokens.

    python benchmarks/foreign_checkpoint.py CHECKPOINT… --text wiki.test.tokens [--windows 40] [--length 1024]

Both in the checkpoint's own dtype, and both in float32, by quantcli with the arithmetic of engines and with that of
transformers. Results go to BENCHMARKS.md by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import torch
from bench import scored
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def by_transformers(checkpoint: Path, text: str, windows: int, length: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    tokens = AutoTokenizer.from_pretrained(checkpoint)(text).input_ids
    lost = 0.0
    for index in range(windows):
        window = torch.tensor([tokens[index * length : (index + 1) * length]])
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        lost += float(cross_entropy(logits, window[0, 1:], reduction="sum"))
    return math.exp(lost / (windows * (length - 1)))


def by_quantcli(checkpoint: Path, text: Path, windows: int, length: int, arithmetic: str) -> float:
    section: dict[str, object] = {"dataset": "text", "path": str(text.absolute()), "arithmetic": arithmetic}
    return scored(checkpoint, section | {"sequence_length": length, "windows": windows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=1024)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    print("| checkpoint | dtype | transformers | quantcli, as engines | | as transformers | |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for checkpoint in arguments.checkpoints:
            for dtype in (None, "float32"):
                source = checkpoint
                if dtype is not None:
                    source = Path(place) / checkpoint.name
                    shutil.copytree(checkpoint, source)
                    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
                    key = "dtype" if "dtype" in config else "torch_dtype"
                    (source / "config.json").write_text(json.dumps(config | {key: dtype}), encoding="utf-8")
                theirs = by_transformers(source, text, arguments.windows, arguments.length)
                cells = [checkpoint.name, dtype or "its own", f"{theirs:.4f}"]
                for arithmetic in ("engine", "transformers"):
                    ours = by_quantcli(source, arguments.text, arguments.windows, arguments.length, arithmetic)
                    cells += [f"{ours:.4f}", f"{ours / theirs - 1:+.3%}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
