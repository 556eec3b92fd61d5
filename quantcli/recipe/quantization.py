"""The section `quantize`: schemes and overrides."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantcli.recipe.aliases import with_aliases
from quantcli.recipe.budget import BudgetSection, CandidateSection
from quantcli.recipe.fields import Count, Pattern, SchemeName, Section, null_is_default, refusal, taken_over, whole
from quantcli.recipe.rollback import RollbackSection
from quantcli.recipe.solver import SOLVED_METHODS, DistillSection, GptqSection, SignroundSection, check_solvers

DEFAULT_GROUP_SIZE = 128
SPARSE_METHODS = ("co_sparse", "low_bit", "low_bit_sigma")
FLOAT_METHODS = ("minmax", "mse", "gptq")
"""Weight methods that find float codes."""


def _check_float_codes(bits: int, symmetric: bool) -> None:
    if bits != 8:
        raise refusal("bits", f"is {bits}, and float codes have 8 (e4m3)", "Set bits: 8, or type: int.")
    if not symmetric:
        raise refusal("symmetric", "is false, and fp8 has no zero point", "Set it true, or type: int.")


class WeightsSection(Section):
    """The grid of the weights and how their scales are chosen."""

    model_config = with_aliases("quantize", "weights")

    bits: Annotated[Literal[16, 8, 4, 3, 2], BeforeValidator(whole, json_schema_input_type=Literal[16, 8, 4, 3, 2])] = (
        Field(default=8, description="Bits of a weight code; 16 leaves weights in float.")
    )
    type: Literal["int", "float"] = Field(
        default="int", description="What codes are: integers, or 8-bit floats (fp8, e4m3)."
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
    method: Literal["minmax", "mse", "hqq", "ssz", "gptq", "signround", "co_sparse", "low_bit", "low_bit_sigma"] = (
        Field(
            default="minmax",
            description="Range of the grid: minmax keeps the extremes, mse searches the clip of least error, ssz fits "
            "scales to their codes, hqq spares most weights at the cost of few; the others make most codes small, for "
            "engines that compress them (W8A8S).",
        )
    )
    importance: Literal["auto", "none", "second_moment"] = Field(
        default="auto",
        description="Weight of an error in method mse: none, or second_moment of the calibrated input channel; auto is "
        "second_moment where the recipe has a calibration section.",
    )

    full_range: bool = Field(
        default=True,
        description="Symmetric scales below 8 bits or of groups may be negative, so that all codes are used; false for "
        "max|w| / (2^(bits-1) - 1).",
    )
    fraction: Annotated[float, Field(ge=0.01, le=0.1)] = Field(
        default=0.01, description="Share of weights beyond 4 bits in methods co_sparse and low_bit."
    )
    sigma_factor: Annotated[float, Field(ge=3, le=4)] = Field(
        default=3.0, description="Standard deviations within 4 bits in method low_bit_sigma."
    )

    @model_validator(mode="before")
    @classmethod
    def _null_asks_for_none(cls, content: Any) -> Any:
        """A group size that is null is that of a recipe without the key: none that was asked for."""
        if isinstance(content, dict) and "group_size" in content and content["group_size"] is None:
            return {key: value for key, value in content.items() if key != "group_size"}
        return content

    @field_validator("group_size")
    @classmethod
    def _default_group_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        return DEFAULT_GROUP_SIZE if value is None and info.data.get("granularity") == "group" else value

    @model_validator(mode="after")
    def _check(self) -> WeightsSection:
        if self.group_size is not None and self.granularity != "group":
            raise refusal("group_size", f"has no meaning with granularity {self.granularity}", "Remove it.")
        if self.importance == "second_moment" and self.method != "mse":
            raise refusal("importance", f"second_moment has no effect on method {self.method}", "Set method: mse, or "
                          "importance: auto.")  # fmt: skip
        if self.type == "float" and self.bits != 16:
            self._check_float()
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

    def _check_float(self) -> None:
        _check_float_codes(self.bits, self.symmetric)
        if self.granularity == "group":
            raise refusal("granularity", "is group, and fp8 weights have a scale a channel or tensor",
                          "Set it to channel or tensor, or type: int.")  # fmt: skip
        if self.method not in FLOAT_METHODS:
            raise refusal("method", f"{self.method} finds integers", "Set method: minmax, mse or gptq, or type: int.")

    def weighed(self, calibrated: bool) -> bool:
        """Whether errors are weighed by the second moments of inputs, in a recipe with or without calibration."""
        return self.importance == "second_moment" or (self.importance == "auto" and self.method == "mse" and calibrated)

    @property
    def solves(self) -> bool:
        """Whether the codes are found from calibration, block by block behind quantized ones."""
        return self.method in SOLVED_METHODS

    @property
    def mixed(self) -> bool:
        """Whether the codes may be found with what outputs are to each other, by `gptq.output_samples`."""
        return self.method == "gptq" and self.granularity != "tensor"

    @property
    def sparse(self) -> bool:
        """Whether the codes are made for engines that compress them."""
        return self.method in SPARSE_METHODS


def _default_symmetric(data: dict[str, Any]) -> bool:
    return data.get("scope") == "token" or data.get("type") == "float"


_OF_RANGES = ("method", "aggregation", "propagation", "quantized_share")
"""Keys of activations that are about ranges, which scales of tokens do without."""


class ActivationsSection(Section):
    """The grid of the inputs of quantized linears."""

    model_config = with_aliases("quantize", "activations")

    bits: Annotated[Literal[16, 8, 4], BeforeValidator(whole, json_schema_input_type=Literal[16, 8, 4])] = Field(
        default=16, description="16 leaves activations in float; 8 or, with scope token, 4 quantize them."
    )
    type: Literal["int", "float"] = Field(
        default="int", description="What codes are, the same as for weights: integers, or 8-bit floats (fp8, e4m3)."
    )
    scope: Literal["tensor", "token", "mix"] = Field(
        default="tensor",
        description="tensor: one static scale, from calibration; token: a dynamic scale for every token; "
        "mix: dynamic for prompts, static for decoding.",
    )
    symmetric: bool = Field(
        default_factory=_default_symmetric,
        description="Zero point fixed at zero; default true for token and for type float, else false. With scope token "
        "false gives each token a zero point, beside 8-bit weights with a scale a channel or tensor.",
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
        for key in _OF_RANGES if self.scope == "token" else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise refusal(key, "has no effect with scope token, whose scales follow each token",
                              "Remove it, or set scope: tensor or mix.")  # fmt: skip
        if self.method != "percentile" and self.percentile != type(self).model_fields["percentile"].default:
            raise refusal("percentile", f"has no effect on method {self.method}", "Set method: percentile.")
        if self.method != "minmax" and self.aggregation != "max":
            raise refusal("aggregation", f"has no effect on method {self.method}", "Remove it or set method: minmax.")
        if self.bits == 4 and self.scope != "token":
            raise refusal("scope", f"is {self.scope}, and 4-bit activations have a scale for every token",
                          "Set scope: token, or bits: 8.")  # fmt: skip
        if self.bits == 4 and not self.symmetric:
            raise refusal("symmetric", "is false, and engines have zero points of 8-bit activations only",
                          "Set it true, or bits: 8.")  # fmt: skip
        if self.type == "float" and self.bits != 16:
            self._check_float()
        return self

    def _check_float(self) -> None:
        _check_float_codes(self.bits, self.symmetric)
        if self.scope == "mix":
            raise refusal("scope", "is mix, which engines have for integers only", "Set scope: token or tensor.")
        if self.method not in ("minmax", "percentile"):
            raise refusal("method", f"{self.method} is for the even steps of integers", "Set minmax or percentile.")

    @property
    def observed(self) -> bool:
        """Whether static scales have to be found by calibration."""
        return self.bits != 16 and self.scope != "token"


class CacheSection(Section):
    """What the key-value cache holds."""

    bits: Annotated[Literal[8], BeforeValidator(whole, json_schema_input_type=Literal[8])] = Field(
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

    bits: Annotated[Literal[8], BeforeValidator(whole, json_schema_input_type=Literal[8])] = Field(
        default=8, description="Bits of a query, key or value; one symmetric scale a head."
    )
    coverage: Annotated[float, Field(gt=0.5, le=1)] = Field(
        default=0.9999, description="Share of the queries and of the keys that the range of a head covers; values: all."
    )


class OverrideSection(Section):
    """Another scheme for some linears."""

    match: Pattern = Field(description="A name, a glob, or a regular expression after re:.")
    scheme: SchemeName | None = Field(
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
    "W4A8": ({"bits": 4, "granularity": "group", "method": "mse"}, {"bits": 8, "scope": "token"}),
    "W4A4": ({"bits": 4, "granularity": "group", "method": "mse"}, {"bits": 4, "scope": "token"}),
    "W8A8-fp8": ({"bits": 8, "type": "float"}, {"bits": 8, "type": "float", "scope": "token"}),
    "W8A8-fp8-static": ({"bits": 8, "type": "float"}, {"bits": 8, "type": "float", "scope": "tensor"}),
    "W8A16-fp8": ({"bits": 8, "type": "float"}, {}),
}


class QuantizeSection(Section):
    """The quantization scheme."""

    weights: Annotated[
        WeightsSection, BeforeValidator(null_is_default, json_schema_input_type=WeightsSection | None)
    ] = Field(default=WeightsSection(), description="How weights are quantized.")
    activations: Annotated[
        ActivationsSection, BeforeValidator(null_is_default, json_schema_input_type=ActivationsSection | None)
    ] = Field(default=ActivationsSection(), description="How activations are quantized; null leaves them in float.")
    rollback: Annotated[
        RollbackSection, BeforeValidator(null_is_default, json_schema_input_type=RollbackSection | None)
    ] = Field(default=RollbackSection(), description="Linears that stay in float.")
    overrides: Annotated[tuple[OverrideSection, ...], Field(strict=False)] = Field(
        default=(), description="Other schemes for some linears; the first match wins."
    )
    target: BudgetSection | None = Field(
        default=None, description="Choose the scheme of each linear for a number of bits a weight, or a size."
    )
    gptq: Annotated[GptqSection, BeforeValidator(null_is_default, json_schema_input_type=GptqSection | None)] = Field(
        default=GptqSection(), description="How methods gptq and signround solve for weights."
    )
    signround: Annotated[
        SignroundSection, BeforeValidator(null_is_default, json_schema_input_type=SignroundSection | None)
    ] = Field(default=SignroundSection(), description="How method signround goes on from there.")
    distill: DistillSection | None = Field(
        default=None, description="Tune scales and norms to the predictions of the float model; {} for the defaults."
    )
    kv_cache: CacheSection | None = Field(default=None, description="Quantize the key-value cache; {} for int8.")
    attention: AttentionSection | None = Field(
        default=None, description="Quantize queries, keys and values in attention (FA3); {} for int8."
    )

    @model_validator(mode="after")
    def _check(self) -> QuantizeSection:
        _check_treatment(self.weights, self.activations, "")
        for index, override in enumerate(self.overrides):
            if override.scheme is None and not override.weights and not override.activations:
                raise refusal(f"overrides.{index}", "changes nothing", "Give it a scheme, weights or activations.")
            if override.scheme != "float":
                _overridden(self, override, f"overrides.{index}.")
        if self.kv_cache is not None and self.attention is not None:
            raise refusal("attention", "excludes kv_cache: the cache would be quantized twice", "Remove one of them.")
        treatments = [self.treatment(None), *map(self.treatment, self.overrides)]
        if self.solves and any(t and t[1].observed and t[1].propagation == "quantized" for t in treatments):
            raise refusal("activations.propagation", "quantized has no rule beside weights of method gptq",
                          "Set propagation: float.")  # fmt: skip
        if self.gptq.output_samples is not None and not self.mixes:
            raise refusal("gptq.output_samples", "has no effect: no weights of method gptq with a scale a row or group",
                          "Set weights.method: gptq, or remove it.")  # fmt: skip
        check_solvers(self.gptq, self.signround, solves=self.solves, tunes=self.tunes)
        if self.weights.bits == 16 and not (self.overrides or self.kv_cache or self.attention):
            raise refusal("weights.bits", "is 16, so nothing is quantized", "Set 8, 4, 3 or 2, or add kv_cache.")
        if self.target is not None:
            _check_target(self, self.target)
        return self

    @property
    def tunes(self) -> bool:
        """Whether the rounding of any linear is learned."""
        treatments = [self.treatment(None), *map(self.treatment, self.overrides)]
        return any(t is not None and t[0].method == "signround" for t in treatments)

    @property
    def tunes_vectors(self) -> bool:
        """Whether norms and biases are tuned with the rounding."""
        return self.tunes and self.signround.norm_rate > 0

    @property
    def solves(self) -> bool:
        """Whether the weights of any linear are found from calibration by the quantize stage itself."""
        treatments = [self.treatment(None), *map(self.treatment, self.overrides)]
        return any(t is not None and t[0].solves for t in treatments)

    @property
    def mixes(self) -> bool:
        """Whether any weights are rounded with what their outputs are to each other."""
        treatments = [self.treatment(None), *map(self.treatment, self.overrides)]
        return self.gptq.output_samples is not None and any(t is not None and t[0].mixed for t in treatments)

    def treatment(self, override: OverrideSection | None) -> tuple[WeightsSection, ActivationsSection] | None:
        """Weights and activations of linears that an override matches (None: of all others); None for float."""
        if override is None:
            return None if self.weights.bits == 16 else (self.weights, self.activations)
        weights, activations = _overridden(self, override, "") if override.scheme != "float" else (None, None)
        if weights is None or activations is None or weights.bits == 16:
            return None
        return weights, activations


def variant(candidate: CandidateSection, match: str) -> OverrideSection:
    """The override that gives a candidate's scheme to what a pattern matches."""
    if candidate.floats:
        return OverrideSection(match=match, scheme="float")
    return OverrideSection(match=match, weights=candidate.keys)


