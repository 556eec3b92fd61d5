"""Weights by GPTQ from recipe to evaluation, against models whose linears are solved one after the other by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened, read
from safetensors.torch import load_file, save_file
from test_resume import kill_at
from tiny_models import save_tiny_model
from torch import Tensor, nn

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store
from quantcli.model.structure import Experts
from quantcli.pipeline import solve
from quantcli.pipeline.batches import batched
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.treatment import replacement, weight_grid
from quantcli.quant.gptq import factored
from quantcli.quant.grid import QuantizedWeight
from quantcli.quant.refine import output_error
from quantcli.quant.shrinkage import shrunk
from quantcli.quant.solver import solved

Recipe = dict[str, Any]
Tree = Mapping[str, str]
GROUPS = {"bits": 4, "granularity": "group", "group_size": 32, "method": "gptq"}
W8 = {"bits": 8, "method": "gptq"}


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    """4-bit weights in groups, from 250 tokens of the text that is evaluated too."""
    return changed(
        static_recipe(tmp_path / "run"), model__sanity_check="off", calibration__samples=16,
        calibration__sequence_length=64, quantize={"weights": GROUPS},
    )  # fmt: skip


def beside(recipe: Recipe, name: str, **values: Any) -> Recipe:
    """The recipe with other values and an output of its own."""
    return changed(recipe, output=f"{recipe['output']}-{name}", **values)


def events(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    lines = (Path(recipe["output"]) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stored_bytes(recipe: Recipe) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (Path(recipe["output"]) / "quantize").glob("block-*")}


def moments_of(
    model: nn.Module,
    batches: list[Tensor],
    name: str,
    replaced: Mapping[str, Any] | None = None,
    experts: Sequence[Experts] = (),
    values: tuple[str, list[int]] | None = None,
) -> Tensor:
    """H of a linear's input in the whole model, in which some linears are replaced. Of an input that attention's values
    are made of, tokens count by how small those are beside the median of their batch."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).double()
        if values is not None:
            maker = model.get_submodule(values[0])
            bias = 0 if maker.bias is None else maker.bias.double()
            energies = ((x @ weight_of(model, values[0]).double().t() + bias)[:, values[1]] ** 2).sum(1)
            middle = sorted(energies.tolist())[(len(x) - 1) // 2]
            x = x * torch.tensor([min(100.0, max(1.0, middle / e)) for e in energies.tolist()]).double().sqrt()[:, None]
        seen.append(x)

    handle = model.get_submodule(name).register_forward_pre_hook(see)
    with torch.inference_mode(), simulated(model, replaced or {}, experts):
        for batch in batches:
            model(batch, use_cache=False)
    handle.remove()
    x = torch.cat(seen)
    return (x.t() @ x / len(x)).float()


def losses(recipe: Recipe) -> dict[str, float]:
    """The output error of every stored linear, on the inputs that the float model gives it."""
    with opened(recipe, "quantize") as context:
        store, model = Store(context.folder("quantize")), float_model(context.model)
        batches = batched(calibration_samples(context).samples)
        found = {}
        for name in store.schemes:
            hessian = moments_of(model, batches, name)
            found[name] = float(output_error(weight_of(model, name), store.read(name).weight, hessian).sum())
        return found


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach()  # type: ignore[operator, union-attr, return-value]


def check_by_hand(recipe: Recipe) -> None:
    """Every linear has the codes that come of its weight and of its inputs behind all stored linears before it."""
    with opened(recipe, "quantize") as context:
        store, model = Store(context.folder("quantize")), float_model(context.model)
        batches = batched(calibration_samples(context).samples)
        section = context.recipe.quantize.gptq
        replaced: dict[str, Any] = {}
        blocks = context.plan.structure.blocks
        experts = [layer for block in blocks for layer in block.experts]
        inputs = [
            names
            for block in blocks
            for names in [*(layer.names for layer in block.experts), *(shared.linears for shared in block.inputs)]
        ]
        values = {shared.linears: block.values_of(shared) for block in blocks for shared in block.inputs}
        for names in [*inputs, (context.plan.structure.head,)]:
            planned = [name for name in names if name in store.schemes]
            if any(context.plan.treatments[name].weights.solves for name in planned):
                before = replaced if section.prefix == "quantized" else {}
                hessian = moments_of(model, batches, planned[0], before, experts, values.get(names))
                if section.shrink:
                    hessian, _ = shrunk(hessian, sum(batch.numel() for batch in batches), section.damping)
                curvature = factored(hessian, section.damping)
            for name in planned:
                treatment = context.plan.treatments[name]
                if treatment.weights.solves:
                    grid = weight_grid(treatment, context.plan.structure.dtype)
                    wanted, _ = solved(weight_of(model, name), grid, curvature, section.sweeps)
                    compare(name, store.read(name).weight, wanted, weight_of(model, name), hessian)
            for name in planned:
                scheme = context.plan.treatments[name].scheme
                replaced[name] = replacement(store.read(name), scheme, torch.float32, "cpu", "decode")


def compare(name: str, ours: QuantizedWeight, wanted: QuantizedWeight, weight: Tensor, hessian: Tensor) -> None:
    """A code at a tie falls to either side, and those solved after it with it."""
    assert ours.scale.shape == wanted.scale.shape
    assert (ours.zero_point is None) == (wanted.zero_point is None)
    same = float((ours.codes == wanted.codes).float().mean())
    assert same > 0.97, f"{name}: {same:.3f} of the codes"
    errors = [float(output_error(weight, each, hessian).sum()) for each in (ours, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02), name


SCHEMES: dict[str, Recipe] = {
    "4 bits, groups of 32": {"weights": GROUPS},
    "2 bits, groups of 16, asymmetric": {"weights": {**GROUPS, "bits": 2, "group_size": 16, "symmetric": False}},
    "not shrunk": {"weights": GROUPS, "gptq": {"shrink": False}},
    "3 bits a channel, head too": {
        "weights": {"bits": 3, "method": "gptq"},
        "rollback": {"last_linear": False},
    },
    "8 bits a tensor, float prefix": {
        "weights": {**W8, "granularity": "tensor"},
        "gptq": {"prefix": "float", "sweeps": 1, "damping": 0.05},
    },
    "static activations": {"weights": W8, "activations": {"bits": 8, "scope": "tensor"}},
    "dynamic activations, head too": {
        "weights": W8,
        "activations": {"bits": 8, "scope": "token"},
        "rollback": {"last_linear": False},
    },
    "fp8, static activations": {
        "weights": {"type": "float", "method": "gptq"},
        "activations": {"bits": 8, "type": "float", "scope": "tensor"},
    },
    "an override beside float and min-max": {
        "weights": {"bits": 4, "method": "minmax"},
        "overrides": [
            {"match": "*.1.mlp.up_proj", "scheme": "float"},
            {"match": "*.mlp.*", "weights": {"method": "gptq"}},
        ],
        "rollback": {"siblings": "apart"},
    },
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_is_solved_behind_those_before_it(recipe: Recipe, scheme: str) -> None:
    check_by_hand(changed(recipe, export=None, evaluate=None, quantize=SCHEMES[scheme]))


def test_linears_of_other_methods_are_as_without_gptq(recipe: Recipe) -> None:
    mixed = changed(
        recipe, export=None, evaluate=None, quantize=SCHEMES["an override beside float and min-max"]
    )  # fmt: skip
    plain = beside(mixed, "plain", quantize__overrides=[{"match": "*.1.mlp.up_proj", "scheme": "float"}])
    quantcli.run(mixed)
    quantcli.run(plain)
    for file in sorted((Path(mixed["output"]) / "quantize").glob("block-*.safetensors")):
        found, wanted = load_file(file), load_file(Path(plain["output"]) / "quantize" / file.name)
        assert found.keys() == wanted.keys()
        assert not [name for name in found if ".1.mlp.up_proj" in name]
        for name in found:
            if name.endswith("codes"):
                assert torch.equal(found[name], wanted[name]) == (".mlp." not in name), name


@pytest.mark.parametrize(
    ("quantize", "stages"),
    [
        ({"weights": GROUPS}, {}),
        ({"weights": {**GROUPS, "bits": 3, "symmetric": False}}, {}),
        ({"weights": {**GROUPS, "bits": 3}}, {"smooth": {"method": "m4"}}),
        ({"weights": GROUPS, "activations": {"bits": 8, "scope": "token"}}, {}),
    ],
    ids=["w4", "w3 asymmetric", "w3 smoothed", "w4a8"],
)
def test_outputs_are_nearer_to_those_of_the_float_model(recipe: Recipe, quantize: Recipe, stages: Recipe) -> None:
    """Linear by linear on the calibrated inputs, and at the end by divergence; the export is verified on the way."""
    recipe = changed(recipe, quantize=quantize, **stages)
    plain = beside(recipe, "plain", quantize__weights__method="minmax")
    divergences = []
    for each in (recipe, plain):
        quantcli.run(each)
        divergences.append(read(each, "eval-ppl", "results.json")["kl_divergence"])
    assert divergences[0] < 0.8 * divergences[1]
    if not stages:  # with folds the weights are others
        ours, theirs = losses(recipe), losses(plain)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if ours[name] >= theirs[name]]


@pytest.mark.parametrize("scope", ["tensor", "token"])
def test_eight_bits_with_integer_inputs(recipe: Recipe, scope: str) -> None:
    """The weights are nearer, the ranges of the inputs are those of any other method."""
    recipe = changed(recipe, quantize={"weights": W8, "activations": {"bits": 8, "scope": scope}})
    plain = beside(recipe, "plain", quantize__weights__method="minmax")
    quantcli.run(recipe)
    quantcli.run(plain)
    ours, theirs = losses(recipe), losses(plain)
    assert not [name for name in ours if ours[name] >= theirs[name]]
    stores = [Store(Path(each["output"]) / "quantize") for each in (recipe, plain)]
    for name in stores[0].schemes:
        scales = [store.read(name).input_scale for store in stores]
        assert (scales[0] is None) == (scope == "token")
        assert scales[0] is None or torch.equal(scales[0], scales[1])  # type: ignore[arg-type]
    found, wanted = (read(each, "eval-ppl", "results.json")["kl_divergence"] for each in (recipe, plain))
    assert 0 < found < 1.5 * wanted, "most of it comes from the inputs"


def test_asymmetric_calibration_makes_good_what_came_before(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__weights__bits=3)
    aimed = beside(recipe, "aimed", quantize__gptq={"asymmetric": True})
    for each in (recipe, aimed):
        quantcli.run(each)
    plain, found = (read(each, "eval-ppl", "results.json")["kl_divergence"] for each in (recipe, aimed))
    assert found < plain
    shares = {event["module"]: event["asymmetric"] for event in events(aimed, "linear")}
    assert all(0 <= share <= 1 for share in shares.values())
    first = [name for name in shares if name.startswith("model.layers.0.self_attn") and "o_proj" not in name]
    assert [shares[name] for name in first] == [0, 0, 0], "their inputs are those of the float model"
    assert all(share > 0 for name, share in shares.items() if name not in first)
    assert not [event for event in events(recipe, "linear") if "asymmetric" in event]


def test_asymmetric_calibration_says_when_one_sample_is_not_enough(recipe: Recipe) -> None:
    recipe = changed(recipe, export=None, evaluate=None, calibration__samples=1, quantize__gptq={"asymmetric": True})
    quantcli.run(recipe)
    assert [event for event in events(recipe, "warning") if "asymmetric has no effect with one" in event["text"]]


def test_learned_rounding_says_when_it_is_judged_on_what_it_learned_from(recipe: Recipe) -> None:
    recipe = changed(recipe, export=None, evaluate=None, quantize__weights__method="signround")
    one = beside(recipe, "one", calibration__samples=1)
    told = []
    for each in (recipe, one):
        quantcli.run(each)
        told.append([e["fallback"] for e in events(each, "warning") if "judged on the one" in e["text"]])
    assert told == [[], ["not_tuned"]]


def test_records_say_what_the_output_head_is_solved_without(recipe: Recipe) -> None:
    recipe = changed(
        recipe, export=None, evaluate=None, quantize__rollback={"last_linear": False},
        quantize__gptq={"asymmetric": True}, quantize__weights__method="signround",
    )  # fmt: skip
    quantcli.run(recipe)
    facts = {event["module"]: event for event in events(recipe, "linear")}
    head = facts.pop("lm_head")
    assert (head["asymmetric"], head["tuned"]) == (0, False)
    assert not [name for name, fact in facts.items() if "tuned" in fact]


def test_records_say_under_which_activations_a_linear_was_solved(recipe: Recipe) -> None:
    for prefix in ("quantized", "float"):
        asked = beside(recipe, prefix, quantize__gptq={"prefix": prefix}, export=None, evaluate=None)
        quantcli.run(asked)
        assert {event["prefix"] for event in events(asked, "linear")} == {prefix}


@pytest.mark.parametrize("asymmetric", [False, True])
def test_blocks_that_are_run_anew_for_each_input_give_the_same(recipe: Recipe, asymmetric: bool) -> None:
    recipe = changed(
        recipe, export=None, evaluate=None, quantize__gptq={"asymmetric": asymmetric},
        quantize__rollback={"last_linear": False},
    )  # fmt: skip
    small = beside(recipe, "small", model__cache_memory="1kB")
    quantcli.run(recipe)
    quantcli.run(small)
    assert stored_bytes(recipe) == stored_bytes(small)
    notes = [[event["text"] for event in events(each, "note")] for each in (recipe, small)]
    assert not [text for text in notes[0] if "run anew" in text]
    (note,) = [text for text in notes[1] if "run anew" in text]
    assert re.fullmatch(r"Inside a block [\d.]+ MiB of activations .* model\.cache_memory: .*", note)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(recipe: Recipe) -> None:
    recipe = changed(
        recipe, export=None, evaluate=None, calibration__samples=3, calibration__sequence_length=24
    )  # fmt: skip
    again, other = beside(recipe, "again"), beside(recipe, "other", calibration__seed=5)
    for each in (recipe, again, other):
        quantcli.run(each)
    assert stored_bytes(recipe) == stored_bytes(again)
    assert stored_bytes(recipe) != stored_bytes(other)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_an_interrupted_stage_ends_in_the_same_bytes(
    recipe: Recipe, asymmetric: bool, tree: Callable[[Path], Tree]
) -> None:
    """Between the file of a block and its hidden states, and while a block is at work."""
    recipe = changed(
        recipe, export=None, evaluate=None, quantize__gptq={"asymmetric": asymmetric},
        quantize__rollback={"last_linear": False},
    )  # fmt: skip
    quantcli.run(recipe)
    again = beside(recipe, "again")
    for kind, number in (("linear", 10), ("block", 1), ("block", 1)):
        with pytest.raises(Interrupted):
            quantcli.run(again, listener=interrupt("quantize", number, kind))
    seen: list[Mapping[str, Any]] = []
    quantcli.run(again, listener=seen.append)
    assert stored_bytes(again) == stored_bytes(recipe)
    blocks = [event["index"] for event in seen if event["event"] == "block" and event["stage"] == "quantize"]
    assert blocks[0] > 0, "what was done is kept"
    assert not [name for name in tree(Path(again["output"])) if "hidden" in name]


@pytest.mark.parametrize("asymmetric", [False, True])
def test_killed_runs_end_in_the_same_bytes(recipe: Recipe, asymmetric: bool, tree: Callable[[Path], Tree]) -> None:
    recipe = changed(recipe, evaluate=None, quantize__gptq={"asymmetric": asymmetric})
    kill_at(19 if asymmetric else 23, recipe, tree, Path(recipe["output"]))  # type: ignore[arg-type]


def test_gptq_without_calibration_is_refused(recipe: Recipe) -> None:
    del recipe["calibration"]
    with pytest.raises(RecipeError, match=r"quantize\.weights\.method.*gptq needs calibration") as caught:
        quantcli.plan(recipe)
    assert caught.value.exit_code == 2


def test_ranges_found_on_the_quantized_model_are_refused_beside_it(recipe: Recipe) -> None:
    recipe = changed(
        recipe, quantize={"weights": W8, "activations": {"bits": 8, "scope": "tensor", "propagation": "quantized"}}
    )
    with pytest.raises(RecipeError, match=r"propagation.*no rule beside weights of method gptq.*propagation: float"):
        quantcli.plan(recipe)


@pytest.mark.parametrize(
    ("section", "refused"),
    [
        ({"asymmetric": True, "prefix": "float"}, r"asymmetric.*no effect on inputs of the float model"),
        ({"damping": 0}, r"damping"),
        ({"sweeps": -1}, r"sweeps"),
    ],
)
def test_keys_without_effect_are_refused(recipe: Recipe, section: Recipe, refused: str) -> None:
    with pytest.raises(RecipeError, match=refused):
        quantcli.plan(changed(recipe, quantize__gptq=section))


def test_experts_of_another_method_are_quantized_before_all_others(recipe: Recipe, tmp_path: Path) -> None:
    model = save_tiny_model("mixtral", tmp_path / "model", with_tokenizer=True)
    recipe = changed(recipe, model__path=str(model))
    recipe = changed(recipe, quantize__overrides=[{"match": "*.experts.*", "weights": {"method": "minmax"}}])
    plain = beside(recipe, "plain", quantize__weights__method="minmax")
    for each in (recipe, plain):
        quantcli.run(each)
    check_by_hand(recipe)
    stores = [Store(Path(each["output"]) / "quantize") for each in (recipe, plain)]
    assert stores[0].schemes.keys() == stores[1].schemes.keys()
    for name in stores[0].schemes:
        ours, theirs = (store.read(name).weight.codes for store in stores)
        assert torch.equal(ours, theirs) == (".experts." in name), name
    found, wanted = (read(each, "eval-ppl", "results.json")["kl_divergence"] for each in (recipe, plain))
    assert found < wanted


@pytest.mark.parametrize("asymmetric", [False, True])
def test_inputs_that_are_not_finite_are_named(asymmetric: bool, recipe: Recipe, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.inf
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = changed(
        recipe, model__path=str(model), quantize__gptq={"asymmetric": asymmetric}, export=None, evaluate=None
    )
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.q_proj: input values are not finite"):
        quantcli.run(recipe)


def test_weights_that_are_not_finite_are_named(recipe: Recipe, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = changed(recipe, model__path=str(model), export=None, evaluate=None)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds values that are not finite"):
        quantcli.run(recipe)


@pytest.mark.parametrize(("multiplier", "adds_up"), [(0.22, False), (1.0, True)])
def test_outputs_that_a_model_scales_are_not_taken_for_what_they_add(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplier: float, adds_up: bool
) -> None:
    model = save_tiny_model("granite", tmp_path / "model", with_tokenizer=True, residual_multiplier=multiplier)
    compensated: list[bool] = []
    lacking = solve._lacking
    monkeypatch.setattr(solve, "_lacking", lambda *a: compensated.append(True) or lacking(*a))
    asked = changed(
        recipe, model__path=str(model), quantize__gptq={"asymmetric": True}, export=None, evaluate=None
    )  # fmt: skip
    quantcli.run(asked)
    assert bool(compensated) == adds_up


@pytest.mark.parametrize(
    ("section", "least", "most"),
    [({"iterations": 12, "check_every": 2}, 12, 12), ({"iterations": 60, "check_every": 1, "patience": 1}, 1, 59),
     ({"iterations": 60, "minutes": 1e-5}, 1, 1)],
)  # fmt: skip
def test_learned_rounding_ends_with_its_steps_its_patience_or_its_time(
    recipe: Recipe, section: Recipe, least: int, most: int
) -> None:
    asked = changed(
        recipe, quantize__weights__method="signround", quantize__signround=section, export=None, evaluate=None
    )
    quantcli.run(asked)
    linears = events(asked, "linear")
    assert linears
    assert all(least <= event["tuned_steps"] <= most for event in linears)
    assert all(event["tuned_to"] <= event["tuned_from"] for event in linears)


def test_linears_that_are_handed_all_tokens_at_once_are_compensated_too(recipe: Recipe, tmp_path: Path) -> None:
    """OPT makes one sequence of a batch before its last linears."""
    model = save_tiny_model("opt", tmp_path / "model", with_tokenizer=True)
    asked = changed(recipe, model__path=str(model), quantize__gptq={"asymmetric": True})
    plain = beside(asked, "plain", quantize__gptq={"asymmetric": False})
    quantcli.run(asked)
    quantcli.run(plain)
    shares = [event["asymmetric"] for event in events(asked, "linear") if event["module"].endswith("fc2")]
    assert len(shares) == 2
    assert max(shares) > 0


ROUNDED: dict[str, Recipe] = {
    "weights alone": {"weights": {**GROUPS, "method": "signround"}},
    "beside another method": {
        "weights": {**GROUPS, "method": "signround"},
        "overrides": [{"match": "*.down_proj", "weights": {"bits": 2, "method": "minmax"}}],
    },
    "inputs of each token": {
        "weights": {**GROUPS, "method": "signround"},
        "activations": {"bits": 4, "scope": "token"},
    },
    "zero points of each token": {
        "weights": {**W8, "method": "signround"},
        "activations": {"bits": 8, "scope": "token", "symmetric": False},
    },
    "static inputs, beside another method": {
        "weights": {"bits": 8, "method": "signround"},
        "activations": {"bits": 8, "scope": "tensor"},
        "overrides": [{"match": "*.o_proj", "weights": {"method": "minmax"}}],
    },
}


@pytest.mark.parametrize("scheme", ROUNDED)
def test_learned_rounding_is_judged_by_the_block_that_is_written(recipe: Recipe, scheme: str) -> None:
    """All that is quantized in the first block, as stored, against the float block, on the batch kept apart."""
    recipe = changed(recipe, export=None, evaluate=None, quantize=ROUNDED[scheme])
    quantcli.run(recipe)
    with opened(recipe, "quantize") as context:
        store, model = Store(context.folder("quantize")), float_model(context.model)
        batches = batched(calibration_samples(context).samples)
    batch = batches[0].tensor_split(2)[0] if len(batches) == 1 else batches[0]
    states: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule("model.layers.0").register_forward_hook(
        lambda _module, args, output: states.append((args[0], output))
    )
    replaced = {
        name: replacement(store.read(name), scheme, torch.float32, "cpu", "decode")
        for name, scheme in store.schemes.items()
        if ".layers.0." in name
    }
    with torch.inference_mode():
        model(batch, use_cache=False)
        with simulated(model, replaced):
            model(batch, use_cache=False)
    handle.remove()
    (entered, exact), (_, found) = states
    added = (exact - entered).square().sum(-1)
    shares = 1 / (added + 4 * added.median())
    error = float(((found - exact).square().sum(-1) * shares).sum() / (added * shares).sum())
    facts = {event["module"]: event for event in events(recipe, "linear") if ".layers.0." in event["module"]}
    of_tuned = {name: fact["tuned_to"] for name, fact in facts.items() if "tuned_to" in fact}
    assert of_tuned.keys() == {n for n in facts if context.plan.treatments[n].weights.method == "signround"}
    assert list(of_tuned.values()) == pytest.approx([error] * len(of_tuned), rel=0.02)
    assert all(facts[name]["scale_max"] == pytest.approx(float(store.read(name).weight.scale.abs().max()), rel=1e-5)
               for name in facts)  # fmt: skip
