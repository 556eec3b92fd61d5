"""Mixed bits: what can choose between what, the errors that are measured, and the schemes that come of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened, read
from tiny_models import save_tiny_model
from torch import Tensor

import quantcli
from quantcli.errors import RecipeError
from quantcli.pipeline.allocation import allocation_of, patterns
from quantcli.pipeline.samples import calibration_samples
from quantcli.quant.grid import WeightGrid, dequantize
from quantcli.quant.search import mse
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]
BASE = {"bits": 4, "granularity": "group", "group_size": 64, "method": "mse", "importance": "second_moment"}


@pytest.fixture(scope="module")
def mixed_recipe(
    static_recipe: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Recipe]:
    """Four-bit weights in groups that divide every width, and six bits a weight to share out; of a float32 model."""
    model = save_tiny_model(
        "llama", tmp_path_factory.mktemp("model"), with_tokenizer=True, num_hidden_layers=3, intermediate_size=128
    )

    def recipe(output: Path) -> Recipe:
        quantize = {"weights": BASE, "target": {"bits_per_weight": 6}}
        return changed(static_recipe(output), model__path=str(model), quantize=quantize)

    return recipe


@pytest.fixture
def recipe(mixed_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return mixed_recipe(tmp_path / "run")


@pytest.fixture(scope="module")
def found(mixed_recipe: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Any]:
    """A whole run, and what came of it."""
    recipe = mixed_recipe(tmp_path_factory.mktemp("mixed") / "run")
    return recipe, quantcli.run(recipe)


def groups_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """First linear of a group → what found.json has of it."""
    return {group["linears"][0]: group for group in read(recipe, "allocate", "found.json")["groups"]}


# what is shared out


def test_the_default_candidates_are_what_one_engine_serves(recipe: Recipe) -> None:
    plan = quantcli.plan(recipe)
    (note,) = [note for note in plan.notes if note.startswith("After calibration")]
    assert "12 groups of linears gets one of W4A16 g64, W4A16 g32, W8A16 g64, float:" in note
    assert any("No serving engine loads W3A16 g64" in note for note in plan.notes)
    loads = {verdict.engine: verdict for verdict in plan.engines}
    assert loads["vLLM on a GPU"].loads
    assert loads["transformers"].loads
    assert not loads["vLLM on a CPU"].loads
    assert loads["vLLM on a CPU"].note.startswith("W8A16 g64: has no kernel")


def test_without_an_export_three_bits_are_a_candidate_too(recipe: Recipe) -> None:
    plan = quantcli.plan(changed(recipe, export=None, evaluate=None))
    assert any("float, W3A16 g64:" in note for note in plan.notes)


def test_a_format_narrows_the_default_candidates(recipe: Recipe) -> None:
    """AscendV1 holds 8 bits a channel and float, and groups of one size."""
    recipe = changed(recipe, export={"formats": ["ascend"]}, evaluate=None,
                     quantize={"weights": {"bits": 8}, "target": {"bits_per_weight": 10}})  # fmt: skip
    assert any("one of W8A16, W4A16, float:" in note for note in quantcli.plan(recipe).notes)


def test_a_format_of_one_scheme_leaves_float_beside_it(recipe: Recipe) -> None:
    recipe = changed(
        recipe, export={"formats": ["compressed-tensors", "gptq"]}, quantize__target={"bits_per_weight": 9}
    )
    plan = quantcli.plan(recipe)
    assert any("one of W4A16 g64, float:" in note for note in plan.notes)
    outcome = quantcli.run(recipe)
    assert {scheme.name for _, scheme in outcome.plan.schemes.values()} == {"W4A16 g64"}
    assert 1 < len(outcome.plan.kept) < 21
    named = {"bits_per_weight": 6, "candidates": [{"bits": 4}, {"bits": 8}]}
    with pytest.raises(RecipeError, match="candidates: gptq holds one scheme for all linears"):
        quantcli.plan(changed(recipe, quantize__target=named))


def test_static_activations_leave_8_bits_and_float(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize={"activations": {"bits": 8}, "target": {"bits_per_weight": 12}})
    assert any("one of W8A8 static, float:" in note for note in quantcli.plan(recipe).notes)
    outcome = quantcli.run(recipe)
    assert {scheme.name for _, scheme in outcome.plan.schemes.values()} == {"W8A8 static"}
    assert 1 < len(outcome.plan.kept) < 21


def test_static_ranges_of_the_quantized_model_are_tried_as_of_the_float_one(recipe: Recipe, tmp_path: Path) -> None:
    def errors(propagation: str) -> Any:
        activations = {"bits": 8, "scope": "tensor", "method": "histogram", "propagation": propagation}
        target = {"bits_per_weight": 12, "candidates": [{"bits": 8}, "float"]}
        own = changed(recipe, quantize={"activations": activations, "target": target})
        quantcli.run_stage("quantize", own | {"output": str(tmp_path / propagation)})
        return read(own | {"output": str(tmp_path / propagation)}, "allocate", "found.json")["groups"]

    assert errors("quantized") == errors("float")


def test_the_plan_knows_the_size(recipe: Recipe) -> None:
    plan = quantcli.plan(recipe)
    assert plan.bits_per_weight == pytest.approx(6, abs=1e-3)
    size = plan.size_after
    again = quantcli.plan(changed(recipe, quantize__target={"size": size / 1e9}))
    assert abs(again.size_after - size) <= 1
    assert again.estimate.tokens > quantcli.plan(changed(recipe, quantize__target=None)).estimate.tokens


def test_linears_that_the_recipe_names_have_no_choice(recipe: Recipe) -> None:
    recipe["quantize"] |= {
        "rollback": {"names": ["*.0.mlp.down_proj"]},
        "overrides": [{"match": "*.q_proj", "weights": {"bits": 8}}, {"match": "*.[kv]_proj", "weights": {"bits": 8}}],
    }
    loaded = load_recipe(recipe)
    structure = quantcli.plan(recipe).structure
    found = allocation_of(loaded, Path(recipe["model"]["path"]), structure)
    assert len(found.groups) == 12 - 1 - 3
    assert not [name for name in found.names if re.search(r"0\.mlp\.down_proj|[qkv]_proj", name)]
    outcome = quantcli.run(recipe)
    assert outcome.plan.schemes["model.layers.1.self_attn.q_proj"][1].name == "W8A16 g64"
    assert "model.layers.0.mlp.down_proj" in outcome.plan.kept


def test_siblings_may_part_where_the_recipe_lets_them(recipe: Recipe) -> None:
    recipe["quantize"]["rollback"] = {"siblings": "apart"}
    assert any("21 groups" in note for note in quantcli.plan(recipe).notes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"bits_per_weight": 4.1}, r"bits_per_weight: 4\.1 is out of reach: .* take 4\.5\d* to 32 bits a weight"),
        ({"bits_per_weight": 40}, r"bits_per_weight: 40 is out of reach"),
        ({"size": 0.000001}, r"size: 1e-06 is out of reach: .* GB\. Choose"),
        ({"bits_per_weight": 4.5, "candidates": [{"bits": 4}, {"group_size": 64}]}, "one scheme alone"),
    ],
)
def test_a_budget_that_leaves_no_choice_is_refused(recipe: Recipe, target: Recipe, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        quantcli.plan(changed(recipe, quantize__target=target))
    assert re.search(message, str(caught.value))


def test_a_format_in_which_all_candidates_are_alike_is_refused(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__target={"bits_per_weight": 5}, export={"formats": ["dense"]})
    with pytest.raises(RecipeError, match="all candidates take the same room in dense") as caught:
        quantcli.plan(recipe)
    assert "export.formats" in caught.value.remedy
    quantcli.plan(changed(recipe, export={"formats": ["compressed-tensors", "dense"]}))


def test_a_recipe_that_names_every_linear_is_refused(recipe: Recipe) -> None:
    recipe["quantize"]["overrides"] = [{"match": "*", "weights": {"bits": 8}}]
    with pytest.raises(RecipeError, match="no linear is left to choose a scheme for"):
        quantcli.plan(recipe)


def test_a_named_candidate_that_the_format_cannot_hold_is_refused(recipe: Recipe) -> None:
    target = {"bits_per_weight": 8, "candidates": [{"bits": 3}, {"bits": 8}]}
    recipe = changed(recipe, quantize={"weights": {"bits": 8}, "target": target}, evaluate=None)
    with pytest.raises(RecipeError, match="ascend cannot hold"):
        quantcli.plan(changed(recipe, export={"formats": ["ascend"]}))


def test_patterns_match_the_names_and_no_others() -> None:
    every = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(12) for kind in ("up", "down")] + ["lm_head"]
    wanted = [every[0], every[2], every[21], "lm_head"]
    found = patterns(wanted)
    assert found == ["lm_head", r"re:model\.layers\.(0|1)\.mlp\.up_proj", every[21]]
    for name in every:
        matching = [p for p in found if p == name or (p.startswith("re:") and re.fullmatch(p[3:], name))]
        assert bool(matching) == (name in wanted)


# what is measured


def test_errors_are_those_of_the_block_with_one_group_quantized(found: tuple[Recipe, Any]) -> None:
    """One block by hand: second moments, codes, the block's output and its distance from the float one."""
    recipe, _ = found
    model = float_model(Path(recipe["model"]["path"]))
    with opened(recipe, "calibrate") as context:
        (samples,) = torch.tensor(calibration_samples(context).samples)[None]
    layer = model.model.layers[1]
    inputs: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, _name=name: inputs.update({_name: args[0]}))
        for name in ("self_attn.o_proj", "mlp.gate_proj")
    ]
    hooks.append(layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)))
    with torch.inference_mode():
        model(samples)
        moments = {name: entered.flatten(0, 1).square().mean(0) for name, entered in inputs.items()}
        for names in (("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj")):
            for bits, size in ((4, 64), (4, 32), (8, 64)):
                kept = {name: layer.get_submodule(name).weight.data.clone() for name in names}
                for name, weight in kept.items():
                    grid = WeightGrid(bits, granularity="group", group_size=size)
                    layer.get_submodule(name).weight.data = dequantize(mse(weight, grid, moments[names[0]]))
                model(samples)
                for name, weight in kept.items():
                    layer.get_submodule(name).weight.data = weight
                lost = (outputs[-1] - outputs[0]).square().sum(-1) / outputs[0].square().sum(-1)
                errors = groups_of(recipe)[f"model.layers.1.{names[0]}"]["errors"]
                assert errors[f"W{bits}A16 g{size}"] == pytest.approx(float(lost.mean()), rel=2e-3)
    for hook in hooks:
        hook.remove()


