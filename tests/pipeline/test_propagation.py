"""Static scales found on the quantized model: sample by sample as a loop does it, block by block as the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened
from tiny_models import save_tiny_model
from torch import Tensor, nn
from torch.nn.functional import linear

import quantcli
from quantcli.calibration.statistics import InputStatistics
from quantcli.errors import ModelError
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store, StoredLinear
from quantcli.model.hidden import HiddenCache
from quantcli.model.stream import BlockStream
from quantcli.model.workers import linear_workers
from quantcli.pipeline.batches import batched
from quantcli.pipeline.context import Context
from quantcli.pipeline.propagation import RunningInput, propagate_block
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.stages.calibrate import read_statistics
from quantcli.pipeline.treatment import WeightSource, observed_of, replacement
from quantcli.quant.grid import dequantize
from quantcli.quant.observers import activation_range
from quantcli.recipe.quantization import ActivationsSection

Recipe = dict[str, Any]
WIDTH = 16


def section(**keys: Any) -> ActivationsSection:
    return ActivationsSection(**{"bits": 8, "propagation": "quantized", **keys})


def random_samples(count: int = 5, tokens: int = 7) -> Tensor:
    """Samples of different spread and offset."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(count, 1, 1, generator=generator) * 3 + 0.2
    return torch.randn(count, tokens, WIDTH, generator=generator) * spread + spread / 3


class SlowRunning:
    """Each sample quantized with the extremes, or their means, of the samples up to it.

    In float32 scalars, one operation after the other: one code more or less somewhere in a block moves extremes behind
    it, and with them all codes of a whole model.
    """

    def __init__(self, aggregation: str, symmetric: bool) -> None:
        self.aggregation, self.symmetric = aggregation, symmetric
        self.lows: list[np.float32] = []
        self.highs: list[np.float32] = []

    def parameters(self) -> tuple[float, int]:
        count = np.float32(len(self.lows))
        if self.aggregation == "mean":
            low, high = (np.float32(np.sum(ends, dtype=np.float64)) / count for ends in (self.lows, self.highs))
        else:
            low, high = min(self.lows), max(self.highs)
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        if self.symmetric:
            return float(max(-low, high) / np.float32(127)), 0
        scale = high / np.float32(255) - low / np.float32(255)
        return float(scale), min(127, max(-128, round(float(-low / scale)) - 128))

    def __call__(self, batch: Tensor) -> Tensor:
        quantized = []
        for sample in batch:
            self.lows.append(np.float32(sample.min()))
            self.highs.append(np.float32(sample.max()))
            scale, zero = self.parameters()
            quantized.append((((sample / scale).round() + zero).clamp(-128, 127) - zero) * scale)
        return torch.stack(quantized)


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sample_is_quantized_with_what_was_seen_up_to_it(aggregation: str, symmetric: bool) -> None:
    samples = random_samples()
    expected = SlowRunning(aggregation, symmetric)(samples)
    wanted = section(aggregation=aggregation, symmetric=symmetric)
    together = RunningInput(WIDTH, wanted, "cpu", 0)(samples)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    alone = RunningInput(WIDTH, wanted, "cpu", 0)
    assert torch.equal(torch.cat([alone(samples[i : i + 1]) for i in range(len(samples))]), together)
    flat = RunningInput(WIDTH, wanted, "cpu", 0)
    assert torch.equal(torch.stack([flat(sample) for sample in samples]), together)


