"""What the sections of a recipe are made of: common types, and refusals in the words of the recipe."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic_core import PydanticCustomError, PydanticKnownError

from quantcli.errors import RecipeError


def refusal(key: str, wrong: str, remedy: str) -> PydanticCustomError:
    """An error about `key` (dotted, relative to the section whose validator raises it), for the loader to place."""
    # Braces of the user's text would otherwise be read as fields of the message template.
    return PydanticCustomError("recipe", "{wrong}", {"key": key, "wrong": wrong, "remedy": remedy})


def null_is_default(value: object) -> object:
    return {} if value is None else value


def fraction_of(value: object) -> object:
    """'2%' or 0.02 as the fraction 0.02."""
    fraction, remedy = math.nan, "Write it as 2% or 0.02."
    if isinstance(value, str):
        percent = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*%\s*", value)
        # Decimal keeps '2%' equal to 0.02, which 2 * 0.01 in binary is not for every number.
        fraction = float(Decimal(percent[1]) / 100) if percent else math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        # A bare 2 means 2% to most people and 200% to arithmetic; such a gate would never fail.
        fraction = value if 0 <= value < 1 else math.nan
        if 1 <= value <= 1000:
            remedy = f"Write it as {value:g}% or {value / 100:g}."
    if not math.isfinite(fraction):
        raise refusal("", f"{value!r} is no fraction", remedy)
    return float(fraction)


def share_of(value: object) -> object:
    """`fraction_of` something of which all is meant by a bare 1."""
    if type(value) in (int, float) and value == 1:
        raise refusal("", f"{value!r} is no fraction", "Write it as 100%.")
    return fraction_of(value)


def as_percent(value: float) -> str:
    """A fraction as a recipe writes it: a percentage, because a bare number of 1 or more is refused on reading."""
    digits = format(Decimal(repr(value)) * 100, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + "%"


_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for base, suffix in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate("kMGT" if suffix == "B" else "KMGT", 1)
}


def size_of(value: object) -> object:
    """'1GiB' or '500 MB' as bytes. A bare number has no unit, and is refused."""
    written = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(\w+)\s*", value) if isinstance(value, str) else None
    unit = next((size for name, size in _UNITS.items() if written and name.lower() == written[2].lower()), None)
    if written is None or unit is None:
        raise refusal("", f"{value!r} is no size", "Write it with its unit, as 1GiB or 500MB.")
    return int(Decimal(written[1]) * unit)


def size_option(option: str, written: str) -> int:
    """Bytes of a size that an option of the command line has. Raises RecipeError for what is none, and for nothing."""
    try:
        size = size_of(written)
    except PydanticCustomError as error:
        context = error.context or {}
        raise RecipeError(f"{option}: {context['wrong']}.", context["remedy"]) from None
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"{option}: {written!r} is no room for a tensor.", "Write a size above 0, as 500MB.")
    return size


def as_size(value: int) -> str:
    """Bytes as a recipe writes them, exactly, in the largest unit of which they are a whole number."""
    name, unit = max(
        ((n, u) for n, u in _UNITS.items() if value and value % u == 0), key=lambda n: n[1], default=("B", 1)
    )
    return f"{value // unit}{name}"


Fraction = Annotated[
    float, BeforeValidator(fraction_of, json_schema_input_type=float | str), PlainSerializer(as_percent)
]
"""A share, which may be written as a percentage."""
Share = Annotated[float, BeforeValidator(share_of, json_schema_input_type=float | str), PlainSerializer(as_percent)]
"""One that may well be all."""
Size = Annotated[int, BeforeValidator(size_of, json_schema_input_type=str), PlainSerializer(as_size)]
"""Bytes, written with their unit."""


def whole(value: object) -> object:
    # Literal compares by ==, and True == 1, 8.0 == 8.
    if type(value) is not int:
        raise PydanticKnownError("int_type")
    return value


def pattern(name: str) -> str:
    if name.startswith("re:"):
        try:
            re.compile(name[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise refusal("", f"{name!r} is no regular expression ({error})", "Mend it or use a glob.") from None
    return name


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Length = Annotated[int, Field(gt=1, le=2**31 - 1)]
Pattern = Annotated[Text, AfterValidator(pattern)]
SchemeName = Literal["float", "W8A16", "W8A8", "W8A8-dynamic", "W8A8-mix", "W4A16", "W4A8", "W4A4",
                     "W8A8-fp8", "W8A8-fp8-static", "W8A16-fp8"]  # fmt: skip
"""Schemes that have a name in a recipe."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, no type is converted, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


_USED_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "group_size": ("granularity", ("group",)),
    "importance": ("method", ("mse",)),
    "fraction": ("method", ("co_sparse", "low_bit")),
    "sigma_factor": ("method", ("low_bit_sigma",)),
    "aggregation": ("method", ("minmax",)),
    "percentile": ("method", ("percentile",)),
    "quantized_share": ("propagation", ("quantized",)),
}
"""Key of weights or activations → another key, and the values of that with which it has an effect."""


def taken_over(base: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Those of the keys of `base` that an override by `keys` leaves something to do."""
    idle = {key for key, (other, values) in _USED_WITH.items() if other in keys and keys[other] not in values}
    return {key: value for key, value in base.items() if key not in idle}
