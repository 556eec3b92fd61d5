"""One decoder block over all batches at once, stopping wherever linears are about to read an input."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn
from torch.nn import functional

from quantcli.errors import ModelError
from quantcli.model.expert_loop import Weight, one_by_one
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Experts, SharedInput

Forward = Callable[[Tensor], Tensor]
Routed = tuple[Tensor, Tensor]
"""What enters a layer of experts: hidden states [tokens, width], and the experts chosen for each, int64 [tokens, k]."""


class Lockstep:
    """Passes of the resident block `index` over the batches of a stream, each stopped before the next shared input.

    `advance(i)` takes every batch from where it stands to the i-th of `inputs` and yields the values there, batch by
    batch; `finish` takes them to the end and yields what leaves the block. Among the inputs may be layers of experts,
    where they stand in the block: `advance_to_experts` stops before those. In between, linears may be given another
    forward in `replaced` (by full name), which they have from then on: so an input is seen as the linears before it,
    as quantized by then, make it, and the block is computed once for all of its inputs. What a batch holds while it
    waits stays in memory. With `again`, batches do not wait: each time they start anew from what `enters` gives, which
    costs a pass for every input and no memory. `written` sums, by batch, what `writers` have put out so far, of batches
    that stand somewhere.
    """

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        inputs: Sequence[SharedInput | Experts],
        enters: Callable[[int], Tensor],
        replaced: Mapping[str, Forward],
        *,
        again: bool = False,
        writers: Collection[str] = (),
    ) -> None:
        self._stream, self._index, self._enters, self._again = stream, index, enters, again
        self.replaced = replaced
        self._at = {stop.name: position for position, stop in enumerate(inputs)}
        self._target = 0
        self._waiting = False
        self._writers = writers
        self.written: dict[int, Tensor] = {}
        self._walks: list[greenlet | None] = [None] * len(stream.batches)

    def advance(self, position: int) -> Iterator[Tensor]:
        return self._advance(position)

    def advance_to_experts(self, position: int) -> Iterator[Routed]:
        return self._advance(position)

    def _advance(self, position: int) -> Iterator[Any]:
        self._target = position
        for batch in range(len(self._walks)):
            yield self._resume(batch)
            if self._again:
                self._drop(batch)

    def finish(self) -> Iterator[Tensor]:
        self._target = len(self._at)
        for batch in range(len(self._walks)):
            yield self._resume(batch)
            self._drop(batch)

    def close(self) -> None:
        for batch in range(len(self._walks)):
            self._drop(batch)

    def _resume(self, batch: int) -> Any:
        walk, self._waiting = self._walks[batch], False
        with torch.inference_mode():
            if walk is None:
                walk = self._walks[batch] = greenlet(self._walk)
                walk.lockstep = self
                found = walk.switch(batch)
            else:
                walk.parent = greenlet.getcurrent()
                found = walk.switch()
        if self._waiting != (self._target < len(self._at)):
            raise ModelError(f"{self._stream.skeleton.blocks[self._index]} does not read its inputs in the order in "
                             "which they were watched.", "Its architecture is not supported.")  # fmt: skip
        return found

    def _walk(self, batch: int) -> Tensor:
        greenlet.getcurrent().batch = batch
        return self._stream.run(self._index, batch, self._enters(batch))

    def _drop(self, batch: int) -> None:
        walk, self._walks[batch] = self._walks[batch], None
        self.written.pop(batch, None)
        if walk is not None and not walk.dead:
            with torch.inference_mode():
                walk.throw(GreenletExit)

    def reads(self, name: str, module: nn.Module, value: Tensor) -> Tensor:
        """The output of a linear of this pass."""
        self.stop(name, value)
        how = self.replaced.get(name)
        output: Tensor = type(module).forward(module, value) if how is None else how(value)
        if name in self._writers:
            batch = greenlet.getcurrent().batch
            added = output.reshape(*self._stream.batches[batch].shape, -1)
            self.written[batch] = self.written[batch] + added if batch in self.written else added
        return output

    def stop(self, name: str, value: Tensor | Routed) -> None:
        """Wait, if this is what is looked for, until its linears are replaced."""
        if self._at.get(name) == self._target:
            self._waiting = True
            greenlet.getcurrent().parent.switch(value)


@contextmanager
def stopping(block: nn.Module, name: str, linears: Sequence[str], experts: Iterable[Experts] = ()) -> Iterator[None]:
    """While the body runs, `linears` (full names) of `block`, whose own name is `name`, obey the Lockstep whose pass
    they are part of. Passes that still wait when it ends, by an error too, are given up.

    Layers of `experts` run expert by expert; their linears may be replaced too.
    """
    modules = {linear: block.get_submodule(linear.removeprefix(f"{name}.")) for linear in linears}
    seen: set[Lockstep] = set()

    def forward_of(linear: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:  # nn.Linear's own name for it, since callers may use it as a keyword
            lockstep: Lockstep = greenlet.getcurrent().lockstep
            seen.add(lockstep)
            return lockstep.reads(linear, module, input)

        return forward

    def of_layer(layer: str, loop: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            lockstep: Lockstep = greenlet.getcurrent().lockstep
            seen.add(lockstep)
            lockstep.stop(layer, (hidden_states, top_k_index))
            return loop(hidden_states, top_k_index, top_k_weights)

        return forward

    def of_expert(linear: str, x: Tensor, weight: Weight) -> Tensor:
        how = greenlet.getcurrent().lockstep.replaced.get(linear)
        output: Tensor = functional.linear(x, weight()) if how is None else how(x)
        return output

    try:
        with ExitStack() as loops:
            for layer in experts:
                holder = block.get_submodule(layer.name.removeprefix(f"{name}."))
                loops.enter_context(one_by_one(holder, layer, of_expert))
                holder.__dict__["forward"] = of_layer(layer.name, holder.__dict__["forward"])
            for linear, module in modules.items():
                module.__dict__["forward"] = forward_of(linear, module)
            yield
    finally:
        # the garbage collector does not look into frames that wait, and what they hold would stay for good
        for lockstep in seen:
            lockstep.close()
        for module in modules.values():
            module.__dict__.pop("forward", None)
