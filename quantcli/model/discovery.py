"""Finding the structure of a decoder by watching one forward of a block, on the meta device and without weights.

Linears that share an input receive one tensor object. A norm or a linear feeds a linear when its output gets there
through operations that keep channels apart: views, products with something else, the value operand of attention.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantcli.errors import ModelError
from quantcli.model.skeleton import build_model, find_blocks, load_config, resolve_dtype
from quantcli.model.structure import Block, Linear, Producer, SharedInput, Structure

PROBE_TOKENS = 8
# ATen operations through which a channel of the first operand stays a channel: it may move, be repeated or be scaled.
_KEEP = {
    "view", "_unsafe_view", "reshape", "transpose", "permute", "expand", "clone", "_to_copy", "slice", "split",
    "split_with_sizes", "chunk", "unbind", "squeeze", "unsqueeze", "alias", "detach", "t", "select", "contiguous",
    "div", "neg", "native_dropout",
    "relu",  # positively homogeneous, and scales are positive
}  # fmt: skip
_PRODUCT = {"mul"}
_WEIGHTED_SUM = {"bmm", "matmul"}  # attention weights times values: channels of the second operand


@torch.inference_mode(False)  # inside it products are not taken apart, and nothing could be followed
def discover(directory: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> Structure:
    """The structure of the model that `config.json` describes; no weights are read.

    Blocks of equal make (class, parameter names and shapes) are watched once. Raises ModelError if the architecture
    cannot be built or run on the meta device.
    """
    config = load_config(directory, trust_remote_code=trust_remote_code)
    compute = resolve_dtype(config, dtype)
    # eager attention keeps values visible as an operand on every device; the structure does not depend on the kernel
    config._attn_implementation = "eager"
    with torch.device("meta"):
        # in bfloat16 whatever the model's dtype: grouped products of experts exist for it alone on this device
        model = build_model(config, torch.bfloat16, trust_remote_code)
    model.eval().requires_grad_(False)
    paths = find_blocks(model, config)
    first_of_kind: dict[str, str] = {}
    for path in paths:
        first_of_kind.setdefault(_make(model.get_submodule(path)), path)
    watched, tuple_output = _watch_blocks(model, paths, set(first_of_kind.values()))
    blocks = []
    for path in paths:
        kind = first_of_kind[_make(model.get_submodule(path))]
        blocks.append(_renamed(watched[kind], kind, path))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and (head.weight is embedding.weight or bool(config.tie_word_embeddings))
    head_path = _path_of(model, head) if head is not None else None
    skipped = f"{head_path}.weight" if tied else None
    return Structure(
        architecture=type(model).__name__,
        dtype=str(compute).removeprefix("torch."),
        blocks=tuple(blocks),
        parameters={n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n != skipped},
        head=head_path,
        tied=tied,
        vocabulary=int(config.vocab_size),
        width=int(embedding.embedding_dim),
        tuple_output=tuple_output,
    )


class _ChannelPaths(TorchDispatchMode):
    """Follows the output channels of norms and linears through a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, frozenset[str]] = {}  # norms and linears whose output channels this tensor still holds
        self.influences: dict[int, frozenset[str]] = {}  # those that it depends on in any way
        self.kept: list[Tensor] = []  # identities stay unique while the tensors live

    def mark(self, tensor: Tensor, sources: frozenset[str], influences: frozenset[str]) -> None:
        self.kept.append(tensor)
        self.sources[id(tensor)] = sources
        self.influences[id(tensor)] = influences

    def of(self, value: Any) -> frozenset[str]:
        return self.sources.get(id(value), frozenset()) if isinstance(value, Tensor) else frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device.type == "meta":
            # A question about values, such as whether a mask is trivial: none exist, and "yes" keeps the plain path.
            return args[0].dtype == torch.bool or 1
        result = func(*args, **(kwargs or {}))
        operands = [self.influences.get(id(value), frozenset()) for value in args if isinstance(value, Tensor)]
        sources: frozenset[str] = frozenset()
        if name in _KEEP:
            sources = self.of(args[0])
        elif name in _PRODUCT and len(operands) == 2:
            # x · f(x), as in an activation, does not keep the channels of x apart from a scale
            sources = (self.of(args[0]) - operands[1]) | (self.of(args[1]) - operands[0])
        elif name in _PRODUCT:
            sources = self.of(args[0])
        elif name in _WEIGHTED_SUM and not self.of(args[0]):
            sources = self.of(args[1])
        for output in result if isinstance(result, tuple | list) else [result]:
            if isinstance(output, Tensor):
                self.mark(output, sources, frozenset().union(*operands))
        return result


