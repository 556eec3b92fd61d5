"""Text generated token by token by a model that computes as it is served."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, QuantcliError, RoomError, first_line, refusal_of_the_system
from quantcli.model.checkpoint import read_json
from quantcli.pipeline.served import block_as_served, head_as_served

if TYPE_CHECKING:
    from torch import nn

    from quantcli.pipeline.sequences import Model

GENERATED_TOKENS = 4096
"""Tokens of prompts that generate together: their keys and values are held beside the model."""


class NoTextError(ModelError):
    """transformers does not generate text by a model, though it runs it."""


@contextmanager
def serving(
    model: Model, what: str, tokens: int, emit: Callable[..., None], room: int | None = None
) -> Iterator[nn.Module]:
    """The model, its linears and attention computing as an engine's, for the duration of the body.

    All weights are in memory where they and a cache of `tokens` tokens, as many as are generated from together, take no
    more than `room` bytes, by default the memory that is free. Else those of one block at a time are, which are read
    again for every token; `emit` is told of it. Activations of scope `mix` have dynamic scales in a prompt and static
    ones behind it.

    Raises RoomError, naming `what` needs it, if the cache alone takes more than the memory that is free.
    """
    from quantcli.model.heap import keep_freed_memory

    skeleton = model.skeleton
    weights = sum(value.numel() for value in skeleton.model.parameters()) * skeleton.dtype.itemsize
    cache = tokens * cached_values(skeleton.config) * skeleton.dtype.itemsize
    free = free_memory(str(skeleton.device))
    if free is not None and cache > free:
        raise RoomError(
            f"{what} generates text, for which the keys and values of {tokens} tokens ({cache / 1e9:.3g} GB) have to "
            f"be in memory, and {free / 1e9:.3g} GB are free.",
            "Leave it out; perplexity, boolq and tasks that only score given text need none.",
        )
    limits = [limit for limit in (room, free) if limit is not None]
    whole = weights + cache <= min(limits, default=weights + cache)
    if not whole:
        emit("note", text=f"{what} runs the {model.name} model one block at a time: all its weights, "
             f"{weights / 2**30:.3g} GiB, are read for every token that is generated.")  # fmt: skip
    keep_freed_memory()
    with ExitStack() as stack:
        left_out = stack.enter_context(head_as_served(skeleton, model.exported, None))
        stack.enter_context(skeleton.resident(name for name in skeleton.outer_names() if name not in left_out))
        for index, path in enumerate(skeleton.blocks):
            resident = partial(block_as_served, skeleton, index, model.exported, None)
            stack.enter_context(resident() if whole else _resident_while_it_runs(skeleton.module(path), resident))
        yield skeleton.model


@contextmanager
def _resident_while_it_runs(block: nn.Module, resident: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    compute = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with resident():
            return compute(*args, **kwargs)

    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        block.__dict__.pop("forward", None)


def cached_values(config: Any) -> int:
    """Keys and values that a model caches of a token, by the most that its attention may keep."""
    from quantcli.model.skeleton import layers_of

    return 2 * int(config.num_hidden_layers) * max(map(_kept_keys, layers_of(config)))


def _kept_keys(config: Any) -> int:
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    kept = int(getattr(config, "num_key_value_heads", None) or heads)
    return kept * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def cached_tokens(lengths: Collection[int], new_tokens: int) -> int:
    """The most tokens whose keys and values `generate` holds at a time for prompts of these lengths."""
    return max((min(len(lengths), _together(n)) * (n + new_tokens) for n in lengths), default=0)


def _together(length: int) -> int:
    return max(1, GENERATED_TOKENS // max(1, length))


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Sequence[int], pad: int | None = None
) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens) of greedy generation behind each prompt's tokens, in batches of like length, padded on the left.

    Text ends with one of `ends` or after `new_tokens` tokens. Nothing of a generation_config.json is heeded: penalties
    and sampling would hide what weights do. Raises NoTextError where transformers fails at it.
    """
    import torch
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    filler = next(iter(ends), 0) if pad is None else pad
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=list(ends) or None, pad_token_id=filler
    )
    model.generation_config = settings
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    while order:
        longest = len(prompts[order[-1]])
        members = [order.pop() for _ in range(min(len(order), _together(longest)))]
        ids = torch.full((len(members), longest), filler)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(members):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        given = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "generation_config": settings}
        with torch.inference_mode():
            out = _by_transformers(model, given)
        for index, written in zip(members, out[:, longest:].tolist(), strict=True):
            last = next((place for place, token in enumerate(written) if token in ends), len(written))
            yield index, written[: last + 1]


def text_ends(directory: Path, config: Any) -> list[int]:
    """Tokens that end a text, as the generation_config.json of a model, or its config, names them."""
    file = directory / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    if named is None:
        named = getattr(config, "eos_token_id", None)
    return [named] if isinstance(named, int) else list(named or ())


def _by_transformers(model: nn.Module, given: dict[str, Any]) -> Any:
    """What `model.generate` returns, whose caches are not made for every model that has a forward pass."""
    try:
        return model.generate(**given)  # type: ignore[operator]
    except (QuantcliError, MemoryError):
        raise
    except Exception as error:
        if refusal_of_the_system(error) is not None:
            raise
        raise NoTextError(f"transformers generates no text by {type(model).__name__}: {first_line(error)}.",
                          "Leave out evaluate.generate and tasks that generate their answers.") from error  # fmt: skip


def free_memory(device: str) -> int | None:
    """Bytes that a process may still take: of the device, or of the machine and its control group. None where neither
    tells."""
    import torch

    if not device.startswith("cpu"):
        module = getattr(torch, device.partition(":")[0])
        return int(module.mem_get_info(torch.device(device))[0])
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        if match := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            found.append(int(match[1]) << 10)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # pages of files that were read or written count as used there, and make room when it is asked for
            cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            used = int((group / "memory.current").read_text()) - int(cached[1] if cached else 0)
            found.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(found) if found else None
