"""Norms and biases of blocks tuned beside the roundings: what is found, and that all that comes behind has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch import Tensor

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store
from quantcli.model.stream import BlockStream
from quantcli.pipeline.batches import batched
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.distillation import Student
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.treatment import replacement
from quantcli.pipeline.tuned import finished_checkpoint, tuned_vectors
from quantcli.pipeline.verify import verify_path
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]
Tree = Mapping[str, str]
GROUPS = {"bits": 3, "granularity": "group", "group_size": 32, "method": "signround"}
TOKEN = {"bits": 8, "scope": "token"}
FAMILIES = ["llama-tied", "qwen2", "qwen3", "gemma2", "opt", "gpt2", "mixtral"]
"""A tied head, biases of linears, q and k norms, norms of 1 + w, norms with biases, transposed linears, experts."""


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return changed(
        static_recipe(tmp_path / "run"), model__sanity_check="off", calibration__samples=16,
        calibration__sequence_length=64, quantize={"weights": GROUPS, "signround": {"norm_rate": 0.002}},
        evaluate=None, export={"formats": ["compressed-tensors"]},
    )  # fmt: skip


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    lines = (Path(recipe["output"]) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stored(recipe: Recipe) -> dict[str, Tensor]:
    """All tensors of the store."""
    files = sorted((Path(recipe["output"]) / "quantize").glob("block-*"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def written(recipe: Recipe, form: str = "compressed-tensors") -> dict[str, Tensor]:
    return load_file(next((Path(recipe["output"]) / "export" / form).glob("*.safetensors")))


def tuned(recipe: Recipe) -> dict[str, Tensor]:
    """What the store has of norms and biases."""
    found = stored(recipe)
    return {name: found[name] for name in found if name.endswith((".weight", ".bias"))}


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_have_what_was_tuned(recipe: Recipe, tmp_path: Path, family: str) -> None:
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True)
    form = "dense" if family == "gpt2" else "compressed-tensors"
    recipe = changed(recipe, model__path=str(model), export={"formats": [form]})
    quantcli.run(recipe)
    vectors, plain, found = tuned(recipe), load_file(model / "model.safetensors"), written(recipe, form)
    linears = {event["module"] for event in events(recipe, "linear")}
    inside = {name for name, value in plain.items() if value.ndim == 1 and (".0." in name or ".1." in name)}
    assert vectors.keys() == inside
    for name, value in plain.items():
        if name in vectors:
            assert torch.equal(found[name], vectors[name].to(value.dtype))
            assert not torch.equal(found[name], value), name
            assert torch.allclose(found[name], value, atol=0.021 * float(value.abs().max()))
        elif name.removesuffix(".weight") not in linears:
            assert torch.equal(found[name], value), name
    assert {event["tuned_vectors"] for event in events(recipe, "linear") if "tuned_to" in event} == {len(inside) // 2}
    assert not [event for event in events(recipe, "linear") if ".experts." in event["module"] and "tuned_to" in event]
    assert verify_path(Path(recipe["output"]))[f"{form}: linears"] == len(linears)


@pytest.mark.parametrize("activations", [{}, TOKEN], ids=["weights", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_blocks_are_judged_as_they_are_written(
    recipe: Recipe, tmp_path: Path, family: str, activations: Recipe
) -> None:
    """What each puts out with its norms, biases and linears as stored, behind those before it, on the batch that is
    kept apart, against the float model."""
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True)
    recipe = changed(recipe, model__path=str(model), export=None, quantize__activations=activations)
    if family == "mixtral":  # all experts compute all tokens: one that goes elsewhere for a rounding tells nothing
        save_tiny_model("mixtral", tmp_path / "all", with_tokenizer=True, num_experts_per_tok=4)
        recipe = changed(recipe, model__path=str(tmp_path / "all"))
    with opened(recipe, "quantize") as context:
        store, plain = Store(context.folder("quantize")), float_model(context.model)
        batches = batched(calibration_samples(context).samples)
        blocks = context.plan.structure.blocks
    other = float_model(context.model)
    for name, vector in tuned(recipe).items():
        other.get_parameter(name).data = vector
    replaced = {name: replacement(store.read(name), scheme, torch.float32, "cpu", "decode")
                for name, scheme in store.schemes.items()}  # fmt: skip
    apart = batches[0].tensor_split(2)[0] if len(batches) == 1 else batches[0]
    states: list[list[tuple[Tensor, Tensor]]] = []
    for each in (plain, other):
        own: list[tuple[Tensor, Tensor]] = []
        states.append(own)
        for block in blocks:
            each.get_submodule(block.name).register_forward_hook(
                lambda _module, args, output, own=own: own.append(
                    (args[0], output[0] if isinstance(output, tuple) else output)
                )
            )
    layers = [layer for block in blocks for layer in block.experts]
    with torch.inference_mode():
        plain(apart, use_cache=False)
        with simulated(other, replaced, layers):
            other(apart, use_cache=False)
    for index, block in enumerate(blocks):
        exact, (entered, found) = states[0][index][1], states[1][index]
        added = (exact - entered).square().sum(-1)
        shares = 1 / (added + 4 * added.median())
        error = float(((found - exact).square().sum(-1) * shares).sum() / (added * shares).sum())
        own_events = [event for event in events(recipe, "linear") if event["module"].startswith(f"{block.name}.")]
        judged = [event["tuned_to"] for event in own_events if "tuned_to" in event]
        assert judged == pytest.approx([error] * len(judged), rel=0.02)
        assert judged[0] < own_events[0]["tuned_from"]


def test_a_norm_makes_good_what_no_rounding_does(recipe: Recipe, tmp_path: Path) -> None:
    """What gate_proj and up_proj read has channels of which each is rounded to a fixed share of itself: their norm
    alone can undo that, since the linear that learns is behind the product of both."""
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].zero_()
        for short in ("gate", "up"):
            weight = tensors[f"model.layers.{layer}.mlp.{short}_proj.weight"]
            # codes 7, which is exact, and 4 in the place of 3.6
            share = torch.where(torch.arange(weight.shape[1]) % 2 == 0, 1.0, 3.6 / 7)
            weight.copy_(weight.sign() * share * 0.1)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    errors = []
    for rate in (0.0, 0.02):
        own = changed(
            recipe, model__path=str(model), export=None, output=f"{recipe['output']}-{rate}",
            quantize={
                "weights": {"bits": 4, "granularity": "channel", "method": "minmax", "full_range": False},
                "overrides": [{"match": "*.down_proj", "weights": {"bits": 8, "method": "signround"}}],
                "signround": {"norm_rate": rate},
            },
        )  # fmt: skip
        quantcli.run(own)
        (first, _) = [event for event in events(own, "linear") if "tuned_to" in event]
        errors.append((first["tuned_from"], first["tuned_to"]))
    assert errors[0][0] == errors[1][0], "where they start"
    assert errors[1][1] < 0.2 * errors[0][1]


def test_of_no_rate_nothing_is_left_in_the_store(recipe: Recipe, tmp_path: Path) -> None:
    plain = changed(recipe, quantize__signround={"norm_rate": 0.0}, output=str(tmp_path / "plain"))
    quantcli.run(plain)
    assert tuned(plain) == {}
    assert not [event for event in events(plain, "linear") if "tuned_vectors" in event]
    model = load_file(Path(plain["model"]["path"]) / "model.safetensors")
    assert all(torch.equal(written(plain)[name], value) for name, value in model.items() if value.ndim == 1)
    with opened(plain, "quantize") as context:
        assert finished_checkpoint(context.recipe, context.checkpoint, context.run.path) is context.checkpoint


def test_an_interrupted_stage_ends_in_the_same_bytes(recipe: Recipe, tree: Callable[[Path], Tree]) -> None:
    """While a block is at work, and between its file and its hidden states."""
    quantcli.run(recipe)
    again = changed(recipe, output=f"{recipe['output']}-again")
    for kind, number in (("linear", 3), ("block", 1), ("linear", 1)):
        with pytest.raises(Interrupted):
            quantcli.run(again, listener=interrupt("quantize", number, kind))
    quantcli.run(again)
    for part in ("quantize", "export"):
        one, other = (
            {name: digest for name, digest in tree(Path(each["output"]) / part).items() if name != "stage.json"}
            for each in (recipe, again)
        )
        assert one == other
    assert len(tuned(again)) == 6


def test_smoothing_comes_before_and_distillation_behind(recipe: Recipe, tmp_path: Path) -> None:
    """Tuned norms are those of the smoothed model; what distillation finds starts from them and takes their place."""
    model = save_tiny_model("qwen2", tmp_path / "model", with_tokenizer=True)
    recipe = changed(
        recipe, model__path=str(model), calibration__samples=80, calibration__sequence_length=32,
        smooth={"method": "smoothquant", "alpha": 0.5}, quantize__activations=TOKEN,
    )  # fmt: skip
    kinds: dict[str, Recipe] = {
        "scales": {"norm_rate": 0, "scale_rate": 0.005, "passes": 2},
        "both": {"norm_rate": 0.003, "scale_rate": 0.005, "passes": 4},
        "no help": {"norm_rate": 0.1, "scale_rate": 0.1},
    }
    starts = set()
    for kind, section in kinds.items():
        own = changed(recipe, output=f"{recipe['output']}-{kind}", quantize__distill=section)
        quantcli.run(own)
        vectors, found = tuned(own), written(own)
        distilled = load_file(Path(own["output"]) / "distill" / "tuned.safetensors")
        facts = read(own, "distill", "distilled.json")
        starts.add(facts["kl_before"])
        assert len(vectors) == 10, "two norms and three biases a block"
        over = {name for name in distilled if name in found}
        assert over == (vectors.keys() | {"model.norm.weight"} if kind == "both" else set())
        assert bool(distilled) == (kind != "no help")
        for name, vector in vectors.items():
            assert torch.equal(found[name], distilled.get(name, vector)), name
            assert not torch.equal(found[name], vector) or kind != "both"
        assert verify_path(Path(own["output"]))["compressed-tensors: linears"] == 14
    assert len(starts) == 1
    with opened(changed(recipe, quantize__distill=kinds["scales"]), "quantize") as context:
        section_of = context.recipe.quantize.distill
        assert section_of is not None
        batches = batched(calibration_samples(context).samples)
        store = Store(context.folder("quantize"))
        student = Student(context, BlockStream(context.skeleton(), batches), store, section_of)
        student.prepare()
        found = tuned_vectors(context.recipe, context.checkpoint, context.run.path)
        assert found.keys() == student.vectors.keys()
        assert all(torch.equal(student.vector(name), vector) for name, vector in found.items())
        smoothed = context.checkpoint.read(found)
        for name, vector in found.items():
            assert torch.allclose(vector, smoothed[name], atol=0.021 * float(smoothed[name].abs().max())), name


def test_other_formats_and_conversions_hold_them(recipe: Recipe, tmp_path: Path) -> None:
    model = save_tiny_model("qwen2", tmp_path / "model", with_tokenizer=True)
    recipe = changed(
        recipe, model__path=str(model), quantize__weights__bits=4,
        export={"formats": ["compressed-tensors", "gptq", "awq", "dense"]},
    )  # fmt: skip
    quantcli.run(recipe)
    convert_checkpoint(Path(recipe["output"]) / "export" / "compressed-tensors", "gptq", tmp_path / "other")
    vectors = tuned(recipe)
    every = [written(recipe, form) for form in ("compressed-tensors", "gptq", "awq", "dense")]
    for tensors in (*every, load_file(tmp_path / "other" / "model.safetensors")):
        assert all(torch.equal(tensors[name].float(), vector) for name, vector in vectors.items())


def test_biases_reach_the_sums_of_static_inputs(recipe: Recipe, tmp_path: Path) -> None:
    """The ascend format has quant_bias = round(bias / deq_scale − offset Σ codes)."""
    model = save_tiny_model("qwen2", tmp_path / "model", with_tokenizer=True)
    recipe = changed(
        recipe, model__path=str(model), quantize__activations={"bits": 8, "scope": "tensor"},
        quantize__weights={"bits": 8, "method": "signround"}, export={"formats": ["ascend"]},
    )  # fmt: skip
    quantcli.run(recipe)
    name = "model.layers.0.self_attn.q_proj"
    vectors, found = tuned(recipe), written(recipe, "ascend")
    codes, deq_scale = found[f"{name}.weight"].double(), found[f"{name}.deq_scale"].to(torch.int32).view(torch.float32)
    sums = float(found[f"{name}.input_offset"]) * codes.sum(1)
    expected = torch.round((vectors[f"{name}.bias"] / deq_scale).double() - sums)
    assert torch.equal(found[f"{name}.quant_bias"].double(), expected)


def test_biases_that_a_shift_added_are_tuned_too(recipe: Recipe) -> None:
    """Engines of the ascend format add those of norms and of static linears, where the architecture has none."""
    recipe = changed(
        recipe, quantize__activations={"bits": 8, "scope": "tensor"}, smooth={"method": "smoothquant", "shift": True},
        quantize__weights={"bits": 8, "method": "signround"}, export={"formats": ["ascend"]},
    )  # fmt: skip
    quantcli.run(recipe)
    vectors, found = tuned(recipe), written(recipe, "ascend")
    added = [name for name in vectors if name.endswith("layernorm.bias")]
    assert added
    assert all(torch.equal(found[name], vectors[name]) for name in added)
    verify_path(Path(recipe["output"]))


def test_half_precision_tunes_what_it_holds(recipe: Recipe) -> None:
    """Norms are judged rounded to the dtype of the model, and stored so."""
    for dtype in ("bfloat16", "float16"):
        own = changed(recipe, model__dtype=dtype, output=f"{recipe['output']}-{dtype}")
        quantcli.run(own)
        for name, vector in tuned(own).items():
            held = vector.to(getattr(torch, dtype))
            assert torch.equal(held.float(), vector)
            assert torch.equal(written(own)[name], held)


def test_a_norm_of_another_model_in_the_store_is_refused(recipe: Recipe) -> None:
    quantcli.run(recipe)
    file = Path(recipe["output"]) / "quantize" / "block-00000.safetensors"
    name = "model.layers.0.input_layernorm.weight"
    save_file(load_file(file) | {name: torch.ones(63)}, file)
    with pytest.raises(ModelError, match=rf"{name} has shape \(63,\), not that of the model.*stage quantize"):
        verify_path(Path(recipe["output"]))


def test_refusals(recipe: Recipe) -> None:
    for values, text in (
        ({"quantize__weights__method": "gptq"}, r"signround\.norm_rate.*no weights of method signround"),
        ({"quantize__signround": {"norm_rate": 0.2}}, r"signround\.norm_rate.*0\.1"),
        ({"quantize__signround": {"norm_rate": -0.1}}, r"signround\.norm_rate"),
    ):
        with pytest.raises(RecipeError, match=text):
            load_recipe(changed(recipe, **values))
