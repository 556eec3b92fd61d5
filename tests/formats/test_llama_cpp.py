"""llama.cpp loads what is written as GGUF, cuts texts into the same tokens, and computes the same model.

It comes with the package xllamacpp; a process of its own asks it, since it ends the process where it fails.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_exports import Export, export_tiny
from tiny_models import tiny_tokenizer, token_batches
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from quantcli.errors import ModelError
from quantcli.model import gguf_tokenizer
from quantcli.quant.scheme import Scheme

SCRIPT = Path(__file__).parents[1] / "serving" / "llama_cpp.py"

pytestmark = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")

W8 = Scheme(8, granularity="group", group_size=32, float16_scales=True)
W4 = Scheme(4, granularity="group", group_size=64, float16_scales=True)
W4_ASYM = Scheme(4, symmetric=False, granularity="group", group_size=32, float16_scales=True)


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **keys}}


def longrope(divisors: int, original: int, **keys: float) -> dict[str, Any]:
    short, long = ([start + step * channel for channel in range(divisors)] for start, step in ((1.0, 0.1), (4.0, 8.0)))
    changes = rope("longrope", short_factor=short, long_factor=long, **keys)
    return {**changes, "original_max_position_embeddings": original, "max_position_embeddings": 512}


TIED = {"tie_word_embeddings": True}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
GEMMA3 = {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None}  # the last sees everything

MODELS: dict[str, tuple[str, Scheme, dict[str, Any]]] = {
    "llama": ("llama", W8, {}),
    "llama, tied": ("llama-tied", W4, {}),
    "llama, asymmetric": ("llama", W4_ASYM, {}),
    "llama, biases": ("llama", W8, {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", W8, {"head_dim": 32}),
    "llama, linear rope": ("llama", W8, rope("linear", factor=4.0)),
    "llama, yarn": ("llama", W8, rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama, llama3 rope": ("llama", W8, LLAMA3),
    "mistral": ("mistral", Scheme(8, granularity="tensor", float16_scales=True), {"sliding_window": None}),
    "mistral, wide window": ("mistral", W8, {"sliding_window": 256}),
    # the tokenizer of their class has a token more
    "qwen2": ("qwen2", Scheme(8, float16_scales=True), {"vocab_size": 520}),
    "qwen3": ("qwen3", Scheme(4, float16_scales=True), {"vocab_size": 520}),
    "gemma": ("gemma", W4, {}),
    "gemma2": (
        "gemma2",
        W4_ASYM,
        {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5},
    ),
    "gemma3": ("gemma3", W8, GEMMA3),
    "gemma3, linear rope": (
        "gemma3",
        W4,
        {
            **GEMMA3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "phi3": ("phi3", W4_ASYM, {}),
    "phi3, tied": ("phi3", W8, TIED),
    # windows are 48 tokens long, and contexts of llama.cpp at least 256: short factors in both, then long ones
    "phi3, longrope": ("phi3", W4, longrope(8, original=256)),
    "phi3, longrope beyond": ("phi3", W8, longrope(8, original=32, attention_factor=1.5)),
    "phi3, part of a head": ("phi3", W8, longrope(6, original=256, partial_rotary_factor=0.75)),
    "granite": (
        "granite",
        W4,
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.6,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    "granite, biases": ("granite", W8, {"attention_multiplier": 0.6, "attention_bias": True, "mlp_bias": True}),
    "granite, llama3 rope, tied": ("granite", W8, {"attention_multiplier": 0.6, **LLAMA3, **TIED}),
    "olmo2": ("olmo2", W8, {}),
    "olmo2, yarn": ("olmo2", W4_ASYM, rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "smollm3": ("smollm3", W4, {}),
    "smollm3, tied": ("smollm3", W8, TIED),
    "starcoder2": ("starcoder2", W8, {}),
    "starcoder2, tied": ("starcoder2", W4_ASYM, TIED),
    "stablelm": ("stablelm", W8, {}),
    "stablelm, biases": ("stablelm", W4, {"use_qkv_bias": True, "use_parallel_residual": True}),
    "cohere": ("cohere", W8, {"logit_scale": 0.3}),
    "arcee": ("arcee", W4, {}),
    "arcee, tied": ("arcee", W8, TIED),
    "seed_oss": ("seed_oss", W8, {}),
    "seed_oss, no biases, tied": ("seed_oss", W8, {"attention_bias": False, **TIED}),
    "ernie4_5": ("ernie4_5", W4_ASYM, {}),
    "ernie4_5, tied": ("ernie4_5", W8, TIED),
    "ernie4_5, yarn": ("ernie4_5", W8, rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "cohere, yarn": ("cohere", W8, rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "nemotron": ("nemotron", W8, {}),
    "nemotron, linear rope": ("nemotron", W8, rope("linear", factor=4.0)),
    "phi": ("phi", W8, {}),
    "phi, yarn": ("phi", W8, rope("yarn", factor=4.0, original_max_position_embeddings=32)),
}

TEXTS = [
    "",
    " The river",
    "The miller's daughter, who'd read; SHE'LL say: it's 12345 or 3.14 (and 007)!",
    "\n\nTwo lines\r\n\tand a tab   and  spaces   \n \n",
    "Größe naïve façade Ελληνικά русский 三月の川 한국어 ９ ½",
    "a😀b 👩‍👩‍👧 \u00a0x \u200b",
    "def f(x):\n    return x**2 != 0x1F  # 100%\n",
    "<s>special</s> inside <pad>",
    "https://example.org/?q=1&r=__2__",
    "a     b  c\n\n\n\nd\n\n  e<start_of_turn>user\nHi  there\n\n\n",
]


def asked(model: Path, place: Path, **questions: Any) -> dict[str, Any]:
    (place / "questions.json").write_text(json.dumps(questions))
    command = [sys.executable, str(SCRIPT), str(model), str(place / "questions.json"), str(place / "answers.json")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found: dict[str, Any] = json.loads((place / "answers.json").read_text())
    return found


def logits_of(export: Export, windows: torch.Tensor) -> torch.Tensor:
    """Those of transformers, in float32, with the weights that are read back."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export.model, dtype=torch.float32)
    reader = export.reader()
    model.load_state_dict({name: reader.read([name])[name].float() for name in reader.entries}, strict=False)
    with torch.inference_mode():
        return model(windows).logits


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(name: str, tmp_path: Path) -> None:
    """Up to the rounding of inputs to 8 bits: a change of rows, keys or rotation moves logits by half of themselves."""
    family, scheme, changes = MODELS[name]
    export = export_tiny(tmp_path, scheme, family, form="gguf", dtype=torch.bfloat16, with_tokenizer=True, **changes)
    export.verify()
    (windows,) = token_batches((2, 48))
    answers = asked(export.folder / "model.gguf", tmp_path, texts=TEXTS, windows=windows.tolist(), logits=True)
    expected, found = logits_of(export, windows), torch.tensor(answers["logits"])
    assert (found - expected).norm() / expected.norm() < 0.04
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert math.exp(sum(answers["nll"]) / windows[:, 1:].numel()) == pytest.approx(loss.exp().item(), rel=0.02)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export.folder)
    assert answers["tokens"] == [tokenizer.encode(text) for text in TEXTS]


