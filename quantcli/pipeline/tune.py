"""Rounding and scales of one decoder block, tuned until the block puts out what the float block does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcli.evaluation.simulate import Replacement, simulated
from quantcli.formats.store import StoredLinear
from quantcli.model.hidden import HiddenCache
from quantcli.model.stream import BlockStream
from quantcli.pipeline.rundir import six_digits
from quantcli.pipeline.treatment import WeightSource, graded_inputs, weight_grid
from quantcli.quant.gradients import scaled_gradients
from quantcli.quant.methods import weight_error
from quantcli.quant.rounding import LearnedRounding
from quantcli.quant.scheme import CodeType, Scheme
from quantcli.quant.straight_through import graded_linear, input_codes

if TYPE_CHECKING:
    from quantcli.pipeline.treatment import Facts
    from quantcli.recipe.solver import SignroundSection

    Results = dict[str, tuple[StoredLinear, Facts]]

Aims = dict[str, tuple[Tensor, Tensor]]
"""By the name of a linear what its weight is rounded from, float32 [out, in], and the second moments [in] of what it
reads."""

Learned = Mapping[str, tuple[LearnedRounding, bool]]
"""By the name of a linear its rounding, and whether the model stores its weight transposed."""

CAP = 4.0
"""A token whose output has more than so many times the median energy counts less, so that few do not decide."""
STRETCH_RATE = 0.02
"""Of the sum of all steps of a scale, relative to it."""


def tuned_linears(
    source: WeightSource,
    stream: BlockStream,
    index: int,
    enters: HiddenCache,
    wanted: Mapping[int, Tensor],
    aims: Aims,
    found: Results,
    hows: Mapping[str, Replacement],
    section: SignroundSection,
) -> Results:
    """The linears of `aims`, tuned together until the resident block puts out `wanted`.

    `found` are all quantized linears of the block, those to start from among them, and `hows` what takes their places:
    the others stay as they are, experts for one, and what they lack is made good. Inputs are rounded as an engine
    rounds them, and gradients pass that as if it were not there.
    """
    context, device, dtype = source.context, stream.skeleton.device, source.context.plan.structure.dtype
    treatments, block = context.plan.treatments, context.plan.structure.blocks[index]
    learned: dict[str, tuple[LearnedRounding, bool]] = {}
    places: dict[str, Replacement] = {}
    for name, how in hows.items():
        stored, treatment = found[name][0], treatments[name]
        if name in aims:
            grid, transposed = weight_grid(treatment, dtype), context.linears[name].transposed
            learned[name] = LearnedRounding(aims[name][0], stored.weight.to(device), grid), transposed
        if not isinstance(how, Tensor):
            places[name] = _graded(stored.to(device), treatment.scheme, own=name in aims)
        elif name not in aims:
            places[name] = how
    local = {name.removeprefix(f"{block.name}."): how for name, how in places.items()}
    with simulated(stream.skeleton.module(block.name), local, block.local_experts):
        facts = tune_block(stream, index, enters, wanted, learned, section)
    results: Results = {}
    for name, (linear, _) in learned.items():
        quantized = linear.quantized()
        own: Facts = {
            "scale_max": six_digits(quantized.scale.abs().max().item()),
            "error": six_digits(weight_error(aims[name][0], quantized, aims[name][1])),
        }
        results[name] = replace(found[name][0], weight=quantized.to("cpu")), found[name][1] | own | facts
    return results


def _graded(stored: StoredLinear, scheme: Scheme, own: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """A linear of quantized inputs with gradients to what it reads: with the weight of its module (`own`), or codes."""
    inputs = graded_inputs(scheme, stored.input_scale, stored.input_zero_point)

    def with_codes(module: nn.Module, x: Tensor) -> Tensor:
        return graded_linear(x, stored.weight, stored.weight.scale, getattr(module, "bias", None), **inputs)

    return partial(_with_own_weight, scheme.type, inputs) if own else with_codes


def _with_own_weight(kind: CodeType, inputs: Mapping[str, Any], module: nn.Module, x: Tensor) -> Tensor:
    codes, step = input_codes(x, kind, **inputs)
    output: Tensor = type(module).forward(module, (codes * step).to(x.dtype))
    return output


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
            _backward(stream, index, batch, enters, wanted, linears)
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


def _backward(
    stream: BlockStream, index: int, batch: int, enters: HiddenCache, wanted: Mapping[int, Tensor], linears: Learned
) -> None:
    """Leave the gradients of the loss on a batch, up to one factor that is positive, in what is learned."""
    found = _found(stream, index, batch, enters, linears)
    output = found.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(output, enters.get(batch), wanted[batch]), output)
    leaves = [tensor for linear, _ in linears.values() for tensor in (linear.offset, linear.stretch)]
    for leaf, own in zip(leaves, scaled_gradients(found, gradient, leaves, stream.skeleton.dtype)[0], strict=True):
        leaf.grad = own


def _found(stream: BlockStream, index: int, batch: int, enters: HiddenCache, linears: Learned) -> Tensor:
    """What the block puts out."""
    dtype = stream.skeleton.dtype
    weights = {}
    for name, (linear, transposed) in linears.items():
        weight = linear.weight().to(dtype)
        weights[f"{name}.weight"] = weight.t() if transposed else weight
    return stream.differentiable(index, batch, enters.get(batch), weights)


def _loss(found: Tensor, hidden: Tensor, wanted: Tensor) -> Tensor:
    """How far `found` is from what is `wanted`, relative to what that adds to `hidden`; absolute if it adds nothing."""
    target = wanted.to(found.device).float()
    added = (target - hidden.to(found.device).float()).square().sum(-1)
    cap = CAP * added.median()
    share = cap / (added + cap) if cap > 0 else torch.ones_like(added)
    lost = ((found.float() - target).square().sum(-1) * share).sum()
    whole = (added * share).sum()
    return lost / whole if whole > 0 else lost


@torch.no_grad()
def _error(
    stream: BlockStream, index: int, batch: int, enters: HiddenCache, wanted: Mapping[int, Tensor], linears: Learned
) -> float:
    return float(_loss(_found(stream, index, batch, enters, linears), enters.get(batch), wanted[batch]))


def _state(linears: Learned) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (linear.offset.detach().clone(), linear.stretch.detach().clone()) for name, (linear, _) in linears.items()
    }


@torch.no_grad()
def _restore(linears: Learned, state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (linear, _) in linears.items():
        linear.offset.copy_(state[name][0])
        linear.stretch.copy_(state[name][1])
