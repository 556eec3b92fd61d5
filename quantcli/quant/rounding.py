"""Rounding that is learned: which way each weight goes, and the scale of each group, as tensors with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.quant.grid import QuantizedWeight, WeightGrid

DRAW = 0.5
"""How far, of the way from the middle of its code to its edge, a weight beyond that edge starts."""


class LearnedRounding:
    """SignRound (Cheng et al. 2023) from given codes: q = clamp(round(c + v)), ŵ = (q − z) s exp(b).

    c lies in the code that the weight has, on the side of w / s + z, so that v = 0, b = 0 are the codes and scales to
    start from. `offset` v [out, in] stays in [-1/2, 1/2], `stretch` b [groups of the scale]
    in [-`limit`, `limit`]. Both are float32; the gradient passes rounding as if it were not there.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedWeight, grid: WeightGrid, limit: float = 0.1) -> None:
        codes, scale, zero_point = quantized
        self.grid, self.limit, self.zero_point = grid, limit, zero_point
        self.scale = scale.float()
        self._zero = None if zero_point is None else zero_point.float().unsqueeze(-1)
        self._shape = (*weight.shape[:1], scale.shape[1], -1) if scale.numel() > 1 else (1, 1, -1)
        start = codes.float().view(self._shape)
        wanted = weight.float().view(self._shape) / self.scale.unsqueeze(-1)
        if self._zero is not None:
            wanted += self._zero
        self.centre = start + DRAW * (wanted - start).clamp_(-0.5, 0.5)
        self.offset = torch.zeros_like(self.centre, requires_grad=True)
        self.stretch = torch.zeros_like(self.scale, requires_grad=True)
        self.weight_shape = weight.shape

    def weight(self) -> Tensor:
        """ŵ, float32 [out, in], with the gradient of both."""
        shifted = self.centre + self.offset
        codes = shifted + (shifted.detach().round() - shifted.detach())
        codes = codes.clamp(self.grid.qmin, self.grid.qmax)
        if self._zero is not None:
            codes = codes - self._zero
        return (codes * (self.scale * self.stretch.exp()).unsqueeze(-1)).view(self.weight_shape)

    @torch.no_grad()
    def step(self, rate: float, stretch_rate: float) -> None:
        """One step against the sign of the gradients, which are then cleared."""
        for tensor, own, limit in ((self.offset, rate, 0.5), (self.stretch, stretch_rate, self.limit)):
            if tensor.grad is not None:
                tensor.sub_(tensor.grad.sign_(), alpha=own).clamp_(-limit, limit)
                tensor.grad = None

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes and scales as stored."""
        codes = (self.centre + self.offset).round_().clamp_(self.grid.qmin, self.grid.qmax)
        scale = self.grid.stored(self.scale * self.stretch.exp()).to(self.grid.scale_dtype)
        return QuantizedWeight(codes.to(torch.int8).view(self.weight_shape), scale, self.zero_point)
