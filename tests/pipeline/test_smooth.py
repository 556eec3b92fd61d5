"""Stage `smooth`: scales and rotations are made, keep the float model the same function, and reach every artifact."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened, read
from safetensors.torch import load_file, save_file
from test_resume import artifacts, kill_at
from tiny_models import save_tiny_model, token_batches
from torch import Tensor

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.model import folding
from quantcli.model.structure import Producer, SharedInput
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline import engine
from quantcli.pipeline.gates import fallbacks
from quantcli.pipeline.groups import _fitted
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.stages import smooth
from quantcli.recipe import load_recipe
from quantcli.smoothing.group import ErrorOf, Found, Group
from quantcli.smoothing.methods import SMOOTHING_METHODS

Recipe = dict[str, Any]
Tree = dict[str, str]

NORM = {"norm"}
ALL = {"norm", "attention", "mlp"}
# What each family has linears for that absorb scales; an activation function between up and down leaves no `mlp`.
FAMILIES = {
    "llama": ALL,
    "llama-tied": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "gemma2": ALL,
    "gemma3": ALL,
    "phi3": ALL,
    "opt": ALL,  # ReLU passes a scale on
    "gpt2": {"norm", "attention"},
}
# Families that go through one method and one rotation each.
FURTHER = {
    "mistral": ALL,
    "gemma": ALL,
    "smollm3": ALL,
    "seed_oss": ALL,
    "ernie4_5": ALL,
    "granite": ALL,
    "stablelm": ALL,
    "cohere": ALL,
    "olmo2": {"attention", "mlp"},  # norms stand behind linears, and none before them
    **{name: {"norm", "attention"} for name in ("falcon", "gpt-neox", "starcoder2", "arcee", "nemotron", "phi")},
}
UNROTATED = {"gemma2", "gemma3", "olmo2", "opt"}  # norms behind linears; a projection behind the embedding
METHODS = {"m1": NORM, "m2": NORM, "m3": NORM, "m4": ALL, "m5": NORM, "m6": ALL, "balance": ALL}
EXACT = 1e-5


def _pairs(methods: Iterable[str], quick: set[str], thorough: set[str]) -> list[Any]:
    """Every family with every method; `quick` methods, and `thorough` families, in each run of the tests."""
    return [
        pytest.param(family, method, marks=() if method in quick or family in thorough else pytest.mark.slow)
        for family in FAMILIES
        for method in methods
    ]


FAMILY_METHODS = [*_pairs(METHODS, {"m6", "balance"}, {"llama-tied"}), *((family, "m6") for family in FURTHER)]
FAMILY_ROTATIONS = [
    *_pairs(("rotate", "auto"), {"rotate"}, {"llama-tied", "gpt2"}),
    *((family, "rotate") for family in FURTHER),
]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a model with outliers: a channel of each norm, of the values and of up is 12 times larger."""

    @cache
    def make(family: str) -> Path:
        folder = save_tiny_model(family, tmp_path_factory.mktemp(family), with_tokenizer=True)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if re.search(r"(ln_\d|norm)\.weight$", name) and len(tensor) == 64:
                tensor[9] = 12
            elif re.search(r"(v_proj|up_proj|qkv_proj|query_key_value)\.weight$", name):
                tensor[-3] *= 12
            elif name.endswith("c_attn.weight"):
                tensor[:, -3] *= 12
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture
def recipe(model_of: Callable[[str], Path], prose: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """W8A8 of a family with a section `smooth`; further values as in `changed`."""

    def make(family: str, smooth: dict[str, Any], **values: Any) -> Recipe:
        text = {"dataset": "text", "path": str(prose)}
        whole = {
            "version": 1,
            "model": {"path": str(model_of(family)), "sanity_check": "off"},
            "calibration": {**text, "samples": 4, "sequence_length": 24},
            "smooth": {"search_tokens": 64} | smooth if smooth.get("method") != "rotate" else smooth,
            "quantize": {"activations": {"bits": 8, "scope": "tensor"}},
            "evaluate": {"perplexity": {**text, "sequence_length": 32, "windows": 4}},
            "output": str(tmp_path / "run"),
        }
        if family == "gpt2":  # whose linears are transposed, which of the formats dense alone holds
            whole |= {"export": None, "evaluate": None}
        return changed(whole, **values)

    return make


def smoothed(recipe: Recipe) -> list[dict[str, Any]]:
    """Run as far as `smooth`; what came of each group."""
    engine.run_recipe(load_recipe(recipe), until="smooth")
    files = sorted((Path(recipe["output"]) / "smooth").glob("block-*.json"))
    return [outcome for file in files for outcome in json.loads(file.read_text())]


def scales(recipe: Recipe) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted((Path(recipe["output"]) / "smooth").glob("block-*.safetensors")):
        found |= load_file(file)
    return found


@cache
def logits_of(path: Path) -> Tensor:
    """In float64, of a fixed batch."""
    (tokens,) = token_batches((2, 20))
    with torch.inference_mode():
        return float_model(path, torch.float64, attn_implementation="eager")(tokens).logits


def distance(recipe: Recipe) -> float:
    """Relative distance of the smoothed model's logits, as transformers loads it, from the original's."""
    original = logits_of(Path(recipe["model"]["path"]))
    found = logits_of(Path(recipe["output"]) / "smooth" / "model")
    return float((found - original).norm() / original.norm())


@pytest.mark.parametrize(("family", "method"), FAMILY_METHODS)
def test_methods_make_folds_that_change_nothing(family: str, method: str, recipe: Callable[..., Recipe]) -> None:
    asked = recipe(family, {"method": method, "save_model": True})
    outcomes = smoothed(asked)
    assert distance(asked) < EXACT
    assert not [outcome for outcome in outcomes if outcome["reason"]]
    taken = METHODS[method] & (FAMILIES | FURTHER)[family]
    assert {outcome["fold"] for outcome in outcomes} == taken
    kept = {outcome["input"] for outcome in outcomes if outcome["kept"]}
    assert {outcome["fold"] for outcome in outcomes if outcome["kept"]} == taken
    assert {f"{name}.scale" for name in kept} == scales(asked).keys()
    for scale in scales(asked).values():
        assert scale.max() / scale.min() > (1.2 if method == "balance" else 1.5)  # m2 and m5 leave the most at 1


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "phi3", "falcon"])
def test_awq_through_shared_heads_changes_nothing(family: str, recipe: Callable[..., Recipe]) -> None:
    """As the recipe w4a16-awq has it, where one head of values gives a scale to two of queries, or to all (falcon)."""
    weights = {"bits": 4, "granularity": "group", "group_size": 16}
    smooth = {"method": "m3", "folds": sorted(ALL), "save_model": True, "search_tokens": 96}
    asked = recipe(family, smooth, quantize={"weights": weights, "activations": {"bits": 16}})
    outcomes = smoothed(asked)
    assert distance(asked) < EXACT
    assert not [outcome for outcome in outcomes if outcome["reason"]]
    folds = (FAMILIES | FURTHER)[family]
    assert {outcome["fold"] for outcome in outcomes if outcome["kept"]} == folds == {each["fold"] for each in outcomes}
    found = scales(asked)
    through = [outcome["input"] for outcome in outcomes if outcome["kept"] and outcome["fold"] == "attention"]
    assert through
    shared = {"falcon": 1}.get(family, 2)  # heads of values, which 4 heads of queries share
    for name in through:
        heads = found[f"{name}.scale"].view(shared, 4 // shared, -1)
        assert torch.equal(heads, heads[:, :1].expand_as(heads))
        assert heads.max() / heads.min() > 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_lowers_the_error_of_every_group_that_it_scales(family: str, recipe: Callable[..., Recipe]) -> None:
    asked = recipe(family, {"method": "auto", "save_model": True})
    outcomes = smoothed(asked)
    assert distance(asked) < EXACT
    assert {outcome["fold"] for outcome in outcomes} == FAMILIES[family]
    kept = [outcome for outcome in outcomes if outcome["kept"]]
    assert {f"{outcome['input']}.scale" for outcome in kept} == scales(asked).keys()
    assert "norm" in {outcome["fold"] for outcome in kept}
    for outcome in outcomes:
        assert outcome["error_after"] <= outcome["error_before"]
        assert outcome["kept"] or outcome["chosen"].startswith("none")
    for outcome in kept:
        if outcome["fold"] == "norm":  # whose input has an outlier by its gain
            assert outcome["ratio_after"] < outcome["ratio_before"] / 2
            assert outcome["error_after"] < outcome["error_before"]


@pytest.mark.parametrize(("family", "method"), FAMILY_ROTATIONS)
def test_rotations_change_nothing(family: str, method: str, recipe: Callable[..., Recipe]) -> None:
    rotation = {"seed": 3, "hidden": family not in UNROTATED}
    asked = recipe(family, {"method": method, "rotation": rotation, "save_model": True})
    outcomes = smoothed(asked)
    assert distance(asked) < EXACT
    assert not [outcome for outcome in outcomes if outcome["reason"]]
    assert bool(scales(asked)) == (method == "auto")
    assert read(asked, "smooth", "manifest.json")["rotated"] == ["residual stream"] * rotation["hidden"] + ["heads"]
    before = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    after = load_file(next((Path(asked["output"]) / "smooth" / "model").glob("*.safetensors")))
    turned = [name for name in before if before[name].ndim == 2 and not torch.equal(before[name], after[name])]
    wanted = [name for name in before if before[name].ndim == 2 and ("embed" in name or "wte" in name)]
    assert set(wanted) <= set(turned) or not rotation["hidden"]
    assert any(re.search(r"(o_proj|out_proj|c_proj|dense)\.weight", name) for name in turned)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "phi3"])
