"""What happens to a linear layer, and to keys, values and queries, as plain data: needed before torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

CodeType = Literal["int", "float"]
"""What codes are: signed integers, or 8-bit floats (float8_e4m3fn)."""


@dataclass(frozen=True)
class Scheme:
    """Bits, grid and granularity of a linear's weights, and how its input is quantized.

    type: what the codes are, of weights and of quantized inputs alike; floats have 8 bits and no zero points.
    activations: `none` leaves the input in float; `static` has one calibrated scale for the tensor; `dynamic` one
    for every token, found while serving; `mix` is dynamic for prompts and static for decoding (W8A8_MIX of Ascend).
    activations_symmetric: false gives a static scale its zero point, or with `dynamic` every token one of its own.
    activation_bits: 8, or 4 for dynamic inputs; without meaning for inputs in float.
    sparse: most codes are zero or small, for engines that compress them (W8A8S of Ascend); the arithmetic is the same.
    float16_scales: scales are values that float16 holds, for formats that store them so; the arithmetic is the same.
    ordered: inputs were put in groups in an order that the solver chose (desc_act of GPTQ checkpoints, with
    g_idx). Such checkpoints are read, not written; a read scale is [out, in], repeated for each input.
    """

    bits: int
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    activations: Literal["none", "static", "dynamic", "mix"] = "none"
    activations_symmetric: bool = True
    sparse: bool = False
    activation_bits: int = 8
    float16_scales: bool = False
    type: CodeType = "int"
    ordered: bool = False

    @property
    def observed(self) -> bool:
        """Whether the input has a static scale, which calibration finds."""
        return self.activations in ("static", "mix")

    @property
    def token_zero_points(self) -> bool:
        """Whether every token of the input has a zero point of its own. Prompts of `mix` have none."""
        return self.activations == "dynamic" and not self.activations_symmetric

    @property
    def int8_products(self) -> bool:
        """W8A8 with a scale a channel or tensor: int8 codes that engines multiply as they are stored. Other integer
        products, such as W4A8, have codes of fewer bits or scales of groups, and are stored packed."""
        whole = self.bits == self.activation_bits == 8 and self.granularity != "group"
        return self.type == "int" and self.activations != "none" and whole

    @property
    def name(self) -> str:
        """The field's name, such as W4A16 g64, W4A16 g64 asym, W8A8 static, W4A8 dynamic g64 or W8A8 fp8 static.

        `asym` is said of weights, and of dynamic inputs, beside which weights are symmetric.
        """
        inputs = 16 if self.activations == "none" else self.activation_bits
        parts = [f"W{self.bits}A{inputs}{'S' if self.sparse else ''}"]
        if self.type == "float":
            parts.append("fp8")
        if self.activations != "none":
            parts.append(self.activations)
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if not self.symmetric or self.token_zero_points:
            parts.append("asym")
        if self.ordered:
            parts.append("ordered")
        return " ".join(parts)

    def scale_dtype(self, model_dtype: str) -> str:
        """The dtype in which engines hold the scale: float32 for W8A8 products of either type, else the model's own.

        With `float16_scales` that of a float32 model is float16. Engines turn float16 scales into those of the model's
        dtype when they load, so those of a bfloat16 model stay bfloat16 values, of the size that both dtypes hold
        (`smallest_scale`).
        """
        if self.int8_products or (self.type == "float" and self.activations != "none"):
            return "float32"
        if model_dtype not in ("bfloat16", "float16"):
            return "float16" if self.float16_scales else "float32"
        return model_dtype

    def smallest_scale(self, model_dtype: str) -> float:
        """Scales of smaller magnitude become this one: 2^-17 where bfloat16 ones have to be float16 values, since
        float16 has steps of 2^-24 there, and so 8 bits; 0 elsewhere."""
        return 2.0**-17 if self.float16_scales and self.scale_dtype(model_dtype) == "bfloat16" else 0.0

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale of a weight [out, in]."""
        if self.granularity == "tensor":
            return (1, 1)
        return (out_features, in_features // self.group_size if self.group_size else 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scheme:
        """The inverse of `to_json`. Raises TypeError for entries and values that no scheme has."""
        return _checked(cls(**content))


@dataclass(frozen=True)
class AttentionScheme:
    """What is quantized inside attention; one choice for the whole model.

    kv: what the cache holds: the model's dtype, `int8` with a scale for each channel of keys and of values (C8), or
    `fp8` (e4m3) with one scale for keys and one for values. heads: queries, keys and values enter the products as int8
    with one symmetric scale a head (FA3).
    """

    kv: Literal["none", "int8", "fp8"] = "none"
    kv_symmetric: bool = True
    heads: bool = False

    @property
    def kind(self) -> Literal["none", "int8", "fp8", "heads"]:
        """What the scales belong to: a cache of a kind, or heads."""
        return "heads" if self.heads else self.kv

    @property
    def name(self) -> str:
        """The field's name: C8, C8 asym, KV fp8, FA int8; empty when nothing is quantized."""
        if self.heads:
            return "FA int8"
        if self.kv == "int8":
            return "C8" if self.kv_symmetric else "C8 asym"
        return "KV fp8" if self.kv == "fp8" else ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> AttentionScheme:
        """As `Scheme.from_json`."""
        return _checked(cls(**content))


Made = TypeVar("Made", Scheme, AttentionScheme)


def _checked(made: Made) -> Made:
    """A scheme whose values are of the types of its fields, and whose numbers are above 0."""
    for name, kind in get_type_hints(type(made)).items():
        value, choices = getattr(made, name), get_args(kind)  # of a union its types, of a Literal its values
        fits = value in choices or type(value) in choices if choices else type(value) is kind
        if not fits or (type(value) is int and value < 1):
            raise TypeError(f"{name} is {repr(value)[:100]}")
    return made
