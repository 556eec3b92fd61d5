"""Finding the structure of a decoder by watching one forward of a block, on the meta device and without weights.

Linears that share an input receive one tensor object. A norm or a linear feeds a linear when its output gets there
through operations that keep channels apart: views, products with something else, the value operand of attention. What
is added to the residual stream, and what reads it, is followed likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantcli.errors import ModelError, QuantcliError
from quantcli.model.attention import caches_latents
from quantcli.model.channel_paths import ListIndexing
from quantcli.model.experts import FoundExperts, find_experts
from quantcli.model.names import TEXT_ALONE
from quantcli.model.skeleton import as_returned, build_model, find_blocks, layers_of, load_config, resolve_dtype
from quantcli.model.structure import Block, Residual, SharedInput, Structure
from quantcli.model.waiting import held_while_waiting
from quantcli.model.watch import Watch, describe_linear, first_argument, is_linear

PROBE_TOKENS = 8
MAXIMUM_BUFFERS = 8 << 30
"""Bytes of the tables that a model computes from its configuration, such as masks and rotary frequencies."""
MAXIMUM_CHANNELS = 1 << 24
"""Channels that norms and linears of blocks that differ put out in all, which take about 100 bytes each while they are
followed. Llama 3.1 405B has 400 000. Also the weights of a router, which is tried on numbers."""


def discover(directory: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> Structure:
    """The structure of the model that `config.json` describes; no weights are read.

    Blocks of equal make (class, parameter names and shapes) are watched once. Raises ModelError if the architecture
    cannot be built or run on the meta device, or asks for tables of more than MAXIMUM_BUFFERS or more channels than
    MAXIMUM_CHANNELS.
    """
    try:
        return _discover(directory, dtype, trust_remote_code)
    except (QuantcliError, MemoryError):
        raise
    except Exception as error:  # whatever a value of the configuration makes of it, the file is at fault
        raise ModelError(f"{directory / 'config.json'} describes no decoder: {type(error).__name__}: {error}.",
                         "Check that file, or download it again.") from error  # fmt: skip


@torch.inference_mode(False)  # inside it products are not taken apart, and nothing could be followed
def _discover(directory: Path, dtype: str, trust_remote_code: bool) -> Structure:
    config = load_config(directory, trust_remote_code=trust_remote_code)
    if config.get_text_config(decoder=True) is not config and not hasattr(config, "vocab_size"):
        what = f"model_type {config.model_type!r} is of text and images, and its text model is one part"
        raise ModelError(f"{directory / 'config.json'}: {what}.", TEXT_ALONE)
    compute = resolve_dtype(config, dtype)
    # eager attention keeps values visible as an operand on every device; the structure does not depend on the kernel
    config._attn_implementation = "eager"
    with torch.device("meta"):
        # in bfloat16 whatever the model's dtype: grouped products of experts exist for it alone on this device
        model = build_model(config, torch.bfloat16, trust_remote_code)
    model.eval().requires_grad_(False)
    if sum(buffer.nbytes for buffer in model.buffers()) > MAXIMUM_BUFFERS:
        raise ModelError(f"{directory / 'config.json'} asks for tables of more than {MAXIMUM_BUFFERS >> 30} GB.",
                         "Check its number of positions.")  # fmt: skip
    paths = find_blocks(model, config)
    first_of_kind: dict[str, str] = {}
    for path in paths:
        first_of_kind.setdefault(_make(model.get_submodule(path)), path)
    _require_channels(directory / "config.json", config, _channels(model, paths, first_of_kind.values()))
    experts = {path: find_experts(model, path) for path in first_of_kind.values()}
    for router in [router for found in experts.values() for router in found.routers.values()]:
        if router.in_features * router.out_features > MAXIMUM_CHANNELS:
            how = f"{router.out_features} experts by {router.in_features} channels, more than any model has"
            raise ModelError(f"{directory / 'config.json'}: {router.name} chooses among {how}.",
                             "Check both, and that config.json belongs to these weights.")  # fmt: skip
    watch = _watch_forward(model, paths, experts)
    watched = _with_held(
        model, paths, {path: watch.block(path) for path in first_of_kind.values()}, watch.tuple_length or 0
    )
    blocks = []
    for path in paths:
        kind = first_of_kind[_make(model.get_submodule(path))]
        blocks.append(_renamed(watched[kind], kind, path))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and (head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False)))
    head_path = _path_of(model, head) if head is not None else None
    skipped = f"{head_path}.weight" if tied else None
    embeddings, final_norm, outer_obstacle = watch.outside(head_path)
    return Structure(
        architecture=type(model).__name__,
        dtype=str(compute).removeprefix("torch."),
        blocks=tuple(blocks),
        parameters={n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n != skipped},
        head=head_path,
        tied=tied,
        vocabulary=int(config.vocab_size),
        width=int(embedding.embedding_dim),
        tuple_length=watch.tuple_length or 0,
        embeddings=embeddings,
        final_norm=final_norm,
        outer_obstacle=outer_obstacle,
        head_dim=_head_size(config),
        latents=any(map(caches_latents, model.modules())),
    )


def _channels(model: nn.Module, paths: list[str], watched: Collection[str]) -> dict[str, int]:
    """How much each norm and linear puts out, by its path, but of blocks that are not `watched`."""
    found: dict[str, int] = {}
    parts, unwatched = paths[0].count(".") + 1, {*paths}.difference(watched)
    for name, module in model.named_modules():
        if ".".join(name.split(".")[:parts]) in unwatched:
            continue
        weight = module._parameters.get("weight")
        if is_linear(module):
            found[name] = describe_linear(name, module).out_features
        elif weight is not None and weight.ndim == 1:
            found[name] = len(weight)
    return found


def _require_channels(path: Path, config: Any, channels: Mapping[str, int]) -> None:
    """Raise ModelError for more than can be followed, with the entry of the configuration that makes most of them."""
    total = sum(channels.values())
    if total <= MAXIMUM_CHANNELS:
        return
    name = max(channels, key=channels.__getitem__)
    # what a size is multiplied by, such as a number of heads, is less than it
    sizes = {key: value for key, value in config.to_dict().items() if type(value) is int and value > 0}
    key = max((key for key in sizes if channels[name] % sizes[key] == 0), key=sizes.__getitem__, default="")
    cause = f"{key} {sizes[key]}" if key else "its sizes"
    raise ModelError(f"{path}: {cause} asks for {channels[name]} channels of {name}, and for {total} in all, which are "
                     f"more than any model has ({MAXIMUM_CHANNELS}).",
                     f"Check {key or 'them'}, and that config.json belongs to these weights.")  # fmt: skip


def _head_size(config: Any) -> int | None:
    """`head_dim` of a configuration, or hidden size / heads; None where blocks differ in it."""
    sizes = {_size_of_heads(layer) for layer in layers_of(config)}
    return sizes.pop() if len(sizes) == 1 else None


def _size_of_heads(config: Any) -> int | None:
    size, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    return int(config.hidden_size) // heads if size is None and heads else size


def _make(block: nn.Module) -> str:
    parts = [f"{name}:{tuple(p.shape)}" for name, p in block.named_parameters()]
    return " ".join([type(block).__name__, *parts])


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _watch_forward(model: nn.Module, paths: list[str], wanted: dict[str, FoundExperts]) -> Watch:
    """Run the model once; blocks that are not wanted pass their input through."""
    watch = Watch(model, paths, wanted)
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    try:
        passing = _passed_through(model, paths, wanted, lambda: watch.tuple_length or 0)
        with passing, torch.no_grad(), ListIndexing(watch.paths), watch.paths:
            model(input_ids=tokens, use_cache=False)
    except QuantcliError:
        raise
    except Exception as error:  # whatever a model's code raises, it cannot be followed
        raise ModelError(f"{type(model).__name__} cannot be followed without its weights: {error}.",
                         "Its architecture is not supported yet.") from error  # fmt: skip
    finally:
        watch.stop()
    return watch


def _with_held(model: nn.Module, paths: list[str], watched: dict[str, Block], tuple_length: int) -> dict[str, Block]:
    """The blocks with what a pass through them holds, with attention computed as transformers does by default."""
    with suppress(Exception):  # whatever a model raises that has no other than its own
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    stops = {
        path: [*(name for shared in block.inputs for name in shared.linears), *(layer.name for layer in block.experts)]
        for path, block in watched.items()
    }

    def run(tokens: int) -> None:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)

    with _passed_through(model, paths, watched, lambda: tuple_length), torch.no_grad():
        held = held_while_waiting(model, stops, run)
    return {path: replace(block, held=held[path]) for path, block in watched.items()}


@contextmanager
def _passed_through(
    model: nn.Module, paths: list[str], wanted: Collection[str], tuple_length: Callable[[], int]
) -> Iterator[None]:
    """Blocks outside `wanted` return their input, in the form in which the first block returns its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = first_argument(args, kwargs)
        return as_returned(hidden, tuple_length())

    others = [model.get_submodule(path) for path in paths if path not in wanted]
    try:
        for block in others:
            block.__dict__["forward"] = forward
        yield
    finally:
        for block in others:
            block.__dict__.pop("forward", None)


def _renamed(block: Block, old: str, new: str) -> Block:
    """The same block under another path."""

    def name(path: str) -> str:
        return new + path.removeprefix(old)

    def renamed(shared: SharedInput) -> SharedInput:
        producer = shared.producer and replace(shared.producer, name=name(shared.producer.name))
        return SharedInput(tuple(map(name, shared.linears)), shared.width, producer)

    return Block(
        new,
        tuple(replace(linear, name=name(linear.name)) for linear in block.linears),
        tuple(map(renamed, block.inputs)),
        tuple(tuple(map(name, group)) for group in block.fused),
        tuple(
            replace(
                experts,
                name=name(experts.name),
                parameters=tuple(map(name, experts.parameters)),
                linears=tuple(tuple(map(name, expert)) for expert in experts.linears),
            )
            for experts in block.experts
        ),
        tuple(map(name, block.routers)),
        block.residual
        and Residual(
            tuple(replace(norm, name=name(norm.name)) for norm in block.residual.norms),
            tuple(map(name, block.residual.writers)),
            block.residual.obstacle,
            tuple(map(name, block.residual.experts)),
        ),
        tuple(map(renamed, block.mixed)),
        block.held,
    )
