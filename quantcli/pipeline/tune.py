"""Rounding, scales, norms and biases of one decoder block, tuned until the block puts out what the float block does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcli.evaluation.simulate import Replacement, simulated
from quantcli.formats.store import StoredLinear
from quantcli.model.hidden import HiddenCache
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.pipeline.rundir import six_digits
from quantcli.pipeline.treatment import WeightSource, graded_inputs, weight_grid
from quantcli.pipeline.vectors import moved, read_vectors, tunable_vectors
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

CAP = 4.0
"""A token whose output has more than so many times the median energy counts less, so that few do not decide."""
STRETCH_RATE = 0.02
"""Of the sum of all steps of a scale, relative to it."""


@dataclass(frozen=True)
class Learned:
    """What of a block is tuned: by the name of a linear its rounding, and whether the model stores its weight
    transposed; by the name of a norm or bias its value, its change as `vectors.moved` has it, both float32, and the
    dtype that it has in the model."""

    linears: Mapping[str, tuple[LearnedRounding, bool]]
    vectors: Mapping[str, tuple[Tensor, Tensor, torch.dtype]]

    def parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights, in `dtype`, norms and biases as the model has them, by the names of parameters, with gradients."""
        found = {}
        for name, (linear, transposed) in self.linears.items():
            weight = linear.weight().to(dtype)
            found[f"{name}.weight"] = weight.t() if transposed else weight
        return found | {name: moved(value, change).to(own) for name, (value, change, own) in self.vectors.items()}

    def tensors(self) -> list[Tensor]:
        """What takes the steps."""
        of_linears = [tensor for linear, _ in self.linears.values() for tensor in (linear.offset, linear.stretch)]
        return [*of_linears, *(change for _, change, _ in self.vectors.values())]

    @torch.no_grad()
    def step(self, rate: float, norm_rate: float) -> None:
        """One step against the sign of the gradients, which are then cleared."""
        for linear, _ in self.linears.values():
            linear.step(rate, STRETCH_RATE * rate)
        for _, change, _ in self.vectors.values():
            if change.grad is not None:
                change.sub_(change.grad.sign_(), alpha=norm_rate)
                change.grad = None


def tuned_block(
    source: WeightSource,
    stream: BlockStream,
    index: int,
    enters: HiddenCache,
    wanted: Mapping[int, Tensor],
    aims: Aims,
    found: Results,
    hows: Mapping[str, Replacement],
    section: SignroundSection,
) -> tuple[Results, dict[str, Tensor]]:
    """The linears of `aims`, tuned together until the resident block puts out `wanted`; and the norms and biases of the
    block that were tuned with them, if `section` says so, float32, by the names of parameters.

    `found` are all quantized linears of the block, those to start from among them, and `hows` what takes their places:
    the others stay as they are, experts for one, and what they lack is made good. Inputs are rounded as an engine
    rounds them, and gradients pass that as if it were not there.
    """
    context, device, dtype = source.context, stream.skeleton.device, source.context.plan.structure.dtype
    treatments, block = context.plan.treatments, context.plan.structure.blocks[index]
    linears: dict[str, tuple[LearnedRounding, bool]] = {}
    places: dict[str, Replacement] = {}
    for name, how in hows.items():
        stored, treatment = found[name][0], treatments[name]
        if name in aims:
            grid, transposed = weight_grid(treatment, dtype), context.linears[name].transposed
            linears[name] = LearnedRounding(aims[name][0], stored.weight.to(device), grid), transposed
        if not isinstance(how, Tensor):
            places[name] = _graded(stored.to(device), treatment.scheme, own=name in aims)
        elif name not in aims:
            places[name] = how
    local = {name.removeprefix(f"{block.name}."): how for name, how in places.items()}
    learned = Learned(linears, _vectors(stream.skeleton, block.name) if section.norm_rate else {})
    with simulated(stream.skeleton.module(block.name), local, block.local_experts):
        facts = tune_block(stream, index, enters, wanted, learned, section)
    vectors = {name: moved(v, d).detach().to(own).float() for name, (v, d, own) in learned.vectors.items() if d.any()}
    if vectors:
        facts["tuned_vectors"] = len(vectors)
    results: Results = {}
    for name, (linear, _) in linears.items():
        quantized = linear.quantized()
        own: Facts = {
            "scale_max": six_digits(quantized.scale.abs().max().item()),
            "error": six_digits(weight_error(aims[name][0], quantized, aims[name][1])),
        }
        results[name] = replace(found[name][0], weight=quantized.to("cpu")), found[name][1] | own | facts
    return results, vectors


