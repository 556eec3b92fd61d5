"""Mixture-of-experts models from plan to evaluation, against models whose experts are quantized by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, opened, read
from safetensors.torch import load_file
from tiny_models import save_tiny_model, token_batches
from torch import Tensor

import quantcli
from quantcli.errors import RecipeError
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.names import weight_tensors
from quantcli.model.skeleton import Skeleton
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.grid import WeightGrid
from quantcli.quant.search import mse

Recipe = dict[str, Any]
FAMILIES = ("mixtral", "qwen2-moe", "deepseek-v3")
W4 = {"weights": {"bits": 4, "granularity": "group", "group_size": 32, "method": "minmax", "importance": "none"},
      "activations": {"bits": 16}}  # fmt: skip
W8 = {"weights": {"bits": 8, "method": "minmax", "importance": "none"}, "activations": {"bits": 16}}
EXPERTS = {"mixtral": "block_sparse_moe.experts", "qwen2-moe": "mlp.experts", "deepseek-v3": "mlp.experts"}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            save_tiny_model(family, made[family], with_tokenizer=True, max_shard_size="100KB")
        return made[family]

    return get


def recipe_of(model: Path, output: Path, quantize: dict[str, Any]) -> Recipe:
    (output.parent / "text.txt").write_text("The water rose, and the sheep went to the upper field. " * 40)
    return {
        "model": {"path": str(model), "sanity_check": "warn"}, "output": str(output), "quantize": quantize,
        "evaluate": {"perplexity": {"dataset": "text", "path": str(output.parent / "text.txt"), "windows": 2,
                                    "sequence_length": 32}},
    }  # fmt: skip


def by_hand(weight: Tensor, bits: int, group: int | None) -> Tensor:
    """Round to nearest, in float64 but for the scale as stored: 8 bits a row on [-127, 127], 4 bits a group on all
    codes, the weight of largest magnitude being code -8."""
    rows = weight.double().unflatten(1, (-1, group or weight.shape[1]))
    largest = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    scale = (largest.abs() / 127 if bits == 8 else largest / -8).float().double()
    return ((rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).flatten(1).float()


@pytest.mark.parametrize("scheme", ["W4 g32", "W8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_computes_what_experts_quantized_by_hand_do(
    family: str, scheme: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_of(model_of(family), tmp_path / "run", W4 if scheme == "W4 g32" else W8)
    plan = quantcli.plan(recipe)
    count = 8 if family == "deepseek-v3" else 4
    assert f"{count} experts in each of 2 layers" in plan.notes[0]
    quantcli.run(recipe)
    export = Path(recipe["output"]) / "export" / "compressed-tensors"

    reference = float_model(Path(recipe["model"]["path"]))
    stored = {n: t for file in export.glob("*.safetensors") for n, t in load_file(file).items()}
    floats = {n: t for f in model_of(family).glob("*.safetensors") for n, t in load_file(f).items()}
    parts: dict[str, Tensor] = dict(floats)
    for name, scheme_of in plan.schemes.items():
        weight = floats[f"{name}.weight"]
        parts[f"{name}.weight"] = by_hand(weight, scheme_of[1].bits, scheme_of[1].group_size)
        assert f"{name}.weight_packed" in stored
    for block in plan.structure.blocks:
        for experts in block.experts:
            entering, leaving = (reference.get_parameter(name) for name in experts.parameters)
            for index, names in enumerate(experts.linears):
                weights = [parts[f"{name}.weight"] for name in names]
                entering.data[index] = torch.cat(weights[:-1])
                leaving.data[index] = weights[-1]
        for linear in block.linears:
            if linear.name in plan.schemes and linear.name not in {n for e in block.experts for n in e.names}:
                reference.get_submodule(linear.name).weight.data = parts[f"{linear.name}.weight"]
    assert any(f"{EXPERTS[family]}.3." in name for name in plan.schemes)

    structure = discover(model_of(family))
    linears = {linear.name: linear for linear in structure.matrices()}
    names = weight_tensors(model_of(family), structure, Checkpoint(model_of(family)).entries)
    skeleton = Skeleton(model_of(family), structure, checkpoint=QuantizedCheckpoint(export, linears, names))
    (tokens,) = token_batches((2, 24))
    with torch.inference_mode(), skeleton.resident(skeleton.model.state_dict()):
        torch.testing.assert_close(skeleton.model(tokens).logits, reference(tokens).logits, rtol=1e-5, atol=1e-5)
    results = read(recipe, "eval-ppl", "results.json")
    assert math.isfinite(results["quantized"]["value"])
    assert results["kl_divergence"] > 0
    assert verify_path(export.parents[1])["compressed-tensors: linears"] == len(plan.schemes)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_stay_in_float_and_say_so(family: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    plan = quantcli.plan(recipe_of(model_of(family), tmp_path / "run", W4))
    routers = {name for block in plan.structure.blocks for name in block.routers}
    assert routers
    assert {plan.kept[name] for name in routers} == {"router of experts, stays in float"}
    assert routers | {"lm_head"} == set(plan.kept)


def test_one_expert_that_is_rolled_back_takes_its_layer_along(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipe_of(model_of("mixtral"), tmp_path / "run", {**W4, "rollback": {"names": ["*.1.*.experts.2.w1"]}})
    plan = quantcli.plan(recipe)
    kept = {name: reason for name, reason in plan.kept.items() if ".experts." in name}
    assert set(kept) == {f"model.layers.1.block_sparse_moe.experts.{i}.w{k}" for i in range(4) for k in (1, 2, 3)}
    assert kept.pop("model.layers.1.block_sparse_moe.experts.2.w1") == "rolled back by *.1.*.experts.2.w1"
    assert set(kept.values()) == {"experts of a layer have one scheme in serving engines"}
    assert any("11 linears are rolled back because" in note for note in plan.notes)
    quantcli.run(recipe)
    config = json.loads((tmp_path / "run/export/compressed-tensors/config.json").read_text())
    assert set(kept) < set(config["quantization_config"]["ignore"])

    apart = changed(recipe, quantize__rollback__siblings="apart")
    assert [name for name in quantcli.plan(apart).kept if ".experts." in name] == [
        "model.layers.1.block_sparse_moe.experts.2.w1"
    ]


def test_experts_of_a_layer_with_two_schemes_are_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    wider = {"match": "*.experts.*.down_proj", "scheme": "W8A16", "weights": {"method": "minmax", "importance": "none"}}
    recipe = recipe_of(model_of("qwen2-moe"), tmp_path / "run", {**W4, "overrides": [wider]})
    with pytest.raises(RecipeError, match=r"fuse them into one layer of experts"):
        quantcli.plan(recipe)
    whole = changed(recipe, quantize__overrides=[{**wider, "match": "*.experts.*"}])
    schemes = {scheme.name for name, (_, scheme) in quantcli.plan(whole).schemes.items() if ".experts." in name}
    assert schemes == {"W8A16"}


MSE = {"bits": 4, "granularity": "group", "group_size": 32, "method": "mse"}
WEIGHTED = {"weights": {**MSE, "importance": "second_moment"}, "activations": {"bits": 16}}
CALIBRATION = {"dataset": "text", "samples": 4, "sequence_length": 16}


def calibrated(model: Path, output: Path, quantize: dict[str, Any], **calibration: Any) -> Recipe:
    recipe = recipe_of(model, output, quantize)
    del recipe["evaluate"]
    section = {**CALIBRATION, "path": str(output.parent / "text.txt"), **calibration}
    return {**recipe, "calibration": section, "export": None}


def test_scales_of_experts_heed_the_tokens_that_each_saw(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """With a bar between the least and the most tokens, experts above it have the codes of their own second moments,
    those below it the codes without."""
    model = model_of("deepseek-v3")
    recipe = calibrated(model, tmp_path / "run", WEIGHTED, expert_tokens=1)
    quantcli.run(recipe)
    plain = calibrated(model, tmp_path / "plain", {**WEIGHTED, "weights": {**MSE, "importance": "none"}})
    quantcli.run(plain)
    manifest = read(recipe, "calibrate", "manifest.json")
    moments = load_file(tmp_path / "run" / "calibrate" / "block-00002.safetensors")
    structure = discover(model)
    (experts,) = structure.blocks[2].experts
    counts = {names[0]: int(moments[f"{names[0]}.count"]) for names in experts.linears}
    assert sum(counts.values()) == manifest["tokens"] * 2, "every token goes to two experts"
    bar = sorted(counts.values())[4] + 1
    assert min(counts.values()) < bar <= max(counts.values())

    result = quantcli.run(changed(recipe, calibration__expert_tokens=bar))
    few = {name for name, count in counts.items() if count < bar}
    found = result.to_json()["experts"]
    assert (found["observed"], found["least"]) == (16, bar)
    assert {name for name in found["few"] if name.startswith(structure.blocks[2].name)} == few
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    texts = [event["text"] for event in events if event["event"] == "warning" and "experts" in event["text"]]
    assert any(all(f"{name} ({counts[name]})" in text for name in few) for text in texts)

    floats = {n: t for f in model.glob("*.safetensors") for n, t in load_file(f).items()}
    stored = load_file(tmp_path / "run" / "quantize" / "block-00002.safetensors")
    without = load_file(tmp_path / "plain" / "quantize" / "block-00002.safetensors")
    for names in experts.linears:
        for name in names:
            first = names[-1] if name == names[-1] else names[0]
            importance = None if names[0] in few else moments[f"{first}.second_moment"]
            grid = WeightGrid(4, True, "group", 32, torch.float32)
            assert torch.equal(mse(floats[f"{name}.weight"], grid, importance).codes, stored[f"{name}.codes"])
            assert torch.equal(stored[f"{name}.codes"], without[f"{name}.codes"]) == (names[0] in few)


def test_all_tokens_at_all_experts(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = calibrated(model_of("mixtral"), tmp_path / "run", WEIGHTED, route_all_experts=True)
    result = quantcli.run(recipe)
    assert result.to_json()["experts"] == {"observed": 8, "least": 64, "few": {}}
    moments = load_file(tmp_path / "run" / "calibrate" / "block-00001.safetensors")
    counts = [int(count) for name, count in moments.items() if name.endswith(".w1.count")]
    assert counts == [64] * 4
    entering = [moment for name, moment in moments.items() if name.endswith(".w1.second_moment")]
    assert all(torch.equal(moment, entering[0]) for moment in entering), "all see one input"


def test_experts_in_integers_are_evaluated_as_they_are_served(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    """W8A8 with a scale a token is near the float model, and is not the model of W8A16."""
    int8 = {"weights": {"bits": 8}, "activations": {"bits": 8, "scope": "token"}}
    scores = []
    for name, quantize in (("a8", int8), ("a16", W8)):
        recipe = recipe_of(model_of("qwen2-moe"), tmp_path / name, quantize)
        quantcli.run(recipe)
        scores.append(read(recipe, "eval-ppl", "results.json")["kl_divergence"])
    assert scores[1] < scores[0] < 0.05
    in_float = {**int8, "overrides": [{"match": "*.experts.*", "scheme": "float"}]}
    recipe = recipe_of(model_of("qwen2-moe"), tmp_path / "float", in_float)
    quantcli.run(recipe)
    assert 0 < read(recipe, "eval-ppl", "results.json")["kl_divergence"] < scores[0]


@pytest.mark.parametrize(
    ("quantize", "reason"),
    [
        ({"activations": {"bits": 8}}, "engines have no static scales"),
        (
            {"weights": {"bits": 8}, "activations": {"bits": 8, "scope": "token"}, "rollback": {"level": 2}},
            "inputs of experts are not ranked by",
        ),
    ],
)
def test_what_experts_cannot_have_is_refused(
    quantize: dict[str, Any], reason: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("words")
    recipe = calibrated(model_of("mixtral"), tmp_path / "run", quantize)
    with pytest.raises(RecipeError, match=reason):
        quantcli.plan(recipe)


@pytest.mark.parametrize("metric", ["output_error", "block_error", "kl_divergence"])
def test_experts_are_ranked_and_rolled_back_by_layers(
    metric: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Experts of 2 bits hurt more than the rest of 8."""
    two = {"match": "*.1.*.experts.*", "weights": {"bits": 2, "method": "minmax"}}
    quantize = {**W8, "overrides": [two], "rollback": {"level": 1, "metric": metric}}
    recipe = calibrated(model_of("mixtral"), tmp_path / "run", quantize)
    result = quantcli.run(recipe)
    found = read(recipe, "sensitivity", "sensitivity.json")
    assert found["metric"] == metric
    experts = [row for row in found["linears"] if ".experts." in row["name"]]
    assert all(row[metric] is not None for row in experts)
    assert {row["name"] for row in found["linears"][:12]} == {
        row["name"] for row in experts if ".layers.1." in row["name"]
    }
    kept = {name for name in result.plan.kept if ".experts." in name}
    assert kept == {row["name"] for row in experts if ".layers.1." in row["name"]}


