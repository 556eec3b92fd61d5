"""Experts one by one compute what transformers computes at once, and see the tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, token_batches
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from quantcli.calibration.expert_statistics import experts_observed
from quantcli.evaluation.simulate import QuantizedProduct, not_read, simulated
from quantcli.model.discovery import discover
from quantcli.model.structure import Block
from quantcli.quant.activation import int8_linear, quantize_per_token
from quantcli.quant.grid import WeightGrid
from quantcli.quant.minmax import minmax

Made = Callable[[str], tuple[nn.Module, Block]]
FAMILIES = ("mixtral", "qwen2-moe", "deepseek-v3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model in float32 and the structure of its last block."""
    kept: dict[str, tuple[nn.Module, Block]] = {}

    def get(family: str) -> tuple[nn.Module, Block]:
        if family not in kept:
            directory: Path = save_tiny_model(family, tmp_path_factory.mktemp(family))
            kept[family] = AutoModelForCausalLM.from_pretrained(directory).eval(), discover(directory).blocks[-1]
        return kept[family]

    return get


def routed(model: nn.Module, block: Block, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the last layer of experts is called with: hidden states, chosen experts, their weights."""
    calls: list[tuple[Tensor, ...]] = []
    module = model.get_submodule(block.experts[0].name)
    handle = module.register_forward_pre_hook(lambda _module, args: calls.append(args))
    with torch.inference_mode():
        model(tokens)
    handle.remove()
    ((hidden, index, weights),) = calls
    return hidden, index, weights


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_tokens_at_each_expert(family: str, every_token: bool, made: Made) -> None:
    model, block = made(family)
    (tokens,) = token_batches((2, 20))
    with torch.inference_mode():
        plain = model(tokens).logits
        module = model.get_submodule(block.name)
        with experts_observed(module, block.local_experts, "cpu", every_token=every_token) as found:
            torch.testing.assert_close(model(tokens).logits, plain, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(tokens).logits, plain)
    hidden, index, _ = routed(model, block, tokens)
    (experts,) = block.local_experts
    joined = model.get_submodule(block.experts[0].name)
    counts = set()
    for expert, (first, _, last) in enumerate(experts.linears):
        chosen = [t for t in range(len(hidden)) if every_token or expert in index[t].tolist()]
        counts.add(len(chosen))
        assert found[first].count == found[last].count == len(chosen)
        if not chosen:
            continue
        x = hidden[chosen].double()
        gate, up = linear(x, joined.gate_up_proj[expert].double()).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        for name, entering in ((first, x), (last, inner)):
            moment = found[name].second_moment
            assert moment is not None
            torch.testing.assert_close(moment.double(), entering.square().mean(0), rtol=1e-4, atol=1e-7)
    assert (len(counts) == 1) == every_token


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_integer_products_are_those_of_a_slow_sum(family: str, made: Made) -> None:
    model, block = made(family)
    (tokens,) = token_batches((2, 20))
    hidden, index, weights = routed(model, block, tokens)
    (experts,) = block.local_experts
    joined = model.get_submodule(block.experts[0].name)
    replaced: dict[str, QuantizedProduct] = {}
    for expert, names in enumerate(experts.linears):
        parts = (*joined.gate_up_proj[expert].chunk(2), joined.down_proj[expert])
        for name, weight in zip(names, parts, strict=True):
            codes, scale, _ = minmax(weight, WeightGrid(8))
            replaced[name] = QuantizedProduct(codes, scale)
    module = model.get_submodule(block.name)
    with torch.inference_mode(), simulated(module, replaced, block.local_experts):
        made_at_once = joined(hidden, index, weights)
    expected = torch.zeros_like(hidden, dtype=torch.float64)
    for token in range(len(hidden)):
        for place, expert in enumerate(index[token].tolist()):
            gate, up, down = (replaced[name] for name in experts.linears[expert])

            def product(x: Tensor, how: QuantizedProduct) -> Tensor:
                codes, scale = quantize_per_token(x)
                return int8_linear(codes, scale, None, how.codes, how.scale, None, torch.float32)

            x = hidden[token : token + 1]
            inner = nn.functional.silu(product(x, gate)) * product(x, up)
            expected[token] += weights[token, place].double() * product(inner, down)[0].double()
    torch.testing.assert_close(made_at_once.double(), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        assert not torch.allclose(joined(hidden, index, weights), made_at_once, rtol=1e-4, atol=1e-5)

    assert not_read(replaced, block.local_experts) == set(experts.parameters)
    some = {name: replaced[name] for name in experts.linears[0]}
    assert not_read(some, block.local_experts) == set()
    exact = {name: how.codes.float() * how.scale for name, how in some.items()}
    with torch.inference_mode(), simulated(module, exact, block.local_experts):
        one = joined(hidden, index, weights)
    moved = (one - joined(hidden, index, weights)).abs().amax(1) > 1e-6
    assert torch.equal(moved, (index == 0).any(1)), "only tokens at the expert that was replaced may change"
