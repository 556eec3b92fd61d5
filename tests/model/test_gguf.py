"""GGUF files, against tensors known beforehand and against what transformers itself reads from them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantcli.errors import ModelError, OutputError
from quantcli.model import gguf as converter
from quantcli.model.gguf import convert_gguf
from quantcli.model.gguf_layout import computed

gguf = pytest.importorskip("gguf")
Q8_0, Q4_0, F16, F32 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F16", "F32"))

HIDDEN, MLP, HEADS, KV_HEADS, LAYERS, EXPERTS = 64, 96, 4, 2, 2, 3
HEAD = HIDDEN // HEADS
EXPERT_MLP = 768  # what transformers assumes for qwen3moe: it does not read the width of an expert from the file
# Byte-level characters as GPT-2 maps them: printable ones stand for themselves, the rest follow from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
TOKENS = [*BYTES, "th", "the", "Ġthe", "<|end|>", *(f"<|unused{i}|>" for i in range(4))]
MERGES = ["t h", "th e", "Ġ the"]
REAL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.gguf"


def write_gguf(
    path: Path, architecture: str, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]], **keys: float
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for key, value in keys.items():
        writer.add_float32(key, value)
    if architecture == "qwen3moe":
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERT_MLP)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_bos_token_id(TOKENS.index("<|end|>"))
    writer.add_eos_token_id(TOKENS.index("<|end|>"))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(
    architecture: str, tied: bool, seed: int = 0
) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """Tensors of a tiny model under their GGUF names, of several types."""
    generator = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    tensors = {"token_embd.weight": (values(len(TOKENS), HIDDEN), Q8_0), "output_norm.weight": (values(HIDDEN), F32)}
    if not tied:
        tensors["output.weight"] = (values(len(TOKENS), HIDDEN), F16)
    for layer in range(LAYERS):
        block = {
            "attn_norm": (values(HIDDEN), F32),
            "ffn_norm": (values(HIDDEN), F32),
            "attn_q": (values(HIDDEN, HIDDEN), Q8_0),
            "attn_k": (values(KV_HEADS * HEAD, HIDDEN), Q4_0),
            "attn_v": (values(KV_HEADS * HEAD, HIDDEN), F16),
            "attn_output": (values(HIDDEN, HIDDEN), F32),
        }
        if architecture == "qwen3moe":
            block |= {
                "attn_q_norm": (values(HEAD), F32),
                "attn_k_norm": (values(HEAD), F32),
                "ffn_gate_inp": (values(EXPERTS, HIDDEN), F32),
                "ffn_gate_exps": (values(EXPERTS, EXPERT_MLP, HIDDEN), Q8_0),
                "ffn_up_exps": (values(EXPERTS, EXPERT_MLP, HIDDEN), Q8_0),
                "ffn_down_exps": (values(EXPERTS, HIDDEN, EXPERT_MLP), Q8_0),
            }
        else:
            block |= {
                "ffn_gate": (values(MLP, HIDDEN), Q4_0),
                "ffn_up": (values(MLP, HIDDEN), Q8_0),
                "ffn_down": (values(HIDDEN, MLP), Q8_0),
            }
        tensors |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    return tensors


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", "llama", random_tensors("llama", tied=True))


def read_by_transformers(path: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def assert_same(directory: Path, expected: dict[str, Tensor]) -> None:
    loaded, notes = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(notes.values()), notes
    state = loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen3moe", False)])
def test_converted_model_is_what_transformers_reads(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", architecture, random_tensors(architecture, tied))
    convert_gguf(path, tmp_path / "out")
    assert_same(tmp_path / "out", read_by_transformers(path))

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    if architecture == "qwen3moe":  # as published checkpoints name them, which serving engines expect
        assert stored["model.layers.1.mlp.experts.2.gate_proj.weight"].shape == (EXPERT_MLP, HIDDEN)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM" if architecture == "llama" else "Qwen3MoeForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is tied
    assert "quantization_config" not in config
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == TOKENS.index("<|end|>")


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary rows, row by row: dimension j of a head and j + half of it become neighbours."""
    rows = []
    for head in np.split(weight, heads):
        for j in range(len(head) // 2):
            rows += [head[j], head[j + len(head) // 2]]
    return np.stack(rows)


def test_query_and_key_rows_return_to_their_order(tmp_path: Path) -> None:
    tensors = {name: (values, F32) for name, (values, _) in random_tensors("llama", tied=False).items()}
    expected = {name: values.copy() for name, (values, _) in tensors.items()}
    for layer in range(LAYERS):
        for name, heads in ((f"blk.{layer}.attn_q.weight", HEADS), (f"blk.{layer}.attn_k.weight", KV_HEADS)):
            tensors[name] = (interleave_halves(expected[name], heads), F32)
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", "llama", tensors), tmp_path / "out", torch.float32)

    stored = load_file(tmp_path / "out" / "model.safetensors")
    pairs = {
        "model.embed_tokens": "token_embd",
        "model.layers.1.self_attn.q_proj": "blk.1.attn_q",
        "model.layers.1.self_attn.k_proj": "blk.1.attn_k",
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
        "model.layers.1.post_attention_layernorm": "blk.1.ffn_norm",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(stored[f"{ours}.weight"], torch.from_numpy(expected[f"{theirs}.weight"])), ours


def test_tokenizer_depends_on_the_file_alone(tiny: Path, tmp_path: Path) -> None:
    text = "the cat and\nthe hat <|end|> é"
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "cat"}')
    convert_gguf(tiny, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[:2] == [TOKENS.index("the"), TOKENS.index("Ġ")]
    assert TOKENS.index("Ġthe") not in ids  # "the" follows a line break here, never a space
    assert TOKENS.index("<|end|>") in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|end|>"


def test_shards_hold_the_same_model(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter, "MAXIMUM_SHARD_BYTES", 40_000)
    convert_gguf(tiny, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert_same(tmp_path / "out", read_by_transformers(tiny))


def test_same_file_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    convert_gguf(tiny, tmp_path / "a")
    convert_gguf(tiny, tmp_path / "b")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def refusal(path: Path, directory: Path) -> str:
    """The message with which `path` is refused; nothing may be left behind."""
    before = sorted(directory.iterdir())
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, directory / "out")
    assert sorted(directory.iterdir()) == before
    assert str(path) in caught.value.message
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 100, 3000, 0.9])
def test_truncated_file_is_refused(tiny: Path, tmp_path: Path, kept: float) -> None:
    content = tiny.read_bytes()
    tiny.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "Download it again" in refusal(tiny, tmp_path)


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "no complete GGUF file" in refusal(tmp_path / "model.gguf", tmp_path)
    assert "no such file" in refusal(tmp_path / "absent.gguf", tmp_path)


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "odd.gguf", "perceptron", random_tensors("llama", tied=True))
    assert "perceptron" in refusal(path, tmp_path)


def test_missing_and_unplaced_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors("llama", tied=True)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    path = write_gguf(tmp_path / "lacking.gguf", "llama", lacking)
    assert "model.layers.1.mlp.up_proj.weight" in refusal(path, tmp_path)
    scaled = tensors | {"rope_freqs.weight": (np.full(HEAD // 2, 8.0, np.float32), F32)}
    path = write_gguf(tmp_path / "scaled.gguf", "llama", scaled)
    assert "rope_freqs.weight" in refusal(path, tmp_path)


KEYS = {  # of a file → what a configuration made of it says
    "plain": ("llama", {}, {"rope_type": "default"}),
    "linear": ("llama", {"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear, by its old key": ("llama", {"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "none": ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    "yarn": (
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "part of a head": ("stablelm", {"rope.dimension_count": 8}, {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", KEYS)
def test_rotary_embeddings_are_those_of_the_keys(name: str) -> None:
    family, keys, expected = KEYS[name]
    config = tiny_config(family).to_dict()
    found = computed(config, {f"{family}.{key}": value for key, value in keys.items()})["rope_parameters"]
    assert found == {"rope_type": "default", "rope_theta": 10000.0} | expected


def test_keys_that_transformers_does_not_read_are_in_the_configuration() -> None:
    config = tiny_config("gemma2", num_hidden_layers=46, layer_types=["full_attention"] * 46).to_dict()
    keys = {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0, "attention.sliding_window": 64}
    found = computed(config, {f"gemma2.{key}": value for key, value in keys.items()})
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (40.0, 20.0)
    assert found["sliding_window"] == 64
    assert found["layer_types"] == ["sliding_attention", "full_attention"] * 23
    assert found["query_pre_attn_scalar"] == 64 / 4  # hidden size / heads
    assert computed({"model_type": "mamba"}, {}) == {}


def test_rotary_embeddings_of_windows_have_a_base_of_their_own() -> None:
    keys = {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 5e3, "gemma3.rope.scaling.factor": 8.0}
    assert computed(tiny_config("gemma3").to_dict(), keys)["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }


@pytest.mark.parametrize("key", ["attn_factor", "yarn_log_multiplier"])
def test_keys_that_no_configuration_says_are_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", random_tensors("llama", tied=True), **{f"llama.rope.scaling.{key}": 1.5})
    assert f"says rope.scaling.{key}" in refusal(path, tmp_path)


def test_a_scaled_model_is_converted_as_one(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", random_tensors("llama", tied=True), **{"llama.rope.scaling.factor": 2.0})
    convert_gguf(path, tmp_path / "out")
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


def test_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    tensors = random_tensors("llama", tied=True)
    tensors["blk.0.ffn_up.weight"] = (np.zeros((MLP + 1, HIDDEN), np.float32), F32)
    path = write_gguf(tmp_path / "odd.gguf", "llama", tensors)
    assert "blk.0.ffn_up.weight has shape (97, 64)" in refusal(path, tmp_path)


def test_existing_directory_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        convert_gguf(tiny, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_missing_package_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'quantcli[gguf]'" in refusal(tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="make demo brings the model")
def test_real_model_is_what_transformers_reads(tmp_path: Path) -> None:
    convert_gguf(REAL, tmp_path / "out")
    assert_same(tmp_path / "out", read_by_transformers(REAL))
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(REAL.parent, gguf_file=REAL.name)
    text = "The quick brown fox; 12,345 naïve cafés.\n\n\tdef f(x):  return x**2  # 数学"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text
    chat = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


def test_a_conversion_that_another_process_ended_first_is_as_good(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    destination, dead = place / "converted", place / ".converted.99999999.part"
    dead.mkdir(parents=True)
    os.utime(dead, (0, 0))  # of a process that has ended, and untouched for long
    write_weights = converter._write_weights

    def overtaken(*arguments: object) -> None:
        write_weights(*arguments)  # type: ignore[arg-type]
        destination.mkdir()
        (destination / "config.json").write_text("theirs")

    monkeypatch.setattr(converter, "_write_weights", overtaken)
    convert_gguf(tiny, destination)
    assert [path.name for path in place.iterdir()] == ["converted"]
    assert (destination / "config.json").read_text() == "theirs"
