"""The fewest linears to roll back: the search on made-up predicates, and the stage on a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_contexts import Interrupted, changed, interrupt, read

import quantcli
from quantcli.console import progress
from quantcli.errors import RecipeError
from quantcli.pipeline.stages.search import Group, fewest
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]


class Counted:
    """A predicate over sets of groups that counts how often it is asked, and how often it may be."""

    def __init__(self, meets: Callable[[set[Group]], bool], budget: int = 1_000_000) -> None:
        self.predicate, self.budget, self.asked = meets, budget, 0

    def meets(self, members: Sequence[Group]) -> bool:
        assert len(set(members)) == len(members)
        self.asked += 1
        return self.predicate(set(members))

    def more(self) -> bool:
        return self.asked < self.budget


def groups_of(count: int) -> list[Group]:
    return [(f"linear{index}",) for index in range(count)]


needed_subsets = st.integers(1, 20).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), max_size=count))
)


@given(needed_subsets)
def test_what_is_needed_is_found_and_nothing_else(drawn: tuple[int, set[int]]) -> None:
    count, needed = drawn
    groups = groups_of(count)
    wanted = [groups[index] for index in sorted(needed)]
    trials = Counted(lambda members: members >= set(wanted))
    assert fewest(groups, trials.meets, trials.more) == wanted


@given(st.lists(st.integers(1, 50), min_size=1, max_size=14), st.floats(0, 1))
def test_what_only_adds_up_is_found_without_a_member_too_many(gains: list[int], share: float) -> None:
    """Any members serve whose gains reach a sum: none of those found can be spared."""
    groups = groups_of(len(gains))
    gain = dict(zip(groups, gains, strict=True))
    trials = Counted(lambda members: sum(gain[member] for member in members) >= share * sum(gains))
    found = fewest(groups, trials.meets, trials.more)
    assert trials.meets(found)
    for member in found:
        assert not trials.meets([other for other in found if other != member])
    assert found == [group for group in groups if group in found]


@given(needed_subsets, st.integers(1, 40))
def test_it_asks_no_more_than_it_may(drawn: tuple[int, set[int]], budget: int) -> None:
    count, needed = drawn
    groups = groups_of(count)
    wanted = {groups[index] for index in needed}
    trials = Counted(lambda members: members >= wanted, budget)
    found = fewest(groups, trials.meets, trials.more)
    assert trials.asked <= budget
    if budget > math.ceil(math.log2(count)) + 1:  # enough to double up to all of them
        assert set(found) >= wanted


def test_nothing_is_rolled_back_where_nothing_is_needed() -> None:
    trials = Counted(lambda _members: True)
    assert fewest(groups_of(5), trials.meets, trials.more) == []
    assert trials.asked == 1
    assert fewest([], Counted(lambda _members: False).meets, trials.more) == []


def test_a_few_of_many_take_few_trials() -> None:
    groups = groups_of(256)
    trials = Counted(lambda members: members >= {groups[3], groups[40]})
    assert fewest(groups, trials.meets, trials.more) == [groups[3], groups[40]]
    assert trials.asked < 120


# the stage


def events_of(recipe: Recipe, kind: str) -> list[dict[str, Any]]:
    lines = Path(recipe["output"], "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return static_recipe(tmp_path / "run")


@pytest.fixture(scope="module")
def plain(static_recipe: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Scores of the run without rollback."""
    outcome = quantcli.run(static_recipe(tmp_path_factory.mktemp("plain") / "run"))
    assert outcome.perplexity is not None
    return outcome.perplexity


def with_target(recipe: Recipe, **target: Any) -> Recipe:
    return changed(recipe, quantize__rollback={"target": {"evaluations": 30, **target}, "metric": "output_error"})


@pytest.fixture(scope="module")
def found(
    static_recipe: Callable[[Path], Recipe], plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Any]:
    """A search for half of the divergence, and what came of it."""
    recipe = static_recipe(tmp_path_factory.mktemp("found") / "run")
    recipe = with_target(recipe, kl_divergence=plain["kl_divergence"] / 2, evaluations=80)
    return recipe, quantcli.run(recipe)


def test_the_exported_checkpoint_meets_the_target(found: tuple[Recipe, Any], plain: dict[str, Any]) -> None:
    recipe, outcome = found
    target = recipe["quantize"]["rollback"]["target"]["kl_divergence"]
    content = read(recipe, "search", "found.json")
    assert outcome.perplexity["kl_divergence"] <= target
    assert math.isclose(outcome.perplexity["kl_divergence"], content["measured"]["kl_divergence"], rel_tol=1e-4)
    assert math.isclose(outcome.perplexity["increase"], content["measured"]["perplexity_increase"], abs_tol=1e-5)
    kept = set(outcome.plan.kept) - {"lm_head"}
    assert 0 < len(kept) < 21
    assert set(content["rolled_back"]) == kept == set(outcome.to_json()["rolled_back"])
    for block in outcome.plan.structure.blocks:
        for group in block.fused:
            assert len(kept & set(group)) in (0, len(group))


