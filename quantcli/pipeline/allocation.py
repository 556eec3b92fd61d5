"""Schemes shared out under a budget: what may choose, between what, at what cost. Plain data, without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from quantcli.errors import RecipeError
from quantcli.formats.engines import UNPACKING, Verdict
from quantcli.model.structure import Linear, Structure
from quantcli.pipeline.estimate import with_trials
from quantcli.pipeline.fused import fused_groups
from quantcli.pipeline.held import unheld, unloaded
from quantcli.pipeline.plan import BYTES, Plan, make_plan, stored_bytes, unobservable
from quantcli.pipeline.tried import trial_weights
from quantcli.recipe.budget import CandidateSection
from quantcli.recipe.quantization import WeightsSection, variant
from quantcli.recipe.schema import Recipe

TOKENS = 4096
"""Calibration tokens on which candidates are tried."""
FLOAT = "float"
_FINER = 32
"""Group size of the default candidate between two numbers of bits."""

Group = tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A scheme that groups may get: its name, its keys as an override has them, with the group size that divides, and
    the plan in which all of them have it (None of float)."""

    name: str
    section: CandidateSection
    plan: Plan | None


@dataclass(frozen=True)
class Allocation:
    """What is shared out: groups of linears, the candidates, the bytes of each group under each, and the budget of all
    groups, of `weights` weights, in bytes. `others` are the bytes of all else in the checkpoint."""

    recipe: Recipe
    groups: tuple[Group, ...]
    candidates: tuple[Candidate, ...]
    costs: tuple[tuple[int, ...], ...]
    weights: int
    budget: int
    others: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)

    def bits_per_weight(self, cost: int) -> float:
        """Bits a weight of all groups, at a cost in bytes."""
        return 8 * cost / self.weights

    def cost(self, chosen: Sequence[int]) -> int:
        """Bytes of all groups under the chosen candidates."""
        return sum(row[option] for row, option in zip(self.costs, chosen, strict=True))

    def settled(self, chosen: Sequence[int]) -> Recipe:
        """The recipe with the chosen candidate of each group as overrides, and no target."""
        members: dict[int, list[str]] = {}
        for group, option in zip(self.groups, chosen, strict=True):
            members.setdefault(option, []).extend(group)
        return with_overrides(self.recipe, [(members[i], self.candidates[i].section) for i in sorted(members)])


def allocation_of(recipe: Recipe, model: Path, structure: Structure) -> Allocation:
    """What `quantize.target` has to decide.

    Groups are the quantized linears of the blocks that neither rollback nor an override names, those that engines fuse
    as one. Raises RecipeError where there are none, for candidates that a format cannot hold, and for a budget that is
    less than the cheapest candidates take or more than the dearest.
    """
    target = recipe.quantize.target
    assert target is not None
    base = make_plan(_without_target(recipe), model, structure)
    groups = tuple(_free_groups(recipe, base))
    if not groups:
        raise RecipeError("quantize.target: no linear is left to choose a scheme for.",
                          "Remove rollback.names or overrides that name them all.")  # fmt: skip
    names = [name for group in groups for name in group]
    if target.candidates:
        candidates = [_candidate(recipe, base, names, section) for section in target.candidates]
        if reason := _unheld_together(recipe, candidates):
            raise RecipeError(f"quantize.target.candidates: {reason}",
                              "Choose other candidates, compressed-tensors, or float beside one scheme.")  # fmt: skip
    else:
        candidates = _default_candidates(recipe, base, names)
    candidates = _distinct(candidates)
    if len(candidates) < 2:
        raise RecipeError("quantize.target: one scheme alone can be chosen here, so that nothing is left to choose.",
                          "Name others in quantize.target.candidates, or remove the target.")  # fmt: skip
    costs = tuple(
        tuple(_cost(recipe, structure, candidate.plan, group) for candidate in candidates) for group in groups
    )
    linears = {linear.name: linear for linear in structure.linears()}
    weights = sum(linears[name].weights for name in names)
    others = base.size_after - sum(_cost(recipe, structure, base, group) for group in groups)
    if target.size is not None:
        budget, unit = int(target.size * 1e9) - others, "size"
    else:
        assert target.bits_per_weight is not None
        budget, unit = int(target.bits_per_weight * weights / 8), "bits_per_weight"
    least, most = (sum(map(extreme, costs)) for extreme in (min, max))
    if least == most:
        form = recipe.export.formats[0] if recipe.export else "compressed-tensors"
        raise RecipeError(f"quantize.target: all candidates take the same room in {form}, so nothing is to be shared.",
                          "Name a format first in export.formats that packs weights.")  # fmt: skip
    if not least <= budget <= most:
        low, high = ((others + cost) / 1e9 if unit == "size" else 8 * cost / weights for cost in (least, most))
        what = "GB" if unit == "size" else "bits a weight"
        raise RecipeError(
            f"quantize.target.{unit}: {getattr(target, unit):g} is out of reach: these candidates take "
            f"{low:.4g} to {high:.4g} {what}.",
            "Choose a number between, or other candidates.",
        )
    return Allocation(recipe, groups, tuple(candidates), costs, weights, budget, others)


