"""Reading checkpoints, and the ways in which one can be broken: each a ModelError that names the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantcli.errors import ModelError
from quantcli.model import checkpoint as checkpoint_module
from quantcli.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json

ONE = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
TWO = {"c": torch.arange(5, dtype=torch.int8), "d": torch.tensor(3.0, dtype=torch.float64)}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
MAPS = Path("/proc/self/maps")


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({**ONE, **TWO}, tmp_path / SINGLE_NAME)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file(ONE, tmp_path / SHARDS[0])
    save_file(TWO, tmp_path / SHARDS[1])
    write_index(tmp_path, {**dict.fromkeys(ONE, SHARDS[0]), **dict.fromkeys(TWO, SHARDS[1])})
    return tmp_path


def fault(directory: Path, match: str) -> ModelError:
    with pytest.raises(ModelError, match=match) as caught:
        Checkpoint(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def rewrite_header(file: Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_tensors_come_back_as_they_were_saved(form: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(form))
    expected = {**ONE, **TWO}
    assert set(checkpoint.entries) == set(expected)
    for name, value in checkpoint.read(["d", "a", "c", "b"]).items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name])
        assert checkpoint.entries[name].shape == tuple(value.shape)
        assert checkpoint.entries[name].nbytes == value.nbytes
    assert checkpoint.nbytes == sum(value.nbytes for value in expected.values())
    assert "a" in checkpoint
    assert "e" not in checkpoint


def test_a_file_of_another_name_is_found(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "weights.safetensors")
    assert set(Checkpoint(tmp_path).entries) == set(ONE)


def test_links_are_followed(single: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files elsewhere and links to them."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    (linked / SINGLE_NAME).symlink_to(single / SINGLE_NAME)
    assert set(Checkpoint(linked).entries) == {*ONE, *TWO}


def test_a_tensor_that_is_not_there_is_named(single: Path) -> None:
    with pytest.raises(ModelError, match="tensor lm_head is missing"):
        Checkpoint(single).read(["a", "lm_head"])


def test_a_file_that_changes_after_it_was_opened(single: Path) -> None:
    checkpoint = Checkpoint(single)
    file = single / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ModelError, match=SINGLE_NAME) as caught:
        checkpoint.read(["a"])
    assert "start again" in caught.value.remedy
    file.unlink()
    with pytest.raises(ModelError, match=SINGLE_NAME):
        checkpoint.read(["a"])
    save_file(TWO, file)
    with pytest.raises(ModelError, match=SINGLE_NAME):
        checkpoint.read(["a"])


@pytest.mark.parametrize("name", ["", "absent"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    assert SINGLE_NAME in fault(tmp_path / name, "holds no safetensors weights").remedy


def test_several_files_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    assert "index" in fault(sharded, "2 safetensors files and no").remedy


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    assert "save_pretrained" in fault(tmp_path, f"pickled weights .{name}.").remedy


def test_a_pickle_beside_safetensors_is_left_alone(single: Path) -> None:
    (single / "optimizer.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    assert set(Checkpoint(single).entries) == {*ONE, *TWO}


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1, -30])
def test_truncated(keep: int, sharded: Path) -> None:
    file = sharded / SHARDS[1]
    file.write_bytes(file.read_bytes()[:keep])
    error = fault(sharded, "truncated or damaged")
    assert SHARDS[1] in error.message
    assert "Download" in error.remedy


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({"a": entry(dtype="F31")}).encode(),
        json.dumps({"a": entry(shape=(3,))}).encode(),
        json.dumps({"a": entry(shape=(2**62, 2**62))}).encode(),
        json.dumps({"a": entry(shape=(-2,))}).encode(),
        json.dumps({"a": entry(offsets=(0, 1 << 60))}).encode(),
        json.dumps({"a": entry(offsets=(8, 0))}).encode(),
        json.dumps({"a": entry(), "b": entry()}).encode(),
        json.dumps({"a": 3}).encode(),
    ],
)
def test_garbage_in_the_header(header: bytes, tmp_path: Path) -> None:
    rewrite_header(tmp_path / SINGLE_NAME, header, b"\0" * 8)
    fault(tmp_path, "truncated or damaged")


def test_a_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    fault(tmp_path, "truncated or damaged")


def test_a_directory_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).mkdir()
    fault(tmp_path, SINGLE_NAME)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    assert "Download" in fault(sharded, f"names {SHARDS[1]}, which is not there").remedy


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "a\0b.safetensors", "loop.safetensors", "\ud800.safetensors"]
)
def test_names_that_no_file_can_have(name: str, sharded: Path) -> None:
    (sharded / "loop.safetensors").symlink_to("loop.safetensors")
    write_index(sharded, {"a": name})
    fault(sharded, "is not there")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "pytorch_model.bin",
        "./model.safetensors",
    ],
)
def test_an_index_may_not_leave_the_directory(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path / "x.safetensors", directory / "sub" / "x.safetensors", directory / SINGLE_NAME):
        save_file(ONE, place)
    write_index(directory, dict.fromkeys(ONE, name))
    assert "Do not use" in fault(directory, "not a safetensors file beside it").remedy


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, "x", {"a": 1}, {"a": None}, {"a": [SHARDS[0]]}, {"a": {"file": SHARDS[0]}}]
)
def test_an_index_without_a_map(weight_map: object, sharded: Path) -> None:
    write_index(sharded, weight_map)
    fault(sharded, "no usable weight_map")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000]
)
def test_garbage_in_the_index(content: bytes, sharded: Path) -> None:
    (sharded / INDEX_NAME).write_bytes(content)
    fault(sharded, INDEX_NAME)


def test_an_index_that_is_too_large(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "MAXIMUM_JSON_BYTES", 10)
    fault(sharded, "larger than")


@pytest.mark.parametrize("wrong", [{"a": SHARDS[1]}, {"e": SHARDS[0]}])
def test_an_index_that_is_wrong_about_a_tensor(wrong: dict[str, str], sharded: Path) -> None:
    write_index(sharded, {**dict.fromkeys(ONE, SHARDS[0]), **dict.fromkeys(TWO, SHARDS[1]), **wrong})
    (name,) = wrong
    fault(sharded, f"says that {name} is in {wrong[name]}, where it is not")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({**TWO, "a": ONE["a"] + 1}, sharded / SHARDS[1])
    fault(sharded, f"tensor a is also in {SHARDS[0]}")


def test_files_that_the_index_does_not_name_are_not_read(sharded: Path) -> None:
    (sharded / "adapter.safetensors").write_bytes(b"no safetensors")
    checkpoint = Checkpoint(sharded)
    assert {name: file.name for name, file in ((n, e.file) for n, e in checkpoint.entries.items())} == {
        **dict.fromkeys(ONE, SHARDS[0]),
        **dict.fromkeys(TWO, SHARDS[1]),
    }


def test_values_belong_to_the_caller(single: Path) -> None:
    before = (single / SINGLE_NAME).read_bytes()
    for value in Checkpoint(single).read([*ONE, *TWO]).values():
        value.zero_()
    assert (single / SINGLE_NAME).read_bytes() == before
    assert torch.equal(Checkpoint(single).read(["a"])["a"], ONE["a"])


@pytest.mark.skipif(not MAPS.exists(), reason="no /proc")
def test_a_mapping_goes_with_its_values(single: Path) -> None:
    """Touched pages of a mapped file count as resident memory."""
    checkpoint = Checkpoint(single)
    values = checkpoint.read(["a", "c"])
    values.clear()
    assert str(single) not in MAPS.read_text()


def test_read_json_says_where(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.json cannot be read"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path)
