"""Statistics of queries, keys and values against all tokens at once, and scales against msModelSlim's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantcli.calibration.attention_statistics import AttentionStatistics, attention_scales
from quantcli.errors import DataError
from quantcli.model.attention import attention_observed
from quantcli.quant.attention import RECALL

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference results are not beside the checkout")
Sample = tuple[Tensor, Tensor, Tensor]


def samples(seed: int = 0, count: int = 5) -> list[Sample]:
    """Queries, keys and values of four heads, two KV heads, sizes 8 and 6, and several lengths."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in range(30, 30 + count):
        shapes = [(1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 6)]
        query, key, value = (torch.randn(shape, generator=generator) ** 3 for shape in shapes)
        result.append((query, key, value))
    return result


def gather(batches: list[Sample], recall: tuple[float, float, float] | None = RECALL) -> AttentionStatistics:
    result = AttentionStatistics.for_shapes(*batches[0], recall=recall)
    for batch in batches:
        result.update(*batch)
    return result


def test_extremes_are_over_all_tokens_and_windows_over_each_sample() -> None:
    batches = samples()
    found = gather(batches, (0.9, 0.95, 1.0))
    assert found.count == sum(key.shape[2] for _, key, _ in batches)
    for name, place in (("key", 1), ("value", 2)):
        channels = torch.cat([batch[place][0].transpose(0, 1).flatten(1) for batch in batches])
        assert torch.equal(getattr(found, f"{name}_minimum"), channels.amin(0))
        assert torch.equal(getattr(found, f"{name}_maximum"), channels.amax(0))
    for name, place, ratio in (("query", 0, 0.9), ("key", 1, 0.95), ("value", 2, 1.0)):
        for head, window in enumerate(getattr(found, f"{name}_window").tolist()):
            ends = []
            for batch in batches:
                ordered = sorted(batch[place][0, head].flatten().tolist())
                covered = int(ratio * len(ordered))
                begins = range(len(ordered) - covered + 1)
                begin = min(begins, key=lambda i: ordered[i + covered - 1] - ordered[i])
                ends.append((ordered[begin], ordered[begin + covered - 1]))
            assert window == [min(low for low, _ in ends), max(high for _, high in ends)]


def test_samples_of_a_batch_count_as_they_would_alone() -> None:
    single = [tuple(x[:, :, :30] for x in sample) for sample in samples()]
    together = [tuple(torch.cat(parts) for parts in zip(*single, strict=True))]
    one, other = gather(single).to_tensors(), gather(together).to_tensors()  # type: ignore[arg-type]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recall", [RECALL, None])
def test_storage_returns_the_same_and_goes_on(recall: tuple[float, float, float] | None) -> None:
    batches = samples()
    half = gather(batches[:2], recall).to_tensors()
    restored = AttentionStatistics.from_tensors(half)
    assert all(torch.equal(tensor, half[name]) for name, tensor in restored.to_tensors().items())
    for batch in batches[2:]:
        restored.update(*batch)
    expected = gather(batches, recall).to_tensors()
    assert restored.to_tensors().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in restored.to_tensors().items())
    assert restored.recall == recall


def test_no_token_is_no_observation() -> None:
    empty = AttentionStatistics(4, 2, 8, 6, recall=RECALL)
    assert not any(tensor.any() for name, tensor in empty.to_tensors().items() if name not in ("sizes", "recall"))
    with pytest.raises(DataError, match="No token"):
        attention_scales(empty, "int8")
    restored = AttentionStatistics.from_tensors(empty.to_tensors())
    restored.update(*(-torch.ones_like(x) for x in samples()[0]))
    assert restored.key_maximum.tolist() == [-1.0] * 16  # the stored zero was no observation


def test_non_finite_elements_are_counted_and_kept_out() -> None:
    query, key, value = samples()[0]
    broken = [x.clone() for x in (query, key, value)]
    broken[0][0, 1, 2, 3], broken[1][0, 0, 0, 0], broken[2][0, 1, 1, 1] = torch.nan, torch.inf, -torch.inf
    found = gather([tuple(broken)])  # type: ignore[list-item]
    assert found.non_finite == 3
    zeroed = gather([tuple(torch.where(torch.isfinite(x), x, 0) for x in broken)])  # type: ignore[list-item]
    assert all(torch.equal(tensor, found.to_tensors()[name]) for name, tensor in zeroed.to_tensors().items())


def test_other_shapes_and_damaged_storage_are_refused() -> None:
    query, key, value = samples()[0]
    with pytest.raises(DataError, match="do not fit 4 heads and 2 KV heads of sizes 8 and 6"):
        gather([(query, key, value)]).update(query, key, value[..., :5])
    with pytest.raises(DataError, match="do not fit"):
        gather([(query, key, value)]).update(query[:, :3], key, value)
    stored = gather([(query, key, value)]).to_tensors()
    with pytest.raises(DataError, match="lack value_maximum, key_window"):
        AttentionStatistics.from_tensors(
            {name: x for name, x in stored.items() if name not in ("value_maximum", "key_window")}
        )
    with pytest.raises(DataError, match="do not fit together"):
        AttentionStatistics.from_tensors(stored | {"key_window": torch.ones(3, 2)})
    with pytest.raises(DataError, match="no recall windows"):
        attention_scales(gather([(query, key, value)], None), "heads")


