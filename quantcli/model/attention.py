"""What enters the products of attention: queries, keys and values, seen and replaced in any model that transformers'
attention interface serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from quantcli.errors import ModelError

AttentionHook = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(path, query [batch, heads, tokens, size], key, value [batch, kv_heads, tokens, size]) to what takes their place."""


@dataclass(frozen=True, eq=False)
class _Watch:
    paths: dict[nn.Module, str]
    hook: AttentionHook
    seen: set[str] = field(default_factory=set)


_watches: list[_Watch] = []  # innermost last
_own_get_interface: list[Any] = []  # transformers' own function, while another stands in its place


@contextmanager
def attention_replaced(root: nn.Module, hook: AttentionHook) -> Iterator[set[str]]:
    """While the body runs, attention modules below `root` compute with what `hook` returns.

    The hook gets the module's path from `root`, and query, key and value after rotary embedding and norms of queries
    and keys, before KV heads are repeated: what a cache would hold, except in multi-head latent attention
    (`caches_latents`). The implementation (sdpa, eager) and its masks stay the model's. Yields the paths of modules
    seen so far: a model that computes attention without the interface, such as Falcon, leaves it empty, which is the
    caller's to judge.

    Bodies may be nested; the innermost hook comes first. What is replaced in transformers is the class's lookup, which
    modules make at every call, so that eager functions, which each family passes as its own default, are met too.
    """
    watch = _Watch({module: path for path, module in root.named_modules()}, hook)
    _enter(watch)
    try:
        yield watch.seen
    finally:
        _leave(watch)


@contextmanager
def attention_observed(
    root: nn.Module,
    receive: Callable[[str, Tensor, Tensor, Tensor], None],
    observe: Literal["cache", "projection"] = "cache",
) -> Iterator[set[str]]:
    """While the body runs, `receive(path, query, key, value)` is called for each attention module below `root`.

    `cache` gives what `attention_replaced` gives; `projection` gives keys and values as k_proj and v_proj put them out,
    before norm and rotary embedding, in the same shapes. Yields the paths seen, as `attention_replaced` does.

    Raises:
        ModelError: `projection`, and an attention module has no child of its own for keys or for values.
    """
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        outputs[module] = output

    def hook(path: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if observe == "cache":
            receive(path, query, key, value)
        else:
            attention = root.get_submodule(path)
            projected = [
                _as_heads(outputs.pop(_projection(attention, path, name), None), like, f"{path}: {name}")
                for name, like in (("k_proj", key), ("v_proj", value))
            ]
            receive(path, query, *projected)
        return query, key, value

    with ExitStack() as hooks:
        if observe == "projection":
            for path, module in root.named_modules():
                if path.endswith(("k_proj", "v_proj")):
                    hooks.callback(module.register_forward_hook(keep).remove)
        yield hooks.enter_context(attention_replaced(root, hook))


def caches_latents(attention: nn.Module) -> bool:
    """Whether the module's cache holds compressed latents (DeepSeek's multi-head latent attention), from which keys and
    values are expanded at every step: then keys and values as seen here are not what is stored."""
    return bool(getattr(attention, "kv_lora_rank", None))


def _enter(watch: _Watch) -> None:
    from transformers.modeling_utils import AttentionInterface

    if not _watches:
        original = AttentionInterface.get_interface

        def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return _watched(original(self, attn_implementation, default))

        _own_get_interface.append(original)
        AttentionInterface.get_interface = get_interface
    _watches.append(watch)


def _leave(watch: _Watch) -> None:
    from transformers.modeling_utils import AttentionInterface

    _watches.remove(watch)
    if not _watches:
        AttentionInterface.get_interface = _own_get_interface.pop()


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        for watch in reversed(_watches):
            path = watch.paths.get(module)
            if path is not None:
                watch.seen.add(path)
                query, key, value = watch.hook(path, query, key, value)
        return function(module, query, key, value, *args, **kwargs)

    return call


def _projection(attention: nn.Module, path: str, ending: str) -> nn.Module:
    found = [child for name, child in attention.named_children() if name.endswith(ending)]
    if len(found) != 1:
        raise ModelError(f"{path} ({type(attention).__name__}) has {len(found)} children named {ending}.",
                         "Observe what enters the cache instead.")  # fmt: skip
    return found[0]


def _as_heads(output: Tensor | None, like: Tensor, name: str) -> Tensor:
    """[batch, tokens, heads * size] as [batch, heads, tokens, size], the shape of `like`."""
    batch, heads, tokens, size = like.shape
    if output is None or output.numel() != like.numel():
        raise ModelError(f"{name} does not put out what attention reads.", "Observe what enters the cache instead.")
    return output.view(batch, tokens, heads, size).transpose(1, 2)
