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
from run_contexts import Interrupted, float_model, interrupt, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, token_batches
from torch import Tensor

import quantcli
from quantcli.errors import ModelError
from quantcli.model import rotation
from quantcli.model.structure import Block, Producer
from quantcli.pipeline import batches, engine, estimate, groups
from quantcli.pipeline.exactness import Passed, difference
from quantcli.pipeline.seen import Seen
from quantcli.pipeline.verify import verify_path
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
            "calibration": {**text, "samples": 4, "sequence_length": 24, "expert_tokens": 1},
            "smooth": smooth and ({"search_tokens": 64} | smooth if smooth["method"] != "rotate" else smooth),
            "quantize": {"activations": {"bits": 8, "scope": "token"}},
            "evaluate": {
                "perplexity": {**text, "sequence_length": 32, "windows": 4},
                "output_error": None,
                "generate": None,
            },
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


def test_a_rotated_export_is_nearer_to_the_float_model(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("mixtral", {"method": "rotate"})
    quantcli.run(asked)
    divergence = read(asked, "eval-ppl", "results.json")["kl_divergence"]
    quantcli.run({**asked, "smooth": None})
    assert 0 < divergence < read(asked, "eval-ppl", "results.json")["kl_divergence"]


ALL = {"norm", "attention", "mlp"}
METHODS = {"smoothquant": {"norm"}, "iterative": ALL, "auto": ALL, "balance": ALL}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_methods_make_folds_that_change_nothing(family: str, method: str, recipe: Callable[..., Recipe]) -> None:
    asked = recipe(family, {"method": method, "save_model": True})
    outcomes = smoothed(asked)
    assert distance(asked) < EXACT
    assert {outcome["fold"] for outcome in outcomes} == METHODS[method]
    assert not {outcome["cause"] for outcome in outcomes} & {"check", "obstacle", "not finite", "few tokens"}
    structure = quantcli.plan(asked).structure
    kept = {outcome["input"]: outcome for outcome in outcomes if outcome["kept"]}
    for experts in (experts for block in structure.blocks for experts in block.experts):
        (outer,) = [o for o in kept.values() if {names[0] for names in experts.linears} <= {*o["linears"]}]
        assert outer["producer"].endswith("post_attention_layernorm")
        assert method == "balance" or outer["ratio_after"] < outer["ratio_before"] / 2
        inner = [kept[names[-1]] for names in experts.linears if names[-1] in kept]
        assert bool(inner) == ("mlp" in METHODS[method])
        assert all(o["ratio_after"] < o["ratio_before"] for o in inner if method == "iterative")
    if method == "auto":
        assert all(outcome["error_after"] <= outcome["error_before"] for outcome in kept.values())


def test_scales_are_found_on_the_rotated_model(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("qwen2-moe", {"method": "iterative", "rotation": {}, "save_model": True})
    outcomes = smoothed(asked)
    assert distance(asked) < EXACT
    assert all(outcome["kept"] or outcome["cause"] == "no token" for outcome in outcomes)


def test_a_smoothed_export_is_nearer_to_the_float_model(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("deepseek-v3", {"method": "auto"})
    quantcli.run(asked)
    divergence = read(asked, "eval-ppl", "results.json")["kl_divergence"]
    assert verify_path(Path(asked["output"]))["compressed-tensors: linears"] == len(quantcli.plan(asked).schemes)
    exported = load_file(Path(asked["output"]) / "export" / "compressed-tensors" / "model.safetensors")
    original = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    router = "model.layers.1.mlp.gate.weight"
    norm = "model.layers.1.post_attention_layernorm.weight"
    scale = original[norm] / exported[norm]
    assert scale.max() / scale.min() > 1.5
    torch.testing.assert_close(exported[router], original[router] * scale, rtol=1e-5, atol=1e-6)
    quantcli.run({**asked, "smooth": None})
    assert 0 < divergence < read(asked, "eval-ppl", "results.json")["kl_divergence"]


def scale_of(recipe: Recipe, norm: str) -> Tensor:
    """What a norm gave away, from the smoothed model."""
    smoothed(recipe)
    before = load_file(Path(recipe["model"]["path"]) / "model.safetensors")[norm]
    return before / load_file(next((Path(recipe["output"]) / "smooth" / "model").glob("*.safetensors")))[norm]


def test_scales_heed_the_weights_of_every_expert(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that have no part in judging them, for which there is room for one expert's linear here."""
    asked = recipe("deepseek-v3", {"method": "smoothquant", "save_model": True})
    norm = "model.layers.2.post_attention_layernorm.weight"
    whole, outcomes = scale_of(asked, norm), smoothed(asked)
    monkeypatch.setattr(groups, "JUDGED_WEIGHTS", 1)
    judged: list[list[str]] = []
    found = groups.GroupSource._judged

    def keep(*arguments: Any) -> list[str]:
        judged.append(found(*arguments))
        return judged[-1]

    monkeypatch.setattr(groups.GroupSource, "_judged", keep)
    fewer = {**asked, "output": asked["output"] + "-fewer"}
    assert torch.equal(scale_of(fewer, norm), whole)
    assert distance(fewer) < EXACT
    entering = [name for name in judged[-1] if ".experts." in name]
    assert len(entering) == 1
    assert [o["error_before"] for o in outcomes] != [o["error_before"] for o in smoothed(fewer)]
    # by hand: s² W is A, with W over router, shared expert and all experts
    tensors = load_file(Path(asked["model"]["path"]) / "model.safetensors")
    (group,) = [outcome for outcome in outcomes if outcome["input"] == "model.layers.2.mlp.gate"]
    weight = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in group["linears"]]).amax(0)
    assert float((whole**2 * weight).max()) == pytest.approx(group["largest_before"], rel=1e-4)


def test_awq_clips_experts_by_the_tokens_that_they_see(recipe: Callable[..., Recipe]) -> None:
    """All linears that are quantized have bounds, which are those of the folded weights; the float model stays."""
    asked = recipe("qwen2-moe", {"method": "awq", "save_model": True})
    weights = {"bits": 4, "granularity": "group", "group_size": 16, "method": "minmax", "importance": "none"}
    asked["quantize"] = {"weights": weights, "activations": {"bits": 16}}
    asked["calibration"]["expert_tokens"] = 40
    engine.run_recipe(load_recipe(asked), until="quantize")
    assert distance(asked) < EXACT
    clips: dict[str, Tensor] = {}
    for file in (Path(asked["output"]) / "smooth").glob("block-*.safetensors"):
        found = load_file(file)
        clips |= {name.removesuffix(".clip.int4"): found[name] for name in found if name.endswith(".clip.int4")}
    planned = set(quantcli.plan(asked).schemes)
    missing = planned - clips.keys()
    assert clips.keys() < planned
    assert all(".experts." in name and name.endswith("down_proj") for name in missing)  # of experts that saw few tokens
    assert 0 < len(missing) < 8
    smooth = load_file(next((Path(asked["output"]) / "smooth" / "model").glob("*.safetensors")))
    held = 0
    for file in (Path(asked["output"]) / "quantize").glob("block-*.safetensors"):
        for name, scale in load_file(file).items():
            linear, _, part = name.rpartition(".")
            if part == "scale" and linear in clips:
                ranges = smooth[f"{linear}.weight"].abs().unflatten(1, (-1, 16)).amax(2)
                assert (clips[linear] <= ranges * 1.001).all()
                assert (scale.abs() * 8 <= clips[linear] * 1.01).all()
                held += bool((clips[linear] < ranges * 0.99).any())
    assert held > len(clips) / 2


def test_experts_that_saw_few_tokens_keep_what_is_inside(recipe: Callable[..., Recipe]) -> None:
    asked = recipe("mixtral", {"method": "iterative", "save_model": True})
    asked["calibration"]["expert_tokens"] = 48
    outcomes = smoothed(asked)
    inner = [outcome for outcome in outcomes if outcome["input"].endswith(".w2")]
    few = [outcome for outcome in inner if outcome["cause"] == "few tokens"]
    assert len(inner) == 8
    assert 0 < len(few) < 8
    assert all("calibration.expert_tokens asks for 48" in outcome["reason"] for outcome in few)
    events = [json.loads(line) for line in (Path(asked["output"]) / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "warning" and "w2" in event["text"]]
    assert sum(event["count"] for event in told) == len(few)
    assert len(told) <= 2
    assert distance(asked) < EXACT


def inside_experts(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What the stage sees of the inner inputs of experts, one after the other."""
    found: list[Seen] = []
    smooth = groups.GroupSource.smooth

    def keep(source: groups.GroupSource, shared: Any, seen: Seen, **keys: Any) -> Any:
        if ".experts." in shared.name and shared.name.endswith(("w2", "down_proj")):
            found.append(seen)
        return smooth(source, shared, seen, **keys)

    monkeypatch.setattr(groups.GroupSource, "smooth", keep)
    smoothed(recipe)
    return found


@pytest.mark.parametrize("method", ["iterative", "auto"])
def test_tokens_inside_experts_are_kept_of_as_many_samples_as_it_takes(
    method: str, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By method auto of half of them at most, which are no part of the other statistics."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", 2 * 24)
    asked = recipe("mixtral", {"method": method, "search_samples": 4, "search_tokens": 64})
    asked["calibration"]["samples"] = 16
    found = inside_experts(asked, monkeypatch)
    assert len(found) == 8
    assert sum(seen.count for seen in found) == 2 * 2 * 16 * 24  # layers, experts a token, samples, tokens of each
    for seen in found:
        kept = seen.apart.count if method == "auto" else seen.count
        assert sum(map(len, seen.tokens)) == min(64, kept)
        assert max(map(len, seen.tokens)) <= 2 * 64 / 4, "of two samples"
        assert seen.rest.count
        assert (seen.apart.count > 0) == (method == "auto")


def test_all_tokens_are_seen_inside_experts_where_the_recipe_sends_them_there(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe("qwen2-moe", {"method": "iterative", "save_model": True})
    asked["calibration"] |= {"route_all_experts": True, "expert_tokens": 4 * 24}
    found = inside_experts(asked, monkeypatch)
    assert [(seen.count, sum(map(len, seen.tokens))) for seen in found] == [(4 * 24, 64)] * 8
    assert distance(asked) < EXACT
    plain = {**asked, "calibration": asked["calibration"] | {"route_all_experts": False}}
    assert "few tokens" in {outcome["cause"] for outcome in smoothed(plain)}, "it is other work"


def test_folds_inside_experts_that_change_the_block_are_undone_together(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels of up in another order, so that the wrong rows give away the scale."""
    right = Producer.channels

    def channels(self: Producer, width: int) -> list[int]:
        return right(self, width)[::-1] if ".experts." in self.name else right(self, width)

    monkeypatch.setattr(Producer, "channels", channels)
    asked = recipe("qwen3-moe", {"method": "iterative", "save_model": True})
    inner = [outcome for outcome in smoothed(asked) if ".experts." in outcome["producer"]]
    assert len(inner) == 8
    assert {outcome["cause"] for outcome in inner} <= {"check", "no token"}
    assert sum(outcome["cause"] == "check" for outcome in inner) > 4
    assert distance(asked) < EXACT


@pytest.mark.parametrize("pattern", ["*.0.mlp.gate", "*.0.post_attention_layernorm", "*.0.mlp.experts.3.up_proj"])
def test_what_is_excluded_leaves_all_readers_of_the_norm(pattern: str, recipe: Callable[..., Recipe]) -> None:
    outcomes = smoothed(recipe("qwen3-moe", {"method": "smoothquant", "exclude": [pattern]}))
    assert {o["input"] for o in outcomes} == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate"
    }  # fmt: skip


def test_an_interrupted_stage_goes_on_to_the_same_bytes(recipe: Callable[..., Recipe]) -> None:
    whole = recipe("qwen3-moe", {"method": "iterative"})
    smoothed(whole)
    broken = {**whole, "output": whole["output"] + "-broken"}
    with pytest.raises(Interrupted):
        engine.run_recipe(load_recipe(broken), until="smooth", listener=interrupt("smooth", 1, "block"))
    smoothed(broken)
    files = [sorted((Path(each["output"]) / "smooth").glob("block-*")) for each in (whole, broken)]
    assert len(files[0]) == 4
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_memory_of_a_group_of_experts_is_bounded(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = quantcli.plan(recipe("deepseek-v3", None)).structure.blocks[2]
    weights = {linear.name: linear.weights for linear in block.linears}
    (outer,) = [shared for shared in block.mixed if len(shared.linears) > 1]
    beside, one = 8 * 64 + 2 * 32 * 64, 32 * 64  # router and shared expert; a linear of one of eight experts
    for bound, experts in ((1 << 26, 16 * one), (3 * one, 3 * one), (1, one)):
        monkeypatch.setattr(estimate, "JUDGED_WEIGHTS", bound)
        assert estimate._judged(block, outer, weights) == beside + experts
    assert estimate._judged(block, block.inputs[0], weights) == sum(weights[n] for n in block.inputs[0].linears)


def test_a_router_that_is_forgotten_ends_the_run(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Block.groups

    def without_routers(self: Block) -> Any:
        for shared in whole.fget(self):  # type: ignore[attr-defined]
            kept = tuple(name for name in shared.linears if name not in self.routers)
            yield shared.__class__(kept, shared.width, shared.producer)

    monkeypatch.setattr(Block, "groups", property(without_routers))
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
