"""Experts as stages see them: the tokens that each computes, and whether those are enough to find anything from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.model.structure import Experts
from quantcli.pipeline.context import Context
from quantcli.pipeline.rundir import current_events
from quantcli.pipeline.tried import weighed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantcli.model.lockstep import Routed

HIDDEN_EXPERTS = "hidden-experts"


class RoutedTokens:
    """What enters a layer of experts in all batches, taken apart by experts. Hidden states of more than `limit` bytes
    lie in a mapped file below `folder` (`model.hidden`), which `clear` removes."""

    def __init__(
        self,
        folder: Path,
        batches: Iterable[Routed],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        limit: int,
        every_token: bool,
    ) -> None:
        from quantcli.model.hidden import HiddenCache

        self._states = HiddenCache(folder, shapes, dtype, limit)
        self._chosen: list[Tensor] = []
        self._every_token = every_token
        for batch, (states, chosen) in enumerate(batches):
            self._states.put(batch, states)
            self._chosen.append(chosen.cpu())
        self._states.commit(0, resumable=False)

    def of(self, expert: int) -> Iterator[Tensor]:
        """The tokens [tokens, width] that an expert computes, on the CPU, batch by batch: those that are routed to it,
        or all."""
        for batch, chosen in enumerate(self._chosen):
            if self._every_token:
                yield self._states.get(batch)
            elif len(rows := (chosen == expert).any(-1).nonzero().flatten()):
                yield self._states.get(batch)[rows]

    def count(self, expert: int) -> int:
        return sum(len(c) if self._every_token else int((c == expert).any(-1).sum()) for c in self._chosen)

    def clear(self) -> None:
        self._states.clear()


def few_tokens(context: Context) -> int:
    """An expert that sees fewer tokens than these is quantized without them."""
    assert context.recipe.calibration is not None
    return context.recipe.calibration.expert_tokens


def warn_of_few(context: Context, layer: Experts, counts: Mapping[str, int]) -> None:
    """Warn of the experts of a layer that saw too few tokens. `counts`: by the first linear of each."""
    least = few_tokens(context)
    few = {name: count for name, count in counts.items() if count < least}
    if few:
        shown = ", ".join(f"{name} ({count})" for name, count in few.items())
        context.emit("warning", fallback="data_free_experts", count=len(few), modules=list(few),
                     text=f"{len(few)} of {len(layer.linears)} experts of {layer.name} saw fewer than {least} tokens "
                     f"and are quantized without them: {shown}. Use more calibration text, or "
                     "route_all_experts.")  # fmt: skip


def tokens_of_experts(context: Context) -> list[Any]:
    """What of the recipe the tokens of experts depend on, for the identity of a stage that takes them."""
    section = context.recipe.calibration
    assert section is not None
    return [section.expert_tokens, section.route_all_experts]


def weighed_experts(context: Context) -> list[str]:
    """The experts, by their first linears, of which anything is found from what the stage calibrate observes."""
    return [names[0] for names in context.experts if any(weighed(context, name) for name in names)]


def solved_experts(context: Context, stage: str) -> dict[str, int]:
    """The experts, by their first linears, of which `stage` solved linears when it last ran, and the tokens that each
    saw."""
    treatments, found = context.plan.treatments, {}
    firsts = {name: names[0] for names in context.experts for name in names}
    for event in current_events(context.run.path, (stage,)):
        name = event.get("module")
        if event["event"] == "linear" and name in firsts and name in treatments and treatments[name].weights.solves:
            found[firsts[name]] = int(event["tokens"])
    return found
