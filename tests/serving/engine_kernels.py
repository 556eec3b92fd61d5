"""What vLLM's CPU kernels make of given int8 linears. Run by vLLM's own Python:

    python engine_kernels.py GIVEN.safetensors MADE.safetensors

GIVEN: x and far, which are inputs, codes, weight_scale, input_scale, input_zero_point, bias.
MADE: for each of MODES MODE.x_codes, MODE.x_scale, MODE.x_zero_point where it has any, MODE.y, and MODE.y_bias with the
bias.
"""

from __future__ import annotations

import sys

import torch
import vllm._C  # noqa: F401 - registers the kernels
from safetensors.torch import load_file, save_file
from vllm import _custom_ops as ops

MODES = {
    "dynamic": ("x", False, True),
    "static": ("x", True, True),
    "asymmetric": ("x", True, False),
    "dynamic_asymmetric": ("x", False, False),
    "far": ("far", False, False),
}
"""The input, whether its scale is static, and whether it has no zero point."""


def main(given: str, made: str) -> None:
    t = load_file(given)
    results = {}
    for mode, (given_input, static, symmetric) in MODES.items():
        x, scale = t[given_input], t["input_scale"] if static else None
        zero_point = t["input_zero_point"].to(torch.int32) if static and not symmetric else None
        handler = ops.create_onednn_scaled_mm(
            t["codes"].t(), t["weight_scale"], torch.bfloat16, scale is None, not symmetric, 32
        )
        x_codes, x_scale, x_zero = ops.onednn_scaled_int8_quant(x, scale, zero_point, symmetric)
        # as the kernel's caller does: row sums of the weights for inputs whose zero point is not known beforehand
        sums = t["codes"].sum(1, dtype=torch.float32)[None] * t["weight_scale"].view(1, -1)
        adjustment = None if mode == "static" else sums
        results[f"{mode}.x_codes"], results[f"{mode}.x_scale"] = x_codes, x_scale
        if x_zero is not None:
            results[f"{mode}.x_zero_point"] = x_zero
        for name, bias in (("y", None), ("y_bias", t["bias"])):
            y = torch.empty(len(x), len(t["codes"]), dtype=torch.bfloat16)
            ops.onednn_scaled_mm(handler, x_codes, y, x_scale, x_zero, adjustment, bias)
            results[f"{mode}.{name}"] = y
    save_file({name: tensor.contiguous().clone() for name, tensor in results.items()}, made)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
