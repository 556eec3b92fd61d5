"""What vLLM's CPU kernel writes into an fp8 cache. Run by vLLM's own Python:

    python engine_cache.py GIVEN.safetensors MADE.safetensors

GIVEN: key and value [tokens, heads, size], key_scale and value_scale [1].
MADE: key and value uint8, the codes of one block of the cache as they lie there.
"""

from __future__ import annotations

import sys

import torch
import vllm._C  # noqa: F401 - registers the kernels
from safetensors.torch import load_file, save_file
from vllm import _custom_ops as ops


def main(given: str, made: str) -> None:
    t = load_file(given)
    tokens, heads, size = t["key"].shape
    key, value = (torch.zeros(1, heads, tokens, size, dtype=torch.uint8) for _ in range(2))
    ops.cpu_attn_reshape_and_cache(
        t["key"],
        t["value"],
        key,
        value,
        torch.arange(tokens),
        "amx" if torch.cpu._is_amx_tile_supported() else "vec",
        t["key_scale"].item(),
        t["value_scale"].item(),
        "fp8_e4m3",
    )
    save_file({"key": key, "value": value}, made)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
