"""What a recipe would do to a model: decided from the structure alone, before weights are read and without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError, RecipeError
from quantcli.formats.engines import Verdict, verdicts
from quantcli.model.structure import Linear, Structure
from quantcli.pipeline.estimate import Estimate, estimate
from quantcli.quant.scheme import Scheme
from quantcli.recipe.schema import Recipe

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class PlannedLinear:
    """One linear, and its scheme or the reason why it stays in float."""

    linear: Linear
    block: int
    scheme: Scheme | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The decisions of a run. Sizes in bytes; `bits_per_weight` counts scales and covers only quantized linears."""

    model: Path
    structure: Structure
    linears: tuple[PlannedLinear, ...]
    notes: tuple[str, ...]
    size_before: int
    size_after: int
    bits_per_weight: float
    estimate: Estimate
    engines: tuple[Verdict, ...]

    @property
    def schemes(self) -> dict[str, tuple[int, Scheme]]:
        """Quantized linears: name → (block, scheme)."""
        return {p.linear.name: (p.block, p.scheme) for p in self.linears if p.scheme is not None}

    @property
    def kept(self) -> dict[str, str]:
        """Linears in float: name → reason."""
        return {p.linear.name: p.reason for p in self.linears if p.scheme is None}

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "architecture": self.structure.architecture,
            "dtype": self.structure.dtype,
            "linears": [
                {
                    "name": p.linear.name,
                    "shape": [p.linear.out_features, p.linear.in_features],
                    "scheme": p.scheme.name if p.scheme else "float",
                    "reason": p.reason,
                }
                for p in self.linears
            ],
            "notes": list(self.notes),
            "size_before": self.size_before,
            "size_after": self.size_after,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "estimate": asdict(self.estimate),
            "engines": [asdict(verdict) for verdict in self.engines],
        }


def make_plan(recipe: Recipe, model: Path, structure: Structure) -> Plan:
    """Decide the scheme of every linear.

    Raises RecipeError for a pattern that matches nothing, a group size that cannot divide, or a scheme that no chosen
    format holds; ModelError for mixture-of-experts models, whose experts are not quantized yet.
    """
    _refuse_experts(structure)
    notes: list[str] = []
    rolled_back = _rolled_back(recipe.quantize.rollback.names, structure, notes)
    if needs_calibration(recipe):
        rolled_back |= _unobservable(structure)
    left = [linear for linear in structure.linears() if linear.name not in rolled_back]
    scheme = _scheme(recipe, left, notes)
    _refuse_unheld(recipe, left, scheme)
    planned = [
        PlannedLinear(linear, index, None if linear.name in rolled_back else scheme, rolled_back.get(linear.name, ""))
        for index, block in enumerate(structure.blocks)
        for linear in block.linears
    ]
    if structure.head is not None:
        head = Linear(structure.head, structure.width, structure.vocabulary)
        reason = "output head, tied to the embedding" if structure.tied else "output head, stays in float by default"
        planned.append(PlannedLinear(head, len(structure.blocks), None, reason))
    if recipe.calibration is not None and not needs_calibration(recipe):
        notes.append("This scheme needs no calibration data; the calibration section only serves the sanity check.")
    before = sum(map(prod, structure.parameters.values())) * BYTES[structure.dtype]
    quantized = sum(_stored_bytes(linear, scheme, structure.dtype) for linear in left)
    float_bytes = sum(linear.weights for linear in left) * BYTES[structure.dtype]
    return Plan(
        model=model,
        structure=structure,
        linears=tuple(planned),
        notes=tuple(notes),
        size_before=before,
        size_after=before - float_bytes + quantized,
        bits_per_weight=8 * quantized / max(1, sum(linear.weights for linear in left)),
        estimate=estimate(recipe, structure, before - float_bytes + quantized),
        engines=tuple(verdicts(scheme, left)) if recipe.export else (),
    )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether anything in the scheme is found from activations."""
    activations, weights = recipe.quantize.activations, recipe.quantize.weights
    return (activations.bits == 8 and activations.scope == "tensor") or weights.importance != "none"


def match_names(patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """name → the first pattern that it matches: an exact name, a glob, or a regular expression after `re:`.

    Raises RecipeError for a pattern that matches nothing, with the nearest names.
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
            raise RecipeError(f"quantize.rollback.names: {pattern!r} matches no linear of this model.",
                              f"Did you mean {', '.join(near)}?" if near else "")  # fmt: skip
        for name in matched:
            found.setdefault(name, pattern)
    return found


