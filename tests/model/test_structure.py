"""What is found about families, against what their published code says; and the memory of it between runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, save_seeing_model, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, LlamaModel

from quantcli.errors import ModelError
from quantcli.model.discovery import discover
from quantcli.model.skeleton import Skeleton
from quantcli.model.structure import Block, Structure
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.generation import cached_values

# Each shared input as "readers <- producer", + for a norm that multiplies by 1 + w; names without the block's path.
ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj <- input_layernorm"
ATTENTION_OUT = "self_attn.o_proj <- self_attn.v_proj"
MLP_OUT = "mlp.down_proj <- mlp.up_proj"
LLAMA = [ATTENTION, ATTENTION_OUT, "mlp.gate_proj mlp.up_proj <- post_attention_layernorm", MLP_OUT]
GEMMA = [ATTENTION + "+", ATTENTION_OUT, "mlp.gate_proj mlp.up_proj <- pre_feedforward_layernorm+", MLP_OUT]
QKV, GATE_UP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"


def experts_of(count: int) -> str:
    parts = ("gate_proj", "up_proj", "down_proj")
    return " ".join(f"mlp.experts.{i}.{part}" for i in range(count) for part in parts)


# family → (shared inputs, fused siblings, experts) of the second block
EXPECTED: dict[str, tuple[list[str], list[str], list[str]]] = {
    "llama": (LLAMA, [QKV, GATE_UP], []),
    "llama-tied": (LLAMA, [QKV, GATE_UP], []),
    "qwen2": (LLAMA, [QKV, GATE_UP], []),
    "qwen3": (LLAMA, [QKV, GATE_UP], []),
    "mistral": (LLAMA, [QKV, GATE_UP], []),
    "gemma2": (GEMMA, [QKV, GATE_UP], []),
    "gemma3": (GEMMA, [QKV, GATE_UP], []),
    "phi3": (
        [
            "self_attn.qkv_proj <- input_layernorm",
            "self_attn.o_proj <- self_attn.qkv_proj",
            "mlp.gate_up_proj <- post_attention_layernorm",
            "mlp.down_proj <- mlp.gate_up_proj",  # a half of it times a function of the other half
        ],
        [],
        [],
    ),
    "opt": (
        [
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj <- self_attn_layer_norm",
            "self_attn.out_proj <- self_attn.v_proj",
            "fc1 <- final_layer_norm",
            "fc2 <- fc1",  # relu lets positive scales through
        ],
        [QKV],
        [],
    ),
    "gpt2": (
        ["attn.c_attn <- ln_1", "attn.c_proj <- attn.c_attn", "mlp.c_fc <- ln_2", "mlp.c_proj"],  # gelu does not
        [],
        [],
    ),
    "falcon": (
        [
            "self_attention.query_key_value mlp.dense_h_to_4h <- input_layernorm",
            "self_attention.dense <- self_attention.query_key_value",
            "mlp.dense_4h_to_h",
        ],
        [],
        [],
    ),
    "gpt-neox": (
        [
            "attention.query_key_value <- input_layernorm",
            "attention.dense <- attention.query_key_value",
            "mlp.dense_h_to_4h <- post_attention_layernorm",
            "mlp.dense_4h_to_h",
        ],
        [],
        [],
    ),
    "cohere": (
        [f"{QKV} {GATE_UP} <- input_layernorm", ATTENTION_OUT, MLP_OUT],
        [QKV, GATE_UP],
        [],
    ),
    "mixtral": (
        [ATTENTION, ATTENTION_OUT],
        [QKV, " ".join(f"block_sparse_moe.experts.{i}.{w}" for i in range(4) for w in ("w1", "w3", "w2"))],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "qwen2-moe": (
        [
            ATTENTION,
            ATTENTION_OUT,
            "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert_gate <- post_attention_layernorm",
            "mlp.shared_expert.down_proj <- mlp.shared_expert.up_proj",
        ],
        [QKV, "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj", experts_of(4)],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "deepseek-v3": (
        [
            "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa <- input_layernorm",
            "self_attn.q_b_proj <- self_attn.q_a_layernorm",
            "self_attn.kv_b_proj <- self_attn.kv_a_layernorm",
            "self_attn.o_proj <- self_attn.kv_b_proj",
            "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj <- post_attention_layernorm",
            "mlp.shared_experts.down_proj <- mlp.shared_experts.up_proj",
        ],
        [
            "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa",
            "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj",
            experts_of(8),
        ],
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
}


structure_of = cache(discover)


def found_in(block: Block) -> tuple[list[str], list[str], list[str]]:
    def local(name: str) -> str:
        assert name.startswith(f"{block.name}.")
        return name.removeprefix(f"{block.name}.")

    inputs = []
    for shared in block.inputs:
        line = " ".join(map(local, shared.linears))
        if shared.producer:
            assert (shared.producer.kind == "norm") == ("norm" in shared.producer.name or "ln_" in shared.producer.name)
            line += f" <- {local(shared.producer.name)}{'+' if shared.producer.weight_offset == 1.0 else ''}"
        inputs.append(line)
    return (
        inputs,
        [" ".join(map(local, group)) for group in block.fused],
        [local(name) for experts in block.experts for name in experts.parameters],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tiny_model) -> None:
    structure = structure_of(tiny_model(family))
    inputs, fused, experts = found_in(structure.blocks[1])
    expected_inputs, expected_fused, expected_experts = EXPECTED[family]
    assert sorted(inputs) == sorted(expected_inputs)
    assert sorted(fused) == sorted(expected_fused)
    assert experts == expected_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_agree_with_the_model(family: str, tiny_model) -> None:
    directory = tiny_model(family)
    structure = structure_of(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    modules = dict(model.named_modules())

    assert structure.architecture == type(model).__name__
    assert sum(torch.Size(shape).numel() for shape in structure.parameters.values()) == model.num_parameters()
    stored = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert structure.parameters.items() <= stored.items()
    assert modules[structure.head] is model.get_output_embeddings()
    assert structure.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert (f"{structure.head}.weight" in structure.parameters) != structure.tied
    assert (structure.vocabulary, structure.width) == tuple(model.get_input_embeddings().weight.shape)

    assert len(structure.blocks) == model.config.num_hidden_layers
    linears = {linear.name: linear for linear in structure.linears()}
    for block in structure.blocks:
        for name in (*block.routers, *(name for experts in block.experts for name in experts.names)):
            if name not in modules or not isinstance(modules[name], nn.Linear):
                del linears[name]  # of no module: see test_experts.py
    inside = tuple(f"{block.name}." for block in structure.blocks)
    assert set(linears) == {
        name
        for name, module in modules.items()
        if name.startswith(inside) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    for name, linear in linears.items():
        shape = (linear.in_features, linear.out_features)
        assert tuple(modules[name].weight.shape) == (shape if linear.transposed else shape[::-1])
        assert linear.bias == (modules[name].bias is not None)
        assert linear.transposed == (family == "gpt2")
    for block in structure.blocks:
        read = {name for shared in block.inputs for name in shared.linears}
        assert {linear.name for linear in block.linears} & linears.keys() == read
        for shared in block.inputs:
            assert {linears[name].in_features for name in shared.linears} == {shared.width}


@pytest.mark.parametrize("family", FAMILIES)
def test_json_round_trip(family: str, tiny_model) -> None:
    structure = structure_of(tiny_model(family))
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))) == structure


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon", "qwen2-moe"])
def test_the_dtype_changes_nothing_but_itself(family: str, tiny_model) -> None:
    directory = tiny_model(family)
    found = {dtype: discover(directory, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
    for dtype, structure in found.items():
        assert structure == replace(found["float32"], dtype=dtype)
    assert discover(directory).dtype == "float32"
    assert discover(tiny_model(family, dtype=torch.bfloat16)).dtype == "bfloat16"


@pytest.mark.parametrize("family", ["falcon", "llama"])
def test_tuples_are_noticed(family: str, tiny_model) -> None:
    assert structure_of(tiny_model(family)).tuple_length == (2 if family == "falcon" else 0)


def test_blocks_of_different_make(tiny_model) -> None:
    blocks = discover(tiny_model("qwen2-moe", num_hidden_layers=4, mlp_only_layers=[0, 2])).blocks
    dense, sparse = (LLAMA, [QKV, GATE_UP], []), EXPECTED["qwen2-moe"]
    assert [found_in(block) for block in blocks] == [dense, sparse, dense, sparse]


def test_a_bias_is_noticed(tiny_model) -> None:
    biased = {linear.name.rpartition(".")[2] for linear in discover(tiny_model("qwen2")).linears() if linear.bias}
    assert biased == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n", "model.layers.0 is given states of 4 dimensions"),
        ("zaya", "model.layers.1 is given more than hidden states of the blocks before it"),
        ("inkling2", "model.layers.1 reads more than hidden states of the blocks before it"),
    ],
)
def test_blocks_that_hand_on_more_than_hidden_states_are_refused(family: str, reason: str, tmp_path: Path) -> None:
    tiny_config(family, architectures=["Any"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"cannot be run one block at a time: {reason}") as caught:
        discover(tmp_path)
    assert caught.value.remedy


def test_a_model_that_changes_the_states_between_blocks_is_refused(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = LlamaModel.forward

    def twice(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0] * 2, *given[1:])

    def doubled(model: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        """As Llama, but each block behind the first is given twice what the one before it puts out."""
        hooks = [block.register_forward_pre_hook(twice, prepend=True) for block in model.layers[1:]]
        try:
            return compute(model, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(LlamaModel, "forward", doubled)
    with pytest.raises(ModelError, match="1 is not given what the block before it puts out"):
        discover(tiny_model("llama"))


def test_blocks_with_heads_of_different_sizes(tiny_model) -> None:
    structure = discover(tiny_model("gemma4"))
    outputs = [block.name + ".self_attn.o_proj" for block in structure.blocks]
    widths = {linear.name: linear.in_features for linear in structure.linears()}
    assert [widths[name] for name in outputs] == [4 * 16, 4 * 32]
    assert structure.head_dim is None
    assert cached_values(tiny_config("gemma4")) == 2 * 2 * 2 * 32  # by the larger ones
    assert cached_values(tiny_config("llama")) == 2 * 2 * 2 * 16


def test_a_configuration_that_says_nothing_of_tied_embeddings(tmp_path: Path) -> None:
    tiny_config("inkling", architectures=["Any"]).save_pretrained(tmp_path)
    structure = discover(tmp_path)
    assert not structure.tied
    assert f"{structure.head}.weight" in structure.parameters


def test_weights_that_the_model_reads_itself_are_noticed(tiny_model) -> None:
    """Mamba multiplies by the weight of dt_proj without calling it."""
    apart = {linear.name.rpartition(".")[2] for linear in discover(tiny_model("mamba")).linears() if linear.read_apart}
    assert apart == {"dt_proj"}
    for family in ("llama", "qwen2-moe", "deepseek-v3", "gpt2"):
        assert not any(linear.read_apart for linear in structure_of(tiny_model(family)).linears())


def test_remembered_equals_found(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tiny_model("qwen2-moe")
    fresh = find_structure(directory)
    (kept,) = (tmp_path / "quantcli").rglob("*.json")
    assert Structure.from_json(json.loads(kept.read_text())) == fresh == discover(directory)
    assert find_structure(directory) == fresh
    bfloat16 = find_structure(directory, dtype="bfloat16")
    assert bfloat16.dtype == "bfloat16", "another dtype must not be answered with the remembered one"


def test_a_changed_configuration_is_found_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for layers in (2, 3):
        tiny_config("llama", num_hidden_layers=layers).save_pretrained(tmp_path)
        assert len(find_structure(tmp_path).blocks) == layers


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"blocks": 3}', '{"blocks": [], "parameters": []}'])
def test_a_damaged_memory_is_replaced(
    content: str, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = find_structure(tiny_model("llama"))
    (kept,) = (tmp_path / "quantcli").rglob("*.json")
    kept.write_text(content)
    assert find_structure(tiny_model("llama")) == fresh
    assert Structure.from_json(json.loads(kept.read_text())) == fresh


def test_a_cache_that_cannot_be_written_does_no_harm(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find_structure(tiny_model("llama")) == discover(tiny_model("llama"))


def test_a_remembered_structure_needs_no_torch(tiny_model) -> None:
    directory = tiny_model("llama")
    find_structure(directory)
    program = (
        "import sys, pathlib; from quantcli.model.structure_cache import find_structure; "
        "print(len(find_structure(pathlib.Path(sys.argv[1])).blocks), *({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        capture_output=True, text=True, check=True, env=os.environ, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert answer.stdout.split() == ["2"]


@pytest.mark.parametrize("method", [{"quant_method": "compressed-tensors"}, {"quant_method": "nope"}, {}, None])
def test_how_the_weights_are_stored_changes_nothing(method: dict | None, tiny_model, tmp_path: Path) -> None:
    content = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "quantization_config": method}))
    assert find_structure(tmp_path) == discover(tiny_model("llama"))


# One key each that makes the model impossible: transformers raises something else every time.
IMPOSSIBLE = {
    "hidden_size": "abc", "num_hidden_layers": 0, "num_attention_heads": 0, "num_key_value_heads": 3, "vocab_size": 0,
    "hidden_act": "nonsense", "rope_parameters": {"rope_type": "nonsense"}, "dtype": "nonsense", "model_type": None,
    "quantization_config": [4], "intermediate_size": -1,
}  # fmt: skip


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_impossible_configurations(key: str, tmp_path: Path) -> None:
    content = {**tiny_config("llama").to_dict(), key: IMPOSSIBLE[key]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        find_structure(tmp_path)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message", "remedy"),
    [
        (None, "holds no config.json", "model directory"),
        ("", "cannot be read as JSON", ""),
        ("[" * 100_000, "cannot be read as JSON", ""),
        ("\udcff", "cannot be read as JSON", ""),
        ("[]", "does not hold a JSON object", ""),
        ("{}", "'missing'", "Upgrade transformers"),
        ('{"model_type": "nope"}', "'nope'", "Upgrade transformers"),
        ('{"model_type": ["llama"]}', "llama", "Upgrade transformers"),
        ('{"model_type": "nope", "auto_map": {"AutoConfig": "evil.Config"}}', "needs code", "trust_remote_code: true"),
        ('{"model_type": "clip"}', "no causal language model", "decoder-only"),
        ('{"model_type": "t5"}', "t5", "decoder-only"),
    ],
)
def test_unusable_configurations(content: str | None, message: str, remedy: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=message) as caught:
        find_structure(tmp_path)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_a_model_of_text_and_images_is_told_from_a_damaged_one(tmp_path: Path, kind: str) -> None:
    model = save_seeing_model(tmp_path / "model", kind)
    with pytest.raises(ModelError, match="of text and images") as caught:
        Skeleton(model, find_structure(model))
    assert "Save its text model alone" in caught.value.remedy


def test_what_is_no_model_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="lora is an adapter, not a model") as caught:
        find_structure(tmp_path / "lora")
    assert "merge_and_unload" in caught.value.remedy
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no config\.json") as caught:
        find_structure(tmp_path / "models--org--name")
    assert str(snapshot) in caught.value.remedy


def test_code_from_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}}'
    )
    assert find_structure(tmp_path).architecture == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("family", "maker", "channels"),
    [
        ("llama", "self_attn.v_proj", range(32)),
        ("opt", "self_attn.v_proj", range(64)),
        ("phi3", "self_attn.qkv_proj", None),
        ("gpt2", "attn.c_attn", range(128, 192)),
        ("mixtral", "self_attn.v_proj", None),
    ],
)
def test_what_attention_adds_up_is_made_of_one_input(
    family: str, maker: str, channels: range | None, tiny_model
) -> None:
    for block in find_structure(tiny_model(family)).blocks:
        found = {shared.name: block.values_of(shared) for shared in block.inputs}
        (made,) = [values for values in found.values() if values is not None]
        assert made[0] == f"{block.name}.{maker}"
        assert channels is None or made[1] == [*channels]
        assert found[next(shared.name for shared in block.inputs if made[0] in shared.linears)] == made
