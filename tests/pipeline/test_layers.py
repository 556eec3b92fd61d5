"""Stage layers: the error of what each exported linear puts out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, read
from tiny_models import save_tiny_model
from torch import Tensor, nn
from transformers import AutoTokenizer

import quantcli

Recipe = dict[str, Any]


@torch.inference_mode()
def test_errors_are_those_of_the_exported_weights_on_inputs_of_the_float_model(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    recipe = changed(
        static_recipe(tmp_path / "run"),
        quantize={"weights": {"bits": 4}, "overrides": [{"match": "*.0.mlp.*", "weights": {"bits": 16}}]},
        export={"formats": ["dense"]},
        calibration=None,
    )
    quantcli.run_stage("layers", recipe)
    content = read(recipe, "layers", "errors.json")
    model = float_model(Path(recipe["model"]["path"]))
    exported = dict(float_model(tmp_path / "run" / "export" / "dense").named_modules())
    wanted: dict[str, float] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def compare(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            wanted[name] = float((exported[name](args[0]) - output).square().sum() / output.square().sum())

        return compare

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(look(name))
    text = Path(recipe["evaluate"]["perplexity"]["path"]).read_text()
    tokens = AutoTokenizer.from_pretrained(recipe["model"]["path"])(text).input_ids[:32]
    model(torch.tensor([tokens]))
    found = {row["name"]: row["output_error"] for row in content["linears"]}
    assert content["tokens"] == len(tokens)
    assert set(found) == {name for name in wanted if ".0.mlp." not in name}
    for name, error in found.items():
        assert error == pytest.approx(wanted[name], rel=1e-3), name
        assert error > 1e-4


def test_inputs_that_are_quantized_too_lose_more(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    errors = []
    for name, activations in (("weights", {"bits": 16}), ("both", {"bits": 8, "scope": "token"})):
        recipe = changed(static_recipe(tmp_path / name), quantize={"activations": activations})
        quantcli.run_stage("layers", recipe)
        errors.append({row["name"]: row["output_error"] for row in read(recipe, "layers", "errors.json")["linears"]})
    weights, both = errors
    assert weights.keys() == both.keys()
    assert all(0 < weights[name] < both[name] < 0.01 for name in weights)


def test_experts_that_nothing_reached_have_no_error(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    model = save_tiny_model("mixtral", tmp_path / "model", with_tokenizer=True)
    recipe = changed(
        static_recipe(tmp_path / "run"), model__path=str(model), quantize={}, evaluate__output_error__tokens=2
    )
    quantcli.run_stage("layers", recipe)
    named = [row["name"] for row in read(recipe, "layers", "errors.json")["linears"]]
    reached = {name.rpartition(".")[0] for name in named if ".experts." in name}
    # the first token or two choose two of four experts each
    assert all(2 <= sum(f".{block}." in name for name in reached) <= 4 for block in range(2))
    assert sum("q_proj" in name for name in named) == 2
    assert len(reached) < 8
