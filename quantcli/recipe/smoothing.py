"""The section `smooth`: outlier suppression before quantization, by scales folded into neighbours and by rotation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_serializer, field_validator, model_validator

from quantcli.recipe.aliases import with_aliases
from quantcli.recipe.fields import Count, Pattern, Section, refusal
from quantcli.recipe.quantization import ActivationsSection, QuantizeSection, WeightsSection

SmoothingMethod = Literal[
    "auto", "smoothquant", "outlier_suppression", "awq", "iterative", "cbq", "flex", "balance", "rotate"
]

NUMBERED: dict[str, SmoothingMethod] = {
    "m1": "smoothquant",
    "m2": "outlier_suppression",
    "m3": "awq",
    "m4": "iterative",
    "m5": "cbq",
    "m6": "flex",
}
"""msModelSlim's names of the methods."""

DEFAULT_ALPHA: dict[SmoothingMethod, float | None] = {"smoothquant": 0.5, "iterative": 0.9, "flex": None}
"""The methods that have an alpha; flex searches it."""
CLIPPING: tuple[SmoothingMethod, ...] = ("auto", "awq")
"""The methods that can search the clip of weights too."""
FEW_SAMPLES: dict[SmoothingMethod, int] = {"auto": 24, "balance": 16}
"""What these methods look at of the calibration samples: they find nothing better with all 64 of the default."""


def _method(value: object) -> object:
    return NUMBERED.get(value, value) if isinstance(value, str) else value