def test_more_bits_err_less(found: tuple[Recipe, Any]) -> None:
    for group in groups_of(found[0]).values():
        errors, bits = group["errors"], group["bits"]
        assert errors["W4A16 g64"] > errors["W4A16 g32"] > errors["W8A16 g64"] > errors["float"] == 0
        assert 4 < bits["W4A16 g64"] < bits["W4A16 g32"] < 8 < bits["W8A16 g64"] < bits["float"] == 32


# what is chosen


def test_the_export_keeps_the_budget_and_groups_of_one_scheme(found: tuple[Recipe, Any]) -> None:
    recipe, outcome = found
    content = read(recipe, "allocate", "found.json")
    assert 5.5 < content["bits_per_weight"] <= 6
    assert content["size"] == outcome.plan.size_after <= quantcli.plan(recipe).size_after
    assert sum(content["linears"].values()) == 21
    assert len(content["linears"]) > 1
    chosen = {name: group["scheme"] for group in content["groups"] for name in group["linears"]}
    schemes = {name: scheme.name for name, (_, scheme) in outcome.plan.schemes.items()}
    assert {name: schemes.get(name, "float") for name in chosen} == chosen
    for block in outcome.plan.structure.blocks:
        for group in block.fused:
            assert len({chosen[name] for name in group}) == 1
    assert outcome.to_json()["allocation"]["linears"] == content["linears"]


