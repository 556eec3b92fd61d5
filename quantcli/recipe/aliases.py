"""msModelSlim's names of keys, and what they are called here."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

# By the keys on the way to it: read as the name on the right, with the value translated where it differs.
ALIASES: dict[tuple[str, ...], str] = {
    ("smooth", "anti_method"): "method",
    ("smooth", "disable_anti_names"): "exclude",
    ("quantize", "weights", "w_sym"): "symmetric",
    ("quantize", "weights", "mm_tensor"): "granularity",
    ("quantize", "activations", "act_method"): "method",
    ("quantize", "activations", "pr"): "quantized_share",
    ("quantize", "rollback", "disable_names"): "names",
    ("quantize", "rollback", "disable_level"): "level",
    ("quantize", "rollback", "disable_last_linear"): "last_linear",
}
ALIAS_VALUES: dict[tuple[str, ...], dict[Any, Any]] = {
    ("quantize", "weights", "mm_tensor"): {True: "tensor", False: "channel"},
    ("quantize", "activations", "act_method"): {1: "minmax", 2: "histogram", 3: "mixed"},
}


def with_aliases(*section: str) -> ConfigDict:
    """The JSON schema of a section with the older names of its keys. `section`: the keys on the way to it."""

    def add(schema: dict[str, Any]) -> None:
        for older, name in ALIASES.items():
            if older[:-1] == section:
                values = ALIAS_VALUES.get(older)
                entry = {"enum": list(values)} if values else {**schema["properties"][name]}
                schema["properties"][older[-1]] = entry | {
                    "title": older[-1],
                    "description": f"Older name of {name}.",
                }

    return ConfigDict(json_schema_extra=add)
