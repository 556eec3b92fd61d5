"""Makes the small checkpoints of other tools beside this file. Each tool has an environment of its own:

    python -m venv peer && peer/bin/pip install llmcompressor && peer/bin/python make.py llm-compressor
    python -m venv peer && peer/bin/pip install auto-round && peer/bin/python make.py auto-round

The model is a random Llama with a tokenizer of bytes. `scores.json` beside the checkpoints holds what transformers, in
the tool's environment and in float32 (AutoRound's in float16, which its code sets), finds for text.txt: perplexity of
its windows of LENGTH tokens, each alone.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LENGTH, GROUP = 64, 32


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def float_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # a few channels far above the others
        layer.input_layernorm.weight.data[::16] *= 8
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def windows() -> torch.Tensor:
    tokens = tokenizer()((HERE / "text.txt").read_text(encoding="utf-8")).input_ids
    count = len(tokens) // LENGTH
    return torch.tensor(tokens[: count * LENGTH]).view(count, LENGTH)


def in_float32(folder: Path, place: Path) -> Path:
    """A copy of the checkpoint in `place`, whose configuration says float32."""
    copy = shutil.copytree(folder, place / folder.name)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"
    (copy / "config.json").write_text(json.dumps(config | {key: "float32"}), encoding="utf-8")
    return copy


@torch.inference_mode()
def perplexity(folder: Path) -> float:
    with tempfile.TemporaryDirectory() as place:
        copy = in_float32(folder, Path(place))
        model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
        logits = model(input_ids=windows(), use_cache=False).logits[:, :-1].flatten(0, 1)
    return math.exp(float(cross_entropy(logits.float(), windows()[:, 1:].flatten())))


def by_llm_compressor(source: Path) -> dict[str, Path]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    grid = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    fours = {"linears": QuantizationScheme(targets=["Linear"], weights=grid)}
    recipes = {
        "llm-compressor-w8a8": [
            SmoothQuantModifier(smoothing_strength=0.8),
            GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        "llm-compressor-w4a16": [GPTQModifier(config_groups=fours, ignore=["lm_head"])],
    }
    rows = [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in windows().tolist()]
    made = {}
    for name, recipe in recipes.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        oneshot(model=model, recipe=recipe, dataset=Dataset.from_list(rows), max_seq_length=LENGTH,
                num_calibration_samples=len(rows))  # fmt: skip
        made[name] = HERE / name
        model.save_pretrained(made[name], save_compressed=True)
        tokenizer().save_pretrained(made[name])
    return made


def by_auto_round(source: Path) -> dict[str, Path]:
    from auto_round import AutoRound

    model, made = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), HERE / "auto-round"
    with tempfile.TemporaryDirectory() as place:
        AutoRound(
            model, tokenizer(), scheme="W4A16", bits=4, group_size=GROUP, sym=True, iters=5, nsamples=16,
            seqlen=LENGTH, batch_size=4, dataset=[row[None] for row in windows()], device_map="cpu",
        ).quantize_and_save(place, format="auto_round")  # fmt: skip
        (found,) = {file.parent for file in Path(place).rglob("config.json")}
        shutil.copytree(found, made, dirs_exist_ok=True)
    return {made.name: made}


def main(tool: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        float_model(Path(place))
        made = (by_llm_compressor if tool == "llm-compressor" else by_auto_round)(Path(place))
    file = HERE / "scores.json"
    scores = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, folder in made.items():
        package = "llmcompressor" if tool == "llm-compressor" else "auto-round"
        scores[name] = {"tool": f"{package} {version(package)}", "perplexity": perplexity(folder)}
    file.write_text(json.dumps(scores, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
