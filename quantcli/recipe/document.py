"""A recipe as text: YAML to plain data that remembers its line numbers, command-line overrides, and back to YAML."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from quantcli.errors import RecipeError
from quantcli.recipe.aliases import ALIAS_VALUES, ALIASES

Keys = tuple[str | int, ...]
Place = Callable[[int], str]
T = TypeVar("T")

# A recipe holds some 40 values. The bounds stop documents that unfold through aliases or nest without end.
MAX_BYTES = 1 << 20
MAX_VALUES = 10_000
MAX_DEPTH = 32

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,18})$")
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """YAML in which off, on, yes and no, dates, 010 and 1:30 are text, and 1e-3 is a number."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (declared by pyyaml)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this loader or a YAML 1.1 loader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _regexp, _first in (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_tag, _regexp, _first)
    _Dumper.add_implicit_resolver(_tag, _regexp, _first)


@dataclass
class Document:
    """Plain data of a recipe and where each part was written.

    `lines` maps the keys of a value to the line of the last of them, counted from 1; `options` maps the keys that the
    command line set to the option as typed; `base` is the directory of relative paths in the file.
    """

    name: str
    base: Path
    data: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)
    options: dict[Keys, str] = field(default_factory=dict)

    def where(self, keys: Keys) -> str:
        """FILE:LINE of the key or item at `keys`, or the option that set it.

        A key that is absent has the place of the nearest section around it.
        """
        for end in range(len(keys), -1, -1):
            if keys[:end] in self.options:
                return self.options[keys[:end]]
            if keys[:end] in self.lines:
                return f"{self.name}:{self.lines[keys[:end]]}"
        return self.name

    def line(self, keys: Keys) -> int:
        """The line of the key or item at `keys`, or of the nearest section around it; 0 for what is not from a file."""
        return next((self.lines[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in self.lines), 0)

    def from_command_line(self, keys: Keys) -> bool:
        """Whether the value at `keys` was given by an option."""
        return any(keys[:end] in self.options for end in range(1, len(keys) + 1))

    @property
    def overridden(self) -> bool:
        """Whether any value was given by --set."""
        return any(option.startswith("--set") for option in self.options.values())

    def get(self, keys: Keys) -> Any:
        """The value at `keys`, or None."""
        value: Any = self.data
        for key in keys:
            if isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value):
                value = value[key]
            else:
                value = value.get(key) if isinstance(value, dict) else None
        return value

    def set(self, keys: tuple[str, ...], value: Any, option: str) -> None:
        """Write `value` at `keys`, making the sections around it where they are absent or null.

        Raises RecipeError where a key on the way holds no section.
        """
        value = _translated(keys, value, option)
        keys = (*keys[:-1], ALIASES.get(keys, keys[-1]))
        section = self.data
        for end in range(1, len(keys)):
            inner, place = section.get(keys[end - 1]), ".".join(keys[:end])
            if isinstance(inner, list) or keys[end].isdecimal():
                raise RecipeError(f"{option}: items of a list are no keys.", f"Set the whole list: {place}=[…].")
            if inner is None:
                inner = section[keys[end - 1]] = {}
                self.options[keys[:end]] = option
            if not isinstance(inner, dict):
                raise RecipeError(f"{option}: {place} is no section.", "Name a key as in the recipe.")
            section = inner
        section[keys[-1]] = value
        _forget(self.lines, keys)
        _forget(self.options, keys)
        self.options[keys] = option
        self.rename_aliases()

    def rename_aliases(self) -> None:
        """Give keys written by an older name their present name; raises RecipeError where both are there."""
        for old, name in ALIASES.items():
            section = self.get(old[:-1])
            if not isinstance(section, dict) or old[-1] not in section:
                continue
            if name in section:
                raise RecipeError(
                    f"{self.where(old)}: {'.'.join(old)}: is the older name of {name}.",
                    "Keep one of the two.",
                )
            section[name] = _translated(old, section.pop(old[-1]), self.where(old))
            _rename(self.lines, old, (*old[:-1], name))
            _rename(self.options, old, (*old[:-1], name))


def _translated(keys: tuple[str, ...], value: Any, place: str) -> Any:
    """The value under the present name of a key that was given by an older one."""
    values = ALIAS_VALUES.get(keys)
    if values is None:
        return value
    for known, meaning in values.items():
        if type(value) is type(known) and value == known:
            return meaning
    allowed = ", ".join(f"{shown(known)} ({meaning})" for known, meaning in values.items())
    raise RecipeError(f"{place}: {'.'.join(keys)}: is {shown(value)}.", f"Allowed: {allowed}.")


def _forget(known: dict[Keys, T], keys: Keys) -> None:
    for inner in [inner for inner in known if inner[: len(keys)] == keys]:
        del known[inner]


def _rename(known: dict[Keys, T], old: Keys, new: Keys) -> None:
    for inner in [inner for inner in known if inner[: len(old)] == old]:
        known[(*new, *inner[len(old) :])] = known.pop(inner)


