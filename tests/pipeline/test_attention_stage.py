"""Caches and attention products in a run: scales against what transformers' own attention sees, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_contexts import Interrupted, changed, float_model, interrupt, opened
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.formats.store import Store
from quantcli.pipeline.context import Context
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.standalone import score_recipe
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]
MODULES = [f"model.layers.{index}.self_attn" for index in range(3)]
QUERIES_KEYS_VALUES: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
"""What the recording attention was given, by layer, a sample at a time: [heads, tokens, size]."""


def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    QUERIES_KEYS_VALUES.setdefault(int(module.layer_idx), []).append((query[0], key[0], value[0]))  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


transformers.AttentionInterface.register("recording", recording)


@torch.inference_mode()
def observed(context: Context) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """Queries, keys and values of every attention module over the calibration samples, one at a time."""
    QUERIES_KEYS_VALUES.clear()
    model = float_model(context.model, attn_implementation="recording")
    for sample in calibration_samples(context).samples:
        model(torch.tensor([sample]), use_cache=False)
    return {MODULES[index]: seen for index, seen in QUERIES_KEYS_VALUES.items()}


def channels(samples: list[Tensor]) -> Tensor:
    """[heads, tokens, size] of each sample as [tokens of all, heads * size], the channels of a head side by side."""
    return torch.cat([sample.permute(1, 0, 2).flatten(1) for sample in samples])


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return changed(static_recipe(tmp_path / "run"), quantize={"weights": {"bits": 8}})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-7)


def test_int8_scales_are_those_of_each_channel(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__kv_cache={}, export={"formats": ["ascend"]})
    with opened(recipe, "quantize") as context:
        store, seen = Store(context.folder("quantize")), observed(context)
        assert list(store.attention_modules) == MODULES
        for module in MODULES:
            parts = store.read_attention(module)
            assert set(parts) == {"k_scale", "v_scale"}
            close(parts["k_scale"], channels([key for _, key, _ in seen[module]]).abs().amax(0) / 127)
            close(parts["v_scale"], channels([value for *_, value in seen[module]]).abs().amax(0) / 127)


def test_asymmetric_ones_have_offsets(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__kv_cache={"symmetric": False}, export={"formats": ["ascend"]})
    with opened(recipe, "quantize") as context:
        store, seen = Store(context.folder("quantize")), observed(context)
        for module in MODULES:
            parts = store.read_attention(module)
            for name, place in (("k", 1), ("v", 2)):
                x = channels([sample[place] for sample in seen[module]])
                low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
                scale = (high - low) / 255
                close(parts[f"{name}_scale"], scale)
                assert torch.equal(parts[f"{name}_offset"], (-low / scale).round() - 128)


def test_projections_are_observed_before_rotation(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__kv_cache={"observe": "projection"}, export={"formats": ["ascend"]})
    with opened(recipe, "quantize") as context, torch.inference_mode():
        store = Store(context.folder("quantize"))
        model = float_model(context.model)
        outputs: dict[str, list[Tensor]] = {}
        for module in MODULES:
            for name in ("k", "v"):
                model.get_submodule(f"{module}.{name}_proj").register_forward_hook(
                    lambda _module, _args, output, _at=(module, name): outputs.setdefault(_at, []).append(output[0])
                )
        for sample in calibration_samples(context).samples:
            model(torch.tensor([sample]), use_cache=False)
        for (module, name), found in outputs.items():
            close(store.read_attention(module)[f"{name}_scale"], torch.cat(found).abs().amax(0) / 127)


def test_fp8_scales_are_one_for_keys_and_one_for_values(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__kv_cache={"type": "float"})
    with opened(recipe, "quantize") as context:
        store, seen = Store(context.folder("quantize")), observed(context)
        for module in MODULES:
            parts = store.read_attention(module)
            for name, place in (("k", 1), ("v", 2)):
                largest = max(float(sample[place].abs().max()) for sample in seen[module])
                close(parts[f"{name}_scale"], torch.tensor([largest / 448]))


@pytest.mark.parametrize("coverage", [None, 0.9])
def test_heads_have_the_narrowest_window_that_covers_them(recipe: Recipe, coverage: float | None) -> None:
    """Of each sample the narrowest interval that holds its share of the values, sought among all; their union."""
    section = {} if coverage is None else {"coverage": coverage}
    recipe = changed(recipe, quantize__attention=section, export={"formats": ["ascend"]})
    with opened(recipe, "quantize") as context:
        store, seen = Store(context.folder("quantize")), observed(context)
        for module in MODULES:
            parts = store.read_attention(module)
            for name, place, ratio in (("q", 0, coverage or 0.9999), ("k", 1, coverage or 0.9999), ("v", 2, 1)):
                expected = []
                for head in range(seen[module][0][place].shape[0]):
                    ends = [narrowest(sample[place][head], ratio) for sample in seen[module]]
                    expected.append([max(abs(end) for window in ends for end in window) / 127])
                close(parts[f"fa_{name}_scale"], torch.tensor(expected))


def narrowest(values: Tensor, ratio: float) -> tuple[float, float]:
    ordered = sorted(values.flatten().tolist())
    covered = math.floor(ratio * len(ordered))
    windows = [(ordered[i], ordered[i + covered - 1]) for i in range(len(ordered) - covered + 1)]
    return min(windows, key=lambda window: window[1] - window[0])


def test_heads_are_observed_on_the_quantized_model_where_inputs_are(recipe: Recipe) -> None:
    """With propagation: quantized, first layers see what the float model shows and later ones do not."""
    stores = {}
    for propagation in ("float", "quantized"):
        run = changed(
            recipe, quantize__attention={}, export={"formats": ["ascend"]}, output=recipe["output"] + propagation
        )
        run["quantize"]["activations"] = {"bits": 8, "propagation": propagation}
        with opened(run, "quantize") as context:
            stores[propagation] = Store(context.folder("quantize"))
    for module in MODULES:
        of_float, of_quantized = (stores[name].read_attention(module) for name in stores)
        for part, scale in of_float.items():
            assert not torch.equal(scale, of_quantized[part])
            torch.testing.assert_close(scale, of_quantized[part], rtol=0.1, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "form"),
    [
        ({"kv_cache": {}}, "ascend"),
        ({"kv_cache": {"type": "float"}}, "compressed-tensors"),
        ({"attention": {"coverage": 0.9}}, "ascend"),
    ],
    ids=["int8", "fp8", "heads"],
)
def test_what_is_quantized_shows_in_the_evaluation(recipe: Recipe, keys: dict[str, Any], form: str) -> None:
    recipe["export"] = {"formats": [form]}
    plain = quantcli.run(changed(recipe, output=recipe["output"] + "-plain")).perplexity
    recipe["quantize"] |= keys
    found = quantcli.run(recipe).perplexity
    assert plain is not None
    assert found is not None
    assert found["float_model"] == plain["float_model"]
    assert found["kl_divergence"] > plain["kl_divergence"] * 1.01


def test_an_fp8_cache_may_be_scored_as_vllm_rounds_it_on_a_cpu(recipe: Recipe) -> None:
    """Towards zero, by a run and of its checkpoint alone; the float model is not run again."""
    recipe = changed(recipe, quantize__kv_cache={"type": "float"})
    nearest = quantcli.run(recipe)
    cutting = changed(recipe, evaluate__perplexity__arithmetic="vllm-cpu")
    cut = quantcli.run(cutting)
    assert nearest.perplexity is not None
    assert cut.perplexity is not None
    assert cut.stages["reference"]["reused"]
    assert cut.stages["export"]["reused"]
    assert (nearest.perplexity["arithmetic"], cut.perplexity["arithmetic"]) == ("engine", "vllm-cpu")
    assert cut.perplexity["float_model"] == nearest.perplexity["float_model"]
    assert cut.perplexity["kl_divergence"] > nearest.perplexity["kl_divergence"] * 1.01
    checkpoint = {"path": str(Path(recipe["output"]) / "export" / "compressed-tensors")}
    alone = score_recipe(load_recipe({**cutting, "model": checkpoint, "quantize": {}}))
    assert alone["quantized"] == cut.perplexity["quantized"]
    assert alone["arithmetic"] == "vllm-cpu"


@pytest.mark.parametrize("quantize", [{}, {"kv_cache": {}}, {"attention": {}}])
def test_that_arithmetic_is_refused_without_an_fp8_cache(recipe: Recipe, quantize: dict[str, Any]) -> None:
    recipe = changed(recipe, quantize=quantize, evaluate__perplexity__arithmetic="vllm-cpu")
    recipe["export"] = {"formats": ["ascend"]}
    for command in (quantcli.plan, quantcli.run):
        with pytest.raises(RecipeError, match="arithmetic: vllm-cpu differs from engine in how an fp8 cache") as caught:
            command(recipe)
        assert "kv_cache: {type: float}" in caught.value.remedy
    assert not Path(recipe["output"]).exists()
    recipe = changed(recipe, evaluate__perplexity__arithmetic="engine")
    quantcli.run(recipe)
    checkpoint = {"path": str(Path(recipe["output"]) / "export" / "ascend")}
    cutting = changed(recipe, model=checkpoint, quantize={}, evaluate__perplexity__arithmetic="vllm-cpu")
    with pytest.raises(RecipeError, match="this model has none"):
        score_recipe(load_recipe(cutting))


@pytest.mark.parametrize(("kind", "form"), [("int", "ascend"), ("float", "compressed-tensors")])
def test_16_bit_weights_leave_everything_but_the_cache(recipe: Recipe, kind: str, form: str) -> None:
    recipe |= {
        "quantize": {"weights": {"bits": 16}, "kv_cache": {"type": kind}},
        "export": {"formats": [form]},
    }
    outcome = quantcli.run(recipe)
    assert outcome.plan.treatments == {}
    assert Store(Path(recipe["output"]) / "quantize").schemes == {}
    exported: dict[str, Tensor] = {}
    for file in (Path(recipe["output"]) / "export" / form).glob("*.safetensors"):
        exported |= load_file(file)
    original = load_file(Path(recipe["model"]["path"]) / "model.safetensors")
    assert {name for name, tensor in original.items() if torch.equal(exported[name], tensor)} == set(original)
    added = set(exported) - set(original)
    assert {name.partition(".self_attn.")[0] for name in added} == {f"model.layers.{index}" for index in range(3)}
    assert outcome.perplexity is not None
    assert 0 < outcome.perplexity["kl_divergence"] < 0.01


def test_attention_that_cannot_be_observed_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    model = save_tiny_model("falcon", tmp_path / "falcon", with_tokenizer=True)
    recipe = changed(recipe, quantize__kv_cache={}, model__path=str(model), export=None, evaluate=None)
    with pytest.raises(ModelError, match=r"transformer\.h\.0 .* cannot be observed") as caught:
        quantcli.run(recipe)
    assert "kv_cache" in caught.value.remedy
    quantcli.run(changed(recipe, quantize={"weights": {"bits": 8}}))


@pytest.mark.parametrize(("kind", "form"), [("int", "ascend"), ("float", "compressed-tensors")])
def test_a_cache_of_latents_is_refused_before_any_work(recipe: Recipe, kind: str, form: str, tmp_path: Path) -> None:
    model = save_tiny_model("deepseek-v3", tmp_path / "deepseek", with_tokenizer=True)
    quantize = {"weights": {"bits": 8}, "kv_cache": {"type": kind}}
    recipe = changed(recipe, quantize=quantize, model__path=str(model), export={"formats": [form]})
    for command in (quantcli.plan, quantcli.run):
        with pytest.raises(RecipeError, match=r"quantize\.kv_cache: DeepseekV3ForCausalLM caches latents"):
            command(recipe)
    assert not Path(recipe["output"]).exists()


def test_an_interrupted_run_ends_in_the_same_scales(recipe: Recipe, tree: Callable[[Path], dict[str, str]]) -> None:
    recipe = changed(recipe, quantize__kv_cache={}, export={"formats": ["ascend"]}, evaluate=None)
    other = changed(recipe, output=recipe["output"] + "-other")
    quantcli.run(recipe)
    for stage, number in (("calibrate", 2), ("quantize", 1)):
        with pytest.raises(Interrupted):
            quantcli.run(other, listener=interrupt(stage, number, "block"))
    quantcli.run(other)
    for stage in ("calibrate", "quantize", "export"):
        expected, found = (
            {k: v for k, v in tree(Path(r["output"]) / stage).items() if k != "stage.json"} for r in (recipe, other)
        )
        assert found == expected
