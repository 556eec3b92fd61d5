"""Codes that let the errors of one output make good those of others, where the model mixes them later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.quant.gptq import Curvature, factored
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, nearest_codes_
from quantcli.quant.refine import refitted

RUN = 32
"""Outputs of a run, which is mostly an attention head: those of one rank in their runs are rounded together, as a
lot."""
CHUNK = 16
"""Channels that are rounded one after the other before others learn of it."""
CAUTION = (1.0, 2.0)
"""How much steeper the loss is taken to be in a descent: rows that change at once may be in each other's way."""


def mixed_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, outputs: Tensor) -> float:
    """tr(G (W − Ŵ) H (W − Ŵ)ᵀ): weight [out, in], hessian H float32 [in, in], outputs G float32 [out, out]."""
    difference = weight.float() - dequantize(quantized)
    return float(((outputs @ difference) * (difference @ hessian)).sum())


def mixed_outputs(
    weight: Tensor, start: QuantizedWeight, grid: WeightGrid, curvature: Curvature, outputs: Tensor, sweeps: int
) -> tuple[QuantizedWeight, float, float]:
    """Codes and scales that keep tr(G (W − Ŵ) H (W − Ŵ)ᵀ) small, this error of `start`, and theirs, which is no larger.

    With H = E[x xᵀ] of the inputs and G = E[g gᵀ] of the gradients g = ∂L/∂y of the outputs, that is the second-order
    change of the loss L if the two are independent (K-FAC, Martens & Grosse 2015). A diagonal G has no effect, so that
    `gptq` does without it. What is off the diagonal lets an error of one output be made good by others, as H does with
    channels (BoA, Kim et al. 2024, for heads; YAQA, Tseng et al. 2025, in full). On the scales of `start` codes are
    found anew; then `sweeps` times scales are fitted to them and codes descended, each row aiming at
    w_i + Σ_{k≠i} G_ik / G_ii (w_k − ŵ_k). The best of all states is returned, `start` included.

    weight [out, in] float32; outputs float32 [out, out].
    """
    layout = _layout(weight, curvature, outputs)
    hessian, mixing = curvature.hessian, outputs[layout.rows][:, layout.rows]
    before = mixed_error(weight, start, hessian, outputs)
    found = _rounded(weight, start, grid, curvature, mixing, layout)
    least = mixed_error(weight, found, hessian, outputs)
    for _ in range(sweeps):
        fitted = refitted(_aims(weight, found, outputs), found, grid, hessian)
        for caution in CAUTION:
            tried = _descended(weight, fitted, grid, hessian, mixing, layout, caution)
            lost = mixed_error(weight, tried, hessian, outputs)
            if lost < least:
                found, least = tried, lost
                break
        else:  # as another sweep would end
            break
    return (found, before, least) if least < before else (start, before, before)


