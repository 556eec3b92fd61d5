"""Tiny random models of many families, saved as real checkpoints. For every test that needs a model.

    directory = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)

FAMILIES       names that `save_tiny_model` and `tiny_config` know
tiny_config    the transformers configuration of a family; keyword arguments override its keys
save_tiny_model  a model directory (safetensors, config.json and, if asked for, a tokenizer)
tiny_tokenizer   a byte-level BPE tokenizer of at most 512 tokens, made for `VOCABULARY`
save_seeing_model  a model of text and images
token_batches    random token ids of several lengths

Two decoder blocks (Gemma 3 has four, DeepSeek three, so that both kinds of block occur), hidden size 64, intermediate
size 96, vocabulary 512. Every parameter is random, norms and biases too, so that one that is lost or swapped shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

torch.set_num_threads(1)  # threads cost more than they give at these sizes
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCABULARY = 512
PAD, BOS, EOS = 0, 1, 2

_SPECIAL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_COMMON: dict[str, Any] = {
    **_SPECIAL,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
_BARE: dict[str, Any] = {**_SPECIAL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
# attention of compressed keys and values, before experts
_LATENT: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "qk_rope_head_dim": 8,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "llama-tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 16}),
    "gemma2": ("gemma2", {**_COMMON, "head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        {
            **_COMMON,
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi3": ("phi3", _COMMON),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 8}),
    "opt": (
        "opt",
        {
            **_BARE,
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 256,
            "do_layer_norm_before": True,
        },
    ),
    "gpt2": ("gpt2", {**_SPECIAL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "falcon": ("falcon", _BARE),
    "gpt-neox": ("gpt_neox", {**_BARE, "intermediate_size": 96, "max_position_embeddings": 256}),
    "cohere": ("cohere", {**_COMMON, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **_COMMON,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # compressed keys and values, a dense first block, a routing bias that stays in float32 whatever the dtype
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
        },
    ),
}
"""Name → (model_type of transformers, configuration keys)."""
_FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "qwen3_moe",
        {**_COMMON, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gemma": ("gemma", {**_COMMON, "head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {**_COMMON, "num_hidden_layers": 4}),  # the last does not rotate
    "seed_oss": ("seed_oss", {**_COMMON, "head_dim": 16}),
    "ernie4_5": ("ernie4_5", {**_COMMON, "head_dim": 16}),
    **{kind: (kind, _COMMON) for kind in ("granite", "olmo2", "starcoder2", "stablelm", "arcee", "nemotron", "phi")},
    # blocks that return more than hidden states, and models that take the rest apart from them
    "bamba": (
        "bamba",
        {
            **_COMMON,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "zaya": ("zaya", {**_COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 1}),
    "gemma3n": (
        "gemma3n_text",
        {
            **_COMMON,
            "head_dim": 16,
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    # gated convolutions, and attention in the second block
    "lfm2": ("lfm2", {**_COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    # heads of two sizes, and embeddings of tokens that each block is given beside the hidden states
    "gemma4": (
        "gemma4_text",
        {
            **_COMMON,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
        },
    ),
    # configurations that say nothing of tied embeddings
    "inkling": ("inkling_text", {**_COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "inkling2": ("inkling2_text", {**_COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("mamba", {**_SPECIAL, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 16}),
    "deepseek-v2": (
        "deepseek_v2",
        {
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
"""Models that single tests ask for."""


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a family, with changed keys."""
    model_type, keys = (FAMILIES | _FURTHER)[family]
    return transformers.AutoConfig.for_model(model_type, **{**keys, **changes})


def save_tiny_model(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    with_tokenizer: bool = False,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """A random model of `family` in `directory`, which is made and returned.

    `changes` override configuration keys. `max_shard_size="20KB"` makes several shards and an index. The same arguments
    give the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    stored = {value.data_ptr(): value for value in model.state_dict().values()}  # tied ones once, buffers too
    for value in stored.values():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            value.add_(noise * 0.1)
        else:
            value.copy_(noise * value.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(directory)
    return directory


def save_seeing_model(directory: Path, kind: str = "gemma3") -> Path:
    """A random model of text and images in `directory`: Gemma 3, or `mistral3`, with a tied head, and a tokenizer."""
    seed = torch.random.get_rng_state()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    if kind == "gemma3":
        text = {**_COMMON, **FAMILIES["gemma3"][1]}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=510
        )
    else:
        text, pixtral = {**_COMMON, "model_type": "mistral"}, {**vision, "model_type": "pixtral"}
        config = transformers.Mistral3Config(text_config=text, vision_config=pixtral, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    torch.random.set_rng_state(seed)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def token_batches(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    """Random token ids [samples, tokens] of each given shape, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, shape, generator=generator) for shape in shapes]


def tiny_tokenizer(texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 512 tokens that puts <s> first; every text can be encoded and decoded.

    Trained on `texts`, or on a page of English.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],  # ids PAD, BOS, EOS
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts or [_ENGLISH], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


_ENGLISH = """
The river came down from the hills in the spring and carried the winter with it. In the village they watched the water
rise against the stones of the old bridge, and when it reached the third stone they moved the sheep to the upper field.
Nobody remembered who had cut the marks, but everybody knew what they meant. The first was for washing, the second for
worry, and the third for work. There had been a fourth once, above the arch, which the oldest of them said was for
prayer; the stone that bore it had gone in the year of the great flood, together with the mill and the miller's house.
A wheel turns because the water falls, and the water falls because the ground lets it. This the miller's daughter used
to say whenever somebody asked her why she had not built again in the same place. She had learned to read from the
weights and measures that were painted on the wall, and she could tell from the sound of the grain how long it had been
stored. Her own children learned from books, as children do now, and some of them went to the town and came back with
machines that measured the height of the river every hour and sent the number over a wire. They were good machines.
They were right more often than the stones had been, and they could say what would happen tomorrow; but they did not
say what to do, and so in the evening, when the numbers had been read, people still walked down to look at the bridge.
"""
