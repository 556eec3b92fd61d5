"""Experts by GPTQ, against experts that are solved one after the other by hand, on the tokens that a whole model in
which all before them is quantized routes to each."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import quantcli
from quantcli.errors import ModelError
from quantcli.evaluation.simulate import forward_of, simulated
from quantcli.formats.store import Store
from quantcli.model.structure import Experts
from quantcli.pipeline import solve
from quantcli.pipeline.batches import batched
from quantcli.pipeline.estimate import SOLVING_MATRICES
from quantcli.pipeline.experts import RoutedTokens
from quantcli.pipeline.result import MissedGate
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.treatment import replacement, weight_grid
from quantcli.pipeline.verify import verify_path
from quantcli.quant.gptq import factored
from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.refine import output_error
from quantcli.quant.search import mse
from quantcli.quant.shrinkage import shrunk
from quantcli.quant.solver import solved

Recipe = dict[str, Any]
Tree = Mapping[str, str]
RecipeOf = Callable[..., Recipe]
GROUPS = {"bits": 4, "granularity": "group", "group_size": 32, "method": "gptq"}
FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(family: str, dtype: torch.dtype) -> Path:
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp(family) / "model"
            made[family, dtype] = save_tiny_model(family, directory, with_tokenizer=True, dtype=dtype)
        return made[family, dtype]

    return get


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words in random order, so that all experts are chosen often."""
    file, generator = tmp_path_factory.mktemp("text") / "text.txt", random.Random(0)
    file.write_text(" ".join("".join(generator.choices("abcdefghij", k=5)) for _ in range(400)), encoding="utf-8")
    return file


@pytest.fixture
def recipe_of(
    model_of: Callable[[str, torch.dtype], Path],
    static_recipe: Callable[[Path], Recipe],
    text: Path,
    tmp_path: Path,
) -> RecipeOf:
    """4-bit weights in groups by GPTQ, without evaluation; an expert of few tokens is solved, too."""

    def recipe(family: str, name: str = "run", dtype: torch.dtype = torch.float32, **values: Any) -> Recipe:
        plain = changed(
            static_recipe(tmp_path / name), model__path=str(model_of(family, dtype)), model__sanity_check="off",
            calibration={"dataset": "text", "path": str(text), "samples": 16, "sequence_length": 64,
                         "expert_tokens": 8}, quantize={"weights": GROUPS}, export=None, evaluate=None,
        )  # fmt: skip
        return changed(plain, **values)

    return recipe


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    lines = (Path(recipe["output"]) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stored_bytes(recipe: Recipe) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (Path(recipe["output"]) / "quantize").glob("block-*")}


def store_of(recipe: Recipe) -> Store:
    return Store(Path(recipe["output"]) / "quantize")


