"""Gradients of outputs, against plain backward passes over the whole model, and runs that round under them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, interrupt, opened
from tiny_models import save_tiny_model
from torch import Tensor

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.pipeline import curvature
from quantcli.pipeline.batches import batched
from quantcli.pipeline.curvature import OutputMoments, mixed_linears, read_outputs
from quantcli.pipeline.samples import calibration_samples, spread

Recipe = dict[str, Any]
GROUPS = {"bits": 3, "granularity": "group", "group_size": 32, "method": "gptq"}


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return changed(
        static_recipe(tmp_path / "run"), model__sanity_check="off", model__dtype="float32", calibration__samples=12,
        calibration__sequence_length=32, quantize={"weights": GROUPS, "gptq": {"output_samples": 8}},
        export=None, evaluate=None,
    )  # fmt: skip


def whole_model(model: Path, batches: list[Tensor], seed: int, names: list[str]) -> dict[str, Tensor]:
    """G of each linear: all weights in memory, one backward pass a batch, tokens drawn sample by sample."""
    from transformers import AutoModelForCausalLM

    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        float_model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, _name=name: output.register_hook(seen[_name].append) and None
        )
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        logp = torch.log_softmax(float_model(input_ids=batch, use_cache=False).logits, -1)
        drawn = torch.rand(batch.numel(), 1, generator=generator)
        sums = logp.detach().exp().flatten(0, 1).cumsum(-1)
        label = (sums < drawn * sums[:, -1:]).sum(-1, keepdim=True)
        (-logp.flatten(0, 1).gather(1, label).sum()).backward()
    found = {}
    for name, gradients in seen.items():
        moment = torch.zeros(())
        for gradient, batch in zip(gradients, batches, strict=True):
            g = gradient.reshape(*batch.shape, -1)
            energy = g.square().sum(-1, keepdim=True)
            g = (g * (30 * energy.median() / energy).clamp(max=1).sqrt()).flatten(0, 1)
            moment = moment + g.t() @ g
        found[name] = moment / sum(len(batch) for batch in batches)
    return found


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt", "gemma2", "phi3"])
def test_moments_are_those_of_the_whole_model(recipe: Recipe, tmp_path: Path, family: str) -> None:
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True)
    recipe = changed(recipe, model__path=str(model), quantize__weights__bits=4)
    with opened(recipe, "curvature") as context:
        names = mixed_linears(context)
        batches = batched(spread(calibration_samples(context).samples, 8))
        found = {name: read_outputs(context, name) for name in names}
    assert len(names) == len([name for name, index in context.linear_blocks.items() if index < context.blocks])
    for name, wanted in whole_model(model, batches, recipe["calibration"].get("seed", 0), names).items():
        own = found[name]
        assert own is not None
        assert own.shape == (1, *wanted.shape)
        torch.testing.assert_close(own[0].diagonal(), wanted.diagonal(), rtol=2e-3, atol=1e-6 * float(wanted.max()))
        off = ~torch.eye(len(wanted), dtype=torch.bool)
        share = float((own[0][off] * wanted[off]).sum() / wanted[off].square().sum())
        assert 0 <= share <= 1 + 1e-3
        torch.testing.assert_close(
            own[0][off], share * wanted[off], rtol=5e-3, atol=2e-3 * float(wanted.diagonal().max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_go_to_the_halves_in_turn_however_they_are_batched(dtype: torch.dtype) -> None:
    gradients = torch.randn(6, 40, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = OutputMoments(12, "cpu")
    for batch in gradients.split([3, 1, 2]):
        found.update(batch)
    assert found.samples == 6
    for half, own in zip(found.halves, (gradients[0::2], gradients[1::2]), strict=True):
        wanted = own.double().flatten(0, 1)
        rounding = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(half[0].double(), wanted.t() @ wanted, rtol=rounding, atol=rounding * 120)


def test_chance_is_taken_out() -> None:
    """Of outputs that are nothing to each other nothing is kept; of those that are one, all."""
    generator = torch.Generator().manual_seed(0)
    for mixed, least, most in ((False, 0.0, 0.2), (True, 0.95, 1.0)):
        moments = OutputMoments(32, "cpu")
        for _ in range(8):
            gradients = torch.randn(1, 40, 32, generator=generator)
            moments.update(gradients.cumsum(-1) if mixed else gradients)
        correlation, second_moment, share = moments.shrunk()
        assert least <= share <= most
        assert torch.equal(correlation[0].diagonal(), torch.ones(32, dtype=torch.float16))
        assert correlation.abs().max() <= 1
        assert bool((second_moment > 0).all())


def test_a_wide_linear_is_taken_in_parts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = changed(recipe, output=recipe["output"] + "-whole"), recipe
    with opened(whole, "curvature") as context:
        names = mixed_linears(context)
        wanted = {name: read_outputs(context, name) for name in names}
    monkeypatch.setattr(curvature, "MOST_OUTPUTS", 24)
    with opened(parted, "quantize") as context:
        for name in names:
            found, one = read_outputs(context, name), wanted[name]
            assert found is not None
            assert one is not None
            parts, size, _ = found.shape
            assert size <= 24
            assert parts * size == one.shape[1]
            torch.testing.assert_close(found.diagonal(dim1=1, dim2=2).flatten(), one[0].diagonal())


@pytest.mark.parametrize("scheme", [{}, {"symmetric": False}, {"granularity": "channel", "group_size": None}])
def test_runs_round_under_it(recipe: Recipe, scheme: dict[str, Any]) -> None:
    events: list[dict[str, Any]] = []
    recipe = changed(recipe, quantize__weights={**GROUPS, **scheme}, export={}, quantize__gptq__asymmetric=True)
    result = quantcli.run(recipe, listener=events.append)
    assert {"curvature", "quantize", "verify"} <= result.stages.keys()
    linears = [event for event in events if event["event"] == "linear"]
    assert linears
    assert all(0 <= event["outputs"] < 1 for event in linears)
    assert any(event["outputs"] > 0 for event in linears)
    assert not [*Path(recipe["output"]).glob("curvature/*/*")]  # hidden states are gone
    again = quantcli.run(recipe)
    assert again.stages["curvature"]["reused"]
    more = quantcli.run(changed(recipe, quantize__gptq__output_samples=4))
    assert not more.stages["curvature"]["reused"]
    assert not more.stages["quantize"]["reused"]


@pytest.mark.parametrize("moment", [1, 3, 4])
def test_a_run_that_stopped_there_ends_in_the_same_bytes(recipe: Recipe, moment: int) -> None:
    recipe = changed(recipe, model__cache_memory="4KiB")  # hidden states in mapped files
    whole = changed(recipe, output=recipe["output"] + "-whole")
    wanted = quantcli.run(whole)
    with pytest.raises(Interrupted):
        quantcli.run(recipe, listener=interrupt("curvature", moment, "block"))
    found = quantcli.run(recipe)
    for stage in ("curvature", "quantize"):
        assert found.stages[stage]["files"] == wanted.stages[stage]["files"]
    assert not [*Path(recipe["output"]).glob("curvature/*/*")]


def test_gradients_that_are_not_finite_are_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "sampled_gradients", lambda _stream, hidden, _generator: hidden * torch.inf)
    with pytest.raises(ModelError, match=r"model\.layers\.\d+\.\S+: gradients of its outputs are not finite"):
        quantcli.run(recipe)


def test_experts_are_solved_without(recipe: Recipe, tmp_path: Path) -> None:
    model = save_tiny_model("mixtral", tmp_path / "model", with_tokenizer=True)
    recipe = changed(recipe, model__path=str(model), calibration__expert_tokens=1, quantize__weights__bits=4)
    with opened(recipe, "quantize") as context:
        mixed = mixed_linears(context)
        assert mixed
        assert not set(mixed) & set(context.expert_inputs)
        assert all(read_outputs(context, name) is None for name in context.expert_inputs)


def test_it_is_refused_where_nothing_is_solved(recipe: Recipe) -> None:
    for method in ("mse", "signround"):
        with pytest.raises(RecipeError, match=r"quantize\.gptq\.output_samples"):
            quantcli.run(changed(recipe, quantize__weights__method=method))
