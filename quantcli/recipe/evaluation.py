"""The section `evaluate`: what is measured on the exported model, and the bounds that it has to keep."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from quantcli.recipe.comparison import GenerateSection, OutputErrorSection, ThroughputSection
from quantcli.recipe.data import PerplexitySection
from quantcli.recipe.fields import Count, Fraction, Section, Share, Size, Text, null_is_default, refusal

HARNESS = "lm-eval/"
"""What names of lm-evaluation-harness's tasks begin with."""


class TaskSection(Section):
    """Questions with right answers, put to the float and to the exported model."""

    task: Text = Field(description="boolq, squad, or a task of lm-evaluation-harness as lm-eval/NAME.")
    path: Text | None = Field(
        default=None,
        description="Local file of boolq or squad, without which the hub is asked; of lm-eval a directory with tasks.",
    )
    limit: Count | None = Field(default=None, description="At most so many questions, from the start; null for all.")
    shots: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Answered examples before each question, of tasks of lm-evaluation-harness; null for as many as "
        "the task says.",
    )

    @model_validator(mode="after")
    def _check(self) -> TaskSection:
        if self.task not in ("boolq", "squad") and not self.task.removeprefix(HARNESS):
            raise refusal("task", "names no task of lm-evaluation-harness", "Write it as lm-eval/arc_easy.")
        if self.task not in ("boolq", "squad") and not self.task.startswith(HARNESS):
            known = "Use boolq, squad, or a task of lm-evaluation-harness as lm-eval/arc_easy."
            raise refusal("task", f"{self.task!r} is no known task", known)
        if self.shots and not self.task.startswith(HARNESS):
            raise refusal("shots", f"is for tasks of lm-evaluation-harness, and {self.task} has none", "Remove it.")
        return self


_Bound = Annotated[int, Field(ge=0)] | None


def _tasks(value: object) -> object:
    """A name alone stands for a task with the defaults."""
    if isinstance(value, (list, tuple)):
        return [{"task": each} if isinstance(each, str) else each for each in value]
    return value


class FallbacksSection(Section):
    """How many fallbacks of each kind a run may take; null sets no bound."""

    all: _Bound = Field(default=None, description="Fallbacks of all kinds together.")
    data_free_experts: _Bound = Field(
        default=None, description="Experts that saw too few tokens and were quantized without them."
    )
    extra_damping: _Bound = Field(
        default=None, description="Hessians that factored only with more damping than the recipe says."
    )
    not_smoothed: _Bound = Field(
        default=None,
        description="Groups of linears that were not smoothed or not shifted, because it failed its check or the model "
        "has no place for it.",
    )
    not_rotated: _Bound = Field(default=None, description="Blocks in which the values of attention were not rotated.")
    unreached: _Bound = Field(
        default=None, description="Linears that stay in float because no input reaches them in calibration."
    )
    smaller_groups: _Bound = Field(
        default=None, description="Linears with smaller groups than the recipe names, since those do not divide."
    )
    not_tuned: _Bound = Field(
        default=None,
        description="Asymmetric calibration and distillation without effect, and signround without samples kept apart.",
    )
    missed_target: _Bound = Field(default=None, description="Searches that did not reach their target.")
    constant_inputs: _Bound = Field(
        default=None, description="Inputs of linears that were zero, or whose channels never varied, in calibration."
    )
    zero_channels: _Bound = Field(default=None, description="Linears with output channels of zeros alone.")
    insane_model: _Bound = Field(default=None, description="Signs that the float model is broken, passed over.")


class GatesSection(Section):
    """Bounds that the quantized model must keep, or the run fails."""

    perplexity_increase: Fraction | None = Field(
        default=None, description="Largest relative increase of perplexity over the float model, as 2% or 0.02."
    )
    kl_divergence: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Largest mean Kullback-Leibler divergence from the float model, in nats a token."
    )

    agreement: Share | None = Field(
        default=None, description="Least share of tokens where both models have the same first choice, as 95% or 0.95."
    )
    task_drop: Fraction | None = Field(
        default=None, description="Largest drop of any metric of any task, by any filter, in points, as 1% or 0.01."
    )
    bits_per_weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest mean number of bits of a quantized weight, scales and zero points included."
    )
    size: Size | None = Field(default=None, description="Largest size of the checkpoint's weights, as 500MB or 4GiB.")
    size_ratio: Share | None = Field(
        default=None, description="Largest size of the checkpoint's weights as a part of the float model's, as 55%."
    )
    fallbacks: Annotated[FallbacksSection, BeforeValidator(null_is_default)] = Field(
        default=FallbacksSection(), description="Fallbacks that the run may take at most, by kind."
    )


class EvaluateSection(Section):
    """What is measured on the exported model."""

    perplexity: PerplexitySection | None = Field(default=None, description="Measure perplexity; {} for the defaults.")
    tasks: Annotated[tuple[TaskSection, ...], BeforeValidator(_tasks), Field(strict=False)] = Field(
        default=(), description="Tasks to measure: names, or sections with a path and a limit."
    )
    reference: Text | None = Field(
        default=None,
        description="A run directory whose results of the float model are taken over where they fit; null looks at the "
        "directories beside the output.",
    )
    reference_size: Size = Field(
        default=8 << 30,
        description="Hidden states of the float model that are kept in the run directory at most, as 8GiB.",
        json_schema_extra={"default": "8GiB"},
    )
    output_error: OutputErrorSection | None = Field(
        default=OutputErrorSection(), description="Measure the output error of each linear; null leaves it out."
    )
    generate: GenerateSection | None = Field(
        default=GenerateSection(), description="Let both models write a little text; null leaves it out."
    )
    throughput: ThroughputSection | None = Field(
        default=None, description="Measure speed and memory of both models in a serving engine; {} for the defaults."
    )
    gates: GatesSection | None = Field(
        default=None, description="Quality bounds; a miss ends the run with exit status 4."
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluateSection:
        gates = self.gates
        if gates is not None and self.perplexity is not None and not gates.model_fields_set:
            raise refusal("gates", "sets no bound", "Give it one, as gates: {perplexity_increase: 2%}, or remove it.")
        measured = ("perplexity_increase", "kl_divergence", "agreement")
        if gates is not None and self.perplexity is None:
            asked = [key for key in measured if getattr(gates, key) is not None]
            if asked or gates == GatesSection():
                key = "gates" + "".join(f".{name}" for name in asked[:1])
                raise refusal(key, "judges nothing without evaluate.perplexity", "Add perplexity: {} or remove it.")
        if gates is not None and gates.task_drop is not None and not self.tasks:
            raise refusal("gates.task_drop", "judges nothing without evaluate.tasks", "Add tasks or remove it.")
        if self.perplexity is None and not self.tasks and gates is None and self.throughput is None:
            raise refusal("", "asks for no measurement", "Add perplexity: {} to it, or set evaluate: null.")
        names = [task.task for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise refusal(f"tasks.{index}.task", f"names {name} twice", "Keep one.")
        return self
