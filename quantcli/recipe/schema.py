"""What a recipe may say: every key with its type, its default and its meaning, and which keys exclude each other."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

DEFAULT_GROUP_SIZE = 128
NAMED_DATASETS = ("builtin", "wikitext2", "text", "jsonl", "parquet")

# Written in the recipe as the older name on the left; read as the name on the right.
ALIASES: dict[tuple[str, ...], str] = {("quantize", "rollback", "disable_names"): "names"}


def refusal(key: str, wrong: str, remedy: str) -> PydanticCustomError:
    """An error about `key` (dotted, relative to the section whose validator raises it), for the loader to place."""
    # Braces of the user's text would otherwise be read as fields of the message template.
    return PydanticCustomError("recipe", "{wrong}", {"key": key, "wrong": wrong, "remedy": remedy})


def _null_is_default(value: object) -> object:
    return {} if value is None else value


def _known_dataset(name: str) -> str:
    if name in NAMED_DATASETS or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return name
    raise refusal(
        "",
        f"{name!r} is no known dataset",
        f"Use one of {', '.join(NAMED_DATASETS)} or a hub name such as Salesforce/wikitext; "
        "a local file goes in `path`, with dataset text, jsonl or parquet.",
    )


def _fraction(value: object) -> object:
    """'2%' or 0.02 as the fraction 0.02."""
    if value is None:
        return None
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
        raise refusal("", f"{value!r} is no bound on the increase", remedy)
    return float(fraction)


def _whole(value: object) -> object:
    # Literal compares by ==, and True == 1, 8.0 == 8.
    if type(value) is not int:
        raise PydanticKnownError("int_type")
    return value


def _pattern(name: str) -> str:
    if name.startswith("re:"):
        try:
            re.compile(name[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise refusal("", f"{name!r} is no regular expression ({error})", "Mend it or use a glob.") from None
    return name


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Length = Annotated[int, Field(gt=1, le=2**31 - 1)]
Dataset = Annotated[Text, AfterValidator(_known_dataset)]
Pattern = Annotated[Text, AfterValidator(_pattern)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, no type is converted, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(Section):
    """The model to quantize."""

    path: Text = Field(description="Model directory, .gguf file or hub name (org/name). --model sets it.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Data type of the float model; auto takes the checkpoint's own."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:[0-9]+)?)$")] = Field(
        default="auto", description="Where to compute: auto, cpu, cuda, cuda:N, npu or npu:N. --device sets it."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the checkpoint.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a hub model; null takes the newest."
    )
    sanity_check: Literal["stop", "warn", "off"] = Field(
        default="stop",
        description="What to do when the float model predicts no better than chance: stop, warn, or off.",
    )

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if self.revision is not None and (self.path.startswith("/") or self.path.endswith(".gguf")):
            raise refusal("revision", f"there are no revisions of the local model {self.path}", "Remove the key.")
        return self


def _check_source(section: CalibrationSection | PerplexitySection, default_split: str) -> None:
    """Refuse path, field and split where the dataset has no use for them."""
    dataset, on_hub = section.dataset, "/" in section.dataset
    if section.path is None and dataset in ("text", "jsonl", "parquet"):
        raise refusal("path", f"is missing, and dataset {dataset} reads a local file", "Name the file.")
    if section.path is not None and (dataset == "builtin" or on_hub):
        raise refusal(
            "path",
            f"is a local file, but dataset {dataset} is {'on the hub' if on_hub else 'part of quantcli'}",
            "Remove the path or use dataset text, jsonl or parquet.",
        )
    if section.field is not None and dataset in ("builtin", "wikitext2", "text"):
        raise refusal("field", f"names a column, and dataset {dataset} has none to choose", "Remove the key.")
    if section.split != default_split and not on_hub and (dataset != "wikitext2" or section.path is not None):
        raise refusal("split", f"is for datasets on the hub; dataset {dataset} here has no splits", "Remove the key.")


class CalibrationSection(Section):
    """The text on which activations are observed."""

    dataset: Dataset = Field(
        default="builtin",
        description="builtin, wikitext2, text, jsonl, parquet, or a hub name such as Salesforce/wikitext.",
    )
    path: Text | None = Field(default=None, description="Local file or directory; without it wikitext2 asks the hub.")
    field: Text | None = Field(
        default=None, description="Column that holds the text, for jsonl, parquet and hub datasets."
    )
    split: Text = Field(default="train", description="Split of a hub dataset.")
    samples: Count = Field(default=64, description="Number of sequences.")
    sequence_length: Length = Field(default=512, description="Tokens in a sequence.")
    packing: Literal["packed", "line"] = Field(
        default="packed", description="packed joins texts and cuts full sequences; line takes one text a sequence."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="Seed of the choice of sequences.")

    @model_validator(mode="after")
    def _check(self) -> CalibrationSection:
        _check_source(self, "train")
        return self


class WeightsSection(Section):
    """The integer grid of the weights and how their scales are chosen."""

    bits: Annotated[Literal[8, 4, 3, 2], BeforeValidator(_whole, json_schema_input_type=Literal[8, 4, 3, 2])] = Field(
        default=8, description="Bits of a weight code."
    )
    symmetric: bool = Field(
        default=True, description="Zero point fixed at zero; false stores a zero point with each scale."
    )
    granularity: Literal["tensor", "channel", "group"] = Field(
        default="channel",
        description="One scale a tensor, an output channel, or a group of inputs of an output channel.",
    )
    group_size: Count | None = Field(
        default=None,
        validate_default=True,
        description=f"Inputs that share a scale, with granularity group only; {DEFAULT_GROUP_SIZE} there by default.",
    )
    method: Literal["minmax", "mse"] = Field(
        default="minmax",
        description="Range of the grid: minmax keeps the extremes, mse searches the clip of least error.",
    )
    importance: Literal["none", "second_moment"] = Field(
        default="none",
        description="Weight of an error in method mse: none, or second_moment of the calibrated input channel.",
    )

    @field_validator("group_size")
    @classmethod
    def _default_group_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        return DEFAULT_GROUP_SIZE if value is None and info.data.get("granularity") == "group" else value

    @model_validator(mode="after")
    def _check(self) -> WeightsSection:
        if self.group_size is not None and self.granularity != "group":
            raise refusal("group_size", f"has no meaning with granularity {self.granularity}", "Remove it.")
        if self.importance == "second_moment" and self.method != "mse":
            raise refusal("importance", f"second_moment has no effect on method {self.method}", "Set method: mse.")
        return self


def _default_symmetric(data: dict[str, Any]) -> bool:
    return bool(data["scope"] == "token")


class ActivationsSection(Section):
    """The integer grid of the inputs of quantized linears."""

    bits: Annotated[Literal[16, 8], BeforeValidator(_whole, json_schema_input_type=Literal[16, 8])] = Field(
        default=16, description="16 leaves activations in float; 8 quantizes them."
    )
    scope: Literal["tensor", "token"] = Field(
        default="tensor",
        description="tensor: one static scale, from calibration; token: a dynamic scale for every token.",
    )
    symmetric: bool = Field(
        default_factory=_default_symmetric,
        description="Zero point fixed at zero; default true for token, false for tensor.",
    )
    method: Literal["minmax"] = Field(default="minmax", description="How the range of a static scale is observed.")

    @model_validator(mode="after")
    def _check(self) -> ActivationsSection:
        if self.scope == "token" and not self.symmetric:
            raise refusal(
                "symmetric",
                "is false, but engines read only symmetric scales per token",
                "Set it true or scope: tensor.",
            )
        return self


class RollbackSection(Section):
    """Linears that stay in float."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update(
            disable_names=schema["properties"]["names"] | {"title": "Disable Names", "description": "Older name."}
        )
    )

    # Recipes write a list; the tuple keeps the section unchangeable.
    names: Annotated[tuple[Pattern, ...], Field(strict=False)] = Field(
        default=(),
        description="Names, globs, or regular expressions after re:, of linears that stay in float (disable_names).",
    )


