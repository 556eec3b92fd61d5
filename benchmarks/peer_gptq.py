"""llm-compressor's GPTQ at other bits than its benchmark's, for a side by side with `quantcli run w4a16-gptq`.

    python -m venv peer && peer/bin/pip install llmcompressor
    peer/bin/python benchmarks/peer_gptq.py MODEL TEXT OUT BITS GROUP [INPUTS [SAMPLES]]

GROUP 0 is a scale a channel; INPUTS are the bits of inputs with a scale a token, 16 (float) if not given.

Prints seconds and peak memory. The calibration samples are the first SAMPLES (64) windows of 512 tokens of TEXT, each
from a BOS token where the tokenizer has texts start with one, as in quantcli.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512


def main(source: str, text: str, out: str, bits: int, group: int, inputs: int = 16, samples: int = 64) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    begin = tokenizer("").input_ids  # a BOS token, where texts start with one
    own = LENGTH - len(begin)
    windows = [begin + ids[start : start + own] for start in range(0, samples * own, own)]
    grid = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **grid)
    tokens = QuantizationArgs(num_bits=inputs, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=tokens if inputs < 16 else None)
    recipe = GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"])
    data = Dataset.from_list([{"input_ids": window, "attention_mask": [1] * LENGTH} for window in windows])
    started = time.perf_counter()
    oneshot(model=model, recipe=recipe, dataset=data, max_seq_length=LENGTH, num_calibration_samples=samples)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"quantize {seconds:.1f} s, peak {peak:.2f} GB")
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:8]))  # type: ignore[misc,arg-type]
