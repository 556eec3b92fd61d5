"""The section `quantize.gptq`: how weights are found from the second moments of their inputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from quantcli.recipe.fields import Section, refusal, whole

SOLVED_METHODS = ("gptq",)


class GptqSection(Section):
    """GPTQ, its order of channels, its target, and what follows it."""

    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.01, description="Share of each channel's second moment that is added to it."
    )
    sweeps: Annotated[int, BeforeValidator(whole, json_schema_input_type=int), Field(ge=0, le=100)] = Field(
        default=2, description="How often scales are fitted to the codes, and codes changed one channel at a time."
    )
    prefix: Literal["quantized", "float"] = Field(
        default="quantized", description="What a linear's inputs come from: the quantized linears before it, or float."
    )
    asymmetric: bool = Field(
        default=False,
        description="Aim at the outputs of the float model, whose inputs differ from those of the quantized one.",
    )
    asymmetric_damping: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.05, description="As damping, for the step from the weights to that aim."
    )
    asymmetric_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of the calibration samples that the float model runs for that aim."
    )

    @model_validator(mode="after")
    def _check(self) -> GptqSection:
        if self.asymmetric and self.prefix == "float":
            raise refusal("asymmetric", "has no effect on inputs of the float model", "Set prefix: quantized.")
        for key in ("asymmetric_damping", "asymmetric_share"):
            if not self.asymmetric and getattr(self, key) != type(self).model_fields[key].default:
                raise refusal(key, "has no effect without asymmetric", "Set asymmetric: true.")
        return self
