"""What formats have in common: how config.json names one, what records say, names, and having nothing of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.quant.scheme import AttentionScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".npy")
"""Of the files that hold weights, in any format."""


def named_by_config(name: str) -> Callable[[Path, Mapping[str, Any]], bool]:
    """`recognizes` of a format that `quant_method` in the quantization_config of config.json names."""

    def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
        content = config.get("quantization_config")
        return isinstance(content, dict) and content.get("quant_method") == name

    return recognizes


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
