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
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

DEFAULT_GROUP_SIZE = 128
SPARSE_METHODS = ("co_sparse", "low_bit", "low_bit_sigma")
NAMED_DATASETS = ("builtin", "wikitext2", "boolq", "text", "jsonl", "parquet")

# msModelSlim's names of keys, by section: read as the name on the right, with the value translated where it differs.
ALIASES: dict[tuple[str, ...], str] = {
    ("quantize", "weights", "w_sym"): "symmetric",
    ("quantize", "weights", "mm_tensor"): "granularity",
    ("quantize", "activations", "act_method"): "method",
    ("quantize", "activations", "pr"): "quantized_share",
    ("quantize", "rollback", "disable_names"): "names",
    ("quantize", "rollback", "disable_level"): "level",
    ("quantize", "rollback", "disable_last_linear"): "last_linear",
}
ALIAS_VALUES: dict[tuple[str, ...], dict[Any, Any]] = {
    ("quantize", "weights", "mm_tensor"): {True: "tensor", False: "channel"},
    ("quantize", "activations", "act_method"): {1: "minmax", 2: "histogram", 3: "mixed"},
}


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
        raise refusal("", f"{value!r} is no fraction", remedy)
    return float(fraction)


def _as_percent(value: float | None) -> str | None:
    """A fraction as a recipe writes it: a percentage, because a bare number of 1 or more is refused on reading."""
    if value is None:
        return None
    digits = format(Decimal(repr(value)) * 100, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + "%"


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


def _with_aliases(section: str) -> ConfigDict:
    """The JSON schema of a section of `quantize`, with the older names of its keys."""

    def add(schema: dict[str, Any]) -> None:
        for (_, place, older), name in ALIASES.items():
            if place == section:
                values = ALIAS_VALUES.get(("quantize", place, older))
                entry = {"enum": list(values)} if values else {**schema["properties"][name]}
                schema["properties"][older] = entry | {"title": older, "description": f"Older name of {name}."}

    return ConfigDict(json_schema_extra=add)


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


def _check_source(section: CalibrationSection | MixSection | PerplexitySection, default_split: str) -> None:
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
    if section.field is not None and dataset in ("builtin", "wikitext2", "boolq", "text"):
        raise refusal("field", f"names a column, and dataset {dataset} has none to choose", "Remove the key.")
    asks_hub = on_hub or (dataset in ("wikitext2", "boolq") and section.path is None)
    if section.split != default_split and not asks_hub:
        raise refusal("split", f"is for datasets on the hub; dataset {dataset} here has no splits", "Remove the key.")


class MixSection(Section):
    """One source of mixed calibration text."""

    dataset: Dataset = Field(
        default="builtin",
        description="builtin, wikitext2, boolq, text, jsonl, parquet, or a hub name such as Salesforce/wikitext.",
    )
    path: Text | None = Field(
        default=None, description="Local file or directory; without it wikitext2 and boolq ask the hub."
    )
    field: Text | None = Field(
        default=None, description="Column that holds the text, for jsonl, parquet and hub datasets."
    )
    split: Text = Field(default="train", description="Split of a hub dataset.")
    share: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Weight among the sources; the weights need not add up to anything."
    )

    @model_validator(mode="after")
    def _check(self) -> MixSection:
        _check_source(self, "train")
        return self


