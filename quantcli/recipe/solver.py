"""The sections `gptq`, `signround` and `distill` of `quantize`: how weights are found from what they meet."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from quantcli.recipe.fields import Count, Length, Section, refusal, whole

SOLVED_METHODS = ("gptq", "signround")


class GptqSection(Section):
    """GPTQ, its order of channels, its target, and what follows it."""

    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.01, description="Share of each channel's second moment that is added to it."
    )
    sweeps: Annotated[int, BeforeValidator(whole, json_schema_input_type=int), Field(ge=0, le=100)] = Field(
        default=2, description="How often scales are fitted to the codes, and codes changed one channel at a time."
    )
    shrink: bool = Field(
        default=True,
        description="Draw second moments of few tokens towards those of each channel alone.",
    )
    prefix: Literal["quantized", "float"] = Field(
        default="quantized", description="What a linear's inputs come from: the quantized linears before it, or float."
    )
    asymmetric: bool = Field(
        default=False,
        description="Aim at the outputs of the float model, whose inputs differ from those of the quantized one.",
    )
    output_samples: Length | None = Field(
        default=None,
        description="Calibration samples whose gradients tell how errors of outputs add up in the loss; null for none.",
    )
    compared: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of the calibration samples that the float model runs beside, for asymmetric and signround.",
    )

    @model_validator(mode="after")
    def _check(self) -> GptqSection:
        if self.asymmetric and self.prefix == "float":
            raise refusal("asymmetric", "has no effect on inputs of the float model", "Set prefix: quantized.")
        return self


class SignroundSection(Section):
    """Learned rounding, which starts from what GPTQ found."""

    iterations: Annotated[int, BeforeValidator(whole, json_schema_input_type=int), Field(ge=1, le=100_000)] = Field(
        default=20, description="Steps of a block, each on a batch of calibration samples."
    )
    check_every: Annotated[int, BeforeValidator(whole, json_schema_input_type=int), Field(ge=1, le=100_000)] = Field(
        default=5, description="Steps from one check on samples kept apart to the next; the best of them is kept."
    )
    patience: Count | None = Field(
        default=None, description="Checks in a row without a gain after which a block is done; null makes every step."
    )
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Time for all blocks together, an equal part for each; null for as long as it takes."
    )
    norm_rate: Annotated[float, Field(ge=0, le=0.1)] = Field(
        default=0.0, description="Largest step of a norm's weight or a bias, relative to it; 0 leaves them alone."
    )


def check_solvers(gptq: GptqSection, signround: SignroundSection, *, solves: bool, tunes: bool) -> None:
    """Refuse keys that mean nothing where no linear is quantized by such a method: `solves` says whether any is by one
    of them, `tunes` by signround."""
    for place, section, used, methods in (
        ("gptq", gptq, solves, "gptq or signround"),
        ("signround", signround, tunes, "signround"),
    ):
        for key, field in type(section).model_fields.items():
            if not used and getattr(section, key) != field.default:
                raise refusal(f"{place}.{key}", f"has no effect: no weights of method {methods}",
                              f"Set weights.method: {methods}, or remove it.")  # fmt: skip
    if gptq.compared != 1 and not (gptq.asymmetric or tunes):
        raise refusal("gptq.compared", "has no effect: the float model does not run beside",
                      "Set gptq.asymmetric: true, or remove it.")  # fmt: skip
    if gptq.prefix == "float" and tunes:
        raise refusal("gptq.prefix", "is float, and signround learns behind quantized linears",
                      "Set prefix: quantized, or weights.method: gptq.")  # fmt: skip


class DistillSection(Section):
    """Scales and norms tuned, behind quantization, until the whole model predicts what the float model does."""

    passes: Count = Field(default=1, description="How often the calibration samples are gone through.")
    scale_rate: Annotated[float, Field(ge=0, le=0.1)] = Field(
        default=0.0005, description="Largest step of a scale, relative to it; 0 leaves scales alone."
    )
    norm_rate: Annotated[float, Field(ge=0, le=0.1)] = Field(
        default=0.001, description="Largest step of a norm's weight or a bias, relative to it; 0 leaves them alone."
    )
    held_out: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.0625, description="Share of the samples that are kept apart, to see whether tuning helps."
    )

    @model_validator(mode="after")
    def _check(self) -> DistillSection:
        if not (self.scale_rate or self.norm_rate):
            raise refusal("", "tunes nothing", "Set scale_rate or norm_rate above 0.")
        return self
