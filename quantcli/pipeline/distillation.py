"""Scales and norms of a quantized model tuned to predict what the float model does, with one block in memory at a time.

A step runs a batch through all blocks, keeping what enters each; the loss at the end is the Kullback-Leibler divergence
from the float model's predictions (Hinton et al. 2015). Then each block, the last one first, is run again with
gradients, which it gets from the block behind it. Codes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantcli.evaluation.simulate import not_read, simulated
from quantcli.formats.store import Store, StoredLinear
from quantcli.model.stream import BlockStream
from quantcli.pipeline.context import Context
from quantcli.pipeline.fused import scale_groups
from quantcli.pipeline.treatment import graded_inputs
from quantcli.pipeline.tuned import tuned_vectors
from quantcli.pipeline.vectors import by_tensor, moved, read_vectors, tunable_vectors
from quantcli.quant.gradients import scaled_gradients
from quantcli.quant.grid import stored_scale
from quantcli.quant.scheme import Scheme
from quantcli.quant.straight_through import graded_linear

if TYPE_CHECKING:
    from quantcli.recipe.solver import DistillSection

WARM_UP = 2
"""Steps over which the rate rises; behind them it falls along a cosine to nothing."""
MOMENTUM = (0.9, 0.95)


@dataclass
class Student:
    """A quantized model whose scales and vectors are tuned.

    `changes`, one for each tuned tensor and of its shape, are relative: a scale becomes s (1 + d), a vector what
    `vectors.moved` says. `inputs` names what shares a static input scale, `weights` what shares a scale of weights.
    `vectors` are those to be tuned, and those that stage `quantize` has tuned.
    """

    context: Context
    stream: BlockStream
    store: Store
    section: DistillSection
    changes: dict[str, nn.Parameter] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self) -> None:
        """Start without any change."""
        structure, skeleton = self.context.plan.structure, self.stream.skeleton
        shared = {name: each.name for block in structure.blocks for each in block.inputs for name in each.linears}
        groups = scale_groups(structure, self.store.schemes)
        for name, scheme in self.store.schemes.items() if self.section.scale_rate else ():
            linear = self.context.linears[name]
            self.weights[name] = groups.get(name, (name,))[0]
            self._add(f"{self.weights[name]}.scale", scheme.scale_shape(linear.out_features, linear.in_features))
            if scheme.observed:
                self.inputs[name] = shared.get(name, name)
                self._add(f"{self.inputs[name]}.input_scale", (1,))
        found = tuned_vectors(self.context.recipe, self.context.checkpoint, self.context.run.path)
        parameters = {
            source.tensors[0]: name for name, source in skeleton.sources.items() if source.tensors[0] in found
        }
        self.vectors = {parameters[name]: value.to(skeleton.device) for name, value in found.items()}
        if self.section.norm_rate:
            outer = self.stream.head_names()
            inside = [n for path in skeleton.blocks for n in skeleton.parameter_names(path)]
            own = read_vectors(skeleton, tunable_vectors(skeleton, (*inside, *outer)))
            self.vectors = own | self.vectors
            for name, value in own.items():
                self._add(name, tuple(value.shape))

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.changes:
            device = self.stream.skeleton.device
            self.changes[name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def groups(self) -> list[dict[str, object]]:
        """What is tuned at which rate, for an optimizer."""
        vectors = [p for name, p in self.changes.items() if name in self.vectors]
        scales = [p for name, p in self.changes.items() if name not in self.vectors]
        both = ((scales, self.section.scale_rate), (vectors, self.section.norm_rate))
        return [{"params": params, "lr": rate, "peak": rate} for params, rate in both if params]

    def vector(self, name: str) -> Tensor:
        """A vector of the model with its change, float32."""
        value, change = self.vectors[name], self.changes.get(name)
        return value if change is None else moved(value, change)

    def scale(self, name: str, stored: StoredLinear) -> Tensor:
        """The scale of a linear with its change, float32."""
        scale, change = stored.weight.scale.float(), self.changes.get(f"{self.weights.get(name)}.scale")
        return scale if change is None else scale * (1 + change)

    def input_scale(self, name: str, stored: StoredLinear) -> Tensor | None:
        if stored.input_scale is None or (key := self.inputs.get(name)) is None:
            return stored.input_scale
        return stored.input_scale * (1 + self.changes[f"{key}.input_scale"])

    def linears(self, path: str) -> dict[str, Callable[[nn.Module, Tensor], Tensor]]:
        """The forward of every quantized linear below a module, by its name from there; of the head itself, by its
        own."""
        device = self.stream.skeleton.device
        found: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {}
        for name, scheme in self.store.schemes.items():
            if name == path or name.startswith(f"{path}."):
                stored = self.store.read(name).to(device)
                found[name.removeprefix(f"{path}.")] = partial(self._forward, name, stored, scheme)
        return found

    def _forward(self, name: str, stored: StoredLinear, scheme: Scheme, module: nn.Module, x: Tensor) -> Tensor:
        return graded_linear(
            x,
            stored.weight,
            self.scale(name, stored).to(stored.weight.scale.dtype),  # rounded as it will be stored
            getattr(module, "bias", None),
            **graded_inputs(scheme, self.input_scale(name, stored), stored.input_zero_point),
        )

    def block(self, index: int, batch: int, hidden: Tensor, *, graded: bool) -> Tensor:
        """What leaves a block, with gradients to what enters it and to what is tuned, or without."""
        path = self.stream.skeleton.blocks[index]
        experts = self.stream.skeleton.structure.blocks[index].local_experts
        linears = self.linears(path)
        vectors = {name: self.vector(name) for name in self.vectors if name.startswith(f"{path}.")}
        own = {name: value.to(self.stream.skeleton.dtype) for name, value in vectors.items()}
        left_out = {f"{path}.{name}" for name in not_read(linears, experts)}
        with (
            self.stream.block(index, left_out=left_out) as module,
            simulated(module, linears, experts),
            torch.set_grad_enabled(graded),
        ):
            return self.stream.differentiable(index, batch, hidden, own)

    def divergence(self, hidden: Tensor, wanted: Tensor, gradient: Tensor | None = None) -> float:
        """Mean KL divergence, in nats a token, of predictions from `hidden`, which left the last block, from those of
        the float model from `wanted`. Its gradient is written to `gradient`, float32, and added to what is tuned."""
        head = self.context.plan.structure.head
        linears = self.linears(head) if head is not None and head in self.store.schemes else {}
        outer = [name for name in self.stream.head_names() if name in self.vectors]
        tokens, total = hidden.shape[0] * hidden.shape[1], 0.0
        wanted, graded = wanted.to(hidden.device), gradient is not None
        with self.stream.head():
            for piece in self.stream.pieces(hidden):
                with torch.no_grad():
                    logp = torch.log_softmax(self.stream.head_logits(wanted[piece], {}), -1)
                entering = hidden[piece].detach().requires_grad_(graded)
                own = {name: self.vector(name).to(self.stream.skeleton.dtype) for name in outer}
                with torch.set_grad_enabled(graded), simulated(self.stream.skeleton.model, linears):
                    output = self.stream.head_logits(entering, own)
                    logits = output.detach().requires_grad_(graded)
                    lost = (logp.exp() * (logp - torch.log_softmax(logits, -1))).sum() / tokens
                    if gradient is not None:
                        gradient[piece] = self._backward(output, torch.autograd.grad(lost, logits)[0], entering)
                total += float(lost.detach())
        return total

    def _backward(self, output: Tensor, gradient: Tensor, entering: Tensor) -> Tensor:
        """The gradient, float32, of what entered, where that of the output is `gradient`; those of what is tuned are
        added there."""
        changes = list(self.changes.values())
        found, scale = scaled_gradients(output, gradient, [entering, *changes], self.stream.skeleton.dtype)
        for change, own in zip(changes, found[1:], strict=True):
            if own is not None:
                own = own / scale
                change.grad = own if change.grad is None else change.grad + own
        assert found[0] is not None
        return found[0].float() / scale

    def forward(self, batch: int, hidden: Tensor) -> list[Tensor]:
        """What enters each block, and last what leaves the last one."""
        states = [hidden]
        for index in range(self.context.blocks):
            states.append(self.block(index, batch, states[-1], graded=False))
        return states

    def step(self, batch: int, hidden: Tensor, wanted: Tensor) -> float:
        """The divergence on a batch; its gradient is added to what is tuned."""
        states = self.forward(batch, hidden)
        left = states.pop()
        gradient = torch.zeros(left.shape, device=left.device)
        total = self.divergence(left, wanted, gradient)
        for index in reversed(range(self.context.blocks)):
            entering = states.pop().detach().requires_grad_()  # `hidden` itself is kept for other steps
            gradient = self._backward(self.block(index, batch, entering, graded=True), gradient, entering)
        return total

    def tuned(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(scales by linear and part as they are stored, vectors by the names of their tensors in the checkpoint)."""
        scales: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, scheme in self.store.schemes.items() if self.section.scale_rate else ():
                stored = self.store.read(name).to(self.stream.skeleton.device)
                scale, dtype = self.scale(name, stored), stored.weight.scale.dtype
                scales[f"{name}.scale"] = stored_scale(scale, dtype, scheme.smallest_scale(self.store.dtype)).to(dtype)
                if (input_scale := self.input_scale(name, stored)) is not None:
                    scales[f"{name}.input_scale"] = input_scale
            vectors = {name: self.vector(name) for name in self.vectors if name in self.changes}
        return scales, by_tensor(self.stream.skeleton, vectors)


def rates(steps: int) -> Iterator[float]:
    """The share of the peak rate at each of `steps` steps."""
    for step in range(steps):
        yield min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(student: Student, order: list[int], states: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[float]:
    """Tune on the batches of `order`, one step each, yielding the divergence of each before its step.

    states: by batch what enters the first block, and what leaves the last one of the float model.
    """
    optimizer = torch.optim.Adam(student.groups(), betas=MOMENTUM)
    for batch, share in zip(order, rates(len(order)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.zero_grad()
        yield student.step(batch, *states[batch])
        optimizer.step()
