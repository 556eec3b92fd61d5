"""Channels are where the map says: scaling them, on real numbers, scales just those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, token_batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantcli.model.channel_paths import ChannelPaths, ListIndexing
from quantcli.model.discovery import discover
from quantcli.model.structure import Block

Function = Callable[[Tensor], Tensor]
TOKENS, WIDTH = 5, 12
HEADS = (1, TOKENS, 3, 4)  # of a width of 12


def attend(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Attention of heads [1, tokens, heads, size] with weights [tokens, tokens], merged again."""
    if weights is None:
        weights = torch.full((TOKENS, TOKENS), 0.2, dtype=values.dtype, device=values.device)
    return (weights @ values.transpose(1, 2)).transpose(1, 2).reshape(1, TOKENS, -1)


def grouped(x: Tensor) -> Tensor:
    """Six query heads on three key and value heads."""
    return attend(x.view(HEADS)[:, :, :, None].expand(1, TOKENS, 3, 2, 4).reshape(1, TOKENS, 6, 4))


def written_into(x: Tensor, index: int) -> Tensor:
    """A third times a sum whose first addend was written into zeros: channel `index` of x."""
    whole = torch.zeros(1, TOKENS, 4, dtype=x.dtype, device=x.device)
    whole[..., :1] = x[..., index : index + 1]
    return x[..., 8:] * whole.sum(-1, keepdim=True)


def in_place(x: Tensor) -> Tensor:
    x = x.clone()
    return x.mul_(3).div_(2)


