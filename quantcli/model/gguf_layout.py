"""What llama.cpp makes of a model's configuration and tensors: their names and order in a GGUF file.

Names come from the tables of the gguf package. What they do not say is a line of ARCHITECTURES. Without torch: a plan
asks here whether a model can be written at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from quantcli.errors import ModelError

FREQUENCIES = "rope_freqs.weight"
"""float32 [head size / 2]: divisors of the rotary frequencies, where config.json stretches some of them."""


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp knows it.

    neighbours: it rotates channels 2j and 2j + 1 of a head, where transformers rotates j and j + half: the rows of the
    query and key projections change places. norm_offset: it multiplies by w where the norm of transformers multiplies
    by w + norm_offset. fixed: keys of config.json that a GGUF file has no room for, and the values it computes with.
    further: keys of the file beside those of KEYS → key of config.json.
    """

    name: str
    neighbours: bool = False
    norm_offset: float = 0.0
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    further: Mapping[str, str] = field(default_factory=dict)


_SILU: dict[str, tuple[object, ...]] = {"hidden_act": ("silu",)}
_FULL: dict[str, tuple[object, ...]] = {**_SILU, "sliding_window": (None,)}
_UNLESS_USED: dict[str, tuple[object, ...]] = {**_SILU, "use_sliding_window": (False,)}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", neighbours=True, fixed=_SILU),
    "mistral": Architecture("llama", neighbours=True, fixed=_FULL),
    "qwen2": Architecture("qwen2", fixed=_UNLESS_USED),
    "qwen3": Architecture("qwen3", fixed=_UNLESS_USED),
}
"""model_type of config.json → what llama.cpp computes for it. Each was run there by the tests."""

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""Key of the file, behind the architecture's name → key of config.json."""


def refusal(config: Mapping[str, Any], parameters: Iterable[str]) -> str:
    """Why a model with this config.json and these parameters cannot be written; empty when it can.

    Keys that `config` lacks are taken for the defaults of transformers.
    """
    if find_spec("gguf") is None:
        return "is written by the gguf package, which is not installed: pip install 'quantcli[gguf]'"
    kind = config.get("model_type")
    known = ARCHITECTURES.get(str(kind))
    if known is None:
        return f"is written for the model types {', '.join(ARCHITECTURES)}, and this one is {kind}"
    for key, values in known.fixed.items():
        if config.get(key, values[0]) not in values:
            return f"has no room for {key}: {config[key]}, with which this model computes"
    try:
        rope_scaling(config)
        tensor_names(config, parameters)
    except ModelError as error:
        return error.message
    return ""


def tensor_names(config: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, str]:
    """Parameter of transformers → tensor of the file, as model.norm.weight → output_norm.weight.

    Raises ModelError for a parameter that has none.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = ARCHITECTURES[config["model_type"]].name
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    names = {}
    for parameter in parameters:
        stem, dot, suffix = parameter.rpartition(".")
        found = table.get_name(stem)
        if found is None or suffix not in ("weight", "bias"):
            raise ModelError(f"has no place for {parameter} in a model of {architecture}")
        names[parameter] = f"{found}{dot}{suffix}"
    return names


def is_norm(name: str) -> bool:
    """Whether a tensor of the file is the weight of a norm."""
    return name.endswith("_norm.weight")


def neighbour_order(name: str, config: Mapping[str, Any]) -> list[int] | None:
    """Rows of the parameter in the order of the file, for a tensor of the file; None where the order is the same.

    Head by head, of the halves a and b that transformers rotates together: a₀ b₀ a₁ b₁ ….
    """
    if not ARCHITECTURES[config["model_type"]].neighbours:
        return None
    part = name.rsplit(".", 2)[-2]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(part)
    if heads is None:
        return None
    size = head_size(config)
    halves = (range(size // 2), range(size // 2, size))
    own = [channel for pair in zip(*halves, strict=True) for channel in pair]
    return [head * size + channel for head in range(heads) for channel in own]


def head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding as newer files write it, under rope_parameters; from either spelling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = dict(scaling) if isinstance(scaling, Mapping) else {}
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def rope_scaling(config: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Keys of the file that stretch the rotary embedding. Raises ModelError for a kind that has none."""
    rope = rope_of(config)
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("has no room for a partial_rotary_factor of this model")
    if kind in ("default", "llama3"):  # llama3: the tensor FREQUENCIES says it
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        wanted = {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}
        if own := sorted(key for key in wanted if rope.get(key) is not None):
            raise ModelError(f"has no room for {own[0]} of rotary embeddings of type yarn")
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original),
        }
    raise ModelError(f"has no room for rotary embeddings of type {kind}")


def frequency_divisors(config: Mapping[str, Any]) -> list[float] | None:
    """Divisors of the rotary frequencies θ^(−2j/size) of type llama3; None for other types.

    Of wavelength w = 2π·θ^(2j/size) and the original context c: 1 for w < c / high, `factor` for w > c / low, and
    between them 1 / ((1 − t) / factor + t) with t = (c / w − low) / (high − low), as transformers computes it.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context, size = rope["original_max_position_embeddings"], head_size(config)
    found = []
    for channel in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (channel / size)
        part = (context / wavelength - low) / (high - low)
        found.append(1 / ((1 - min(max(part, 0.0), 1.0)) / factor + min(max(part, 0.0), 1.0)))
    return found


def architecture_keys(config: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The keys of the file that say what model it holds, from a configuration with all defaults filled in."""
    known = ARCHITECTURES[config["model_type"]]
    keys: dict[str, str | int | float] = {key: config[own] for key, own in {**KEYS, **known.further}.items()}
    size = head_size(config)
    keys |= {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size}
    keys["rope.freq_base"] = float(rope_of(config)["rope_theta"])
    keys |= rope_scaling(config)
    return {f"{known.name}.{key}": value for key, value in keys.items()}
