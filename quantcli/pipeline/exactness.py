"""Checks that a fold or a rotation changes nothing, on a short batch in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.pipeline.context import Context

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.folding import Fold
    from quantcli.model.rotation import ModelRotation
    from quantcli.model.stream import BlockStream
    from quantcli.model.structure import Block

CHECKED_TOKENS = 64
"""Tokens of the first sample on which folds and rotations are checked in float32."""
TOLERANCE = 1e-4
"""Largest error of what a block adds to its input, relative, at which a fold in float32 counts as exact. A fold that is
wrong changes it by as much as its scales; rounding in float32 by about 1e-6."""
UNDECIDED = 1 / 16
"""Share of the tokens that may go to other experts than before: those whose choice was so close that rounding in
float32 decides it. A router that is wrong sends most tokens elsewhere."""


@dataclass(frozen=True)
class Passed:
    """What left a block [1, tokens, width], and the experts that each of its layers chose, in order, [tokens, k]."""

    hidden: Tensor
    chosen: tuple[Tensor, ...] = ()


def exact_streams(
    context: Context, checkpoint: Checkpoint, rotation: ModelRotation | None, tokens: Tensor
) -> tuple[list[BlockStream], list[Tensor]]:
    """A short batch through the model in float32, for checks, beside a rotated one also through the original; and what
    enters the first block of each."""
    from quantcli.model.stream import BlockStream

    sources: list[dict[str, Any]] = [{"checkpoint": checkpoint}] + [{"original": True}] * (rotation is not None)
    streams = [BlockStream(context.skeleton(dtype="float32", **source), [tokens]) for source in sources]
    return streams, [next(iter(list(stream.start()))) for stream in streams]


def check_outside(context: Context, exact: list[BlockStream], embedded: list[Tensor], rotation: ModelRotation) -> None:
    """Raise ModelError unless rotated embeddings are the original's, rotated, and the head makes the same of them."""
    import torch

    from quantcli.model.rotation import stream_rotation

    turn = stream_rotation(context.plan.structure, rotation.seed) if rotation.hidden else None
    pairs = [(embedded[0], embedded[1] if turn is None else turn.apply(embedded[1]))]
    logits = []
    for stream, hidden in zip(exact, embedded, strict=True):
        with stream.head():
            logits.append(torch.cat([piece for _, piece in stream.logits(hidden)], dim=1))
    for (found, expected), what in zip([*pairs, (logits[0], logits[1])], ("embedding", "output head"), strict=True):
        off = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if not off <= TOLERANCE:
            raise ModelError(f"Rotated, the {what} gives something else (by {off:.2g}).",
                             "Set smooth.rotation.hidden: false.")  # fmt: skip


def check_rotation(
    context: Context, index: int, exact: list[BlockStream], entering: Tensor, rotation: ModelRotation
) -> None:
    """Raise ModelError unless the rotated block puts out what the original does, rotated."""
    from quantcli.model.rotation import stream_rotation

    turn = stream_rotation(context.plan.structure, rotation.seed) if rotation.hidden else None
    entering = entering.float()
    straight = entering if turn is None else turn.apply_transposed(entering)
    with exact[0].block(index):
        after = passed(exact[0], index, entering)
    with exact[1].block(index):
        expected = passed(exact[1], index, straight)
    name = context.plan.structure.blocks[index].name
    if not expected.hidden.isfinite().all():
        raise ModelError(f"{name} puts out values that are not finite in float32, too.",
                         "The checkpoint is damaged; get it again.")  # fmt: skip
    if turn is not None:
        expected = replace(expected, hidden=turn.apply(expected.hidden))
    off = difference(after, expected, entering)
    if not off <= TOLERANCE:
        raise ModelError(f"Rotated, {name} computes something else "
                         f"(by {off:.2g} of what it adds).",
                         "Set smooth.rotation.hidden: false or smooth.rotation.heads: false.")  # fmt: skip


def passed(stream: BlockStream, index: int, entering: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Passed:
    """What the resident block makes of the stream's batch, with `parameters` in the place of its own if given."""
    import torch

    block = stream.skeleton.structure.blocks[index]
    with _choices(stream.skeleton.module(block.name), block) as chosen:
        if parameters is None:
            hidden = stream.run(index, 0, entering)
        else:
            hidden = stream.run_with(index, 0, entering, parameters, torch.float32)
    return Passed(hidden, tuple(chosen))


@contextmanager
def _choices(module: nn.Module, block: Block) -> Iterator[list[Tensor]]:
    """The experts that tokens are routed to while the body runs, layer by layer."""
    from quantcli.model.expert_loop import chosen_experts

    chosen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen.append(chosen_experts(args, kwargs).sort(-1).values)

    layers = [module.get_submodule(layer.name) for layer in block.local_experts if layer.linears]
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def difference(found: Passed, expected: Passed, entering: Tensor) -> float:
    """‖found − expected‖ / ‖expected − entering‖: against what the block adds, not against what passes through it.

    Up to UNDECIDED of the tokens are left out where they go to other experts.
    """
    import torch

    added = expected.hidden - entering.to(expected.hidden.device)
    off = found.hidden - expected.hidden
    if expected.chosen:
        pairs = zip(found.chosen, expected.chosen, strict=True)
        kept = torch.stack([(one == other).all(-1) for one, other in pairs]).all(0).view(added.shape[:-1])
        if int((~kept).sum()) <= UNDECIDED * kept.numel():
            added, off = added[kept], off[kept]
    return float(off.norm() / added.norm().clamp(min=1e-30))


def changed_parameters(
    exact: BlockStream, index: int, folds: Sequence[Fold], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """The parameters of the resident block in float32 with folds in them, those that join experts whole.

    `names` maps weights, of experts too, to tensors of the checkpoint.
    """
    from quantcli.model.experts import matrices
    from quantcli.model.folding import fold_changes

    skeleton = exact.skeleton
    stored = {source.tensors[0]: name for name, source in skeleton.sources.items() if source.converter is None}

    def held(parameter: str) -> Tensor:
        path, _, leaf = parameter.rpartition(".")
        value: nn.Parameter = getattr(skeleton.module(path), leaf)
        return value.detach()

    found: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        return parts[name] if name in parts else held(stored[names[name]]).cpu()

    changes = fold_changes(skeleton.structure, folds, read)
    for layer in skeleton.structure.blocks[index].experts:
        for parameter, joined in zip(layer.parameters, (layer.entering, layer.leaving), strict=True):
            if any(f"{name}.weight" in changes for name in joined):
                found[parameter] = held(parameter).clone()
        values = [found.get(name, held(name)) for name in layer.parameters]
        parts |= {f"{name}.weight": part for name, part in matrices(layer, values).items()}
    for name, change in changes.items():
        if name in parts:
            parts[name].copy_(change(parts[name]))
        else:
            found[stored[names[name]]] = change(read(name))
    return found
