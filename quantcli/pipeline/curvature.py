"""How errors of outputs add up in the loss: second moments of their gradients, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcli.calibration.hessian import product_dtype
from quantcli.formats.store import block_file
from quantcli.pipeline.estimate import MOST_OUTPUTS
from quantcli.quant.outputs import largest_divisor

if TYPE_CHECKING:
    from torch import nn

    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.context import Context

FOLDER = "curvature"
MOST_ENERGY = 30.0
"""What a token counts at most, as a multiple of the median: few tokens have gradients of a hundred times that."""


def mixed_linears(context: Context) -> list[str]:
    """The linears of blocks that are solved with what their outputs are to each other: those of `gptq` with a scale a
    row or finer, experts apart, whose tokens other ones route."""
    return [name for name in context.linear_blocks if _mixed(context, name)]


def _mixed(context: Context, linear: str) -> bool:
    treatment = context.plan.treatments.get(linear)
    inside = context.linear_blocks[linear] < context.blocks and linear not in context.expert_inputs
    return inside and treatment is not None and treatment.weights.mixed


def read_outputs(context: Context, linear: str) -> Tensor | None:
    """G of a linear [parts, size, size] float32 on the CPU, or None where none was found."""
    from safetensors import safe_open

    if context.recipe.quantize.gptq.output_samples is None or not _mixed(context, linear):
        return None
    with safe_open(block_file(context.folder(FOLDER), context.linear_blocks[linear]), framework="pt") as opened:
        moment = opened.get_tensor(f"{linear}.second_moment")
        found: Tensor = opened.get_tensor(f"{linear}.correlation").float()
    root = moment.sqrt().view(len(found), -1)
    return found.mul_(root.unsqueeze(-1)).mul_(root.unsqueeze(-2))


@dataclass
class OutputMoments:
    """E[g gᵀ] of the gradients g of `width` outputs, in parts, from two halves of the samples that know nothing of each
    other. Products are taken in the dtype of g, of float16 in float32, and summed in float32: those of bfloat16 are off
    by a thousandth, where chance is off by a tenth."""

    width: int
    device: torch.device | str
    samples: int = 0
    halves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        size = largest_divisor(self.width, MOST_OUTPUTS)
        shape = self.width // size, size, size
        self.halves = [torch.zeros(shape, device=self.device) for _ in range(2)]

    def update(self, gradients: Tensor) -> None:
        """Gradients [samples, tokens, width]. Tokens of more than MOST_ENERGY times the median energy count as much."""
        energy = gradients.float().square().sum(-1, keepdim=True)
        most = MOST_ENERGY * energy.median()
        counted = (most / energy.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1).sqrt()
        gradients = (gradients * counted).to(product_dtype(gradients.dtype))
        for half in (0, 1):
            total = self.halves[(self.samples + half) % 2]
            parts = gradients[half::2].reshape(-1, *total.shape[:2]).transpose(0, 1)
            total += torch.bmm(parts.mT, parts)
        self.samples += len(gradients)

    def shrunk(self) -> tuple[Tensor, Tensor, float]:
        """(correlations float16 [parts, size, size], second moments float32 [width], the share t that was kept).

        With R_a and R_b the correlations of the halves off the diagonal and R their mean, chance has no part in
        ⟨R_a, R_b⟩, so that  t = ⟨R_a, R_b⟩ / ⟨R, R⟩,  in [0, 1], makes t R least wrong in the mean of squares.
        """
        first, second = self.halves
        for half in self.halves:  # products of bfloat16 need not be the same on both sides of the diagonal
            half.add_(half.mT.clone()).div_(2)
        moment = (first + second).diagonal(dim1=1, dim2=2).clone()
        unit = torch.where(moment > 0, moment, torch.inf).rsqrt()
        for half in self.halves:
            half.mul_(unit.unsqueeze(-1)).mul_(unit.unsqueeze(-2)).diagonal(dim1=1, dim2=2).zero_()
        agreed = 4 * float((first * second).sum(dtype=torch.float64))
        whole = first.add_(second)
        size = float(whole.square().sum(dtype=torch.float64))
        share = min(1.0, max(0.0, agreed / size)) if size > 0 else 0.0
        whole.mul_(share).diagonal(dim1=1, dim2=2).fill_(1)
        return whole.to("cpu", torch.float16), moment.flatten().cpu() / max(1, self.samples), share


def sampled_gradients(stream: BlockStream, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """∂ Σ −log p(y) / ∂ hidden of states that left the last block, one y drawn for each token from what the model
    itself predicts: E[g gᵀ] of them is the Fisher information. The head is resident."""
    hidden = hidden.to(stream.skeleton.device, copy=True).requires_grad_()
    for piece in stream.pieces(hidden):
        with torch.enable_grad():
            logp = torch.log_softmax(stream.head_logits(hidden[piece], {}), -1)
        chances = logp.detach().flatten(0, -2).exp().cumsum(-1)
        drawn = torch.rand(len(chances), 1, generator=generator).to(chances.device) * chances[:, -1:]
        label = torch.searchsorted(chances, drawn).clamp_(max=chances.shape[-1] - 1)
        (-logp.flatten(0, -2).gather(1, label).sum()).backward()
    assert hidden.grad is not None
    return hidden.grad


def block_moments(
    stream: BlockStream,
    index: int,
    entering: HiddenCache,
    upstream: HiddenCache,
    linears: Mapping[str, int],
) -> dict[str, OutputMoments]:
    """The moments of each of `linears`, by name with its outputs, of one block; `upstream`, gradients of what leaves
    the block, becomes that of what enters it."""
    path, device = stream.skeleton.blocks[index], stream.skeleton.device
    found = {name: OutputMoments(width, device) for name, width in linears.items()}
    with stream.block(index) as module:
        for batch, tokens in enumerate(stream.batches):
            with _graded(module, path, found, tokens.shape):
                hidden = entering.get(batch).to(device, copy=True).requires_grad_()
                with torch.enable_grad():
                    left = stream.differentiable(index, batch, hidden, {})
                left.backward(upstream.get(batch).to(device))
            assert hidden.grad is not None
            upstream.put(batch, hidden.grad)
    upstream.commit(index, resumable=False)
    return found


@contextmanager
def _graded(module: nn.Module, path: str, found: Mapping[str, OutputMoments], shape: Sequence[int]) -> Iterator[None]:
    """Gradients of outputs go to `found` while a batch [samples, tokens] runs backward."""

    def take(name: str, gradients: Tensor) -> None:
        # OPT hands all tokens of a batch to its last linears as one sequence
        found[name].update(gradients.reshape(*shape, -1))

    def see(name: str, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(take, name))

    handles = [
        module.get_submodule(name.removeprefix(f"{path}.")).register_forward_hook(partial(see, name)) for name in found
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
