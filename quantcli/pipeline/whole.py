"""A whole model in memory, computing as it is served, for what has to be generated token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import RoomError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.evaluation.simulate import Replacement
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.skeleton import Skeleton
    from quantcli.pipeline.sequences import Model

GENERATED_TOKENS = 4096
"""Tokens of prompts that generate together: their keys and values are held beside the model."""


@contextmanager
def whole_model(model: Model, what: str, tokens: int) -> Iterator[nn.Module]:
    """The model with all its weights, its linears and attention computing as an engine's, for the duration of the body.

    Activations of scope `mix` have dynamic scales in a prompt and static ones behind it, as served.

    Raises RoomError, naming `what` needs it, if the weights and a cache of `tokens` tokens, as many as are generated
    from together, take more than the memory that is free.
    """
    skeleton = model.skeleton
    weights = sum(value.numel() for value in skeleton.model.parameters()) * skeleton.dtype.itemsize
    cache = tokens * cached_values(skeleton.config) * skeleton.dtype.itemsize
    free = free_memory(str(skeleton.device))
    if free is not None and weights + cache > free:
        raise RoomError(
            f"{what} generates text, for which the whole model ({weights / 1e9:.3g} GB) and the keys and values of "
            f"{tokens} tokens ({cache / 1e9:.3g} GB) have to be in memory, and {free / 1e9:.3g} GB are free.",
            "Leave it out; perplexity, boolq and tasks that only score given text need one block at a time.",
        )
    with ExitStack() as stack:
        left_out: set[str] = set()
        if model.exported is not None:
            left_out = stack.enter_context(_as_served(skeleton, model.exported))
        stack.enter_context(skeleton.resident([n for n in skeleton.model.state_dict() if n not in left_out]))
        yield skeleton.model


@contextmanager
def _as_served(skeleton: Skeleton, exported: QuantizedCheckpoint) -> Iterator[set[str]]:
    """While the body runs, linears and attention of the whole model compute as an engine does. Yields the parameters
    that nothing reads then."""
    from quantcli.evaluation.simulate import not_read, simulated
    from quantcli.pipeline.attention import attention_as_stored

    left_out: set[str] = set()
    with ExitStack() as stack:
        for block in skeleton.structure.blocks:
            path, module = block.name, skeleton.module(block.name)
            linears = _integer_linears(skeleton, exported, f"{path}.")
            left_out |= {f"{path}.{name}" for name in not_read(linears, block.local_experts)}
            stack.enter_context(simulated(module, linears, block.local_experts))
            modules = [name for name in exported.attention_modules if name.startswith(f"{path}.")]
            attention = {name: exported.read_attention(name) for name in modules}
            stack.enter_context(attention_as_stored(module, path, exported.attention, attention))
        if (head := skeleton.structure.head) is not None and head in exported.schemes:
            found = _integer_linears(skeleton, exported, head)
            left_out |= {f"{head}.weight" for _ in found}
            stack.enter_context(simulated(skeleton.model, {head: found[""]} if found else {}))
        yield left_out


def _integer_linears(skeleton: Skeleton, exported: QuantizedCheckpoint, prefix: str) -> dict[str, Replacement]:
    """What takes the place of linears with quantized inputs whose names begin so, by the rest of their names."""
    from quantcli.evaluation.simulate import forward_of
    from quantcli.pipeline.treatment import replacement

    found: dict[str, Replacement] = {}
    for name, scheme in exported.schemes.items():
        if scheme.activations == "none" or not name.startswith(prefix):
            continue
        stored = exported.read_linear(name).to(skeleton.device)
        prompt, decoded = (
            replacement(stored, scheme, skeleton.dtype, skeleton.device, phase) for phase in ("prefill", "decode")
        )

        def either(module: nn.Module, x: Tensor, _prompt: Any = prompt, _decoded: Any = decoded) -> Tensor:
            return forward_of(module, _decoded if x.shape[-2] == 1 else _prompt)(x)

        found[name.removeprefix(prefix)] = either if scheme.activations == "mix" else prompt
    return found


def cached_values(config: Any) -> int:
    """Keys and values that a model caches of a token, by the most that its attention may keep."""
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    kept = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * int(config.num_hidden_layers) * kept * width


def cached_tokens(lengths: Iterable[int], new_tokens: int) -> int:
    """The most tokens whose keys and values `generate` holds at a time for prompts of these lengths."""
    return max((max(1, GENERATED_TOKENS // max(1, n)) * (n + new_tokens) for n in lengths), default=0)


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
            # pages of files that were read or written count as used there, and make room when it is asked for
            cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            used = int((group / "memory.current").read_text()) - int(cached[1] if cached else 0)
            found.append(int(limit) - used)
    except (OSError, ValueError):
        pass
    return min(found) if found else None
