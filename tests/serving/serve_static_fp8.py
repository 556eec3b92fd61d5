"""As serve.py, with what static FP8 needs and vLLM's build for CPUs lacks:

    python serve_static_fp8.py CHECKPOINT QUESTIONS.json ANSWERS.json

- codes of a tensor with one scale, which vLLM makes anew of weights with a scale a tensor when it loads them;
- SiLU, product and codes in one operation: without it in its table vLLM computes one after the other.

Everything else, and so the codes of inputs and the products, is vLLM's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import serve


def static_codes(input: Any, scale: Any = None, **_: Any) -> tuple[Any, Any]:  # vLLM's name for it
    """(x / s to nearest within ±448 as float8_e4m3fn, s), as vLLM's own kernel for GPUs has it."""
    import torch

    assert scale is not None, "only static scales are missing"
    return (input.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


if __name__ == "__main__":
    from vllm import _custom_ops
    from vllm.model_executor.layers.fusion import fused_act_quant

    _custom_ops.scaled_fp8_quant = static_codes
    fused_act_quant._FUSED_ACT_QUANT.clear()
    serve.main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
