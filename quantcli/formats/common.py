"""What formats have in common: how config.json names one, what records say, names, and having nothing of attention."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.quant.scheme import AttentionScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store
    from quantcli.quant.grid import QuantizedWeight

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".npy")
"""Of the files that hold weights, in any format."""

DESCRIPTIONS = (
    "quant_model_description.json", "quant_model_description_*.json", "quantization.json", "quantize_config.json",
    "hf_quant_config.json",
)  # fmt: skip
"""Files of ours, and of those whose formats these are, that say what the weights beside them are."""
DESCRIPTIONS_OF_OTHERS = (
    "quant_config.json", "quantization_config.json", "pytorch_model.bin.index.json"
)  # fmt: skip
"""Such files of other tools. No checkpoint takes any of them over from another, whose weights they describe."""


AUTOROUND = "auto-round"
"""The quant_method of AutoRound, which packs as other formats do: `packing_format` says as which."""


def named_by_config(name: str, packings: Collection[str] = ()) -> Callable[[Path, Mapping[str, Any]], bool]:
    """`recognizes` of a format that `quant_method` in the quantization_config of config.json names, or that AutoRound
    means by one of these packing formats."""

    def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
        content = config.get("quantization_config")
        if not isinstance(content, dict):
            return False
        return packing_of(content) in packings if by_autoround(content) else content.get("quant_method") == name

    return recognizes


def by_autoround(content: Mapping[str, Any]) -> bool:
    """Whether AutoRound wrote this quantization_config."""
    return content.get("quant_method") == AUTOROUND


def packing_of(content: Mapping[str, Any]) -> str:
    """AutoRound's packing_format; where it is not named, engines take that of GPTQ (v1)."""
    return str(content.get("packing_format") or "auto_round:auto_gptq")


def check_autoround(directory: Path, content: Mapping[str, Any]) -> None:
    """Raise ModelError for what a quantization_config of AutoRound says beside integer weights of one kind, with inputs
    in float; nothing for those of other tools."""
    if not by_autoround(content):
        return
    sections = [content, *(each for each in (content.get("extra_config") or {}).values() if isinstance(each, dict))]
    symmetric = content.get("sym", True)
    for each in sections:
        inputs, kind = each.get("act_bits") or 16, str(each.get("data_type") or "int")
        if inputs < 16 or not kind.startswith("int") or each.get("sym", symmetric) != symmetric:
            raise ModelError(f"{directory}: AutoRound's data_type {kind!r} with inputs of {inputs} bits and sym "
                             f"{each.get('sym')} is not supported.",
                             "Known: integer weights, all symmetric or all not, with inputs in float.")  # fmt: skip


_EXPRESSIONS, _STEPS = 1000, 1e9


def check_expressions(patterns: list[str]) -> None:
    """Refuse regular expressions that cannot be read, or that may take for ever to match a name. Raises ModelError."""
    if len(patterns) > _EXPRESSIONS:
        raise ModelError(f"quantization_config has {len(patterns)} regular expressions.", "Name the linears.")
    for pattern in patterns:
        if _steps(pattern) > _STEPS:
            raise ModelError(f"quantization_config: {pattern[:200]!r} may take for ever to match.", "Name the linears.")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ModelError(f"quantization_config: {pattern[:200]!r} is no regular expression: {error}.") from error


def _steps(pattern: str) -> float:
    """A bound of the ways in which an expression can be tried on a name of 60 characters: each repetition may end at
    each of them, each optional part be there or not, each group be any of its alternatives."""
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)
    if re.search(r"\)[*+{]", bare) or len(bare) > 10_000:  # repeated groups multiply without end
        return math.inf
    repeated, optional = len(re.findall(r"[*+{]", bare)), len(re.findall(r"(?<![(*+?}])\?", bare))
    groups = bare.count("(") + 1
    exponent = repeated * math.log(60) + optional * math.log(2) + groups * math.log(bare.count("|") / groups + 1)
    return math.exp(min(exponent, 500))


def ungrouped(weight: QuantizedWeight, group_of: Tensor) -> QuantizedWeight:
    """The same weight with the scale and zero point of its group for each input: [out, groups] becomes [out, in].

    group_of: integers [in], the group of each input (g_idx). Raises ModelError for one that is of no group.
    """
    from quantcli.quant.grid import QuantizedWeight

    codes, scale, zero_point = weight
    index, groups = group_of.long(), scale.shape[1]
    low, high = index.aminmax()
    if low < 0 or high >= groups:
        raise ModelError(f"g_idx puts inputs in groups {int(low)} to {int(high)}, and there are {groups}.",
                         "Download the checkpoint again.")  # fmt: skip
    return QuantizedWeight(codes, scale[:, index], None if zero_point is None else zero_point[:, index])


def recorded_schemes(store: Store) -> dict[str, Any]:
    """What quantization.json says of linears and attention, where tensors do not tell it."""
    return {
        "linears": {name: scheme.to_json() for name, scheme in store.schemes.items()},
        "attention": None if store.attention is None else store.attention.to_json(),
    }


def in_block(module: str) -> bool:
    """Whether a module is in a decoder block, which a number names; the output head is not."""
    return any(part.isdigit() for part in module.split("."))


def attention_refusal(attention: AttentionScheme) -> str:
    """Why a format of weights alone cannot hold keys, values and queries under any scheme."""
    return "has no scales for caches or attention"


def attention_names(path: str, attention: AttentionScheme) -> dict[str, str]:
    """The tensors of an attention module, of a format that has none."""
    return {}


def attention_tensors(
    path: str, parts: Mapping[str, Tensor], attention: AttentionScheme, dtype: str
) -> dict[str, Tensor]:
    """As `attention_names`."""
    return {}