class CalibrationSection(Section):
    """The text on which activations are observed."""

    dataset: Dataset = Field(
        default="builtin",
        description="builtin, wikitext2, boolq, text, jsonl, parquet, or a hub name such as Salesforce/wikitext.",
    )
    path: Text | None = Field(
        default=None, description="Local file or directory; without it wikitext2 and boolq ask the hub."
    )
    field: Text | None = Field(
        default=None, description="Column that holds the text, for jsonl, parquet and hub datasets."
    )
    split: Text = Field(default="train", description="Split of a hub dataset.")
    mix: Annotated[tuple[MixSection, ...], Field(strict=False)] = Field(
        default=(), description="Several sources in place of dataset, path, field and split."
    )
    samples: Count = Field(default=64, description="Number of sequences.")
    sequence_length: Length = Field(default=512, description="Tokens in a sequence.")
    packing: Literal["auto", "packed", "line"] = Field(
        default="auto",
        description="packed joins texts and cuts full sequences; line takes one text a sequence; "
        "auto is line for prompts, packed for other text.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="Seed of the choice of sequences.")
    drop_outliers: Annotated[
        float, BeforeValidator(_fraction, json_schema_input_type=float | str), Field(ge=0, lt=1)
    ] = Field(
        default=0.0,
        description="Share of sequences to drop, as 10% or 0.1: those whose output quantization changes most.",
    )

    @model_validator(mode="after")
    def _check(self) -> CalibrationSection:
        if not self.mix:
            _check_source(self, "train")
            return self
        for key, default in (("dataset", "builtin"), ("path", None), ("field", None), ("split", "train")):
            if getattr(self, key) != default:
                raise refusal(key, "is replaced by mix, which names its sources itself", "Move it into an item of mix.")
        named = [source.model_dump(exclude={"share"}) for source in self.mix]
        for index, source in enumerate(named):
            if source in named[:index]:
                raise refusal(f"mix.{index}", "names the same text as an item before it", "Keep one, with both shares.")
        return self

    @field_serializer("drop_outliers")
    def _percent(self, value: float) -> str | None:
        return _as_percent(value)


class WeightsSection(Section):
    """The integer grid of the weights and how their scales are chosen."""

    model_config = _with_aliases("weights")

    bits: Annotated[
        Literal[16, 8, 4, 3, 2], BeforeValidator(_whole, json_schema_input_type=Literal[16, 8, 4, 3, 2])
    ] = Field(default=8, description="Bits of a weight code; 16 leaves weights in float.")
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
    method: Literal["minmax", "mse", "co_sparse", "low_bit", "low_bit_sigma"] = Field(
        default="minmax",
        description="Range of the grid: minmax keeps the extremes, mse searches the clip of least error; the others "
        "make most codes small, for engines that compress them (W8A8S).",
    )
    importance: Literal["none", "second_moment"] = Field(
        default="none",
        description="Weight of an error in method mse: none, or second_moment of the calibrated input channel.",
    )

    fraction: Annotated[float, Field(ge=0.01, le=0.1)] = Field(
        default=0.01, description="Share of weights beyond 4 bits in methods co_sparse and low_bit."
    )
    sigma_factor: Annotated[float, Field(ge=3, le=4)] = Field(
        default=3.0, description="Standard deviations within 4 bits in method low_bit_sigma."
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
        if self.sparse and (self.bits != 8 or not self.symmetric or self.granularity == "group"):
            raise refusal(
                "method",
                f"{self.method} makes symmetric 8-bit codes with a scale a channel or tensor",
                "Set bits: 8, symmetric: true, granularity: channel.",
            )
        for key, methods in (("fraction", ("co_sparse", "low_bit")), ("sigma_factor", ("low_bit_sigma",))):
            if getattr(self, key) != type(self).model_fields[key].default and self.method not in methods:
                raise refusal(key, f"has no effect on method {self.method}", f"Set method: {' or '.join(methods)}.")
        return self

    @property
    def sparse(self) -> bool:
        """Whether the codes are made for engines that compress them."""
        return self.method in SPARSE_METHODS


def _default_symmetric(data: dict[str, Any]) -> bool:
    return bool(data["scope"] == "token")


class ActivationsSection(Section):
    """The integer grid of the inputs of quantized linears."""

    model_config = _with_aliases("activations")

    bits: Annotated[Literal[16, 8], BeforeValidator(_whole, json_schema_input_type=Literal[16, 8])] = Field(
        default=16, description="16 leaves activations in float; 8 quantizes them."
    )
    scope: Literal["tensor", "token", "mix"] = Field(
        default="tensor",
        description="tensor: one static scale, from calibration; token: a dynamic scale for every token; "
        "mix: dynamic for prompts, static for decoding.",
    )
    symmetric: bool = Field(
        default_factory=_default_symmetric,
        description="Zero point fixed at zero; default true for token, false for tensor.",
    )
    method: Literal["minmax", "histogram", "mixed", "percentile", "mse"] = Field(
        default="minmax", description="How the range of a static scale is found from what was observed."
    )
    aggregation: Literal["max", "mean"] = Field(
        default="max", description="minmax: the extremes of all samples, or the mean of each sample's extremes."
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        default=99.99, description="Share of the values that the range of method percentile covers."
    )
    propagation: Literal["float", "quantized"] = Field(
        default="float", description="What later linears are observed on: the float model, or the quantized one so far."
    )
    quantized_share: Annotated[float, Field(le=1)] = Field(
        default=1.0,
        description="Share of values that are quantized while calibrating; negative draws it for each batch.",
    )

    @model_validator(mode="after")
    def _check(self) -> ActivationsSection:
        if self.quantized_share != 1 and self.propagation != "quantized":
            raise refusal(
                "quantized_share", "has no effect while the float model is observed", "Set propagation: quantized."
            )
        if self.method != "minmax" and self.aggregation != "max":
            raise refusal("aggregation", f"has no effect on method {self.method}", "Remove it or set method: minmax.")
        if self.scope == "token" and not self.symmetric:
            raise refusal(
                "symmetric",
                "is false, but engines read only symmetric scales per token",
                "Set it true or scope: tensor.",
            )
        return self

    @property
    def observed(self) -> bool:
        """Whether static scales have to be found by calibration."""
        return self.bits == 8 and self.scope != "token"


class CacheSection(Section):
    """What the key-value cache holds."""

    bits: Annotated[Literal[8], BeforeValidator(_whole, json_schema_input_type=Literal[8])] = Field(
        default=8, description="Bits of a cached value."
    )
    type: Literal["int", "float"] = Field(
        default="int", description="int: int8 with a scale for each channel (C8); float: fp8 (e4m3) with one scale."
    )
    symmetric: bool = Field(default=True, description="Zero point fixed at zero (kv_sym).")
    observe: Literal["cache", "projection"] = Field(
        default="cache",
        description="Where ranges are taken: at what enters the cache, or at the outputs of k_proj and v_proj.",
    )

    @model_validator(mode="after")
    def _check(self) -> CacheSection:
        if self.type == "float" and not self.symmetric:
            raise refusal("symmetric", "is false, and fp8 has no zero point", "Remove it or set type: int.")
        return self


class AttentionSection(Section):
    """Queries, keys and values as integers in the products of attention."""

    bits: Annotated[Literal[8], BeforeValidator(_whole, json_schema_input_type=Literal[8])] = Field(
        default=8, description="Bits of a query, key or value; one symmetric scale a head."
    )
    coverage: Annotated[float, Field(gt=0.5, le=1)] = Field(
        default=0.9999, description="Share of the queries and of the keys that the range of a head covers; values: all."
    )


class TargetSection(Section):
    """What an automatic rollback has to reach; one of the three bounds."""

    perplexity_increase: Annotated[
        float | None, BeforeValidator(_fraction, json_schema_input_type=float | str | None)
    ] = Field(default=None, description="Largest relative increase of perplexity over the float model, as 1% or 0.01.")
    kl_divergence: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest mean Kullback-Leibler divergence from the float model, in nats a token."
    )
    size: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Largest checkpoint in GB; as many sensitive linears are rolled back as fit."
    )
    windows: Count = Field(default=8, description="Windows of evaluate.perplexity that trials are measured on.")
    evaluations: Count = Field(default=60, description="At most so many trials.")

    @model_validator(mode="after")
    def _check(self) -> TargetSection:
        given = [name for name in ("perplexity_increase", "kl_divergence", "size") if getattr(self, name) is not None]
        if len(given) != 1:
            wrong = f"has {' and '.join(given)}" if given else "has no bound"
            raise refusal("", wrong, "Give one of perplexity_increase, kl_divergence and size.")
        return self

    @field_serializer("perplexity_increase")
    def _percent(self, value: float | None) -> str | None:
        return _as_percent(value)