def read_document(path: Path, base: Path) -> Document:
    """The recipe file at `path`; raises RecipeError with file and line for whatever is no plain YAML mapping."""
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read ({error.strerror}).", "Check its permissions.") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name}:{line}: is not UTF-8 text.", "Save the recipe as UTF-8.") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{name}: is larger than {MAX_BYTES >> 20} MiB.", "Name a recipe, not a data file.")
    data, lines = parse_yaml(text, lambda line: f"{name}:{line}")
    if not isinstance(data, dict):
        raise RecipeError(
            f"{name}:{lines[()]}: holds {shown(data)}, not the keys of a recipe.",
            "Start from a shipped one: quantcli recipes copy w8a8.",
        )
    lines[()] = 1
    document = Document(name, base, data, lines)
    document.rename_aliases()
    return document


def mapping_document(source: Mapping[str, Any], base: Path) -> Document:
    """A recipe given as a mapping by a Python caller. It is copied; paths become text and tuples lists."""
    data = _plain(source, ())
    assert isinstance(data, dict)
    document = Document("recipe", base, data)
    document.rename_aliases()
    return document


def parse_yaml(text: str, place: Place) -> tuple[Any, dict[Keys, int]]:
    """The one YAML document in `text` as dict, list, str, int, float, bool and None, and the line of every part.

    `place` renders a line number as the beginning of an error message. Raises RecipeError for syntax errors, keys that
    repeat or are no text, tags, merge keys and aliases that unfold without bound.
    """
    lines: dict[Keys, int] = {(): 1}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is None:
            return None, lines
        lines[()] = _line(node)
        return _plain_node(node, (), lines, place), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{place(line)}: holds a character that YAML forbids.", "Remove it.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "syntax error"
        remedy = "Check indentation, colons and quotes there."
        if "alias" in problem or "alias" in (error.context or ""):
            remedy = 'A value that begins with * needs quotes, as "*.mlp.down_proj".'
        elif error.context and "single document" in error.context:
            remedy = "Keep one recipe a file."
        raise RecipeError(f"{place(mark.line + 1 if mark else 1)}: no valid YAML: {problem}.", remedy) from None
    except RecursionError:
        raise RecipeError(f"{place(1)}: nests too deep.", "A recipe has at most four levels.") from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _plain_node(node: yaml.Node, keys: Keys, lines: dict[Keys, int], place: Place) -> Any:
    # Every value adds an entry to `lines`, so its length counts what aliases have unfolded so far.
    if len(lines) > MAX_VALUES or len(keys) > MAX_DEPTH:
        raise RecipeError(f"{place(_line(node))}: unfolds to too many values.", "Write the recipe without aliases.")
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = _key(key_node, keys, place), _line(key_node)
            if key in mapping:
                raise RecipeError(
                    f"{place(line)}: {dotted((*keys, key))}: is there twice, first on line {lines[(*keys, key)]}.",
                    "Keep one of them.",
                )
            lines[(*keys, key)] = line
            mapping[key] = _plain_node(value_node, (*keys, key), lines, place)
        return mapping
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        items = []
        for index, item in enumerate(node.value):
            lines[(*keys, index)] = _line(item)
            items.append(_plain_node(item, (*keys, index), lines, place))
        return items
    if isinstance(node, yaml.ScalarNode):
        value = str(node.value)
        if kind == "str":
            return value
        if kind == "null" and _NULL.match(value):
            return None
        if kind == "bool" and _BOOL.match(value):
            return value.lower() == "true"
        if kind == "int" and _INT.match(value):
            return int(value)
        if kind == "float" and (_FLOAT.match(value) or _INT.match(value)):
            return float(value)
    raise RecipeError(f"{place(_line(node))}: {dotted(keys)}: has the YAML tag {node.tag}.", "Write a plain value.")


def _key(node: yaml.Node, keys: Keys, place: Place) -> str:
    # A plain << is text to this loader, since recipes have no sections that could share keys.
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str" and node.value != "<<":
        return str(node.value)
    start = place(_line(node)) + (f": {dotted(keys)}: " if keys else ": ")
    if isinstance(node, yaml.ScalarNode) and node.value == "<<":
        raise RecipeError(f"{start}merge keys (<<) are not read.", "Write the keys out.")
    what = repr(str(node.value)) if isinstance(node, yaml.ScalarNode) else "a list or section"
    raise RecipeError(f"{start}{what} is no key.", "Keys are plain words, as in quantcli recipes show w8a8.")


def _plain(value: Any, keys: Keys) -> Any:
    if len(keys) > MAX_DEPTH:
        raise RecipeError("recipe: nests too deep.", "A recipe has at most four levels.")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"recipe: {dotted((*keys, str(key)))}: {key!r} is no key.", "Keys are text.")
        return {key: _plain(inner, (*keys, key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, (*keys, index)) for index, inner in enumerate(value)]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def dump_yaml(data: Mapping[str, Any]) -> str:
    """`data` as YAML that `parse_yaml` reads back equal, keys in their order."""
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=1000))


def dotted(keys: Keys) -> str:
    """Keys as a reader writes them: quantize.rollback.names[0]."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def shown(value: object) -> str:
    """A short rendering of a recipe's value, as written in YAML."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
