"""What is seen of one forward pass of a decoder: who reads what, and what the residual stream meets.

Hooks mark the outputs of embeddings, norms, linears and blocks; between them `ChannelPaths` follows the tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from quantcli.errors import ModelError
from quantcli.model.channel_paths import ChannelPaths
from quantcli.model.experts import FoundExperts, reads_by_a_product
from quantcli.model.norms import describe_norm, is_norm, is_norm_of, norm_offset, turns_with_its_input
from quantcli.model.structure import Block, Experts, Linear, Norm, Producer, Residual, SharedInput

OUTSIDE = ""
"""The residual stream outside of the blocks, as a term."""


class Watch:
    """What is seen of one forward: the readers of each input, and what sums norms, linears and blocks meet.

    `wanted` are the blocks that are watched, with what `model.experts.find_experts` found in them. Experts and routers
    count as linears, though their outputs are not followed to other linears. The residual stream inside a block is a
    term under the block's own path, outside of the blocks under OUTSIDE.
    """

    def __init__(self, model: nn.Module, paths: list[str], wanted: Mapping[str, FoundExperts]) -> None:
        self.wanted = wanted
        self.architecture = type(model).__name__
        self.layers = {experts.name for found in wanted.values() for experts in found.experts if experts.linears}
        routers = {
            name: reads_by_a_product(model.get_submodule(name)) for found in wanted.values() for name in found.routers
        }
        self.paths = ChannelPaths()
        self.linears: dict[str, Linear] = {}
        self.readers: dict[int, list[str]] = {}
        self.sources: dict[int, tuple[str, list[int]] | None] = {}
        self.norms: dict[str, nn.Module] = {}
        self.sums: dict[str, frozenset[str]] = {}  # what norms and linears read, and what blocks put out, in order
        self.entrances: dict[str, frozenset[str]] = {}  # what blocks are given
        self.tuple_length: int | None = None
        self.handed_on: Tensor | None = None  # by the block before
        self.handles: list[Any] = []
        unwanted = tuple(f"{path}." for path in paths if path not in wanted)
        for name, module in model.named_modules():
            if name in paths:
                self._hook(module, self._enter_block(name, name in wanted), self._leave_block(name, name in wanted))
            elif name.startswith(unwanted):
                continue
            elif name in self.layers:
                self._hook(module, self._enter_linear(name), self._leave_experts(name))
            elif name in routers:
                self._hook(module, self._enter_router(name, routers[name]), self._leave_router())
            elif is_linear(module):
                self.linears[name] = describe_linear(name, module)
                self.paths.weights[id(module.weight)] = name
                self._hook(module, self._enter_linear(name), self._leave_linear(name))
            elif is_norm(module):
                self._hook(module, self._enter_norm(name), self._leave_norm(name))
            elif isinstance(module, nn.Embedding):
                self._hook(module, None, self._leave_embedding(f"{name}.weight"))
        self.blocks = paths

    def _hook(self, module: nn.Module, enter: Any, leave: Any) -> None:
        if enter is not None:
            self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self.handles.append(module.register_forward_hook(leave, with_kwargs=True))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()

    def stream_of(self, name: str) -> str:
        """The name of the residual stream where the module is."""
        return next((path for path in self.blocks if name.startswith(f"{path}.")), OUTSIDE)

    def _enter_linear(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = first_argument(args, kwargs)
            self.paths.silent += 1
            self.sums[name] = terms = self.paths.terms_of(tensor)
            if not any(terms == {norm} and self.stream_of(norm) == self.stream_of(name) for norm in self.norms):
                self.paths.break_off(terms, f"the linear {name}")
            source = self.paths.source_of(tensor)
            if source is not None and self.stream_of(source[0]) != self.stream_of(name):
                self.paths.read_otherwise(tensor)
                source = None
            self.sources[id(tensor)] = source
            self.paths.kept.append(tensor)
            self.readers.setdefault(id(tensor), []).append(name)

        return hook

    def _leave_linear(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
            self.paths.silent -= 1
            self.paths.begin(output, name)

        return hook

    def _leave_experts(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
            self.paths.silent -= 1
            self.paths.begin(output, name, channels=False)

        return hook

    def _enter_router(self, name: str, by_a_product: bool) -> Any:
        enter = self._enter_linear(name)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            for tensor in tensors[by_a_product:]:  # the first is the input
                self.paths.read_otherwise(tensor)
                self.paths.break_off(self.paths.terms_of(tensor), f"the router {name}")
            enter(module, args, kwargs)

        return hook

    def _leave_router(self) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any) -> None:
            self.paths.silent -= 1

        return hook

    def _enter_norm(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _norms_alone(module, args, kwargs):
                tensor = first_argument(args, kwargs)
                self.paths.silent += 1
                self.norms[name] = module
                self.sums[name] = terms = self.paths.terms_of(tensor)
                self.paths.read_otherwise(tensor)
                if self.stream_of(name) not in terms:
                    self.paths.break_off(terms, f"the norm {name}")

        return hook

    def _leave_norm(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if _norms_alone(module, args, kwargs):
                self.paths.silent -= 1
                self.paths.begin(output, name)

        return hook

    def _leave_embedding(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
            self.paths.begin(output, name, channels=False)

        return hook

    def _enter_block(self, path: str, wanted: bool) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = first_argument(args, kwargs)
            self._require_states_alone(path, hidden, [*args, *kwargs.values()])
            self.entrances[path] = self.paths.terms_of(hidden)
            self.entered = len(self.paths.kept)
            if wanted:
                self.paths.begin(hidden, path, channels=False)

        return hook

    def _require_states_alone(self, path: str, hidden: Tensor, given: Any) -> None:
        """Raise ModelError unless blocks can be run one after the other with nothing but hidden states [samples,
        tokens, channels] between them: the very ones that the block before has put out."""
        if hidden.ndim != 3:
            reason = f"{path} is given states of {hidden.ndim} dimensions, not of samples, tokens and channels"
        elif self.handed_on is not None and hidden is not self.handed_on:
            reason = f"{path} is not given what the block before it puts out"
        elif any(id(value) in self.paths.made for value in _tensors(given)):
            reason = f"{path} is given more than hidden states of the blocks before it"
        else:
            return
        raise self._not_apart(reason)

    def _not_apart(self, reason: str) -> ModelError:
        what = f"{self.architecture} cannot be run one block at a time: {reason}"
        return ModelError(f"{what}.", "Its architecture is not supported.")

    def _leave_block(self, path: str, wanted: bool) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
            if self.tuple_length is None:
                self.tuple_length = len(output) if isinstance(output, tuple) else 0
            hidden = output[0] if isinstance(output, tuple) else output
            if wanted:
                self.sums[path] = self.paths.terms_of(hidden)
                if self.paths.reread:
                    raise self._not_apart(f"{path} reads more than hidden states of the blocks before it")
                self.paths.made |= {id(value) for value in self.paths.kept[self.entered :] if value is not hidden}
            self.paths.begin(hidden, OUTSIDE, channels=False)
            self.handed_on = hidden

        return hook

    def block(self, path: str) -> Block:
        """The block at a path."""
        found = self.wanted[path]
        inside = {name: linear for name, linear in self.linears.items() if name.startswith(f"{path}.")}
        order = {name: place for place, name in enumerate(self.sums)}
        inputs = []
        for key, names in self.readers.items():
            readers = tuple(name for name in names if name in inside)
            if readers:
                producer = self._producer(self.sources[key], readers, path)
                inputs.append(SharedInput(readers, inside[readers[0]].in_features, producer))
        inputs.sort(key=lambda shared: order[shared.linears[0]])  # a router may have read the same before
        seen = [inside[name] for shared in inputs for name in shared.linears]
        unseen = [linear for linear in inside.values() if linear not in seen]
        residual = self._residual(path, found.experts)
        linears = (*seen, *unseen)
        routers = (*(linear.name for linear in found.routers.values()), *(n.name for n in linears if found.gates(n)))
        fused = (*_fused(inputs, routers), *(experts.names for experts in found.experts if experts.linears))
        linears = (*linears, *found.routers.values(), *found.linears)
        split = {name for shared in inputs if shared.producer and shared.producer.kind == "linear"
                 for name in shared.linears}  # fmt: skip
        split |= {*residual.writers, *(name for experts in found.experts for name in experts.leaving)}
        linears = tuple(
            replace(linear, splits_input=linear.name in split, read_apart=linear.name in self.paths.read)
            for linear in linears
        )
        last = len(order)  # one that was never called stands behind all inputs
        experts = tuple(
            replace(e, inputs_before=sum(order[s.linears[0]] < order.get(e.name, last) for s in inputs))
            for e in found.experts
        )
        mixed = (*self._mixed(path, found), *found.inner)
        return Block(path, linears, tuple(inputs), fused, experts, routers, residual, mixed)

    def _mixed(self, path: str, found: FoundExperts) -> Iterator[SharedInput]:
        """What makes the inputs of experts, each with all of its readers."""
        members: dict[str, tuple[str, ...]] = {name: (linear.name,) for name, linear in found.routers.items()}
        for experts in found.experts:
            members[experts.name] = experts.entering
        layers = {experts.name for experts in found.experts}
        entering: list[tuple[str, list[int]]] = []
        for key, names in self.readers.items():
            source = self.sources[key]
            if source is not None and source not in entering and layers.intersection(names):
                entering.append(source)
        for source in entering:
            readers = [name for key, names in self.readers.items() if self.sources[key] == source for name in names]
            linears = tuple(name for reader in readers for name in members.get(reader, (reader,)))
            yield SharedInput(linears, len(source[1]), self._producer(source, readers, path))

    def _producer(self, source: tuple[str, list[int]] | None, readers: Collection[str], path: str) -> Producer | None:
        """What makes an input of these readers; an obstacle if anything else reads it."""
        if source is None:
            return None
        name, channels = source
        width, others = self.paths.widths[name], self.paths.others.get(name)
        segments = () if channels == list(range(width)) else _segments(channels)
        obstacle, local = "", name.removeprefix(f"{path}.")
        if others is not None and bool(others[channels].any()):
            obstacle = f"{local} is also read by something that is no linear"
        for key, other in self.sources.items():
            others_readers = [reader for reader in self.readers[key] if reader not in readers]
            if others_readers and other is not None and other[0] == name and {*channels} & {*other[1]}:
                obstacle = f"{local} is also read by {others_readers[0].removeprefix(f'{path}.')}"
        if name in self.norms:
            return Producer(name, "norm", norm_offset(self.norms[name]), segments, obstacle)
        return Producer(name, "linear", 0.0, segments, obstacle, name in self.paths.attended)

    def _residual(self, path: str, experts: tuple[Experts, ...]) -> Residual:
        sums = [terms for terms in self.sums.values() if path in terms]
        norms = [name for name in self.norms if path in self.sums[name] and self.stream_of(name) == path]
        writers = [name for name in self.linears if any(name in terms for terms in sums)]
        layers = [layer.name for layer in experts if any(layer.name in terms for terms in sums)]
        obstacle = self._residual_obstacle(path, experts, norms, [*writers, *layers]).replace(f"{path}.", "")
        described = tuple(describe_norm(name, self.norms[name]) for name in norms)
        return Residual(described, tuple(writers), obstacle, tuple(layers))

    def _residual_obstacle(self, path: str, experts: tuple[Experts, ...], norms: list[str], writers: list[str]) -> str:
        """In names without the block's path, so that blocks of one kind have one obstacle."""
        broken, terms = self.paths.broken, self.sums.get(path, frozenset())
        for layer in experts:
            if not layer.linears:
                return f"{layer.name} holds the weights of many experts in a form that is not known"
        for name in self.norms:
            if name in terms:
                return f"the output of the norm {name} is added to the residual stream"
        if broken.get(path) == "add":
            return "something is added to the residual stream that is not the output of a linear"
        if path in broken:
            return f"the residual stream is read by {_reader(broken[path])}"
        if path not in terms:
            return "the residual stream is not what the block puts out"
        for name in norms:
            if name in broken:
                return f"the output of {name} is read by {_reader(broken[name])}, not by linears alone"
        for name in writers:
            if name in broken:
                return f"the output of {name} is added to the residual stream and also read by {_reader(broken[name])}"
        return next((_strange(name) for name in norms if not turns_with_its_input(self.norms[name])), "")

    def outside(self, head: str | None) -> tuple[tuple[str, ...], Norm | None, str]:
        """Embeddings, final norm and obstacle of `Structure`."""
        entered = self.entrances.get(self.blocks[0], frozenset())
        embeddings = tuple(sorted(entered - self.norms.keys() - self.linears.keys()))
        final = None
        for name in self.norms:
            if self.sums[name] == {OUTSIDE} and self.sums.get(head or "") == frozenset({name}):
                final = name
        obstacle = self._outer_obstacle(entered, embeddings, head, final)
        return embeddings, None if final is None else describe_norm(final, self.norms[final]), obstacle

    def _outer_obstacle(
        self, entered: frozenset[str], embeddings: tuple[str, ...], head: str | None, final: str | None
    ) -> str:
        broken = self.paths.broken
        if not entered:
            return "what enters the first block is not a sum of embeddings"
        for name in sorted(entered.difference(embeddings)):
            return f"{name} stands between the embeddings and the first block"
        for name in embeddings:
            if name in broken:
                return f"{name} is also read by {_reader(broken[name])}"
        for path in self.blocks[1:]:
            if self.entrances.get(path) != frozenset({OUTSIDE}):
                return f"something changes the residual stream before {path}"
        if head is None:
            return "the model has no output head"
        if final is None:
            return f"{head} does not read the output of a norm of the residual stream"
        if OUTSIDE in broken:
            return f"behind the last block the residual stream is read by {_reader(broken[OUTSIDE])}"
        if final in broken:
            return f"the output of {final} is read by {_reader(broken[final])}, not by {head} alone"
        return "" if turns_with_its_input(self.norms[final]) else _strange(final)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or the Conv1D of GPT-2, which is a linear whose weight is stored as [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def describe_linear(name: str, module: nn.Module) -> Linear:
    """A module of which `is_linear` holds."""
    weight = module.weight
    transposed = not isinstance(module, nn.Linear)
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[union-attr]
    outs, ins = (columns, rows) if transposed else (rows, columns)
    return Linear(name, ins, outs, module.bias is not None, transposed)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among arguments, but not in stores by name, which hold what other blocks want, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _norms_alone(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is called on one tensor, with a weight a channel: some norms also take a gate, some norm groups."""
    return len(args) + len(kwargs) == 1 and is_norm_of(module, first_argument(args, kwargs))


def _segments(channels: list[int]) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive channels, cut wherever one begins or ends elsewhere: heads that share values stay whole."""
    cuts = {i for i in range(1, len(channels)) if channels[i] != channels[i - 1] + 1}
    begins = {channels[i] for i in cuts} | {channels[0]}
    ends = {channels[i - 1] for i in cuts} | {channels[-1]}
    starts = [0, *(i for i in range(1, len(channels)) if channels[i] in begins or channels[i - 1] in ends)]
    return tuple((channels[i], end - i) for i, end in zip(starts, [*starts[1:], len(channels)], strict=True))


def _reader(operation: str) -> str:
    return operation if " " in operation else f"an operation ({operation})"


def _strange(norm: str) -> str:
    return f"{norm} is neither an RMS norm nor a layer norm"


def _fused(inputs: list[SharedInput], routers: Collection[str]) -> Iterator[tuple[str, ...]]:
    for shared in inputs:
        parents: dict[str, list[str]] = {}
        for linear in shared.linears:
            if linear not in routers:
                parents.setdefault(linear.rpartition(".")[0], []).append(linear)
        yield from (tuple(group) for group in parents.values() if len(group) > 1)