class _Watch:
    """What was seen of one block: readers of each input, and who made it."""

    def __init__(self, block: nn.Module, path: str, paths: _ChannelPaths) -> None:
        self.paths = paths
        self.linears: dict[str, Linear] = {}
        self.readers: dict[int, list[str]] = {}
        self.inputs: dict[int, Tensor] = {}
        self.norms: dict[str, nn.Module] = {}
        self.handles = []
        for name, module in block.named_modules(prefix=path):
            if is_linear(module):
                self.linears[name] = _describe(name, module)
                self.handles.append(module.register_forward_hook(self._saw_linear(name), with_kwargs=True))
            elif _is_norm(module):
                self.handles.append(module.register_forward_hook(self._saw_norm(name)))

    def _saw_linear(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            tensor = args[0] if args else next(iter(kwargs.values()))
            self.inputs[id(tensor)] = tensor
            self.readers.setdefault(id(tensor), []).append(name)
            self.paths.kept.append(tensor)
            self.paths.mark(output, frozenset({name}), frozenset({name}))

        return hook

    def _saw_norm(self, name: str) -> Any:
        def hook(module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(output, Tensor):
                self.norms[name] = module
                self.paths.mark(output, frozenset({name}), frozenset({name}))

        return hook

    def block(self, name: str, module: nn.Module) -> Block:
        inputs = []
        for key, readers in self.readers.items():
            inputs.append(SharedInput(tuple(readers), self.linears[readers[0]].in_features, self._producer(key)))
        seen = [self.linears[name] for shared in inputs for name in shared.linears]
        unseen = [linear for linear in self.linears.values() if linear not in seen]
        experts = tuple(n for n, p in module.named_parameters(prefix=name) if p.ndim == 3)
        return Block(name, (*seen, *unseen), tuple(inputs), tuple(_fused(inputs)), experts)

    def _producer(self, key: int) -> Producer | None:
        origins = self.paths.of(self.inputs[key])
        if len(origins) != 1:
            return None
        (origin,) = origins
        if origin in self.norms:
            return Producer(origin, "norm", norm_offset(self.norms[origin]))
        return Producer(origin, "linear")


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or the Conv1D of GPT-2, which is a linear whose weight is stored as [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def norm_offset(norm: nn.Module) -> float:
    """1.0 for a norm that multiplies by 1 + w (Gemma), 0.0 for one that multiplies by w, which w = 0 silences."""
    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        width = probe.get_parameter("weight").shape[0]
        output = probe(torch.linspace(-1.0, 2.0, width).view(1, 1, -1))
    return 1.0 if output.abs().max() > 0 else 0.0


def _describe(name: str, module: nn.Module) -> Linear:
    weight = module.weight
    transposed = not isinstance(module, nn.Linear)
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[union-attr]
    outs, ins = (columns, rows) if transposed else (rows, columns)
    return Linear(name, ins, outs, module.bias is not None, transposed)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and not any(module.children())


def _fused(inputs: list[SharedInput]) -> Iterator[tuple[str, ...]]:
    for shared in inputs:
        parents: dict[str, list[str]] = {}
        for linear in shared.linears:
            parents.setdefault(linear.rpartition(".")[0], []).append(linear)
        yield from (tuple(group) for group in parents.values() if len(group) > 1)


def _make(block: nn.Module) -> str:
    parts = [f"{name}:{tuple(p.shape)}" for name, p in block.named_parameters()]
    return " ".join([type(block).__name__, *parts])


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _watch_blocks(model: nn.Module, paths: list[str], wanted: set[str]) -> tuple[dict[str, Block], bool]:
    """Run the model once; blocks that are not wanted pass their input through. Also whether blocks return tuples."""
    watched: dict[str, Block] = {}
    follower = _ChannelPaths()
    with _through(model, paths, wanted) as form:
        watches = {path: _Watch(model.get_submodule(path), path, follower) for path in wanted}
        tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
        try:
            with torch.no_grad(), follower:
                model(input_ids=tokens, use_cache=False)
        except Exception as error:  # whatever a model's code raises, it cannot be followed
            raise ModelError(f"{type(model).__name__} cannot be followed without its weights: {error}.",
                             "Its architecture is not supported yet.") from error  # fmt: skip
        finally:
            for watch in watches.values():
                for handle in watch.handles:
                    handle.remove()
    for path, watch in watches.items():
        watched[path] = watch.block(path, model.get_submodule(path))
    return watched, form[0]


@contextmanager
def _through(model: nn.Module, paths: list[str], wanted: set[str]) -> Iterator[list[bool]]:
    """Blocks outside `wanted` return their input, in the form in which the first block returns its output.

    Yields a list that will say, for that block, whether the form is a tuple.
    """
    as_tuple: list[bool] = []

    def note_form(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        as_tuple.append(isinstance(output, tuple))

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if as_tuple[0] else hidden

    handle = model.get_submodule(paths[0]).register_forward_hook(note_form)
    others = [model.get_submodule(path) for path in paths if path not in wanted]
    try:
        for block in others:
            block.__dict__["forward"] = forward
        yield as_tuple
    finally:
        handle.remove()
        for block in others:
            block.__dict__.pop("forward", None)


def _renamed(block: Block, old: str, new: str) -> Block:
    """The same block under another path."""

    def name(path: str) -> str:
        return new + path.removeprefix(old)

    return Block(
        new,
        tuple(replace(linear, name=name(linear.name)) for linear in block.linears),
        tuple(
            SharedInput(
                tuple(map(name, shared.linears)),
                shared.width,
                replace(shared.producer, name=name(shared.producer.name)) if shared.producer else None,
            )
            for shared in block.inputs
        ),
        tuple(tuple(map(name, group)) for group in block.fused),
        tuple(map(name, block.experts)),
    )