def test_no_exchange_of_two_groups_errs_less(found: tuple[Recipe, Any]) -> None:
    """Bits taken from one group and given to another never lessen the sum of errors within the budget."""
    groups = list(groups_of(found[0]).values())
    linears = {linear.name: linear.weights for linear in found[1].plan.structure.linears()}
    sizes = [sum(linears[name] for name in group["linears"]) for group in groups]
    room = 6 * sum(sizes) - sum(g["bits"][g["scheme"]] * n for g, n in zip(groups, sizes, strict=True))
    for a, n in zip(groups, sizes, strict=True):
        for b, m in zip(groups, sizes, strict=True):
            for one in a["errors"]:
                for other in b["errors"] if a is not b else ():
                    less = a["errors"][a["scheme"]] - a["errors"][one] + b["errors"][b["scheme"]] - b["errors"][other]
                    more = (a["bits"][one] - a["bits"][a["scheme"]]) * n + (
                        b["bits"][other] - b["bits"][b["scheme"]]
                    ) * m
                    assert less <= 1e-9 or more > room


def test_it_is_nearer_to_the_float_model_than_the_base_scheme(found: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, outcome = found
    plain = quantcli.run({**changed(recipe, quantize__target=None), "output": str(tmp_path / "plain")})
    assert plain.perplexity is not None
    assert outcome.perplexity["kl_divergence"] < plain.perplexity["kl_divergence"]


def test_the_same_as_a_plain_recipe(found: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, outcome = found
    file = Path(recipe["output"]) / "allocate" / "recipe.yaml"
    assert quantcli.plan(file).treatments == outcome.plan.treatments
    again = quantcli.run(file, output=str(tmp_path / "again"))
    assert again.stages["export"]["files"] == outcome.stages["export"]["files"]
    assert again.to_json()["allocation"] is None


def test_what_is_up_to_date_is_not_tried_again(found: tuple[Recipe, Any]) -> None:
    recipe, outcome = found
    again = quantcli.run(recipe)
    assert all(record["reused"] for record in again.stages.values())
    assert again.plan.linears == outcome.plan.linears
    measured = quantcli.run(changed(recipe, evaluate__perplexity__windows=2))
    assert [name for name, record in measured.stages.items() if not record["reused"]] == ["reference", "eval-ppl"]
    assert measured.plan.treatments == outcome.plan.treatments
    file = Path(recipe["output"]) / "allocate" / "recipe.yaml"
    plain = load_recipe(file)
    assert plain.evaluate == load_recipe(changed(recipe, evaluate__perplexity__windows=2)).evaluate
    assert quantcli.plan(file).treatments == outcome.plan.treatments


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_trial_goes_on(recipe: Recipe, found: tuple[Recipe, Any], number: int) -> None:
    with pytest.raises(Interrupted):
        quantcli.run_stage("allocate", recipe, listener=interrupt("allocate", number, "block"))
    events: list[dict[str, Any]] = []
    quantcli.run_stage("allocate", recipe, listener=events.append)
    blocks = [event["index"] for event in events if event["event"] == "block" and event["stage"] == "allocate"]
    assert blocks == list(range(number, 3))
    assert read(recipe, "allocate", "found.json") == read(found[0], "allocate", "found.json")
    assert not (Path(recipe["output"]) / "allocate" / "hidden").exists()


@pytest.mark.parametrize("method", ["minmax", "gptq"])
def test_other_methods_take_what_was_chosen(recipe: Recipe, method: str) -> None:
    """GPTQ tries with data-weighted mse; every method quantizes and exports several schemes."""
    weights = {**BASE, "method": method, "importance": "none"}
    outcome = quantcli.run(changed(recipe, quantize__weights=weights))
    schemes = {scheme.name for _, scheme in outcome.plan.schemes.values()}
    assert len(schemes) > 1
    assert {treatment.weights.method for treatment in outcome.plan.treatments.values()} == {method}


def test_gptq_is_tried_as_data_weighted_mse(recipe: Recipe, found: tuple[Recipe, Any]) -> None:
    weights = {**BASE, "method": "gptq", "importance": "none"}
    quantcli.run_stage("allocate", changed(recipe, quantize__weights=weights))
    assert {name: g["errors"] for name, g in groups_of(recipe).items()} == {
        name: g["errors"] for name, g in groups_of(found[0]).items()
    }


def test_a_size_is_kept(recipe: Recipe) -> None:
    size = quantcli.plan(recipe).size_after
    outcome = quantcli.run(changed(recipe, quantize__target={"size": size / 1e9}))
    weights = sum(file.stat().st_size for file in Path(outcome.to_json()["exports"][0]).glob("*.safetensors"))
    assert outcome.plan.size_after <= size
    assert weights == pytest.approx(outcome.plan.size_after, rel=0.05)


def test_all_experts_of_a_layer_get_one_scheme(tmp_path: Path, prose: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model("mixtral", model, with_tokenizer=True)
    recipe = {
        "model": {"path": str(model), "sanity_check": "off"},
        "calibration": {"dataset": "text", "path": str(prose), "samples": 4, "sequence_length": 32},
        "quantize": {"weights": {**BASE, "group_size": 32}, "target": {"bits_per_weight": 6}},
        "output": str(tmp_path / "run"),
    }
    outcome = quantcli.run(recipe)
    assert len({scheme.name for _, scheme in outcome.plan.schemes.values()}) > 1
    for block in outcome.plan.structure.blocks:
        for experts in block.experts:
            assert len({outcome.plan.treatments.get(name) for name in experts.names}) == 1
    assert json.loads((tmp_path / "run" / "allocate" / "found.json").read_text())["bits_per_weight"] <= 6


def test_without_the_section_there_is_nothing_to_allocate(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"nothing for stage allocate\. It would need quantize\.target"):
        quantcli.run_stage("allocate", changed(recipe, quantize__target=None))
