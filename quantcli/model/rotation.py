"""Rotations of the residual stream and of attention heads, folded into the weights.

QuaRot, https://arxiv.org/abs/2404.00456, section 4; R1 and R2 of SpinQuant, https://arxiv.org/abs/2405.16406.

The float model stays the same function. R1: everything that the residual stream x consists of becomes x R. What writes
into it is multiplied by R on its outputs, and the gain w of each norm goes into the linears that read the norm:
norm(x) = x̂·diag(w) + b with x̂ the normalized stream, so that

    E ← E R;   writers W ← Rᵀ W, b ← b R;   norm w ← 1, b ← (b / w) R;   readers W ← W diag(w) R,

since an RMS norm gives (x R)^ = x̂ R for every orthogonal R, and LayerNorm, which also subtracts the mean, for every R
that keeps the all-ones direction. R2: the values of a head, v, become v R; attention mixes tokens, never the channels
of a head, so that the readers of its output take W ← W R on the columns of each head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.folding import Added, Change, Step, changed_by
from quantcli.model.structure import Linear, Norm, Structure, head_starts, rotatable_heads, rotation_obstacles
from quantcli.quant.orthogonal import Rotation

# Tensors are rotated a piece at a time: of 2 MB in float64, which stays in a core's cache (half the time of 32 MB).
PIECE_ELEMENTS = 1 << 18
_Turn = Callable[[Tensor], Tensor]  # float64 [m, k] → [m, k], each row by itself

_WITHOUT_STREAM = "Set smooth.rotation.hidden: false."
_WITHOUT_HEADS = "Set smooth.rotation.heads: false."


@dataclass(frozen=True)
class ModelRotation:
    """Which rotations a model gets: of the residual stream (`hidden`, R1), of the values of every attention head
    (`heads`, R2, blocks of `head_dim` channels), and the seed of both."""

    seed: int
    hidden: bool
    heads: bool
    head_dim: int | None = None


class Orthogonal(Protocol):
    """An orthogonal matrix R [size, size] by what it does: `apply(x)` is x R over the last dimension."""

    @property
    def size(self) -> int: ...

    def apply(self, x: Tensor) -> Tensor: ...


def rotation_changes(
    structure: Structure, rotation: ModelRotation, read: Callable[[str], Tensor]
) -> tuple[dict[str, Change], dict[str, Added]]:
    """What the rotations make of each parameter, by its name, and the parameters that they add: a head that was tied.

    `read` gives a parameter as it is stored; it is called for norms only, at once. After R1 the structure is
    `untied(structure)`. Changes compute in float64. The new norm biases (b/w)R stay norm biases, so that no linear
    needs one.

    Raises:
        ModelError: R1 is asked for and has an obstacle (`rotation_obstacles`), or a norm that adds a bias to a channel
            that it multiplies by 0; R2 is asked for and head_dim, or an attention output in whole heads, is not known.
    """
    heads = None
    if rotation.heads:
        if rotation.head_dim is None:
            raise ModelError(f"It is not known how many channels an attention head of {structure.architecture} has.",
                             _WITHOUT_HEADS)  # fmt: skip
        heads = Rotation(rotation.head_dim, rotation.seed)
    stream = stream_rotation(structure, rotation.seed) if rotation.hidden else None
    return changes_by(structure, stream, heads, read)


def stream_rotation(structure: Structure, seed: int) -> Rotation:
    """R1 for this model: one that keeps the all-ones direction if any of its norms subtracts the mean."""
    return Rotation(structure.width, seed, keeps_ones=any(norm.centred for norm in _norms(structure)))


def changes_by(
    structure: Structure, stream: Orthogonal | None, heads: Orthogonal | None, read: Callable[[str], Tensor]
) -> tuple[dict[str, Change], dict[str, Added]]:
    """`rotation_changes` by given matrices: `stream` for R1, `heads` for R2, None for neither.

    Where a norm subtracts the mean, `stream` has to keep the all-ones direction.
    """
    steps = _Steps()
    if stream is not None:
        _rotate_stream(structure, stream, read, steps)
    if heads is not None:
        _rotate_heads(structure, heads, steps)
    changes = {name: changed_by(own, torch.float64) for name, own in steps.items()}
    added = {}
    if stream is not None and structure.tied:
        head = f"{structure.head}.weight"
        added[head] = Added(structure.token_embeddings[0], changes.pop(head))
    return changes, added


def untied(structure: Structure) -> Structure:
    """The structure whose head has a weight of its own, as it has once R1 is applied."""
    if not structure.tied or structure.head is None:
        return structure
    weight = (structure.vocabulary, structure.width)
    return replace(structure, tied=False, parameters={**structure.parameters, f"{structure.head}.weight": weight})


class _Steps(dict[str, list[Step]]):
    """Steps of each parameter, in order, by its name."""

    def inputs(self, linear: Linear, turn: _Turn) -> None:
        """W ← the turn of its rows: every output's weights, over the input channels."""
        self._add(f"{linear.name}.weight", lambda w: _turn_rows(w.t() if linear.transposed else w, turn))

    def outputs(self, linear: Linear, turn: _Turn) -> None:
        """W and b ← the turn of their columns: over the output channels."""
        self._add(f"{linear.name}.weight", lambda w: _turn_rows(w if linear.transposed else w.t(), turn))
        if linear.bias:
            self.rows(f"{linear.name}.bias", turn)

    def rows(self, parameter: str, turn: _Turn) -> None:
        """A parameter [·, k] or [k] that is no linear's weight."""
        self._add(parameter, lambda p: _turn_rows(p if p.ndim > 1 else p.unsqueeze(0), turn))

    def _add(self, parameter: str, step: Step) -> None:
        self.setdefault(parameter, []).append(step)


