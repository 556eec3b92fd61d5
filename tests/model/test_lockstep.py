"""A block over all batches at once, stopped at each input: what it sees and gives is what a plain pass does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from greenlet import greenlet
from tiny_models import FAMILIES, token_batches
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from quantcli.errors import ModelError
from quantcli.model.lockstep import Lockstep, stopping
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Block, Experts, SharedInput
from quantcli.model.structure_cache import find_structure

BATCHES = token_batches((2, 12), (1, 17), (2, 12))
Seen = list[list[Tensor]]
"""By input, then by batch."""


def stream_of(directory: Path, batches: Sequence[Tensor] = BATCHES) -> tuple[BlockStream, list[Tensor]]:
    """A started stream, and what enters its first block."""
    skeleton = Skeleton(directory, find_structure(directory))
    stream = BlockStream(skeleton, batches)
    return stream, [hidden.clone() for hidden in stream.start()]


@contextmanager
def hooked(names: Sequence[str], module_of: Callable[[str], nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """While the body runs, the inputs of these linears are collected."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[name].append((args[0] if args else kwargs["input"]).clone())

        return keep

    handles = [module_of(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def linears_of(block: Block) -> list[str]:
    return [name for shared in block.inputs for name in shared.linears]


def walked(
    stream: BlockStream, index: int, block: Block, enters: list[Tensor], again: bool
) -> tuple[Seen, list[Tensor]]:
    with stream.block(index) as module, stopping(module, block.name, linears_of(block)):
        walk = Lockstep(stream, index, block.inputs, enters.__getitem__, {}, again=again)
        seen = [[value.clone() for value in walk.advance(position)] for position in range(len(block.inputs))]
        leaving = [value.clone() for value in walk.finish()]
    return seen, leaving


@pytest.mark.parametrize("family", FAMILIES)
def test_it_sees_what_hooks_see_in_the_whole_model(family: str, tiny_model: Callable[..., Path]) -> None:
    directory = tiny_model(family)
    stream, hidden = stream_of(directory)
    blocks = stream.skeleton.structure.blocks
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    names = [name for block in blocks for name in linears_of(block)]
    with hooked(names, model.get_submodule) as expected, torch.inference_mode():
        logits = [model(batch, use_cache=False).logits for batch in BATCHES]
    for index, block in enumerate(blocks):
        assert len(block.inputs) > 1
        with stream.block(index):
            plain = [stream.run(index, batch, value) for batch, value in enumerate(hidden)]
        for again in (False, True):
            seen, leaving = walked(stream, index, block, hidden, again)
            for one, other in zip(leaving, plain, strict=True):
                assert torch.equal(one, other)
            for shared, values in zip(block.inputs, seen, strict=True):
                for name in shared.linears:
                    for value, wanted in zip(values, expected[name], strict=True):
                        assert torch.equal(value.reshape(wanted.shape), wanted), name
        hidden = plain
    with stream.head():
        for value, wanted in zip(hidden, logits, strict=True):
            assert torch.equal(torch.cat([piece for _, piece in stream.logits(value)], 1), wanted)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("family", "inputs"), [("mixtral", (2, 2)), ("qwen2-moe", (4, 4)), ("deepseek-v3", (4, 6))])
def test_it_stops_before_experts_where_they_stand(
    family: str, inputs: tuple[int, int], again: bool, tiny_model: Callable[..., Path]
) -> None:
    """DeepSeek's stand before its shared experts, those of Qwen2 behind them. What they read is what hooks see."""
    stream, hidden = stream_of(tiny_model(family))
    index, block = len(stream.skeleton.blocks) - 1, stream.skeleton.structure.blocks[-1]
    (layer,) = block.experts
    assert (layer.inputs_before, len(block.inputs)) == inputs
    stops: list[SharedInput | Experts] = [*block.inputs]
    stops.insert(layer.inputs_before, layer)
    expected: list[Sequence[Tensor]] = []
    with stream.block(index) as module:
        holder = module.get_submodule(layer.name.removeprefix(f"{block.name}."))
        handle = holder.register_forward_pre_hook(lambda _, args: expected.append([arg.clone() for arg in args[:2]]))
        with hooked(linears_of(block), lambda name: module.get_submodule(name.removeprefix(f"{block.name}."))) as read:
            plain = [stream.run(index, batch, value) for batch, value in enumerate(hidden)]
        handle.remove()
        with stopping(module, block.name, linears_of(block), [layer]):
            walk = Lockstep(stream, index, stops, hidden.__getitem__, {}, again=again)
            for position, stop in enumerate(stops):
                if isinstance(stop, Experts):
                    for value, wanted in zip(walk.advance_to_experts(position), expected, strict=True):
                        assert all(torch.equal(one, other) for one, other in zip(value, wanted, strict=True))
                else:
                    for value, wanted in zip(walk.advance(position), read[stop.name], strict=True):
                        assert torch.equal(value.reshape(wanted.shape), wanted), stop.name
            for leaving, wanted in zip(walk.finish(), plain, strict=True):
                torch.testing.assert_close(leaving, wanted)


def changed_weight(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The linear with rounded weights, whichever way they are stored."""
    weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight  # type: ignore[operator, union-attr]
    rounded = (weight * 8).round() / 8  # type: ignore[operator, union-attr]
    return lambda input: linear(input, rounded, module.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox", "cohere", "falcon", "phi3", "opt", "gpt2"])
def test_each_input_sees_the_linears_before_it_replaced(
    family: str, again: bool, tiny_model: Callable[..., Path]
) -> None:
    stream, hidden = stream_of(tiny_model(family))
    block = stream.skeleton.structure.blocks[0]
    names = linears_of(block)
    with stream.block(0) as module:

        def module_of(name: str) -> nn.Module:
            return module.get_submodule(name.removeprefix(f"{block.name}."))

        replaced = {name: changed_weight(module_of(name)) for name in names}
        given: dict[str, Callable[[Tensor], Tensor]] = {}
        with stopping(module, block.name, names):
            walk = Lockstep(stream, 0, block.inputs, hidden.__getitem__, given, again=again)
            seen: Seen = []
            for position, shared in enumerate(block.inputs):
                seen.append([value.clone() for value in walk.advance(position)])
                given |= {name: replaced[name] for name in shared.linears}
            leaving = [value.clone() for value in walk.finish()]

        moved = 0
        for position in range(len(block.inputs) + 1):
            before = [name for shared in block.inputs[:position] for name in shared.linears]
            for name in before:
                module_of(name).__dict__["forward"] = replaced[name]
            with hooked(names, module_of) as expected, torch.inference_mode():
                outputs = [stream.run(0, batch, value) for batch, value in enumerate(hidden)]
            for name in before:
                del module_of(name).__dict__["forward"]
            if position == 0:
                plain = expected
            if position < len(block.inputs):
                name = block.inputs[position].name
                for value, wanted in zip(seen[position], expected[name], strict=True):
                    assert torch.equal(value.reshape(wanted.shape), wanted), name
                moved += not torch.equal(expected[name][0], plain[name][0])
            else:
                assert all(torch.equal(one, other) for one, other in zip(leaving, outputs, strict=True))
    assert moved, "some inputs come from linears before them"


def test_two_passes_go_side_by_side(tiny_model: Callable[..., Path]) -> None:
    """One with replaced linears, one without, which has fewer batches and other hidden states."""
    directory = tiny_model("llama")
    stream, hidden = stream_of(directory)
    beside = BlockStream(stream.skeleton, BATCHES[:2])
    others = [value + 1 for value in beside.start()]
    block = stream.skeleton.structure.blocks[0]
    alone = walked(stream, 0, block, hidden, again=False)
    apart = walked(beside, 0, block, others, again=False)
    with stream.block(0) as module, stopping(module, block.name, linears_of(block)):
        first = Lockstep(stream, 0, block.inputs, hidden.__getitem__, {})
        second = Lockstep(beside, 0, block.inputs, others.__getitem__, {})
        for position in range(len(block.inputs)):
            values = second.advance(position)
            for batch, value in enumerate(first.advance(position)):
                assert torch.equal(value, alone[0][position][batch])
                other = next(values, None)
                assert (other is None) == (batch == 2)
                assert other is None or torch.equal(other, apart[0][position][batch])
        for found, wanted in ((first, alone[1]), (second, apart[1])):
            assert all(torch.equal(one, other) for one, other in zip(found.finish(), wanted, strict=True))


@pytest.mark.parametrize("again", [False, True])
def test_what_writers_put_out_is_summed_while_a_batch_stands(again: bool, tiny_model: Callable[..., Path]) -> None:
    """And let go of with the batch, so that those that do not wait hold nothing."""
    stream, hidden = stream_of(tiny_model("llama"))
    block = stream.skeleton.structure.blocks[0]
    o_proj, down_proj = (f"{block.name}.{name}" for name in ("self_attn.o_proj", "mlp.down_proj"))
    last = len(block.inputs) - 1
    with stream.block(0) as module:
        plain = [stream.run(0, batch, value.clone()) for batch, value in enumerate(hidden)]
        with stopping(module, block.name, linears_of(block)):
            walk = Lockstep(stream, 0, block.inputs, hidden.__getitem__, {}, again=again, writers=(o_proj, down_proj))
            for batch, _ in enumerate(walk.advance(0)):
                assert batch not in walk.written
            for batch, _ in enumerate(walk.advance(last)):
                assert sorted(walk.written) == ([batch] if again else list(range(batch + 1)))
            for batch, leaving in enumerate(walk.finish()):
                assert torch.equal(leaving, plain[batch])
                torch.testing.assert_close(hidden[batch] + walk.written[batch], plain[batch])
            assert not walk.written


def waiting() -> int:
    """Passes that are stopped somewhere: of a thread itself there is a greenlet, too, once it has had another."""
    gc.collect()
    return sum(type(each) is greenlet and bool(each) and hasattr(each, "lockstep") for each in gc.get_objects())


@pytest.mark.parametrize("how", ["close", "error", "abandon"])
@pytest.mark.parametrize("again", [False, True])
def test_ending_early_leaves_nothing_behind(how: str, again: bool, tiny_model: Callable[..., Path]) -> None:
    stream, hidden = stream_of(tiny_model("llama"))
    block = stream.skeleton.structure.blocks[0]
    greenlets = waiting()

    def part_of_the_way() -> None:
        with stream.block(0) as module, stopping(module, block.name, linears_of(block)):
            walk = Lockstep(stream, 0, block.inputs, hidden.__getitem__, {}, again=again)
            list(walk.advance(0))
            values = walk.advance(1)
            next(values)
            assert waiting() > greenlets
            if how == "error":
                raise RuntimeError("something else")
            if how == "close":
                walk.close()
                assert waiting() == greenlets

    if how == "error":
        with pytest.raises(RuntimeError, match="something else"):
            part_of_the_way()
    else:
        part_of_the_way()
    assert waiting() == greenlets
    assert not torch.is_inference_mode_enabled()
    assert all(parameter.is_meta for parameter in stream.skeleton.model.parameters())
    assert not [name for name, each in stream.skeleton.model.named_modules() if "forward" in each.__dict__]
    seen, leaving = walked(stream, 0, block, hidden, again)
    with stream.block(0):
        assert torch.equal(leaving[0], stream.run(0, 0, hidden[0]))
    assert len(seen) == len(block.inputs)


def test_inputs_in_another_order_than_watched_are_refused(tiny_model: Callable[..., Path]) -> None:
    stream, hidden = stream_of(tiny_model("llama"))
    block = stream.skeleton.structure.blocks[0]
    with stream.block(0) as module, stopping(module, block.name, linears_of(block)):
        walk = Lockstep(stream, 0, tuple(reversed(block.inputs)), hidden.__getitem__, {})
        next(walk.advance(0))
        with pytest.raises(ModelError, match=r"model\.layers\.0 does not read its inputs in the order"):
            next(walk.advance(1))
    assert not torch.is_inference_mode_enabled()
