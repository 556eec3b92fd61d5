"""Second moments between all channels of an input, which GPTQ and its relatives take for their Hessian."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

WIDE = 1024
"""From this width on a symmetric sum is made in strips that leave out most of what lies below the diagonal."""
STRIPS = 4
HELD_OUT = 4
MOST_ATTENDED = 100.0
"""What a token counts at most for its small value: some are zero."""


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values are multiplied in: sums of products of float16 leave its range where a channel is six in size."""
    return torch.float32 if dtype == torch.float16 else dtype


def shares(values: Tensor) -> Tensor:
    """min(1, median of ‖y‖² / ‖y_t‖²) of each token t of [..., width]: float32 [...].

    A norm behind it divides by the size of a token, and a few tokens are a thousand times larger than the rest: they
    would decide alone what is made good.
    """
    return _against_median(values).clamp(max=1)


def attended(values: Tensor) -> Tensor:
    """max(1, median of ‖v‖² / ‖v_t‖²), at most MOST_ATTENDED, of each token t of [..., width]: float32 [...].

    v are values that attention adds up. Tokens to which nearly all others attend, for want of something better, have
    values near zero (attention sinks with value-state drains, Guo et al. 2024, arXiv:2410.13835): what they are off by
    reaches all others, and is next to nothing in a mean over tokens. So each counts by the size of its own value.
    """
    return _against_median(values).clamp(1, MOST_ATTENDED)


def _against_median(values: Tensor) -> Tensor:
    energy = values.float().square().sum(-1)
    return energy.median() / energy.clamp(min=torch.finfo(torch.float32).tiny)


class Hessian:
    """H = E[a x xᵀ] over tokens of importance a, which is 1 where none is given. Where the same tokens of another pass
    are given, P = E[a b x eᵀ] as well, b the share of each token and e what outputs lack. Of HELD_OUT batches that have
    another pass one is kept apart, to check what is made of P.

    e = (y − x) Wᵀ + l of linears W that read y in the other pass, where what they add to lacks l. Of a `weight` W
    [out, width] that is given from the start P itself is summed, else D = E[a b x (y − x)ᵀ], since P = D Wᵀ: that takes
    less time and memory where there are fewer channels than outputs.

    Float32 [width, width]. Tokens of a batch are multiplied in their own dtype and summed over batches in float32.
    Products of bfloat16 values come out rounded to 8 bits, each relative to itself: noise of a thousandth of the
    geometric mean of two second moments, which damping relative to each channel covers (`quant.gptq.factored`).
    """

    def __init__(self, width: int, device: torch.device | str, weight: Tensor | None = None) -> None:
        self.tokens = 0
        self._weight = weight
        self._device = device
        self._sum = torch.zeros(width, width, device=device)
        self._compared_sum: Tensor | None = None
        self._drifts: list[Tensor] = []
        self._lacks: list[Tensor] = []
        self._compared = [0, 0]
        self._batches = 0
        strips = STRIPS if width >= WIDE else 1
        self._height = -(-width // strips)
        self._strips = range(0, width, self._height)

    def update(
        self,
        x: Tensor,
        y: Tensor | None = None,
        lack: Tensor | None = None,
        share: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> None:
        """Add the tokens of x [..., width], of y [..., width] if it is given, and beside y of `lack` [..., out].

        importance [...]: how much each token counts, in H too; share [...]: how much besides in what is compared.
        """
        dtype = product_dtype(x.dtype)
        root = None if importance is None else importance.reshape(-1, 1).sqrt()

        def weighed(values: Tensor) -> Tensor:
            values = values.reshape(-1, values.shape[-1])
            return values.to(dtype) if root is None else (values * root).to(dtype)

        tokens = weighed(x)
        turned = tokens.t().contiguous()
        self._add(self._sum, turned, turned)
        self.tokens += len(tokens)
        if y is not None:
            self._batches += 1
            kept_apart = self._batches % HELD_OUT == 2
            if share is not None:
                if self._compared_sum is None:
                    self._compared_sum = torch.zeros_like(self._sum)
                counted = turned * share.reshape(1, -1).to(turned.dtype)
                self._add(self._compared_sum, counted, turned)
                turned = counted
            self._compared[kept_apart] += len(tokens)
            moved = weighed(y) - tokens
            other = None if lack is None else weighed(lack)
            if self._weight is None:
                self._drifts = self._drifts or [torch.zeros_like(self._sum) for _ in range(2)]
                self._drifts[kept_apart] += turned @ moved
            else:
                missed = linear(moved, self._weight.to(dtype))
                other = missed if other is None else missed.add_(other)
            if other is not None:
                self._lacks = self._lacks or [self._sum.new_zeros(len(self._sum), other.shape[1]) for _ in range(2)]
                self._lacks[kept_apart] += turned @ other

    def _add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        for start in self._strips:  # a strip holds all that is above it and right of it
            strip = slice(start, start + self._height)
            total[strip, start:] += linear(left[strip], right[start:])

    def _whole(self, total: Tensor, count: int) -> Tensor:
        for start in self._strips:
            rows, below = slice(start, start + self._height), slice(start + self._height, None)
            corner = total[rows, rows]
            corner.copy_(corner.triu() + corner.triu(1).t())
            total[below, rows] = total[rows, below].t()
        return total.div_(max(1, count))

    def moments(self) -> Tensor:
        """H. The sum is used up."""
        return self._whole(self._sum, self.tokens)

    def compared_moments(self) -> Tensor | None:
        """E[a b x xᵀ] of the tokens of two passes, None where they had no share. The sum is used up."""
        if self._compared_sum is None:
            return None
        return self._whole(self._compared_sum, sum(self._compared))

    def pulls(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """P [width, out] of most batches, and of those kept apart, of linears `weight` float32 [out, width], which are
        those that were given from the start, if any were: then the sums are used up. None without both."""
        if not all(self._compared):
            return None
        first, other = (self._pull(side, weight).div_(count) for side, count in enumerate(self._compared))
        return first, other

    def _pull(self, side: int, weight: Tensor) -> Tensor:
        if not self._drifts:
            return self._lacks[side]
        found = self._drifts[side] @ weight.t()
        return found.add_(self._lacks[side]) if self._lacks else found

    def forget_compared(self) -> None:
        """Let go of what was summed of two passes."""
        self._compared_sum, self._weight = None, None
        self._drifts, self._lacks = [], []

    @property
    def held_out_share(self) -> float:
        """The share of the tokens of two passes that were kept apart."""
        return self._compared[1] / max(1, sum(self._compared))