def _rotate_stream(structure: Structure, stream: Orthogonal, read: Callable[[str], Tensor], steps: _Steps) -> None:
    obstacles = rotation_obstacles(structure)
    if obstacles:
        raise ModelError(f"The residual stream of {structure.architecture} cannot be rotated: {obstacles[0]}.",
                         _WITHOUT_STREAM)  # fmt: skip
    for embedding in structure.embeddings:
        steps.rows(embedding, stream.apply)
    for block in structure.blocks:
        linears = {linear.name: linear for linear in block.linears}
        assert block.residual is not None
        for norm in block.residual.norms:
            gain = _rotate_norm(norm, stream, read, steps)
            for shared in block.groups:
                for name in shared.linears if shared.is_output_of(norm) else ():
                    steps.inputs(linears[name], _scaled(gain, stream.apply))
        for name in block.writers:
            steps.outputs(linears[name], stream.apply)
    assert structure.final_norm is not None
    assert structure.head is not None
    gain = _rotate_norm(structure.final_norm, stream, read, steps)
    head = Linear(structure.head, structure.width, structure.vocabulary)
    steps.inputs(head, _scaled(gain, stream.apply))


def _rotate_norm(norm: Norm, stream: Orthogonal, read: Callable[[str], Tensor], steps: _Steps) -> Tensor:
    """The gain [C] float64 that the norm gives to its readers."""
    gain = read(f"{norm.name}.weight").double() + norm.weight_offset
    steps.rows(f"{norm.name}.weight", lambda weight: torch.full_like(weight, 1.0 - norm.weight_offset))
    if norm.bias:
        bias = read(f"{norm.name}.bias").double()
        # A channel that the norm leaves zero adds nothing, and takes part in no quotient.
        quotient = torch.where(bias == 0, 0.0, bias / gain)
        if not bool(torch.isfinite(quotient.float()).all()):
            raise ModelError(f"{norm.name} adds a bias to a channel that it multiplies by 0, which no rotation of its "
                             "input can keep.", _WITHOUT_STREAM)  # fmt: skip
        steps.rows(f"{norm.name}.bias", lambda _: stream.apply(quotient.unsqueeze(0)))
    return gain


def _rotate_heads(structure: Structure, heads: Orthogonal, steps: _Steps) -> None:
    found = rotatable_heads(structure, heads.size)
    if not found:
        raise ModelError(f"{structure.architecture} has no attention output in whole heads of {heads.size} channels.",
                         _WITHOUT_HEADS)  # fmt: skip
    linears = {linear.name: linear for linear in structure.linears()}
    for shared in found:
        assert shared.producer is not None
        steps.outputs(linears[shared.producer.name], _in_heads(heads, head_starts(shared, heads.size)))
        for name in shared.linears:
            steps.inputs(linears[name], _in_heads(heads, list(range(0, shared.width, heads.size))))


def _norms(structure: Structure) -> Iterator[Norm]:
    for block in structure.blocks:
        yield from block.residual.norms if block.residual else ()
    if structure.final_norm is not None:
        yield structure.final_norm


def _scaled(gain: Tensor, turn: _Turn) -> _Turn:
    return lambda rows: turn(rows * gain.to(rows.device))


def _in_heads(heads: Orthogonal, starts: list[int]) -> _Turn:
    def turn(rows: Tensor) -> Tensor:
        for start in starts:
            head = rows[:, start : start + heads.size]
            head.copy_(heads.apply(head))
        return rows

    return turn


def _turn_rows(matrix: Tensor, turn: _Turn) -> None:
    """matrix [m, k], a view of the parameter, ← the turn of each row, in float64."""
    for piece in matrix.split(max(1, PIECE_ELEMENTS // matrix.shape[1])):
        piece.copy_(turn(piece.to(torch.float64, memory_format=torch.contiguous_format)))
