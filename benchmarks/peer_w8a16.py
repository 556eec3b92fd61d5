"""llm-compressor with 8-bit weights a channel, data-free: the peer of `quantcli run w8a16`.

Runs in the environment of the peer:

pip install llmcompressor && python benchmarks/peer_w8a16.py MODEL OUT
"""

import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

source, out = sys.argv[1:3]
scheme = QuantizationScheme(
    targets=["Linear"], weights=QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
oneshot(model=model, recipe=[QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])])
model.save_pretrained(out, save_compressed=True)
