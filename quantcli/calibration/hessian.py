"""Second moments between all channels of an input, which GPTQ and its relatives take for their Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

PART = 256
"""A symmetric sum is made in parts of at least so many channels, and only those on and above the diagonal."""
PARTS = 4
HELD_OUT = 4


class Hessian:
    """H = E[x xᵀ] over tokens and, where given, D = E[x (y − x)ᵀ], y the same tokens in another pass. Of
    HELD_OUT batches that have a y one is kept apart, to check what is made of D.

    Float32 [width, width]. Tokens of a batch are multiplied in their own dtype and summed over batches in float32.
    Products of bfloat16 values come out rounded to 8 bits, each relative to itself: noise of a thousandth of the
    geometric mean of two second moments, which damping relative to each channel covers (`quant.gptq.factored`).
    """

    def __init__(self, width: int, device: torch.device | str) -> None:
        self.tokens = 0
        self._device = device
        self._sum = torch.zeros(width, width, device=device)
        self._drifts: list[Tensor] = []
        self._compared = [0, 0]
        self._batches = 0
        parts = max(1, min(PARTS, width // PART))
        edges = [width * part // parts for part in range(parts + 1)]
        self._parts = [slice(edges[i], edges[i + 1]) for i in range(parts)]

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the tokens of x [..., width], and of y [..., width] if it is given."""
        tokens = x.reshape(-1, x.shape[-1])
        turned = tokens.t()
        for place, rows in enumerate(self._parts):
            for columns in self._parts[place:]:
                self._sum[rows, columns] += turned[rows] @ tokens[:, columns]
        self.tokens += len(tokens)
        if y is not None:
            self._drifts = self._drifts or [torch.zeros_like(self._sum) for _ in range(2)]
            self._batches += 1
            kept_apart = self._batches % HELD_OUT == 2
            self._drifts[kept_apart] += turned @ (y.reshape(tokens.shape) - tokens)
            self._compared[kept_apart] += len(tokens)

    def moments(self) -> Tensor:
        """H. The sum is used up."""
        for place, rows in enumerate(self._parts):
            for columns in self._parts[place + 1 :]:
                self._sum[columns, rows] = self._sum[rows, columns].t()
        return self._sum.div_(max(1, self.tokens))

    def drifts(self) -> tuple[Tensor, Tensor] | None:
        """D of most batches, and of those kept apart; None without both. The sums are used up."""
        if not all(self._compared):
            return None
        first, other = (total.div_(count) for total, count in zip(self._drifts, self._compared, strict=True))
        return first, other
