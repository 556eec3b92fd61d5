"""Rounding and scales of one decoder block, tuned until the block puts out what the float block does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcli.model.hidden import HiddenCache
from quantcli.model.stream import BlockStream
from quantcli.quant.rounding import LearnedRounding

if TYPE_CHECKING:
    from quantcli.recipe.solver import SignroundSection

Learned = Mapping[str, tuple[LearnedRounding, bool]]
"""By the name of a linear its rounding, and whether the model stores its weight transposed."""

CAP = 4.0
"""A token whose output has more than so many times the median energy counts less, so that few do not decide."""
STRETCH_RATE = 0.02
"""Of the sum of all steps of a scale, relative to it."""


def tune_block(
    stream: BlockStream,
    index: int,
    enters: HiddenCache,
    wanted: Mapping[int, Tensor],
    linears: Learned,
    section: SignroundSection,
) -> dict[str, float]:
    """Tune `linears` (by name) of the resident block, in place. `wanted`: what the float model puts out, by batch.

    Steps go over all batches but the first, whose error decides which step is kept. Returns that error before and
    after, relative to the energy of the output that the block adds.
    """
    batches = sorted(wanted)
    held_out, taught = batches[0], batches[1:] or batches
    rates = [1 - step / section.iterations for step in range(section.iterations)]
    first = best = _error(stream, index, held_out, enters, wanted, linears)
    kept = _state(linears)
    rate = 1.0 / section.iterations
    for step, share in enumerate(rates):
        batch = taught[step % len(taught)]
        with torch.enable_grad():
            loss = _loss(stream, index, batch, enters, wanted, linears)
            loss.backward()
        for linear, _ in linears.values():
            linear.step(rate * share, STRETCH_RATE * rate * share)
        if (step + 1) % section.check_every == 0 or step + 1 == section.iterations:
            error = _error(stream, index, held_out, enters, wanted, linears)
            if error < best:
                best, kept = error, _state(linears)
    _restore(linears, kept)
    return {"tuned_from": first, "tuned_to": best}


def _loss(
    stream: BlockStream,
    index: int,
    batch: int,
    enters: HiddenCache,
    wanted: Mapping[int, Tensor],
    linears: Learned,
) -> Tensor:
    dtype = stream.skeleton.dtype
    weights = {}
    for name, (linear, transposed) in linears.items():
        weight = linear.weight().to(dtype)
        weights[f"{name}.weight"] = weight.t() if transposed else weight
    hidden = enters.get(batch)
    found = stream.differentiable(index, batch, hidden, weights)
    target = wanted[batch].to(found.device).float()
    added = (target - hidden.to(found.device).float()).square().sum(-1)
    cap = CAP * added.median()
    lost = (found.float() - target).square().sum(-1)
    return (lost * (cap / (added + cap))).sum() / (added * (cap / (added + cap))).sum()


@torch.no_grad()
def _error(*args: object) -> float:
    return float(_loss(*args))  # type: ignore[arg-type]


def _state(linears: Learned) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (linear.offset.detach().clone(), linear.stretch.detach().clone()) for name, (linear, _) in linears.items()
    }


@torch.no_grad()
def _restore(linears: Learned, state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (linear, _) in linears.items():
        linear.offset.copy_(state[name][0])
        linear.stretch.copy_(state[name][1])
