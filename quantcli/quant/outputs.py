"""Codes that let the errors of one output make good those of others, where the model mixes them later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcli.quant.gptq import Curvature, inverse_factor
from quantcli.quant.grid import QuantizedWeight, WeightGrid, dequantize, nearest_codes_

RUN = 32
"""Outputs of a run, which is mostly an attention head: those of one rank in their runs are rounded together, as a
lot."""
CHUNK = 16
"""Channels that are rounded one after the other before others learn of it."""
ITERATIONS = 2
"""Of conjugate gradients, for scales: what more of them gain, the codes that follow gain without."""
ATTEMPTS = 3
"""How often lots of a wave are asked whether their changes help; the last time all go back if those of one do not."""


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
    found anew; then `sweeps` times all scales are fitted to them together, and codes descended. Where that ends above
    `start`, `start` is returned.

    weight [out, in] float32; outputs float32 [out, out].
    """
    layout = _layout(weight, curvature, outputs)
    hessian = curvature.hessian
    before = mixed_error(weight, start, hessian, outputs)
    found = _rounded(weight, start, grid, curvature, outputs, layout)
    for _ in range(sweeps):
        found = _fitted(weight, found, grid, hessian, outputs)
        found = _descended(weight, found, grid, hessian, outputs, layout)
    after = mixed_error(weight, found, hessian, outputs)
    return (found, before, after) if after < before else (start, before, before)


@dataclass(frozen=True)
class _Layout:
    """How a weight [out, in] is laid out to be rounded: rows [out] and columns [in] in their orders, as
    [lots, rows of a lot, chunks, columns of a chunk]. Chunks are rounded one after the other, and lots the last one
    first: so what is rounded at a time lies on a diagonal, where views reach it."""

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

    def waves(self) -> Iterator[tuple[slice, slice]]:
        """Lots that are under way at a time, and the chunks where they are, one each. A lot waits for those before it
        to have done a chunk before it begins it, so that each is one behind."""
        chunks = len(self.columns) // self.chunk
        for wave in range(self.lots + chunks - 1):
            first, last = max(0, wave - chunks + 1), min(self.lots - 1, wave)
            yield slice(self.lots - 1 - last, self.lots - first), slice(wave - last, wave - first + 1)


def _diagonal(laid: Tensor, lots: slice, chunks: slice) -> Tensor:
    """What is at work of [lots, rows, chunks, columns], each lot at its chunk: a view [lots, columns, rows]."""
    return laid[lots, :, chunks].diagonal(dim1=0, dim2=2).permute(2, 1, 0)


def _blocks(matrix: Tensor, count: int) -> Tensor:
    """The blocks on the diagonal of a matrix [n, n]: [count, n / count, n / count], a view."""
    size = len(matrix) // count
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _layout(weight: Tensor, curvature: Curvature, outputs: Tensor) -> _Layout:
    """The rows of the largest G_ii in each run are rounded first, and so laid out last."""
    rows, width = weight.shape
    lots, chunk = largest_divisor(rows, RUN), largest_divisor(width, CHUNK)
    ranked = torch.argsort(outputs.diagonal().view(-1, lots), dim=1, descending=True, stable=True)
    first = torch.arange(0, rows, lots, device=weight.device)[:, None]
    return _Layout((first + ranked).t().flatten().flip(0), curvature.order, lots, chunk)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)


