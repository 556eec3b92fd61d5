"""Rotated models are the same function; their streams and values are rotated; and the numbers of another tool."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, token_batches
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from quantcli.errors import ModelError
from quantcli.model.discovery import discover
from quantcli.model.experts import find_experts, matrices
from quantcli.model.rotation import (
    ModelRotation,
    changes_by,
    rotation_changes,
    stream_rotation,
    untied,
)
from quantcli.model.structure import Structure, heads_obstacles, rotatable_heads, rotation_obstacles
from quantcli.quant.orthogonal import Rotation

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden" / "A"
STREAM = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "falcon", "gpt-neox", "cohere"]
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3"]
STREAM += ["opt-unprojected", *EXPERTS, *(f"{family}-tied" for family in EXPERTS)]
CENTRED = {"gpt2", "falcon", "gpt-neox", "cohere", "opt-unprojected"}
LATENT = {family for family in STREAM if family.startswith("deepseek")}
HEADS = [*(family for family in STREAM if family not in {"opt-unprojected", *LATENT}), "gemma2", "gemma3", "opt"]

Directory = Callable[[str], Path]


@pytest.fixture
def directory(tiny_model) -> Directory:
    """A family's tiny model; of OPT also one whose embedding is as wide as its stream."""

    def get(family: str) -> Path:
        if family == "opt-unprojected":
            return tiny_model("opt", word_embed_proj_dim=64)
        if (bare := family.removesuffix("-tied")) in EXPERTS:
            return tiny_model(bare, tie_word_embeddings=family != bare)
        return tiny_model(family)

    return get


structure_of = cache(discover)


def model_of(directory: Path) -> nn.Module:
    settings: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(directory, **settings).double()  # routers too, which stay in float32
    return model.eval().requires_grad_(False)


class _Float64(TorchFunctionMode):
    """Where a model computes in float32 whatever its dtype (norms, softmax), it stays in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {torch.float32: torch.float64}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def logits_of(model: nn.Module) -> Tensor:
    (tokens,) = token_batches((2, 24))
    with _Float64():
        return model(input_ids=tokens).logits


def rotated(model: nn.Module, structure: Structure, rotation: ModelRotation) -> nn.Module:
    """The same module with every change carried out; a head that was tied gets a tensor of its own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    changes, added = rotation_changes(structure, rotation, lambda name: parameters[name].data)
    for block in structure.blocks if any(block.experts for block in structure.blocks) else ():
        routers = find_experts(model, block.name).routers
        own = {linear.name: parameters[f"{path}.weight"] for path, linear in routers.items()}
        for experts in block.experts:
            own |= matrices(experts, [parameters[name] for name in experts.parameters])
        for name, value in own.items():
            if (change := changes.pop(f"{name}.weight", None)) is not None:
                value.data.copy_(change(value.data))
    values = {name: change(parameters[name].data) for name, change in changes.items()}
    values |= {name: made.change(parameters[made.origin].data) for name, made in added.items()}
    for name, value in values.items():
        assert value.dtype == torch.float64
        assert value.shape == parameters[name].shape
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return model