def entering(
    model: nn.Module, batches: list[Tensor], path: str, replaced: Mapping[str, Any], layers: list[Experts]
) -> tuple[Tensor, Tensor]:
    """Hidden states and chosen experts of all tokens, as they enter the experts at `path` of the whole model."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.inference_mode(), simulated(model, replaced, layers):
        for batch in batches:
            model(batch, use_cache=False)
    handle.remove()
    return torch.cat([states for states, _ in seen]), torch.cat([chosen for _, chosen in seen])


def compare(name: str, ours: QuantizedWeight, wanted: QuantizedWeight, weight: Tensor, hessian: Tensor) -> None:
    """A code at a tie falls to either side, and those solved after it with it."""
    assert ours.scale.shape == wanted.scale.shape
    same = float((ours.codes == wanted.codes).float().mean())
    assert same > 0.97, f"{name}: {same:.3f} of the codes"
    errors = [float(output_error(weight, each, hessian).sum()) for each in (ours, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02), name


def check_by_hand(recipe: Recipe) -> int:
    """Every solved linear of an expert has the codes that come of its weight and of what it reads, for the tokens that
    the expert computes behind all that is stored before it. Returns how many there are."""
    with opened(recipe, "quantize") as context:
        store, model = Store(context.folder("quantize")), float_model(context.model)
        batches = batched(calibration_samples(context).samples)
        plan, section, calibration = context.plan, context.recipe.quantize.gptq, context.recipe.calibration
        floats = {n: t for file in context.model.glob("*.safetensors") for n, t in load_file(file).items()}
    assert calibration is not None
    facts = {event["module"]: event for event in events(recipe, "linear")}
    blocks, checked = plan.structure.blocks, 0
    layers = [layer for block in blocks for layer in block.experts]
    hows: dict[str, Any] = {}
    for block in blocks:
        for name in {each.name for each in block.linears} & store.schemes.keys():
            hows[name] = replacement(store.read(name), store.schemes[name], torch.float32, "cpu", "decode")
        for layer in block.experts:
            used = hows if section.prefix == "quantized" else {}
            before = {name: how for name, how in used.items() if name not in layer.names}
            states, chosen = entering(model, batches, layer.name, before, layers)
            for index, (gate, up, down) in enumerate(layer.linears):
                x = states if calibration.route_all_experts else states[(chosen == index).any(1)]
                assert len(x) >= calibration.expert_tokens
                outputs = [product(x, floats[f"{name}.weight"], used.get(name)) for name in (gate, up)]
                for reading, inputs in (((gate, up), x), ((down,), silu(outputs[0]) * outputs[1])):
                    names = [n for n in reading if n in plan.treatments and plan.treatments[n].weights.solves]
                    if not names:
                        continue
                    hessian = (inputs.double().t() @ inputs.double() / len(inputs)).float()
                    treatment, whole = plan.treatments[names[0]], torch.cat([floats[f"{n}.weight"] for n in names])
                    hessian, share = shrunk(hessian, len(inputs), section.damping)
                    curvature = factored(hessian, section.damping)
                    wanted, _ = solved(whole, weight_grid(treatment, "float32"), curvature, section.sweeps)
                    parts = [store.read(name).weight for name in names]
                    scale = parts[0].scale if len(wanted.scale) == 1 else torch.cat([part.scale for part in parts])
                    ours = QuantizedWeight(torch.cat([part.codes for part in parts]), scale, None)
                    compare(names[0], ours, wanted, whole, hessian)
                    for name in names:
                        assert facts[name]["tokens"] == len(x)
                        assert facts[name]["shrunk"] == pytest.approx(share, rel=0.01)
                    checked += len(names)
    return checked


def product(x: Tensor, weight: Tensor, how: Any) -> Tensor:
    """What a linear puts out that is replaced, or is not."""
    return linear(x, weight) if how is None else forward_of(nn.Module(), how)(x)


CASES: dict[str, tuple[str, Recipe]] = {
    "mixtral": ("mixtral", {}),
    "shared experts before them": ("qwen2-moe", {}),
    "no shared experts": ("qwen3-moe", {}),
    "a dense block, shared experts after them": ("deepseek-v3", {}),
    "3 bits a channel": ("mixtral", {"quantize__weights": {"bits": 3, "method": "gptq"}}),
    "a float prefix": ("mixtral", {"quantize__gptq": {"prefix": "float", "sweeps": 1, "damping": 0.05}}),
    "all tokens at all experts": ("qwen2-moe", {"calibration__route_all_experts": True}),
    "W8A8": ("qwen2-moe", {"quantize": {"weights": {"bits": 8, "method": "gptq"},
                                        "activations": {"bits": 8, "scope": "token"}}}),
    "fp8 with one scale a tensor": ("mixtral", {"quantize": {
        "weights": {"type": "float", "granularity": "tensor", "method": "gptq"},
        "activations": {"bits": 8, "type": "float", "scope": "token"}}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_expert_is_solved_for_the_tokens_that_it_computes(case: str, recipe_of: RecipeOf) -> None:
    family, values = CASES[case]
    recipe = recipe_of(family, **values)
    layers, experts = 2, 8 if family == "deepseek-v3" else 4
    assert check_by_hand(recipe) == layers * experts * 3


def lost(recipe: Recipe) -> float:
    """The output errors of all stored linears of experts, on the tokens that the float model routes to each."""
    with opened(recipe, "quantize") as context:
        store, model = Store(context.folder("quantize")), float_model(context.model)
        batches, blocks = batched(calibration_samples(context).samples), context.plan.structure.blocks
    total, layers = 0.0, [layer for block in blocks for layer in block.experts]
    for layer in layers:
        states, chosen = entering(model, batches, layer.name, {}, layers)
        joined, last = (model.get_parameter(name).detach() for name in layer.parameters)
        for index, names in enumerate(layer.linears):
            x = states[(chosen == index).any(1)]
            gate, up = joined[index].chunk(2)
            between = silu(linear(x, gate)) * linear(x, up)
            for name, weight, inputs in zip(names, (gate, up, last[index]), (x, x, between), strict=True):
                total += float(output_error(weight, store.read(name).weight, inputs.t() @ inputs).sum())
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activations", [{}, {"bits": 8, "scope": "token"}], ids=["W4", "W4A8"])
def test_what_experts_put_out_is_nearer_to_the_float_model(
    activations: Recipe, dtype: torch.dtype, recipe_of: RecipeOf
) -> None:
    recipe = recipe_of("qwen2-moe", "run", dtype, quantize__activations=activations)
    plain = recipe_of(
        "qwen2-moe", "plain", dtype, quantize__activations=activations, quantize__weights__method="minmax"
    )
    found, wanted = lost(recipe), lost(plain)
    assert 0 < found < 0.7 * wanted


def test_the_export_is_read_back_and_nearer_to_the_float_model(recipe_of: RecipeOf, text: Path) -> None:
    scored = {"perplexity": {"dataset": "text", "path": str(text), "sequence_length": 32, "windows": 4}}
    export = {"formats": ["compressed-tensors"]}
    recipe = recipe_of("mixtral", export=export, evaluate=scored)
    plain = changed(recipe, output=f"{recipe['output']}-plain", quantize__weights__method="minmax")
    result = quantcli.run(recipe)
    quantcli.run(plain)
    assert verify_path(result.path)["compressed-tensors: linears"] == len(result.plan.schemes)
    assert sum(".experts." in name for name in result.plan.schemes) == 2 * 4 * 3
    found, wanted = (read(each, "eval-ppl", "results.json")["kl_divergence"] for each in (recipe, plain))
    assert found < 0.8 * wanted


def test_experts_of_few_tokens_are_quantized_without_them_and_counted(recipe_of: RecipeOf) -> None:
    recipe = recipe_of("qwen3-moe")
    result = quantcli.run(recipe)
    assert result.to_json()["experts"] == {"observed": 8, "least": 8, "few": {}}
    first, second = (block.experts[0] for block in result.plan.structure.blocks)
    tokens = {event["module"]: event["tokens"] for event in events(recipe, "linear") if ".experts." in event["module"]}
    counts = {names[0]: tokens[names[0]] for names in first.linears}
    bar = sorted(counts.values())[1] + 1

    gate = {"gates": {"fallbacks": {"data_free_experts": 0}}}
    barred = changed(recipe, calibration__expert_tokens=bar, export={"formats": ["compressed-tensors"]}, evaluate=gate)
    with pytest.raises(MissedGate, match="data_free_experts") as caught:
        quantcli.run(barred)
    found = caught.value.result.to_json()["experts"]
    few = {name: count for name, count in counts.items() if count < bar}
    assert (found["observed"], found["least"]) == (8, bar)
    assert {name: count for name, count in found["few"].items() if name in counts} == few
    assert set(found["few"]) < {names[0] for layer in (first, second) for names in layer.linears}
    (judged,) = caught.value.result.gates
    assert judged.value == len(found["few"])

    last = [event for event in events(barred, "linear") if event["module"] in first.names][-len(first.names) :]
    free = {event["module"] for event in last if event.get("data_free")}
    assert free == {name for names in first.linears for name in names if names[0] in few}
    model = Path(recipe["model"]["path"])
    floats = {n: t for file in model.glob("*.safetensors") for n, t in load_file(file).items()}
    for name in first.names:
        codes = mse(floats[f"{name}.weight"], WeightGrid(4, True, "group", 32, torch.float32), None).codes
        assert torch.equal(store_of(barred).read(name).weight.codes, codes) == (name in free), name


def test_overrides_of_single_experts_and_linears(recipe_of: RecipeOf) -> None:
    """Of one expert all by min-max, of others one linear in float or by mse, one in float as a whole."""
    overrides = [
        {"match": "*.experts.3.*", "weights": {"method": "minmax"}},
        {"match": "*.experts.2.*", "scheme": "float"},
        {"match": "*.experts.1.gate_proj", "scheme": "float"},
        {"match": "*.experts.0.down_proj", "weights": {"method": "mse"}},
    ]
    recipe = recipe_of(
        "qwen3-moe", quantize={"weights": GROUPS, "overrides": overrides, "rollback": {"siblings": "apart"}}
    )
    plain = changed(recipe, output=f"{recipe['output']}-plain", quantize__weights__method="minmax")
    assert check_by_hand(recipe) == 2 * (2 + 2)
    quantcli.run(plain)
    stores = [store_of(each) for each in (recipe, plain)]
    for name in stores[0].schemes:
        alike = torch.equal(*(store.read(name).weight.codes for store in stores))
        assert alike == (".experts.3." in name or name.endswith(".experts.0.down_proj")), name
    assert not [name for name in stores[0].schemes if ".experts.2." in name or ".experts.1.gate" in name]


def test_stages_count_the_experts_whose_tokens_they_use(recipe_of: RecipeOf) -> None:
    """Those of one layer are solved, those of the other weighed by what the stage calibrate observes."""
    weighed = {"match": "*.0.*.experts.*", "weights": {"method": "mse"}}
    recipe = recipe_of("mixtral", calibration__expert_tokens=10_000, quantize__overrides=[weighed])
    result = quantcli.run(recipe)
    layers = [block.experts[0] for block in result.plan.structure.blocks]
    observed = read(recipe, "calibrate", "manifest.json")["experts"]
    assert list(observed["few"]) == [names[0] for names in layers[0].linears]
    found = result.to_json()["experts"]
    assert (found["observed"], list(found["few"])) == (8, [names[0] for layer in layers for names in layer.linears])
    counts = [(event["stage"], event["count"]) for event in events(recipe, "warning") if "fallback" in event]
    assert counts == [("calibrate", 4), ("quantize", 4)]

    other = changed(recipe, quantize__overrides=[{**weighed, "match": "*.1.*.experts.*"}])
    result = quantcli.run(other)
    assert list(read(other, "calibrate", "manifest.json")["experts"]["few"]) == [n[0] for n in layers[1].linears]
    assert result.to_json()["experts"]["observed"] == 8


def test_an_expert_of_few_tokens_counts_once_whatever_is_found_of_it(recipe_of: RecipeOf) -> None:
    """Its first linears are solved, the last is weighed by what the stage calibrate observes."""
    weighed = {"match": "*.experts.*.w2", "weights": {"method": "mse"}}
    recipe = recipe_of(
        "mixtral", calibration__expert_tokens=10_000, export={"formats": ["compressed-tensors"]},
        quantize__overrides=[weighed], quantize__rollback={"siblings": "apart"},
        evaluate={"gates": {"fallbacks": {"data_free_experts": 7}}},
    )  # fmt: skip
    with pytest.raises(MissedGate, match="data_free_experts: 8 is above 7") as caught:
        quantcli.run(recipe)
    assert len(caught.value.result.to_json()["experts"]["few"]) == 8
    assert {event["stage"] for event in events(recipe, "warning") if "fallback" in event} == {"calibrate"}


@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_mixture_is_solved_as_smoothed_and_rotated(asymmetric: bool, recipe_of: RecipeOf) -> None:
    """To the codes of the smoothed model where that is a model of its own."""
    recipe = recipe_of(
        "qwen2-moe", quantize__gptq={"asymmetric": asymmetric},
        smooth={"method": "iterative", "rotation": {}, "save_model": True},
    )  # fmt: skip
    quantcli.run(recipe)
    apart = changed(
        recipe, output=f"{recipe['output']}-apart", smooth=None, model__path=f"{recipe['output']}/smooth/model"
    )
    quantcli.run(apart)
    assert stored_bytes(recipe) == stored_bytes(apart)
    plain = changed(recipe, output=f"{recipe['output']}-plain", smooth=None)
    quantcli.run(plain)
    assert stored_bytes(recipe) != stored_bytes(plain)


def test_learned_rounding_leaves_experts_as_they_were_solved(recipe_of: RecipeOf) -> None:
    recipe = recipe_of("qwen2-moe", quantize={"weights": {**GROUPS, "method": "signround"}})
    solved_alone = recipe_of("qwen2-moe", "gptq")
    for each in (recipe, solved_alone):
        quantcli.run(each)
    stores = [store_of(each) for each in (recipe, solved_alone)]
    for name in [name for name in stores[0].schemes if name.startswith("model.layers.0.") and ".experts." in name]:
        ours, wanted = (store.read(name).weight.codes for store in stores)
        assert (ours == wanted).float().mean() > 0.97, f"{name}: more than ties"
    for event in events(recipe, "linear"):
        if ".experts." in event["module"]:
            assert event["tuned"] is False
            assert "tuned_to" not in event
        else:
            assert event["tuned_to"] <= event["tuned_from"]


def test_tuning_meets_experts_as_they_are_quantized(recipe_of: RecipeOf, tmp_path: Path) -> None:
    """What the tuned linears start from is the error of the block with its experts quantized, too. All experts compute
    all tokens, since one that goes elsewhere for a rounding makes an error as large."""
    model = save_tiny_model("mixtral", tmp_path / "model", with_tokenizer=True, num_experts_per_tok=4)
    weights = {"bits": 8, "method": "signround"}
    starts = []
    for name, change in (("run", {"weights": {"bits": 2}}), ("float", {"scheme": "float"})):
        quantize = {"weights": weights, "overrides": [{"match": "*.experts.*", **change}]}
        quantize["gptq"] = {"shrink": False}  # so that of these samples little is lost where experts lose nothing
        recipe = recipe_of("mixtral", name, quantize=quantize, model__path=str(model))
        quantcli.run(recipe)
        starts.append({event["tuned_from"] for event in events(recipe, "linear") if "tuned_from" in event})
    assert len(starts[0]) == len(starts[1]) == 2, "one a block"
    assert min(starts[0]) > 100 * max(starts[1])


def test_asymmetric_calibration_is_for_other_linears(recipe_of: RecipeOf) -> None:
    recipe = recipe_of("deepseek-v3", quantize__gptq={"asymmetric": True})
    assert check_by_hand(recipe) == 2 * 8 * 3
    shares = {event["module"]: event["asymmetric"] for event in events(recipe, "linear")}
    assert {share for name, share in shares.items() if ".experts." in name} == {0}
    assert any(share > 0 for name, share in shares.items() if ".shared_experts." in name)


def test_a_shared_expert_behind_a_gate_is_not_taken_for_what_it_adds(
    recipe_of: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the block before it is, so that a run that goes on there knows the same."""
    model = save_tiny_model("qwen2-moe", tmp_path / "model", with_tokenizer=True, mlp_only_layers=[0])
    recipe = recipe_of("qwen2-moe", model__path=str(model), quantize__gptq={"asymmetric": True})
    found: list[tuple[str, ...]] = []
    writers = solve._writers

    def keep(*arguments: Any) -> tuple[str, ...]:
        found.append(writers(*arguments))
        return found[-1]

    monkeypatch.setattr(solve, "_writers", keep)
    quantcli.run(recipe)
    first, second = "model.layers.0.", "model.layers.1."
    assert found == [(f"{first}self_attn.o_proj", f"{first}mlp.down_proj"), (f"{second}self_attn.o_proj",)]
    again = changed(recipe, output=f"{recipe['output']}-again")
    with pytest.raises(Interrupted):
        quantcli.run(again, listener=interrupt("quantize", 1, "block"))
    quantcli.run(again)
    assert stored_bytes(again) == stored_bytes(recipe)


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_blocks_that_are_run_anew_for_each_input_give_the_same(
    method: str, recipe_of: RecipeOf, tree: Callable[[Path], Tree]
) -> None:
    recipe = recipe_of("qwen2-moe", quantize__weights__method=method)
    small = changed(recipe, output=f"{recipe['output']}-small", model__cache_memory="1kB")
    quantcli.run(recipe)
    quantcli.run(small)
    assert stored_bytes(recipe) == stored_bytes(small)
    assert [event for event in events(small, "note") if "run anew" in event["text"]]
    for each in (recipe, small):
        assert not [name for name in tree(Path(each["output"])) if "hidden" in name]