def test_float_codes_have_the_running_scale_of_a_448th() -> None:
    samples = random_samples()
    found = RunningInput(WIDTH, section(type="float", symmetric=True), "cpu", 0)(samples)
    largest = torch.tensor(0.0)
    for sample, quantized in zip(samples, found, strict=True):
        largest = torch.maximum(largest, sample.abs().max())
        scale = largest / 448
        expected = (sample / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        torch.testing.assert_close(quantized, expected, rtol=1e-6, atol=0)


def test_linears_that_share_an_input_count_it_once() -> None:
    running, samples = RunningInput(WIDTH, section(), "cpu", 0), random_samples()
    assert running(samples) is running(samples)
    assert running.statistics.count == samples.shape[0] * samples.shape[1]
    running(samples.clone())
    assert running.statistics.count == 2 * samples.shape[0] * samples.shape[1]


def share_of(mixed: Tensor, x: Tensor) -> float:
    """The part of the values that are quantized; each is either that or as it was."""
    quantized = RunningInput(WIDTH, section(), "cpu", 0)(x)
    assert bool(((mixed == quantized) | (mixed == x)).all())
    differs = quantized != x
    return float((mixed == quantized)[differs].float().mean())


@pytest.mark.parametrize(("share", "expected", "tolerance"), [(0, 0, 0), (1, 1, 0), (0.5, 0.5, 0.04), (0.9, 0.9, 0.04)])
def test_a_share_of_the_values_is_quantized(share: float, expected: float, tolerance: float) -> None:
    x = random_samples(tokens=40)
    mixed = RunningInput(WIDTH, section(quantized_share=share), "cpu", 3)(x)
    assert abs(share_of(mixed, x) - expected) <= tolerance
    assert torch.equal(mixed, RunningInput(WIDTH, section(quantized_share=share), "cpu", 3)(x))
    other = RunningInput(WIDTH, section(quantized_share=share), "cpu", 4)(x)
    assert torch.equal(mixed, other) == (share in (0, 1))


def test_a_negative_share_is_drawn_for_each_batch() -> None:
    batches = [random_samples(tokens=100 + extra) for extra in range(12)]
    drawn = []
    for seed in (0, 0, 1):
        shares = []
        running = RunningInput(WIDTH, section(quantized_share=-1), "cpu", seed)
        reference = RunningInput(WIDTH, section(), "cpu", seed)
        for x in batches:
            quantized, mixed = reference(x), running(x)
            shares.append(float((mixed == quantized)[quantized != x].float().mean()))
        drawn.append(shares)
    assert drawn[0] == drawn[1] != drawn[2]
    assert min(drawn[0]) < 0.3
    assert max(drawn[0]) > 0.7


# whole models


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return changed(
        static_recipe(tmp_path / "run"), export=None, evaluate=None, quantize__activations__propagation="quantized"
    )


@contextmanager
def prepared(recipe: Recipe) -> Iterator[tuple[Context, BlockStream, HiddenCache]]:
    """A calibrated run, and its samples as they enter the first block."""
    with opened(recipe, "calibrate") as context:
        stream = BlockStream(context.skeleton(), batched(calibration_samples(context).samples))
        cache = HiddenCache(Path(recipe["output"]) / "test", stream.hidden_shapes(), torch.float32)
        stream.enter(cache, None)
        yield context, stream, cache


def weights_of(context: Context, index: int) -> dict[str, StoredLinear]:
    statistics = partial(read_statistics, context)
    with linear_workers("cpu") as workers:
        jobs = WeightSource(context).submit(workers, index, statistics, with_inputs=False)
        return {name: job.result()[0] for name, job in jobs.items()}


def propagated(
    context: Context, stream: BlockStream, cache: HiddenCache, index: int
) -> tuple[dict[str, StoredLinear], list[Tensor]]:
    """A block's linears with their input scales, and the hidden states that leave it."""
    found, _ = propagate_block(
        stream,
        index,
        context.plan.structure.blocks[index],
        cache,
        weights_of(context, index),
        context.plan.treatments,
        partial(read_statistics, context),
        seed=0,
    )
    cache.commit(index + 1)
    return found, [cache.get(batch).clone() for batch in range(len(stream.batches))]


def leaving(model: nn.Module, stream: BlockStream, block: int) -> list[Tensor]:
    """What leaves a block of the whole model, by a hook on the next one or on the final norm."""
    seen: list[Tensor] = []
    layers = model.model.layers  # type: ignore[union-attr]
    behind = layers[block + 1] if block + 1 < len(layers) else model.model.norm  # type: ignore[union-attr, index, arg-type]
    handle = behind.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))  # type: ignore[union-attr]
    with torch.inference_mode():
        for batch in stream.batches:
            model(batch, use_cache=False)
    handle.remove()
    return seen


Slow = Callable[[nn.Module, Tensor], Tensor]


def slow_linear(weight: Tensor, quantizer: Callable[[Tensor], Tensor]) -> Slow:
    return lambda _module, x: quantizer(x) @ weight.t()


