"""Keys that would have no effect, or could only fail after hours of work, are refused with their place and a remedy."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from quantcli.errors import RecipeError
from quantcli.recipe import Recipe, load_recipe

BASE = {"model": {"path": "org/name"}, "calibration": {}, "quantize": {}, "evaluate": {"perplexity": {}}, "output": "o"}


def loaded(**changes: Any) -> Recipe:
    """The recipe with these keys, written with __ in the place of dots."""
    content: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for keys, value in changes.items():
        *path, last = keys.split("__")
        section = content
        for key in path:
            section[key] = dict(section.get(key, {}))
            section = section[key]
        section[last] = value
    return load_recipe(content)


def refused(start: str, remedy: str, **changes: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(**changes)
    assert caught.value.message.startswith(f"recipe: {start}"), caught.value.message
    assert remedy in caught.value.remedy


STICK = {"protocol": "golden-stick", "sequence_length": 64}


@pytest.mark.parametrize(
    ("section", "start"),
    [
        ({"windows": 2, "batch_size": 3}, "batch_size: is 3, more than windows (2)"),
        ({"batch_size": 41}, "batch_size: is 41, more than windows (40)"),
        ({"sequence_length": 2}, "sequence_length: is 2"),
    ],
)
def test_windows_that_golden_stick_leaves_out(section: dict[str, Any], start: str) -> None:
    refused(f"evaluate.perplexity.{start}", "more", evaluate__perplexity=STICK | section)


def test_windows_that_may_suffice_for_golden_stick() -> None:
    for section in ({"windows": 3, "batch_size": 3}, {"windows": None, "batch_size": 300}, {"sequence_length": 3}):
        assert loaded(evaluate__perplexity=STICK | section)


# ------------------------------------------------------------------------------------------- the place and the remedy


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_what_needs_calibration_is_named_where_it_is_asked_for(method: str) -> None:
    wrong = f"weights.method: {method} needs calibration"
    overrides = [{"match": "a", "scheme": "float"}, {"match": "b", "weights": {"method": method}}]
    refused(f"quantize.{wrong}", "calibration: {}", calibration=None, quantize__weights={"method": method})
    refused(f"quantize.overrides[1].{wrong}", "calibration: {}", calibration=None, quantize__overrides=overrides)


@pytest.mark.parametrize(
    ("gate", "value", "remedy"),
    [
        ("agreement", 1, "Write it as 100%."),
        ("size_ratio", 1.0, "Write it as 100%."),
        ("agreement", 95, "Write it as 95% or 0.95."),
        ("perplexity_increase", 1, "Write it as 1% or 0.01."),
        ("agreement", True, "Write it as 2% or 0.02."),
    ],
)
def test_a_bare_one_is_all_of_what_is_a_share(gate: str, value: object, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(evaluate__gates={gate: value})
    assert caught.value.remedy == remedy
    assert loaded(evaluate__gates={"agreement": "100%"}).evaluate.gates.agreement == 1.0  # type: ignore[union-attr]


def test_text_that_looks_like_a_number_keeps_quotes_that_the_shell_would_take() -> None:
    """The remedy does as it says, through a shell."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(BASE, ["model.revision=1e7"])
    command = caught.value.remedy.partition("write it as ")[2].removesuffix(".")
    option, change = shlex.split(command)
    assert option == "--set"
    assert load_recipe(BASE, [change]).model.revision == "1e7"


# ---------------------------------------------------------------------------------------------------- without effect


def test_an_override_that_changes_nothing_is_refused_however_it_is_written() -> None:
    for nothing in ({}, {"weights": {}}, {"activations": {}}, {"weights": {}, "activations": {}}, {"weights": None}):
        start = "quantize.overrides[1]: changes nothing"
        refused(start, "scheme", quantize__overrides=[{"match": "a", "scheme": "float"}, {"match": "b", **nothing}])
    assert loaded(quantize__overrides=[{"match": "a", "scheme": "W4A16", "weights": {}}])


def test_gates_without_a_bound_are_refused() -> None:
    refused("evaluate.gates: sets no bound", "perplexity_increase: 2%", evaluate__gates={})
    assert loaded(evaluate__gates={"perplexity_increase": None})  # as --set takes back one of a shipped recipe
    assert loaded(evaluate__gates=None)