def _vectors(skeleton: Skeleton, path: str) -> dict[str, tuple[Tensor, Tensor, torch.dtype]]:
    """The norms and biases below a module without a change, as `Learned` has them."""
    names = tunable_vectors(skeleton, skeleton.parameter_names(path))
    dtypes = {name: skeleton.model.get_parameter(name).dtype for name in names}
    found = read_vectors(skeleton, names)
    return {name: (v, torch.zeros_like(v, requires_grad=True), dtypes[name]) for name, v in found.items()}


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
    learned: Learned,
    section: SignroundSection,
) -> dict[str, float]:
    """Tune what is `learned` of the resident block, in place. `wanted`: what the float model puts out, by batch.

    Steps go over all batches but the first, whose error decides which step is kept. They shrink to nothing over the
    block's part of the iterations or of the time, whichever ends first. Returns that error before and after, relative
    to the energy of the output that the block adds, and the number of steps.
    """
    batches = sorted(wanted)
    held_out, taught = batches[0], batches[1:] or batches
    first = best = _error(stream, index, held_out, enters, wanted, learned)
    kept = _state(learned)
    rate = 1.0 / section.iterations
    seconds = section.minutes * 60 / len(stream.skeleton.blocks) if section.minutes is not None else math.inf
    steps = unimproved = 0
    started, done = time.perf_counter(), 0.0
    while done < 1:
        batch, share = taught[steps % len(taught)], 1 - done
        with torch.enable_grad():
            _backward(stream, index, batch, enters, wanted, learned)
        learned.step(rate * share, section.norm_rate * share)
        steps += 1
        done = max(steps / section.iterations, (time.perf_counter() - started) / seconds)
        if steps % section.check_every == 0 or done >= 1:
            error = _error(stream, index, held_out, enters, wanted, learned)
            unimproved += 1
            if error < best:
                best, kept, unimproved = error, _state(learned), 0
            if unimproved == section.patience:
                break
    _restore(learned, kept)
    return {"tuned_from": first, "tuned_to": best, "tuned_steps": steps}


def _backward(
    stream: BlockStream, index: int, batch: int, enters: HiddenCache, wanted: Mapping[int, Tensor], learned: Learned
) -> None:
    """Leave the gradients of the loss on a batch, up to one factor that is positive, in what is learned."""
    found = _found(stream, index, batch, enters, learned)
    output = found.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(output, enters.get(batch), wanted[batch]), output)
    leaves = learned.tensors()
    for leaf, own in zip(leaves, scaled_gradients(found, gradient, leaves, stream.skeleton.dtype)[0], strict=True):
        leaf.grad = own


def _found(stream: BlockStream, index: int, batch: int, enters: HiddenCache, learned: Learned) -> Tensor:
    """What the block puts out."""
    return stream.differentiable(index, batch, enters.get(batch), learned.parameters(stream.skeleton.dtype))


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
    stream: BlockStream, index: int, batch: int, enters: HiddenCache, wanted: Mapping[int, Tensor], learned: Learned
) -> float:
    return float(_loss(_found(stream, index, batch, enters, learned), enters.get(batch), wanted[batch]))


def _state(learned: Learned) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in learned.tensors()]


@torch.no_grad()
def _restore(learned: Learned, state: list[Tensor]) -> None:
    for tensor, kept in zip(learned.tensors(), state, strict=True):
        tensor.copy_(kept)