class QuantizeSection(Section):
    """The quantization scheme."""

    weights: Annotated[
        WeightsSection, BeforeValidator(_null_is_default, json_schema_input_type=WeightsSection | None)
    ] = Field(default=WeightsSection(), description="How weights are quantized.")
    activations: Annotated[
        ActivationsSection, BeforeValidator(_null_is_default, json_schema_input_type=ActivationsSection | None)
    ] = Field(default=ActivationsSection(), description="How activations are quantized; null leaves them in float.")
    rollback: Annotated[
        RollbackSection, BeforeValidator(_null_is_default, json_schema_input_type=RollbackSection | None)
    ] = Field(default=RollbackSection(), description="Linears that stay in float.")

    @model_validator(mode="after")
    def _check(self) -> QuantizeSection:
        weights = self.weights
        if self.activations.bits == 16:
            return self
        if weights.bits != 8:
            raise refusal(
                "activations.bits",
                f"8-bit activations need 8-bit weights, and weights.bits is {weights.bits}",
                "Set weights.bits: 8 or activations.bits: 16.",
            )
        if weights.granularity == "group":
            raise refusal(
                "weights.granularity",
                "integer products with 8-bit activations cannot use a scale for each group",
                "Set it to channel or tensor, or activations.bits: 16.",
            )
        if not weights.symmetric:
            raise refusal(
                "weights.symmetric",
                "integer products with 8-bit activations need symmetric weights",
                "Set it true, or activations.bits: 16.",
            )
        return self