def _level(value: object) -> object:
    """'L5' or 5 as 5."""
    if isinstance(value, str) and re.fullmatch(r"L(0|[1-9][0-9]{0,8})", value):
        return int(value[1:])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return value
    raise refusal("", f"is {value!r}", "Write L5 or 5 for the five most sensitive linears, L0 for none.")


class RollbackSection(Section):
    """Linears that stay in float."""

    model_config = _with_aliases("rollback")

    # Recipes write a list; the tuple keeps the section unchangeable.
    names: Annotated[tuple[Pattern, ...], Field(strict=False)] = Field(
        default=(),
        description="Names, globs, or regular expressions after re:, of linears that are rolled back.",
    )
    level: Annotated[int, BeforeValidator(_level, json_schema_input_type=int | str)] = Field(
        default=0, description="L5 or 5 rolls back the five most sensitive linears besides."
    )
    metric: Literal["range_parm", "kurtosis", "quantile", "output_error", "block_error"] | None = Field(
        default=None,
        description="What sensitivity is measured by; null is range_parm for level, block_error for target.",
    )
    target: TargetSection | None = Field(
        default=None, description="Search the fewest linears to roll back that meet a bound, measuring the model."
    )
    to: Literal["float", "W8A16", "W8A8", "W8A8-dynamic", "W8A8-mix", "W4A16"] = Field(
        default="float", description="What a rolled-back linear becomes: float, or another scheme."
    )
    last_linear: bool | None = Field(
        default=None,
        description="true keeps the last linear in float (the output head, or the last of the last block), false "
        "quantizes the output head too; null keeps the output head in float.",
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
        return self.metric or ("block_error" if self.target is not None else "range_parm")


class OverrideSection(Section):
    """Another scheme for some linears."""

    match: Pattern = Field(description="A name, a glob, or a regular expression after re:.")
    scheme: Literal["float", "W8A16", "W8A8", "W8A8-dynamic", "W8A8-mix", "W4A16"] | None = Field(
        default=None, description="A scheme by its name, in place of quantize.weights and quantize.activations."
    )
    weights: dict[str, Any] | None = Field(
        default=None, description="Keys of quantize.weights that differ, on top of the scheme."
    )
    activations: dict[str, Any] | None = Field(
        default=None, description="Keys of quantize.activations that differ, on top of the scheme."
    )

    @model_validator(mode="after")
    def _check(self) -> OverrideSection:
        if self.scheme is None and self.weights is None and self.activations is None:
            raise refusal("", "changes nothing", "Give it a scheme, weights or activations.")
        if self.scheme == "float" and (self.weights or self.activations):
            raise refusal("scheme", "is float, beside keys of another scheme", "Remove one of them.")
        return self


# Keys of quantize.weights and quantize.activations that a scheme's name stands for; the rest have their defaults.
_NAMED_SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "W8A16": ({"bits": 8}, {}),
    "W8A8": ({"bits": 8}, {"bits": 8, "scope": "tensor"}),
    "W8A8-dynamic": ({"bits": 8}, {"bits": 8, "scope": "token"}),
    "W8A8-mix": ({"bits": 8}, {"bits": 8, "scope": "mix"}),
    "W4A16": ({"bits": 4, "granularity": "group", "method": "mse"}, {}),
}


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
    overrides: Annotated[tuple[OverrideSection, ...], Field(strict=False)] = Field(
        default=(), description="Other schemes for some linears; the first match wins."
    )
    kv_cache: CacheSection | None = Field(default=None, description="Quantize the key-value cache; {} for int8.")
    attention: AttentionSection | None = Field(
        default=None, description="Quantize queries, keys and values in attention (FA3); {} for int8."
    )

    @model_validator(mode="after")
    def _check(self) -> QuantizeSection:
        _check_treatment(self.weights, self.activations, "")
        for index, override in enumerate(self.overrides):
            if override.scheme != "float":
                _overridden(self, override, f"overrides.{index}.")
        if self.kv_cache is not None and self.attention is not None:
            raise refusal("attention", "excludes kv_cache: the cache would be quantized twice", "Remove one of them.")
        if self.weights.bits == 16 and not (self.overrides or self.kv_cache or self.attention):
            raise refusal("weights.bits", "is 16, so nothing is quantized", "Set 8, 4, 3 or 2, or add kv_cache.")
        return self

    def treatment(self, override: OverrideSection | None) -> tuple[WeightsSection, ActivationsSection] | None:
        """Weights and activations of linears that an override matches (None: of all others); None for float."""
        if override is None:
            return None if self.weights.bits == 16 else (self.weights, self.activations)
        weights, activations = _overridden(self, override, "") if override.scheme != "float" else (None, None)
        if weights is None or activations is None or weights.bits == 16:
            return None
        return weights, activations


