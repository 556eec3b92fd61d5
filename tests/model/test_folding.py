"""Folds leave the float model the same function; a reference by hand, whole models of many families, faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import token_batches
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.checkpoint import SINGLE_NAME, Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.folding import (
    Added,
    Change,
    Fold,
    TransformedCheckpoint,
    added_tensors,
    exact_scale,
    fold_changes,
)
from quantcli.model.names import parameter_tensors
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Block, Linear, Producer, SharedInput, Structure

TinyModel = Callable[..., Path]
EXACT = 1e-10

# These multiply by norm weights, or route to experts, in float32.
IN_FLOAT32 = 1e-6
# Experts cannot be run in float64.
ROUGH = 1e-5
BOUNDS = {
    "llama": EXACT, "llama-tied": EXACT, "qwen2": EXACT, "qwen3": EXACT, "gemma2": IN_FLOAT32, "gemma3": IN_FLOAT32,
    "phi3": EXACT, "opt": EXACT, "gpt2": EXACT, "falcon": EXACT, "gpt-neox": EXACT, "cohere": IN_FLOAT32,
    "deepseek-v3": ROUGH,
}  # fmt: skip


def two_layers() -> tuple[Structure, dict[str, Tensor]]:
    """LayerNorm → a [6 → 8], whose channels 2 to 5 → (relu) b [8 → 3], each read twice: 2 3 2 3 4 5 4 5; all biased.

    b is stored as [in, out]."""
    linears = (Linear("a", 6, 8, bias=True), Linear("b", 8, 3, bias=True, transposed=True))
    segments = ((2, 2), (2, 2), (4, 2), (4, 2))
    inputs = (
        SharedInput(("a",), 6, Producer("n", "norm", 1.0)),
        SharedInput(("b",), 8, Producer("a", "linear", segments=segments)),
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {"n.weight": (6,), "n.bias": (6,), "a.weight": (8, 6), "a.bias": (8,), "b.weight": (8, 3), "b.bias": (3,)}
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return Structure("Two", "float64", (Block("", linears, inputs, ()),), shapes, None, False, 5, 6), values


def by_hand(x: Tensor, values: Mapping[str, Tensor], relu: bool) -> Tensor:
    """What two_layers computes for one x [6], by loops."""
    normalized = [(x[i] - x.mean()) / x.std(correction=0) for i in range(6)]
    n = [normalized[i] * (1 + values["n.weight"][i]) + values["n.bias"][i] for i in range(6)]
    a = [sum(values["a.weight"][o, i] * n[i] for i in range(6)) + values["a.bias"][o] for o in range(8)]
    read = [a[o] for o in (2, 3, 2, 3, 4, 5, 4, 5)]
    if relu:
        read = [max(value, torch.tensor(0.0)) for value in read]
    return torch.stack(
        [sum(values["b.weight"][i, o] * read[i] for i in range(8)) + values["b.bias"][o] for o in range(3)]
    )


def changed(values: Mapping[str, Tensor], changes: Mapping[str, Change]) -> dict[str, Tensor]:
    kept = {name: value.clone() for name, value in values.items()}
    made = {name: changes[name](value) if name in changes else value for name, value in values.items()}
    for name, value in kept.items():
        assert torch.equal(values[name], value)  # what is given stays as it is
    return made


NORM_SCALE = torch.tensor([0.25, 1.0, 3.0, 7.5, 0.1, 2.0])
LINEAR_SCALE = torch.tensor([0.5, 4.0, 0.5, 4.0, 1.5, 9.0, 1.5, 9.0])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_layers_by_hand(order: tuple[int, int]) -> None:
    structure, values = two_layers()
    first, second = structure.blocks[0].inputs
    assert first.producer is not None
    assert second.producer is not None
    folds = [
        Fold(first.producer, first.linears, NORM_SCALE),
        Fold(second.producer, second.linears, LINEAR_SCALE),
    ]
    made = changed(values, fold_changes(structure, [folds[i] for i in order]))
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(by_hand(x, made, True), by_hand(x, values, True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made["n.bias"], values["n.bias"] / NORM_SCALE.double(), rtol=1e-14, atol=0)
    for row in (0, 1, 6, 7):  # what no segment names gives nothing away
        assert made["a.bias"][row] == values["a.bias"][row]
        torch.testing.assert_close(made["a.weight"][row], values["a.weight"][row] * NORM_SCALE, rtol=1e-14, atol=0)
    expected = values["a.weight"][3] * NORM_SCALE / 4
    torch.testing.assert_close(made["a.weight"][3], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_layers_shifted_by_hand(order: tuple[int, int]) -> None:
    """The bias that takes W z in is itself a bias that a later fold gives away from."""
    structure, values = two_layers()
    first, second = structure.blocks[0].inputs
    assert first.producer is not None
    assert second.producer is not None
    shifts = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0]), torch.tensor([1.0, -2.0, 1.0, -2.0, 0.5, 7.0, 0.5, 7.0])
    folds = [
        Fold(first.producer, first.linears, NORM_SCALE, shifts[0]),
        Fold(second.producer, second.linears, LINEAR_SCALE, shifts[1]),
    ]
    made = changed(values, fold_changes(structure, [folds[i] for i in order], values.__getitem__))
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(by_hand(x, made, False), by_hand(x, values, False), rtol=1e-12, atol=1e-12)
    # through a relu, which is no shift, it is another function
    assert (by_hand(x, made, True) - by_hand(x, values, True)).abs().max() > 0.1


def test_two_folds_of_one_input_compose() -> None:
    structure, values = two_layers()
    shared = structure.blocks[0].inputs[0]
    assert shared.producer is not None
    folds = [
        Fold(shared.producer, ("a",), NORM_SCALE, torch.arange(6.0)),
        Fold(shared.producer, ("a",), NORM_SCALE.flip(0), torch.arange(6.0) - 3),
    ]
    made = changed(values, fold_changes(structure, folds, values.__getitem__))
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(by_hand(x, made, True), by_hand(x, values, True), rtol=1e-12, atol=1e-12)


def test_a_norm_channel_of_scale_one_keeps_every_bit() -> None:
    structure, _ = two_layers()
    scale = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    weight = torch.tensor([1e-9, 0.5, 1e-5, -1e-7, 3.0, -1.0])
    change = fold_changes(structure, [Fold(Producer("n", "norm", 1.0), ("a",), scale)])["n.weight"]
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(change(weight)[kept], weight[kept])
    assert change(weight)[1] == -0.25  # 1.5 / 2 − 1


@pytest.mark.parametrize(
    ("stored", "read"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype_of_changed_tensors(stored: torch.dtype, read: torch.dtype) -> None:
    structure, values = two_layers()
    changes = fold_changes(structure, [Fold(Producer("n", "norm", 1.0), ("a",), NORM_SCALE)])
    assert {change(values[name].to(stored)).dtype for name, change in changes.items()} == {read}


@pytest.mark.parametrize(
    ("fold", "words"),
    [
        (Fold(Producer("n", "norm"), ("a",), torch.ones(5)), r"n puts out has shape \(5,\), and a reads 6"),
        (Fold(Producer("n", "norm"), ("a",), torch.tensor([1.0, 1, 0, 1, 1, 1])), "n puts out is not positive"),
        (Fold(Producer("n", "norm"), ("a",), torch.tensor([1.0, 1, torch.nan, 1, 1, 1])), "not positive and finite"),
        (Fold(Producer("n", "norm"), ("a",), torch.ones(6), torch.full((6,), torch.inf)), "n puts out has a shift"),
        (Fold(Producer("a", "linear", segments=((0, 4), (0, 4))), ("b",), torch.arange(1.0, 9)), "one output of a"),
        (Fold(Producer("a", "linear", segments=((4, 8),)), ("b",), torch.ones(8)), "a puts out 8 channels"),
    ],
)
def test_folds_that_fit_nothing_are_refused(fold: Fold, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        fold_changes(two_layers()[0], [fold])
    assert caught.value.remedy


@pytest.mark.parametrize("module", ["n", "a", "b"])
def test_a_shift_needs_biases(module: str) -> None:
    structure, values = two_layers()
    block = structure.blocks[0]
    linears = tuple(replace(linear, bias=linear.name != module) for linear in block.linears)
    parameters = {name: shape for name, shape in structure.parameters.items() if name != f"{module}.bias"}
    bare = Structure("Two", "float64", (Block("", linears, block.inputs, ()),), parameters, None, False, 5, 6)
    folds = [Fold(i.producer, i.linears, torch.ones(i.width), torch.zeros(i.width)) for i in block.inputs if i.producer]
    with pytest.raises(ModelError, match=f"^{module} has no bias"):
        fold_changes(bare, folds, values.__getitem__)


# Whole models.


def random_scale(producer: Producer, width: int, seed: int) -> Tensor:
    """Scales of 0.1 to 10, equal where channels are one output of the producer."""
    channels = torch.tensor(producer.channels(width))
    outputs = torch.rand(int(channels.max()) + 1, generator=torch.Generator().manual_seed(seed))
    return (4.6 * outputs - 2.3).exp()[channels]


def folds_of(block: Block, seed: int) -> list[Fold]:
    return [
        Fold(shared.producer, shared.linears, random_scale(shared.producer, shared.width, seed + i))
        for i, shared in enumerate(block.inputs)
        if shared.producer is not None
    ]


def folded(directory: Path, structure: Structure, folds: Iterable[Fold]) -> TransformedCheckpoint:
    checkpoint, changes = Checkpoint(directory), fold_changes(structure, folds)
    names = parameter_tensors(directory, structure, checkpoint.entries, changes)
    return TransformedCheckpoint(checkpoint, {names[name]: change for name, change in changes.items()})


def block_error(stream: BlockStream, index: int, hidden: Tensor, folds: Iterable[Fold]) -> float:
    """Relative difference that folds make to a block's output."""
    skeleton = stream.skeleton
    changes = fold_changes(skeleton.structure, folds)
    values = skeleton.read(skeleton.parameter_names(skeleton.blocks[index]))
    plain = stream.run_with(index, 0, hidden, values, skeleton.dtype)
    return relative(stream.run_with(index, 0, hidden, changed(values, changes), skeleton.dtype), plain)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def logits(skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """Of the whole model at once, in its dtype."""
    with torch.inference_mode(), skeleton.resident(skeleton.model.state_dict()):
        return skeleton.model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", BOUNDS)
def test_folded_models_are_the_same_function(family: str, tiny_model: TinyModel) -> None:
    """Every input that has a producer is scaled; those whose scales something else reads are found out."""
    directory = tiny_model(family, dtype=torch.float32 if BOUNDS[family] == ROUGH else torch.float64)
    structure = discover(directory)
    (tokens,) = token_batches((2, 12))
    stream = BlockStream(Skeleton(directory, structure), [tokens])
    (hidden,) = stream.start()
    allowed: list[Fold] = []
    refused: set[str] = set()
    for index, block in enumerate(structure.blocks):
        for fold in folds_of(block, 10 * index):
            error = block_error(stream, index, hidden, [fold])
            assert error < BOUNDS[family] or error > 1e-2  # nothing between
            if error < BOUNDS[family]:
                allowed.append(fold)
            else:
                refused.add(fold.linears[0])
        with stream.block(index):
            hidden = stream.run(index, 0, hidden)
    inputs = [shared for block in structure.blocks for shared in block.inputs]
    assert refused == {shared.name for shared in inputs if shared.producer and shared.producer.obstacle}
    assert bool(refused) == (family == "deepseek-v3")  # its router and experts read what shared experts read
    assert allowed
    expected = logits(Skeleton(directory, structure), tokens)
    ours = logits(Skeleton(directory, structure, checkpoint=folded(directory, structure, allowed)), tokens)
    assert relative(ours, expected) < BOUNDS[family]


def test_a_fold_that_forgets_a_reader_is_found(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama", dtype=torch.float64)
    structure = discover(directory)
    stream = BlockStream(Skeleton(directory, structure), token_batches((1, 9)))
    (hidden,) = stream.start()
    fold, *_ = folds_of(structure.blocks[0], 0)
    assert len(fold.linears) == 3
    assert block_error(stream, 0, hidden, [fold]) < EXACT
    assert block_error(stream, 0, hidden, [replace(fold, linears=fold.linears[:2])]) > 0.1


def test_scales_that_a_stored_norm_gives_away_exactly(tiny_model: TinyModel) -> None:
    """A norm in bfloat16 and its readers before quantization: W' x' is W x, which it is not with the scale itself."""
    for family, offset in {"llama": 0.0, "gemma2": 1.0}.items():
        directory = tiny_model(family, dtype=torch.bfloat16)
        structure, checkpoint = discover(directory), Checkpoint(directory)
        fold, *_ = folds_of(structure.blocks[1], 3)
        norm, reader = f"{fold.producer.name}.weight", f"{fold.linears[-1]}.weight"
        stored = checkpoint.read([norm, reader])
        normalized = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = normalized * (stored[norm].double() + offset) @ stored[reader].double().t()
        errors = []
        for scale in (exact_scale(stored[norm], fold.scale, offset, torch.bfloat16), fold.scale):
            made = folded(directory, structure, [replace(fold, scale=scale)]).read([norm, reader])
            gain = made[norm].to(torch.bfloat16).double() + offset
            errors.append(relative(normalized * gain @ made[reader].double().t(), expected))
            assert (scale / fold.scale - 1).abs().max() < 2**-4
        assert errors[0] < 1e-6
        assert errors[1] > 1e-4


def test_exact_scales_where_a_gain_vanishes() -> None:
    weight = torch.tensor([0.0, 1.0, -1.0, 3.0])
    # 1/1e9 is nothing in float16; with offset 1, 3/1e4 − 1 rounds to −1, and −1 + 1 is zero from the beginning
    assert exact_scale(weight, torch.tensor([5.0, 1e9, 2.0, 1.0]), 0.0, torch.float16).tolist() == [5.0, 1.0, 2.0, 1.0]
    found = exact_scale(weight, torch.tensor([2.0, 2.0, 7.0, 1e5]), 1.0, torch.float16)
    assert found.tolist() == [2.0, 2.0, 7.0, 1.0]


def test_block_with_its_own_parameters_is_the_block(tiny_model: TinyModel) -> None:
    """Masks and rotary tables that were recorded in bfloat16 serve a run in float64 too."""
    directory = tiny_model("gemma2", dtype=torch.bfloat16)
    skeleton = Skeleton(directory, discover(directory))
    stream = BlockStream(skeleton, token_batches((2, 20)))
    (hidden,) = stream.start()
    values = skeleton.read(skeleton.parameter_names(skeleton.blocks[0]))
    with stream.block(0):
        expected = stream.run(0, 0, hidden)
        assert torch.equal(stream.run_with(0, 0, hidden, {}, torch.bfloat16), expected)
    assert torch.equal(stream.run_with(0, 0, hidden, values, torch.bfloat16), expected)
    wide = stream.run_with(0, 0, hidden, values, torch.float64)
    assert wide.dtype == torch.float64
    assert relative(stream.run_with(0, 0, hidden, values, torch.float32).double(), wide) < 1e-5
    assert 1e-4 < relative(expected.double(), wide) < 3e-2
    values.popitem()
    with pytest.raises(ModelError, match=r"layers\.0\..* is neither given nor resident"):
        stream.run_with(0, 0, hidden, values, torch.float64)


# The checkpoint that is read.


def test_a_tied_head_that_becomes_a_tensor_of_its_own(tiny_model: TinyModel) -> None:
    directory = tiny_model("llama-tied", dtype=torch.float64)
    structure, (tokens,) = discover(directory), token_batches((1, 9))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    inner = TransformedCheckpoint(Checkpoint(directory), {}, {head: Added(embedding, lambda value: 2 * value)})
    norm = "model.layers.0.input_layernorm.weight"
    outer = TransformedCheckpoint(inner, {norm: lambda value: value + 1, head: lambda value: -value})
    stored = Checkpoint(directory).read([embedding, norm])
    assert set(outer.entries) == {*Checkpoint(directory).entries, head}
    assert outer.entries[head].shape == outer.entries[embedding].shape
    assert outer.nbytes == Checkpoint(directory).nbytes + outer.entries[embedding].nbytes
    made = outer.read([head, embedding, norm])
    assert torch.equal(made[head], -2 * stored[embedding])
    assert torch.equal(made[embedding], stored[embedding])
    assert torch.equal(made[norm], stored[norm] + 1)
    assert set(added_tensors(outer)) == {head}
    assert added_tensors(Checkpoint(directory)) == {}

    skeleton = Skeleton(directory, structure, checkpoint=inner, untied=True)
    expected = logits(Skeleton(directory, structure), tokens)
    assert torch.equal(logits(skeleton, tokens), 2 * expected)
    assert skeleton.structure.head_linear == Linear("lm_head", 64, 512)
    assert skeleton.structure.parameters[head] == (512, 64)
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        Skeleton(directory, structure, untied=True)


def test_a_change_of_a_tensor_that_is_not_there(tiny_model: TinyModel) -> None:
    with pytest.raises(ModelError, match=r"tensor model\.norm\.bias is missing"):
        TransformedCheckpoint(Checkpoint(tiny_model("llama")), {"model.norm.bias": torch.clone})


def test_names_of_parameters_in_a_checkpoint_of_the_base_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    original = tiny_model("gpt2")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(original / SINGLE_NAME).items()}
    save_file(tensors, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text((original / "config.json").read_text())
    structure = discover(tmp_path)
    wanted = ["transformer.h.1.ln_1.bias", "transformer.wpe.weight"]
    assert parameter_tensors(tmp_path, structure, Checkpoint(tmp_path).entries, wanted) == {
        "transformer.h.1.ln_1.bias": "h.1.ln_1.bias",
        "transformer.wpe.weight": "wpe.weight",
    }


def test_parameters_that_are_stored_joined_are_refused(tiny_model: TinyModel) -> None:
    directory = tiny_model("mixtral")
    structure = discover(directory)
    joined = structure.blocks[0].experts[0].parameters[0]
    with pytest.raises(ModelError, match=f"{joined} is stored joined with other weights") as caught:
        parameter_tensors(directory, structure, Checkpoint(directory).entries, [joined])
    assert caught.value.remedy == "Its architecture is not supported."
    # by default save_pretrained joins again what it has read so
    blocks = tuple(replace(block, experts=()) for block in structure.blocks)
    with pytest.raises(ModelError, match="stored joined") as caught:
        parameter_tensors(directory, replace(structure, blocks=blocks), Checkpoint(directory).entries, [joined])
    assert "save_original_format=False" in caught.value.remedy
