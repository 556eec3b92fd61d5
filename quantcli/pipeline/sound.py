"""Whether the tensors of a checkpoint can be those of its model: shapes, scales and values, before they are used."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.formats.store import StoredLinear
    from quantcli.model.skeleton import Skeleton
    from quantcli.model.structure import Structure

_PIECE = 1 << 22
"""Values that are looked at together."""


def require_sound(
    structure: Structure, checkpoint: QuantizedCheckpoint, weights: Collection[str], *, trust_remote_code: bool
) -> None:
    """Raise ModelError unless codes, scales and all other tensors that the model has can be used; all are read."""
    for name in checkpoint.schemes:
        check_linear(checkpoint, name)
    check_others(structure, checkpoint, weights, trust_remote_code=trust_remote_code)


def check_linear(checkpoint: QuantizedCheckpoint, name: str) -> StoredLinear:
    """Codes and scales of a quantized linear. Raises ModelError for shapes that are not the model's, and for a scale
    that is zero or not finite."""
    stored, linear = checkpoint.read_linear(name), checkpoint.linears[name]
    if tuple(stored.weight.codes.shape) != (linear.out_features, linear.in_features):
        shape = tuple(stored.weight.codes.shape)
        raise ModelError(f"{checkpoint.directory}: {name}: codes have shape {shape}.", "Export it again.")
    for scale in (stored.weight.scale, stored.input_scale):
        if scale is not None:
            _check_usable(checkpoint, name, "a scale", scale)
    return stored


def check_others(
    structure: Structure, checkpoint: QuantizedCheckpoint, weights: Collection[str], *, trust_remote_code: bool
) -> Skeleton:
    """The skeleton that the checkpoint fills. Raises ModelError for scales of attention that cannot be used, and for
    tensors that the model lacks, that have other shapes than config.json says, or that are not finite."""
    from quantcli.model.skeleton import Skeleton

    for module in checkpoint.attention_modules:
        for part, scale in checkpoint.read_attention(module).items():
            _check_usable(checkpoint, module, part, scale, zeros="offset" in part)
    # by the names that transformers itself maps to parameters; one that has no source is missing
    skeleton = Skeleton(checkpoint.directory, structure, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    try:
        skeleton.check_shapes()
    except ModelError as error:
        raise ModelError(f"{checkpoint.directory}: {error.message}", error.remedy) from error
    for linear in structure.matrices():
        if linear.name not in weights and f"{linear.name}.weight" not in skeleton.sources:
            raise ModelError(f"{checkpoint.directory}: {linear.name} has no weight.", "Export it again.")
    in_model = {tensor for source in skeleton.sources.values() for tensor in source.tensors}
    for name in sorted(in_model - set(checkpoint.weights.values())):
        if not _is_finite(checkpoint.read([name])[name]):
            raise ModelError(f"{checkpoint.directory}: {name} holds values that are not finite: the file is damaged.",
                             "Copy or download it again.")  # fmt: skip
    return skeleton


def _check_usable(
    checkpoint: QuantizedCheckpoint, module: str, part: str, values: Tensor, *, zeros: bool = False
) -> None:
    values = values.float()
    usable = values.isfinite() if zeros else values.isfinite() & (values != 0)
    if not bool(usable.all()):
        how = "not finite" if zeros else "zero or not finite"
        raise ModelError(f"{checkpoint.directory}: {module}: {part} is {how}.",
                         "The file is damaged: copy it again, or quantize again.")  # fmt: skip


def _is_finite(tensor: Tensor) -> bool:
    """In pieces, since an embedding may be the largest tensor of a model."""
    if not tensor.is_floating_point():
        return True
    return all(bool(piece.float().isfinite().all()) for piece in tensor.reshape(-1).split(_PIECE))