def streams(model: nn.Module, structure: Structure) -> list[Tensor]:
    """The output of every block."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(block.name).register_forward_hook(keep) for block in structure.blocks]
    logits_of(model)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("family", STREAM)
def test_the_stream_is_rotated_and_the_logits_stay(family: str, directory: Directory) -> None:
    structure = structure_of(directory(family))
    assert rotation_obstacles(structure) == []
    model = model_of(directory(family))
    before, streams_before = logits_of(model), streams(model, structure)
    heads = family not in LATENT
    rotated(model, structure, ModelRotation(seed=1, hidden=True, heads=heads, head_dim=structure.head_dim))
    assert_same(logits_of(model), before)
    turn = stream_rotation(structure, 1)
    assert turn.keeps_ones == (family in CENTRED)
    for found, old in zip(streams(model, structure), streams_before, strict=True):
        assert_same(found, turn.apply(old))


@pytest.mark.parametrize("family", HEADS)
def test_values_are_rotated_and_the_logits_stay(family: str, directory: Directory) -> None:
    structure = structure_of(directory(family))
    model = model_of(directory(family))
    before, streams_before = logits_of(model), streams(model, structure)
    inputs = [shared.name for shared in rotatable_heads(structure, 16)]
    assert len(inputs) == len(structure.blocks)

    def outputs_of_attention() -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0])) for name in inputs
        ]
        logits_of(model)
        for handle in handles:
            handle.remove()
        return seen

    attention_before = outputs_of_attention()
    rotated(model, structure, ModelRotation(seed=1, hidden=False, heads=True, head_dim=16))
    assert_same(logits_of(model), before)
    turn = Rotation(16, 1)
    for found, old in zip(outputs_of_attention(), attention_before, strict=True):
        assert_same(found, turn.apply(old.unflatten(-1, (-1, 16))).flatten(-2))
    for found, old in zip(streams(model, structure), streams_before, strict=True):
        assert_same(found, old)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt"])
def test_refuses_streams_that_cannot_be_rotated(family: str, directory: Directory) -> None:
    structure = structure_of(directory(family))
    obstacles = rotation_obstacles(structure)
    assert obstacles
    with pytest.raises(ModelError, match="cannot be rotated") as caught:
        rotation_changes(structure, ModelRotation(0, hidden=True, heads=False), lambda name: torch.ones(64))
    assert obstacles[0] in caught.value.message
    assert "smooth.rotation.hidden: false" in caught.value.remedy


def test_refuses_what_it_does_not_know(directory: Directory) -> None:
    structure = structure_of(directory("llama"))
    unknown = replace(structure.blocks[1], residual=None)
    assert "model.layers.1" in rotation_obstacles(replace(structure, blocks=(structure.blocks[0], unknown)))[0]
    assert rotation_obstacles(replace(structure, final_norm=None))
    twice = replace(structure, tied=True, embeddings=structure.embeddings * 2)
    assert "tied" in rotation_obstacles(twice)[0]
    shared = structure.blocks[0].inputs[0]
    heard = replace(shared, producer=replace(shared.producer, obstacle="a convolution reads it"))
    other = replace(structure.blocks[0], inputs=(heard, *structure.blocks[0].inputs[1:]))
    assert rotation_obstacles(replace(structure, blocks=(other, structure.blocks[1]))) == ["a convolution reads it"]
    deaf = replace(structure.blocks[0], inputs=structure.blocks[0].inputs[1:])
    assert "input_layernorm" in rotation_obstacles(replace(structure, blocks=(deaf, structure.blocks[1])))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_values_of_attention_are_rotated(family: str, directory: Directory) -> None:
    # up reaches down through a product with the gate, which a rotation does not pass
    for shared in rotatable_heads(structure_of(directory(family)), 16):
        names = " ".join(shared.linears)
        assert "attn" in names or "attention" in names
        assert not any(part in names for part in ("mlp", "fc", "h_to_4h"))


def test_gates_of_a_convolution_are_no_queries_and_keys(directory: Directory) -> None:
    """One linear makes three parts of one width, as of queries, keys and values, and no attention adds them up."""
    structure = structure_of(directory("lfm2"))
    assert [shared.name for shared in rotatable_heads(structure, 16)] == ["model.layers.1.self_attn.out_proj"]
    model = model_of(directory("lfm2"))
    before = logits_of(model)
    rotated(model, structure, ModelRotation(seed=1, hidden=True, heads=True, head_dim=16))
    assert_same(logits_of(model), before)


def test_refuses_heads_that_are_not_whole(directory: Directory) -> None:
    structure = structure_of(directory("llama"))
    with pytest.raises(ModelError, match="whole heads of 24") as caught:
        rotation_changes(structure, ModelRotation(0, hidden=False, heads=True, head_dim=24), lambda _: torch.ones(64))
    assert "smooth.rotation.heads: false" in caught.value.remedy
    assert heads_obstacles(structure) == []
    assert "whole heads of 24 channels" in heads_obstacles(replace(structure, head_dim=24))[0]
    assert "how many channels" in heads_obstacles(replace(structure, head_dim=None))[0]
    with pytest.raises(ModelError, match="how many channels an attention head of LlamaForCausalLM has"):
        rotation_changes(structure, ModelRotation(0, hidden=False, heads=True), lambda _: torch.ones(64))


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_routers_and_experts_take_in_what_norms_give(family: str, directory: Directory) -> None:
    """By hand: every matrix that reads the norm before the experts is W diag(w) R, every one behind it Rᵀ W."""
    structure = structure_of(directory(family))
    stored = {name: value.double() for name, value in load_file(directory(family) / "model.safetensors").items()}
    changes, _ = rotation_changes(structure, ModelRotation(1, hidden=True, heads=False), stored.__getitem__)
    turn, block = stream_rotation(structure, 1), structure.blocks[-1]
    gain = stored[f"{block.name}.post_attention_layernorm.weight"]
    readers = [*block.routers, *(name for expert in block.experts[0].linears for name in expert[:-1])]
    assert len(readers) == 1 + 2 * len(block.experts[0].linears)
    for name in readers:
        weight = stored[f"{name}.weight"]
        assert_same(changes[f"{name}.weight"](weight), turn.apply(weight * gain))
    for name in (expert[-1] for expert in block.experts[0].linears):
        weight = stored[f"{name}.weight"]
        assert_same(changes[f"{name}.weight"](weight), turn.apply(weight.t()).t())
    assert not [name for name in changes if name.endswith("correction_bias")]


def test_a_bias_on_a_silent_channel_is_refused(directory: Directory) -> None:
    structure = structure_of(directory("gpt-neox"))
    model = model_of(directory("gpt-neox"))
    norm = model.get_submodule("gpt_neox.layers.1.post_attention_layernorm")
    norm.weight.data[3] = norm.bias.data[3] = 0.0
    before = logits_of(model)
    rotation = ModelRotation(seed=1, hidden=True, heads=False)
    parameters = dict(model.named_parameters())
    assert_same(logits_of(rotated(model, structure, rotation)), before)  # a channel without either adds nothing
    model = model_of(directory("gpt-neox"))
    parameters = {name: value.data for name, value in model.named_parameters()}
    parameters["gpt_neox.layers.1.post_attention_layernorm.weight"][3] = 0.0
    with pytest.raises(ModelError, match=r"gpt_neox\.layers\.1\.post_attention_layernorm adds a bias"):
        rotation_changes(structure, rotation, parameters.__getitem__)


def test_a_tied_head_becomes_a_parameter(directory: Directory) -> None:
    structure = structure_of(directory("llama-tied"))
    free = untied(structure)
    assert (free.tied, free.parameters["lm_head.weight"]) == (False, (512, 64))
    assert free.head_linear is not None
    assert untied(free) is free
    parameters = {name: value.data for name, value in model_of(directory("llama-tied")).named_parameters()}
    changes, added = rotation_changes(structure, ModelRotation(2, True, False), parameters.__getitem__)
    assert set(changes) <= set(structure.parameters)
    assert set(added) == {"lm_head.weight"}
    assert added["lm_head.weight"].origin == "model.embed_tokens.weight"
    table, gain = parameters["model.embed_tokens.weight"], parameters["model.norm.weight"]
    turn = stream_rotation(structure, 2)
    assert_same(added["lm_head.weight"].change(table), turn.apply(table * gain))
    assert_same(changes["model.embed_tokens.weight"](table), turn.apply(table))
    # the head that does not turn stays tied
    assert rotation_changes(structure, ModelRotation(2, False, True, 16), parameters.__getitem__)[1] == {}


def test_changes_are_computed_in_float64_in_pieces(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = structure_of(directory("gpt2"))  # stored as [in, out]
    exact = {name: value.data for name, value in model_of(directory("gpt2")).named_parameters()}
    rotation = ModelRotation(3, True, True, 16)
    wide, _ = rotation_changes(structure, rotation, exact.__getitem__)
    short = {name: value.bfloat16() for name, value in exact.items()}
    narrow, _ = rotation_changes(structure, rotation, short.__getitem__)
    expected = rotation_changes(structure, rotation, lambda name: short[name].double())[0]
    for name, change in narrow.items():
        kept = short[name].clone()
        assert change(short[name]).dtype == torch.float32
        assert torch.equal(change(short[name]), expected[name](short[name].double()).float())
        assert torch.equal(short[name], kept)  # what was read is not touched
    whole = {name: change(exact[name]) for name, change in wide.items()}
    monkeypatch.setattr("quantcli.model.rotation.PIECE_ELEMENTS", 1000)  # not a whole number of rows
    for name, change in wide.items():
        torch.testing.assert_close(change(exact[name]), whole[name], rtol=1e-13, atol=1e-14)


def test_the_choice_is_json() -> None:
    rotation = ModelRotation(seed=2**40, hidden=True, heads=False)
    assert ModelRotation(**json.loads(json.dumps(asdict(rotation)))) == rotation


class _Given:
    """An orthogonal matrix that somebody else made."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()
        self.size = len(matrix)

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference data is not beside this checkout")
def test_agrees_with_another_tool() -> None:
    """msModelSlim's quarot processor with both rotations; its R1 is written, its R2 follows from two of its values."""
    structure = structure_of(GOLDEN / "model")
    stored = load_file(GOLDEN / "model" / "model.safetensors")
    theirs = load_file(GOLDEN / "v1_quarot" / "weights.safetensors")
    stream = theirs.pop("optional/quarot.safetensors/global_rotation").double()
    values, norm = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.input_layernorm.weight"
    turned = theirs[values].double() @ stream.T / stored[norm].double()
    heads = torch.linalg.lstsq(stored[values][:16].double().T, turned[:16].T).solution
    heads = heads.sign() / 4.0  # a Hadamard matrix of 16 rows
    changes, added = changes_by(structure, _Given(stream), _Given(heads), stored.__getitem__)
    assert added == {}
    found = {name: changes[name](tensor) if name in changes else tensor for name, tensor in stored.items()}
    assert set(found) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))
