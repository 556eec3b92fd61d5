"""Scales and shifts folded into the weights around an activation, so that the float model stays the same function.

With a scale s and a shift z a channel, linears that read x read x' = (x − z)/s instead. Whatever makes x gives away 1/s
and z (norm: w' = (w + o)/s − o, b' = (b − z)/s; linear: the rows and biases of its outputs likewise), and the linears
take them back: W' = W·diag(s), b' = b + W z. SmoothQuant, https://arxiv.org/abs/2211.10438, equation 3, for s;
Outlier Suppression+, https://arxiv.org/abs/2304.09145, equations 5 to 7, for z.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear, Producer, Structure

Change = Callable[[Tensor], Tensor]
"""A tensor as it is stored (linears of GPT-2: [in, out]) → the changed tensor in float32, or float64 if it was."""
Step = Callable[[Tensor], object]
"""Changes a float32 or float64 tensor in its place."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Scale s [C] > 0, and shift z [C] if any, of the input that `linears` share and `producer` makes.

    C is the width of that input. Input channels that are one output channel of the producer have one scale and shift.
    """

    producer: Producer
    linears: tuple[str, ...]
    scale: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class Added:
    """A tensor that a checkpoint lacks, of the dtype of tensor `origin`: of its shape and made from it; or, without a
    change, zeros of another shape, the bias that the architecture lacks and that is `parameter` of the model."""

    origin: str
    change: Change | None
    shape: tuple[int, ...] = ()
    parameter: str = ""


def fold_changes(
    structure: Structure, folds: Iterable[Fold], read: Callable[[str], Tensor] | None = None
) -> dict[str, Change]:
    """What the folds make of each parameter, by its name. Folds on one parameter compose in the order given.

    `read` gives a parameter as stored, for W z in the biases; only shifts need it. Raises ModelError, with the module,
    for a scale that does not fit, and for a shift where a bias that would take it does not exist.
    """
    linears = {linear.name: linear for linear in structure.matrices()}
    steps: dict[str, list[Step]] = {}
    for fold in folds:
        _check(fold, linears)
        _change_producer(fold, structure, linears, steps)
        for name in fold.linears:
            _change_consumer(fold, linears[name], steps, read)
    return {name: changed_by(own) for name, own in steps.items()}


def missing_biases(structure: Structure, folds: Iterable[Fold]) -> list[str]:
    """The biases that shifts go to and the structure lacks, by the names of their parameters."""
    owners = (name for fold in folds if fold.shift is not None for name in (fold.producer.name, *fold.linears))
    return list(dict.fromkeys(bias for name in owners if (bias := f"{name}.bias") not in structure.parameters))


def exact_shift(bias: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The shift [C] float32 that a bias stored in `dtype` gives away exactly with a scale: b − s · round((b − z)/s).

    bias: the norm's [C], shift: z [C], scale: s [C]. A channel whose bias `dtype` could not hold is not shifted.
    """
    stored = ((bias.double() - shift.double()) / scale.double()).to(dtype).double()
    exact = bias.double() - stored * scale.double()
    return torch.where(torch.isfinite(exact), exact, 0.0).float()