class RotationSection(Section):
    """Orthogonal changes of basis that the weights absorb."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="Seed of the signs of the rotations.")
    hidden: bool = Field(default=True, description="Rotate the residual stream (R1).")
    heads: bool = Field(default=True, description="Rotate each head of the values, from v to o (R2).")

    @model_validator(mode="after")
    def _check(self) -> RotationSection:
        if not (self.hidden or self.heads):
            raise refusal("", "rotates nothing", "Set hidden or heads true, or rotation: null.")
        return self


class SmoothSection(Section):
    """Outlier suppression: what is hard to quantize moves into weights, and the float model computes the same."""

    model_config = with_aliases("smooth")

    method: Annotated[
        SmoothingMethod,
        BeforeValidator(_method, json_schema_input_type=SmoothingMethod | Literal["m1", "m2", "m3", "m4", "m5", "m6"]),
    ] = Field(
        default="auto",
        description="How the scale of a channel is found; auto takes what measures best for each group of linears; "
        "rotate rotates and scales nothing. m1 to m6 are msModelSlim's names.",
    )
    alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        validate_default=True,
        description="Exponent of the activations; null is 0.5 for smoothquant, 0.9 for iterative, searched for flex.",
    )
    beta: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Exponent of the weights, method flex only; null is searched."
    )
    folds: Annotated[tuple[Literal["norm", "attention", "mlp"], ...], Field(strict=False, min_length=1)] | None = Field(
        default=None,
        description="What may absorb scales: norms; values before o (attention); up before down (mlp). "
        "Null is what the method takes.",
    )
    exclude: Annotated[tuple[Pattern, ...], Field(strict=False)] = Field(
        default=(),
        description="Names, globs, or regular expressions after re:, of linears and norms that stay as they are.",
    )
    shift: bool = Field(default=False, description="Also move the middle of each channel into biases.")
    clip: bool | None = Field(
        default=None,
        description="Methods awq and auto: also search the clip of the weights; null is true where weights alone are "
        "quantized, below 8 bits.",
    )
    rotation: RotationSection | None = Field(
        default=None, validate_default=True, description="Rotate before smoothing; {} for all of it."
    )
    samples: Count | None = Field(
        default=None,
        description="Calibration samples that smoothing looks at, spread evenly over all; null is "
        f"{FEW_SAMPLES['auto']} for method auto and {FEW_SAMPLES['balance']} for balance where no input has a static "
        "scale, and all otherwise.",
    )
    search_samples: Count = Field(
        default=8, description="Calibration samples whose inputs are kept for searches; auto judges on them alone."
    )
    search_tokens: Count = Field(default=512, description="Tokens of those samples that are used.")
    save_model: bool = Field(default=False, description="Write the smoothed float model as an ordinary checkpoint.")

    @field_validator("alpha")
    @classmethod
    def _default_alpha(cls, value: float | None, info: ValidationInfo) -> float | None:
        return DEFAULT_ALPHA.get(info.data["method"]) if value is None and "method" in info.data else value

    @field_validator("rotation")
    @classmethod
    def _default_rotation(cls, value: RotationSection | None, info: ValidationInfo) -> RotationSection | None:
        return RotationSection() if value is None and info.data.get("method") == "rotate" else value

    @field_serializer("alpha")
    def _given_alpha(self, value: float | None) -> float | None:
        """What the method takes by itself stays null, so that another method set over it takes its own."""
        return None if value == DEFAULT_ALPHA.get(self.method) else value

    @field_serializer("rotation")
    def _given_rotation(self, value: RotationSection | None) -> dict[str, Any] | None:
        default = self.method == "rotate" and value == RotationSection()
        return None if value is None or default else value.model_dump()

    @model_validator(mode="after")
    def _check(self) -> SmoothSection:
        if self.method == "rotate":
            for key in (
                "alpha",
                "beta",
                "folds",
                "exclude",
                "shift",
                "clip",
                "samples",
                "search_samples",
                "search_tokens",
            ):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise refusal(key, "has no effect on method rotate", "Remove it or choose another method.")
        if self.alpha is not None and self.method not in DEFAULT_ALPHA:
            raise refusal(
                "alpha",
                f"has no effect on method {self.method}",
                "Remove it or set method: smoothquant, iterative or flex.",
            )
        if self.beta is not None and self.method != "flex":
            raise refusal("beta", f"has no effect on method {self.method}", "Remove it or set method: flex.")
        if self.clip is not None and self.method not in CLIPPING:
            raise refusal("clip", f"has no effect on method {self.method}", "Remove it or set method: awq or auto.")
        if self.shift and self.method == "balance":
            raise refusal("shift", "has no effect on method balance", "Remove it or choose another method.")
        if self.folds is not None and len(set(self.folds)) < len(self.folds):
            raise refusal("folds", "names a kind twice", "Name each once.")
        return self

    @property
    def scales(self) -> bool:
        """Whether channels are scaled, by what calibration saw of them, and not rotated alone."""
        return self.method != "rotate"

    def looks_at(self, ranges: bool) -> int | None:
        """How many calibration samples are looked at; None for all. `ranges`: whether inputs have static scales, which
        a channel spoils for all others if its extreme is in a sample that was left out."""
        return FEW_SAMPLES.get(self.method) if self.samples is None and not ranges else self.samples

    @property
    def unties(self) -> bool:
        """Whether an output head that is tied to the embedding becomes a tensor of its own."""
        return self.rotation is not None and self.rotation.hidden

    def clips(self, weights: WeightsSection, activations: ActivationsSection) -> bool:
        """Whether the clip of weights that are quantized so is searched."""
        default = self.method in CLIPPING and activations.bits == 16 and weights.bits < 8
        return default if self.clip is None else self.clip

    def described(self) -> str:
        """One line: the method with its exponents, the rotation, and what is left as it is."""
        found = [
            f"{name} {value:g}" for name, value in (("alpha", self.alpha), ("beta", self.beta)) if value is not None
        ]
        searched = [name for name in ("alpha", "beta") if self.method == "flex" and getattr(self, name) is None]
        found += [f"{' and '.join(searched)} searched"] * bool(searched)
        found += ["with shift"] * self.shift
        parts = [self.method + (f" ({', '.join(found)})" if found else "")] if self.scales else []
        if self.folds is not None:
            parts.append(f"folds through {', '.join(self.folds)}")
        if self.rotation is not None:
            what = {"the residual stream": self.rotation.hidden, "the heads of the values": self.rotation.heads}
            parts.insert(0, f"rotation of {' and '.join(name for name, rotated in what.items() if rotated)}")
        if self.exclude:
            parts.append(f"not {', '.join(self.exclude)}")
        return "; ".join(parts)


def check_smoothing(smooth: SmoothSection, quantize: QuantizeSection, calibrated: bool) -> None:
    """Refuse smoothing that the rest of the recipe gives no sense or no data."""
    if not any(quantize.treatment(each) for each in (None, *quantize.overrides)):
        raise refusal("smooth", "is for linears that are quantized, and none is", "Remove the section.")
    if smooth.scales and not calibrated:
        raise refusal(
            "smooth.method",
            f"{smooth.method} needs calibration",
            "Add a section calibration: {} or set method: rotate.",
        )
