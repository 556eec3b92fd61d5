"""Sections that name text: calibration sets, and what is evaluated."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from quantcli.recipe.fields import Count, Fraction, Length, Section, Text, refusal

NAMED_DATASETS = ("builtin", "wikitext2", "boolq", "text", "lines", "jsonl", "parquet")


def _known_dataset(name: str) -> str:
    if name in NAMED_DATASETS or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    raise refusal(
        "",
        f"{name!r} is no known dataset",
        f"Use one of {', '.join(NAMED_DATASETS)} or a hub name such as Salesforce/wikitext; "
        "a local file goes in `path`, with dataset text, lines, jsonl or parquet.",
    )


Dataset = Annotated[Text, AfterValidator(_known_dataset)]


def _check_source(section: CalibrationSection | MixSection | PerplexitySection, default_split: str) -> None:
    """Refuse path, field, split and subset where the dataset has no use for them."""
    dataset, on_hub = section.dataset, "/" in section.dataset
    if section.path is None and dataset in ("text", "lines", "jsonl", "parquet"):
        raise refusal("path", f"is missing, and dataset {dataset} reads a local file", "Name the file.")
    if section.path is not None and (dataset == "builtin" or on_hub):
        raise refusal(
            "path",
            f"is a local file, but dataset {dataset} is {'on the hub' if on_hub else 'part of quantcli'}",
            "Remove the path or use dataset text, lines, jsonl or parquet.",
        )
    if section.field is not None and dataset in ("builtin", "wikitext2", "boolq", "text", "lines"):
        raise refusal("field", f"names a column, and dataset {dataset} has none to choose", "Remove the key.")
    asks_hub = on_hub or (dataset in ("wikitext2", "boolq") and section.path is None)
    if section.split != default_split and not asks_hub:
        raise refusal("split", f"is for datasets on the hub; dataset {dataset} here has no splits", "Remove the key.")
    if section.subset is not None and not on_hub:
        raise refusal("subset", f"is for names on the hub, and dataset is {dataset}", "Remove the key.")


class _CalibrationSource(Section):
    """Where calibration text comes from."""

    dataset: Dataset = Field(
        default="builtin",
        description="builtin, wikitext2, boolq, text, lines, jsonl, parquet, or a hub name (Salesforce/wikitext).",
    )
    path: Text | None = Field(
        default=None, description="Local file or directory; without it wikitext2 and boolq ask the hub."
    )
    field: Text | None = Field(
        default=None, description="Column that holds the text or the messages, for jsonl, parquet and hub datasets."
    )
    split: Text = Field(default="train", description="Split of a hub dataset.")
    subset: Text | None = Field(default=None, description="Subset of a hub dataset that has several.")


class MixSection(_CalibrationSource):
    """One source of mixed calibration text."""

    share: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Weight among the sources; the weights need not add up to anything."
    )

    @model_validator(mode="after")
    def _check(self) -> MixSection:
        _check_source(self, "train")
        return self


_SOURCE_DEFAULTS = (("dataset", "builtin"), ("path", None), ("field", None), ("split", "train"), ("subset", None))


class CalibrationSection(_CalibrationSource):
    """The text on which activations are observed."""

    mix: Annotated[tuple[MixSection, ...], Field(strict=False)] = Field(
        default=(), description="Several sources in place of dataset, path, field, split and subset."
    )
    samples: Count = Field(default=64, description="Number of sequences.")
    sequence_length: Length = Field(default=512, description="Tokens in a sequence.")
    packing: Literal["auto", "packed", "line"] = Field(
        default="auto",
        description="packed joins texts and cuts full sequences; line takes one text a sequence; "
        "auto is line for prompts, packed for other text.",
    )
    bos: bool | None = Field(
        default=None,
        description="Start packed sequences with the BOS token; null does where the tokenizer starts texts with it.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="Seed of the choice of sequences.")
    expert_tokens: Count = Field(
        default=64, description="An expert that sees fewer tokens than these is quantized without them."
    )
    route_all_experts: bool = Field(
        default=False, description="Observe every token at every expert, not only at those that the router chooses."
    )
    drop_outliers: Annotated[Fraction, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="Share of sequences to drop, as 10% or 0.1: those whose output quantization changes most.",
    )

    @model_validator(mode="after")
    def _check(self) -> CalibrationSection:
        if not self.mix:
            _check_source(self, "train")
            return self
        for key, default in _SOURCE_DEFAULTS:
            if getattr(self, key) != default:
                raise refusal(key, "is replaced by mix, which names its sources itself", "Move it into an item of mix.")
        named = [source.model_dump(exclude={"share"}) for source in self.mix]
        for index, source in enumerate(named):
            if source in named[:index]:
                raise refusal(f"mix.{index}", "names the same text as an item before it", "Keep one, with both shares.")
        return self


class PerplexitySection(Section):
    """Perplexity of the float and of the exported model on the same text."""

    dataset: Dataset = Field(
        default="builtin",
        description="builtin, wikitext2, text, lines, jsonl, parquet, or a hub name such as Salesforce/wikitext.",
    )
    path: Text | None = Field(default=None, description="Local file or directory; without it wikitext2 asks the hub.")
    field: Text | None = Field(
        default=None, description="Column that holds the text or the messages, for jsonl, parquet and hub datasets."
    )
    split: Text = Field(default="test", description="Split of a hub dataset.")
    subset: Text | None = Field(default=None, description="Subset of a hub dataset that has several.")
    sequence_length: Length = Field(default=1024, description="Tokens in a window.")
    windows: Count | None = Field(default=40, description="At most this many windows; null takes the whole text.")
    protocol: Literal["standard", "golden-stick", "lm-eval"] = Field(
        default="standard", description="How text becomes windows and windows become one number."
    )
    stride: Count | None = Field(
        default=None,
        description="Protocol standard: tokens from the start of a window to that of the next; null for no overlap.",
    )
    bos: bool | None = Field(
        default=None,
        description="Protocol standard: start windows with the BOS token; null does where the tokenizer starts texts "
        "with it.",
    )
    batch_size: Count = Field(
        default=1,
        description="Protocol golden-stick: windows in a batch; the mean over batches of their means is taken.",
    )
    phase: Literal["prefill", "decode"] = Field(
        default="prefill", description="What of activations with scope mix is measured: their dynamic or static scales."
    )
    arithmetic: Literal["engine", "transformers", "vllm-cpu"] = Field(
        default="engine",
        description="How quantized inputs and caches are rounded: as serving engines do, as transformers does, or as "
        "vLLM on a CPU does, which rounds an fp8 cache towards zero; that is the default where the recipe has such a "
        "cache and export.engines is [vllm-cpu].",
    )

    @model_validator(mode="after")
    def _check(self) -> PerplexitySection:
        _check_source(self, "test")
        own = (("stride", "standard", None), ("bos", "standard", None), ("batch_size", "golden-stick", 1))
        for key, protocol, default in own:
            if self.protocol != protocol and getattr(self, key) != default:
                wrong = f"has no meaning in protocol {self.protocol}"
                raise refusal(key, wrong, f"Remove it, or set protocol: {protocol}.")
        if self.windows is not None and self.windows < self.batch_size:
            wrong = f"is {self.batch_size}, more than windows ({self.windows}), and a short last batch is dropped"
            raise refusal("batch_size", wrong, "Choose a smaller batch_size, or more windows.")
        if self.protocol == "golden-stick" and self.sequence_length < 3:
            wrong = "is 2, and windows of protocol golden-stick are a token shorter, which leaves none to predict"
            raise refusal("sequence_length", wrong, "Choose 3 or more.")
        return self