def _rolled_back(patterns: Iterable[str], structure: Structure, notes: list[str]) -> dict[str, str]:
    reasons = {}
    names = [linear.name for linear in structure.linears()]
    heads = [structure.head] if structure.head else []
    for name, pattern in match_names(patterns, [*names, *heads]).items():
        if name not in heads:
            reasons[name] = f"rolled back by {pattern}"
    carried = 0
    for block in structure.blocks:
        for group in block.fused:
            chosen = [name for name in group if name in reasons]
            for name in group if chosen else ():
                if name not in reasons:
                    reasons[name] = f"fused with {chosen[0].rpartition('.')[2]} in serving engines"
                    carried += 1
    if carried:
        notes.append(f"{carried} linears stay in float because engines fuse them with one that is rolled back.")
    return reasons


def _unobservable(structure: Structure) -> dict[str, str]:
    """Linears that a forward pass does not reach, so that nothing can be found from their input."""
    reached = {name for block in structure.blocks for shared in block.inputs for name in shared.linears}
    return {linear.name: "no input reaches it" for linear in structure.linears() if linear.name not in reached}


def _scheme(recipe: Recipe, linears: list[Linear], notes: list[str]) -> Scheme:
    weights, activations = recipe.quantize.weights, recipe.quantize.activations
    group = weights.group_size
    if group is not None and linears:
        group = _dividing({linear.in_features for linear in linears}, group)
        if group != weights.group_size:
            notes.append(f"Group size {weights.group_size} does not divide every input width; {group} is used, "
                         "the largest power of two that does.")  # fmt: skip
    mode = "none" if activations.bits == 16 else "static" if activations.scope == "tensor" else "dynamic"
    return Scheme(
        bits=weights.bits,
        symmetric=weights.symmetric,
        granularity=weights.granularity,
        group_size=group,
        activations=mode,  # type: ignore[arg-type]
        activations_symmetric=activations.symmetric if mode != "none" else True,
    )


def _dividing(widths: set[int], requested: int) -> int:
    """`quant.grid.dividing_group_size`, whose rule this follows, without torch."""
    if all(width % requested == 0 for width in widths):
        return requested
    size = 1 << (requested.bit_length() - 1)
    while size >= 16:
        if all(width % size == 0 for width in widths):
            return size
        size //= 2
    raise RecipeError(f"quantize.weights.group_size: no power of two from 16 to {requested} divides the input widths "
                      f"{sorted(widths)}.", "Use granularity: channel.")  # fmt: skip


def _refuse_experts(structure: Structure) -> None:
    for block in structure.blocks:
        if block.experts:
            raise ModelError(f"{block.experts[0]} holds the weights of many experts, and quantizing mixture-of-experts "
                             "models is not supported yet.", "Use a dense model.")  # fmt: skip


def _refuse_unheld(recipe: Recipe, linears: list[Linear], scheme: Scheme) -> None:
    from quantcli.formats.table import FORMATS

    if not linears:
        raise RecipeError("quantize.rollback.names: every linear is rolled back, so nothing would be quantized.",
                          "Narrow the patterns.")  # fmt: skip
    for name in recipe.export.formats if recipe.export else ():
        for linear in linears:
            if refusal := FORMATS[name].refusal(linear, scheme):
                raise RecipeError(f"export.formats: {name} cannot hold {linear.name} as {scheme.name}: it {refusal}.",
                                  "Choose another format or scheme, or export: null.")  # fmt: skip


def _stored_bytes(linear: Linear, scheme: Scheme, dtype: str) -> int:
    from quantcli.formats import compressed_tensors

    return sum(BYTES[kind] * prod(shape) for kind, shape in compressed_tensors.layout(linear, scheme, dtype).values())
