"""A whole model in memory, computing as it is served, for what has to be generated token by token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import RoomError

if TYPE_CHECKING:
    from torch import nn

    from quantcli.pipeline.sequences import Model

GENERATED_TOKENS = 4096
"""Tokens of prompts that generate together: their keys and values are held beside the model."""


@contextmanager
def whole_model(model: Model, what: str) -> Iterator[nn.Module]:
    """The model with all its weights, its linears and attention computing as an engine's, for the duration of the body.

    Raises RoomError, naming `what` needs it, if the weights take more than the memory that is free.
    """
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.stages.eval_ppl import block_as_served, head_as_served

    skeleton = model.skeleton
    needed = sum(value.numel() for value in skeleton.model.parameters()) * skeleton.dtype.itemsize
    free = free_memory(str(skeleton.device))
    if free is not None and needed > free:
        raise RoomError(
            f"{what} generates text, for which the whole model has to be in memory: {needed / 1e9:.3g} GB, and "
            f"{free / 1e9:.3g} GB are free.",
            "Leave it out; perplexity, boolq and tasks that only score given text need one block at a time.",
        )
    stream = BlockStream(skeleton, [])
    with ExitStack() as stack:
        stack.enter_context(skeleton.resident(skeleton.outer_names()))
        for index in range(len(skeleton.blocks)):
            stack.enter_context(block_as_served(stream, index, model.exported, model.phase))
        if model.exported is not None:
            stack.enter_context(head_as_served(stream, model.exported, model.phase))
        yield skeleton.model


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> Iterator[tuple[int, str]]:
    """(index, text) of greedy generation from each prompt's tokens, in batches of like length, padded on the left.

    Ends at the EOS token or after `new_tokens` tokens.
    """
    import torch

    device = next(model.parameters()).device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    while order:
        longest = len(prompts[order[-1]])
        members = [order.pop() for _ in range(min(len(order), max(1, GENERATED_TOKENS // longest)))]
        ids = torch.full((len(members), longest), pad or 0)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(members):
            ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                pad_token_id=pad or 0,
                eos_token_id=tokenizer.eos_token_id,
            )
        for row, index in enumerate(members):
            yield index, tokenizer.decode(out[row, longest:], skip_special_tokens=True)


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
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found) if found else None