def budgeted(recipe: Recipe, plan: Plan) -> Plan:
    """The plan as it is known before candidates are tried: sizes by the budget, engines that load every candidate."""
    found = allocation_of(recipe, plan.model, plan.structure)
    names = set(found.names)
    bits = found.bits_per_weight(found.budget)
    shown = ", ".join(candidate.name for candidate in found.candidates)
    notes = [
        f"After calibration each of {len(found.groups)} groups of linears gets one of {shown}: the least error within "
        f"{bits:.4g} bits a weight."
    ]
    target = recipe.quantize.target
    if target is not None and not target.candidates and (left := _left_out(recipe, plan, found)):
        notes.append(
            f"No serving engine loads {', '.join(left)} beside them; quantize.target.candidates can name more."
        )
    linears = tuple(
        replace(p, reason="or another scheme, by quantize.target") if p.linear.name in names else p
        for p in plan.linears
    )
    return replace(
        plan,
        linears=linears,
        notes=(*plan.notes, *notes),
        size_after=found.others + found.budget,
        bits_per_weight=bits,
        estimate=with_trials(plan.estimate, plan.structure, *_trials(recipe, found)),
        engines=_engines(found.candidates),
    )


def _trials(recipe: Recipe, found: Allocation) -> tuple[int, list[tuple[Linear, WeightsSection]]]:
    """Tokens that run through the blocks while candidates are tried, and every linear that is quantized for it."""
    plans = [candidate.plan for candidate in found.candidates if candidate.plan is not None]
    names = set(found.names)
    quantized = [
        (p.linear, trial_weights(p.treatment.weights))
        for plan in plans
        for p in plan.linears
        if p.treatment is not None and p.linear.name in names
    ]
    blocks = plans[0].structure.blocks
    groups = max(sum(group[0].startswith(f"{block.name}.") for group in found.groups) for block in blocks)
    section = recipe.calibration
    known = section.samples * section.sequence_length if section is not None else 0
    return min(TOKENS, known) * (1 + groups * len(plans)), quantized


def with_overrides(recipe: Recipe, choices: Iterable[tuple[Sequence[str], CandidateSection]]) -> Recipe:
    """The recipe without its target, and behind its own overrides one for each pattern of names and its scheme."""
    # a candidate without keys is the recipe's own scheme, which needs no override
    added = [variant(section, pattern) for names, section in choices if section.keys for pattern in patterns(names)]
    section = recipe.quantize
    changed = section.model_copy(update={"target": None, "overrides": (*section.overrides, *added)})
    return recipe.model_copy(update={"quantize": changed})


def patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and no others: those that differ in the number of their block share one."""
    alike: dict[tuple[str, str], list[str]] = {}
    found: list[str] = []
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        if number is None:
            found.append(name)
        else:
            alike.setdefault((name[: number.start(1)], name[number.end(1) :]), []).append(number[1])
    for (before, after), numbers in alike.items():
        if len(numbers) == 1:
            found.append(f"{before}{numbers[0]}{after}")
        else:
            found.append(f"re:{re.escape(before)}({'|'.join(numbers)}){re.escape(after)}")
    return found


def _without_target(recipe: Recipe) -> Recipe:
    """And without engines, which load what candidates make of it, whether they load this or not."""
    changed = {"quantize": recipe.quantize.model_copy(update={"target": None})}
    export = recipe.export and recipe.export.model_copy(update={"engines": ()})
    return recipe.model_copy(update=changed | {"export": export})


def _free_groups(recipe: Recipe, base: Plan) -> Iterator[Group]:
    """Groups of linears that get one scheme, of those that nothing else in the recipe treats apart."""
    free = {p.linear.name for p in base.linears if p.treatment is not None and not p.reason}
    free -= {base.structure.head or "", *unobservable(base.structure)}
    apart = recipe.quantize.rollback.siblings == "apart"
    whole = {name: group for block in base.structure.blocks for group in block.fused for name in group}
    for group in fused_groups(base.structure, base.schemes):
        if apart:
            yield from ((name,) for name in group if name in free)
        elif free.issuperset(whole.get(group[0], group)):
            yield group


def _candidate(recipe: Recipe, base: Plan, names: Sequence[str], section: CandidateSection) -> Candidate:
    if section.floats:
        return Candidate(FLOAT, section, None)
    plan = make_plan(with_overrides(recipe, [(names, section)]), base.model, base.structure)
    scheme = plan.treatments[names[0]].scheme
    grid: dict[str, Any] = {"bits": scheme.bits, "symmetric": scheme.symmetric, "granularity": scheme.granularity}
    if scheme.group_size is not None:
        grid["group_size"] = scheme.group_size  # the one that divides: a part of the linears may allow a larger one
    name = f"{scheme.name} tensor" if scheme.granularity == "tensor" else scheme.name
    return Candidate(name, CandidateSection(**grid), plan)


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without those whose scheme an earlier one has, once group sizes divide."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.name, candidate)
    return list(found.values())


def _defaults(recipe: Recipe) -> list[CandidateSection]:
    """4 bits with the recipe's own granularity, in finer groups, 8 bits, float, and 3 bits."""
    weights = recipe.quantize.weights
    found = [CandidateSection(bits=4), CandidateSection(bits=8), CandidateSection(bits=16), CandidateSection(bits=3)]
    if weights.granularity == "group" and (weights.group_size or 0) > _FINER:
        found.insert(1, CandidateSection(bits=4, group_size=_FINER))
    own = CandidateSection(bits=weights.bits)
    return [own, *(section for section in found if section != own)]


