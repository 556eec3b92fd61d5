"""What the keys of a GGUF export and its tokens have to say, from config.json and the tokenizer beside the file: names
by the gguf package, facts about families apart from those by which the file was written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.errors import ModelError, VerificationError
from quantcli.model.gguf_tokenizer import tokenizer_keys

_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "cohere": "command-r"}
"""model_type → architecture, where convert_hf_to_gguf.py of llama.cpp gives it another name."""
_WINDOWS = ("gemma2", "gemma3_text")
"""Model types of which llama.cpp knows windows; of phi3 it wants the key, and 0 for none."""
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE, _UNKNOWN, _NORMAL = 3, 4, 5, 6, 2, 1


def architecture_of(config: Mapping[str, Any]) -> str:
    """What llama.cpp calls the family."""
    kind = str(config.get("model_type"))
    return _ARCHITECTURES.get(kind, kind)


def tensors_of(folder: Path, config: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, str]:
    """Parameter of transformers → tensor of the file. Raises VerificationError for one that has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    found = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture_of(config)]
    if not found:
        raise VerificationError(f"{folder}: config.json is that of no model that gguf holds.", "Export again.")
    table, names = get_tensor_name_map(found[0], config["num_hidden_layers"]), {}
    for parameter in parameters:
        name = table.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise VerificationError(f"{folder}: gguf has no place for {parameter}.", "Export again.")
        names[parameter] = name
    return names


