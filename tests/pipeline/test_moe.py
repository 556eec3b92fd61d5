"""Mixture-of-experts models from plan to evaluation, against models whose experts are quantized by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, read
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
from quantcli.pipeline.verify import verify_path

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
