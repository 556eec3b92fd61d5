"""Validation errors in the words of a recipe: where, what is wrong, what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from quantcli.errors import RecipeError
from quantcli.recipe.aliases import ALIASES
from quantcli.recipe.document import Document, Keys, dotted, shown
from quantcli.recipe.schema import Recipe

MAX_ERRORS = 3
_QUOTES = "put it in quotes."

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
}
_BOUND = {"greater_than": ("gt", "more than"), "greater_than_equal": ("ge", "at least")}
_BOUND |= {"less_than": ("lt", "less than"), "less_than_equal": ("le", "at most")}


@cache
def known_keys() -> dict[Keys, tuple[str, ...]]:
    """For every section, by its keys, the keys that it may hold."""
    found: dict[Keys, tuple[str, ...]] = {}

    def walk(section: type[BaseModel], keys: Keys) -> None:
        found[keys] = tuple(section.model_fields) + tuple(old[-1] for old in ALIASES if old[:-1] == keys)
        for name, key in section.model_fields.items():
            for part in (key.annotation, *get_args(key.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    walk(part, (*keys, name))

    walk(Recipe, ())
    return found


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that a misspelt `word` most likely means, or None."""
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), list(words), n=1, cutoff=0.6)
    return matches[0] if matches else None


def recipe_error(error: ValidationError, document: Document) -> RecipeError:
    """The first few errors of a recipe, one a line, each with its file and line or its command-line option."""
    found = []
    all_details = error.errors(include_url=False)
    for details in all_details:
        # A default that hangs on a wrong key, and a list that is too short because an item is wrong, are no news.
        inner = [other for other in all_details if other["loc"] and other["loc"][:-1] == details["loc"]]
        if details["type"] == "default_factory_not_called" or inner:
            continue
        keys: Keys = tuple(details["loc"])
        if details["type"] == "recipe" and details["ctx"]["key"]:
            keys = (*keys, *(int(part) if part.isdigit() else part for part in details["ctx"]["key"].split(".")))
        wrong, remedy = _explain(keys, details)  # type: ignore[arg-type]
        if remedy.startswith("Remove it") and document.overridden and not document.from_command_line(keys):
            remedy = remedy.replace("Remove it", f"Remove it{_unset(keys)}", 1)
        if remedy.endswith(_QUOTES) and (option := document.options.get(keys, "")).startswith("--set "):
            name, _, written = option.removeprefix("--set ").partition("=")  # a shell takes quotes away
            remedy = remedy.replace(_QUOTES, f"write it as --set '{name}=\"{written.strip()}\"'.")
        found.append(
            (
                document.line(keys),
                f"{document.where(keys)}: {dotted(keys)}: {wrong}.",
                remedy,
            )
        )
    found.sort(key=lambda entry: entry[0])
    if len(found) == 1:
        return RecipeError(found[0][1], found[0][2])
    messages = [f"{message} {remedy}".rstrip() for _, message, remedy in found[:MAX_ERRORS]]
    if len(found) > MAX_ERRORS:
        messages.append(f"... and {len(found) - MAX_ERRORS} more.")
    return RecipeError("\n".join(messages))


def _unset(keys: Keys) -> str:
    """How an option takes back a key that stands in the file: by its default, if it is a plain value of no list."""
    if not all(isinstance(key, str) for key in keys):
        return ""
    section: type[BaseModel] = Recipe
    for key in keys[:-1]:
        kind = section.model_fields[str(key)].annotation
        section = next(t for t in (*get_args(kind), kind) if isinstance(t, type) and issubclass(t, BaseModel))
    default = section.model_fields[str(keys[-1])].get_default()
    if default is not None and not isinstance(default, (str, int, float)):
        return ""
    return f" (--set {dotted(keys)}={default if isinstance(default, str) else json.dumps(default)})"


def _explain(keys: Keys, details: dict[str, Any]) -> tuple[str, str]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "recipe":
        return context["wrong"], context["remedy"]
    if kind == "missing":
        return _missing(keys)
    if kind == "extra_forbidden":
        return "unknown key", _unknown(keys)
    if kind == "literal_error" and keys == ("version",):
        return f"is {shown(value)}, and this quantcli reads version 1", "Write version: 1."
    if kind == "literal_error":
        allowed = context["expected"]
        meant = nearest(value, re.findall(r"'([^']*)'", allowed)) if isinstance(value, str) else None
        allowed = allowed.replace("'", "")
        return f"is {shown(value)}", f"Did you mean {meant}? Allowed: {allowed}." if meant else f"Allowed: {allowed}."
    if kind == "string_pattern_mismatch":  # model.device is the one key with a pattern
        return f"is {shown(value)}", "Allowed: auto, cpu, cuda, cuda:N, npu or npu:N."
    if kind in _BOUND:
        name, words = _BOUND[kind]
        return f"is {shown(value)}", f"It must be {words} {context[name]:g}."
    if kind in ("string_too_short", "too_short"):
        return "is empty", "Give a value or remove the key."
    if kind in _EXPECTED:
        if value is None:
            return "is null", f"It must be {_EXPECTED[kind]}; remove the key for the default."
        remedy = f"It must be {_EXPECTED[kind]}."
        if kind == "string_type" and isinstance(value, (int, float)):
            remedy = f"It must be text; {_QUOTES}"
        if kind == "int_type" and isinstance(value, str) and value.isdecimal():
            remedy = "It must be a whole number without quotes."
        if kind == "tuple_type" and isinstance(value, (str, int, float)):
            remedy = f"It must be a list, as [{value}]."
        if keys == ("model",) and isinstance(value, str):
            remedy = f"It must be a section of keys, as {{path: {value}}}."
        return f"is {shown(value)}", remedy
    return f"is {shown(value)}: {details['msg']}", ""


def _missing(keys: Keys) -> tuple[str, str]:
    if keys == ("model", "path"):
        return "is missing", "Pass --model PATH or write it: a model directory, a .gguf file or a hub name."
    if keys == ("output",):
        return "is missing", "Pass --output DIRECTORY or write it."
    if keys == ("quantize",):
        return "is missing", "Add the scheme, as quantize: {weights: {bits: 8}}."
    return "is missing", "Add it."


def _unknown(keys: Keys) -> str:
    section, key = tuple(part for part in keys[:-1] if isinstance(part, str)), str(keys[-1])  # items share their keys
    known = known_keys().get(section, ())
    meant = nearest(key, known)
    if meant:
        return f"Did you mean {meant}?"
    elsewhere = [dotted((*keys, key)) for keys, names in known_keys().items() if key in names]
    if elsewhere:
        return f"It belongs at {' or '.join(elsewhere)}."
    place = dotted(section) if section else "a recipe"
    return f"Keys of {place}: {', '.join(known)}."