def check_keys(folder: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The keys of the model are those of config.json, and no others, and the tokenizer is the one beside the file.

    `fields`: key → value of the file. Raises VerificationError.
    """
    architecture = architecture_of(config)
    wanted: dict[str, Any] = {"general.architecture": architecture, **_of_model(config, architecture)}
    said = {key: value for key, value in fields.items() if key.startswith(f"{architecture}.") or key in wanted}
    for key in {**wanted, **said}:
        one, other = (side.get(key) for side in (said, wanted))
        alike = np.float32(one) == np.float32(other) if isinstance(other, float) and one is not None else one == other
        if not alike:
            raise VerificationError(f"{folder}: {key} is not that of config.json.", "Export again.")
    _check_tokenizer(folder, fields, int(config["vocab_size"]))


def _of_model(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    from gguf import Keys

    llm, attention = Keys.LLM, Keys.Attention
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    epsilons = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
    epsilon = next(key for key in epsilons if config.get(key) is not None)
    keys = {
        llm.CONTEXT_LENGTH: config["max_position_embeddings"],
        llm.EMBEDDING_LENGTH: config["hidden_size"],
        llm.BLOCK_COUNT: config["num_hidden_layers"],
        llm.FEED_FORWARD_LENGTH: config["intermediate_size"],
        llm.VOCAB_SIZE: config["vocab_size"],
        attention.HEAD_COUNT: config["num_attention_heads"],
        attention.HEAD_COUNT_KV: config["num_key_value_heads"],
        attention.KEY_LENGTH: size,
        attention.VALUE_LENGTH: size,
        attention.LAYERNORM_RMS_EPS if epsilon == epsilons[0] else attention.LAYERNORM_EPS: float(config[epsilon]),
    }
    named = {
        "attn_logit_softcapping": llm.ATTN_LOGIT_SOFTCAPPING,
        "final_logit_softcapping": llm.FINAL_LOGIT_SOFTCAPPING,
        "embedding_multiplier": llm.EMBEDDING_SCALE,
        "residual_multiplier": llm.RESIDUAL_SCALE,
        "attention_multiplier": attention.SCALE,
        "logits_scaling": llm.LOGIT_SCALE,
        "logit_scale": llm.LOGIT_SCALE,
    }
    keys |= {key: float(config[own]) for own, key in named.items() if config.get(own) is not None}
    if config["model_type"] in _WINDOWS:
        keys[attention.SLIDING_WINDOW] = config["sliding_window"]
    elif config["model_type"] == "phi3":
        keys[attention.SLIDING_WINDOW] = 0
    keys |= _of_positions(config, size)
    return {key.format(arch=architecture): value for key, value in keys.items()}


def rope_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Those of rotary embeddings of layers that see everything, and of the others where they have their own."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    whole, local = settings.get("full_attention", settings), settings.get("sliding_attention")
    base = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": whole.get("type", "default")}
    return {**base, **whole}, local


def _of_positions(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    from gguf import Keys

    rope, local = rope_settings(config)
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    keys = {Keys.Rope.DIMENSION_COUNT: int(size * part), Keys.Rope.FREQ_BASE: float(rope["rope_theta"])}
    if local is not None:
        keys[Keys.Rope.FREQ_BASE_SWA] = float(local["rope_theta"])
    context, original = config["max_position_embeddings"], rope.get("original_max_position_embeddings")
    stretch = rope.get("factor") or context / (original or context)
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {Keys.Rope.SCALING_TYPE: rope["rope_type"], Keys.Rope.SCALING_FACTOR: float(stretch)}
    if rope["rope_type"] in ("longrope", "yarn"):
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = original or context
    if rope["rope_type"] == "longrope":
        grown = math.sqrt(1 + math.log(max(stretch, 1.0)) / math.log(original or context))
        keys[Keys.Rope.SCALING_ATTN_FACTOR] = float(rope.get("attention_factor") or grown)
    return keys


def frequency_divisors(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Tensors of rotary embeddings → their values: of type longrope as config.json lists them, of type llama3 by its
    rule, by which wavelengths above a bound are stretched and those below another are not."""
    rope, _ = rope_settings(config)
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{kind}.weight": list(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope["rope_type"] != "llama3":
        return {}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turns = rope["original_max_position_embeddings"] / (
        2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    )
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: list[float] = (1 / ((1 - kept) / rope["factor"] + kept)).tolist()
    return {"rope_freqs.weight": divisors}


def _check_tokenizer(folder: Path, fields: Mapping[str, Any], vocabulary: int) -> None:
    """Keys of the tokenizer are those that its files make, the name of its rules for words among them; and tokens,
    types, merges or scores, special tokens and the template, once more by transformers."""
    from gguf import Keys
    from transformers import AutoTokenizer

    keys = Keys.Tokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    own = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens, types = fields.get(keys.LIST) or [], fields.get(keys.TOKEN_TYPE) or []
    if len(tokens) != max(vocabulary, len(tokenizer)) or len(types) != len(tokens):
        raise VerificationError(f"{folder}: {len(tokens)} tokens are not those of the embedding.", "Export again.")
    kinds, spaced = _types(tokenizer, model), bool(model.get("byte_fallback"))
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        wanted = own[number] if number < len(own) else None
        if (wanted is not None and token != wanted) or kind != kinds.get(number, _UNUSED):
            raise VerificationError(f"{folder}: token {number} is not that of the tokenizer.", "Export again.")
    for name, key in (("bos", keys.BOS_ID), ("eos", keys.EOS_ID), ("unk", keys.UNK_ID), ("pad", keys.PAD_ID)):
        if fields.get(key) != getattr(tokenizer, f"{name}_token_id"):
            raise VerificationError(f"{folder}: the {name} token is not that of the tokenizer.", "Export again.")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if spaced:
        _check_scores(folder, dict(zip(tokens, fields.get(keys.SCORES) or [], strict=False)), pairs)
    elif [tuple(merge.split(" ")) for merge in fields.get(keys.MERGES) or []] != pairs:
        raise VerificationError(f"{folder}: the merges are not those of the tokenizer.", "Export again.")
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if (fields.get(keys.CHAT_TEMPLATE) or None) != (template or None):
        raise VerificationError(f"{folder}: the chat template is not that of the tokenizer.", "Export again.")
    try:
        derived = tokenizer_keys(folder, vocabulary)
    except ModelError as error:
        raise VerificationError(f"{folder}: gguf {error.message}.", "Export again.") from error
    for key in {**derived, **{key: None for key in fields if key.startswith("tokenizer.")}}:
        if fields.get(key) != derived.get(key) and (fields.get(key) or derived.get(key)) != []:  # none is no merges
            raise VerificationError(f"{folder}: {key} is not that of the tokenizer.", "Export again.")


def _types(tokenizer: Any, model: Mapping[str, Any]) -> dict[int, int]:
    """Token → its type, of those that the tokenizer has."""
    found = dict.fromkeys(model["vocab"].values(), _NORMAL)
    if spaced := bool(model.get("byte_fallback")):
        found |= {model["vocab"].get(f"<0x{byte:02X}>", -1): _BYTE for byte in range(256)}
    for number, token in tokenizer.added_tokens_decoder.items():
        found[number] = _CONTROL if token.special else _USER_DEFINED
    if spaced and model.get("unk_token") is not None:
        found[tokenizer.convert_tokens_to_ids(model["unk_token"])] = _UNKNOWN
    return found


def _check_scores(folder: Path, scores: Mapping[str, float], pairs: list[tuple[str, ...]]) -> None:
    """Each merge makes a token of a lower score than the merges before it, as llama.cpp joins the highest first."""
    made = [scores.get("".join(pair)) for pair in dict.fromkeys(pairs)]
    order = list(dict.fromkeys(made))  # several merges may make one token, and the first of them counts
    if None in order or not all(one > other for one, other in pairwise(order)):  # type: ignore[operator]
        raise VerificationError(f"{folder}: the scores are not in the order of the merges.", "Export again.")
