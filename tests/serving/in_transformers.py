"""Loads checkpoints with transformers and scores windows of tokens. Run by a Python that has GPTQModel:

    python in_transformers.py QUESTIONS.json ANSWERS.json

QUESTIONS: [{"checkpoint": path, "dtype": name, "windows": [[token, …], …], "logits": whether to answer them}, …]
ANSWERS:   [{"missing": [parameter that the checkpoint has nothing for, …], "linears": number of plain Linear modules,
             "nll": [nats of the tokens of each window but the first], "logits": [[[…], …], …]}, …]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


def main(questions: Path, answers: Path) -> None:
    found = [answer(**asked) for asked in json.loads(questions.read_text(encoding="utf-8"))]
    answers.write_text(json.dumps(found), encoding="utf-8")


@torch.no_grad()
def answer(checkpoint: str, dtype: str, windows: list[list[int]], logits: bool) -> dict[str, Any]:
    model, loading = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), device_map="cpu", output_loading_info=True
    )
    found = [model.eval()(torch.tensor([window])).logits[0].float() for window in windows]
    return {
        "missing": sorted(loading["missing_keys"]),
        "linears": sum(type(module) is torch.nn.Linear for module in model.modules()),
        "nll": [
            float(cross_entropy(values[:-1], torch.tensor(window[1:]), reduction="sum"))
            for values, window in zip(found, windows, strict=True)
        ],
        "logits": [values.tolist() for values in found] if logits else [],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
