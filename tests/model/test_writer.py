"""Files that we write, read back by the safetensors library."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantcli.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from quantcli.model.writer import (
    DTYPE_NAMES,
    PlannedTensor,
    replacing,
    shard_names,
    split_shards,
    write_index,
    write_safetensors,
)

METADATA = {"format": "pt"}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
PLANS = st.lists(
    st.builds(PlannedTensor, NAMES, st.sampled_from(sorted(DTYPE_NAMES, key=str)), SHAPES),
    max_size=8,
    unique_by=lambda tensor: tensor.name,
)


def random_values(planned: list[PlannedTensor]) -> dict[str, Tensor]:
    """Random bits, NaN and infinity among them (of bool, zeros and ones)."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for tensor in planned:
        high = 2 if tensor.dtype == torch.bool else 256
        bits = torch.randint(high, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        values[tensor.name] = bits.view(tensor.dtype).view(tensor.shape)
    return values


def same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def read_header(file: Path) -> tuple[int, dict[str, dict]]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return 8 + length, json.loads(content[8 : 8 + length])


@settings(max_examples=80, deadline=None)
@given(PLANS)
def test_the_library_reads_what_was_written(planned: list[PlannedTensor]) -> None:
    values = random_values(planned)
    with TemporaryDirectory() as folder:
        file = Path(folder) / SINGLE_NAME
        returned = write_safetensors(file, planned, values.__getitem__, METADATA)
        assert returned == hashlib.sha256(file.read_bytes()).hexdigest()
        assert [path.name for path in Path(folder).iterdir()] == [SINGLE_NAME]
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == METADATA
            assert set(opened.keys()) == set(values)
            assert all(same_bits(opened.get_tensor(name), value) for name, value in values.items())
        assert {e.name: (e.shape, e.nbytes) for e in Checkpoint(Path(folder)).entries.values()} == {
            t.name: (t.shape, t.nbytes) for t in planned
        }


@settings(max_examples=80, deadline=None)
@given(PLANS, st.sampled_from([1, 16, 64, 1 << 20]))
def test_shards(planned: list[PlannedTensor], limit: int) -> None:
    shards = split_shards(planned, limit)
    assert sorted((t for shard in shards for t in shard), key=repr) == sorted(planned, key=repr)
    order = {tensor.name: position for position, tensor in enumerate(planned)}
    last = -1
    for shard in shards:
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard) <= limit
        positions = sorted(order[tensor.name] for tensor in shard)
        assert positions == list(range(last + 1, last + 1 + len(shard))), "consecutive runs"
        last += len(shard)

    values = random_values(planned)
    with TemporaryDirectory() as folder:
        for name, shard in zip(shard_names(len(shards)), shards, strict=True):
            write_safetensors(Path(folder) / name, shard, values.__getitem__, METADATA)
            start, header = read_header(Path(folder) / name)
            for tensor in shard:
                begin, end = header[tensor.name]["data_offsets"]
                assert end - begin == tensor.nbytes
                assert (start + begin) % tensor.dtype.itemsize == 0, "a mapped reader needs aligned elements"
        write_index(Path(folder), shards)
        assert (Path(folder) / INDEX_NAME).exists() == (len(shards) > 1)
        if planned:
            checkpoint = Checkpoint(Path(folder))
            assert all(same_bits(checkpoint.read([name])[name], value) for name, value in values.items())


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    planned = [PlannedTensor("a", torch.bfloat16, (3, 5)), PlannedTensor("b", torch.int8, (7,))]
    values = random_values(planned)
    digests = {write_safetensors(tmp_path / str(i), planned, values.__getitem__, METADATA) for i in range(2)}
    assert len(digests) == 1


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    views = {
        "transposed": whole.t(),
        "strided": whole[:, ::2],
        "part": whole[1:3],
        "grad": whole.clone().requires_grad_(),
    }
    planned = [PlannedTensor(name, value.dtype, tuple(value.shape)) for name, value in views.items()]
    write_safetensors(tmp_path / SINGLE_NAME, planned, views.__getitem__, METADATA)
    with safe_open(tmp_path / SINGLE_NAME, framework="pt") as opened:
        for name, value in views.items():
            torch.testing.assert_close(opened.get_tensor(name), value.detach(), rtol=0, atol=0)


def test_one_tensor_at_a_time_in_order(tmp_path: Path) -> None:
    planned = [PlannedTensor(str(i), torch.int8, (i,)) for i in range(4)]
    asked: list[str] = []

    def produce(name: str) -> Tensor:
        asked.append(name)
        return torch.zeros(int(name), dtype=torch.int8)

    write_safetensors(tmp_path / SINGLE_NAME, planned, produce, METADATA)
    assert asked == [tensor.name for tensor in planned]


def interrupted(name: str) -> Tensor:
    if name == "b":
        raise KeyboardInterrupt
    return torch.zeros(2)


def wrong_dtype(name: str) -> Tensor:
    return torch.zeros(2, dtype=torch.float64 if name == "b" else torch.float32)


def wrong_shape(name: str) -> Tensor:
    return torch.zeros(2, 1) if name == "b" else torch.zeros(2)


@pytest.mark.parametrize(
    ("produce", "error"), [(interrupted, KeyboardInterrupt), (wrong_dtype, ValueError), (wrong_shape, ValueError)]
)
@pytest.mark.parametrize("before", [None, b"an earlier file"])
def test_an_interrupted_write_changes_nothing(
    produce: Callable[[str], Tensor], error: type[BaseException], before: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / SINGLE_NAME
    if before is not None:
        file.write_bytes(before)
    planned = [PlannedTensor(name, torch.float32, (2,)) for name in "abc"]
    with pytest.raises(error):
        write_safetensors(file, planned, produce, METADATA)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == (
        [(SINGLE_NAME, before)] if before else []
    )


def test_replacing(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "new")]


def test_transformers_reads_our_shards(tiny_model, tmp_path: Path) -> None:
    """A model that is copied through the reader and the writer in small shards is the same model."""
    source = tiny_model("llama-tied")
    checkpoint = Checkpoint(source)
    names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    planned = [PlannedTensor(e.name, names[e.dtype], e.shape) for e in checkpoint.entries.values()]
    shards = split_shards(planned, 50_000)
    assert len(shards) > 3
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        write_safetensors(tmp_path / name, shard, lambda name: checkpoint.read([name])[name], METADATA)
    write_index(tmp_path, shards)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    total = json.loads((tmp_path / INDEX_NAME).read_text())["metadata"]["total_size"]
    assert total == checkpoint.nbytes == sum(math.prod(t.shape) * 4 for t in planned)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        assert torch.equal(ours[name], value), name
