"""What reads a producer's channels, how blocks meet the residual stream, and what norms compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantcli.model import experts, watch
from quantcli.model.discovery import discover
from quantcli.model.experts import find_experts, reads_by_a_product
from quantcli.model.norms import describe_norm, norm_offset, turns_with_its_input
from quantcli.model.structure import Norm, Producer, rotation_obstacles
from quantcli.model.watch import Watch

structure_of = cache(discover)

# families → (norms of the stream of the second block, with + for 1 + w, c if centred, b with a bias; writers; obstacle)
RESIDUAL: dict[tuple[str, ...], tuple[str, str, str]] = {
    ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3"): (
        "input_layernorm post_attention_layernorm", "self_attn.o_proj mlp.down_proj", ""
    ),
    ("gemma2", "gemma3"): (
        "input_layernorm+ pre_feedforward_layernorm+", "",
        "the output of the norm post_attention_layernorm is added to the residual stream",
    ),
    ("opt",): ("self_attn_layer_norm:cb final_layer_norm:cb", "self_attn.out_proj fc2", ""),
    ("gpt2",): ("ln_1:cb ln_2:cb", "attn.c_proj mlp.c_proj", ""),
    ("falcon",): ("input_layernorm:cb", "self_attention.dense mlp.dense_4h_to_h", ""),
    ("gpt-neox",): (
        "input_layernorm:cb post_attention_layernorm:cb", "attention.dense mlp.dense_4h_to_h", ""
    ),
    ("cohere",): ("input_layernorm:c", "self_attn.o_proj mlp.down_proj", ""),
    ("mixtral",): ("input_layernorm post_attention_layernorm", "self_attn.o_proj", ""),
    ("qwen2-moe",): (
        "input_layernorm post_attention_layernorm", "self_attn.o_proj mlp.shared_expert.down_proj", ""
    ),
    ("deepseek-v3",): (
        "input_layernorm post_attention_layernorm", "self_attn.o_proj mlp.shared_experts.down_proj", ""
    ),
}  # fmt: skip
# family → (embeddings, final norm), of models whose stream can be rotated outside of the blocks
OUTSIDE: dict[str, tuple[list[str], str]] = {
    "gpt2": (["transformer.wpe.weight", "transformer.wte.weight"], "transformer.ln_f:cb"),
    "falcon": (["transformer.word_embeddings.weight"], "transformer.ln_f:cb"),
    "gpt-neox": (["gpt_neox.embed_in.weight"], "gpt_neox.final_layer_norm:cb"),
    "gemma2": (["model.embed_tokens.weight"], "model.norm+"),
    "gemma3": (["model.embed_tokens.weight"], "model.norm+"),
    "cohere": (["model.embed_tokens.weight"], "model.norm:c"),
}


def described(norm: Norm) -> str:
    marks = "c" * norm.centred + "b" * norm.bias
    return norm.name + "+" * (norm.weight_offset == 1.0) + (f":{marks}" if marks else "")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_of_families(family: str, tiny_model) -> None:
    structure = structure_of(tiny_model(family))
    norms, writers, obstacle = next(facts for families, facts in RESIDUAL.items() if family in families)
    block = structure.blocks[1]
    assert block.residual is not None
    local = f"{block.name}."
    assert " ".join(described(norm).removeprefix(local) for norm in block.residual.norms) == norms
    assert " ".join(name.removeprefix(local) for name in block.residual.writers) == writers
    assert block.residual.obstacle == obstacle
    if family == "opt":
        assert structure.outer_obstacle.startswith("model.decoder.project_in stands between")
        assert structure.final_norm is None
    else:
        embeddings, final = OUTSIDE.get(family, (["model.embed_tokens.weight"], "model.norm"))
        assert structure.final_norm is not None
        assert (list(structure.embeddings), described(structure.final_norm)) == (embeddings, final)
        assert structure.outer_obstacle == ""


# what vLLM makes row parallel in these families
SPLIT = {"o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense", "dense_4h_to_h", "w2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_that_engines_split_along_the_input(family: str, tiny_model) -> None:
    for linear in structure_of(tiny_model(family)).matrices():
        assert linear.splits_input == (linear.name.rpartition(".")[2] in SPLIT), linear.name


MIXTURES = {
    "mixtral": ("block_sparse_moe.gate", 4, ""),
    "qwen2-moe": ("mlp.shared_expert.gate_proj", 4, "mlp.shared_expert.up_proj mlp.gate mlp.shared_expert_gate"),
    "qwen3-moe": ("mlp.gate", 4, ""),
    "deepseek-v2": ("mlp.gate", 4, "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"),
    "deepseek-v3": ("mlp.gate", 8, "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_what_experts_read_has_all_of_its_readers(family: str, tiny_model) -> None:
    """Router, experts, and shared experts with their gate; and they write to the stream beside attention."""
    first, count, others = MIXTURES[family]
    structure = structure_of(tiny_model(family))
    block = structure.blocks[-1]
    local = f"{block.name}."
    (shared,) = [shared for shared in block.mixed if shared.producer and shared.producer.kind == "norm"]
    assert shared.producer is not None
    assert (shared.producer.name, shared.producer.obstacle) == (f"{local}post_attention_layernorm", "")
    (experts,) = block.experts
    entering = {name for names in experts.linears for name in names[:-1]}
    assert len(experts.linears) == count
    assert shared.name == local + first
    assert set(shared.linears) == entering | {local + name for name in [first, *others.split()]}
    assert len(shared.linears) == len(set(shared.linears))
    readers = [name for group in block.groups for name in group.linears]
    assert len(readers) == len(set(readers))
    assert {name for group in block.inputs for name in group.linears} < set(readers)
    assert set(block.writers) >= {f"{local}self_attn.o_proj", *(names[-1] for names in experts.linears)}


def test_a_dense_block_beside_experts_has_none_of_their_inputs(tiny_model) -> None:
    dense, *sparse = structure_of(tiny_model("deepseek-v3")).blocks
    assert dense.residual is not None
    assert dense.residual.writers == (f"{dense.name}.self_attn.o_proj", f"{dense.name}.mlp.down_proj")
    assert dense.writers == dense.residual.writers
    assert dense.groups == dense.inputs
    assert not dense.mixed
    assert all(block.mixed for block in sparse)


class Router(nn.Module):
    """Scores of four experts; `inner` makes of the input what is multiplied with the weight."""

    def __init__(self, inner: Callable[[torch.Tensor], torch.Tensor], arguments: int = 1) -> None:
        super().__init__()
        self.inner, self.arguments = inner, arguments
        self.weight = nn.Parameter(torch.empty(4, 24))
        self.register_buffer("bias", torch.empty(4))

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(others) + 1 == self.arguments
        scores = (self.inner(x) @ self.weight.t()).sigmoid()
        return scores, (scores + sum(others, self.bias)).topk(2)[1]


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (Router(lambda x: x), True),
        (Router(lambda x: 3 * x), True),
        (Router(lambda x: nn.functional.rms_norm(x, (24,))), False),
        (Router(lambda x: x * torch.linspace(0.5, 2, 24)), False),
        (Router(torch.tanh), False),
        (Router(lambda x: x, arguments=2), True),
        (Router(torch.tanh, arguments=2), False),
        (Router(lambda x: x, arguments=3), False),
    ],
)
def test_routers_that_a_norm_can_give_its_gain_to(router: Router, expected: bool) -> None:
    before = [router.weight.clone(), router.bias.clone()]
    assert reads_by_a_product(router) == expected
    for value, own in zip(before, (router.weight, router.bias), strict=True):
        torch.testing.assert_close(own, value, equal_nan=True)


def test_a_router_that_does_more_is_an_obstacle(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "reads_by_a_product", lambda _router: False)
    structure = discover(tiny_model("mixtral"))
    obstacle = "the output of post_attention_layernorm is read by the router mlp.gate, not by linears alone"
    assert obstacle in rotation_obstacles(structure)
    (shared,) = [shared for shared in structure.blocks[1].mixed if len(shared.linears) > 1]
    assert shared.producer is not None
    assert shared.producer.obstacle == "post_attention_layernorm is also read by something that is no linear"


def test_experts_of_an_unknown_form_are_an_obstacle(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_members", lambda *_: [])
    structure = discover(tiny_model("mixtral"))
    obstacle = "mlp.experts holds the weights of many experts in a form that is not known"
    assert rotation_obstacles(structure) == [obstacle]
    assert not any(block.mixed for block in structure.blocks)


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 99}
# model type, changed keys → words of the obstacles inside and outside, and whether a norm or linear has another reader
OTHERS: dict[tuple[str, str], tuple[dict[str, Any], str, str]] = {
    ("granite", "multipliers"): ({"residual_multiplier": 0.2, "embedding_multiplier": 12.0}, "", ""),
    ("gemma", "scaled embedding"): ({"head_dim": 16, "num_key_value_heads": 1}, "", ""),
    ("mamba", "convolution"): ({}, "", ""),
    ("minicpm3", "scaled before the head"): ({"num_key_value_heads": 4, "dim_model_base": 32}, "", ""),
    ("opt", "one width"): ({"ffn_dim": 96, "word_embed_proj_dim": 64}, "", ""),
    ("olmo2", "norm behind"): ({}, "the norm post_attention_layernorm is added", ""),
    ("glm4", "norms on both sides"): ({"head_dim": 16}, "the norm post_self_attn_layernorm is added", ""),
    ("olmo", "norm without weight"): ({}, "read by an operation (native_layer_norm)", "lm_head does not read"),
    ("opt", "norm on the stream"): (
        {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": False},
        "the norm final_layer_norm is added",
        "lm_head does not read",
    ),
    ("bloom", "norm of the embedding"): ({"n_head": 4}, "", "word_embeddings_layernorm stands between"),
    ("xglm", "computed positions"): ({"attention_heads": 4}, "", "not a sum of embeddings"),
}


@pytest.mark.parametrize("case", OTHERS, ids=" ".join)
def test_obstacles_of_other_models(case: tuple[str, str], tmp_path: Path) -> None:
    changes, inside, outside = OTHERS[case]
    AutoConfig.for_model(case[0], **{**SMALL, "pad_token_id": 0, **changes}).save_pretrained(tmp_path)
    structure = discover(tmp_path)
    for block in structure.blocks:
        assert block.residual is not None
        assert inside in block.residual.obstacle
        assert bool(inside) == bool(block.residual.obstacle)
    assert outside in structure.outer_obstacle
    assert bool(outside) == bool(structure.outer_obstacle)


def test_producers_that_something_else_reads(tiny_model) -> None:
    """A router and experts read the norm that shared experts read; nothing else reads what is scaled elsewhere."""
    for family in FAMILIES:
        for block in structure_of(tiny_model(family)).blocks:
            read = [shared.name for shared in block.inputs if shared.producer and shared.producer.obstacle]
            assert all("shared_expert" in name and "gate_proj" in name for name in read)
            assert bool(read) == any("shared_expert" in linear.name for linear in block.linears)


def test_segments() -> None:
    """Worked by hand: 4 query heads on 2 of values; of fused projections the values, interleaved in GPT-NeoX."""
    assert Producer("v", "linear", segments=((4, 2), (4, 2), (0, 1))).channels(5) == [4, 5, 4, 5, 0]
    assert Producer("v", "linear").channels(3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "changes", "segments"),
    [
        ("llama", {}, ((0, 16), (0, 16), (16, 16), (16, 16))),
        ("llama", {"num_key_value_heads": 4}, ()),
        ("llama", {"num_key_value_heads": 1}, ((0, 16),) * 4),
        ("phi3", {}, ((96, 16), (96, 16), (112, 16), (112, 16))),
        ("gpt2", {}, ((128, 64),)),
        ("falcon", {}, ((80, 16),) * 4),
        ("falcon", {"multi_query": False}, ((32, 16), (80, 16), (128, 16), (176, 16))),
        ("gpt-neox", {}, ((32, 16), (80, 16), (128, 16), (176, 16))),
        ("deepseek-v3", {}, ((16, 16), (48, 16), (80, 16), (112, 16))),
    ],
)
def test_segments_of_values(family: str, changes: dict[str, Any], segments: tuple, tiny_model) -> None:
    for block in structure_of(tiny_model(family, **changes)).blocks:
        (values,) = [i.producer for i in block.inputs if i.producer and i.producer.kind == "linear" and "att" in i.name]
        assert values.segments == segments


def test_norms_of_every_family(tiny_model) -> None:
    """They multiply by w, or by 1 + w in Gemma; a layer norm does not see a constant added to all channels."""
    for family in FAMILIES:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
        (path, norm) = next((n, m) for n, m in model.named_modules() if n.lower().endswith(("norm", "ln_f")))
        facts = describe_norm(path, norm)
        assert facts.weight_offset == norm_offset(norm) == (1.0 if family.startswith("gemma") else 0.0), path
        assert facts.bias == (family in ("opt", "gpt2", "falcon", "gpt-neox"))
        x = torch.randn(3, norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
        assert facts.centred == torch.allclose(norm(x), norm(x + 3), atol=1e-4)
        assert turns_with_its_input(norm)
        assert not norm.weight.is_meta, "the norm itself is left as it was"


class Strange(nn.Module):
    """x w / max |x|: a rotation changes the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.abs().amax(-1, keepdim=True)


