"""The linears of mixture-of-experts layers, whose weights transformers holds joined in 3-D parameters.

A module of experts has `gate_up_proj` (or `up_proj`) and `down_proj`, [experts, out, in] each: the interface that
transformers gives its kernels, whatever the family. Under which names checkpoints store each expert's matrices, and
which rows of a parameter they are, is read off transformers' own conversion of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from quantcli.errors import ModelError
from quantcli.model.structure import Experts, Linear

ENTERING, LEAVING = ("gate_up_proj", "up_proj"), "down_proj"
"""Parameters that read an expert's input (one of the two), and the one that makes its output."""


@dataclass(frozen=True)
class FoundExperts:
    """The experts of a block, their linears, and routers that are no linears as modules. Names are a checkpoint's."""

    experts: tuple[Experts, ...]
    linears: tuple[Linear, ...]
    routers: tuple[Linear, ...]

    def gates(self, linear: Linear) -> bool:
        """Whether a linear beside experts chooses among them, or weighs a shared one: it has an output an expert, or
        one."""
        return any(
            linear.name.startswith(f"{experts.name.rpartition('.')[0]}.")
            and linear.out_features in (1, len(experts.linears))
            for experts in self.experts
        )


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has 3-D parameters of its own, and is no convolution."""
    parameters = module.parameters(recurse=False)
    return not isinstance(module, nn.Conv1d) and any(parameter.ndim == 3 for parameter in parameters)


def find_experts(model: nn.Module, block: str) -> FoundExperts:
    """The experts of the block at path `block` of a model on the meta device.

    Routers are 2-D weights of modules beside experts, with a row an expert, that belong to no linear. Raises ModelError
    for names in the checkpoint that do not lie below the block.
    """
    joined = {
        path: [name for name, parameter in module.named_parameters(path, recurse=False) if parameter.ndim == 3]
        for path, module in model.get_submodule(block).named_modules(prefix=block)
        if holds_experts(module)
    }
    experts, linears, routers = [], [], []
    for path, names in joined.items():
        members = _members(model, path, names)
        linears += list(chain.from_iterable(members))
        routers += list(_routers(model, path, len(members)))
        names.sort(key=lambda name: name.endswith(f".{LEAVING}"))
        experts.append(Experts(path, tuple(names), tuple(tuple(m.name for m in expert) for expert in members)))
    for linear in (*linears, *routers):
        if not linear.name.startswith(f"{block}."):
            raise ModelError(f"Checkpoints have {linear.name} for an expert in {block}.", "It is not supported yet.")
    return FoundExperts(tuple(experts), tuple(linears), tuple(routers))


def _members(model: nn.Module, path: str, names: list[str]) -> list[tuple[Linear, ...]]:
    """The linears of each expert in the order of `Experts.linears`.

    Empty if the module has not the usual interface and layout (gate before up, not alternating; not transposed), or has
    biases, or if checkpoints do not hold its experts one by one.
    """
    module = model.get_submodule(path)
    leaves = {name.rpartition(".")[2]: name for name in names}
    entering = [leaf for leaf in ENTERING if leaf in leaves]
    usual = len(entering) == 1 and set(leaves) == {*entering, LEAVING} and len(list(module.parameters())) == 2
    plain = not getattr(module, "is_transposed", True) and getattr(module, "is_concatenated", False)
    if not usual or not plain:
        return []
    parts = [_parts(model, leaves[leaf]) for leaf in (*entering, LEAVING)]
    if not all(parts):
        return []
    return [tuple(chain.from_iterable(part[expert] for part in parts)) for expert in range(len(parts[0]))]


def _parts(model: nn.Module, name: str) -> list[list[Linear]]:
    """The matrices of each expert in a parameter, as the checkpoint has them; empty if it holds the parameter whole."""
    parameter = model.get_parameter(name)
    shapes = _as_stored(model, name, parameter)
    experts = len(parameter)
    each = len(shapes) // experts
    if each == 0 or each * experts != len(shapes):
        return []
    # the same conversion of a small tensor, whose values are places, says which part of which expert each one is
    places = _as_stored(model, name, torch.arange(experts * each * each, device="cpu").view(experts, each, each))
    found: list[dict[int, Linear]] = [{} for _ in range(experts)]
    for stored, matrix in shapes.items():
        if not stored.endswith(".weight") or matrix.ndim != 2:
            return []
        place = int(places[stored].min())
        out_features, in_features = matrix.shape
        found[place // each**2][place] = Linear(stored.removesuffix(".weight"), in_features, out_features)
    return [[parts[place] for place in sorted(parts)] for parts in found]


def _routers(model: nn.Module, path: str, experts: int) -> Iterator[Linear]:
    parent = path.rpartition(".")[0]
    for name, parameter in model.get_submodule(parent).named_parameters(prefix=parent):
        owner = model.get_submodule(name.rpartition(".")[0])
        matrix = name.endswith(".weight") and parameter.ndim == 2 and len(parameter) == experts
        if matrix and not isinstance(owner, nn.Linear):
            (stored,) = _as_stored(model, name, parameter)
            yield Linear(stored.removesuffix(".weight"), int(parameter.shape[1]), experts)


def _as_stored(model: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """What `save_pretrained` stores of a parameter with this value."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(model, {name: value})
    return made
