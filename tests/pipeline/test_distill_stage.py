"""Scales and norms tuned to the predictions of the float model, against plain backward passes over the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, opened, read
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from torch import Tensor

import quantcli
from quantcli.errors import RecipeError
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store
from quantcli.model.stream import BlockStream
from quantcli.pipeline.batches import batched
from quantcli.pipeline.distillation import Student, rates
from quantcli.pipeline.samples import calibration_samples
from quantcli.quant.straight_through import graded_linear
from quantcli.recipe.solver import DistillSection

Recipe = dict[str, Any]
GROUPS = {"weights": {"bits": 3, "granularity": "group", "group_size": 32}}
STATIC = {"activations": {"bits": 8, "scope": "tensor"}}
TOKEN = {"weights": {"bits": 4, "granularity": "group", "group_size": 32}, "activations": {"bits": 8, "scope": "token"}}
ASYMMETRIC = {"activations": {"bits": 8, "scope": "token", "symmetric": False}}


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return changed(
        static_recipe(tmp_path / "run"), model__sanity_check="off", model__dtype="float32", calibration__samples=80,
        calibration__sequence_length=32, quantize=GROUPS | {"distill": {}},
    )  # fmt: skip


def tuned(recipe: Recipe) -> dict[str, Tensor]:
    return load_file(Path(recipe["output"]) / "distill" / "tuned.safetensors")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "scheme", [GROUPS, STATIC, TOKEN, ASYMMETRIC], ids=["weights", "static", "token", "token, asymmetric"]
)
def test_gradients_are_those_of_the_whole_model(
    recipe: Recipe, tmp_path: Path, family: str, scheme: dict[str, Any]
) -> None:
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True)
    recipe = changed(
        recipe,
        model__path=str(model),
        calibration__samples=4,
        quantize=scheme | {"distill": {}},
        export=None,
        evaluate=None,
    )
    with opened(recipe, "quantize") as context:
        batches = batched(calibration_samples(context).samples)
        student = Student(context, BlockStream(context.skeleton(), batches), Store(context.folder("quantize")),
                          DistillSection())  # fmt: skip
        student.prepare()
        whole = float_model(model).requires_grad_(False)
        embedded = next(student.stream.start()).clone()
        for name, change in student.changes.items():
            change.data.copy_(torch.linspace(-0.01, 0.02, change.numel()).view(change.shape))
            assert name.endswith(("scale", "weight", "bias"))
        states = student.forward(0, embedded)
        wanted = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(0))
        with student.stream.head():
            target = torch.log_softmax(student.stream.head_logits(wanted, {}), -1).detach()
        loss = student.step(0, embedded, wanted)
        assert not embedded.requires_grad, "it is kept from step to step"
        found = {name: change.grad.clone() for name, change in student.changes.items() if change.grad is not None}

        changes = {name: change.detach().clone().requires_grad_() for name, change in student.changes.items()}
        student.changes = changes  # type: ignore[assignment]
        how = {}
        for name, scheme_of in student.store.schemes.items():
            stored = student.store.read(name)
            how[name] = lambda module, x, name=name, stored=stored, s=scheme_of: graded_linear(
                x, stored.weight, student.scale(name, stored), getattr(module, "bias", None),
                input_bits=None if s.activations == "none" else 8, input_symmetric=not s.token_zero_points,
                input_scale=student.input_scale(name, stored), input_zero_point=stored.input_zero_point,
            )  # fmt: skip
        own = {name: student.vector(name) for name in student.vectors}
        with simulated(whole, how):
            logits = torch.func.functional_call(whole, own, (batches[0],), {"use_cache": False}).logits.float()
        logq = torch.log_softmax(logits, -1)
        expected = (target.exp() * (target - logq)).sum(-1).mean()
        expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert len(found) >= 10
    for name, change in changes.items():
        gradient = torch.zeros_like(change) if change.grad is None else change.grad
        close = torch.allclose(found.get(name, torch.zeros_like(change)), gradient, rtol=1e-2, atol=1e-6)
        assert close, name


def test_float16_has_gradients_where_float32_has_them(recipe: Recipe, tmp_path: Path) -> None:
    """Of a step that is nearly at its end, whose gradients are small."""
    gradients = []
    for dtype in ("float32", "float16"):
        own = changed(recipe, model__dtype=dtype, export=None, evaluate=None, output=str(tmp_path / dtype))
        with opened(own, "quantize") as context:
            batches = batched(calibration_samples(context).samples)
            student = Student(context, BlockStream(context.skeleton(), batches), Store(context.folder("quantize")),
                              DistillSection())  # fmt: skip
            student.prepare()
            embedded = next(student.stream.start()).clone()
            left = student.forward(0, embedded)[-1]
            noise = torch.randn(left.shape, generator=torch.Generator().manual_seed(0)).to(left.dtype) / 100
            student.step(0, embedded, left + noise * left.abs().mean())
            gradients.append({name: change.grad for name, change in student.changes.items()})
    for name, exact in gradients[0].items():
        found = gradients[1][name]
        assert exact is not None
        assert found is not None
        assert float(((found == 0) & (exact != 0)).float().mean()) < 0.01, name
        assert float(torch.cosine_similarity(found.flatten(), exact.flatten(), 0)) > 0.5, name


def test_tuning_brings_predictions_closer_to_those_of_the_float_model(recipe: Recipe, tmp_path: Path) -> None:
    rough = changed(recipe, output=str(tmp_path / "rough"), quantize__distill=None)
    better = changed(recipe, quantize__distill={"passes": 8, "scale_rate": 0.005, "norm_rate": 0.005})
    before, after = quantcli.run(rough), quantcli.run(better)
    assert before.perplexity is not None
    assert after.perplexity is not None
    assert after.perplexity["kl_divergence"] < 0.9 * before.perplexity["kl_divergence"]
    facts = read(better, "distill", "distilled.json")
    assert facts["kl_after"] < facts["kl_before"]
    assert facts["scales"] == 21
    assert facts["vectors"] == 7  # two norms a block and the last one
    found = tuned(better)
    assert "model.norm.weight" in found
    one, other = (
        Path(each["output"]) / "export" / "compressed-tensors" / "model.safetensors" for each in (rough, better)
    )
    plain, changed_ = load_file(one), load_file(other)
    for name in plain:
        same = torch.equal(plain[name], changed_[name])
        assert same == (not name.endswith("_scale") and "norm" not in name), name


def test_a_run_and_its_verification_read_what_was_tuned(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__distill={"passes": 2, "scale_rate": 0.005})
    first = quantcli.run(recipe)
    again = quantcli.run(recipe)
    assert all(record["reused"] for record in again.stages.values())
    from quantcli.pipeline.verify import verify_path

    assert verify_path(Path(recipe["output"]))["compressed-tensors: linears"] == 21
    store = Store(Path(recipe["output"]) / "quantize", Path(recipe["output"]) / "distill" / "tuned.safetensors")
    name = next(iter(store.schemes))
    assert torch.equal(store.read(name).weight.scale, tuned(recipe)[f"{name}.scale"])
    assert first.stages["distill"]["files"].keys() == {"tuned.safetensors", "distilled.json"}


def test_tuned_scales_are_held_by_every_format(recipe: Recipe) -> None:
    recipe = changed(
        recipe,
        model__dtype="bfloat16",
        quantize__weights__bits=4,
        quantize__distill={"passes": 2, "scale_rate": 0.005},
        export={"formats": ["gptq", "awq", "compressed-tensors", "dense"]},
    )
    quantcli.run(recipe)
    output, found = Path(recipe["output"]), tuned(recipe)
    names = [name.removesuffix(".scale") for name in found if name.endswith(".scale")]
    assert len(names) == 21
    written = {form: load_file(next((output / "export" / form).glob("*.safetensors"))) for form in ("gptq", "awq")}
    for name in names:
        for tensors in written.values():
            assert torch.equal(tensors[f"{name}.scales"].t().float(), found[f"{name}.scale"].float())
    with opened(recipe, "distill") as context:
        batches = batched(calibration_samples(context).samples)
        student = Student(context, BlockStream(context.skeleton(), batches), Store(context.folder("quantize")),
                          DistillSection())  # fmt: skip
        student.prepare()
        for change in student.changes.values():
            change.data.fill_(-1 + 1e-6)
        smallest = min(float(scale.abs().min()) for scale in student.tuned()[0].values())
        assert smallest == 2**-17  # a smaller bfloat16 value need not be a float16 one


def test_fp8_linears_that_engines_join_keep_one_scale(recipe: Recipe) -> None:
    weights = {"type": "float", "granularity": "tensor"}
    recipe = changed(
        recipe, export=None, evaluate=None, quantize={"weights": weights, "distill": {"passes": 4, "scale_rate": 0.01}}
    )
    with opened(recipe, "distill") as context:
        store = Store(context.folder("quantize"))
    found = tuned(recipe)
    scales = [found[f"model.layers.0.self_attn.{short}_proj.scale"] for short in "qkvo"]
    assert scales[0] == scales[1] == scales[2] != scales[3]
    assert scales[0] != store.read("model.layers.0.self_attn.q_proj").weight.scale


def test_what_does_not_help_is_not_taken(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__distill={"scale_rate": 0.1, "norm_rate": 0.1}, quantize__weights__bits=8)
    quantcli.run(recipe)
    facts = read(recipe, "distill", "distilled.json")
    assert facts["kl_after"] >= facts["kl_before"]
    assert tuned(recipe) == {}
    lines = (Path(recipe["output"]) / "events.jsonl").read_text(encoding="utf-8")
    assert "Tuning does not help" in lines


def test_one_sample_is_too_few(recipe: Recipe) -> None:
    recipe = changed(recipe, calibration__samples=1, evaluate=None)
    quantcli.run(recipe)
    assert tuned(recipe) == {}
    assert "leaves none to" in (Path(recipe["output"]) / "events.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["mixtral", "opt", "qwen3"])
def test_other_families(recipe: Recipe, tmp_path: Path, family: str) -> None:
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True)
    quantcli.run(changed(recipe, model__path=str(model), quantize__distill={"passes": 2, "scale_rate": 0.003}))
    assert read(recipe, "distill", "distilled.json")["steps"] == 2


def test_refusals(recipe: Recipe) -> None:
    for values, text in (
        ({"calibration": None}, "learns from calibration text"),
        ({"quantize__distill": {"scale_rate": 0, "norm_rate": 0}}, "tunes nothing"),
        ({"quantize__weights": {"bits": 16}, "quantize__kv_cache": {}}, "none is quantized"),
    ):
        with pytest.raises(RecipeError, match=text):
            quantcli.plan(changed(recipe, **values))


def test_rates_rise_and_fall() -> None:
    found = list(rates(16))
    assert max(found) == found[1]
    assert found[1:] == sorted(found[1:], reverse=True)
    assert 0 < found[-1] < 0.02