@pytest.mark.parametrize(("aggregation", "symmetric"), [("max", False), ("mean", True), ("mean", False)])
def test_blocks_are_observed_behind_quantized_ones(recipe: Recipe, aggregation: str, symmetric: bool) -> None:
    """The whole model, each linear a loop over samples, ends in the same scales and hidden states."""
    recipe = changed(recipe, quantize__activations__aggregation=aggregation, quantize__activations__symmetric=symmetric)
    with prepared(recipe) as (context, stream, cache):
        assert [batch.shape[0] for batch in stream.batches] == [4]
        model = float_model(context.model)
        running: dict[str, SlowRunning] = {}
        replaced: dict[str, Slow] = {}
        for index in range(context.blocks):
            for name, entry in weights_of(context, index).items():
                running[name] = SlowRunning(aggregation, symmetric)
                replaced[name] = slow_linear(dequantize(entry.weight), running[name])
        with simulated(model, replaced):
            expected = leaving(model, stream, context.blocks - 1)
        plain = leaving(model, stream, context.blocks - 1)
        found: dict[str, StoredLinear] = {}
        for index in range(context.blocks):
            stored, hidden = propagated(context, stream, cache, index)
            found |= stored
        torch.testing.assert_close(hidden[0], expected[0], rtol=1e-5, atol=1e-5)
        assert (plain[0] - expected[0]).norm() > 0.01 * plain[0].norm()
        for name, slow in running.items():
            scale, zero = slow.parameters()
            assert found[name].input_scale is not None
            assert math.isclose(found[name].input_scale.item(), scale, rel_tol=1e-6), name
            held = found[name].input_zero_point
            assert held is None if symmetric else held is not None and int(held) == zero


@pytest.mark.parametrize("method", ["histogram", "mse", "percentile"])
def test_other_ranges_run_the_block_again_with_the_final_scales(recipe: Recipe, method: str) -> None:
    recipe = changed(
        recipe,
        quantize__activations__method=method,
        quantize__activations__symmetric=True,
        **({"quantize__activations__percentile": 99} if method == "percentile" else {}),
    )
    with prepared(recipe) as (context, stream, cache):
        model = float_model(context.model)
        final: dict[str, Any] = {}
        for index in range(2):
            entries = weights_of(context, index)
            seen = {name: InputStatistics(context.linears[name].in_features) for name in entries}
            running = {name: SlowRunning("max", True) for name in entries}

            def observing(name: str, x: Tensor) -> Tensor:
                seen[name].update(x)  # noqa: B023
                return running[name](x)  # noqa: B023

            first = {
                name: slow_linear(dequantize(entry.weight), partial(observing, name)) for name, entry in entries.items()
            }
            with simulated(model, {**final, **first}):
                leaving(model, stream, index)
            stored, hidden = propagated(context, stream, cache, index)
            for name, entry in stored.items():
                low, high = activation_range(
                    observed_of(seen[name].to_tensors()), method, symmetric=True, percentile=99
                )
                assert entry.input_scale is not None
                assert math.isclose(entry.input_scale.item(), max(-low, high) / 127, rel_tol=1e-6), name
                final[name] = replacement(entry, context.plan.treatments[name].scheme, torch.float32, "cpu", "decode")
            with simulated(model, final):
                expected = leaving(model, stream, index)
            torch.testing.assert_close(hidden[0], expected[0], rtol=1e-5, atol=1e-5)


def test_the_stage_stores_what_blocks_in_turn_give(recipe: Recipe) -> None:
    with opened(recipe, "quantize") as context:
        store = Store(context.folder("quantize"))
    with prepared(recipe) as (context, stream, cache):
        for index in range(context.blocks):
            for name, entry in propagated(context, stream, cache, index)[0].items():
                held = store.read(name)
                assert torch.equal(held.weight.codes, entry.weight.codes)
                assert torch.equal(held.input_scale, entry.input_scale)  # type: ignore[arg-type]


def test_a_share_of_none_sees_what_quantized_weights_alone_give(recipe: Recipe) -> None:
    with prepared(changed(recipe, quantize__activations__quantized_share=0)) as (context, stream, cache):
        model = float_model(context.model)
        seen: dict[str, list[float]] = {}
        replaced: dict[str, Slow] = {}

        def observing(name: str, x: Tensor) -> Tensor:
            seen[name] = [float(x.min()), float(x.max())]
            return x

        for index in range(context.blocks):
            for name, entry in weights_of(context, index).items():
                replaced[name] = slow_linear(dequantize(entry.weight), partial(observing, name))
        with simulated(model, replaced):
            leaving(model, stream, context.blocks - 1)
        for index in range(context.blocks):
            for name, entry in propagated(context, stream, cache, index)[0].items():
                assert entry.input_scale is not None
                assert math.isclose(entry.input_scale.item(), (seen[name][1] - seen[name][0]) / 255, rel_tol=1e-5)


