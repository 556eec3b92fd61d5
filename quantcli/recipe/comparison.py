"""Sections that compare the exported with the float model other than by a score: outputs of linears, generated text,
speed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantcli.recipe.fields import Count, Length, Section, Size, Text


class OutputErrorSection(Section):
    """How far what each linear puts out is from what it puts out in float, for the report."""

    tokens: Length = Field(default=512, description="Tokens of the evaluation text, from its start.")


class GenerateSection(Section):
    """Text that the float and the exported model write, side by side, for the report."""

    prompts: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = Field(
        default=(
            "Why is the sky blue? Answer in one sentence.",
            "Write a Python function that returns the n-th Fibonacci number.",
            "The three largest cities of France are",
        ),
        description="What to answer or go on with; as a user's message where the tokenizer has a chat template.",
    )
    max_new_tokens: Count = Field(default=24, description="At most this many tokens are written to a prompt.")
    memory: Size = Field(
        default=1 << 30,
        description="A model whose weights, with keys and values, take more than this is run one block at a time.",
        json_schema_extra={"default": "1GiB"},
    )
    streamed: Size = Field(
        default=256 << 30,
        description="Block by block all weights are read for every token. Where that would be more than this in all, "
        "nothing is written.",
        json_schema_extra={"default": "256GiB"},
    )


class ThroughputSection(Section):
    """Speed and memory of the float and of the exported model in a serving engine, in one sitting."""

    engine: Literal["vllm"] = Field(default="vllm", description="The engine that serves both models.")
    python: Text | None = Field(
        default=None,
        description="The Python of an environment that has the engine; null is the one that runs quantcli.",
    )
    prompt_tokens: Length = Field(default=512, description="Tokens of each prompt.")
    new_tokens: Length = Field(default=64, description="Tokens that are generated behind each prompt.")
    batch: Count = Field(default=1, description="Prompts that are served together.")
    repeats: Count = Field(default=5, description="How often each process of the engine measures.")
    rounds: Count = Field(default=2, description="Processes of the engine for each model; the models take turns.")
    eager: bool = Field(
        default=False, description="Serve without compiling the model, which starts sooner and is slower."
    )
    timeout: Count = Field(
        default=3600,
        description="Seconds without a message of the engine after which it is ended: it says something of every "
        "shard that it loads and every time that it measures.",
    )
