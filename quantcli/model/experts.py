"""The linears of mixture-of-experts layers, whose weights transformers holds joined in 3-D parameters.

A module of experts has `gate_up_proj` (or `up_proj`) and `down_proj`, [experts, out, in] each: the interface that
transformers gives its kernels, whatever the family. Under which names checkpoints store each expert's matrices, and
which rows of a parameter they are, is read off transformers' own conversion of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import ModelError
from quantcli.model.structure import Experts, Linear, Producer, SharedInput

ENTERING, LEAVING = ("gate_up_proj", "up_proj"), "down_proj"
"""Parameters that read an expert's input (one of the two), and the one that makes its output."""
PROBE_ROWS = 8


@dataclass(frozen=True)
class FoundExperts:
    """The experts of a block, their linears, by the paths of their modules routers that are none, and what enters the
    last linear of each expert, where a scale can be folded into the one before it. Names of linears are a checkpoint's.
    """

    experts: tuple[Experts, ...]
    linears: tuple[Linear, ...]
    routers: dict[str, Linear]
    inner: tuple[SharedInput, ...]

    def gates(self, linear: Linear) -> bool:
        """Whether a linear beside experts chooses among them, or weighs a shared one: it has an output an expert, or
        one."""
        return any(
            linear.name.startswith(f"{experts.name.rpartition('.')[0]}.")
            and linear.out_features in (1, len(experts.linears))
            for experts in self.experts
        )


def find_experts(model: nn.Module, block: str) -> FoundExperts:
    """The experts of the block at path `block` of a model on the meta device.

    Routers are 2-D weights of modules beside experts, with a row an expert, that belong to no linear. Raises ModelError
    for names in the checkpoint that do not lie below the block.
    """
    module = model.get_submodule(block)
    convolutions = {id(m.weight) for m in module.modules() if isinstance(m, nn.Conv1d)}
    joined: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(prefix=block):
        if parameter.ndim == 3 and id(parameter) not in convolutions:
            joined.setdefault(name.rpartition(".")[0], []).append(name)
    experts, linears, inner = [], [], []
    routers: dict[str, Linear] = {}
    for path, names in joined.items():
        members = _members(model, path, names)
        linears += list(chain.from_iterable(members))
        if members and _passes_scales(model.get_submodule(path), len(members[0]) - 1):
            inner += [_inner(*expert[-2:]) for expert in members]
        routers |= dict(_routers(model, path, len(members)))
        names.sort(key=lambda name: name.endswith(f".{LEAVING}"))
        experts.append(Experts(path, tuple(names), tuple(tuple(m.name for m in expert) for expert in members)))
    for linear in (*linears, *routers.values()):
        if not linear.name.startswith(f"{block}."):
            raise ModelError(f"Checkpoints have {linear.name} for an expert in {block}.", "It is not supported yet.")
    return FoundExperts(tuple(experts), tuple(linears), routers, tuple(inner))


def matrices(experts: Experts, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The weight [out, in] of each linear by its name: views of the values of `Experts.parameters`."""
    *entering, leaving = parameters
    found: dict[str, Tensor] = {}
    for index, names in enumerate(experts.linears):
        parts = [part for joined in entering for part in joined[index].chunk(len(names) - 1)]
        found |= dict(zip(names, (*parts, leaving[index]), strict=True))
    return found


def _inner(before: Linear, last: Linear) -> SharedInput:
    return SharedInput((last.name,), last.in_features, Producer(before.name, "linear"))


def _passes_scales(module: nn.Module, entering: int) -> bool:
    """Whether what enters an expert's last linear has in each channel the scale of what the linear before puts out."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 3, PROBE_ROWS).view(1, -1, 1)  # a bound that activations are held within shows
    parts = torch.randn(entering, PROBE_ROWS, 4, generator=generator) * sizes
    scale = torch.rand(4, generator=generator) + 0.5
    act: Any = module._apply_gate if entering > 1 else module.act_fn
    try:
        plain = act(torch.cat([*parts], -1)) * scale
        scaled = act(torch.cat([*parts[:-1], parts[-1] * scale], -1))
    except Exception:  # whatever it raises, it is something else
        return False
    return bool(torch.allclose(scaled, plain, rtol=1e-4))


def reads_by_a_product(router: nn.Module) -> bool:
    """Whether what a router with a matrix as its `weight` W puts out depends on its input x only through x Wᵀ.

    Tried on numbers, as x A and W A⁻ᵀ with an A that scales and mixes channels. Then W takes in what a norm gives away,
    and rotations. Beside x it may be called with a number an expert. False too for one that puts out no scores.
    """
    generator = torch.Generator().manual_seed(0)
    trial = copy.deepcopy(router).to_empty(device="cpu").float().requires_grad_(False)
    for value in (*trial.parameters(), *(b for b in trial.buffers() if b.is_floating_point())):
        value.copy_(torch.randn(value.shape, generator=generator))
    weight = trial.get_parameter("weight")
    experts, width = weight.shape
    matrix, bias = weight * width**-0.5, torch.randn(experts, generator=generator)
    x, axis = torch.randn(PROBE_ROWS, width, generator=generator), torch.randn(width, generator=generator)
    scale = torch.rand(width, generator=generator) + 0.5
    for others in ((), (bias,)):
        try:
            weight.copy_(matrix)
            expected = _scores(trial(x, *others))
            weight.copy_(_mirrored(matrix / scale, axis))
            found = _scores(trial(_mirrored(x * scale, axis), *others))
        except Exception:  # whatever it raises, such as for want of another argument, it is something else
            continue
        pairs = zip(found, expected, strict=True)
        return bool(expected) and all(torch.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in pairs)
    return False


def _mirrored(rows: Tensor, axis: Tensor) -> Tensor:
    """The rows reflected at the plane across an axis: by an orthogonal matrix that is its own transpose."""
    return rows - 2 * torch.outer(rows @ axis, axis) / axis.square().sum()


def _scores(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, tuple) else (output,)
    return [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _members(model: nn.Module, path: str, names: list[str]) -> list[tuple[Linear, ...]]:
    """The linears of each expert in the order of `Experts.linears`.

    Empty if the module has not the usual interface and layout (gate before up, not alternating; not transposed), or has
    biases or a norm behind each expert, or if checkpoints do not hold its experts one by one.
    """
    module = model.get_submodule(path)
    leaves = {name.rpartition(".")[2]: name for name in names}
    entering = [leaf for leaf in ENTERING if leaf in leaves]
    usual = len(entering) == 1 and set(leaves) == {*entering, LEAVING} and len(list(module.parameters())) == 2
    plain = not getattr(module, "is_transposed", True) and getattr(module, "is_concatenated", False)
    if not usual or not plain or getattr(module, "has_post_expert_norm", False):
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


def _routers(model: nn.Module, path: str, experts: int) -> Iterator[tuple[str, Linear]]:
    parent = path.rpartition(".")[0]
    for name, parameter in model.get_submodule(parent).named_parameters(prefix=parent):
        place = name.rpartition(".")[0]
        owner = model.get_submodule(place)
        matrix = name.endswith(".weight") and parameter.ndim == 2 and len(parameter) == experts
        if matrix and not isinstance(owner, nn.Linear):
            (stored,) = _as_stored(model, name, parameter)
            yield place, Linear(stored.removesuffix(".weight"), int(parameter.shape[1]), experts)


def _as_stored(model: nn.Module, name: str, value: Tensor) -> dict[str, Tensor]:
    """What `save_pretrained` stores of a parameter with this value."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(model, {name: value})
    return made
