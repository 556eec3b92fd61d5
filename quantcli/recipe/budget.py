"""The section `quantize.target`: what the weights may take, and the schemes to share it out among."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from quantcli.recipe.fields import Count, Section, refusal, whole


class CandidateSection(Section):
    """A scheme that linears may get: keys of `quantize.weights` that differ from the recipe's own."""

    bits: (
        Annotated[Literal[16, 8, 4, 3, 2], BeforeValidator(whole, json_schema_input_type=Literal[16, 8, 4, 3, 2])]
        | None
    ) = Field(default=None, description="Bits of a weight code; 16 is float. Null is that of quantize.weights.")
    symmetric: bool | None = Field(default=None, description="Whether zero points are fixed at zero.")
    granularity: Literal["tensor", "channel", "group"] | None = Field(default=None, description="What shares a scale.")
    group_size: Count | None = Field(default=None, description="Inputs that share a scale.")

    @property
    def keys(self) -> dict[str, Any]:
        """The keys that are given."""
        return self.model_dump(exclude_none=True)

    @property
    def floats(self) -> bool:
        """Whether linears stay in float."""
        return self.bits == 16


def _float_words(value: object) -> object:
    """{bits: 16} for the word float in a list."""
    return [{"bits": 16} if item == "float" else item for item in value] if isinstance(value, list) else value


class BudgetSection(Section):
    """What the quantized weights may take, in one of two units, and the candidates."""

    bits_per_weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest mean of bits a weight, scales and zero points included."
    )
    size: Annotated[float, Field(gt=0)] | None = Field(default=None, description="Largest checkpoint in GB.")
    candidates: Annotated[
        tuple[CandidateSection, ...],
        Field(strict=False),
        BeforeValidator(_float_words, json_schema_input_type=list[CandidateSection | Literal["float"]]),
    ] = Field(
        default=(),
        description="Schemes to choose from, each as keys of quantize.weights that differ, or float; none given means "
        "8 and 4 bits, finer groups, float, and 3 bits where an engine serves them.",
    )

    @model_validator(mode="after")
    def _check(self) -> BudgetSection:
        given = [name for name in ("bits_per_weight", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            wrong = f"has {' and '.join(given)}" if given else "has no bound"
            raise refusal("", wrong, "Give one of bits_per_weight and size.")
        if len(self.candidates) == 1:
            raise refusal("candidates", "leaves nothing to choose with a single scheme", "Name two or more.")
        for index, candidate in enumerate(self.candidates):
            if candidate in self.candidates[:index]:
                raise refusal(f"candidates.{index}", "is there twice", "Name each once.")
            if candidate.floats and len(candidate.keys) > 1:
                raise refusal(f"candidates.{index}", "is float, beside keys of a grid", "Remove them.")
        return self
