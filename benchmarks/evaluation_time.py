"""Seconds that the evaluation of an export takes, beside plain transformers scoring the float model on the same tokens.

    python benchmarks/evaluation_time.py MODEL [--text wiki.test.tokens] [--windows 40] [--length 1024]

Transformers: the model is loaded and every window scored alone, the cross entropy in float32. quantcli: the stage
eval-ppl of each recipe, from its record; the stage reference, which runs once for all of them, is a row of its own.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import quantcli
from quantcli.pipeline.samples import windows_of
from quantcli.pipeline.source import load_tokenizer
from quantcli.recipe import load_recipe


@torch.inference_mode()
def plain(model: Path, windows: list[list[int]]) -> tuple[float, float]:
    """(perplexity, seconds) of transformers."""
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    total = count = 0.0
    for window in windows:
        ids = torch.tensor([window])
        total += cross_entropy(loaded(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--recipes", nargs="+", default=["w8a16", "w8a8-dynamic"])
    arguments = parser.parse_args()
    text: dict[str, Any] = {"windows": arguments.windows, "sequence_length": arguments.length}
    if arguments.text is not None:
        text |= {"dataset": "text", "path": str(arguments.text.absolute())}
    print("| what | perplexity | seconds | of transformers |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        baseline = 0.0
        for name in arguments.recipes:
            changes = [f"evaluate={{perplexity: {text!r}}}", "export.formats=[compressed-tensors]"]
            output = str(Path(place) / name)
            recipe = load_recipe(name, changes, model=str(arguments.model), output=output)
            assert recipe.evaluate is not None
            assert recipe.evaluate.perplexity is not None
            if not baseline:
                tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
                value, baseline = plain(arguments.model, windows_of(recipe.evaluate.perplexity, tokenizer).windows)
                print(f"| float, transformers | {value:.4f} | {baseline:.1f} | 1.00 |", flush=True)
            result = quantcli.run(name, overrides=changes, model=str(arguments.model), output=output)
            scores, stages = result.perplexity, result.stages
            assert scores is not None
            for what, stage, model in (
                ("float, reference", "reference", "float_model"),
                (name, "eval-ppl", "quantized"),
            ):
                seconds = stages[stage]["seconds"]
                row = f"| {what} | {scores[model]['value']:.4f} | {seconds:.1f} | {seconds / baseline:.2f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