def _fitted(
    weight: Tensor,
    quantized: QuantizedWeight,
    grid: WeightGrid,
    hessian: Tensor,
    outputs: Tensor,
    iterations: int = ITERATIONS,
) -> QuantizedWeight:
    """Scales that fit the codes better, all of them together, by conjugate gradients, preconditioned with each scale's
    own curvature, G_ii c H cᵀ with c = q − z of its group. As they are stored they are taken if the error falls."""
    rows, groups = quantized.scale.shape
    grouped = quantized.codes.float().view(rows, groups, -1)
    if quantized.zero_point is not None:
        grouped -= quantized.zero_point.float().unsqueeze(-1)
    turned = torch.bmm(grouped.transpose(0, 1), _blocks(hessian, groups)).transpose(0, 1)
    steep = (turned * grouped).sum(-1) * outputs.diagonal()[:, None]
    alone = torch.where(steep > 0, 1 / steep, 0.0)

    def slope(difference: Tensor) -> Tensor:
        """How much each scale takes part in G · difference · H."""
        return ((outputs @ difference.view(rows, -1) @ hessian).view_as(grouped) * grouped).sum(-1)

    scale = quantized.scale.float()
    first = left = slope(weight.float() - dequantize(quantized))
    moved, direction, energy = torch.zeros_like(scale), alone * left, (left * alone * left).sum()
    for _ in range(iterations):
        along = slope(grouped * direction.unsqueeze(-1))
        curvature = (direction * along).sum()
        if not (energy > 0 and curvature > 0):
            break
        moved += energy / curvature * direction
        left = left - energy / curvature * along
        before, energy = energy, (left * alone * left).sum()
        direction = alone * left + energy / before * direction
    found = grid.stored(scale + moved)
    if not grid.full_range:
        found = torch.where(found > 0, found, scale)
    moved = found - scale
    if not (moved * (2 * first - slope(grouped * moved.unsqueeze(-1)))).sum() > 0:
        return quantized
    return QuantizedWeight(quantized.codes, found.to(grid.scale_dtype), quantized.zero_point)


def _rounded(
    weight: Tensor, start: QuantizedWeight, grid: WeightGrid, curvature: Curvature, outputs: Tensor, layout: _Layout
) -> QuantizedWeight:
    """With G⁻¹ = Vᵀ V, V upper triangular in the order of rows, and U of `gptq`: row i is rounded as `gptq` rounds it,
    e_i = (w_i − ŵ_i) / V_ii, and w_k −= V_ik e_i for all later rows k. Of rows of a lot, later lots alone learn. V is
    laid out as rows are, the last one first."""
    steps, aims = layout.spread(start.scale), layout.lay(weight.float())
    zeros = None if start.zero_point is None else layout.spread(start.zero_point)
    lots, lot, chunks, chunk = aims.shape
    across, within = curvature.factor.view(chunks, chunk, -1), _blocks(curvature.factor, chunks)
    diagonal = within.diagonal(dim1=1, dim2=2)[:, :, None]
    within = within / diagonal  # by what an error moves the channels behind it
    inverse = inverse_factor(outputs, layout.rows.flip(0))[0].flip(0, 1)
    given, own = inverse.view(lots, lot, -1), _blocks(inverse, lots).mT.contiguous()
    moved, codes = torch.zeros_like(aims), torch.zeros_like(aims)
    by_chunk = aims.view(-1, chunks, chunk).transpose(0, 1)
    for those, where in layout.waves():
        aim = _diagonal(aims, those, where)  # moved by earlier rows, and below by earlier channels
        left = (aim + _diagonal(moved, those, where)).contiguous()
        step = _diagonal(steps, those, where).contiguous()
        zero = None if zeros is None else _diagonal(zeros, those, where).contiguous()
        upper, code, error = within[where], torch.empty_like(left), torch.empty_like(left)
        parts = zip(*(each.unbind(1) for each in (left, step, upper, code, error)), strict=True)
        for j, (now, size, reach, new, missed) in enumerate(parts):
            at = None if zero is None else zero[:, j]
            nearest_codes_(torch.div(now, size, out=new), at, grid)
            torch.addcmul(now, new if at is None else new - at, size, value=-1, out=missed)
            if j + 1 < chunk:
                left[:, j + 1 :].addcmul_(reach[:, j + 1 :, None], missed[:, None], value=-1)
        _diagonal(codes, those, where).copy_(code)
        error /= diagonal[where]
        moved[those].view(-1, lot, chunks * chunk).baddbmm_(error.transpose(1, 2), across[where], alpha=-1)
        lost = (aim - (code if zero is None else code - zero) * step).transpose(1, 2)
        blame = torch.linalg.solve_triangular(own[those], lost, upper=True)
        waiting = those.stop * lot  # V is zero for rows that are done
        by_chunk[where, :waiting].baddbmm_(given[those, :, :waiting].transpose(1, 2), blame, alpha=-1)
    return QuantizedWeight(layout.natural(codes, grid.code_dtype), start.scale, start.zero_point)


