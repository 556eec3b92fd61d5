"""The recipes that users copy: they load, describe themselves and mean what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcli.errors import OutputError, RecipeError
from quantcli.recipe import (
    copy_shipped,
    load_recipe,
    resolved_yaml,
    shipped_description,
    shipped_names,
    shipped_path,
)
from quantcli.recipe import shipped as shipped_module

# weight bits, granularity, activation bits, scope, calibration
SCHEMES = {
    "demo": (8, "channel", 8, "tensor", True),
    "w4a16": (4, "group", 16, "tensor", True),
    "w4a16-awq": (4, "group", 16, "tensor", True),
    "w4a16-gptq": (4, "group", 16, "tensor", True),
    "w4a16-best": (4, "group", 16, "tensor", True),
    "w8a16": (8, "group", 16, "tensor", False),
    "w8a8": (8, "channel", 8, "tensor", True),
    "w8a8-dynamic": (8, "channel", 8, "token", True),
    "w8a8-fp8": (8, "channel", 8, "token", False),
    "w8a8-fp8-static": (8, "channel", 8, "tensor", True),
    "w8a8-tuned": (8, "channel", 8, "tensor", True),
}


def test_every_shipped_recipe_is_listed() -> None:
    assert shipped_names() == sorted(SCHEMES)


@pytest.mark.parametrize("name", SCHEMES)
def test_shipped_recipes_load_with_model_and_output_and_mean_their_name(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, model="org/name", output=str(tmp_path / "out"))
    weights, activations = recipe.quantize.weights, recipe.quantize.activations
    scheme = (weights.bits, weights.granularity, activations.bits, activations.scope, recipe.calibration is not None)
    assert scheme == SCHEMES[name]
    assert weights.type == activations.type == ("float" if "fp8" in name else "int")
    assert recipe.evaluate is not None
    if recipe.quantize.rollback.target is None:  # a target is measured on what evaluate says
        assert load_recipe(name, ["evaluate=null"], model="org/name", output="o").evaluate is None
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize("name", sorted(set(SCHEMES) - {"demo"}))
def test_a_scheme_names_no_model(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert "model.path: is missing. Pass --model" in str(caught.value)
    assert "output: is missing. Pass --output" in str(caught.value)


def test_by_its_name_and_by_its_file_the_demo_is_the_same_in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped_path("demo").parent.parent)
    assert load_recipe("demo") == load_recipe("recipes/demo.yaml")


def test_demo_paths_start_at_its_file_and_by_name_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shipped_path("demo").parent.parent
    recipe = load_recipe(shipped_path("demo"))
    assert recipe.model.path == str(root / "models" / "SmolLM2-135M-Instruct.gguf")
    assert recipe.output == str(root / "runs" / "demo")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    by_name = load_recipe("demo")
    assert by_name.output == str(tmp_path / "here" / "runs" / "demo")
    assert by_name.model.path == str(tmp_path / "here" / "models" / "SmolLM2-135M-Instruct.gguf")
    assert recipe.quantize.rollback.names == ("*.mlp.down_proj",)


@pytest.mark.parametrize("name", SCHEMES)
def test_descriptions_say_when_and_at_what_cost(name: str) -> None:
    summary, *rest = shipped_description(name).splitlines()
    assert summary.endswith(".")
    assert len(summary) <= 118
    assert any(line.startswith("When: ") for line in rest)
    assert any(line.startswith("Cost: ") for line in rest)


def test_copies_are_exact_and_never_overwrite(tmp_path: Path) -> None:
    first = copy_shipped("w8a8", tmp_path)
    assert first == tmp_path / "w8a8.yaml"
    assert first.read_bytes() == shipped_path("w8a8").read_bytes()
    named = copy_shipped("w8a8", tmp_path / "mine.yaml")
    assert named.read_bytes() == first.read_bytes()
    first.write_text("mine")
    for destination in (tmp_path, first):
        with pytest.raises(OutputError, match=r"w8a8\.yaml: is there already"):
            copy_shipped("w8a8", destination)
    assert first.read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be written"):
        copy_shipped("w8a8", tmp_path / "absent" / "x.yaml")
    with pytest.raises(RecipeError, match="Did you mean w8a8"):
        copy_shipped("w8a", tmp_path)


def test_an_installed_package_carries_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "quantcli" / "recipe" / "shipped.py"
    (tmp_path / "quantcli" / "shipped_recipes").mkdir(parents=True)
    (tmp_path / "quantcli" / "shipped_recipes" / "mine.yaml").write_text("# Mine.\n")
    monkeypatch.setattr(shipped_module, "__file__", str(module))
    assert shipped_names() == ["mine"]
    assert shipped_description("mine") == "Mine."
