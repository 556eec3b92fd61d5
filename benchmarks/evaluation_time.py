"""Seconds that the evaluation of an export takes, beside plain transformers scoring the float model on the same tokens.

    python benchmarks/evaluation_time.py MODEL [--text wiki.test.tokens] [--windows 40] [--length 1024] [--recipes …]
        [--arithmetic transformers]

Transformers: the model is loaded and every window scored alone, the cross entropy in float32. quantcli: the stage
eval-ppl of each recipe, from its record; the stage reference, which runs once for all of them, is a row of its own.
Recipes run without smoothing, and with little or no calibration, on which the time of an evaluation does not depend:
w8a8-dynamic searches its smoothing for minutes. Processor seconds, of all threads, tell more than seconds where the
machine is shared.
"""

from __future__ import annotations

import argparse
import math
import resource
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

NOT_TIMED = ["smooth=null", "calibration=null", "model.sanity_check=off", "evaluate.output_error=null",
             "evaluate.generate=null", "export.formats=[compressed-tensors]"]  # fmt: skip

STATIC = ("w8a8", "w8a8-fp8-static")
"""Recipes that calibrate ranges: of two samples, since how good they are takes no time."""


def processor() -> float:
    """Seconds that all threads of this process have computed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class StageTimes:
    """A listener that notes the processor seconds of each stage."""

    def __init__(self) -> None:
        self.begun = 0.0
        self.seconds: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            self.begun = processor()
        elif event["event"] == "finished":
            self.seconds[event["stage"]] = processor() - self.begun


@torch.inference_mode()
def plain(model: Path, windows: list[list[int]]) -> tuple[float, float, float]:
    """(perplexity, seconds, processor seconds) of transformers."""
    from transformers import AutoModelForCausalLM

    started, used = time.perf_counter(), processor()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    total = count = 0.0
    for window in windows:
        ids = torch.tensor([window])
        total += cross_entropy(loaded(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count), time.perf_counter() - started, processor() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--recipes", nargs="+", default=["w8a16", "w8a8-dynamic", "w4a16", "w8a8", "w8a8-fp8"])
    parser.add_argument("--arithmetic", default="engine", help="of linears with quantized inputs")
    arguments = parser.parse_args()
    text: dict[str, Any] = {"windows": arguments.windows, "sequence_length": arguments.length}
    text["arithmetic"] = arguments.arithmetic
    if arguments.text is not None:
        text |= {"dataset": "text", "path": str(arguments.text.absolute())}
    print("| what | perplexity | seconds | of transformers | processor seconds | of transformers |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        wall = cpu = 0.0
        for name in arguments.recipes:
            changes = [f"evaluate={{perplexity: {text!r}}}", *NOT_TIMED]
            if name.startswith("w4a16"):
                changes.append("quantize.weights.importance=none")
            if name in STATIC:
                changes.append("calibration={dataset: builtin, samples: 2, sequence_length: 512}")
            output = str(Path(place) / name)
            recipe = load_recipe(name, changes, model=str(arguments.model), output=output)
            assert recipe.evaluate is not None
            assert recipe.evaluate.perplexity is not None
            if not wall:
                tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
                windows = windows_of(recipe.evaluate.perplexity, tokenizer).windows
                plain(arguments.model, windows[:1])  # what is imported and compiled once is no part of it
                value, wall, cpu = plain(arguments.model, windows)
                print(f"| float, transformers | {value:.4f} | {wall:.1f} | 1.00 | {cpu:.1f} | 1.00 |", flush=True)
            times = StageTimes()
            result = quantcli.run(name, overrides=changes, model=str(arguments.model), output=output, listener=times)
            scores, stages = result.perplexity, result.stages
            assert scores is not None
            for what, stage, model in (
                ("float, reference", "reference", "float_model"),
                (name, "eval-ppl", "quantized"),
            ):
                seconds, used = stages[stage]["seconds"], times.seconds.get(stage)
                if used is None:  # taken over from the recipe before
                    continue
                print(f"| {what} | {scores[model]['value']:.4f} | {seconds:.1f} | {seconds / wall:.2f} | {used:.1f} | "
                      f"{used / cpu:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
