"""What llama.cpp makes of a model's configuration and tensors: their names and order in a GGUF file.

Names come from the tables of the gguf package. What they do not say is a row of ARCHITECTURES. Without torch: a plan
asks here whether a model can be written at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from textwrap import shorten
from typing import Any

from quantcli.errors import ModelError
from quantcli.model.gguf_families import ARCHITECTURES, Config, head_size

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""float32 [rotated channels of a head / 2]: divisors of the rotary frequencies, where config.json stretches some."""

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
"""Key of the file, behind the architecture's name → key of config.json."""


def refusal(config: Config, parameters: Iterable[str]) -> str:
    """Why a model with this config.json and these parameters cannot be written; empty when it can.

    Keys of `fixed` that `config` lacks are taken for the defaults of transformers.
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
    for key, follows in known.implied.items():
        if config[key] != follows(config):
            value = shorten(str(config[key]), 70, placeholder=" …")
            return f"has no room for {key}: {value}, with which this model computes"
    size, heads = head_size(config), config["num_attention_heads"]
    if known.narrow and size * heads != config["hidden_size"]:
        return f"has no room for {heads} heads of {size} channels in a model of {config['hidden_size']} channels"
    for key in (*known.further.values(), *known.scales.values()):
        if config[key] is None:
            return f"needs {key}, which is null in config.json of this model"
    try:
        rope_keys(config)
        tensor_names(config, parameters)
    except ModelError as error:
        return error.message
    return ""


def tensor_names(config: Config, parameters: Iterable[str]) -> dict[str, str]:
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


def norm_offset(name: str, config: Config) -> float:
    """What a tensor of the file, in float32, is more than the parameter; it is other than 0 for weights of norms."""
    return ARCHITECTURES[config["model_type"]].norm_offset if name.endswith("_norm.weight") else 0.0


def neighbour_order(name: str, config: Config) -> list[int] | None:
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


def rope_of(config: Config, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary embedding of layers of a kind as newer files write it, under rope_parameters; from either spelling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = dict(scaling.get(layers, scaling)) if isinstance(scaling, Mapping) else {}
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


def rotated(config: Config) -> int:
    """The channels of a head that positions rotate. Raises ModelError where llama.cpp would rotate all."""
    part = float(rope_of(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    if part != 1.0 and not ARCHITECTURES[config["model_type"]].partial:
        raise ModelError("has no room for a partial_rotary_factor of this model")
    return int(head_size(config) * part)


def rope_keys(config: Config) -> dict[str, str | int | float]:
    """Keys of the file that say how positions rotate. Raises ModelError for what it has no keys for."""
    rope = rope_of(config)
    kind = rope["rope_type"]
    keys: dict[str, str | int | float] = {"rope.dimension_count": rotated(config)}
    keys["rope.freq_base"] = float(rope["rope_theta"])
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        local = rope_of(config, "sliding_attention")
        if local["rope_type"] != "default":
            raise ModelError(f"has no room for rotary embeddings of type {local['rope_type']} in sliding layers")
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind not in ARCHITECTURES[config["model_type"]].ropes:
        raise ModelError(f"has no room for rotary embeddings of type {kind}")
    if kind in ("default", "llama3"):  # llama3: the tensor FREQUENCIES says it
        return keys
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    context = config["max_position_embeddings"]
    original = int(rope.get("original_max_position_embeddings") or context)
    keys["rope.scaling.original_context_length"] = original
    factor = float(rope.get("factor") or context / original)
    if kind == "longrope":  # the tensors LONG and SHORT say the rest
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return keys | {"rope.scaling.attn_factor": float(rope.get("attention_factor") or attention)}
    wanted = {"attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"}
    if own := sorted(key for key in wanted if rope.get(key) is not None):
        raise ModelError(f"has no room for {own[0]} of rotary embeddings of type yarn")
    return keys | {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}


def rope_tensors(config: Config) -> dict[str, list[float]]:
    """Tensors of the file that no parameter stands for: divisors of the rotary frequencies θ^(−2j/size).

    Of type llama3, for the wavelength w = 2π·θ^(2j/size) and the original context c: 1 for w < c / high, `factor` for
    w > c / low, and between them 1 / ((1 − t) / factor + t) with t = (c / w − low) / (high − low), as transformers
    computes it. Of type longrope those of config.json.
    """
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        return {LONG: list(map(float, rope["long_factor"])), SHORT: list(map(float, rope["short_factor"]))}
    if rope["rope_type"] != "llama3":
        return {}
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context, size = rope["original_max_position_embeddings"], head_size(config)
    found = []
    for channel in range(0, size, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (channel / size)
        part = (context / wavelength - low) / (high - low)
        found.append(1 / ((1 - min(max(part, 0.0), 1.0)) / factor + min(max(part, 0.0), 1.0)))
    return {FREQUENCIES: found}


def architecture_keys(config: Config) -> dict[str, str | int | float]:
    """The keys of the file that say what model it holds."""
    known = ARCHITECTURES[config["model_type"]]
    keys: dict[str, str | int | float] = {key: config[own] for key, own in {**KEYS, **known.further}.items()}
    keys |= {key: float(config[own]) for key, own in known.scales.items()}
    size = head_size(config)
    keys |= {"attention.key_length": size, "attention.value_length": size, **known.written, **rope_keys(config)}
    return {f"{known.name}.{key}": value for key, value in keys.items()}


def computed(config: Config, keys: Config) -> dict[str, Any]:
    """Of a file with these keys, what llama.cpp computes with and transformers does not read, as keys of config.json.

    `config` is what transformers makes of the file. Empty for models that are not in ARCHITECTURES. Raises ModelError
    for rotary embeddings that config.json cannot say.
    """
    known = ARCHITECTURES.get(config["model_type"])
    if known is None:
        return {}
    own = {key.removeprefix(f"{known.name}."): value for key, value in keys.items()}
    found = {name: own[key] for key, name in {**known.further, **known.scales}.items() if key in own}
    found |= {name: follows({**config, **found}) for name, follows in known.implied.items()}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    kind, factor = own.get("rope.scaling.type", "linear"), own.get("rope.scaling.factor", own.get("rope.scale_linear"))
    read = ("type", "factor", "original_context_length", "finetuned")
    if further := [key for key in own if key.startswith("rope.scaling.") and key.split(".")[2] not in read]:
        raise ModelError(f"says {further[0]}, which transformers has no key for")
    if kind != "none" and factor not in (None, 0.0, 1.0):
        if kind not in ("linear", "yarn"):
            raise ModelError(f"has rotary embeddings of type {kind}")
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            context = config["max_position_embeddings"]
            rope["original_max_position_embeddings"] = own.get("rope.scaling.original_context_length", context)
    if known.partial and "rope.dimension_count" in own:
        rope["partial_rotary_factor"] = own["rope.dimension_count"] / head_size(config)
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
        return found | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    return found | {"rope_parameters": rope}
