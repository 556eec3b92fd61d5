"""The section quantize.target: what it takes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from quantcli.errors import RecipeError
from quantcli.recipe import load_recipe, resolved_yaml
from quantcli.recipe.document import parse_yaml
from quantcli.recipe.schema import Recipe

BASE = {"bits": 4, "granularity": "group"}


def recipe(target: Any, **quantize: Any) -> Recipe:
    return load_recipe(
        {
            "model": {"path": "org/name"}, "calibration": {}, "output": "out",
            "quantize": {"weights": BASE, "target": target, **quantize},
        }
    )  # fmt: skip


def test_candidates_are_keys_of_weights_or_the_word_float() -> None:
    target = recipe(
        {"bits_per_weight": 4.5, "candidates": [{}, {"bits": 8, "granularity": "channel"}, "float"]}
    ).quantize.target
    assert target is not None
    assert [candidate.keys for candidate in target.candidates] == [
        {}, {"bits": 8, "granularity": "channel"}, {"bits": 16},
    ]  # fmt: skip
    assert [candidate.floats for candidate in target.candidates] == [False, False, True]


@pytest.mark.parametrize("target", [{"size": 4.2}, {"bits_per_weight": 4, "candidates": [{"bits": 3}, "float"]}])
def test_the_resolved_recipe_is_an_equal_one(target: dict[str, Any]) -> None:
    first = recipe(target)
    content, _ = parse_yaml(resolved_yaml(first), str)
    assert load_recipe(content) == first


@pytest.mark.parametrize(
    ("target", "others", "message"),
    [
        ({}, {}, "quantize.target: has no bound. Give one of bits_per_weight and size."),
        ({"bits_per_weight": 4, "size": 1}, {}, "quantize.target: has bits_per_weight and size. Give one"),
        ({"bits_per_weight": 0}, {}, "quantize.target.bits_per_weight: is 0. It must be more than 0."),
        ({"bits_per_weight": 5, "candidates": [{"bits": 8}]}, {}, "target.candidates: leaves nothing to choose"),
        ({"bits_per_weight": 5, "candidates": [{"bits": 8}] * 2}, {}, "target.candidates[1]: is there twice."),
        (
            {"bits_per_weight": 5, "candidates": ["float", {"bits": 16, "group_size": 32}]}, {},
            "target.candidates[1]: is float, beside keys of a grid.",
        ),
        (
            {"bits_per_weight": 5, "candidates": [{"bits": 8}, {"method": "gptq"}]}, {},
            "quantize.target.candidates[1].method: unknown key.",
        ),
        (
            {"bits_per_weight": 5, "candidates": [{"bits": 8}, {"granularity": "channel", "group_size": 32}]}, {},
            "quantize.target.candidates[1].weights: group_size has no meaning with granularity channel.",
        ),
        ({"bits_per_weight": 5}, {"weights": {"bits": 16}, "kv_cache": {}}, "weights.bits is 16. Set weights.bits: 4."),
        ({"bits_per_weight": 5}, {"rollback": {"level": 3}}, "quantize.target: excludes rollback.level"),
        ({"bits_per_weight": 5}, {"rollback": {"target": {"size": 1}}}, "quantize.target: excludes rollback.target"),
        (
            {"bits_per_weight": 5, "candidates": [{"bits": 8}, {"bits": 4}]},
            {"weights": {"bits": 8}, "activations": {"bits": 8}},
            "8-bit activations of static scales need 8-bit weights, and weights.bits is 4",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(target: dict[str, Any], others: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(target, **others)
    assert message in str(caught.value)


def test_it_needs_calibration() -> None:
    with pytest.raises(RecipeError, match=r"quantize\.target: is shared out by .*Add a section calibration"):
        load_recipe({"model": {"path": "a/b"}, "output": "o", "quantize": {"target": {"size": 1}}})
