"""What vLLM's CPU kernels make of given int8 linears. Run by vLLM's own Python:

    python engine_kernels.py GIVEN.safetensors MADE.safetensors

GIVEN: x, codes, weight_scale, input_scale, input_zero_point, bias.
MADE: for dynamic, static and asymmetric each, MODE.x_codes, MODE.x_scale and MODE.y, and MODE.y_bias with the bias.
"""

from __future__ import annotations

import sys

import torch
import vllm._C  # noqa: F401 - registers the kernels
from safetensors.torch import load_file, save_file
from vllm import _custom_ops as ops


def main(given: str, made: str) -> None:
    t = load_file(given)
    zero = t["input_zero_point"].to(torch.int32)
    inputs = {"dynamic": (None, None), "static": (t["input_scale"], None), "asymmetric": (t["input_scale"], zero)}
    results = {}
    for mode, (scale, zero_point) in inputs.items():
        symmetric = mode != "asymmetric"
        handler = ops.create_onednn_scaled_mm(
            t["codes"].t(), t["weight_scale"], torch.bfloat16, scale is None, not symmetric, 32
        )
        x_codes, x_scale, x_zero = ops.onednn_scaled_int8_quant(t["x"], scale, zero_point, symmetric)
        # as the kernel's caller does: row sums of the weights for inputs whose zero point is not known beforehand
        sums = t["codes"].sum(1, dtype=torch.float32)[None] * t["weight_scale"].view(1, -1)
        adjustment = None if mode == "static" else sums
        results[f"{mode}.x_codes"], results[f"{mode}.x_scale"] = x_codes, x_scale
        for name, bias in (("y", None), ("y_bias", t["bias"])):
            y = torch.empty(len(t["x"]), len(t["codes"]), dtype=torch.bfloat16)
            ops.onednn_scaled_mm(handler, x_codes, y, x_scale, x_zero, adjustment, bias)
            results[f"{mode}.{name}"] = y
    save_file({name: tensor.contiguous().clone() for name, tensor in results.items()}, made)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
