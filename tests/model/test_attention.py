"""What a watcher of attention sees: bit for bit what enters a cache; and what it puts in its place is what counts."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, token_batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_utils import AttentionInterface

from quantcli.errors import ModelError
from quantcli.model.attention import attention_observed, attention_replaced, caches_latents
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure_cache import find_structure

OWN_ATTENTION = {"falcon"}
"""Families that compute attention without the interface of transformers."""
LATENT = {"deepseek-v3"}
"""Families whose cache holds compressed latents instead of keys and values."""
WATCHED = [family for family in FAMILIES if family not in OWN_ATTENTION]
WITH_PROJECTIONS = {"llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "opt", "cohere", "mixtral",
                    "qwen2-moe"}  # fmt: skip
TOKENS = token_batches((2, 20))[0]  # longer than the sliding windows, which are 8
Seen = dict[str, tuple[Tensor, Tensor, Tensor]]


def load(directory: Path, implementation: str | None = None) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation=implementation).eval()


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def unchanged(path: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


def remember(into: Seen):
    def receive(path: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        into[path] = (query, key, value)

    return receive


@pytest.mark.parametrize(
    ("family", "implementation"),
    [*((family, None) for family in FAMILIES), ("llama", "eager"), ("gpt2", "eager"), ("gemma3", "eager")],
)
def test_watching_changes_no_bit_and_meets_every_attention(family: str, implementation: str | None, tiny_model) -> None:
    model = load(tiny_model(family), implementation)
    plain = logits(model)
    with attention_replaced(model, unchanged) as seen:
        watched = logits(model)
    assert torch.equal(watched, plain)
    expected = 0 if family in OWN_ATTENTION else model.config.num_hidden_layers
    assert len(seen) == expected
    assert all("Attention" in type(model.get_submodule(path)).__name__ for path in seen)


@pytest.mark.parametrize("family", [family for family in WATCHED if family not in LATENT])
def test_keys_and_values_are_those_that_enter_the_cache(family: str, tiny_model) -> None:
    model = load(tiny_model(family))
    seen: Seen = {}
    cache = DynamicCache()
    with torch.inference_mode():
        model(TOKENS, past_key_values=cache, use_cache=True)
        with attention_observed(model, remember(seen)):
            model(TOKENS, use_cache=False)
    assert not any(caches_latents(model.get_submodule(path)) for path in seen)
    for layer, (query, key, value) in zip(cache.layers, seen.values(), strict=True):
        assert torch.equal(key, layer.keys)
        assert torch.equal(value, layer.values)
        assert query.shape[2:] == key.shape[2:]
        assert query.shape[1] == model.config.num_attention_heads


def test_a_cache_of_latents_is_known(tiny_model) -> None:
    model = load(tiny_model("deepseek-v3"))
    cache = DynamicCache()
    with torch.inference_mode(), attention_replaced(model, unchanged) as seen:
        model(TOKENS, past_key_values=cache, use_cache=True)
    assert len(seen) == 3
    assert all(caches_latents(model.get_submodule(path)) for path in seen)
    assert cache.layers[0].keys.shape[1] == 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_computes_with_what_the_hook_returns(implementation: str, tiny_model) -> None:
    directory = tiny_model("llama")

    def other(path: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query * 2, key * -1, value * 4

    model = load(directory, implementation)
    with attention_replaced(model, other):
        found = logits(model)
    changed = load(directory, implementation)
    for block in changed.model.layers:
        block.self_attn.q_proj.weight.data.mul_(2)
        block.self_attn.k_proj.weight.data.mul_(-1)
        block.self_attn.v_proj.weight.data.mul_(4)
    assert torch.equal(found, logits(changed))  # powers of two and signs pass through rotary embedding exactly
    assert not torch.equal(found, logits(model))


@pytest.mark.parametrize("family", ["gemma3", "opt", "deepseek-v3"])
def test_streamed_blocks_are_watched_one_at_a_time(family: str, tiny_model) -> None:
    directory = tiny_model(family)
    whole: Seen = {}
    model = load(directory)
    with attention_observed(model, remember(whole)):
        logits(model)
    skeleton = Skeleton(directory, find_structure(directory))
    stream = BlockStream(skeleton, [TOKENS])
    (hidden,) = stream.start()
    streamed: Seen = {}
    for index, path in enumerate(skeleton.blocks):
        with stream.block(index), attention_observed(skeleton.model, remember(streamed)) as seen:
            hidden = stream.run(index, 0, hidden)
        assert [name.startswith(f"{path}.") for name in seen] == [True]
    assert list(streamed) == list(whole)
    for path, tensors in streamed.items():
        assert all(torch.equal(one, other) for one, other in zip(tensors, whole[path], strict=True))


@pytest.mark.parametrize("family", WATCHED)
def test_projections_before_norm_and_rotary_embedding(family: str, tiny_model) -> None:
    model = load(tiny_model(family))
    seen: Seen = {}
    if family not in WITH_PROJECTIONS:
        watching = attention_observed(model, remember(seen), "projection")
        with pytest.raises(ModelError, match="children named k_proj"), watching:
            logits(model)
        return
    with attention_observed(model, remember(seen), "projection"):
        logits(model)
    inputs: dict[str, Tensor] = {}
    for path in seen:
        projection = model.get_submodule(f"{path}.k_proj")
        projection.register_forward_hook(lambda m, args, out, path=path: inputs.update({path: args[0]}))
    logits(model)
    for path, (_, key, value) in seen.items():
        attention = model.get_submodule(path)
        for name, found in (("k_proj", key), ("v_proj", value)):
            with torch.inference_mode():
                expected = getattr(attention, name)(inputs[path])
            assert torch.equal(found.transpose(1, 2).flatten(2), expected)


def test_nested_watchers_see_what_the_inner_one_made(tiny_model) -> None:
    model, stranger = load(tiny_model("llama")), load(tiny_model("qwen3"))
    outer: Seen = {}
    inner: Seen = {}

    def negated(path: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner[path] = (query, key, value)
        return query, -key, value

    with attention_observed(model, remember(outer)), attention_replaced(model, negated), \
         attention_observed(stranger, remember({})) as strange:  # fmt: skip
        logits(model)
        assert not strange
    assert len(outer) == 2
    for path in outer:
        assert torch.equal(outer[path][1], -inner[path][1])


def test_transformers_is_as_it_was_afterwards(tiny_model) -> None:
    model = load(tiny_model("llama"))
    before = AttentionInterface.get_interface
    plain = logits(model)

    def fail(*_: object) -> tuple[Tensor, Tensor, Tensor]:
        raise KeyboardInterrupt

    with attention_replaced(model, unchanged):
        with pytest.raises(KeyboardInterrupt), attention_replaced(model, fail):
            logits(model)
        assert AttentionInterface.get_interface is not before, "the outer one goes on"
    assert AttentionInterface.get_interface is before
    assert torch.equal(logits(model), plain)


def test_bodies_that_end_in_another_order(tiny_model) -> None:
    """A generator that is let go early ends its body whenever it is collected."""
    model = load(tiny_model("llama"))
    before = AttentionInterface.get_interface

    def watching():
        with attention_replaced(model, unchanged) as seen:
            yield seen

    first, second = watching(), watching()
    next(first)
    seen = next(second)
    del first
    gc.collect()
    logits(model)
    assert len(seen) == 2
    second.close()
    assert AttentionInterface.get_interface is before
