"""Attention that computes with queries, keys and values as an engine's 8-bit cache or 8-bit products hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from quantcli.errors import ModelError
from quantcli.model.attention import attention_replaced, caches_latents
from quantcli.quant.attention import AttentionScales, round_trip


@contextmanager
def simulated_attention(
    block: nn.Module, scales: Mapping[str, AttentionScales], *, cut: bool = False
) -> Iterator[None]:
    """While the body runs, the named attention modules of `block` (paths from it) compute with rounded values.

    Each token's key and value are those that an 8-bit cache gives back, whether they are written with the prompt or
    decoded one by one, because static scales know nothing of other tokens; softmax and sums stay the model's. An fp8
    cache is rounded to the nearest, or `cut` towards zero.

    Raises:
        ModelError: a name is no module of the block; the scales are a cache's and the module caches latents instead of
            keys and values; or the body ended and the module's attention never went through the interface that
            `model.attention` watches, so that nothing was simulated.
    """
    modules = dict(block.named_modules())
    _refuse(sorted(set(scales) - set(modules)), "is no module of the model", "Check that the scales belong to it.")
    latent = [name for name in sorted(scales) if scales[name].kind != "heads" and caches_latents(modules[name])]
    _refuse(latent, "caches latents, not keys and values", "Leave the cache of this model in float.")

    def hook(path: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        known = scales.get(path)
        return (query, key, value) if known is None else round_trip(query, key, value, known, cut=cut)

    with attention_replaced(block, hook) as seen:
        yield
    _refuse(sorted(set(scales) - seen), "computes attention in a way that cannot be simulated",
            "Leave keys, values and queries of this model in float.")  # fmt: skip


def _refuse(names: list[str], what: str, remedy: str) -> None:
    if names:
        raise ModelError(f"{names[0]} {what}.", remedy)