def byte_level(steps: tuple[str, ...], whole_words: bool, normal: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of 512 tokens with the rules of an entry of PRETOKENIZERS, in the words of tokenizer.json."""
    made = {
        "gpt2 words": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "single digits": lambda: pre_tokenizers.Digits(individual_digits=True),
    }
    parts = [made[s]() if s in made else pre_tokenizers.Split(Regex(s), "isolated") for s in steps]
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    core.decoder = decoders.ByteLevel()
    if normal:
        core.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    core.train_from_iterator([*TEXTS[1:7] * 4, "12 123 1234 it's SHE'LL who'd x**2   \n\n\n" * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def cut_out(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, with words as what is left when all between them is removed, as converters from tiktoken write it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    return tokenizer


def spaced(prefix: bool) -> PreTrainedTokenizerFast:
    """A BPE over characters with ▁ for spaces and bytes for what it does not know, as Llama 2 has."""
    alphabet = sorted({character for text in TEXTS[1:4] for character in text if character.isprintable()} - {" "})
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text.replace(" ", "▁") for text in TEXTS[1:4] * 4], trainer)
    rules = json.loads(core.to_str())
    rules["added_tokens"] = [entry for entry in rules["added_tokens"] if entry["id"] < 3]
    core = Tokenizer.from_str(json.dumps(rules))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """The tokenizer of Llama 2's class, which makes ▁ of spaces when it cuts."""
    model = json.loads(spaced(False).backend_tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True)


def gemma() -> PreTrainedTokenizerFast:
    """The tokenizer of its class, with every pair that makes a piece among the merges and with added tokens for lines
    and spaces, as published ones have."""
    own = ["\n\n", "▁▁", "▁▁▁"]
    model = json.loads(spaced(False).backend_tokenizer.to_str())["model"]
    known = [piece for piece in model["vocab"] if piece not in own][3:]
    pieces = dict.fromkeys([*own, *("".join(pair) for pair in model["merges"])])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"]
    vocabulary = {piece: number for number, piece in enumerate([*special, *own, "\n", *known][:512])}
    pairs = [(piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))]
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= set(vocabulary)]
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=["<start_of_turn>"])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    return tokenizer


def with_eos() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_added_tokens_that_are_found_behind_the_rules_for_spaces_are_refused(tmp_path: Path) -> None:
    tokenizer = gemma()
    tokenizer.add_tokens([AddedToken("▁x▁", normalized=True)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="▁x▁ behind its rules"):
        gguf_tokenizer.tokenizer_keys(tmp_path, 0)


TOKENIZERS = {
    **{name: lambda key=key: byte_level(*key) for key, name in gguf_tokenizer.PRETOKENIZERS.items()},
    "matches cut out": lambda: cut_out(byte_level((gguf_tokenizer._LLAMA3, "bytes"), whole_words=False)),
    "composed": lambda: byte_level(*next(iter(gguf_tokenizer.PRETOKENIZERS)), normal=True),
    "llama": lambda: spaced(True),
    "llama without prefix": lambda: spaced(False),
    "llama in transformers": metaspace,
    "gemma": gemma,
    "ends with eos": with_eos,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_texts_into_the_same_tokens(name: str, tmp_path: Path) -> None:
    export = export_tiny(tmp_path, W8, form="gguf", with_tokenizer=True)
    TOKENIZERS[name]().save_pretrained(export.model)
    export.write(tmp_path / "again")
    used = transformers.AutoTokenizer.from_pretrained(export.model)
    # after a special token llama.cpp puts a space before spaced words, as older versions of transformers did
    texts = [text for text in TEXTS if "<s>" not in text or not name.startswith("llama")]
    if name == "llama in transformers":  # which puts no space before one, as SentencePiece and llama.cpp do
        texts = [text for text in texts if not text.startswith(" ")]
    answers = asked(tmp_path / "again" / "model.gguf", tmp_path, texts=texts)
    assert answers["tokens"] == [used.encode(text) for text in texts]
