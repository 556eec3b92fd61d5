"""The families of models that are written as GGUF: what llama.cpp computes for each, as data.

Facts are from llama.cpp's sources (src/models) and from those of transformers; each row was run in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
"""config.json with all defaults filled in."""


@dataclass(frozen=True)
class Architecture:
    """A family as llama.cpp knows it.

    neighbours: it rotates channels 2j and 2j + 1 of a head, where transformers rotates j and j + half: the rows of the
    query and key projections change places. norm_offset: it multiplies by w where the norm of transformers multiplies
    by w + norm_offset. fixed: keys of config.json that a GGUF file has no room for, and the values it computes with;
    implied: the same of values that follow from other keys. further, scales: keys of the file beside those of KEYS →
    key of config.json, of whole numbers and of others; written: keys of the file that say the same for all models.
    partial: it can rotate a part of each head. ropes: the types of rotary embeddings that it computes. narrow: it loads
    queries only if all heads together are as wide as the residual stream.
    """

    name: str
    neighbours: bool = False
    norm_offset: float = 0.0
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    implied: Mapping[str, Callable[[Config], object]] = field(default_factory=dict)
    further: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=lambda: {"attention.layer_norm_rms_epsilon": "rms_norm_eps"})
    written: Mapping[str, int] = field(default_factory=dict)
    partial: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    narrow: bool = False


def head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _alternating(period: int) -> Callable[[Config], list[str]]:
    """layer_types of which each last one of `period` sees everything and the others a window."""
    return lambda config: [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _query_scale(largest: int) -> Callable[[Config], int]:
    """query_pre_attn_scalar of Gemma: the size of a head, but for the largest model, which has that many blocks."""
    return lambda config: (
        config["hidden_size"] // config["num_attention_heads"]
        if config["num_hidden_layers"] == largest
        else head_size(config)
    )


def _no_window(config: Config) -> int | None:
    """A sliding window that holds the whole context changes nothing; else there must be none."""
    window = config["sliding_window"]
    return window if window is not None and window >= config["max_position_embeddings"] else None


def _every_fourth(config: Config) -> list[int]:
    """no_rope_layers, which has a 1 for blocks that rotate."""
    return [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]


def _norms(key: str, **scales: str) -> dict[str, str]:
    return {"attention.layer_norm_epsilon": key, **scales}


_SILU: dict[str, tuple[object, ...]] = {"hidden_act": ("silu",)}
_UNLESS_USED: dict[str, tuple[object, ...]] = {**_SILU, "use_sliding_window": (False,)}
_UNBIASED: dict[str, tuple[object, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
_GEMMA: dict[str, tuple[object, ...]] = {
    **_UNBIASED,
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, False),
}
_GEMMA2 = {**_GEMMA, "hidden_activation": ("gelu_pytorch_tanh",)}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_LLAMA = ("default", "linear", "yarn", "llama3")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", neighbours=True, fixed=_SILU, ropes=_LLAMA),
    "mistral": Architecture(
        "llama", neighbours=True, fixed=_SILU, implied={"sliding_window": _no_window}, ropes=_LLAMA
    ),
    "qwen2": Architecture("qwen2", fixed=_UNLESS_USED, narrow=True),
    "qwen3": Architecture("qwen3", fixed={**_UNLESS_USED, **_UNBIASED}),
    "gemma": Architecture(
        "gemma", norm_offset=1.0, fixed={**_GEMMA, "hidden_act": ("gelu_pytorch_tanh",)}, ropes=("default",)
    ),
    "gemma2": Architecture(
        "gemma2",
        norm_offset=1.0,
        fixed=_GEMMA2,
        implied={"layer_types": _alternating(2), "query_pre_attn_scalar": _query_scale(46)},
        further={"attention.sliding_window": "sliding_window"},
        scales={
            **_RMS,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        ropes=("default",),
    ),
    "gemma3_text": Architecture(
        "gemma3",
        norm_offset=1.0,
        fixed={**_GEMMA2, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
        implied={"layer_types": _alternating(6), "query_pre_attn_scalar": _query_scale(62)},
        further={"attention.sliding_window": "sliding_window"},
        ropes=("default", "linear"),
    ),
    "phi3": Architecture(
        "phi3",
        fixed=_SILU,
        implied={"sliding_window": _no_window},
        written={"attention.sliding_window": 0},
        partial=True,
        ropes=("default", "longrope"),
        narrow=True,
    ),
    "granite": Architecture(
        "granite",
        neighbours=True,
        fixed=_SILU,
        scales={
            **_RMS,
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
        ropes=_LLAMA,
    ),
    "olmo2": Architecture("olmo2", fixed={**_SILU, **_UNBIASED, "tie_word_embeddings": (False,)}, narrow=True),
    "smollm3": Architecture(
        "smollm3",
        neighbours=True,
        fixed={**_UNLESS_USED, **_UNBIASED},
        implied={"no_rope_layers": _every_fourth},
    ),
    "starcoder2": Architecture(
        "starcoder2",
        fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
        implied={"sliding_window": _no_window},
        scales=_norms("norm_epsilon"),
        narrow=True,
    ),
    "stablelm": Architecture(
        "stablelm", fixed={**_SILU, "tie_word_embeddings": (False,)}, scales=_norms("layer_norm_eps"), partial=True
    ),
    "cohere": Architecture(
        "command-r",
        fixed={**_SILU, **_UNBIASED, "tie_word_embeddings": (True,), "use_qk_norm": (False,)},
        scales=_norms("layer_norm_eps", logit_scale="logit_scale"),
        narrow=True,
    ),
    "arcee": Architecture("arcee", neighbours=True, fixed={**_UNBIASED, "hidden_act": ("relu2",)}),
    "seed_oss": Architecture("seed_oss", fixed={**_SILU, "attention_out_bias": (False,), "mlp_bias": (False,)}),
    "ernie4_5": Architecture("ernie4_5", fixed={**_SILU, "use_bias": (False,)}),
    "nemotron": Architecture(
        "nemotron",
        norm_offset=1.0,
        fixed={**_UNBIASED, "hidden_act": ("relu2",), "tie_word_embeddings": (False,)},
        scales=_norms("norm_eps"),
        partial=True,
        narrow=True,
    ),
    "phi": Architecture(
        "phi2",
        fixed={"hidden_act": ("gelu_new",), "qk_layernorm": (False,), "tie_word_embeddings": (False,)},
        scales=_norms("layer_norm_eps"),
        partial=True,
        narrow=True,
    ),
}
"""model_type of config.json → what llama.cpp computes for it. Each was run there by the tests."""