def named_scheme(name: str) -> tuple[WeightsSection, ActivationsSection] | None:
    """What the name of a scheme stands for; None for float."""
    if name == "float":
        return None
    weights, activations = _NAMED_SCHEMES[name]
    return WeightsSection(**weights), ActivationsSection(**activations)


def _overridden(
    section: QuantizeSection, override: OverrideSection, place: str
) -> tuple[WeightsSection, ActivationsSection]:
    base = named_scheme(override.scheme) if override.scheme else (section.weights, section.activations)
    assert base is not None
    changed: list[Any] = []
    for part, given, kind in (
        (base[0], override.weights, WeightsSection),
        (base[1], override.activations, ActivationsSection),
    ):
        keys = given or {}
        unknown = [key for key in keys if key not in kind.model_fields]
        name = "weights" if kind is WeightsSection else "activations"
        if unknown:
            known = ", ".join(kind.model_fields)
            raise refusal(f"{place}{name}", f"has the unknown key {unknown[0]}", f"Keys: {known}.")
        kept = part.model_dump(exclude_unset=True)
        if keys.get("granularity", "group") != "group":
            kept.pop("group_size", None)
        if keys.get("method", "mse") != "mse":
            kept.pop("importance", None)
        try:
            changed.append(kind.model_validate(kept | keys))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or first.get("ctx", {}).get("key", "")
            wrong = first.get("ctx", {}).get("wrong") or f"is {first['input']!r}: {first['msg']}"
            remedy = first.get("ctx", {}).get("remedy", "Correct it.")
            raise refusal(f"{place}{name}", f"{key} {wrong}".strip(), remedy) from None
    weights, activations = changed
    _check_treatment(weights, activations, place)
    return weights, activations


