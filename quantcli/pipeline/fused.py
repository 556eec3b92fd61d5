"""Linears that serving engines fuse into one: rolled back together, of one scheme, of one scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from quantcli.errors import RecipeError
from quantcli.model.structure import Block, Structure, joined
from quantcli.quant.scheme import Scheme
from quantcli.recipe.schema import Recipe


def rolled_back_along(structure: Structure, rolled_back: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Linears that engines fuse with one that is rolled back: they go along."""
    reasons = {}
    for block in structure.blocks:
        for group in block.fused:
            chosen = [name for name in group if name in rolled_back]
            for name in group if chosen else ():
                if name not in rolled_back:
                    reasons[name] = (
                        "experts of a layer have one scheme in serving engines"
                        if _of_experts(block, group)
                        else f"fused with {chosen[0].rpartition('.')[2]} in serving engines"
                    )
    if reasons:
        count, them = ("1 linear is", "it") if len(reasons) == 1 else (f"{len(reasons)} linears are", "them")
        notes.append(f"{count} rolled back because engines fuse {them} with one that is.")
    return reasons


def refuse_split(recipe: Recipe, blocks: Sequence[Block], treatments: Mapping[str, object]) -> None:
    """Raise RecipeError where linears of one group are treated differently, unless the recipe wants them apart."""
    if recipe.quantize.rollback.siblings == "apart":
        return
    for owner, group in ((block, group) for block in blocks for group in block.fused):
        first = treatments.get(group[0])
        for other in group[1:]:
            if treatments.get(other) != first:
                whole = "one layer of experts" if _of_experts(owner, group) else "one linear"
                raise RecipeError(
                    f"quantize.overrides: {group[0]} and {other} have different schemes, and serving engines fuse them "
                    f"into {whole}.",
                    "Match both with one pattern, or set rollback.siblings: apart for an engine that does not fuse.",
                )


def scale_groups(structure: Structure, schemes: Mapping[str, Scheme]) -> dict[str, tuple[str, ...]]:
    """What has one scale of its weights, by the name of each such linear: float codes with a scale a tensor, of linears
    that engines join. Of several scales they would take the largest, and round all codes a second time."""
    return {
        name: group
        for name, group in joined(structure).items()
        if all(name in schemes and schemes[name] == schemes.get(group[0]) for name in group)
        and (schemes[name].type, schemes[name].granularity) == ("float", "tensor")
    }


def fused_groups(structure: Structure, names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The named linears in the groups that go together: fused ones in one, every other alone; in model order."""
    wanted = set(names)
    for block in structure.blocks:
        done: set[str] = set()
        groups = {name: group for group in block.fused for name in group}
        for linear in block.linears:
            if linear.name in wanted and linear.name not in done:
                group = groups.get(linear.name, (linear.name,))
                members = tuple(name for name in group if name in wanted)
                done |= set(members)
                yield members
    if structure.head in wanted:
        yield (structure.head,)


def _of_experts(block: Block, group: Sequence[str]) -> bool:
    return any(group[0] in experts.names for experts in block.experts)
