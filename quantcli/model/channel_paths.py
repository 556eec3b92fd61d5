"""Following channels through a forward pass on the meta device, where nothing has values.

Beside each tensor that is followed goes a real one of the same shape, its map: which output channel of its source every
element is, up to a factor. Operations that move elements are carried out on the map too. Beside that, sums are
followed: which modules' outputs, unchanged but for a factor a token, add up to a tensor, as on the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# ATen operations (without the underscore of those in place) that move, repeat or leave out elements of their operand
_MOVES = {
    "view", "_unsafe_view", "reshape", "transpose", "permute", "t", "expand", "slice", "split", "split_with_sizes",
    "chunk", "unbind", "squeeze", "unsqueeze", "select", "clone", "alias", "detach", "contiguous",
}  # fmt: skip
_VIEWS = {"view", "_unsafe_view", "reshape"}
_SAME = {"_to_copy", "native_dropout", "neg"}  # element by element, up to a constant factor
_POSITIVE = {"relu"}  # f(s x) = s f(x) for s > 0 alone
_SHAPE_ONLY = {"new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like", "ones_like", "full_like"}
_WEIGHTED_SUM = {"bmm", "matmul"}  # attention weights times values: channels of the second operand

Map = Tensor
"""int32, of the shape of the tensor it belongs to: the source's output channel behind each element."""
Mask = Tensor
"""bool [output channels of a source]: those that something depends on."""


