"""AutoRound at other bits and groups than its benchmark's, for a side by side with `quantcli run w4a16-gptq`.

    python -m venv peer && peer/bin/pip install auto-round
    peer/bin/python benchmarks/peer_autoround.py MODEL TEXT OUT ITERATIONS BITS GROUP [INPUTS EVALUATION_TEXT]

GROUP -1 is a scale a channel; INPUTS are the bits of inputs with a scale a token, 16 (float) if not given.

Prints seconds and peak memory, and writes the weights in float for any evaluator. Inputs are rounded by the layers that
AutoRound leaves in the model, so that with EVALUATION_TEXT that model is scored where it is: the perplexity of the
first 40 windows of 1024 tokens. The calibration samples are the first 64 windows of 512 tokens of TEXT, as in quantcli.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES, LENGTH = 64, 512
WINDOWS, WINDOW = 40, 1024


@torch.inference_mode()
def perplexity(model: nn.Module, ids: list[int]) -> float:
    total, count = 0.0, 0
    for start in range(0, min(WINDOWS, len(ids) // WINDOW) * WINDOW, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        logits = model(window).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += WINDOW - 1
    return math.exp(total / count)


def main(
    source: str, text: str, out: str, iterations: str, bits: str, group: str, inputs: str = "16", evaluated: str = ""
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = tokenizer(Path(text).read_text(encoding="utf-8")).input_ids
    windows = [torch.tensor([ids[start : start + LENGTH]]) for start in range(0, SAMPLES * LENGTH, LENGTH)]
    tokens = {
        "act_bits": int(inputs),
        "act_group_size": -1,
        "act_sym": True,
        "act_data_type": "int",
        "act_dynamic": True,
    }
    started = time.perf_counter()
    quantized, _ = AutoRound(
        model, tokenizer, scheme="W4A16", bits=int(bits), group_size=int(group), sym=True, iters=int(iterations),
        nsamples=SAMPLES, seqlen=LENGTH, batch_size=8, dataset=windows, device_map="cpu",
        **(tokens if int(inputs) < 16 else {}),
    ).quantize_and_save(out, format="fake")  # fmt: skip
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"quantize {seconds:.1f} s, peak {peak:.2f} GB", flush=True)
    if evaluated:
        kinds = {type(module).__name__ for module in quantized.modules()}
        print(f"layers {sorted(kind for kind in kinds if 'Layer' in kind or 'Linear' in kind)}")
        ids = tokenizer(Path(evaluated).read_text(encoding="utf-8")).input_ids
        print(f"perplexity {perplexity(quantized.eval(), ids):.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:9])
