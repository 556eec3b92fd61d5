"""How linears are tried before they are quantized: what stands for those that are solved block by block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from quantcli.pipeline.context import Context
from quantcli.pipeline.plan import Plan, PlannedLinear
from quantcli.recipe.quantization import WeightsSection, named_scheme


def trial_weights(weights: WeightsSection) -> WeightsSection:
    """How weights are tried: by their own method; what is solved block by block by `mse` under second moments."""
    if not weights.solves:
        return weights
    return weights.model_copy(update={"method": "mse", "importance": "second_moment"})


def tried(context: Context, plan: Plan | None = None, names: Collection[str] | None = None) -> Context:
    """The context in which linears have what they are tried by, of another `plan` and only of `names` if given."""
    plan = context.plan if plan is None else plan

    def of(planned: PlannedLinear) -> PlannedLinear:
        treatment = planned.treatment
        if treatment is None:
            return planned
        return replace(planned, treatment=replace(treatment, weights=trial_weights(treatment.weights)))

    linears = tuple(of(each) for each in plan.linears if names is None or each.linear.name in names)
    return replace(context, plan=replace(plan, linears=linears))


def weighed(context: Context, name: str) -> bool:
    """Whether errors of a linear's weights are weighed by second moments: as planned or, where linears are ranked, in
    trials, of what it may become among others."""
    treatment = context.plan.treatments.get(name)
    if treatment is None:
        return False
    sections = [treatment.weights]
    if context.ranks:
        other = named_scheme(context.recipe.quantize.rollback.to)
        sections = [trial_weights(treatment.weights), *(() if other is None else other[:1])]
    return any(section.weighed(calibrated=True) for section in sections)