def _check_target(section: QuantizeSection, target: BudgetSection) -> None:
    """Refuse a budget that something else decides already, and candidates that are no schemes."""
    if section.weights.bits == 16:
        raise refusal("target", "shares out bits of weights, and weights.bits is 16", "Set weights.bits: 4.")
    for key in ("level", "target"):
        if getattr(section.rollback, key):
            raise refusal("target", f"excludes rollback.{key}: both choose linears that get more bits",
                          "Remove one of them.")  # fmt: skip
    for index, candidate in enumerate(target.candidates):
        if not candidate.floats:
            _overridden(section, variant(candidate, "*"), f"target.candidates.{index}.")


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
        kept = taken_over(part.model_dump(exclude_unset=True), keys)
        if kind is ActivationsSection and keys.get("scope") == "token":
            kept = {key: value for key, value in kept.items() if key not in (*_OF_RANGES, "percentile")}
        if kind is ActivationsSection and kept.get("symmetric") == _default_symmetric(kept):
            kept.pop("symmetric", None)  # written or not, it is the default, which follows the override's scope
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
    if weights.bits == 16:
        raise refusal(
            f"{place}activations.bits",
            f"{activations.bits}-bit activations need quantized weights, and weights.bits is 16",
            "Set weights.bits: 8 or activations.bits: 16.",
        )
    if weights.type != activations.type:
        raise refusal(
            f"{place}activations.type",
            f"is {activations.type}, and that of weights is {weights.type}: engines multiply codes of one type",
            f"Set activations.type: {weights.type}, or weights.type: {activations.type}.",
        )
    if activations.observed and weights.bits != 8:
        raise refusal(
            f"{place}activations.bits",
            f"8-bit activations of static scales need 8-bit weights, and weights.bits is {weights.bits}",
            "Set activations.scope: token, weights.bits: 8 or activations.bits: 16.",
        )
    if activations.observed and weights.granularity == "group":
        raise refusal(
            f"{place}weights.granularity",
            "integer products with static scales cannot use a scale for each group",
            "Set it to channel or tensor, activations.scope: token, or activations.bits: 16.",
        )
    by_token = activations.scope == "token" and not activations.symmetric
    if by_token and (weights.bits != 8 or weights.granularity == "group"):
        raise refusal(
            f"{place}activations.symmetric",
            "is false, and engines have zero points per token beside 8-bit weights with a scale a channel or tensor",
            "Set it true, or weights.bits: 8 and granularity: channel.",
        )
    if not weights.symmetric:
        raise refusal(
            f"{place}weights.symmetric",
            "integer products need symmetric weights",
            "Set it true, or activations.bits: 16.",
        )
