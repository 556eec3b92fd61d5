"""Writes a Llama of random weights, sharded, without holding it in memory, with a tokenizer of bytes.

python benchmarks/random_llama.py DIRECTORY [--layers 22]   hidden 2048, intermediate 5632, vocabulary 32000; 22: 1.1B
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantcli.model.writer import PlannedTensor, shard_names, split_shards, write_index, write_safetensors

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Parameter name → shape."""
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        named |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return named | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that joins nothing: behind three special tokens, one for each byte."""
    special = ["<unk>", "<s>", "</s>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def write(directory: Path, layers: int) -> None:
    """A checkpoint of about 1 GB a shard; the same weights every time."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    planned = [PlannedTensor(name, torch.bfloat16, shape) for name, shape in shapes(layers).items()]
    by_name = {tensor.name: tensor for tensor in planned}

    def produce(name: str) -> torch.Tensor:
        shape = by_name[name].shape
        return (
            torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=generator).mul_(0.02).to(torch.bfloat16))
        )

    shards = split_shards(planned, 1 << 30)
    for file, shard in zip(shard_names(len(shards)), shards, strict=True):
        write_safetensors(directory / file, shard, produce, {"format": "pt"})
    write_index(directory, shards)
    tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    arguments = parser.parse_args()
    write(arguments.directory, arguments.layers)
