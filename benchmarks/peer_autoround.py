"""AutoRound at other bits and groups than its benchmark's, for a side by side with `quantcli run w4a16-gptq`.

    python -m venv peer && peer/bin/pip install auto-round
    peer/bin/python benchmarks/peer_autoround.py MODEL TEXT OUT ITERATIONS BITS GROUP     (GROUP -1: a scale a channel)

Prints seconds and peak memory, and writes the weights in float for any evaluator. The calibration samples are the first
64 windows of 512 tokens of TEXT, as in quantcli.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, LENGTH = 64, 512


def main(source: str, text: str, out: str, iterations: int, bits: int, group: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = tokenizer(Path(text).read_text(encoding="utf-8")).input_ids
    windows = [torch.tensor([ids[start : start + LENGTH]]) for start in range(0, SAMPLES * LENGTH, LENGTH)]
    started = time.perf_counter()
    AutoRound(
        model, tokenizer, scheme="W4A16", bits=bits, group_size=group, sym=True, iters=iterations, nsamples=SAMPLES,
        seqlen=LENGTH, batch_size=8, dataset=windows, device_map="cpu",
    ).quantize_and_save(out, format="fake")  # fmt: skip
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"quantize {seconds:.1f} s, peak {peak:.2f} GB")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:7]))  # type: ignore[arg-type]
