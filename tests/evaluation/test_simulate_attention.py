"""Simulated 8-bit caches against a cache that really quantizes what is put into it; simulated heads against attention
written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_model, token_batches
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import eager_mask

from quantcli.errors import ModelError
from quantcli.evaluation.simulate_attention import simulated_attention
from quantcli.model.attention import attention_observed
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure_cache import find_structure
from quantcli.quant.attention import (
    RECALL,
    AttentionScales,
    fp8_scale,
    int8_channel_scales,
    int8_head_scales,
    recall_window,
)

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
TOKENS = token_batches((2, 20))[0]  # longer than the sliding windows, which are 8
Kind = Literal["int8", "int8 asym", "fp8"]
KINDS: tuple[Kind, ...] = ("int8", "int8 asym", "fp8")
BOUNDS = {"int8": 0.02, "int8 asym": 0.02, "fp8": 0.1, "heads": 0.05}
"""Relative distance of logits from the float model's."""
FAMILIES = {
    "llama": {},
    "qwen3": {},  # norms of queries and keys
    "gemma2": {},  # soft-capping, sliding windows
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 2},  # four queries a key
}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param), **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def load(directory: Path, **settings: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, **settings).eval()


@torch.inference_mode()
def logits(model: nn.Module, tokens: Tensor = TOKENS, **settings: Any) -> Tensor:
    return model(tokens, **({"use_cache": False} | settings)).logits


OTHER_TOKENS = token_batches((2, 15), seed=1)[0]


def calibrated(
    model: nn.Module, kind: Kind | Literal["heads"], tokens: Tensor = OTHER_TOKENS
) -> dict[str, AttentionScales]:
    """Scales from other tokens than are tested, so that some values are clamped."""
    scales: dict[str, AttentionScales] = {}

    def receive(path: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        if kind == "heads":
            heads = (x.transpose(0, 1).flatten(1) for x in (query, key, value))
            windows = (recall_window(x, ratio) for x, ratio in zip(heads, RECALL, strict=True))
            q, k, v = (int8_head_scales(low, high) for low, high in windows)
            scales[path] = AttentionScales("heads", fa_q_scale=q, fa_k_scale=k, fa_v_scale=v)
            return
        ends = [(x.amin((0, 2)).flatten(), x.amax((0, 2)).flatten()) for x in (key, value)]
        if kind == "fp8":
            scales[path] = AttentionScales("fp8", fp8_scale(*ends[0]), fp8_scale(*ends[1]))
        else:
            (ks, kz), (vs, vz) = (int8_channel_scales(low, high, kind == "int8") for low, high in ends)
            scales[path] = AttentionScales("int8", ks, vs, kz, vz)

    with attention_observed(model, receive):
        logits(model, tokens)
    return scales


class QuantizingCache(DynamicCache):
    """A cache that holds 8-bit codes' values, channel by channel, with the arithmetic spelled out."""

    def __init__(self, scales: Sequence[AttentionScales | None], *, cut: bool = False) -> None:
        super().__init__()
        self.scales, self.cut = scales, cut

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        scales = self.scales[layer_idx]
        if scales is not None:
            key, value = self.held(key, scales.tensors(), "k"), self.held(value, scales.tensors(), "v")
        return super().update(key, value, layer_idx, *args, **kwargs)

    def held(self, x: Tensor, parts: dict[str, Tensor], name: str) -> Tensor:
        scale = parts[f"{name}_scale"]
        result = x.clone()
        for head in range(x.shape[1]):
            for channel in range(x.shape[3]):
                column = x[:, head, :, channel]
                index = head * x.shape[3] + channel
                if len(scale) == 1:
                    codes = (column / scale[0]).clamp(-448, 448)
                    codes = towards_zero(codes) if self.cut else codes.to(torch.float8_e4m3fn).float()
                    result[:, head, :, channel] = codes * scale[0]
                else:
                    zero = parts[f"{name}_offset"][index] if f"{name}_offset" in parts else 0.0
                    codes = torch.round(column / scale[index] + zero).clamp(-128, 127)
                    result[:, head, :, channel] = (codes - zero) * scale[index]
        return result


def towards_zero(x: Tensor) -> Tensor:
    """Float8_e4m3fn values, of all that there are the largest magnitude that is not beyond x."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return every[(every <= x.abs().unsqueeze(-1)).sum(-1) - 1].copysign(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_equals_one_with_a_cache_that_quantizes(kind: Kind, directory: Path) -> None:
    model = load(directory)
    scales = calibrated(model, kind)
    expected = logits(model, past_key_values=QuantizingCache(list(scales.values())), use_cache=True)
    with simulated_attention(model, scales):
        found = logits(model)
    assert torch.equal(found, expected)


def test_so_it_does_where_the_cache_rounds_towards_zero(directory: Path) -> None:
    model = load(directory)
    scales = calibrated(model, "fp8")
    expected = logits(model, past_key_values=QuantizingCache(list(scales.values()), cut=True), use_cache=True)
    with simulated_attention(model, scales, cut=True):
        found = logits(model)
    assert torch.equal(found, expected)
    with simulated_attention(model, scales):
        assert not torch.equal(found, logits(model))


@pytest.mark.parametrize("kind", [*KINDS, "heads"])
def test_eight_bits_lose_little(kind: Kind | Literal["heads"], directory: Path) -> None:
    model = load(directory)
    plain = logits(model)
    with simulated_attention(model, calibrated(model, kind, TOKENS)):
        distance = (logits(model) - plain).norm() / plain.norm()
    assert 0 < distance < BOUNDS[kind]


@pytest.mark.parametrize("kind", ["int8 asym", "fp8"])
def test_so_does_decoding_token_by_token(kind: Kind, directory: Path) -> None:
    model = load(directory)
    scales = calibrated(model, kind)
    cache = QuantizingCache(list(scales.values()))
    decoded = [logits(model, TOKENS[:, :12], past_key_values=cache, use_cache=True)]
    for position in range(12, TOKENS.shape[1]):
        token = TOKENS[:, position : position + 1]
        decoded.append(logits(model, token, past_key_values=cache, use_cache=True))
    with simulated_attention(model, scales):
        found = logits(model)
    # sums in another order may move a value over the edge between two codes of the next layer
    torch.testing.assert_close(found, torch.cat(decoded, 1), rtol=0, atol=2e-3 * found.abs().max().item())
    assert (found - torch.cat(decoded, 1)).norm() < 0.1 * (found - logits(model)).norm()


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ · scaling + mask) V with int8 codes of every head, one query head at a time."""
    scales = SCALES_OF_LAYERS[module.layer_idx].tensors()
    group = query.shape[1] // key.shape[1]
    outputs = []
    for head in range(query.shape[1]):
        kv = head // group
        (q, sq), (k, sk), (v, sv) = (
            (torch.round(x / s).clamp(-128, 127).double(), s.double())
            for x, s in (
                (query[:, head], scales["fa_q_scale"][head, 0]),
                (key[:, kv], scales["fa_k_scale"][kv, 0]),
                (value[:, kv], scales["fa_v_scale"][kv, 0]),
            )
        )
        scores = (q @ k.transpose(1, 2)) * (sq * sk * scaling)  # sums of integers, exact
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        scores = scores if mask is None else scores + mask[:, 0]
        outputs.append((scores.softmax(-1) @ v) * sv)
    return torch.stack(outputs, 2).to(query.dtype), None


SCALES_OF_LAYERS: list[AttentionScales] = []


@pytest.fixture
def quantized_implementation() -> Iterator[str]:
    name = "quantized-in-float64"
    AttentionInterface.register(name, quantized_attention)
    AttentionMaskInterface.register(name, eager_mask)
    try:
        yield name
    finally:
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]
        SCALES_OF_LAYERS.clear()


