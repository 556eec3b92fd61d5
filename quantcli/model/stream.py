"""Running a decoder one block at a time.

What a block needs beside hidden states (rotary tables, masks, which differ between sliding and full attention) comes
from the model's own forward: it is run once a batch with recorders in the place of the blocks. No architecture is named
here, so the code follows transformers as it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quantcli.errors import ModelError
from quantcli.model.heap import keep_freed_memory
from quantcli.model.hidden import HiddenCache
from quantcli.model.skeleton import Skeleton, as_returned

HEAD_BYTES = 256 << 20
"""Bound on the float32 logits that exist at a time; the head runs on as many positions as fit."""


GRADED_BYTES = 24 << 20
"""The same where logits have gradients, below what glibc hands back to the system at once (32 MiB)."""


class _Stop(Exception):
    """A signal, not an error."""


class BlockStream:
    """A forward pass whose blocks are resident one at a time.

    `batches` are token ids [samples, tokens], without padding. Call `start` or `enter` first; then, for each block,
    `block` to make it resident and `run` for every batch; then `logits`.
    """

    def __init__(self, skeleton: Skeleton, batches: Sequence[Tensor]) -> None:
        keep_freed_memory()
        self.skeleton = skeleton
        self.batches = list(batches)
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._pool: list[Tensor] = []
        embedding = skeleton.model.get_input_embeddings()  # type: ignore[operator]
        head = skeleton.model.get_output_embeddings()  # type: ignore[operator]
        self._embedding = embedding
        self._embedding_names = _names_of(skeleton.model, embedding)
        self._head_names = _names_of(skeleton.model, head) if head is not None else []

    def hidden_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the hidden states between blocks, which may be wider or narrower than the embedding (OPT)."""
        return [(*batch.shape, int(self.skeleton.config.hidden_size)) for batch in self.batches]

    @torch.inference_mode()
    def start(self) -> Iterator[Tensor]:
        """Embed every batch, yielding the hidden states that enter the first block; record the blocks' arguments."""
        self._calls = []
        names = [n for n in self.skeleton.outer_names() if n not in self._head_names]
        with self.skeleton.resident(names, self._embedded_rows()):
            for batch in self.batches:
                recorded: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
                with self._recording(recorded), suppress(_Stop):
                    self.skeleton.model(input_ids=batch.to(self.skeleton.device), use_cache=False)
                if len(recorded) != len(self.skeleton.blocks):
                    raise ModelError(f"{type(self.skeleton.model).__name__} calls {len(recorded)} of its "
                                     f"{len(self.skeleton.blocks)} decoder blocks in a forward pass.",
                                     "Its architecture is not supported.")  # fmt: skip
                self._calls.append([(self._shared(args), self._shared(kwargs)) for _, args, kwargs in recorded])
                yield recorded[0][0]

    def _embedded_rows(self) -> dict[str, Tensor]:
        """The rows of the embedding that tokens of the batches have, by its name."""
        if not isinstance(self._embedding, nn.Embedding) or not self.batches:
            return {}
        tokens = torch.cat([batch.flatten() for batch in self.batches]).unique().cpu()
        return {name: tokens for name in self._embedding_names if name.endswith(".weight")}

    def enter(self, cache: HiddenCache, done: int | None) -> int:
        """Start, and put what enters the first block into `cache`, unless it holds already what enters block `done`.

        Returns the index of the block to go on with.
        """
        for index, hidden in enumerate(self.start()):
            if done is None:
                cache.put(index, hidden)
        if done is None:
            cache.commit(0)
        return done or 0

    @contextmanager
    def block(self, index: int, left_out: Collection[str] = ()) -> Iterator[nn.Module]:
        """The block with its weights, for the duration of the body, except parameters in `left_out`."""
        path = self.skeleton.blocks[index]
        with self.skeleton.resident(n for n in self.skeleton.parameter_names(path) if n not in left_out):
            yield self.skeleton.module(path)

    @torch.inference_mode()
    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Hidden states after block `index`, which must be resident."""
        args, kwargs = self._calls[batch][index]
        output = self.skeleton.module(self.skeleton.blocks[index])(hidden.to(self.skeleton.device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.inference_mode()
    def run_with(
        self, index: int, batch: int, hidden: Tensor, parameters: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Hidden states after block `index` with `parameters` (by full names) in the place of its own, all in `dtype`.

        For checking in float32 or float64 that changed weights compute the same. What the model passes to the block is
        recorded in its own dtype and cast, masks included; it fits the whole batch only, so a check that is to be
        cheap needs a short batch of its own in the stream. Raises ModelError if a parameter is missing that is not
        resident either.
        """
        path = self.skeleton.blocks[index]
        block, device = self.skeleton.module(path), self.skeleton.device

        def cast(value: Any) -> Any:
            return _each(value, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))

        own = {name.removeprefix(f"{path}."): cast(value) for name, value in parameters.items()}
        for name, value in block.state_dict().items():
            if name in own:
                continue
            if value.is_meta:
                raise ModelError(f"{path}.{name} is neither given nor resident.")
            own[name] = cast(value)
        args, kwargs = self._calls[batch][index]
        output = functional_call(block, own, (cast(hidden), *cast(args)), cast(kwargs))
        return output[0] if isinstance(output, tuple) else output

    def differentiable(self, index: int, batch: int, hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Hidden states after block `index`, which must be resident, with `parameters` (by full names) in the place of
        its own; gradients reach them. All in the dtype of the model."""
        path = self.skeleton.blocks[index]
        prefix = f"{path}."
        own = {name.removeprefix(prefix): value for name, value in parameters.items()}
        args, kwargs = self._calls[batch][index]
        # recorded without gradients, which tensors of that kind never take part in
        args, kwargs = _each(args, Tensor.clone), _each(kwargs, Tensor.clone)
        block = self.skeleton.module(path)
        state = {name: value.clone() for name, value in block.state_dict().items() if name not in own}
        output = functional_call(block, own | state, (hidden.to(self.skeleton.device, copy=True), *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head(self) -> Iterator[None]:
        """Everything after the last block, resident for the duration of the body."""
        with self.skeleton.resident(self.head_names()):
            yield

    @torch.inference_mode()
    def logits(self, hidden: Tensor, dtype: torch.dtype | None = torch.float32) -> Iterator[tuple[slice, Tensor]]:
        """(positions, logits [samples, positions, vocabulary] in `dtype`, None for the model's own) of hidden states
        that left the last block.

        The model's own forward runs with the given states in the place of the last block's output, so final norm,
        scaling and soft-capping are the model's. In pieces, because logits are large; each position is independent.
        """
        samples, tokens, _ = hidden.shape
        config = self.skeleton.config
        step = max(1, HEAD_BYTES // (4 * samples * int(config.vocab_size)))
        blocks = [self.skeleton.module(path) for path in self.skeleton.blocks]
        for begin in range(0, tokens, step):
            piece = hidden[:, begin : begin + step].to(self.skeleton.device)
            # a chain of blocks that hand on the given states, whatever the embedding made of the tokens
            with (
                _forwards(blocks, lambda *_, _piece=piece, **__: _piece, self.skeleton.structure.tuple_length),
                self._embedding_skipped(piece) as given,
            ):
                output = self.skeleton.model(**given)
            yield slice(begin, begin + piece.shape[1]), output.logits.to(dtype or output.logits.dtype)

    def head_names(self) -> list[str]:
        """Names of the parameters that `head` makes resident."""
        return [n for n in self.skeleton.outer_names() if n not in self._embedding_names or n in self._head_names]

    def pieces(self, hidden: Tensor) -> Iterator[tuple[slice, slice]]:
        """Samples and positions of hidden states, so few at a time that the heap keeps the memory of their logits.

        Larger tensors get new pages from the system each time, which costs as much as the arithmetic.
        """
        step = max(1, GRADED_BYTES // (4 * int(self.skeleton.config.vocab_size)))
        for sample in range(hidden.shape[0]):
            for begin in range(0, hidden.shape[1], step):
                yield slice(sample, sample + 1), slice(begin, begin + step)

    def head_logits(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Float32 logits of hidden states that left the last block, as `logits`, with `parameters` (by full names) in
        the place of the head's own; gradients reach them and the states."""
        blocks = [self.skeleton.module(path) for path in self.skeleton.blocks]
        with (
            _forwards(blocks, lambda *_, **__: hidden, self.skeleton.structure.tuple_length),
            self._embedding_skipped(hidden) as given,
        ):
            output = functional_call(self.skeleton.model, dict(parameters), (), given)
        return output.logits.float()

    @contextmanager
    def _embedding_skipped(self, hidden: Tensor) -> Iterator[dict[str, Any]]:
        """What the model is called with in the body for as many tokens as `hidden` [samples, tokens, channels] has. The
        embedding, whose weight is not there, gives zeros for them; by tokens, and not by what is embedded, other
        embeddings are read that a model may have beside it (Gemma 4)."""
        samples, tokens, _ = hidden.shape
        zeros = hidden.new_zeros(samples, tokens, self._embedding.embedding_dim)
        self._embedding.__dict__["forward"] = lambda *_, **__: zeros
        try:
            device = hidden.device
            yield {"input_ids": torch.zeros(samples, tokens, dtype=torch.long, device=device), "use_cache": False}
        finally:
            self._embedding.__dict__.pop("forward", None)

    @contextmanager
    def _recording(self, recorded: list[Any]) -> Iterator[None]:
        blocks = [self.skeleton.module(path) for path in self.skeleton.blocks]

        def record(index: int, *args: Any, **kwargs: Any) -> Tensor:
            args, kwargs, hidden = _without_hidden(args, kwargs)
            recorded.append((hidden, args, kwargs))
            if index == len(blocks) - 1:
                raise _Stop
            return hidden

        with _forwards(blocks, record, self.skeleton.structure.tuple_length):
            yield

    def _shared(self, value: Any) -> Any:
        """The same structure with equal tensors stored once: tables and masks repeat from batch to batch."""

        def kept(tensor: Tensor) -> Tensor:
            for known in self._pool:
                alike = known.shape == tensor.shape and known.dtype == tensor.dtype
                if known is tensor or (alike and torch.equal(known, tensor)):
                    return known
            self._pool.append(tensor)
            return tensor

        return _each(value, kept)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of tuples, lists and dictionaries, with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_each(item, change) for item in value)
    return value


@contextmanager
def _forwards(blocks: Sequence[nn.Module], replacement: Callable[..., Tensor], length: int) -> Iterator[None]:
    """`replacement(index, …)` in the place of each block's forward, in the form that the model expects."""

    def call(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden = replacement(index, *args, **kwargs)
        return as_returned(hidden, length)

    try:
        for index, block in enumerate(blocks):
            block.__dict__["forward"] = lambda *a, _i=index, **k: call(_i, *a, **k)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    if args:
        return args[1:], kwargs, args[0]
    kwargs = dict(kwargs)
    return (), kwargs, kwargs.pop("hidden_states")


def _names_of(model: nn.Module, module: nn.Module) -> list[str]:
    path = next(name for name, candidate in model.named_modules() if candidate is module)
    return [f"{path}.{name}" for name in module.state_dict()]
