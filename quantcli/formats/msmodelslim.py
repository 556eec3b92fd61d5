"""Checkpoints that msModelSlim wrote, with all tensors of AscendV1.

Those of static W8A8 (its v1) and W8A8S have no weight_scale and weight_offset, since engines multiply by deq_scale:

    weight_scale = deq_scale / input_scale        weight_offset = 0

With mm_tensor, the default of its v0, a tensor has one scale, and weight_scale, weight_offset and deq_scale are [1].
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


class MsModelSlimCheckpoint(Checkpoint):
    """A checkpoint of AscendV1 or its older layout, whoever wrote it, with weight_scale and weight_offset, float32
    [n, 1], or [1] with one scale a tensor, of every linear that has deq_scale."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._derived: dict[str, str] = {}
        for name, entry in list(self.entries.items()):
            linear = name.removesuffix(".deq_scale")
            if linear == name or f"{linear}.input_scale" not in self.entries or len(entry.shape) != 1:
                continue
            channels, codes = entry.shape[0], self.entries.get(f"{linear}.weight")
            whole = channels == 1 and codes is not None and codes.shape[:1] != (1,)
            shape = (1,) if whole else (channels, 1)
            for missing in (f"{linear}.weight_scale", f"{linear}.weight_offset"):
                if missing not in self.entries:
                    self.entries[missing] = TensorEntry(missing, entry.file, shape, "F32")
                    self._derived[missing] = linear

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, in the dtype and shape that the file holds; those that are derived in float32.

        Raises ModelError for scales from which they do not follow.
        """
        import torch

        wanted = list(names)
        found = super().read(name for name in wanted if name not in self._derived)
        for name in wanted:
            if name in self._derived:
                scale = name.endswith("scale")
                found[name] = (
                    self._weight_scale(self._derived[name]).view(self.entries[name].shape)
                    if scale
                    else torch.zeros(self.entries[name].shape)
                )
        return found

    def _weight_scale(self, linear: str) -> Tensor:
        import torch

        names = f"{linear}.deq_scale", f"{linear}.input_scale"
        read = super().read(names)
        deq_scale, input_scale = (read[name] for name in names)
        if deq_scale.dtype == torch.int64:  # the bits of a float32
            deq_scale = deq_scale.to(torch.int32).view(torch.float32)
        if deq_scale.dtype != torch.float32 or not input_scale.is_floating_point() or input_scale.numel() != 1:
            raise ModelError(f"{self.directory}: {linear}.weight_scale is missing, and does not follow from deq_scale "
                             f"{deq_scale.dtype} and input_scale {tuple(input_scale.shape)}.",
                             "Export it again.")  # fmt: skip
        return (deq_scale.double() / input_scale.double()).float()
