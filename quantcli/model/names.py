"""From checkpoint names to module parameters, by the conversion tables of transformers itself.

Most tensors are stored under the name of the parameter that holds them. Some families rename them, join experts into
one 3-D parameter, or leave the base model's prefix out; transformers keeps that knowledge as data, which is used here
so that a model family needs no code of ours.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quantcli.errors import ModelError
from quantcli.model.structure import Structure

TEXT_ALONE = "Save its text model alone, as docs/troubleshooting.md shows, and quantize that."
"""What to do with a model of several parts."""


@dataclass
class ParameterSource:
    """Which checkpoint tensors make one or several parameters.

    `targets` are parameter names, `tensors` checkpoint names. Without a converter there is one of each and the tensor
    is the parameter.
    """

    targets: tuple[str, ...]
    tensors: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: Any = None

    def assemble(self, model: nn.Module, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Parameter values, from a function that reads checkpoint tensors by name."""
        values = read(self.tensors)
        if self.converter is None:
            return {self.targets[0]: values[self.tensors[0]]}
        converter = copy.deepcopy(self.converter)
        for tensor, pattern in zip(self.tensors, self.patterns, strict=True):
            converter.add_tensor(self.targets[0], tensor, pattern, values[tensor])
        try:
            made = converter.convert(self.targets[0], model=model, config=getattr(model, "config", None))
        except (RuntimeError, ValueError, IndexError) as error:
            count = len(self.tensors)
            raise ModelError(f"{self.targets[0]} cannot be put together from {count} tensors: {error}.",
                             "One is missing or misshapen; download the checkpoint again.") from error  # fmt: skip
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def map_parameters(model: nn.Module, checkpoint_names: Iterable[str]) -> tuple[dict[str, ParameterSource], list[str]]:
    """(parameter name → its source, checkpoint names that no parameter takes).

    Tied parameters share the source of the tensor that the checkpoint holds. Raises ModelError when a parameter has no
    source, since a model with random weights in it is worth nothing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)

    joined: dict[str, ParameterSource] = {}
    sources: dict[str, ParameterSource] = {}
    unused: list[str] = []
    for name in sorted(checkpoint_names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            unused.append(name)
        elif pattern is None:
            sources[target] = ParameterSource((target,), [name])
        else:
            source = joined.setdefault(target, _converted(target, by_pattern[pattern]))
            source.tensors.append(name)
            source.patterns.append(pattern)
    for source in joined.values():
        sources |= dict.fromkeys(source.targets, source)
    _share_tied(model, sources)
    missing = [name for name in state if name not in sources]
    if missing and any("language_model" in name.split(".")[:2] for name in unused):
        raise ModelError("the checkpoint holds a model of text and images, whose text model is one part.", TEXT_ALONE)
    if missing:
        raise ModelError(f"the checkpoint lacks {missing[0]} ({len(missing)} of {len(state)} parameters are missing).",
                         "It belongs to another architecture, or is incomplete.")  # fmt: skip
    return sources, unused


def _converted(target: str, converter: Any) -> ParameterSource:
    first, *others = converter.target_patterns
    return ParameterSource((target, *(target.replace(first, other) for other in others)), converter=converter)


def _share_tied(model: nn.Module, sources: dict[str, ParameterSource]) -> None:
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name)
    pairs = list((getattr(model, "all_tied_weights_keys", None) or {}).items())
    pairs += [(a, b) for names in holders.values() for a in names for b in names if a != b]
    for one, other in pairs + [(b, a) for a, b in pairs]:
        if one not in sources and other in sources:
            sources[one] = sources[other]


def parameter_tensors(
    directory: Path,
    structure: Structure,
    entries: Iterable[str],
    parameters: Iterable[str],
    *,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Checkpoint name of each parameter. Raises ModelError for one that is stored joined with others.

    Almost always it is the parameter's own name; only otherwise is the model built to ask transformers.
    """
    present = set(entries)
    names = {name: name for name in parameters}
    if all(name in present for name in names):
        return names
    from quantcli.model.skeleton import Skeleton

    skeleton = Skeleton(directory, structure, trust_remote_code=trust_remote_code)
    for name in names:
        source = skeleton.sources.get(name)
        if source is None:  # an expert's, which is no parameter
            names[name] = _expert_tensor(name, present)
            continue
        if source.converter is not None:
            # so it is written again by default; apart from each other experts would be joined instead
            apart = "Save it once with transformers' save_pretrained(…, save_original_format=False) and use that."
            remedy = "Its architecture is not supported." if any(b.experts for b in structure.blocks) else apart
            raise ModelError(f"{name} is stored joined with other weights in this checkpoint.", remedy)
        names[name] = source.tensors[0]
    return names


def _expert_tensor(name: str, present: Collection[str]) -> str:
    """The tensor of an expert in a checkpoint that may leave out the prefix of the base model."""
    parts = name.split(".")
    for begin in range(len(parts) - 1):
        if (tensor := ".".join(parts[begin:])) in present:
            return tensor
    raise ModelError(f"The checkpoint lacks {name}: it does not hold its experts one by one.",
                     "Save it once with transformers' save_pretrained and use that.")  # fmt: skip


def weight_tensors(
    directory: Path, structure: Structure, entries: Iterable[str], *, trust_remote_code: bool = False
) -> dict[str, str]:
    """Checkpoint name of the weight of every linear, as `parameter_tensors` finds it."""
    weights = {linear.name: f"{linear.name}.weight" for linear in structure.matrices()}
    names = parameter_tensors(directory, structure, entries, weights.values(), trust_remote_code=trust_remote_code)
    return {module: names[weight] for module, weight in weights.items()}


def checkpoint_prefix(module: str, weights: Mapping[str, str]) -> str:
    """The prefix of a module's own tensors in the checkpoint, whose names may differ from those of modules.

    `weights` maps linears to their weights (`weight_tensors`). Raises ModelError if no linear lies below the module
    under its own name.
    """
    for linear, weight in weights.items():
        below = f"{linear.removeprefix(module)}.weight"
        if linear.startswith(f"{module}.") and weight.endswith(below):
            return weight.removesuffix(below)
    raise ModelError(f"{module} has no linear by which its name in the checkpoint could be known.",
                     "Leave its attention unquantized.")  # fmt: skip
