"""What a file beside config.json says in its place, and what the quantization_config of a GPTQ or AWQ checkpoint says
of one linear, held against its tensors.

Beside bits and group size of the whole it may name linears that differ, in the words of the tool that wrote it:

    dynamic                        GPTQModel: expression → entries; of those that match from the start of a name the
                                   first holds. Behind `-:` it leaves linears in float, `+:` before one means nothing
    extra_config                   AutoRound: name or expression anywhere in it → entries; names go first, and 16 bits
                                   are float
    modules_to_not_convert         AutoAWQ: parts of names; left in float
    modules_in_block_to_quantize   transformers: parts of names, in lists; what is in none is left in float
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError
from quantcli.formats import common
from quantcli.model.checkpoint import read_json

CONFIG = "quantize_config.json"
"""Beside config.json, which says the same of GPTQ; older checkpoints have this file alone."""
MODELOPT = "hf_quant_config.json"
"""The same of Model-Optimizer."""
_ALONE = ((CONFIG, "gptq", ".qweight"), (MODELOPT, "modelopt", ".weight_scale"))
"""Files that may stand alone: name, quant_method, and what the name of one of the tensors ends with."""
_REMEDY = "Take the configuration that belongs to these weights, or quantize again."


def read_configuration(directory: Path, tensors: Iterable[str]) -> dict[str, Any]:
    """config.json of a checkpoint with these tensors. What AutoGPTQ and Model-Optimizer once said of weights in a file
    of its own, is its quantization_config, where a tensor is one of that method."""
    config, names = read_json(directory / "config.json"), list(tensors)
    for file, method, suffix in _ALONE if "quantization_config" not in config else ():
        if (directory / file).is_file() and any(name.endswith(suffix) for name in names):
            return config | {"quantization_config": {"quant_method": method} | read_json(directory / file)}
    return config


def stands_alone(directory: Path) -> bool:
    """Whether a file is there that may say of quantization what config.json does not."""
    return any((directory / file).is_file() for file, *_ in _ALONE)


class Declared:
    """The settings of each linear by a quantization_config. Raises ModelError for expressions that cannot be tried."""

    def __init__(self, directory: Path, content: Mapping[str, Any]) -> None:
        self.file = directory / "config.json"
        if "quantization_config" not in read_json(self.file):
            self.file = directory / CONFIG
        self._whole = {
            "bits": content.get("bits", content.get("w_bit")),
            "group_size": content.get("group_size", content.get("q_group_size")),
            "sym": content.get("sym", True),
            "desc_act": content.get("desc_act", False),
        }
        self._dynamic: Mapping[str, Any] = content.get("dynamic") or {}
        self._extra: Mapping[str, Any] = content.get("extra_config") or {}
        self._left = [str(name).strip(".") for name in content.get("modules_to_not_convert") or ()]
        named = content.get("modules_in_block_to_quantize") or ()
        self._named = [part for each in named for part in ([each] if isinstance(each, str) else each)]
        self._expressions = [name for name in self._extra if set(name) & set(r"*+?^$()[]{}|\\")]
        try:
            common.check_expressions(self._expressions)
            self._rule = _first_rule(self._dynamic)
        except ModelError as error:
            raise ModelError(f"{self.file}: {error.message}", error.remedy) from error

    def settings(self, *names: str) -> dict[str, Any] | str:
        """Entries bits, group_size, sym and desc_act of a linear by its names, in the model and in the checkpoint; None
        where they are not said. For one that stays in float, the key that says so."""
        rule = next(filter(None, map(self._rule, names)), None)
        if rule is not None and rule.startswith("-:"):
            return "dynamic"
        if any(f".{part}." in f".{name}." for part in self._left for name in names):
            return "modules_to_not_convert"
        inside = any(map(common.in_block, names))
        if self._named and inside and not any(part in name for part in self._named for name in names):
            return "modules_in_block_to_quantize"
        own = self._dynamic[rule] if rule is not None else self._extra_of(names)
        own = {key: own[key] for key in self._whole if key in own}
        found = self._whole | own
        in_float = rule is None and isinstance(found["bits"], int) and found["bits"] >= 16
        return "extra_config" if own and in_float else found

    def checked(self, names: tuple[str, str], bits: int, inner: int, groups: int) -> dict[str, Any]:
        """The settings of a linear that is quantized with `groups` scales a channel of `inner` inputs.

        Raises ModelError where they differ from its bits and groups, or it should be in float.
        """
        said = self.settings(*names)
        if isinstance(said, str):
            raise ModelError(f"{self.file}: quantization_config.{said} leaves {names[0]} in float, and its tensors are "
                             "quantized.", _REMEDY)  # fmt: skip
        if said["bits"] not in (bits, None):
            raise ModelError(f"{self.file}: quantization_config.bits is {said['bits']!r} for {names[0]}, and its "
                             f"tensors have {bits} bits.", _REMEDY)  # fmt: skip
        size = said["group_size"]
        whole = size if isinstance(size, int) and size > 0 else inner if size == -1 else 0
        if size is not None and (whole == 0 or -(-inner // whole) != groups):
            found = f"groups of {inner // groups}" if groups > 1 else "one scale a channel"
            raise ModelError(f"{self.file}: quantization_config.group_size is {size!r} for {names[0]}, and its tensors "
                             f"have {found}.", _REMEDY)  # fmt: skip
        return said

    def _extra_of(self, names: tuple[str, ...]) -> Mapping[str, Any]:
        keys = [name for name in names if name in self._extra]
        keys += [key for key in self._expressions if any(re.search(key, name) for name in names)]
        return self._extra[keys[0]] if keys else {}


def _first_rule(rules: Mapping[str, Any]) -> Callable[[str], str | None]:
    """The first rule of `dynamic` that fits a name. One that is a name in full is looked up: there may be one for
    every expert."""
    names: dict[str, tuple[int, str]] = {}
    patterns: list[tuple[int, str, str]] = []
    for place, rule in enumerate(rules):
        pattern = rule[2:] if rule.startswith(("+:", "-:")) else rule
        name = re.sub(r"\\(.)", r"\1", pattern)[1:-1]
        if pattern == f"^{re.escape(name)}$":
            names.setdefault(name, (place, rule))
        else:
            patterns.append((place, rule, pattern))
    common.check_expressions([pattern for *_, pattern in patterns])

    def first(name: str) -> str | None:
        found = [names[name]] if name in names else []
        found += [(place, rule) for place, rule, pattern in patterns if re.match(pattern, name)][:1]
        return min(found)[1] if found else None

    return first
