"""Measuring the model with some linears rolled back, many times over: the trials of an automatic rollback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcli.evaluation.protocols import EvaluationText
from quantcli.evaluation.scores import Scores, score_windows, summarize
from quantcli.evaluation.simulate import Replacement, not_read, simulated
from quantcli.formats.store import Store
from quantcli.model.stream import BlockStream
from quantcli.pipeline.attention import attention_as_stored
from quantcli.pipeline.batches import evaluation_batches
from quantcli.pipeline.context import Context
from quantcli.pipeline.treatment import Arithmetic, Phase, replacement

PATHS_BYTES = 1 << 30
"""Bound on the kept hidden states of earlier trials, by which a trial begins at the first block that differs."""


@dataclass(frozen=True)
class _Path:
    """The hidden states that entered each block when these linears were rolled back."""

    rolled_back: frozenset[str]
    entered: list[list[Tensor]]


class TrialModel:
    """The float model and its quantized form over some windows of text.

    `base` holds the quantized linears, `other` what rolled-back ones become (None: float). Linears are replaced in the
    float model, block by block, as an engine computes them.
    """

    def __init__(
        self,
        context: Context,
        base: Store,
        other: Store | None,
        text: EvaluationText,
        phase: Phase,
        arithmetic: Arithmetic = "engine",
    ) -> None:
        self.context = context
        self.base, self.other, self.text, self.phase, self.arithmetic = base, other, text, phase, arithmetic
        self.batches = evaluation_batches(text.windows)
        self.stream = BlockStream(context.skeleton(), self.batches)
        self.entered = list(self.stream.start())
        self.paths: list[_Path] = []
        self.exact = self._float_logits_states()

    def measure(self, rolled_back: Collection[str]) -> Scores:
        """Scores of the model with these linears rolled back against the float model."""
        rounded = self.hidden(frozenset(rolled_back))
        with self.stream.head():
            scores = score_windows(
                self.batches,
                lambda batch, sample, first: self.stream.logits(_scored(self.exact[batch], sample, first), None),
                lambda batch, sample, first: self.logits(_scored(rounded[batch], sample, first), rolled_back),
                self.text.masked_token,
                self.text.first,
            )
        return summarize(scores, quantized=True, batch=self.text.batch)

    def logits(self, hidden: Tensor, rolled_back: Collection[str]) -> Iterator[tuple[slice, Tensor]]:
        """`BlockStream.logits` with the output head as an engine computes it, if it is quantized."""
        head = self.context.plan.structure.head
        store = self.other if head in rolled_back else self.base
        replaced: dict[str, Replacement] = {}
        if head is not None and store is not None and head in store.schemes:
            replaced[head] = self._replacement(store, head)
        pieces = self.stream.logits(hidden, None)
        while True:
            with simulated(self.stream.skeleton.model, replaced):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _float_logits_states(self) -> list[Tensor]:
        hidden = self.entered
        for index in range(self.context.blocks):
            with self.stream.block(index):
                hidden = [self.stream.run(index, batch, states) for batch, states in enumerate(hidden)]
        return hidden

    def hidden(self, rolled_back: frozenset[str]) -> list[Tensor]:
        """The hidden states that leave the last block."""
        begin, hidden, entered = self._known(rolled_back)
        for index in range(begin, self.context.blocks):
            entered.append(hidden)
            with self._block(index, rolled_back):
                hidden = [self.stream.run(index, batch, states) for batch, states in enumerate(hidden)]
        self._keep(_Path(rolled_back, entered))
        return hidden

    def _known(self, rolled_back: frozenset[str]) -> tuple[int, list[Tensor], list[list[Tensor]]]:
        """The furthest block whose input an earlier trial had too, that input, and those of the blocks before."""
        best: tuple[int, list[Tensor], list[list[Tensor]]] = (0, self.entered, [])
        for path in self.paths:
            differing = path.rolled_back ^ rolled_back
            first = min((self.base.blocks[name] for name in differing), default=self.context.blocks - 1)
            first = min(first, len(path.entered) - 1)
            if first > best[0]:
                best = (first, path.entered[first], path.entered[:first])
        return best

    def _keep(self, path: _Path) -> None:
        size = sum(states.nbytes for states in self.entered) * self.context.blocks
        room = max(1, PATHS_BYTES // max(1, size))
        if size > PATHS_BYTES:
            return
        self.paths = [p for p in self.paths if p.rolled_back != path.rolled_back]
        self.paths = [path, *self.paths][:room]

    def _replacement(self, store: Store, name: str) -> Replacement:
        skeleton = self.stream.skeleton
        how = skeleton.dtype, skeleton.device, self.phase, self.arithmetic
        return replacement(store.read(name), store.schemes[name], *how)

    @contextmanager
    def _block(self, index: int, rolled_back: frozenset[str]) -> Iterator[nn.Module]:
        skeleton = self.stream.skeleton
        path = skeleton.blocks[index]
        replaced: dict[str, Replacement] = {}
        for name, block in self.base.blocks.items():
            store = self.other if name in rolled_back else self.base
            if block == index and store is not None:
                replaced[name.removeprefix(f"{path}.")] = self._replacement(store, name)
        experts = self.context.plan.structure.blocks[index].local_experts
        left_out = {f"{path}.{name}" for name in not_read(replaced, experts)}
        modules = [module for module, block in self.base.attention_modules.items() if block == index]
        attention = {module: self.base.read_attention(module) for module in modules}
        with (
            torch.inference_mode(),
            self.stream.block(index, left_out=left_out) as module,
            simulated(module, replaced, experts),
            attention_as_stored(module, path, self.base.attention, attention, self.arithmetic),
        ):
            yield module


def _scored(hidden: Tensor, sample: int, first: int) -> Tensor:
    """The states of one sample that its tokens from number `first` on are predicted from."""
    return hidden[sample : sample + 1, first - 1 : -1]
