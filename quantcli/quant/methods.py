"""The table of weight methods, and how well a quantized weight fits. A new method is one function and one entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, float_blocks
from quantcli.quant.hqq import hqq
from quantcli.quant.minmax import minmax
from quantcli.quant.search import mse
from quantcli.quant.sparse import sparse_weight
from quantcli.quant.ssz import ssz

WeightMethod = Callable[[Tensor, WeightGrid, Tensor | None], QuantizedWeight]
"""(weight [out, in], grid, second moment of the input [in] or None) -> codes, scales, zero points."""

WEIGHT_METHODS: dict[str, WeightMethod] = {
    "minmax": minmax,
    "mse": mse,
    "hqq": hqq,
    "ssz": ssz,
    "co_sparse": partial(sparse_weight, mode="co_sparse"),
    "low_bit": partial(sparse_weight, mode="low_bit"),
    "low_bit_sigma": partial(sparse_weight, mode="low_bit_sigma"),
}


def weight_error(weight: Tensor, quantized: QuantizedWeight, importance: Tensor | None = None) -> float:
    """Relative squared error sum_ij h_j (w_ij - deq_ij)^2 / sum_ij h_j w_ij^2, h = importance [in] or 1.

    With h = E[x_j^2] this is the relative output error of the layer for uncorrelated input channels. Rows are summed in
    float32, over rows in float64. Without any weight to lose it is 0 (infinite if there is an error all the same).
    """
    h = None if importance is None else importance.to(weight.device, torch.float32)
    lost = torch.zeros((), dtype=torch.float64, device=weight.device)
    whole = torch.zeros_like(lost)
    for rows, block in float_blocks(weight, 1):
        values = block.squeeze(1)
        error = dequantize(_rows_of(quantized, rows)).sub_(values)
        for squares, total in ((error.square_(), lost), (values.square_(), whole)):
            row_sums = squares.sum(1) if h is None else squares @ h
            total += row_sums.sum(dtype=torch.float64)
    if not whole:
        return math.inf if lost else 0.0
    return float(lost / whole)


def _rows_of(quantized: QuantizedWeight, rows: slice) -> QuantizedWeight:
    codes, scale, zero_point = quantized
    if scale.shape[0] == 1:
        return QuantizedWeight(codes[rows], scale, zero_point)
    return QuantizedWeight(codes[rows], scale[rows], None if zero_point is None else zero_point[rows])