def test_an_interrupted_stage_ends_in_the_same_bytes(recipe_of: RecipeOf, tree: Callable[[Path], Tree]) -> None:
    recipe = recipe_of("qwen2-moe", calibration__expert_tokens=500)
    wanted = quantcli.run(recipe).to_json()["experts"]
    again = changed(recipe, output=f"{recipe['output']}-again")
    for kind, number in (("warning", 1), ("linear", 12), ("block", 1)):
        with pytest.raises(Interrupted):
            quantcli.run(again, listener=interrupt("quantize", number, kind))
    found = quantcli.run(again).to_json()["experts"]
    assert stored_bytes(again) == stored_bytes(recipe)
    assert found == wanted
    assert found["few"]
    assert not [name for name in tree(Path(again["output"])) if "hidden" in name]


def test_other_tokens_for_experts_are_other_work(recipe_of: RecipeOf) -> None:
    """And tokens for experts are of no account where none is solved."""
    recipe = recipe_of("mixtral")
    quantcli.run(recipe)
    assert quantcli.run(recipe).stages["quantize"]["reused"]
    assert not quantcli.run(changed(recipe, calibration__route_all_experts=True)).stages["quantize"]["reused"]
    plain = changed(recipe, quantize__overrides=[{"match": "*.experts.*", "scheme": "float"}])
    quantcli.run(plain)
    assert quantcli.run(changed(plain, calibration__route_all_experts=True)).stages["quantize"]["reused"]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_inputs_of_experts_that_are_not_finite_are_named(asymmetric: bool, recipe_of: RecipeOf, tmp_path: Path) -> None:
    recipe = recipe_of("qwen2-moe", quantize__gptq={"asymmetric": asymmetric})
    model = tmp_path / "damaged"
    shutil.copytree(recipe["model"]["path"], model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"].fill_(torch.finfo(torch.float32).max)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    in_float = [{"match": "*.experts.*.up_proj", "scheme": "float"}]
    damaged = changed(
        recipe, model__path=str(model), quantize__overrides=in_float, quantize__rollback={"siblings": "apart"}
    )
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.2\.down_proj: input values are not finite"):
        quantcli.run(damaged)


def test_schemes_are_shared_out_and_ranked_beside_solved_experts(recipe_of: RecipeOf) -> None:
    target = {"bits_per_weight": 6, "candidates": [{"bits": 4}, {"bits": 8}]}
    quantize = {"weights": {**GROUPS}, "target": target}
    recipe = recipe_of("mixtral", quantize=quantize)
    result = quantcli.run(recipe)
    assert sum(result.to_json()["allocation"]["linears"].values()) == len(result.plan.schemes)
    assert {scheme.bits for _, scheme in result.plan.schemes.values()} == {4, 8}
    assert result.to_json()["experts"]["observed"] == 8
    ranked = recipe_of("mixtral", "ranked", quantize={
        "weights": GROUPS, "rollback": {"level": 1, "metric": "output_error"}})  # fmt: skip
    result = quantcli.run(ranked)
    assert read(ranked, "sensitivity", "sensitivity.json")["metric"] == "output_error"
    assert any(result.plan.kept[name] for name in result.plan.kept if "router" not in result.plan.kept[name])


@pytest.mark.parametrize("limit", ["1GB", "64kB"])
def test_the_estimate_has_what_waits_before_experts(limit: str, recipe_of: RecipeOf) -> None:
    """On disk what is more than may be in memory."""
    recipe = recipe_of("mixtral", model__cache_memory=limit)
    weighed = changed(recipe, quantize__overrides=[{"match": "*.experts.*", "weights": {"method": "mse"}}])
    found, without = quantcli.plan(recipe).estimate, quantcli.plan(weighed).estimate
    states = 16 * 64 * 64 * 4  # samples, tokens of each, hidden size, bytes
    mapped = limit == "64kB"
    matrices = 4 * SOLVING_MATRICES * (96**2 - 64**2)  # of the widest input that is solved
    assert found.memory - without.memory == (64_000 if mapped else states) + matrices
    assert found.disk - without.disk + (without.tokens - found.tokens) * 64 * 4 == (states if mapped else 0)


@pytest.mark.parametrize("limit", [1 << 20, 16])
def test_what_enters_experts_is_on_disk_only_where_memory_ends(limit: int, tmp_path: Path) -> None:
    states = [torch.randn(6, 8), torch.randn(3, 8)]
    chosen = [torch.tensor([[0, 1]] * 4 + [[2, 1]] * 2), torch.tensor([[3, 2]] * 3)]
    folder = tmp_path / "hidden"
    routed = RoutedTokens(
        folder, zip(states, chosen, strict=True), [(6, 8), (3, 8)], torch.float32, limit, every_token=False
    )
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert sizes == ([] if limit > 16 else [9 * 8 * 4])
    for expert, (rows, others) in enumerate((([0, 1, 2, 3], []), (range(6), []), ([4, 5], [0, 1, 2]), ([], [0, 1, 2]))):
        wanted = torch.cat([states[0][list(rows)], states[1][others]])
        assert torch.equal(torch.cat([*routed.of(expert)]), wanted)
        assert routed.count(expert) == len(wanted)
    routed.clear()
    assert not folder.exists()