def test_a_whole_tensor_of_fp8_has_the_scale_of_its_largest_element() -> None:
    batches = samples()
    scales = attention_scales(gather(batches, None), "fp8").tensors()
    for name, place in (("k_scale", 1), ("v_scale", 2)):
        largest = max(batch[place].abs().max().item() for batch in batches)
        assert scales[name].tolist() == [pytest.approx(largest / 448, rel=2e-7)]


def load(model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / model / "model", dtype=dtype, attn_implementation="eager")


@torch.inference_mode()
def observe(model: nn.Module, name: str, place: str, which: slice = slice(None)) -> dict[str, AttentionStatistics]:
    found: dict[str, AttentionStatistics] = {}

    def receive(path: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        found.setdefault(path, AttentionStatistics.for_shapes(query, key, value, recall=RECALL))
        found[path].update(query, key, value)

    calibration = load_file(GOLDEN / name / "calibration.safetensors")
    with attention_observed(model, receive, place):  # type: ignore[arg-type]
        for tokens in [calibration[f"input_ids_{i}"] for i in range(6)][which]:
            model(tokens.view(1, -1), use_cache=False)
    assert len(found) == 2
    return found


@golden
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("case", "place", "which"),
    [
        ("w8a8_kv", "projection", slice(None)),
        # v1 keeps the extremes of the last sample only, an oversight of its observer; what it observes is the cache
        ("v1_kvcache_int8", "cache", slice(5, 6)),
    ],
)
def test_cache_scales_of_msmodelslim(name: str, symmetric: bool, case: str, place: str, which: slice) -> None:
    folder = f"{case}_{'sym' if symmetric else 'asym'}" if case == "w8a8_kv" else case + ("" if symmetric else "_asym")
    expected = load_file(GOLDEN / name / folder / "weights.safetensors")
    for path, statistics in observe(load(name), name, place, which).items():
        scales = attention_scales(statistics, "int8", symmetric=symmetric).tensors()
        for part in ("k", "v"):
            prefix = f"{path}.{part}_proj.kv_cache"
            torch.testing.assert_close(scales[f"{part}_scale"], expected[f"{prefix}_scale"], rtol=4e-7, atol=0)
            offset = scales.get(f"{part}_offset", torch.zeros(32))
            assert torch.equal(offset, expected[f"{prefix}_offset"])


@contextmanager
def w8a8_while_calibrating(model: nn.Module) -> Iterator[None]:
    """Linears but the head with int8 weights a row, and inputs on the grid of the running mean of each sample's
    extremes: what msModelSlim's static W8A8 propagates while it calibrates."""

    def quantized_input(ends: Tensor, calls: list[int], x: Tensor) -> Tensor:
        calls[0] += 1
        ends += (torch.stack([x.min(), x.max()]) - ends) / calls[0]
        low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
        scale = (high - low) / 255
        zero = torch.round(-low / scale) - 128
        return ((torch.round(x / scale) + zero).clamp(-128, 127) - zero) * scale

    with ExitStack() as hooks:
        for path, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and path != "lm_head":
                weight = linear.weight.data
                scale = weight.abs().amax(1, keepdim=True) / 127
                linear.weight.data = torch.round(weight / scale) * scale
                ends, calls = torch.zeros(2), [0]
                handle = linear.register_forward_pre_hook(
                    lambda _, args, ends=ends, calls=calls: (quantized_input(ends, calls, args[0]),)
                )
                hooks.callback(handle.remove)
        yield


@golden
@pytest.mark.parametrize("name", ["A", "B"])
def test_head_scales_of_msmodelslim(name: str) -> None:
    expected = load_file(GOLDEN / name / "w8a8_fa" / "weights.safetensors")
    model = load(name)
    with w8a8_while_calibrating(model):
        found = observe(model, name, "cache")
    for path, statistics in found.items():
        scales = attention_scales(statistics, "heads").tensors()
        for part in ("q", "k", "v"):
            stored = expected[f"{path}.fa_{part}.scale"]
            torch.testing.assert_close(scales[f"fa_{part}_scale"], stored, rtol=4e-7, atol=0)


@golden
@pytest.mark.parametrize(("name", "dtype"), [("A_bf16", torch.bfloat16), ("A_fp16", torch.float16)])
def test_scales_in_the_dtype_of_the_model(name: str, dtype: torch.dtype) -> None:
    """Products in half precision differ in their last bit between versions of torch, so scales may, too."""
    expected = load_file(GOLDEN / name / "w8a8_kv_sym" / "weights.safetensors")
    for path, statistics in observe(load(name, dtype), name, "projection").items():
        scales = attention_scales(statistics, "int8", dtype=dtype).tensors()
        for part in ("k", "v"):
            stored = expected[f"{path}.{part}_proj.kv_cache_scale"]
            assert stored.dtype == dtype
            assert torch.equal(scales[f"{part}_scale"], scales[f"{part}_scale"].to(dtype).float())
            torch.testing.assert_close(scales[f"{part}_scale"].to(dtype), stored, rtol=torch.finfo(dtype).eps, atol=0)