class ChannelPaths(TorchDispatchMode):
    """Follows the outputs that `begin` marks; everything is keyed by the identity of tensors, which are kept alive.

    others: source → mask of the channels that went into an operation that did not keep them apart. broken: module →
    the operation that read its output, or a sum with it, and did not hand it on whole. read: names of those `weights`
    that an operation was given, but in a module whose output is marked as a whole. reread: whether one was given what
    is in `made`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, str] = {}  # by the identity of parameters, which the model keeps alive
        self.read: set[str] = set()
        self.made: set[int] = set()  # tensors of blocks that are left, by identity
        self.reread = False
        self.maps: dict[int, dict[str, Map]] = {}
        self.influences: dict[int, dict[str, Mask]] = {}  # of sources that are no longer followed
        self.terms: dict[int, frozenset[str]] = {}
        self.widths: dict[str, int] = {}
        self.others: dict[str, Mask] = {}
        self.broken: dict[str, str] = {}
        self.attended: set[str] = set()  # sources that attention weights added up
        self.kept: list[Tensor] = []
        self.silent = 0  # above 0 inside a module whose output is marked as a whole

    def begin(self, output: Any, name: str, *, channels: bool = True) -> None:
        """From here on `output` is that of `name`; what it was made of is forgotten. Tuples are not followed."""
        if not isinstance(output, Tensor):
            return
        self._mark(output, {}, {}, frozenset({name}))
        if channels:
            width = self.widths[name] = output.shape[-1]
            self.maps[id(output)] = {name: torch.arange(width, dtype=torch.int32).expand(output.shape)}

    def source_of(self, tensor: Tensor) -> tuple[str, list[int]] | None:
        """The one source of a tensor and its channel behind each of the last dimension, if they are the same for all
        tokens. Otherwise None, and the sources count as read by another operation."""
        maps = self.maps.get(id(tensor), {})
        if len(maps) == 1:
            ((name, channels),) = maps.items()
            rows = channels.reshape(-1, channels.shape[-1])
            if bool((rows == rows[0]).all()):
                return name, rows[0].tolist()
        self.read_otherwise(tensor)
        return None

    def read_otherwise(self, tensor: Tensor, kept: Iterable[str] = ()) -> None:
        for name, channels in self.maps.get(id(tensor), {}).items():
            if name not in kept:
                self.others[name] = _either(self.others.get(name), self._mask(name, channels))

    def break_off(self, terms: Iterable[str], operation: str) -> None:
        for name in terms:
            self.broken.setdefault(name, operation)

    def terms_of(self, value: Any) -> frozenset[str]:
        return self.terms.get(id(value), frozenset()) if isinstance(value, Tensor) else frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device.type == "meta":
            # A question about values, such as whether a mask is trivial: none exist, and "yes" keeps the plain path.
            return args[0].dtype == torch.bool or 1
        result = func(*args, **(kwargs or {}))
        if self.silent:
            return result
        name = name.rstrip("_")
        outputs = list(_tensors([result]))
        operands = [] if name in _SHAPE_ONLY else list(_tensors([*args, *(kwargs or {}).values()]))
        maps = self._followed(func, name, args, kwargs or {}, outputs)
        terms = [self._sum(name, args, output) for output in outputs]
        influences: dict[str, Mask] = {}
        followed: set[str] = set().union(*maps)
        self.reread |= any(id(operand) in self.made for operand in operands)
        self.read |= {self.weights[id(operand)] for operand in operands if id(operand) in self.weights}
        for operand in operands:
            self.read_otherwise(operand, followed)
            self.break_off(self.terms_of(operand).difference(*terms), name)
            for source, mask in self._depends(operand, without=followed):
                influences[source] = _either(influences.get(source), mask)
        for output, its_maps, its_terms in zip(outputs, maps, terms, strict=True):
            self._mark(output, its_maps, influences, its_terms)
            if func._schema.is_mutable and output._base is not None:
                self._write_into(output._base, influences, its_maps)
        return result

    def _mark(self, tensor: Tensor, maps: dict[str, Map], influences: dict[str, Mask], terms: frozenset[str]) -> None:
        self.kept.append(tensor)
        self.maps[id(tensor)], self.influences[id(tensor)], self.terms[id(tensor)] = maps, influences, terms

    def _write_into(self, whole: Tensor, influences: dict[str, Mask], maps: dict[str, Map]) -> None:
        """A part of a tensor was changed in place: the whole depends on what the part depends on."""
        part = {**influences, **{source: self._mask(source, channels) for source, channels in maps.items()}}
        self.read_otherwise(whole)
        self.break_off(self.terms_of(whole), "a change in place")
        for source, mask in self._depends(whole):
            part[source] = _either(part.get(source), mask)
        self._mark(whole, {}, part, frozenset())

    def _followed(self, func: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor]) -> list[dict[str, Map]]:
        """The maps of each output."""
        found: list[dict[str, Map]] = [{} for _ in outputs]
        if name in _MOVES:
            for source, channels in self.maps.get(id(args[0]), {}).items():
                moved = channels.reshape(args[1]) if name in _VIEWS else func(channels, *args[1:], **kwargs)
                for maps, output, part in zip(found, outputs, _tensors([moved]), strict=True):
                    if part.shape == output.shape:
                        maps[source] = part
        elif name in _SAME | _POSITIVE:
            for maps in found:
                maps.update(self.maps.get(id(args[0]), {}))
        elif name in {"mul", "div"}:
            for one, other in [(args[0], args[1]), (args[1], args[0])][: 1 if name == "div" else 2]:
                for source, channels in self._apart(one, other):
                    found[0][source] = channels.broadcast_to(outputs[0].shape)
        elif name in _WEIGHTED_SUM and not self.maps.get(id(args[0])):
            for source, channels in self._apart(args[1], args[0]):
                first = channels[..., :1, :]  # at one key position; all must agree, for they are added up
                if bool((channels == first).all()):
                    found[0][source] = first.expand(outputs[0].shape)
                    self.attended.add(source)
        return found

    def _apart(self, one: Any, other: Any) -> Iterator[tuple[str, Map]]:
        """Maps of one factor whose channels the other does not depend on: x · f(x) does not scale with x."""
        for source, channels in self.maps.get(id(one), {}).items():
            shared = dict(self._depends(other)).get(source)
            followed_too = source in self.maps.get(id(other), {})
            if shared is None or not (followed_too or bool((shared & self._mask(source, channels)).any())):
                yield source, channels

    def _sum(self, name: str, args: Any, output: Tensor) -> frozenset[str]:
        """The terms of an output."""
        first, second = (
            (self.terms_of(value), value) if _is_as_wide(value, output) else (frozenset(), value)
            for value in (*args, None, None)[:2]
        )
        if name in _MOVES | _SAME:
            return first[0]
        if name in {"add", "sub"}:
            return first[0] | second[0] if first[0] and second[0] else frozenset()
        for (terms, _), (_, factor) in [(first, second), (second, first)][: {"mul": 2, "div": 1}.get(name, 0)]:
            if terms and _is_one_a_token(factor):
                return terms
        return frozenset()

    def _depends(self, value: Any, without: Iterable[str] = ()) -> Iterator[tuple[str, Mask]]:
        yield from self.influences.get(id(value), {}).items()
        for source, channels in self.maps.get(id(value), {}).items():
            if source not in without:
                yield source, self._mask(source, channels)

    def _mask(self, source: str, channels: Map) -> Mask:
        mask = torch.zeros(self.widths[source], dtype=torch.bool)
        mask[channels.reshape(-1).long()] = True
        return mask


class ListIndexing(TorchFunctionMode):
    """x[..., [-1], :]: the list becomes a tensor on the meta device before it can be seen by `paths`, so the map is
    indexed here, where it is still a list."""

    def __init__(self, paths: ChannelPaths) -> None:
        super().__init__()
        self.paths = paths

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = func is Tensor.__getitem__ and isinstance(args[1], tuple) and not any(_tensors(args[1]))
        if not plain or not any(isinstance(part, list) for part in args[1]):
            return func(*args, **(kwargs or {}))
        self.paths.silent += 1
        result = func(*args)
        self.paths.silent -= 1
        maps = {source: channels[args[1]] for source, channels in self.paths.maps.get(id(args[0]), {}).items()}
        self.paths._mark(result, maps, self.paths.influences.get(id(args[0]), {}), frozenset())
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _either(one: Mask | None, other: Mask) -> Mask:
    return other if one is None else one | other


def _is_as_wide(value: Any, output: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[-1:] == output.shape[-1:]


def _is_one_a_token(factor: Any) -> bool:
    return not isinstance(factor, Tensor) or factor.ndim == 0 or factor.shape[-1] == 1