def _possible(recipe: Recipe, base: Plan, names: Sequence[str]) -> list[Candidate]:
    """Default candidates that the recipe's activations and formats allow."""
    found = []
    for section in _defaults(recipe):
        try:
            found.append(_candidate(recipe, base, names, section))
        except (PydanticCustomError, RecipeError):
            continue  # what the user did not ask for need not be possible
    return found


def _default_candidates(recipe: Recipe, base: Plan, names: Sequence[str]) -> list[Candidate]:
    """Of the possible ones, in order, those that one checkpoint of each format holds together, and that leave an engine
    of it that serves all of them."""
    found: list[Candidate] = []
    for candidate in _possible(recipe, base, names):
        if _unheld_together(recipe, [*found, candidate]):
            continue
        engines = _engines([*found, candidate])
        served = not engines or any(verdict.loads for verdict in engines if verdict.engine not in UNPACKING)
        if served or not found:
            found.append(candidate)
    return found


def _unheld_together(recipe: Recipe, candidates: Sequence[Candidate]) -> str:
    """Why a format of the recipe cannot hold all of these candidates in one checkpoint, or a named engine cannot load
    it, as a sentence; empty if all can. Every format holds linears in float beside others."""
    plans = [candidate.plan for candidate in candidates if candidate.plan is not None]
    linears = {linear.name: linear for plan in plans[:1] for linear in plan.structure.matrices()}
    quantized = [(linears[name], scheme) for plan in plans for name, (_, scheme) in plan.schemes.items()]
    forms = recipe.export.formats if recipe.export else ()
    reason = next(filter(None, (unheld(form, quantized, None) for form in forms)), "")
    return reason or next((unloaded(recipe, quantized, None, (), plan.structure) for plan in plans[:1]), "")


def _left_out(recipe: Recipe, plan: Plan, found: Allocation) -> list[str]:
    base = make_plan(_without_target(recipe), plan.model, plan.structure)
    kept = {candidate.name for candidate in found.candidates}
    possible = _distinct(_possible(recipe, base, found.names))
    return [candidate.name for candidate in possible if candidate.name not in kept]


def _engines(candidates: Sequence[Candidate]) -> tuple[Verdict, ...]:
    """Of each engine what it says of the first candidate that it does not load, else of the first. Float is loaded."""
    named = [(candidate.name, candidate.plan.engines) for candidate in candidates if candidate.plan is not None]
    found = []
    for number, first in enumerate(named[0][1] if named else ()):
        refused = next(((name, of[number]) for name, of in named if not of[number].loads), None)
        if refused is None:
            found.append(first)
        else:
            name, verdict = refused
            found.append(replace(verdict, engine=first.engine, note=f"{name}: {verdict.note}"))
    return tuple(found)


def _cost(recipe: Recipe, structure: Structure, plan: Plan | None, group: Group) -> int:
    """Bytes of a group's weights in a plan, or in float."""
    linears = {linear.name: linear for linear in structure.linears()}
    if plan is None:
        return sum(linears[name].weights for name in group) * BYTES[structure.dtype]
    schemes = plan.schemes
    return sum(stored_bytes(recipe, linears[name], schemes[name][1], structure.dtype) for name in group)