class ExportSection(Section):
    """The checkpoints to write."""

    formats: Annotated[tuple[Literal["compressed-tensors"], ...], Field(strict=False, min_length=1)] = Field(
        default=("compressed-tensors",),
        description="Checkpoint formats: compressed-tensors, which vLLM and transformers load.",
    )

    @model_validator(mode="after")
    def _check(self) -> ExportSection:
        if len(set(self.formats)) < len(self.formats):
            raise refusal("formats", "names a format twice", "Name each once.")
        return self


class PerplexitySection(Section):
    """Perplexity of the float and of the exported model on the same text."""

    dataset: Dataset = Field(
        default="builtin",
        description="builtin, wikitext2, text, jsonl, parquet, or a hub name such as Salesforce/wikitext.",
    )
    path: Text | None = Field(default=None, description="Local file or directory; without it wikitext2 asks the hub.")
    field: Text | None = Field(
        default=None, description="Column that holds the text, for jsonl, parquet and hub datasets."
    )
    split: Text = Field(default="test", description="Split of a hub dataset.")
    sequence_length: Length = Field(default=1024, description="Tokens in a window.")
    windows: Count | None = Field(default=40, description="At most this many windows; null takes the whole text.")
    protocol: Literal["standard", "golden-stick"] = Field(
        default="standard", description="How text becomes windows and windows become one number."
    )

    @model_validator(mode="after")
    def _check(self) -> PerplexitySection:
        _check_source(self, "test")
        return self


class GatesSection(Section):
    """Bounds that the quantized model must keep, or the run fails."""

    perplexity_increase: Annotated[
        float | None, BeforeValidator(_fraction, json_schema_input_type=float | str | None)
    ] = Field(default=None, description="Largest relative increase of perplexity over the float model, as 2% or 0.02.")
    kl_divergence: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Largest mean Kullback-Leibler divergence from the float model, in nats a token."
    )

    @field_serializer("perplexity_increase")
    def _percent(self, value: float | None) -> str | None:
        # A percentage, because a bare number of 1 or more is refused on reading.
        if value is None:
            return None
        digits = format(Decimal(repr(value)) * 100, "f")
        return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + "%"


class EvaluateSection(Section):
    """What is measured on the exported model."""

    perplexity: PerplexitySection | None = Field(default=None, description="Measure perplexity; {} for the defaults.")
    gates: GatesSection | None = Field(
        default=None, description="Quality bounds; a miss ends the run with exit status 4."
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluateSection:
        if self.perplexity is None and self.gates is not None:
            raise refusal("gates", "judges nothing without evaluate.perplexity", "Add perplexity: {} or remove gates.")
        if self.perplexity is None:
            raise refusal("", "asks for no measurement", "Add perplexity: {} to it, or set evaluate: null.")
        return self


class Recipe(Section):
    """One quantization of one model, from the float checkpoint to the measured result."""

    version: Annotated[Literal[1], BeforeValidator(_whole, json_schema_input_type=Literal[1])] = Field(
        default=1, description="Version of the recipe's language."
    )
    model: ModelSection = Field(description="The model to quantize, and how it is read.")
    calibration: CalibrationSection | None = Field(
        default=None, description="Calibration text; null or absent for schemes that need none."
    )
    quantize: QuantizeSection = Field(description="The quantization scheme; {} is 8-bit weights, one scale a channel.")
    export: ExportSection | None = Field(default=ExportSection(), description="Checkpoints to write; null writes none.")
    evaluate: EvaluateSection | None = Field(default=None, description="What to measure; null or absent for nothing.")
    output: Text = Field(description="Run directory. --output sets it.")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        activations, weights = self.quantize.activations, self.quantize.weights
        remedy = "Add a section calibration: {}"
        if self.calibration is None and activations.bits == 8 and activations.scope == "tensor":
            raise refusal(
                "quantize.activations.scope", "static scales need calibration", f"{remedy} or set scope: token."
            )
        if self.calibration is None and weights.importance == "second_moment":
            raise refusal(
                "quantize.weights.importance", "second_moment needs calibration", f"{remedy} or set importance: none."
            )
        if self.evaluate is not None and self.export is None:
            raise refusal(
                "evaluate",
                "measures the exported checkpoint, and export is null",
                "Set evaluate: null too, or keep export.",
            )
        return self


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, for editors.

    It does not demand `model.path` and `output`, which a file may leave to --model and --output.
    """
    schema = Recipe.model_json_schema()
    schema["required"] = ["quantize"]
    del schema["$defs"]["ModelSection"]["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "quantcli recipe"}
