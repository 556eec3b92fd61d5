"""Bytes of checkpoints by part, from the headers of their files."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from quantcli.formats.table import open_weights
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.names import weight_tensors
from quantcli.pipeline.context import Context

_CODES = {"weight", "weight_packed", "qweight"}


def checkpoint_sizes(context: Context) -> dict[str, dict[str, Any]]:
    """Of the float checkpoint, under `float`, and of each export: `bytes`, `parts` (part → bytes), and of exports
    `ratio` (float bytes / bytes), `bits_per_weight` (of quantized linears, with scales) and `bits_per_parameter`."""
    trust, structure = context.recipe.model.trust_remote_code, context.plan.structure
    original = Checkpoint(context.model)
    weights = weight_tensors(context.model, structure, original.entries, trust_remote_code=trust)
    owners = {tensor.removesuffix("weight"): module for module, tensor in weights.items()}
    found = {"float": _parts_of(context, original, owners, quantized=False)}
    folder = context.folder("export")
    exports = context.results.get("export", {}).get("files", {})
    for name in sorted({Path(file).parts[0] for file in exports}):
        own = _parts_of(context, open_weights(folder / name), owners, quantized=name != "dense")
        linears = sum(context.linears[module].weights for module in context.plan.schemes)
        own["ratio"] = round(found["float"]["bytes"] / own["bytes"], 4)
        coded = own["parts"].get("codes", 0) + own["parts"].get("scales and zero points", 0)
        own["bits_per_weight"] = round(8 * coded / linears, 4) if coded and linears else None
        own["bits_per_parameter"] = round(8 * own["bytes"] / sum(map(prod, structure.parameters.values())), 4)
        found[name] = own
    return found


def largest_modules(directory: Path, count: int) -> list[tuple[str, int]]:
    """The modules of a checkpoint with the most bytes, largest first."""
    sizes: dict[str, int] = {}
    for entry in open_weights(directory).entries.values():
        module = entry.name.rpartition(".")[0] or entry.name
        sizes[module] = sizes.get(module, 0) + entry.nbytes
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:count]


def _parts_of(
    context: Context, checkpoint: Checkpoint, owners: Mapping[str, str], *, quantized: bool
) -> dict[str, Any]:
    structure, parts = context.plan.structure, dict[str, int]()
    schemes = context.plan.schemes if quantized else {}
    for entry in checkpoint.entries.values():
        prefix, _, last = entry.name.rpartition(".")
        module = owners.get(f"{prefix}.")
        if last == "bias":
            part = "norms, biases and other"
        elif module in schemes:
            part = "codes" if last in _CODES else "scales and zero points"
        elif module is not None and module == structure.head:
            tied = structure.tied and not entry.name.endswith(f"{structure.head}.weight")
            part = "embeddings" if tied else "output head"
        elif module is not None:
            part = "float linears"
        elif entry.shape == (structure.vocabulary, structure.width):
            part = "embeddings"
        elif last.startswith(("k_", "v_", "fa_")):  # scales of a quantized cache
            part = "scales and zero points"
        else:
            part = "norms, biases and other"
        parts[part] = parts.get(part, 0) + entry.nbytes
    return {"bytes": sum(parts.values()), "parts": parts}