def test_a_norm_that_does_not_turn() -> None:
    assert not turns_with_its_input(Strange())
    assert turns_with_its_input(nn.RMSNorm(8))
    assert turns_with_its_input(nn.LayerNorm(8, bias=False))
    assert not turns_with_its_input(nn.GroupNorm(2, 8))


class Toy(nn.Module):
    """One block: the stream plus what `inner` makes of its norm, with three linears and a second norm at hand."""

    def __init__(self, inner: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        block = nn.Module()
        block.one, block.two, block.three = (nn.Linear(8, 8) for _ in range(3))
        block.norm, block.second = nn.RMSNorm(8), nn.RMSNorm(8)
        block.forward = lambda x: x + inner(block, x)
        self.blocks = nn.ModuleList([block])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


@pytest.mark.parametrize(
    ("inner", "producers", "obstacle"),
    [
        (lambda b, x: b.two(b.one(b.norm(x))), {"one": "norm", "two": "one"}, ""),
        (lambda b, x: b.two(b.second(b.one(b.norm(x)))), {"one": "norm", "two": "second"}, ""),
        (
            lambda b, x: b.two((y := b.norm(x)).sigmoid() + b.one(y)),
            {"one": "norm: norm is also read by something that is no linear", "two": None},
            "the output of norm is read by an operation (sigmoid), not by linears alone",
        ),
        (
            lambda b, x: b.one(y := b.norm(x)) + b.two(y.clone()),
            {"one": "norm: norm is also read by two", "two": "norm: norm is also read by one"},
            "",
        ),
        (
            lambda b, x: (y := b.one(b.norm(x))) + b.two(y),
            {"one": "norm", "two": "one: one is also read by something that is no linear"},
            "the output of one is added to the residual stream and also read by the linear two",
        ),
        (
            lambda b, x: b.one(b.norm(x)) + b.two(x),
            {"one": "norm", "two": None},
            "the residual stream is read by the linear two",
        ),
        (
            lambda b, x: b.one(b.norm(x)) + b.norm(x).mean(-1, keepdim=True),
            {"one": "norm: norm is also read by something that is no linear"},
            "something is added to the residual stream that is not the output of a linear",
        ),
    ],
)
def test_producers_and_obstacles_of_toys(inner: Any, producers: dict[str, str | None], obstacle: str) -> None:
    model = Toy(inner).to("meta")
    watch = Watch(model, ["blocks.0"], {"blocks.0": find_experts(model, "blocks.0")})
    with torch.no_grad(), watch.paths:
        model(torch.zeros(1, 5, 8, device="meta"))
    watch.stop()
    block = watch.block("blocks.0")
    found = {
        shared.name.removeprefix("blocks.0."): shared.producer
        and shared.producer.name.removeprefix("blocks.0.")
        + (": " * bool(shared.producer.obstacle))
        + shared.producer.obstacle
        for shared in block.inputs
    }
    assert found == producers
    assert block.residual is not None
    assert block.residual.obstacle == obstacle