FOLLOWED: dict[str, tuple[Function, list[int]]] = {
    "itself": (lambda x: x, list(range(12))),
    "a part": (lambda x: x[..., 3:7], [3, 4, 5, 6]),
    "every third": (lambda x: x[..., ::3], [0, 3, 6, 9]),
    "casts, constants and signs": (lambda x: (-x * 3 / 2).to(torch.float64), list(range(12))),
    "in place": (in_place, list(range(12))),
    "relu": (torch.relu, list(range(12))),
    "a factor a token": (lambda x: x * torch.ones(1, TOKENS, 1, device=x.device), list(range(12))),
    "a half times a function of the other": (
        lambda x: x.chunk(2, -1)[1] * x.chunk(2, -1)[0].sigmoid(), [6, 7, 8, 9, 10, 11]),
    "a half over a function of the other": (lambda x: x[..., :6] / x[..., 6:].exp(), [0, 1, 2, 3, 4, 5]),
    "heads interleaved": (
        lambda x: x.view(HEADS).permute(0, 1, 3, 2).reshape(1, TOKENS, 12), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
    "attention": (lambda x: attend(x.view(HEADS)), list(range(12))),
    "grouped queries": (grouped, [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2 + [8, 9, 10, 11] * 2),
    "the last of fused heads": (
        lambda x: attend(x.view(HEADS)[..., [-1], :].expand(1, TOKENS, 2, 4)), [8, 9, 10, 11] * 2),
    "values beside their weights": (
        lambda x: attend(x[..., 8:].unsqueeze(2), (x[0, :, :4] @ x[0, :, 4:8].T).softmax(-1)), [8, 9, 10, 11]),
    "weights written into a buffer": (lambda x: written_into(x, 0), [8, 9, 10, 11]),
}  # fmt: skip

LOST: dict[str, Function] = {
    "x f(x)": lambda x: x * x.sigmoid(),
    "x over its norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "halves that overlap": lambda x: x[..., :7] * x[..., 5:].sigmoid(),
    "gelu": torch.nn.functional.gelu,
    "a sum": lambda x: x + 1,
    "a product of halves": lambda x: x[..., :6] * x[..., 6:],
    "channels as tokens": lambda x: x.view(1, 12, TOKENS).transpose(1, 2),
    "channels added up": lambda x: torch.full((4, 3), 0.2, dtype=x.dtype, device=x.device) @ x.view(1, TOKENS, 3, 4),
    "values that are their own weights": lambda x: attend(x.view(HEADS), (x[0] @ x[0].T).softmax(-1)),
    "a buffer of its own": lambda x: written_into(x, 9),
}


def watched(function: Function) -> tuple[ChannelPaths, tuple[str, list[int]] | None]:
    paths = ChannelPaths()
    x = torch.zeros(1, TOKENS, WIDTH, device="meta")
    with torch.no_grad(), ListIndexing(paths), paths:
        paths.begin(x, "x")
        return paths, paths.source_of(function(x))


def numbers() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.rand(WIDTH, generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_is_followed_scales(case: str) -> None:
    function, expected = FOLLOWED[case]
    _, found = watched(function)
    assert found == ("x", expected)
    x, factors = numbers()
    if case in ("values beside their weights", "weights written into a buffer") or case.startswith("a half"):
        factors[[c for c in range(WIDTH) if c not in expected]] = 1.0  # those have another use
    torch.testing.assert_close(function(x * factors), function(x) * factors[expected], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", LOST)
def test_what_does_not_scale_is_lost(case: str) -> None:
    paths, found = watched(LOST[case])
    assert found is None
    assert paths.others["x"].any()


def test_channels_that_are_also_read_otherwise() -> None:
    paths, _ = watched(lambda x: x[..., 8:] * x[..., 2:6].exp())
    assert paths.others["x"].nonzero().flatten().tolist() == [2, 3, 4, 5]


def sums_of(function: Callable[..., Tensor]) -> tuple[ChannelPaths, frozenset[str]]:
    paths = ChannelPaths()
    stream, linear = (torch.zeros(1, TOKENS, WIDTH, device="meta") for _ in range(2))
    with torch.no_grad(), paths:
        paths.begin(stream, "stream", channels=False)
        paths.begin(linear, "linear")
        return paths, paths.terms_of(function(stream, linear))


@pytest.mark.parametrize(
    "function",
    [
        lambda stream, linear: stream + linear,
        lambda stream, linear: linear.double().add_(stream.double()).float(),
        lambda stream, linear: stream + 0.22 * linear,
        lambda stream, linear: (stream - linear) / torch.tensor(3.0),
        lambda stream, linear: stream.view(-1, WIDTH) + linear[0] * torch.ones(TOKENS, 1, device="meta"),
        lambda stream, linear: (stream.transpose(0, 1) + linear.transpose(0, 1))[1:],
    ],
)  # fmt: skip
def test_sums_stay_sums(function: Callable[..., Tensor]) -> None:
    paths, terms = sums_of(function)
    assert terms == {"stream", "linear"}
    assert not paths.broken


@pytest.mark.parametrize(
    ("function", "broken"),
    [
        (lambda stream, linear: stream + linear.relu(), {"stream": "add", "linear": "relu"}),
        (lambda stream, linear: stream + linear * torch.ones(WIDTH, device="meta"), {"stream": "add", "linear": "mul"}),
        (lambda stream, linear: stream + 1, {"stream": "add"}),
        (lambda stream, linear: stream * linear, {"stream": "mul", "linear": "mul"}),
        (lambda stream, linear: (stream + linear)[..., :6], {"stream": "slice", "linear": "slice"}),
        (lambda stream, linear: torch.cat([stream, linear]), {"stream": "cat", "linear": "cat"}),
        (lambda stream, linear: stream.pow(2), {"stream": "pow"}),
    ],
)  # fmt: skip
def test_sums_that_are_broken(function: Callable[..., Tensor], broken: dict[str, str]) -> None:
    paths, terms = sums_of(function)
    assert not terms
    assert paths.broken == broken


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-many-heads": ("falcon", {"multi_query": False}),
    "llama-one-value-head": ("llama", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_scaling_a_producer_scales_its_readers(name: str, tiny_model) -> None:
    """Every output channel of a producer gets its own factor; what its readers are given in the true forward must be
    what they were given before times the factors of the channels that the structure names."""
    family, changes = MODELS[name]
    directory = tiny_model(family, **changes)
    block = discover(directory).blocks[-1]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").eval()
    plain = inputs_of(block, model)
    produced = [shared for shared in block.inputs if shared.producer is not None]
    assert {shared.producer.kind for shared in produced} == {"norm", "linear"}
    for shared in produced:
        channels = shared.producer.channels(shared.width)
        module = model.get_submodule(shared.producer.name)
        width = module.nf if type(module).__name__ == "Conv1D" else module.weight.shape[0]
        factors = torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
        factors[[channel for channel in range(width) if channel not in channels]] = 1.0  # queries, keys and gates
        handle = module.register_forward_hook(lambda *call, factors=factors: call[2] * factors)
        scaled = inputs_of(block, model)
        handle.remove()
        expected = plain[shared.name] * factors[channels]
        torch.testing.assert_close(scaled[shared.name], expected, rtol=1e-9, atol=1e-12)


def inputs_of(block: Block, model: nn.Module) -> dict[str, Tensor]:
    """What the first linear of each shared input is given."""
    given: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(shared.name).register_forward_pre_hook(
            lambda _, args, reader=shared.name: given.update({reader: args[0].clone()})
        )
        for shared in block.inputs
    ]
    with torch.no_grad():
        model(input_ids=token_batches((2, 9))[0], use_cache=False)
    for handle in handles:
        handle.remove()
    return given
