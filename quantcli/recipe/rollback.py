"""The section `rollback` of `quantize`: linears that stay in float, or get another scheme."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from quantcli.recipe.aliases import with_aliases
from quantcli.recipe.fields import Count, Fraction, Pattern, SchemeName, Section, refusal


class TargetSection(Section):
    """What an automatic rollback has to reach; one of the three bounds."""

    perplexity_increase: Fraction | None = Field(
        default=None, description="Largest relative increase of perplexity over the float model, as 1% or 0.01."
    )
    kl_divergence: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest mean Kullback-Leibler divergence from the float model, in nats a token."
    )
    size: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest checkpoint in GB; as many sensitive linears are rolled back as fit."
    )
    windows: Count = Field(default=8, description="Windows of evaluate.perplexity that trials are measured on.")
    evaluations: Annotated[int, Field(ge=2, le=2**31 - 1)] = Field(default=60, description="At most so many trials.")

    @model_validator(mode="after")
    def _check(self) -> TargetSection:
        given = [name for name in ("perplexity_increase", "kl_divergence", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            wrong = f"has {' and '.join(given)}" if given else "has no bound"
            raise refusal("", wrong, "Give one of perplexity_increase, kl_divergence and size.")
        return self


def _level(value: object) -> object:
    """'L5' or 5 as 5."""
    if isinstance(value, str) and re.fullmatch(r"L(0|[1-9][0-9]{0,8})", value):
        return int(value[1:])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return value
    raise refusal("", f"is {value!r}", "Write L5 or 5 for the five most sensitive linears, L0 for none.")


class RollbackSection(Section):
    """Linears that stay in float."""

    model_config = with_aliases("quantize", "rollback")

    # Recipes write a list; the tuple keeps the section unchangeable.
    names: Annotated[tuple[Pattern, ...], Field(strict=False)] = Field(
        default=(),
        description="Names, globs, or regular expressions after re:, of linears that are rolled back.",
    )
    level: Annotated[int, BeforeValidator(_level, json_schema_input_type=int | str)] = Field(
        default=0, description="L5 or 5 rolls back the five most sensitive linears besides."
    )
    metric: Literal["range_parm", "kurtosis", "quantile", "output_error", "block_error", "kl_divergence"] | None = (
        Field(
            default=None,
            description="What sensitivity is measured by; null is range_parm for level, kl_divergence for target.",
        )
    )
    target: TargetSection | None = Field(
        default=None, description="Search the fewest linears to roll back that meet a bound, measuring the model."
    )
    to: SchemeName = Field(default="float", description="What a rolled-back linear becomes: float, or another scheme.")
    last_linear: bool | None = Field(
        default=None,
        description="true and null keep the output head in float, false quantizes it too; one that is tied to the "
        "embedding always stays in float.",
    )
    siblings: Literal["together", "apart"] = Field(
        default="together",
        description="Whether linears that engines fuse (q, k, v; gate, up) are rolled back together.",
    )

    @model_validator(mode="after")
    def _check(self) -> RollbackSection:
        if self.target is not None and self.level:
            raise refusal("level", "is given beside a target, which finds the number itself", "Remove one of them.")
        return self

    @property
    def ranks(self) -> bool:
        """Whether linears have to be ranked by their sensitivity."""
        return self.level > 0 or self.target is not None

    @property
    def ranked_by(self) -> str:
        """The metric that counts."""
        return self.metric or ("kl_divergence" if self.target is not None else "range_parm")
