"""Experts are found by the names and in the shapes that checkpoints have, part by part of the joined parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import relu, silu
from transformers import AutoModelForCausalLM

from quantcli.errors import ModelError
from quantcli.model.checkpoint import SINGLE_NAME, Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.experts import _passes_scales
from quantcli.model.names import weight_tensors

TinyModel = Callable[..., Path]
FAMILIES = ("mixtral", "qwen2-moe", "deepseek-v3")
ROUTERS = {
    "mixtral": ["block_sparse_moe.gate"],
    "qwen2-moe": ["mlp.gate", "mlp.shared_expert_gate"],
    "deepseek-v3": ["mlp.gate"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_of_experts_are_the_parts_of_the_parameters(family: str, tiny_model: TinyModel) -> None:
    """Stacked and joined in the order of the structure, the stored tensors are what transformers loads."""
    directory = tiny_model(family)
    stored = load_file(directory / SINGLE_NAME)
    model = AutoModelForCausalLM.from_pretrained(directory)
    block = discover(directory).blocks[-1]
    (experts,) = block.experts
    linears = {linear.name: linear for linear in block.linears}
    entering, leaving = (model.get_parameter(name) for name in experts.parameters)
    assert len(experts.linears) == len(entering)
    for index, names in enumerate(experts.linears):
        weights = [stored[f"{name}.weight"] for name in names]
        assert torch.equal(torch.cat(weights[:-1]), entering[index])
        assert torch.equal(weights[-1], leaving[index])
        shapes = [(linears[name].out_features, linears[name].in_features) for name in names]
        assert shapes == [tuple(weight.shape) for weight in weights]
    assert list(block.routers) == [f"{block.name}.{name}" for name in ROUTERS[family]]
    assert block.fused[-1] == experts.names
    assert not {*experts.names, *block.routers} & {name for shared in block.inputs for name in shared.linears} - {
        f"{block.name}.mlp.shared_expert_gate"
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_up_makes_what_enters_down_of_each_expert(family: str, tiny_model: TinyModel) -> None:
    block = discover(tiny_model(family)).blocks[-1]
    (experts,) = block.experts
    inner = [shared for shared in block.mixed if shared.producer and shared.producer.kind == "linear"]
    assert [(shared.producer.name, *shared.linears) for shared in inner if shared.producer] == [
        names[-2:] for names in experts.linears
    ]
    assert {shared.width for shared in inner} == {96 if family == "mixtral" else 32}


class Inside(nn.Module):
    """What is between the linears of an expert."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._apply_gate = self.act_fn = act


@pytest.mark.parametrize(
    ("act", "entering", "passes"),
    [
        (lambda x: silu(x[..., :4]) * x[..., 4:], 2, True),
        (lambda x: x[..., :4] * silu(x[..., 4:]), 2, False),
        (lambda x: silu(x[..., :4]) * x[..., 4:].clamp(-10, 10), 2, False),
        (lambda x: silu(x[..., :4]) * (x[..., 4:] + 1), 2, False),
        (lambda x: x[..., :5], 2, False),
        (relu, 1, True),
        (lambda x: relu(x).square(), 1, False),
        (silu, 1, False),
    ],
)
def test_scales_that_pass_from_up_to_down(act: Callable[[Tensor], Tensor], entering: int, passes: bool) -> None:
    assert _passes_scales(Inside(act), entering) == passes


def test_a_dense_block_has_no_experts(tiny_model: TinyModel) -> None:
    dense = discover(tiny_model("deepseek-v3")).blocks[0]
    assert (dense.experts, dense.routers) == ((), ())


def test_a_checkpoint_without_the_tensors_of_experts_is_refused(tiny_model: TinyModel) -> None:
    directory = tiny_model("mixtral")
    structure = discover(directory)
    entries = Checkpoint(directory).entries
    assert weight_tensors(directory, structure, entries)["model.layers.1.block_sparse_moe.experts.3.w2"] == (
        "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    )
    left = {name: entry for name, entry in entries.items() if "experts.2.w3" not in name}
    with pytest.raises(ModelError):
        weight_tensors(directory, structure, left)