def test_output_errors_of_experts_are_those_of_their_tokens(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = calibrated(
        model_of("qwen2-moe"), tmp_path / "run", {**W4, "rollback": {"level": 1, "metric": "output_error"}}
    )
    quantcli.run(recipe)
    rows = {row["name"]: row["output_error"] for row in read(recipe, "sensitivity", "sensitivity.json")["linears"]}
    model = float_model(model_of("qwen2-moe")).requires_grad_(False)
    inputs: list[tuple[Tensor, ...]] = []
    experts = model.get_submodule("model.layers.1.mlp.experts")
    experts.register_forward_pre_hook(lambda _module, args: inputs.append(args))
    with opened(recipe, "sensitivity") as context, torch.inference_mode():
        model(torch.tensor(calibration_samples(context).samples))
    ((hidden, index, _),) = inputs
    for expert in range(4):
        x = hidden[(index == expert).any(1)].double()
        for weight, name in zip(experts.gate_up_proj[expert].chunk(2), ("gate_proj", "up_proj"), strict=True):
            lost = x @ (by_hand(weight, 4, 32) - weight).double().T
            expected = float(lost.square().sum() / (x @ weight.double().T).square().sum())
            assert rows[f"model.layers.1.mlp.experts.{expert}.{name}"] == pytest.approx(expected, rel=1e-4)


def test_static_scales_behind_experts_are_found_on_quantized_ones(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """With propagation, what enters the second block has passed the experts of the first as they are quantized."""
    attention = {"bits": 8, "propagation": "quantized", "method": "minmax"}
    scales = []
    for bits in (8, 2):
        experts = {"match": "*.experts.*", "weights": {"bits": bits}, "activations": {"bits": 8, "scope": "token"}}
        quantize = {"activations": attention, "overrides": [experts]}
        recipe = calibrated(model_of("mixtral"), tmp_path / f"w{bits}", quantize)
        quantcli.run(recipe)
        folder = tmp_path / f"w{bits}" / "quantize"
        scales.append([
            load_file(folder / f"block-0000{i}.safetensors")[f"model.layers.{i}.self_attn.q_proj.input_scale"]
            for i in range(2)
        ])  # fmt: skip
    (first, second), (first_of_2, second_of_2) = scales
    assert torch.equal(first, first_of_2)
    assert not torch.equal(second, second_of_2)


ROUTES = {
    "mixtral": (W4, ["gptq", "compressed-tensors", "awq", "gptq"]),
    "qwen2-moe": (
        {"weights": W8["weights"], "activations": {"bits": 8, "scope": "token"}},
        ["ascend", "mindie", "compressed-tensors", "ascend"],
    ),
}


@pytest.mark.parametrize("family", ROUTES)
def test_experts_survive_every_conversion(family: str, model_of: Callable[[str], Path], tmp_path: Path) -> None:
    quantize, route = ROUTES[family]
    recipe = recipe_of(model_of(family), tmp_path / "run", quantize) | {"evaluate": None}
    quantcli.run(recipe | {"export": {"formats": route[:1]}})
    source = tmp_path / "run" / "export" / route[0]
    wanted = _codes(source)
    assert sum(EXPERTS[family] in name for name in wanted) == 2 * 4 * 3  # blocks, experts, linears
    for step, form in enumerate(route[1:]):
        convert_checkpoint(source, form, tmp_path / str(step))
        source = tmp_path / str(step)
        assert verify_path(source)["linears"] == len(wanted)
        found = _codes(source)
        assert found.keys() == wanted.keys()
        for name, (codes, scale) in wanted.items():
            assert torch.equal(found[name][0], codes), (form, name)
            assert torch.equal(found[name][1], scale), (form, name)


def _codes(checkpoint: Path) -> dict[str, tuple[Tensor, Tensor]]:
    _, held, _ = open_checkpoint(checkpoint)
    weights = {name: held.read_linear(name).weight for name in held.schemes}
    return {name: (weight.codes, weight.scale.float()) for name, weight in weights.items()}
