"""Stage `smooth` on mixtures of experts: rotations and scales change nothing, and take outliers out of what enters
experts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import float_model, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, token_batches
from torch import Tensor

import quantcli
from quantcli.errors import ModelError
from quantcli.model import rotation
from quantcli.model.structure import Block
from quantcli.pipeline import engine
from quantcli.pipeline.exactness import Passed, difference
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]
FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3")
LATENT = {"deepseek-v2", "deepseek-v3"}  # whose values no linear makes head by head
EXACT = 1e-5


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The path of a model with outliers: a channel of each norm of the stream is 12 times larger, and one of what up
    puts out in each expert."""

    @cache
    def make(family: str) -> Path:
        folder = save_tiny_model(family, tmp_path_factory.mktemp(family), with_tokenizer=True)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("norm.weight") and len(tensor) == 64:
                tensor[9] = 12
            elif re.search(r"(up_proj|w3)\.weight$", name):
                tensor[-3] *= 12
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture
def recipe(model_of: Callable[[str], Path], prose: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """W8A8 of a family with a scale a token, and a section `smooth`."""

    def make(family: str, smooth: dict[str, Any] | None) -> Recipe:
        text = {"dataset": "text", "path": str(prose)}
        return {
            "version": 1,
            "model": {"path": str(model_of(family)), "sanity_check": "off"},
            "calibration": {**text, "samples": 4, "sequence_length": 24},
            "smooth": smooth,
            "quantize": {"activations": {"bits": 8, "scope": "token"}},
            "evaluate": {"perplexity": {**text, "sequence_length": 32, "windows": 4}},
            "output": str(tmp_path / "run"),
        }

    return make


def smoothed(recipe: Recipe) -> list[dict[str, Any]]:
    """Run as far as `smooth`; what came of each group."""
    engine.run_recipe(load_recipe(recipe), until="smooth")
    files = sorted((Path(recipe["output"]) / "smooth").glob("block-*.json"))
    return [outcome for file in files for outcome in json.loads(file.read_text())]


@cache
def logits_of(path: Path) -> Tensor:
    """In float64, of a fixed batch, by transformers alone."""
    (tokens,) = token_batches((2, 20))
    with torch.inference_mode():
        model = float_model(path, torch.float64, attn_implementation="eager", experts_implementation="eager")
        return model.double()(tokens).logits


def distance(recipe: Recipe) -> float:
    """Relative distance of the smoothed model's logits, as transformers loads it, from the original's."""
    original = logits_of(Path(recipe["model"]["path"]))
    found = logits_of(Path(recipe["output"]) / "smooth" / "model")
    return float((found - original).norm() / original.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_change_nothing(family: str, recipe: Callable[..., Recipe]) -> None:
    choice = {"seed": 3, "heads": family not in LATENT}
    asked = recipe(family, {"method": "rotate", "rotation": choice, "save_model": True})
    smoothed(asked)
    assert distance(asked) < EXACT
    assert read(asked, "smooth", "manifest.json")["rotated"] == ["residual stream"] + ["heads"] * choice["heads"]
    before = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    after = load_file(next((Path(asked["output"]) / "smooth" / "model").glob("*.safetensors")))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert not [name for name in same if "experts" in name or re.search(r"\.(shared_expert_)?gate\.weight", name)]
    assert all("correction_bias" in name or "_layernorm" in name or "attn" in name for name in same)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_a_rotated_mixture_is_exported_and_verified(family: str, recipe: Callable[..., Recipe]) -> None:
    """What is evaluated is nearer to the float model than without a rotation, whose inputs have outliers."""
    choice = {"heads": family not in LATENT}
    asked = recipe(family, {"method": "rotate", "rotation": choice})
    quantcli.run(asked)
    divergence = read(asked, "eval-ppl", "results.json")["kl_divergence"]
    quantcli.run({**asked, "smooth": None})
    assert 0 < divergence < read(asked, "eval-ppl", "results.json")["kl_divergence"]


def test_a_router_that_is_forgotten_ends_the_run(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Block.groups

    def groups(self: Block) -> Any:
        for shared in whole.fget(self):  # type: ignore[attr-defined]
            kept = tuple(name for name in shared.linears if name not in self.routers)
            yield shared.__class__(kept, shared.width, shared.producer)

    monkeypatch.setattr(Block, "groups", property(groups))
    monkeypatch.setattr(rotation, "rotation_obstacles", lambda _structure: [])
    with pytest.raises(ModelError, match=r"Rotated, model\.layers\.0 computes something else"):
        smoothed(recipe("mixtral", {"method": "rotate"}))


def test_tokens_whose_choice_is_too_close_are_left_out_of_the_check() -> None:
    """Of 32 tokens two may go elsewhere; a third makes all count."""
    generator = torch.Generator().manual_seed(0)
    entering, hidden = (torch.randn(1, 32, 8, generator=generator) for _ in range(2))
    chosen = torch.arange(64).view(32, 2)
    expected = Passed(hidden, (chosen,))
    for count, exact in ((0, True), (2, True), (3, False)):
        moved, others = hidden.clone(), chosen.clone()
        moved[0, :count] += 1
        others[:count, 0] = 99
        found = difference(Passed(moved, (others,)), expected, entering)
        assert (found == 0) == exact
    moved = hidden.clone()
    moved[0, 5] += 1  # to the same experts
    assert difference(Passed(moved, (chosen,)), expected, entering) > 1e-2