def test_no_group_can_be_spared(found: tuple[Recipe, Any], tmp_path: Path) -> None:
    """Each plain recipe with one group fewer misses the target, as the search measured."""
    recipe, outcome = found
    target = recipe["quantize"]["rollback"]["target"]["kl_divergence"]
    content = read(recipe, "search", "found.json")
    trials = {frozenset(trial["rolled_back"]): trial for trial in trials_of(recipe)}
    chosen = frozenset(content["rolled_back"])
    assert trials[chosen]["kl_divergence"] <= target
    groups = {
        frozenset(g) & chosen or frozenset([name])
        for name in chosen
        for g in next(([g] for b in outcome.plan.structure.blocks for g in b.fused if name in g), [(name,)])
    }
    for group in groups:
        if chosen - group:
            assert trials[chosen - group]["kl_divergence"] > target
    assert content["evaluations"] == len(trials_of(recipe))


def trials_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Every trial that the events tell of, with the names that trials.jsonl has."""
    lines = Path(recipe["output"], "search", "trials.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_same_as_a_plain_recipe(found: tuple[Recipe, Any], tmp_path: Path) -> None:
    recipe, outcome = found
    file = Path(recipe["output"]) / "search" / "recipe.yaml"
    plan = quantcli.plan(file)
    assert plan.treatments == outcome.plan.treatments
    assert set(plan.kept) == set(outcome.plan.kept)
    again = quantcli.run(file, output=str(tmp_path / "again"))
    assert again.perplexity is not None
    assert again.perplexity["kl_divergence"] == outcome.perplexity["kl_divergence"]
    assert again.stages["export"]["files"] == outcome.stages["export"]["files"]


def test_what_is_up_to_date_is_not_searched_again(found: tuple[Recipe, Any]) -> None:
    recipe, outcome = found
    events: list[dict[str, Any]] = []
    again = quantcli.run(recipe, listener=events.append)
    assert not [e for e in events if e["event"] in ("trial", "found")]
    assert all(record["reused"] for record in again.stages.values())
    assert again.plan == outcome.plan


def test_an_interrupted_search_goes_on(recipe: Recipe, found: tuple[Recipe, Any]) -> None:
    recipe = {**found[0], "output": recipe["output"]}
    file = Path(recipe["output"], "search", "trials.jsonl")
    for number in (2, 4):
        with pytest.raises(Interrupted):
            quantcli.run_stage("search", recipe, listener=interrupt("search", number, "trial"))
        with file.open("a", encoding="utf-8") as opened:
            opened.write('{"windows": 4, "rolled')  # what a kill cut short
    quantcli.run_stage("search", recipe)
    lines = file.read_text(encoding="utf-8").splitlines()
    sets = [frozenset(json.loads(line)["rolled_back"]) for line in lines if line.endswith("}")]
    assert len(sets) == len(set(sets)) == len(events_of(recipe, "trial")) == len(lines) - 2
    expected, content = (Path(r["output"], "search", "found.json").read_bytes() for r in (found[0], recipe))
    assert content == expected


def test_what_is_solved_is_tried_as_data_weighted_mse(recipe: Recipe) -> None:
    weights = {"bits": 4, "granularity": "group", "group_size": 32, "method": "mse", "importance": "second_moment"}
    trials = []
    for method in ({}, {"method": "gptq", "importance": "auto"}):
        own = changed(recipe, quantize={"weights": weights | method}, output=f"{recipe['output']}{len(trials)}")
        quantcli.run_stage("search", with_target(own, kl_divergence=1e-4, evaluations=3))
        trials.append(trials_of(own))
    assert trials[0] == trials[1]


@pytest.mark.parametrize("finished", [True, False])
def test_trials_of_another_recipe_are_no_trials_of_this_one(
    recipe: Recipe, plain: dict[str, Any], tmp_path: Path, finished: bool
) -> None:
    first = with_target(recipe, kl_divergence=plain["kl_divergence"] / 2)
    if finished:
        quantcli.run_stage("search", first)
    else:
        with pytest.raises(Interrupted):
            quantcli.run_stage("search", first, listener=interrupt("search", 2, "trial"))
    second = changed(first, quantize__activations={"bits": 8, "scope": "token"})
    quantcli.run_stage("search", second)
    fresh = changed(second, output=str(tmp_path / "fresh"))
    quantcli.run_stage("search", fresh)
    assert trials_of(second) == trials_of(fresh)
    expected, content = (read(r, "search", "found.json") for r in (fresh, second))
    assert content == expected


def test_found_on_some_windows_it_holds_on_all(recipe: Recipe, plain: dict[str, Any]) -> None:
    target = plain["kl_divergence"] * 0.6
    outcome = quantcli.run(with_target(recipe, kl_divergence=target, windows=1))
    assert outcome.perplexity is not None
    assert outcome.perplexity["kl_divergence"] <= target
    windows = [trial["windows"] for trial in trials_of(recipe)]
    assert windows[0] == 1
    assert windows[-1] == 4


def test_a_bound_that_holds_already_rolls_nothing_back(recipe: Recipe, plain: dict[str, Any]) -> None:
    outcome = quantcli.run(with_target(recipe, kl_divergence=plain["kl_divergence"] * 1.01))
    assert set(outcome.plan.kept) == {"lm_head"}
    assert outcome.perplexity == plain
    assert len(trials_of(recipe)) == 1


def test_perplexity_is_held_too(recipe: Recipe, plain: dict[str, Any]) -> None:
    """The increase of a random model may be of either sign; no more than a little under it asks for something."""
    target = plain["increase"] / 2 if plain["increase"] > 0 else 1e-4
    outcome = quantcli.run(with_target(recipe, perplexity_increase=target))
    assert outcome.perplexity is not None
    assert outcome.perplexity["increase"] <= target


@pytest.mark.parametrize("evaluations", [2, 5])
def test_a_search_keeps_to_its_trials_and_says_what_it_missed(recipe: Recipe, evaluations: int) -> None:
    recipe = with_target(recipe, kl_divergence=1e-9, evaluations=evaluations)
    quantcli.run_stage("search", recipe)
    assert len(trials_of(recipe)) <= evaluations
    (warning,) = [event["text"] for event in events_of(recipe, "warning") if event["stage"] == "search"]
    assert "is not met" in warning
    assert "Allow more evaluations" in warning


def test_what_is_rolled_back_may_become_another_scheme(recipe: Recipe, plain: dict[str, Any]) -> None:
    """Weights alone in 8 bits lose less than inputs too; the search finds for which linears that is enough."""
    target = plain["kl_divergence"] / 2
    recipe = with_target(recipe, kl_divergence=target, evaluations=60)
    recipe["quantize"]["rollback"]["to"] = "W8A16"
    outcome = quantcli.run(recipe)
    assert outcome.perplexity is not None
    content = read(recipe, "search", "found.json")
    assert outcome.perplexity["kl_divergence"] <= target
    assert math.isclose(outcome.perplexity["kl_divergence"], content["measured"]["kl_divergence"], rel_tol=1e-4)
    names = {name for name, (_, scheme) in outcome.plan.schemes.items() if scheme.name == "W8A16"}
    assert names == set(content["rolled_back"])
    assert 0 < len(names) < 21
    assert set(outcome.plan.kept) == {"lm_head"}
    plan = quantcli.plan(Path(recipe["output"]) / "search" / "recipe.yaml")
    assert plan.treatments == outcome.plan.treatments


def test_a_size_is_filled_by_the_most_sensitive(recipe: Recipe) -> None:
    smallest, largest = quantcli.plan(recipe).size_after, quantcli.plan(recipe).size_before
    room = (smallest + largest) // 2
    recipe = with_target(recipe, size=room / 1e9)
    outcome = quantcli.run_stage("search", recipe)
    assert outcome.plan.size_after <= room
    rows = [row["name"] for row in read(recipe, "sensitivity", "sensitivity.json")["linears"]]
    groups = {tuple(g) for block in outcome.plan.structure.blocks for g in block.fused}
    chosen: list[str] = []
    tried: set[str] = set()
    for name in rows:
        group = next((g for g in groups if name in g), (name,))
        if name in tried:
            continue
        tried |= set(group)
        plain_recipe = changed(recipe, quantize__rollback={"names": [*chosen, *group]})
        if quantcli.plan(plain_recipe).size_after <= room:
            chosen += group
    assert set(outcome.plan.kept) - {"lm_head"} == set(chosen)
    assert not list(Path(recipe["output"], "search").glob("trials.jsonl"))

    # the plain recipe is that of the recipe as it is now, though nothing of it is searched again
    file = Path(recipe["output"], "search", "recipe.yaml")
    file.write_text(edited := file.read_text() + "# mine\n")
    later = changed(recipe, evaluate__gates={"kl_divergence": 0.5})
    assert quantcli.run_stage("search", later).stages["search"]["reused"]
    assert load_recipe(file).evaluate == load_recipe(later).evaluate
    assert quantcli.plan(file).treatments == outcome.plan.treatments
    assert file.with_name("recipe.edited.yaml").read_text() == edited


def test_a_size_that_nothing_fits_is_refused(recipe: Recipe) -> None:
    smallest = quantcli.plan(recipe).size_after
    with pytest.raises(RecipeError, match=r"target\.size"):
        quantcli.run_stage("search", with_target(recipe, size=(smallest - 1000) / 1e9))


def test_a_trial_whose_scores_are_not_finite_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"event": "trial", "stage": "search", "number": 1, "rolled_back": 0, "windows": 4}
    with progress(quiet=False, verbose=False) as listen:
        assert listen is not None
        listen({**trial, "perplexity_increase": None, "kl_divergence": None})
        listen({**trial, "perplexity_increase": 0.0123, "kl_divergence": 0.5})
    shown = capsys.readouterr()
    lines = [line.strip() for line in (shown.out + shown.err).splitlines()]
    assert "trial 1: 0 linears rolled back, perplexity undefined, KL undefined on 4 windows" in lines
    assert "trial 1: 0 linears rolled back, perplexity +1.23%, KL 0.5 on 4 windows" in lines