def _descended(
    weight: Tensor, start: QuantizedWeight, grid: WeightGrid, hessian: Tensor, outputs: Tensor, layout: _Layout
) -> QuantizedWeight:
    """One sweep of descent: a code becomes the nearest to where G (W − Ŵ) H is zero with all others as they are.

    The codes of a wave change at once and may be in each other's way. So each lot is asked once all have changed
    whether its own changes still lower the error, and goes back if they do not; and all do if the error has risen.
    """
    steps, codes = layout.spread(start.scale), layout.lay(start.codes.float())
    lots, lot, chunks, chunk = codes.shape
    mixing, h = outputs[layout.rows][:, layout.rows], hessian[layout.columns][:, layout.columns]
    within, own = _blocks(h, chunks).contiguous(), _blocks(mixing, lots).contiguous()
    towards = h.view(-1, chunks, chunk).transpose(0, 1).contiguous()  # [chunks, in, channels]
    del h
    steep_in, steep_out = within.diagonal(dim1=1, dim2=2)[:, :, None], own.diagonal(dim1=1, dim2=2)[:, None]
    given = mixing.view(-1, lots, lot).transpose(0, 1)  # [lots, rows of all, rows]
    pull = mixing @ layout.lay(weight.float() - dequantize(start)).reshape(len(mixing), -1)  # G (W − Ŵ)
    by_lot, by_chunk = pull.view(lots, lot, -1), pull.view(-1, chunks, chunk).transpose(0, 1)
    for those, where in layout.waves():
        step, code = (_diagonal(laid, those, where).contiguous() for laid in (steps, codes))
        steep = step * steep_in[where]
        steep = torch.where(steep == 0, torch.inf, steep)
        before = torch.bmm(by_lot[those], towards[where])  # G (W − Ŵ) H
        slope = before.transpose(1, 2).contiguous()
        slope = torch.where(steep_out[those] > 0, slope / steep_out[those], 0.0)
        found, changes = _nearest(code, step, slope, steep, within[where], grid)
        turned = changes.transpose(1, 2)
        by_chunk[where].baddbmm_(given[those], turned, alpha=-1)
        alone = (torch.bmm(torch.bmm(own[those], turned), within[where]) * turned).sum((1, 2)) / 2
        for attempt in range(ATTEMPTS):
            after = torch.bmm(by_lot[those], towards[where])
            against = (after * turned).sum((1, 2)) + alone < 0
            some, lower = bool(against.any()), bool(((before + after) * turned).sum() >= 0)
            if lower and not some:
                break
            if not some or attempt + 1 == ATTEMPTS:
                against = torch.ones_like(against)
            back = against[:, None, None]
            by_chunk[where].baddbmm_(given[those], torch.where(back, turned, 0.0))
            turned, alone = torch.where(back, 0.0, turned), torch.where(against, 0.0, alone)
            found = torch.where(back, code, found)
        _diagonal(codes, those, where).copy_(found)
    return QuantizedWeight(layout.natural(codes, grid.code_dtype), start.scale, start.zero_point)


def _nearest(
    code: Tensor, step: Tensor, slope: Tensor, steep: Tensor, within: Tensor, grid: WeightGrid
) -> tuple[Tensor, Tensor]:
    """New codes [lots, channels, rows], one channel after the other, and how their weights change. slope is used up."""
    found, changes = torch.empty_like(code), torch.empty_like(code)
    parts = zip(*(each.unbind(1) for each in (code, step, slope, steep, within, found, changes)), strict=True)
    for j, (old, unit, pulled, size, reach, new, change) in enumerate(parts, 1):
        nearest_codes_(torch.addcdiv(old, pulled, size, out=new), None, grid)
        torch.sub(new, old, out=change).mul_(unit)
        if j < code.shape[1]:
            slope[:, j:].addcmul_(reach[:, j:, None], change[:, None], value=-1)
    return found, changes