def _check_treatment(weights: WeightsSection, activations: ActivationsSection, place: str) -> None:
    """Refuse combinations of weights and activations that no engine multiplies."""
    if weights.sparse and not activations.observed:
        raise refusal(
            f"{place}weights.method",
            f"{weights.method} is for static 8-bit activations (W8A8S)",
            "Set activations: {bits: 8, scope: tensor}.",
        )
    if activations.bits == 16:
        return
    if weights.bits != 8:
        raise refusal(
            f"{place}activations.bits",
            f"8-bit activations need 8-bit weights, and weights.bits is {weights.bits}",
            "Set weights.bits: 8 or activations.bits: 16.",
        )
    if weights.granularity == "group":
        raise refusal(
            f"{place}weights.granularity",
            "integer products with 8-bit activations cannot use a scale for each group",
            "Set it to channel or tensor, or activations.bits: 16.",
        )
    if not weights.symmetric:
        raise refusal(
            f"{place}weights.symmetric",
            "integer products with 8-bit activations need symmetric weights",
            "Set it true, or activations.bits: 16.",
        )


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
    phase: Literal["prefill", "decode"] = Field(
        default="prefill", description="What of activations with scope mix is measured: their dynamic or static scales."
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
        return _as_percent(value)


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
        section, remedy = self.quantize, "Add a section calibration: {}"
        treatments = [("", section.treatment(None))]
        treatments += [(f"overrides.{i}.", section.treatment(each)) for i, each in enumerate(section.overrides)]
        if section.rollback.to != "float":
            treatments.append(("rollback.to: ", named_scheme(section.rollback.to)))
        for place, treatment in treatments if self.calibration is None else ():
            if treatment is not None and treatment[1].observed:
                key = f"quantize.{place}activations.scope"
                raise refusal(key, "static scales need calibration", f"{remedy} or set scope: token.")
            if treatment is not None and treatment[0].importance == "second_moment":
                raise refusal(
                    f"quantize.{place}weights.importance",
                    "second_moment needs calibration",
                    f"{remedy} or set importance: none.",
                )
        for key in ("kv_cache", "attention"):
            if self.calibration is None and getattr(section, key) is not None:
                raise refusal(f"quantize.{key}", "scales need calibration", f"{remedy}.")
        if self.calibration is None and section.rollback.ranks:
            key = "level" if section.rollback.level else "target"
            raise refusal(f"quantize.rollback.{key}", "ranks linears by what they are fed", f"{remedy}.")
        target = section.rollback.target
        if target is not None and target.size is None and (self.evaluate is None or self.evaluate.perplexity is None):
            raise refusal(
                "quantize.rollback.target", "is measured on evaluate.perplexity, which is absent", "Add that section."
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
