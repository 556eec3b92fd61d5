"""What a pass through a block holds where it may wait, before an input of linears or a layer of experts
(`model.lockstep`): found on the meta device by counting the tensors that are alive there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHORT, LONG = 8, 16


class Living(TorchDispatchMode):
    """The tensors that operations make while it is on, for as long as they live. Views of one tensor count once, and
    those of what was there before not at all."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._found: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if not _has(self._made, storage := tensor.untyped_storage()):
                self._found[storage._cdata] = StorageWeakRef(storage)
        if func.overloadpacket.__name__ == "_local_scalar_dense" and args[0].device.type == "meta":
            return args[0].dtype == torch.bool or 1  # as `model.channel_paths` answers
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if not _has(self._made, storage) and not _has(self._found, storage):
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def forget(self) -> None:
        """Count what is made from here on."""
        self._made.clear()
        self._found.clear()

    def nbytes(self) -> int:
        """Bytes of those that are there now."""
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))


def _has(known: Mapping[int, Any], storage: torch.UntypedStorage) -> bool:
    """Whether a storage is known: an address may be that of one which is gone."""
    found = known.get(storage._cdata)
    return found is not None and not (found[0] if isinstance(found, tuple) else found).expired()


def held_while_waiting(
    model: nn.Module, stops: Mapping[str, Iterable[str]], run: Callable[[int], object]
) -> dict[str, tuple[float, float]]:
    """Of each block of a bfloat16 model on the meta device what `Block.held` says.

    `stops`: for each block the modules before which a pass may wait. `run` makes a pass over a sequence of so many
    tokens.
    """
    seen: dict[int, dict[str, int]] = {SHORT: {}, LONG: {}}
    for tokens in seen:
        with _counted(model, stops, seen[tokens]):
            run(tokens)
    held = {name: _split(seen[SHORT][name], many) for name, many in seen[LONG].items()}
    return {block: _most([held[name] for name in names if name in held]) for block, names in stops.items()}


@contextmanager
def _counted(model: nn.Module, stops: Mapping[str, Iterable[str]], seen: dict[str, int]) -> Iterator[None]:
    """While the body runs, the most bytes that are alive before each of the stops, of what its block has made."""
    living, handles = Living(), []

    def begin(*_: object) -> None:
        living.forget()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: seen.update({name: max(seen.get(name, 0), living.nbytes())})

    try:
        for block, names in stops.items():
            handles.append(model.get_submodule(block).register_forward_pre_hook(begin))
            handles += [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
        with living:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _split(short: int, long: int) -> tuple[float, float]:
    """a, b ≥ 0 with a t + b t² values of two bytes in so many bytes, for t of SHORT and LONG tokens."""
    pairs = max(0.0, (long / LONG - short / SHORT) / (LONG - SHORT))
    return (long / LONG - pairs * LONG) / 2, pairs / 2


def _most(held: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The most of either kind, whichever stop it is at."""
    return max((tokens for tokens, _ in held), default=0.0), max((pairs for _, pairs in held), default=0.0)