@dataclass(frozen=True)
class _Layout:
    """How a weight [out, in] is laid out to be rounded: rows [out] and columns [in] in their orders, as
    [lots, rows of a lot, chunks, columns of a chunk]. Lots, and chunks, are rounded one after the other."""

    rows: Tensor
    columns: Tensor
    lots: int
    chunk: int

    def lay(self, values: Tensor) -> Tensor:
        laid = values[self.rows][:, self.columns]
        return laid.view(self.lots, -1, laid.shape[1] // self.chunk, self.chunk)

    def spread(self, values: Tensor) -> Tensor:
        """Scales or zero points [out or 1, groups], laid out."""
        groups = torch.arange(len(self.columns), device=values.device) // (len(self.columns) // values.shape[1])
        return self.lay(values.float().expand(len(self.rows), -1)[:, groups])

    def natural(self, laid: Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.empty(len(self.rows), len(self.columns), dtype=dtype, device=laid.device)
        values[self.rows[:, None], self.columns] = laid.reshape(values.shape).to(dtype)
        return values

    def waves(self) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
        """Lots that are under way at a time, as a slice and as numbers; the chunk where each of them is, and the first
        of these. A lot waits for earlier lots to have done a chunk before it begins it, so that each is one behind."""
        chunks = len(self.columns) // self.chunk
        for wave in range(self.lots + chunks - 1):
            first, last = max(0, wave - chunks + 1), min(self.lots - 1, wave)
            who = torch.arange(first, last + 1, device=self.rows.device)
            yield slice(first, last + 1), who, wave - who, wave - last


def _layout(weight: Tensor, curvature: Curvature, outputs: Tensor) -> _Layout:
    """The rows of the largest G_ii in each run come first."""
    rows, width = weight.shape
    lots, chunk = largest_divisor(rows, RUN), largest_divisor(width, CHUNK)
    ranked = torch.argsort(outputs.diagonal().view(-1, lots), dim=1, descending=True, stable=True)
    first = torch.arange(0, rows, lots, device=weight.device)[:, None]
    return _Layout((first + ranked).t().flatten(), curvature.order, lots, chunk)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)


def _aims(weight: Tensor, quantized: QuantizedWeight, outputs: Tensor) -> Tensor:
    """What each row is to be, with all others as they are."""
    diagonal = outputs.diagonal()
    shares = outputs / torch.where(diagonal > 0, diagonal, torch.inf)[:, None]
    shares.fill_diagonal_(0)
    return torch.addmm(weight.float(), shares, weight.float() - dequantize(quantized))


def _rounded(
    weight: Tensor, start: QuantizedWeight, grid: WeightGrid, curvature: Curvature, mixing: Tensor, layout: _Layout
) -> QuantizedWeight:
    """With G⁻¹ = Vᵀ V, V upper triangular in the order of rows, and U of `gptq`: row i is rounded as `gptq` rounds it,
    e_i = (w_i − ŵ_i) / V_ii, and w_k −= V_ik e_i for all later rows k. Of rows of a lot, later lots alone learn."""
    steps, aims = layout.spread(start.scale), layout.lay(weight.float())
    zeros = None if start.zero_point is None else layout.spread(start.zero_point)
    lots, lot, chunks, chunk = aims.shape
    across = curvature.factor.view(chunks, chunk, -1)
    within = curvature.factor.view(chunks, chunk, chunks, chunk).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    given = factored(mixing, natural=True).factor.view(lots, lot, -1)
    own = given.view(lots, lot, lots, lot).diagonal(dim1=0, dim2=2).permute(2, 1, 0).contiguous()
    moved, codes = torch.zeros_like(aims), torch.zeros_like(aims)
    for those, who, where, near in layout.waves():
        aim = aims[who, :, where]  # [lots, rows, channels]; moved by earlier rows, and below by earlier channels
        left = (aim + moved[who, :, where]).transpose(1, 2).contiguous()
        step = steps[who, :, where].transpose(1, 2).contiguous()
        zero = None if zeros is None else zeros[who, :, where].transpose(1, 2).contiguous()
        upper, code, error = within[where], torch.empty_like(left), torch.empty_like(left)
        for j in range(chunk):
            at = None if zero is None else zero[:, j]
            nearest_codes_(torch.div(left[:, j], step[:, j], out=code[:, j]), at, grid)
            rounded = code[:, j] if at is None else code[:, j] - at
            torch.div(left[:, j] - rounded * step[:, j], upper[:, j, j, None], out=error[:, j])
            if j + 1 < chunk:
                left[:, j + 1 :].baddbmm_(upper[:, j, j + 1 :, None], error[:, j, None], alpha=-1)
        codes[who, :, where] = code.transpose(1, 2)
        later = torch.bmm(error.transpose(1, 2), across[where, :, near * chunk :])
        moved[those, :, near:] -= later.view(len(who), lot, -1, chunk)
        lost = aim - ((code if zero is None else code - zero) * step).transpose(1, 2)
        blame = torch.linalg.solve_triangular(own[those], lost, upper=False)
        pushed = torch.bmm(given[those].transpose(1, 2), blame)  # [lots, rows of all, channels]
        aims.view(lots * lot, chunks, chunk)[:, where] -= pushed.transpose(0, 1)
    return QuantizedWeight(layout.natural(codes, grid.code_dtype), start.scale, start.zero_point)


def _descended(
    weight: Tensor,
    start: QuantizedWeight,
    grid: WeightGrid,
    hessian: Tensor,
    mixing: Tensor,
    layout: _Layout,
    caution: float,
) -> QuantizedWeight:
    """One sweep of descent: a code becomes the nearest to where G (W − Ŵ) H is zero with all others as they are. Those
    of a wave change at once, which may raise the error."""
    steps, codes = layout.spread(start.scale), layout.lay(start.codes.float())
    lots, lot, chunks, chunk = codes.shape
    h = hessian[layout.columns][:, layout.columns]
    within = h.view(chunks, chunk, chunks, chunk).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    towards = h.view(-1, chunks, chunk).transpose(0, 1)  # [chunks, in, channels]
    steepness = mixing.diagonal().view(lots, lot) * caution
    given = mixing.view(-1, lots, lot).transpose(0, 1)  # [lots, rows of all, rows]
    pull = mixing @ layout.lay(weight.float() - dequantize(start)).reshape(len(mixing), -1)  # G (W − Ŵ)
    for those, who, where, _ in layout.waves():
        slope = torch.bmm(pull.view(lots, lot, -1)[those], towards[where]).transpose(1, 2).contiguous()
        step = steps[who, :, where].transpose(1, 2).contiguous()
        code = codes[who, :, where].transpose(1, 2).contiguous()
        steep, near, changes = steepness[those], within[where], torch.empty_like(code)
        for j in range(chunk):
            new = torch.nan_to_num(slope[:, j] / (step[:, j] * steep * near[:, j, j, None]), 0.0, 0.0, 0.0)
            nearest_codes_(new.add_(code[:, j]), None, grid)
            torch.mul(new - code[:, j], step[:, j], out=changes[:, j])
            code[:, j] = new
            if j + 1 < chunk:
                felt = (changes[:, j] * steep)[:, None]
                slope[:, j + 1 :].baddbmm_(near[:, j, j + 1 :, None], felt, alpha=-1)
        codes[who, :, where] = code.transpose(1, 2)
        pushed = torch.bmm(given[those], changes.transpose(1, 2))
        pull.view(lots * lot, chunks, chunk)[:, where] -= pushed.transpose(0, 1)
    return QuantizedWeight(layout.natural(codes, grid.code_dtype), start.scale, start.zero_point)
