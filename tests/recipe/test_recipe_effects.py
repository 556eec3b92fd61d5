"""Keys that would have no effect, or could only fail after hours of work, are refused with their place and a remedy."""

from __future__ import annotations

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
