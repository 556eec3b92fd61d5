"""Rounding and scales of one decoder block, tuned until the block puts out what the float block does."""

from __future__ import annotations

import math
import time
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

    Steps go over all batches but the first, whose error decides which step is kept. They shrink to nothing over the
    block's part of the iterations or of the time, whichever ends first. Returns that error before and after, relative
    to the energy of the output that the block adds, and the number of steps.
    """
    batches = sorted(wanted)
    held_out, taught = batches[0], batches[1:] or batches
    first = best = _error(stream, index, held_out, enters, wanted, linears)
    kept = _state(linears)
    rate = 1.0 / section.iterations
    seconds = section.minutes * 60 / len(stream.skeleton.blocks) if section.minutes is not None else math.inf
    steps = unimproved = 0
    started, done = time.perf_counter(), 0.0
    while done < 1:
        batch, share = taught[steps % len(taught)], 1 - done
        with torch.enable_grad():
            loss = _loss(stream, index, batch, enters, wanted, linears)
            loss.backward()
        for linear, _ in linears.values():
            linear.step(rate * share, STRETCH_RATE * rate * share)
        steps += 1
        done = max(steps / section.iterations, (time.perf_counter() - started) / seconds)
        if steps % section.check_every == 0 or done >= 1:
            error = _error(stream, index, held_out, enters, wanted, linears)
            unimproved += 1
            if error < best:
                best, kept, unimproved = error, _state(linears), 0
            if unimproved == section.patience:
                break
    _restore(linears, kept)
    return {"tuned_from": first, "tuned_to": best, "tuned_steps": steps}


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