def test_samples_that_enter_as_one_sequence_are_told_apart(recipe: Recipe, tmp_path: Path) -> None:
    """OPT's fc1 and fc2 read all tokens of a batch as [tokens, width]."""
    path = save_tiny_model("opt", tmp_path / "opt", with_tokenizer=True)
    keys = {"quantized_share": 0, "aggregation": "mean"}
    recipe = changed(recipe, model__path=str(path), **{f"quantize__activations__{k}": v for k, v in keys.items()})
    with prepared(recipe) as (context, stream, cache):
        assert [batch.shape[0] for batch in stream.batches] == [4]
        model = float_model(context.model)
        lows: dict[str, float] = {}
        highs: dict[str, float] = {}

        def observing(name: str, weight: Tensor, module: nn.Module, x: Tensor) -> Tensor:
            samples = x.reshape(4, -1)
            lows[name], highs[name] = (float(ends.mean()) for ends in (samples.amin(1), samples.amax(1)))
            return linear(x, weight, module.bias)  # type: ignore[arg-type]

        entries = weights_of(context, 0)
        replaced = {name: partial(observing, name, dequantize(entry.weight)) for name, entry in entries.items()}
        with simulated(model, replaced), torch.inference_mode():
            model(stream.batches[0], use_cache=False)
        found, _ = propagated(context, stream, cache, 0)
        assert {"fc1", "fc2"} <= {name.rpartition(".")[2] for name in found}
        for name, entry in found.items():
            assert entry.input_scale is not None
            low, high = min(lows[name], 0.0), max(highs[name], 0.0)
            assert math.isclose(entry.input_scale.item(), (high - low) / 255, rel_tol=1e-5), name


def test_values_that_overflow_only_when_quantized_are_refused(recipe: Recipe) -> None:
    with prepared(recipe) as (context, stream, cache):
        cache.put(0, torch.full_like(cache.get(0), torch.inf))
        cache.commit(0)
        with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: .* not finite") as caught:
            propagated(context, stream, cache, 0)
        assert "float32" in caught.value.remedy


@pytest.mark.parametrize("kind", ["linear", "block"])
def test_an_interrupted_stage_ends_in_the_same_bytes(
    recipe: Recipe, kind: str, tree: Callable[[Path], Mapping[str, str]]
) -> None:
    """Between the file of a block and its hidden states, and while a block is at work."""
    recipe = changed(
        recipe, quantize__activations__quantized_share=-1, quantize__activations__aggregation="mean",
        quantize__rollback={"last_linear": False},
    )  # fmt: skip
    quantcli.run(recipe)
    expected = tree(Path(recipe["output"]) / "quantize")
    again = changed(recipe, output=recipe["output"] + "-again")
    for number in (1, 2) if kind == "block" else (4, 10):
        with pytest.raises(Interrupted):
            quantcli.run(again, listener=interrupt("quantize", number, kind))
    events: list[Mapping[str, Any]] = []
    quantcli.run(again, listener=events.append)
    found = tree(Path(again["output"]) / "quantize")
    record = "stage.json"  # names the fingerprint, which has the output's content but not its place
    assert {k: v for k, v in found.items() if k != record} == {k: v for k, v in expected.items() if k != record}
    files = [json.loads((Path(r["output"]) / "quantize" / record).read_text())["files"] for r in (recipe, again)]
    assert files[0] == files[1]
    went_on = [e["index"] for e in events if e["event"] == "block" and e["stage"] == "quantize"]
    assert went_on[0] > 0


@pytest.mark.parametrize(("method", "passes"), [("minmax", 0), ("histogram", 1)])
def test_who_observes_the_block_is_told_when_it_runs_again(recipe: Recipe, method: str, passes: int) -> None:
    told: list[None] = []
    with prepared(changed(recipe, quantize__activations__method=method)) as (context, stream, cache):
        block, weights = context.plan.structure.blocks[0], weights_of(context, 0)
        observed = partial(read_statistics, context)
        treatments, largest_seed = context.plan.treatments, 2**63 - 1
        propagate_block(stream, 0, block, cache, weights, treatments, observed, largest_seed, lambda: told.append(None))
    assert len(told) == passes
