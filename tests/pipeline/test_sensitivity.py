"""The ranking of linears against float64 on the whole model, and what a run makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import Interrupted, changed, float_model, interrupt, opened, read
from tiny_models import save_tiny_model
from torch import Tensor, nn

import quantcli
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store
from quantcli.model.structure import Block, Linear, SharedInput
from quantcli.pipeline.fused import fused_groups
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.stages.sensitivity import output_errors
from quantcli.recipe.rollback import RollbackSection

Recipe = dict[str, Any]
REPORTED = ("eval-ppl", "layers", "generate")
METRICS = ("range_parm", "kurtosis", "quantile", "output_error", "block_error")
LINEARS = [
    f"model.layers.{index}.{name}_proj"
    for index in range(3)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return static_recipe(tmp_path / "run")


@pytest.fixture(scope="module")
def ranked(static_recipe: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe that was run only to rank, so that every metric was measured."""
    recipe = static_recipe(tmp_path_factory.mktemp("ranked") / "run")
    quantcli.run_stage("sensitivity", recipe)
    return recipe


def result(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = read(recipe, "sensitivity", "sensitivity.json")
    return content


def sorted_by(recipe: Recipe, metric: str) -> list[str]:
    """Names by falling value, equals in the order of the model."""
    rows = {row["name"]: row[metric] for row in result(recipe)["linears"]}
    return sorted(LINEARS, key=lambda name: -rows[name])


def quantized(store: Store, name: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The stored linear in float64, its input rounded to the static grid."""
    entry = store.read(name)
    assert entry.input_scale is not None
    assert entry.input_zero_point is not None
    scale, zero = entry.input_scale.double(), entry.input_zero_point.double()
    weight = entry.weight.codes.double() * entry.weight.scale.double()
    return lambda _module, x: (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale @ weight.t()


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    yield seen
    handle.remove()


@torch.inference_mode()
def test_errors_are_those_of_the_whole_model_in_float64(ranked: Recipe, tmp_path: Path) -> None:
    with opened(changed(ranked, output=str(tmp_path / "plain")), "quantize") as context:
        store = Store(context.folder("quantize"))
        tokens = torch.tensor(calibration_samples(context).samples)
        groups = [tuple(group) for block in context.plan.structure.blocks for group in block.fused]
    model = float_model(Path(ranked["model"]["path"]), torch.float64)
    rows = {row["name"]: row for row in result(ranked)["linears"]}
    for name in LINEARS:
        with outputs_of(model.get_submodule(name)) as seen:
            model(tokens)
            # what enters it stays what it was, so the error is its own
            with simulated(model, {name: quantized(store, name)}):
                model(tokens)
        error = (seen[1] - seen[0]).square().sum() / seen[0].square().sum()
        assert math.isclose(rows[name]["output_error"], error, rel_tol=0.01), name
    for group in [*groups, *((name,) for name in LINEARS if not any(name in g for g in groups))]:
        block = model.get_submodule(group[0].rpartition(".")[0].rpartition(".")[0])
        with outputs_of(block) as seen:
            model(tokens)
            with simulated(model, {name: quantized(store, name) for name in group}):
                model(tokens)
        error = ((seen[1] - seen[0]).square().sum(-1) / seen[0].square().sum(-1)).mean()
        for name in group:
            assert math.isclose(rows[name]["block_error"], error, rel_tol=0.01), name
    assert sorted(map(len, groups)) == [2, 2, 2, 3, 3, 3]


@torch.inference_mode()
def test_metrics_of_inputs_are_those_of_the_whole_model(ranked: Recipe) -> None:
    """range_parm by its definition; kurtosis and quantile of the values, which are counted in bfloat16."""
    with opened(ranked, "calibrate") as context:
        samples = calibration_samples(context).samples
    model = float_model(Path(ranked["model"]["path"]), torch.float64)
    rows = {row["name"]: row for row in result(ranked)["linears"]}
    seen: dict[str, Tensor] = {}
    for name in LINEARS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, _name=name: seen.update({_name: args[0]})
        )
    model(torch.tensor(samples))
    for name, x in seen.items():
        spread = max(float((s - s.amax(0) - s.amin(0)).std()) for s in x)
        assert math.isclose(rows[name]["range_parm"], x.abs().max() / spread, rel_tol=1e-4), name
        centred = x - x.mean()
        fourth = float((centred**4).mean() / (centred**2).mean() ** 2) - 3
        assert math.isclose(rows[name]["kurtosis"], fourth, rel_tol=0.01, abs_tol=0.01), name
        low, high = x.flatten().quantile(torch.tensor([0.25, 0.75], dtype=x.dtype)).tolist()
        assert math.isclose(rows[name]["quantile"], 2 * float(x.abs().max()) / 254 / (high - low), rel_tol=0.02), name


@pytest.mark.parametrize("metric", [None, *METRICS])
def test_the_most_sensitive_are_rolled_back(ranked: Recipe, recipe: Recipe, metric: str | None) -> None:
    recipe = changed(recipe, quantize__rollback={"level": "L4", "metric": metric, "siblings": "apart"})
    plan = quantcli.run_stage("quantize", recipe).plan
    metric = metric or "range_parm"
    expected = sorted_by(ranked, metric)
    found = result(recipe)
    assert found["metric"] == metric
    assert [row["name"] for row in found["linears"]] == expected
    assert list(found["rolled_back"]) == expected[:4]
    assert {name for name in plan.kept if name != "lm_head"} == set(expected[:4])
    for name in expected[:4]:
        assert plan.kept[name].startswith(f"rolled back by {metric} ")
    with opened(recipe, "quantize") as context:
        assert set(Store(context.folder("quantize")).schemes) == set(expected[4:])


@pytest.mark.parametrize("metric", ["range_parm", "output_error"])
def test_siblings_go_along_and_are_noted(ranked: Recipe, recipe: Recipe, metric: str) -> None:
    groups = [set(group) for block in quantcli.plan(recipe).structure.blocks for group in block.fused]
    ranking = sorted_by(ranked, metric)
    level = 1 + next(i for i, name in enumerate(ranking) if any(name in group for group in groups))
    chosen = set(ranking[:level])
    along = next(group for group in groups if ranking[level - 1] in group) - chosen
    assert along
    recipe = changed(recipe, quantize__rollback={"level": level, "metric": metric})
    result = quantcli.run_stage("quantize", recipe)
    plan = result.plan
    assert {name for name in plan.kept if name != "lm_head"} == chosen | along
    assert result.to_json()["rolled_back"] == {name: plan.kept[name] for name in plan.kept if name != "lm_head"}
    last = ranking[level - 1].rpartition(".")[2]
    assert {plan.kept[name] for name in along} == {f"fused with {last} in serving engines"}
    note = f"{len(along)} linears are rolled back because engines fuse them with one that is."
    if len(along) == 1:
        note = "1 linear is rolled back because engines fuse it with one that is."
    assert note in plan.notes


@torch.inference_mode()
def test_linears_that_are_called_with_keywords_are_measured() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    module, x = Keywords(), torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 5.0, -1.0, 0.0]])
    block = Block("b", (Linear("b.inner", 4, 2),), (SharedInput(("b.inner",), 4),), ())
    other = module.inner.weight.detach() * 1.1
    errors: dict[str, dict[str, float | None]] = {"b.inner": {}}
    with output_errors(module, block, {"b.inner": other}, errors):
        exact = module(x)
    lost = (x @ other.t() + module.inner.bias - exact).square().sum() / exact.square().sum()
    assert math.isclose(errors["b.inner"]["output_error"] or 0, float(lost), rel_tol=1e-5)


@torch.inference_mode()
def test_divergence_is_that_of_the_model_with_one_group_quantized(recipe: Recipe, tmp_path: Path) -> None:
    with opened(changed(recipe, output=str(tmp_path / "plain")), "quantize") as context:
        store = Store(context.folder("quantize"))
        tokens = torch.tensor(calibration_samples(context).samples)
        groups = list(fused_groups(context.plan.structure, LINEARS))
    recipe = changed(recipe, quantize__rollback={"level": 4, "metric": "kl_divergence"})
    plan = quantcli.run_stage("sensitivity", recipe).plan
    model = float_model(Path(recipe["model"]["path"]), torch.float64)
    exact = model(tokens).logits.log_softmax(-1)
    rows = {row["name"]: row["kl_divergence"] for row in result(recipe)["linears"]}
    for group in groups:
        with simulated(model, {name: quantized(store, name) for name in group}):
            found = model(tokens).logits.log_softmax(-1)
        divergence = float((exact.exp() * (exact - found)).sum(-1)[:, :-1].mean())
        for name in group:
            assert math.isclose(rows[name], divergence, rel_tol=0.02), name
    values = [row["kl_divergence"] for row in result(recipe)["linears"]]
    assert values == sorted(values, reverse=True)
    assert {row["name"] for row in result(recipe)["linears"][:4]} <= set(plan.kept)


@pytest.mark.parametrize(("head", "count"), [(None, 21), (False, 22)])
def test_a_level_beyond_all_linears_rolls_everything_back(recipe: Recipe, head: bool | None, count: int) -> None:
    events: list[dict[str, Any]] = []
    recipe = changed(recipe, quantize__rollback={"level": 1000, "last_linear": head})
    outcome = quantcli.run(recipe, listener=events.append)
    (warning,) = [e["text"] for e in events if e["event"] == "warning" and e["stage"] == "sensitivity"]
    assert "1000" in warning
    assert f"{count} linears" in warning
    assert outcome.plan.treatments == {}
    assert outcome.perplexity is not None
    assert outcome.perplexity["increase"] == 0
    assert outcome.perplexity["kl_divergence"] == 0
    assert outcome.perplexity["agreement"] == 1


def test_the_output_head_is_ranked_with_the_rest(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__rollback={"level": 22, "last_linear": False})
    quantcli.run_stage("sensitivity", recipe)
    rows = {row["name"]: row for row in result(recipe)["linears"]}
    assert set(rows) == {*LINEARS, "lm_head"}
    assert set(rows["lm_head"]) == {"name", "range_parm", "kurtosis", "quantile"}
    values = [row["range_parm"] for row in result(recipe)["linears"]]
    assert values == sorted(values, reverse=True)


def test_without_a_metric_the_output_head_comes_last(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__rollback={"level": 22, "last_linear": False, "metric": "block_error"})
    plan = quantcli.run_stage("sensitivity", recipe).plan
    assert result(recipe)["linears"][-1]["name"] == "lm_head"
    assert plan.kept["lm_head"] == "rolled back by block_error"


def test_another_level_observes_nothing_anew(ranked: Recipe, recipe: Recipe) -> None:
    def worked(level: int) -> set[str]:
        changed_one = changed(recipe, quantize__rollback={"level": level, "siblings": "apart"})
        outcome = quantcli.run(changed_one)
        expected = set(sorted_by(ranked, "range_parm")[:level]) | {"lm_head"}
        assert set(outcome.plan.kept) == expected
        return {name for name, record in outcome.stages.items() if not record["reused"]}

    assert worked(2) == {"check", "calibrate", "sensitivity", "quantize", "export", "verify", "reference", *REPORTED}
    assert worked(2) == set()
    assert worked(3) == {"sensitivity", "quantize", "export", "verify", *REPORTED}
    assert worked(2) == {"sensitivity", "quantize", "export", "verify", *REPORTED}


def test_a_stage_that_is_up_to_date_brings_the_same_plan(recipe: Recipe) -> None:
    recipe = changed(recipe, quantize__rollback={"level": 3})
    first, second = quantcli.run(recipe), quantcli.run(recipe)
    assert all(record["reused"] for record in second.stages.values())
    assert second.plan == first.plan
    assert second.to_json()["size_after"] == first.to_json()["size_after"] > quantcli.plan(recipe).size_after


@pytest.mark.parametrize(("metric", "kind", "left"), [("block_error", "block", [2]), ("kl_divergence", "group", 10)])
def test_an_interrupted_ranking_goes_on(recipe: Recipe, metric: str, kind: str, left: Any, tmp_path: Path) -> None:
    recipe = changed(recipe, quantize__rollback={"level": 1, "metric": metric})
    whole = changed(recipe, output=str(tmp_path / "whole"))
    quantcli.run_stage("sensitivity", whole)
    with pytest.raises(Interrupted):
        quantcli.run_stage("sensitivity", recipe, listener=interrupt("sensitivity", 2, kind))
    events: list[dict[str, Any]] = []
    quantcli.run_stage("sensitivity", recipe, listener=events.append)
    assert result(recipe) == result(whole)
    again = [e for e in events if e["stage"] == "sensitivity" and e["event"] == kind]
    assert len(again) == left if kind == "group" else [e["index"] for e in again] == left
    assert {file.name for file in (Path(recipe["output"]) / "sensitivity").iterdir()} == {
        file.name for file in (Path(whole["output"]) / "sensitivity").iterdir()
    }


def test_divergences_of_another_recipe_are_not_those_of_this_one(recipe: Recipe, tmp_path: Path) -> None:
    first = changed(
        recipe, quantize__rollback={"level": 2, "metric": "kl_divergence", "names": ["*.0.*.down_proj", "*.o_proj"]}
    )
    quantcli.run_stage("sensitivity", first)
    second = changed(first, quantize__activations={"bits": 8, "scope": "token"}, quantize__rollback__names=[])
    quantcli.run_stage("sensitivity", second)
    fresh = changed(second, output=str(tmp_path / "fresh"))
    quantcli.run_stage("sensitivity", fresh)
    assert result(second) == result(fresh)


WEIGHED = {"bits": 4, "granularity": "group", "group_size": 32, "method": "mse", "importance": "second_moment"}


@pytest.mark.parametrize("metric", ["block_error", "kl_divergence"])
@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_what_is_solved_is_ranked_as_data_weighted_mse(recipe: Recipe, method: str, metric: str) -> None:
    found = []
    for weights in (WEIGHED, {**WEIGHED, "method": method, "importance": "auto"}):
        own = changed(
            recipe, quantize={"weights": weights, "rollback": {"level": 3, "metric": metric, "last_linear": False}},
            output=f"{recipe['output']}-{weights['method']}",
        )  # fmt: skip
        quantcli.run_stage("sensitivity", own)
        found.append(result(own))
    assert found[0] == found[1]


def test_linears_may_become_what_is_weighed_by_data_though_others_are_not(recipe: Recipe) -> None:
    recipe = changed(
        recipe, quantize={"weights": {"bits": 3}, "rollback": {"level": 3, "to": "W4A16"}}, evaluate=None
    )  # fmt: skip
    plan = quantcli.run(recipe).plan
    found = [treatment.weights for treatment in plan.treatments.values() if treatment.scheme.bits == 4]
    assert len(found) >= 3
    assert {(weights.method, weights.importance) for weights in found} == {("mse", "second_moment")}


def test_experts_of_few_tokens_count_once_whether_they_are_ranked_or_not(tmp_path: Path, prose: Path) -> None:
    model = save_tiny_model("mixtral", tmp_path / "model", with_tokenizer=True)
    fallbacks = []
    for level in (0, 1):
        recipe = {
            "model": {"path": str(model), "sanity_check": "off"},
            "calibration": {"dataset": "text", "path": str(prose), "samples": 2, "sequence_length": 16,
                            "expert_tokens": 14},
            "quantize": {"weights": {**WEIGHED, "method": "gptq", "importance": "auto"},
                         "rollback": {"level": level, "metric": "block_error", "siblings": "apart"}},
            "export": None, "evaluate": None, "output": str(tmp_path / f"run-{level}"),
        }  # fmt: skip
        events: list[dict[str, Any]] = []
        quantcli.run(recipe, listener=events.append)
        told = [e for e in events if e.get("fallback") == "data_free_experts"]
        names = [name for e in told for name in e["modules"]]
        assert len(names) == len(set(names)) > 0
        fallbacks.append(set(names))
    assert fallbacks[0]
    assert fallbacks[1]


def test_every_metric_of_a_recipe_is_tested_here() -> None:
    field = RollbackSection.model_json_schema()["properties"]["metric"]["anyOf"][0]["enum"]
    assert (*METRICS, "kl_divergence") == tuple(field)