def test_heads_compute_with_products_of_codes(directory: Path, quantized_implementation: str) -> None:
    model, quantized = load(directory), load(directory, attn_implementation=quantized_implementation)
    scales = calibrated(model, "heads")
    SCALES_OF_LAYERS.extend(scales.values())
    with simulated_attention(model, scales):
        found = logits(model)
    difference = (found - logits(quantized)).norm()
    change = (found - logits(model)).norm()
    assert difference < 0.02 * change, "float32 sums, and codes that they move over an edge"
    assert 1e-4 < change / logits(model).norm() < 0.15


def test_streamed_blocks_give_the_logits_of_the_whole_model(directory: Path) -> None:
    model = load(directory)
    scales = calibrated(model, "int8 asym")
    with simulated_attention(model, scales):
        expected = logits(model)
    skeleton = Skeleton(directory, find_structure(directory))
    stream = BlockStream(skeleton, [TOKENS])
    (hidden,) = stream.start()
    for index, path in enumerate(skeleton.blocks):
        own = {name.removeprefix(f"{path}."): s for name, s in scales.items() if name.startswith(f"{path}.")}
        with stream.block(index) as block, simulated_attention(block, own):
            hidden = stream.run(index, 0, hidden)
    with stream.head():
        found = torch.cat([piece for _, piece in stream.logits(hidden)], 1)
    assert torch.equal(found, expected.float())


def test_modules_without_scales_stay_as_they_were(llama: Path) -> None:
    model = load(llama)
    with simulated_attention(model, {}):
        assert torch.equal(logits(model), logits(load(llama)))
    (first, scales), _ = calibrated(model, "int8").items()
    with simulated_attention(model, {first: scales}):
        found = logits(model)
    assert torch.equal(found, logits(model, past_key_values=QuantizingCache([scales, None]), use_cache=True))


def test_what_cannot_be_simulated_is_refused(llama: Path, tmp_path: Path) -> None:
    scales = calibrated(load(llama), "int8")
    path = next(iter(scales))
    stranger = simulated_attention(load(llama), {"model.layers.9": scales[path]})
    with pytest.raises(ModelError, match=r"model\.layers\.9 is no module"), stranger:
        pass
    falcon = load(save_tiny_model("falcon", tmp_path / "falcon"))
    unseen = simulated_attention(falcon, {"transformer.h.0.self_attention": scales[path]})
    with pytest.raises(ModelError, match="cannot be simulated"), unseen:
        logits(falcon)
    deepseek = load(save_tiny_model("deepseek-v3", tmp_path / "deepseek"))
    with pytest.raises(ModelError, match="caches latents"), simulated_attention(deepseek, {path: scales[path]}):
        logits(deepseek)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference results are not beside the checkout")
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("case", ["v1_kvcache_int8", "v1_kvcache_int8_asym"])
def test_logits_of_msmodelslim_with_an_int8_cache(name: str, case: str) -> None:
    folder = GOLDEN / name / case
    stored = load_file(folder / "weights.safetensors")
    scales = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        tensors = {
            f"{part}_{what}": stored[f"{prefix}.{part}_proj.kv_cache_{what}"]
            for part in ("k", "v")
            for what in ("scale", "offset")
        }
        scales[prefix] = AttentionScales("int8", **tensors)
    model = load(GOLDEN / name / "model", attn_implementation="eager", dtype=torch.float32)
    tokens = load_file(GOLDEN / name / "heldout.safetensors")["input_ids"].view(1, -1)
    with simulated_attention(model, scales):
        found = logits(model, tokens)
    expected = load_file(folder / "logits.safetensors")["fake_quant"]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=2e-6)
    assert (logits(model, tokens)[0] - expected).abs().max() > 0.01