def test_a_smoothed_export_is_nearer_to_the_float_model(family: str, recipe: Callable[..., Recipe]) -> None:
    asked = recipe(family, {"method": "auto"})
    quantcli.run(asked)
    divergence = read(asked, "eval-ppl", "results.json")["kl_divergence"]
    exported = load_file(Path(asked["output"]) / "export" / "compressed-tensors" / "model.safetensors")
    original = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    first = "qkv_proj" if family == "phi3" else "q_proj"
    scale = scales(asked)[f"model.layers.0.self_attn.{first}.scale"]
    torch.testing.assert_close(exported[norm], original[norm] / scale, rtol=1e-6, atol=0)
    plain = {key: value for key, value in asked.items() if key != "smooth"}
    quantcli.run(plain)
    assert 0 < divergence < read(plain, "eval-ppl", "results.json")["kl_divergence"]


def test_a_fold_that_changes_the_block_is_undone(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong map of channels from up to down, so that the wrong rows give away the scale."""
    right = Producer.channels

    def channels(self: Producer, width: int) -> list[int]:
        return right(self, width)[::-1] if self.name.endswith("up_proj") else right(self, width)

    monkeypatch.setattr(Producer, "channels", channels)
    asked = recipe("llama-tied", {"method": "m4", "save_model": True})
    undone = {name for name in (outcome["input"] for outcome in smoothed(asked)) if name.endswith("down_proj")}
    outcomes = {outcome["input"]: outcome for outcome in smoothed(asked)}
    events = [json.loads(line) for line in (Path(asked["output"]) / "events.jsonl").read_text().splitlines()]
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert len(undone) == 2
    for name, outcome in outcomes.items():
        assert outcome["kept"] == (name not in undone)
        assert (f"{name}.scale" in scales(asked)) == (name not in undone)
        if name in undone:
            assert outcome["difference"] > 1e-2
            assert outcome["reason"].startswith("the fold would change the output of the block by ")
            assert any(text.startswith(f"{name} is not smoothed: the fold would change") for text in warnings)
        else:
            assert outcome["difference"] < 1e-5
        assert outcome["cause"] == ("check" if name in undone else "")
    assert read(asked, "smooth", "manifest.json")["left"] == {"check": 2}
    assert distance(asked) < EXACT


def test_an_obstacle_is_told_once_with_its_blocks(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two causes that leave groups, each is counted by itself."""
    asked = recipe("llama-tied", {"method": "outlier_suppression", "folds": ["norm", "mlp"]})
    found = find_structure(Path(asked["model"]["path"]))

    def hindered(shared: SharedInput) -> SharedInput:
        assert shared.producer is not None
        obstacle = "up is also read by act" if shared.name.endswith("down_proj") else ""
        return replace(shared, producer=replace(shared.producer, obstacle=obstacle))

    blocks = tuple(replace(block, inputs=tuple(map(hindered, block.inputs))) for block in found.blocks)
    monkeypatch.setattr(engine, "float_structure", lambda *_, **__: replace(found, blocks=blocks))
    outcomes = smoothed(asked)
    events = [json.loads(line) for line in (Path(asked["output"]) / "events.jsonl").read_text().splitlines()]
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert warnings == ["mlp.down_proj of blocks 0 to 1 is not smoothed: up is also read by act."]
    assert [outcome["cause"] for outcome in outcomes if outcome["reason"]] == ["obstacle"] * 2
    assert read(asked, "smooth", "manifest.json")["left"] == {"obstacle": 2}
    assert fallbacks(Path(asked["output"]), ("smooth",)) == {"not_smoothed": 2}


def test_blocks_whose_values_are_not_rotated_are_counted(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe("llama-tied", {"method": "rotate"})
    found = smooth.rotatable_heads
    monkeypatch.setattr(smooth, "rotatable_heads", lambda *arguments: found(*arguments)[:1])
    smoothed(asked)
    assert fallbacks(Path(asked["output"]), ("smooth",)) == {"not_rotated": 1}


@pytest.mark.parametrize(
    ("indices", "words"), [([3], "block 3"), ([0, 1, 2, 5], "blocks 0 to 2, 5"), ([0, 2, 3], "blocks 0, 2 to 3")]
)
def test_blocks_are_told_by_their_ranges(indices: list[int], words: str) -> None:
    assert smooth._blocks(indices) == words


def test_what_is_excluded_stays_as_it_is(recipe: Callable[..., Recipe]) -> None:
    """By a linear, or by the norm that would absorb the scale."""
    whole = {outcome["input"] for outcome in smoothed(recipe("llama-tied", {"method": "m4"}))}
    patterns = ["*.0.mlp.*", "model.layers.1.input_layernorm"]
    asked = recipe("llama-tied", {"method": "m4", "exclude": patterns, "save_model": True})
    found = {outcome["input"] for outcome in smoothed(asked)}
    left = {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    assert whole - found == left
    assert not found - whole
    before = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    after = load_file(next((Path(asked["output"]) / "smooth" / "model").glob("*.safetensors")))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")} <= same
    assert {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk"} <= same
    assert "model.layers.1.input_layernorm.weight" in same


@pytest.mark.parametrize(("scope", "seen"), [("tensor", 30), ("token", 24)])
def test_auto_sees_every_sample_where_inputs_have_static_scales(
    scope: str, seen: int, recipe: Callable[..., Recipe]
) -> None:
    told: list[int] = []
    asked = recipe("llama", {"method": "auto"}, calibration__samples=30, quantize__activations__scope=scope)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "tokens":
            told.append(event["samples"])

    engine.run_recipe(load_recipe(asked), until="smooth", listener=listen)
    assert told == [seen]


@pytest.mark.parametrize("folds", [["norm"], ["attention"], ["mlp"], ["norm", "mlp"]])
def test_only_the_folds_that_are_asked_for(folds: list[str], recipe: Callable[..., Recipe]) -> None:
    for method in ("m1", "auto"):
        asked = recipe("llama-tied", {"method": method, "folds": folds})
        assert {outcome["fold"] for outcome in smoothed(asked)} == set(folds)


def test_shifts_go_into_biases(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("opt", {"method": "m1", "shift": True, "save_model": True}, calibration__bos=False)
    smoothed(asked)
    shifts = {name: value for name, value in scales(asked).items() if name.endswith(".shift")}
    assert {name.rsplit(".", 2)[-2] for name in shifts} == {"q_proj", "fc1"}
    assert all(float(value.abs().max()) > 0.1 for value in shifts.values())
    before = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    after = load_file(next((Path(asked["output"]) / "smooth" / "model").glob("*.safetensors")))
    layer = "model.decoder.layers.0"
    scale, shift = (scales(asked)[f"{layer}.fc1.{part}"] for part in ("scale", "shift"))
    bias = (before[f"{layer}.final_layer_norm.bias"] - shift) / scale
    torch.testing.assert_close(after[f"{layer}.final_layer_norm.bias"], bias, rtol=1e-5, atol=1e-6)
    bias = before[f"{layer}.fc1.bias"] + before[f"{layer}.fc1.weight"] @ shift
    torch.testing.assert_close(after[f"{layer}.fc1.bias"], bias, rtol=1e-4, atol=1e-5)
    assert distance(asked) < EXACT


@pytest.mark.parametrize("scope", ["tensor", "token"])
@pytest.mark.parametrize("method", ["m1", "auto"])
def test_a_shift_never_makes_the_error_larger(method: str, scope: str, recipe: Callable[..., Recipe]) -> None:
    inputs = {"bits": 8, "scope": scope}
    # with this text some shifts help and some do not
    text = {"calibration__bos": False, "calibration__samples": 6}
    asked = recipe("opt", {"method": method, "shift": True}, quantize__activations=inputs, **text)
    shifted = {outcome["input"]: outcome for outcome in smoothed(asked)}
    taken = {name for name, outcome in shifted.items() if outcome.get("shifted")}
    assert 0 < len(taken) < len([outcome for outcome in shifted.values() if "shifted" in outcome])
    assert {f"{name}.shift" for name in taken} == {name for name in scales(asked) if name.endswith(".shift")}
    for outcome in smoothed(changed(asked, smooth__shift=False)):
        assert shifted[outcome["input"]]["error_after"] <= outcome["error_after"]


def test_a_fold_whose_shift_fails_the_check_is_tried_without(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer whose bias keeps what its readers' biases get as well."""
    monkeypatch.setattr(folding, "_shift_and_divide", lambda scale, _shift: lambda bias: bias.div_(scale.to(bias)))
    asked = recipe("opt", {"method": "m1", "shift": True, "save_model": True}, calibration__bos=False)
    outcomes = smoothed(asked)
    assert all(outcome["kept"] and outcome["difference"] < 1e-5 for outcome in outcomes)
    assert {f"{outcome['input']}.scale" for outcome in outcomes} == scales(asked).keys()
    events = [json.loads(line) for line in (Path(asked["output"]) / "events.jsonl").read_text().splitlines()]
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert any("fc1 is not shifted: the fold would change the output of the block by" in text for text in warnings)
    assert distance(asked) < EXACT


def test_every_linear_of_a_group_is_judged_by_its_own_scheme(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("llama-tied", {"method": "m1"}, export=None, evaluate=None)
    before = {outcome["input"]: outcome["error_before"] for outcome in smoothed(asked)}
    overrides = [{"match": "*.v_proj", "weights": {"bits": 4}, "activations": {"bits": 16}}]
    mixed = changed(asked, quantize__overrides=overrides, quantize__rollback__siblings="apart")
    for outcome in smoothed(mixed):
        v = "attention" if outcome["fold"] == "norm" and "q_proj" in outcome["input"] else ""
        assert (outcome["error_before"] > 3 * before[outcome["input"]]) == bool(v)


def test_nothing_is_shifted_where_no_bias_would_take_it(recipe: Callable[..., Recipe]) -> None:
    smoothed(asked := recipe("llama-tied", {"method": "m1", "shift": True}))
    assert scales(asked)
    assert not [name for name in scales(asked) if name.endswith(".shift")]


def test_a_stream_that_cannot_be_rotated_is_refused_before_anything_is_written(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("gemma2", {"method": "rotate"})
    with pytest.raises(RecipeError, match="post_attention_layernorm") as caught:
        quantcli.run(asked)
    assert caught.value.exit_code == 2
    assert "smooth.rotation.hidden: false" in caught.value.remedy
    assert not Path(asked["output"]).exists()


def test_a_killed_stage_goes_on_to_the_same_bytes(
    recipe: Callable[..., Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    asked = recipe("llama-tied", {"method": "m4", "save_model": True}, model__cache_memory="0B")
    kill_at(29, changed(asked, export=None, evaluate=None), tree, tmp_path / "run")


@pytest.mark.parametrize("killed", [False, True])
def test_a_saved_model_goes_with_the_recipe_that_asked_for_it(killed: bool, recipe: Callable[..., Recipe]) -> None:
    """And nothing else goes, whether the stage was completed or not."""
    asked = recipe("llama-tied", {"method": "m1", "save_model": True})
    model = Path(asked["output"]) / "smooth" / "model"
    if killed:
        with pytest.raises(Interrupted):
            engine.run_recipe(load_recipe(asked), until="smooth", listener=interrupt("smooth", 2, "file"))
    else:
        smoothed(asked)
    assert (model / "model.safetensors").is_file()
    foreign = [model / "notes.txt", model / "config.json.old", model.parent / "block.json"]
    for file in foreign:
        file.write_text("mine")
    smoothed(changed(asked, smooth__save_model=False))
    assert sorted(model.iterdir()) == sorted(foreign[:2])
    assert foreign[2].is_file()
    for file in foreign[:2]:
        file.unlink()
    smoothed(asked)
    smoothed(changed(asked, smooth__save_model=False))
    assert not model.exists()


def test_memory_of_the_cache_makes_no_difference(
    recipe: Callable[..., Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    found = []
    for number, memory in enumerate(("0B", "1GiB")):
        output = tmp_path / str(number)
        asked = recipe("qwen3", {"method": "auto"}, model__cache_memory=memory, output=str(output))
        smoothed(asked)
        found.append(artifacts(tree, output / "smooth"))
    assert found[0] == found[1]
    assert any(name.endswith("00001.safetensors") for name in found[0])


def test_what_depends_on_smoothing_runs_again(recipe: Callable[..., Recipe]) -> None:
    def ran(asked: Recipe) -> set[str]:
        return {name for name, record in quantcli.run(asked).stages.items() if not record["reused"]}

    asked = recipe("llama-tied", {"method": "m1"}, model__sanity_check="warn")
    whole = ran(asked)
    assert {"check", "smooth", "calibrate", "quantize", "export", "verify", "eval-ppl"} <= whole
    assert not ran(asked)
    behind = {"smooth", "calibrate", "quantize", "export", "verify", "eval-ppl"}
    assert ran(changed(asked, smooth__alpha=0.7)) & behind == behind
    assert "check" not in ran(changed(asked, smooth__alpha=0.6))
    plain = {key: value for key, value in asked.items() if key != "smooth"}
    assert {"calibrate", "quantize", "export"} <= ran(plain)


def test_the_outcome_of_a_group_tells_what_scales_did_to_its_outliers(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("llama-tied", {"method": "m1"}, calibration__bos=False)
    outcomes = smoothed(asked)
    other = smoothed(changed(asked, smooth__alpha=0.0))
    for outcome, without in zip(outcomes, other, strict=True):
        assert outcome["largest_after"] < outcome["largest_before"]
        assert outcome["ratio_after"] < outcome["ratio_before"] / 2
        assert without["largest_before"] == outcome["largest_before"]
        assert without["ratio_before"] == outcome["ratio_before"] > 3
        assert outcome["error_before"] == without["error_before"] > 0


@pytest.mark.parametrize("method", ["awq", "auto"])
def test_weights_are_clipped_when_they_are_quantized_and_not_in_the_float_model(
    method: str, recipe: Callable[..., Recipe]
) -> None:
    """Bounds lie beside the scales, the codes come from bounded weights, and the smoothed model is as it was."""
    weights = {"bits": 4, "granularity": "group", "group_size": 16}
    quantize = {"weights": weights, "activations": {"bits": 16}}
    asked = recipe("llama", {"method": method, "save_model": True}, quantize=quantize)
    engine.run_recipe(load_recipe(asked), until="quantize")
    assert distance(asked) < EXACT
    clips = {name: bounds for name, bounds in scales(asked).items() if name.endswith(".clip.int4")}
    assert len(clips) == 14  # the linears of two blocks, those that nothing is folded into too
    for file in (Path(asked["output"]) / "quantize").glob("block-*.safetensors"):
        for name, scale in load_file(file).items():
            linear, _, part = name.rpartition(".")
            if part in ("scale", "weight_scale") and f"{linear}.clip.int4" in clips:
                assert (scale.abs().float() * 8 <= clips[f"{linear}.clip.int4"] * 1.01).all()
    plain = recipe("llama", {"method": method, "clip": False}, quantize=quantize)
    smoothed(plain)
    assert not [name for name in scales(plain) if name.endswith(".clip.int4")]


def test_awq_clips_weights_of_one_scale_by_one_bound(recipe: Callable[..., Recipe]) -> None:
    quantize = {"weights": {"bits": 4, "granularity": "tensor"}, "activations": {"bits": 16}}
    asked = recipe("llama", {"method": "awq", "clip": True}, quantize=quantize)
    engine.run_recipe(load_recipe(asked), until="quantize")
    clips = {name: bounds for name, bounds in scales(asked).items() if name.endswith(".clip.int4")}
    assert len(clips) == 14
    held = 0
    for file in (Path(asked["output"]) / "quantize").glob("block-*.safetensors"):
        for name, scale in load_file(file).items():
            linear, _, part = name.rpartition(".")
            if part in ("scale", "weight_scale") and (bounds := clips.get(f"{linear}.clip.int4")) is not None:
                assert bounds.shape == scale.shape == (1, 1)
                assert float(scale.abs()) * 8 <= float(bounds) * 1.01
                held += 1
    assert held == 14


def test_bounds_for_four_bits_do_not_hold_a_weight_that_was_rolled_back_to_eight(recipe: Callable[..., Recipe]) -> None:
    """Which linears go back is found on the smoothed model, behind the bounds; both have a scale a channel."""
    quantize = {
        "weights": {"bits": 4, "granularity": "channel"},
        "activations": {"bits": 16},
        "rollback": {"level": 2, "to": "W8A16", "metric": "output_error"},
    }
    asked = recipe("llama", {"method": "awq", "save_model": True, "clip": True}, quantize=quantize)
    engine.run_recipe(load_recipe(asked), until="quantize")
    clips = {name.split(".clip.")[0]: bounds for name, bounds in scales(asked).items() if ".clip." in name}
    smooth = load_file(next((Path(asked["output"]) / "smooth" / "model").glob("*.safetensors")))
    back = 0
    for file in (Path(asked["output"]) / "quantize").glob("block-*.safetensors"):
        for name, scale in load_file(file).items():
            linear, _, part = name.rpartition(".")
            ranges = smooth[f"{linear}.weight"].abs().amax(1, keepdim=True) if part == "scale" else scale.new_zeros(1)
            if part == "scale" and bool((scale.abs() * 64 < ranges).all()):  # eight bits
                assert (scale.abs() * 128 >= ranges * 0.999).all()
                back += bool((clips[linear] < ranges * 0.99).any())
    assert back > 0


@pytest.mark.parametrize("method", ["auto", "m1", "m2", "m3", "m4", "m5", "m6", "rotate"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_weight_is_named(recipe: Callable[..., Recipe], tmp_path: Path, method: str, value: float) -> None:
    whole = recipe("llama", {"method": method})
    model = Path(shutil.copytree(whole["model"]["path"], tmp_path / "damaged"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    place = r"layers\.1 puts out" if method == "rotate" else r"layers\.1\.self_attn\.k_proj\.weight holds"
    with pytest.raises(ModelError, match=f"{place} values that are not finite"):
        quantcli.run_stage("smooth", changed(whole, model__path=str(model)))


@pytest.mark.parametrize("lengths", [(64, 64, 64), (2,), (1, 0, 1), (0, 1, 0, 1), (0, 2), (1,) * 600, (700, 700, 700)])
def test_tokens_are_left_to_fit_to_and_to_judge_by(lengths: tuple[int, ...]) -> None:
    """Of samples of which a rare expert saw one token or none, too."""
    chosen = _fitted(lengths)
    assert len(chosen) == sum(lengths)
    assert 0 < int(chosen.sum()) < len(chosen)
    if min(lengths) > 1:  # first tokens are on both sides
        first = [bool(part[0]) for part in chosen.split(lengths)]
        assert first == [i % 2 == 0 for i in range(len(lengths))]


def test_balance_knows_the_second_moments_of_all_tokens(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every group it is given E[x xᵀ] over all tokens of the samples that are looked at, and groups of weights."""
    seen: list[Group] = []
    method = SMOOTHING_METHODS["balance"]

    def watched(group: Group, error: ErrorOf) -> Found:
        seen.append(group)
        return method.find(group, error)

    monkeypatch.setitem(SMOOTHING_METHODS, "balance", method._replace(find=watched))
    weights = {"bits": 4, "granularity": "group", "group_size": 16, "method": "gptq"}
    rollback = {"names": ["*.0.mlp.up_proj"], "siblings": "apart"}
    quantize = {"weights": weights, "activations": {"bits": 16}, "rollback": rollback}
    asked = recipe("llama", {"method": "balance"}, quantize=quantize)
    outcomes = smoothed(asked)
    assert all(0 < outcome["loss"] < 1 for outcome in outcomes)
    with opened(asked, "smooth") as context:
        samples = torch.tensor(calibration_samples(context).samples)
    model, entering = float_model(Path(asked["model"]["path"])), {}
    for name in {outcome["linears"][0] for outcome in outcomes}:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: entering.update({name: args[0].flatten(0, 1)})
        )
    with torch.inference_mode():
        model(samples)
    for group, outcome in zip(seen, outcomes, strict=True):
        x = entering[outcome["linears"][0]]
        assert group.counted == len(x) == samples.numel()
        assert group.moments is not None
        torch.testing.assert_close(group.moments, x.t() @ x / len(x), rtol=1e-3, atol=1e-5)
        assert group.ranges == tuple(None if name.endswith("0.mlp.up_proj") else 16 for name in outcome["linears"])
