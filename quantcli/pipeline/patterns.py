"""Which linears the patterns of a recipe name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from quantcli.errors import RecipeError
from quantcli.recipe.quantization import OverrideSection


def match_names(patterns: Iterable[str], names: Sequence[str], place: str, kind: str = "linear") -> dict[str, str]:
    """name → the first pattern that it matches: an exact name, a glob, or a regular expression after `re:`.

    Raises RecipeError for a pattern that matches nothing, with the nearest names; `place` is the recipe's key.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        if pattern.startswith("re:"):
            expression = re.compile(pattern[3:])
            matched = [name for name in names if expression.fullmatch(name)]
        else:
            matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = get_close_matches(pattern, names, 3, 0.3)
            raise RecipeError(f"{place}: {pattern!r} matches no {kind} of this model.",
                              f"Did you mean {', '.join(near)}?" if near else "")  # fmt: skip
        for name in matched:
            found.setdefault(name, pattern)
    return found


def chosen_overrides(
    overrides: Sequence[OverrideSection], names: Sequence[str], fixed: Mapping[str, str], notes: list[str]
) -> dict[str, OverrideSection]:
    """The first override that matches each linear. Every pattern has to match something; a note says of which all that
    it matches is an earlier one's, or `fixed` in float: name → why."""
    found: dict[str, OverrideSection] = {}
    for index, override in enumerate(overrides):
        place = f"quantize.overrides[{index}]"
        matched = list(match_names([override.match], names, f"{place}.match"))
        left = [name for name in matched if name not in found]
        found |= dict.fromkeys(left, override)
        if not left:
            notes.append(f"{place} has no effect: overrides before it match all that {override.match!r} does.")
        elif all(name in fixed for name in left) and override.scheme != "float":
            notes.append(
                f"{place} has no effect: what it changes stays in float, such as {left[0]} ({fixed[left[0]]})."
            )
    return found
