"""Whether a checkpoint is what a float model is read from: its parameters hold floats, and nothing below a linear, such
as a scale, is left unread."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import ModelError
from quantcli.model.checkpoint import FLOATS, TensorEntry
from quantcli.model.structure import Structure

if TYPE_CHECKING:
    from quantcli.model.skeleton import TensorSource

_CODES = {"weight_packed", "qweight"}
"""Last parts of names that stand for a weight, in the formats that do not call its codes so."""
_REMEDY = "Put the files back that were written with these weights, or take the float model."


def linear_weights(modules: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """The name of each linear's weight, as a float checkpoint has it, by the names of the tensors of any checkpoint,
    which may lack the prefix of the base model. Linears without a weight, as a tied head, are left out."""
    names = {_float_name(name) for name in tensors}
    found = {module: _weight_name(module, names) for module in modules}
    return {module: name for module, name in found.items() if name}


def require_floats(
    directory: Path, structure: Structure, checkpoint: TensorSource, *, trust_remote_code: bool = False
) -> None:
    """Raise ModelError unless the tensors in `directory` are those of a float model, as their headers tell.

    Codes that have lost their description would be taken for weights, and their scales be left out. Other tensors of
    no parameter, such as rotary frequencies or layers that predict further tokens, do not matter.
    """
    weights = linear_weights((linear.name for linear in structure.matrices()), checkpoint.entries)
    parameters = [*weights.values(), *stored_parameters(structure, checkpoint.entries)]
    if (entry := first_codes(parameters, checkpoint.entries)) is not None:
        missing = "there is neither a quantization_config in config.json nor a quant_model_description.json"
        raise ModelError(f"{directory}: {entry.name} holds codes ({entry.dtype}), not floats, and nothing says what "
                         f"they are: {missing}.", _REMEDY)  # fmt: skip
    left = below_linears(structure, weights, checkpoint.entries)
    if left.keys() <= structure.parameters.keys():
        return
    unread = of_no_parameter(left, directory, structure, checkpoint, trust_remote_code=trust_remote_code)
    if unread:
        raise ModelError(f"{directory}: {unread[0]} is no tensor of a linear in float, as which {left[unread[0]]} is "
                         "read: what it stands for would be left out.", _REMEDY)  # fmt: skip


def stored_parameters(structure: Structure, tensors: Iterable[str]) -> list[str]:
    """The tensors that have the name of a parameter of the model, with or without the prefix of the base model."""
    names = {name for whole in structure.parameters for name in (whole, whole.partition(".")[2])}
    return [name for name in tensors if name in names]


def first_codes(weights: Iterable[str], entries: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The tensor of the first of these weights that holds no floats; None if all do."""
    stored = {_float_name(name): entry for name, entry in entries.items()}
    for name in weights:
        entry = entries.get(name) or stored.get(name)
        if entry is not None and (entry.name != name or entry.dtype not in {*FLOATS, "F64"}):
            return entry
    return None


def below_linears(structure: Structure, weights: Mapping[str, str], tensors: Iterable[str]) -> dict[str, str]:
    """Tensors below a linear that are neither its weight nor its bias, each with the linear."""
    modules = {weights.get(linear.name, linear.name).removesuffix(".weight"): linear.name
               for linear in structure.matrices()}  # fmt: skip
    found = {}
    for name in tensors:
        above = name
        while (above := above.rpartition(".")[0]) and above not in modules:
            pass
        if above in modules and name not in (f"{above}.weight", f"{above}.bias"):
            found[name] = modules[above]
    return found


def of_no_parameter(
    tensors: Collection[str],
    directory: Path,
    structure: Structure,
    checkpoint: TensorSource,
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Which of the tensors are neither parameters nor buffers of the model, which is built for that: some gates have
    further ones beside their weight."""
    from quantcli.model.skeleton import Skeleton

    skeleton = Skeleton(directory, structure, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    return [name for name in skeleton.unused_tensors if name in tensors]


def _float_name(name: str) -> str:
    prefix, dot, last = name.rpartition(".")
    return f"{prefix}{dot}weight" if last in _CODES else name


def _weight_name(module: str, names: Collection[str]) -> str:
    """The name of the module's weight, which may lack the prefix of the base model; empty if there is none."""
    parts = f"{module}.weight".split(".")
    return next((name for i in range(len(parts) - 1) if (name := ".".join(parts[i:])) in names), "")
