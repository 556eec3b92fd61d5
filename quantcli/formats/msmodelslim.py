"""Checkpoints that msModelSlim wrote, with the tensors of AscendV1 under the names of the model.

Its files differ from those of `formats.ascend` in two ways:

    static W8A8 of v1, W8A8S   have no weight_scale and weight_offset, since engines multiply by deq_scale:
                               weight_scale = deq_scale / input_scale, weight_offset = 0
    after m1 to m5             norms are wrapped: N.module.weight stands for N.weight, and N.bias is added, which is
                               zero unless channels were shifted
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPED = ".module.weight"
_DERIVED = ("weight_scale", "weight_offset")


class MsModelSlimCheckpoint(Checkpoint):
    """A checkpoint of AscendV1 or its older layout, whoever wrote it; `entries` and `read` have the names above.

    Raises ModelError, beside what `Checkpoint` raises, for a wrapped norm whose bias is not zero: the model has no
    place for it.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.stored = Checkpoint(directory)
        self._derived: dict[str, str] = {}
        self._renamed: dict[str, str] = {}
        for name, entry in self.stored.entries.items():
            if name.endswith(_WRAPPED):
                self._unwrap(name.removesuffix(_WRAPPED))
            elif name.endswith(".deq_scale"):
                self._derive(name.removesuffix(".deq_scale"), entry)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU; those that are derived in float32."""
        wanted = list(names)
        apart = self._derived.keys() | self._renamed.keys()
        found = super().read(name for name in wanted if name not in apart)
        for name in wanted:
            if name in self._renamed:
                (found[name],) = self.stored.read([self._renamed[name]]).values()
            elif name in self._derived:
                found[name] = self._weight_scale(self._derived[name]) if name.endswith("scale") else self._zeros(name)
        return found

    def _unwrap(self, norm: str) -> None:
        if f"{norm}.weight" in self.entries:
            return
        bias = f"{norm}.bias"
        if bias in self.stored:
            if bool(self.stored.read([bias])[bias].float().any()):
                raise ModelError(f"{self.directory}: {bias} shifts what the norm puts out, and the model has no such "
                                 "bias.", "Quantize again without a shift of channels.")  # fmt: skip
            del self.entries[bias]
        for suffix in ("weight", "bias"):  # a LayerNorm has a bias of its own inside
            inside, outside = f"{norm}.module.{suffix}", f"{norm}.{suffix}"
            if inside in self.entries:
                self.entries[outside] = self.entries.pop(inside)
                self._renamed[outside] = inside

    def _derive(self, linear: str, entry: TensorEntry) -> None:
        if f"{linear}.input_scale" not in self.stored or len(entry.shape) != 1:
            return
        for suffix in _DERIVED:
            name = f"{linear}.{suffix}"
            if name not in self.entries:
                self.entries[name] = TensorEntry(name, entry.file, (entry.shape[0], 1), "F32")
                self._derived[name] = linear

    def _weight_scale(self, linear: str) -> Tensor:
        """deq_scale / input_scale: float32 [n, 1]. Raises ModelError for scales that are not those of the format."""
        import torch

        names = f"{linear}.deq_scale", f"{linear}.input_scale"
        read = self.stored.read(names)
        deq_scale, input_scale = (read[name] for name in names)
        if deq_scale.dtype == torch.int64:  # the bits of a float32
            deq_scale = deq_scale.to(torch.int32).view(torch.float32)
        if deq_scale.dtype != torch.float32 or not input_scale.is_floating_point() or input_scale.numel() != 1:
            raise ModelError(f"{self.directory}: {linear}.weight_scale is missing, and does not follow from deq_scale "
                             f"{deq_scale.dtype} and input_scale {tuple(input_scale.shape)}.",
                             "Export it again.")  # fmt: skip
        return (deq_scale.double() / input_scale.double()).float().view(-1, 1)

    def _zeros(self, name: str) -> Tensor:
        import torch

        return torch.zeros(self.entries[name].shape)