def exact_scale(weight: Tensor, scale: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The scale [C] float32 that a norm stored in `dtype` gives away exactly: (w + o) / (round((w + o)/s − o) + o).

    weight: the norm's [C], scale: s [C]. A channel whose gain would round to zero or change its sign has scale 1, for
    which nothing is rounded; one whose gain is zero keeps s, since it carries no input.
    """
    gain = weight.double() + offset
    stored = (gain / scale.double() - offset).to(dtype).double() + offset
    exact = gain / stored
    exact = torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0)
    return torch.where(gain == 0, scale.double(), exact).float()


class TransformedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are changed as they are read, one at a time.

    `changes` and `added` go by names of the checkpoint; entries tell the dtype that the file holds, although changed
    tensors are read in float32 or float64. Added tensors take the place of stored ones of the same name.
    """

    def __init__(
        self, checkpoint: Checkpoint, changes: Mapping[str, Change], added: Mapping[str, Added] | None = None
    ) -> None:
        own = dict(added or {})
        self.checkpoint = checkpoint
        self.directory = checkpoint.directory
        self.files = checkpoint.files
        self.entries = checkpoint.entries | {
            name: replace(entry, name=name, shape=tensor.shape or entry.shape)
            for name, tensor in own.items()
            if (entry := checkpoint.entries.get(tensor.origin)) is not None
        }
        self.added = {**added_tensors(checkpoint), **own}
        self._made: dict[str, tuple[str, Change | None]] = {name: (name, change) for name, change in changes.items()}
        self._made |= {name: (tensor.origin, tensor.change) for name, tensor in own.items()}
        for origin, _ in self._made.values():
            if origin not in checkpoint:
                raise ModelError(f"{self.directory}: tensor {origin} is missing.", "Download the checkpoint again.")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU: changed and added ones in float32 or float64, the others as stored."""
        wanted = list(names)
        tensors = self.checkpoint.read(name for name in wanted if name not in self._made)
        for name in wanted:
            if name in self._made:
                origin, change = self._made[name]
                if change is None:
                    wide = torch.float64 if self.entries[name].dtype == "F64" else torch.float32
                    tensors[name] = torch.zeros(self.entries[name].shape, dtype=wide)
                else:
                    tensors[name] = change(self.checkpoint.read([origin])[origin])
        return tensors


def added_tensors(checkpoint: Checkpoint) -> dict[str, Added]:
    """The tensors that a checkpoint has beside those of its files."""
    return checkpoint.added if isinstance(checkpoint, TransformedCheckpoint) else {}


def added_biases(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The biases among them that the architecture lacks, by the names that they have as parameters."""
    return tuple(tensor.parameter for tensor in added_tensors(checkpoint).values() if tensor.parameter)


def unties(checkpoint: Checkpoint) -> bool:
    """Whether an output head that was tied is among them."""
    return any(not tensor.parameter for tensor in added_tensors(checkpoint).values())


def changed_by(steps: Sequence[Step], between: torch.dtype = torch.float32) -> Change:
    """The steps, one after the other; where there are several, values have at least the dtype `between` in between."""

    def change(stored: Tensor) -> Tensor:
        result = torch.float64 if stored.dtype == torch.float64 else torch.float32
        wide = torch.promote_types(result, between) if len(steps) > 1 else result
        value = stored.to(wide, copy=True)  # the one copy that a large tensor needs
        for step in steps:
            step(value)
        return value.to(result)

    return change


def _check(fold: Fold, linears: Mapping[str, Linear]) -> None:
    where = f"The scale of what {fold.producer.name} puts out"
    for name in fold.linears:
        width = linears[name].in_features
        for vector in (fold.scale, fold.shift):
            if vector is not None and tuple(vector.shape) != (width,):
                raise ModelError(f"{where} has shape {tuple(vector.shape)}, and {name} reads {width} channels.",
                                 "It belongs to another model.")  # fmt: skip
    if not bool((torch.isfinite(fold.scale) & (fold.scale > 0)).all()):
        raise ModelError(f"{where} is not positive and finite.", "Find it again.")
    if fold.shift is not None and not bool(torch.isfinite(fold.shift).all()):
        raise ModelError(f"{where} has a shift that is not finite.", "Find it again.")


def _per_output(producer: Producer, vector: Tensor, width: int, neutral: float) -> Tensor:
    """A vector over input channels [C] as one over the producer's `width` output channels; `neutral` elsewhere."""
    channels = torch.tensor(producer.channels(len(vector)))
    if len(channels) != len(vector) or int(channels.max()) >= width:
        raise ModelError(f"{producer.name} puts out {width} channels, which are not the {len(vector)} of its readers.",
                         "Leave it unscaled.")  # fmt: skip
    outputs = torch.full((width,), neutral, dtype=vector.dtype)
    outputs[channels] = vector.cpu()
    if not torch.equal(outputs[channels], vector.cpu()):
        raise ModelError(f"Channels that are one output of {producer.name} have different scales or shifts.",
                         "Find them again.")  # fmt: skip
    return outputs


def _change_producer(
    fold: Fold, structure: Structure, linears: Mapping[str, Linear], steps: dict[str, list[Step]]
) -> None:
    producer = fold.producer
    weight, bias = f"{producer.name}.weight", f"{producer.name}.bias"
    if producer.kind == "norm":
        (width,) = structure.parameters[weight]
        has_bias = bias in structure.parameters
    else:
        width, has_bias = linears[producer.name].out_features, linears[producer.name].bias
    if fold.shift is not None and not has_bias:
        raise ModelError(f"{producer.name} has no bias that a shift of its output could go to.", _NO_SHIFT)
    scale = _per_output(producer, fold.scale, width, 1.0)
    shift = None if fold.shift is None else _per_output(producer, fold.shift, width, 0.0)
    if producer.kind == "norm":
        _add(steps, weight, _divide_gain(scale, producer.weight_offset))
    else:
        _add(steps, weight, _divide_rows(scale, linears[producer.name].transposed))
    if has_bias:
        _add(steps, bias, _shift_and_divide(scale, shift))


def _change_consumer(
    fold: Fold, linear: Linear, steps: dict[str, list[Step]], read: Callable[[str], Tensor] | None
) -> None:
    weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
    if fold.shift is not None:
        if not linear.bias:
            raise ModelError(f"{linear.name} has no bias that a shift of its input could go to.", _NO_SHIFT)
        if read is None:
            raise ValueError("a shift needs the weights that it is multiplied with")
        before = changed_by(tuple(steps.get(weight, ())))  # the columns without this fold, once
        _add(steps, bias, _add_product(lambda: before(read(weight)), fold.shift, linear.transposed))
    _add(steps, weight, _multiply_columns(fold.scale, linear.transposed))


_NO_SHIFT = "Choose a method that scales without shifting."


def _add(steps: dict[str, list[Step]], name: str, step: Step) -> None:
    steps.setdefault(name, []).append(step)


def _divide_gain(scale: Tensor, offset: float) -> Step:
    # (w + o)/s − o, so arranged that a channel of scale 1 stays as it is to the last bit
    return lambda weight: weight.add_(offset * (1 - scale.to(weight))).div_(scale.to(weight))


def _shift_and_divide(scale: Tensor, shift: Tensor | None) -> Step:
    return lambda bias: (bias if shift is None else bias.sub_(shift.to(bias))).div_(scale.to(bias))


def _divide_rows(scale: Tensor, transposed: bool) -> Step:
    return lambda weight: (weight if transposed else weight.t()).div_(scale.to(weight))


def _multiply_columns(scale: Tensor, transposed: bool) -> Step:
    return lambda weight: (weight.t() if transposed else weight).mul_(scale.to(weight))


def _add_product(weight: Callable[[], Tensor], shift: Tensor, transposed: bool) -> Step:
    def step(bias: Tensor) -> None:
        columns = weight().to(bias)
        bias.add_((columns.t() if transposed else columns) @ shift.to(bias))

    return step
