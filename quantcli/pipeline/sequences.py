"""Log-probabilities of chosen tokens in sequences of any length, with one block of the model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.pipeline.batches import BATCH_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.skeleton import Skeleton
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.treatment import Phase

ROUND_TO = 16
"""Lengths are padded to multiples of it, so that masks and rotary tables repeat from batch to batch."""


@dataclass(frozen=True)
class Model:
    """A model to be asked: its skeleton and, if it is quantized, the checkpoint that it is read from."""

    name: str
    skeleton: Skeleton
    exported: QuantizedCheckpoint | None
    phase: Phase


@dataclass(frozen=True)
class Query:
    """Tokens, and of each place from number `first` on which tokens are asked for: the choices of what stands there.

    Choices for the place behind the last token ask for what follows. All places of a query have equally many choices.
    """

    tokens: Sequence[int]
    first: int
    choices: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Reply:
    """float32 [places, choices] log-probabilities, and whether the first choice is the most probable token [places]."""

    logp: Tensor
    greedy: Tensor


def ask(
    model: Model,
    queries: Sequence[Query],
    folder: Path,
    cache_memory: int,
    emit: Callable[..., None],
    batch_tokens: int = BATCH_TOKENS,
) -> list[Reply]:
    """The model's replies, in order. Hidden states between blocks lie in `folder`, so that an interrupted pass goes on.

    Sequences of like length share a batch, padded on the right: a causal model gives a token the same whatever stands
    behind it, at the positions that the sequence has when it is alone, so neither masks nor positions are needed.
    """
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.served import advance, head_as_served

    order, batches = _padded([query.tokens for query in queries], batch_tokens)
    stream = BlockStream(model.skeleton, batches)
    cache = HiddenCache(folder, stream.hidden_shapes(), model.skeleton.dtype, cache_memory)
    advance(model.name, stream, cache, model.exported, model.phase, emit)
    replies: dict[int, Reply] = {}
    with stream.head(), head_as_served(model.skeleton, model.exported, model.phase):
        _read_off(stream, cache, order, queries, replies)
    cache.clear()
    return [replies[index] for index in range(len(queries))]


def _padded(sequences: Sequence[Sequence[int]], batch_tokens: int) -> tuple[list[list[int]], list[Tensor]]:
    """Sequences by length in batches of at most so many tokens, or of one that is not padded; and which are in each.
    The others are padded with token 0."""
    import torch

    def width(index: int) -> int:
        return -(-len(sequences[index]) // ROUND_TO) * ROUND_TO

    order: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i)):
        if not order or width(index) * (len(order[-1]) + 1) > batch_tokens:
            order.append([])
        order[-1].append(index)
    batches = []
    for members in order:
        columns = width(members[-1]) if len(members) > 1 else len(sequences[members[0]])
        batch = torch.zeros(len(members), columns, dtype=torch.long)
        for row, index in enumerate(members):
            batch[row, : len(sequences[index])] = torch.tensor(sequences[index])
        batches.append(batch)
    return order, batches


def _read_off(
    stream: BlockStream,
    cache: HiddenCache,
    order: Sequence[Sequence[int]],
    queries: Sequence[Query],
    replies: dict[int, Reply],
) -> None:
    """Replies from the hidden states that left the last block: those that are asked for of a batch go through the head
    together."""
    import torch

    for batch, members in enumerate(order):
        hidden = cache.get(batch)
        asked = [queries[index] for index in members]
        rows = [hidden[row, q.first - 1 : q.first - 1 + len(q.choices)] for row, q in enumerate(asked)]
        widest = max(len(choices) for q in asked for choices in q.choices)
        choices = torch.tensor(
            [[*one, *[one[0]] * (widest - len(one))] for q in asked for one in q.choices], device=stream.skeleton.device
        )
        logp, greedy = [], []
        for places, logits in stream.logits(torch.cat(rows)[None]):
            found = torch.log_softmax(logits[0], -1)
            logp.append(found.gather(1, choices[places]).cpu())
            greedy.append((found.argmax(-1) == choices[places, 0]).cpu())
        sizes = [len(q.choices) for q in asked]
        parts = zip(torch.cat(logp).split(sizes), torch.cat(greedy).split(sizes), strict=True)
        for index, query, (values, first) in zip(members, asked, parts, strict=True):
            replies[index] = Reply(values[:, : len(query.choices[0])], first)
