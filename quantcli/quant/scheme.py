"""What happens to one linear layer, as plain data: needed to plan, long before torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Scheme:
    """Bits, grid and granularity of a linear's weights, and how its input is quantized.

    activations: `none` leaves the input in float; `static` has one calibrated int8 scale for the tensor; `dynamic` one
    for every token, found while serving.
    """

    bits: int
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    activations: Literal["none", "static", "dynamic"] = "none"
    activations_symmetric: bool = True

    @property
    def name(self) -> str:
        """The field's name, such as W4A16 g64, W4A16 g64 asym or W8A8 static."""
        parts = [f"W{self.bits}A{16 if self.activations == 'none' else 8}"]
        if self.activations != "none":
            parts.append(self.activations)
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if not self.symmetric:
            parts.append("asym")
        return " ".join(parts)

    def scale_dtype(self, model_dtype: str) -> str:
        """The dtype in which engines hold the scale: float32 beside int8 products, else the model's own."""
        if self.activations != "none" or model_dtype not in ("bfloat16", "float16"):
            return "float32"
        return model_dtype

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale of a weight [out, in]."""
        if self.granularity == "tensor":
            return (1, 1)
        return (out_features, in_features // self.group_size if self.group_size else 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
