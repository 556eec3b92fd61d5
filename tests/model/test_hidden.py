"""Hidden states between blocks: the same in memory and in a file, and there again after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model.hidden import HiddenCache

SHAPES = [(2, 5, 8), (2, 5, 8), (1, 3, 8)]
IN_MEMORY, MAPPED = 1 << 20, 0
either = pytest.mark.parametrize("limit", [IN_MEMORY, MAPPED], ids=["memory", "mapped"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cache_of(folder: Path, limit: int = MAPPED, dtype: torch.dtype = torch.float32, shapes=SHAPES) -> HiddenCache:
    return HiddenCache(folder, shapes, dtype, limit)


def states(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def commit(cache: HiddenCache, position: int, values: list[Tensor]) -> None:
    for i, value in enumerate(values):
        cache.put(i, value)
    cache.commit(position)


def holds(cache: HiddenCache, values: list[Tensor]) -> bool:
    return all(torch.equal(cache.get(i), value) for i, value in enumerate(values))


@either
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_committed_is_read_back(limit: int, dtype: torch.dtype, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, limit, dtype)
    for position in range(3):
        commit(cache, position, states(position, dtype))
        assert holds(cache, states(position, dtype))
        assert [file.name for file in tmp_path.glob("*.bin")] == [f"hidden-{position:05d}.bin"]


@either
def test_a_block_sees_what_entered_it_until_the_commit(limit: int, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, limit)
    commit(cache, 0, states(0))
    for i, value in enumerate(states(1)):
        cache.put(i, value)
    assert holds(cache, states(0))
    cache.commit(1)
    assert holds(cache, states(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_and_mapped_write_the_same_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    written = []
    for limit in (IN_MEMORY, MAPPED):
        folder = tmp_path / str(limit)
        commit(cache_of(folder, limit, dtype), 7, states(3, dtype))
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"hidden-00007.bin", "hidden.json"}


def test_the_limit_decides(tmp_path: Path) -> None:
    size = sum(4 * 8 * samples * tokens for samples, tokens, _ in SHAPES)
    assert not cache_of(tmp_path, size).mapped
    assert cache_of(tmp_path, size - 1).mapped


@either
@pytest.mark.parametrize("later", [IN_MEMORY, MAPPED])
def test_resume_after_a_commit(limit: int, later: int, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, limit, torch.bfloat16)
    commit(cache, 0, states(0, torch.bfloat16))
    commit(cache, 1, states(1, torch.bfloat16))
    cache.put(0, states(2, torch.bfloat16)[0])  # block 1 was interrupted here
    resumed = cache_of(tmp_path, later, torch.bfloat16)
    assert resumed.resume() == 1
    assert holds(resumed, states(1, torch.bfloat16))
    commit(resumed, 2, states(2, torch.bfloat16))
    assert holds(resumed, states(2, torch.bfloat16))


@pytest.mark.parametrize("torn", [b"", b"torn", b"x" * 10_000])
def test_a_torn_generation_is_ignored(torn: bytes, tmp_path: Path) -> None:
    commit(cache_of(tmp_path), 4, states(4))
    (tmp_path / "next.part").write_bytes(torn)
    (tmp_path / ".hidden-00005.bin.1234.part").write_bytes(torn)
    resumed = cache_of(tmp_path)
    assert resumed.resume() == 4
    commit(resumed, 5, states(5))
    again = cache_of(tmp_path)
    assert again.resume() == 5
    assert holds(again, states(5))


def test_killed_between_the_file_and_its_description(tmp_path: Path) -> None:
    """The description is what commits: a data file that is newer than it is not taken."""
    commit(cache_of(tmp_path), 1, states(1))
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    commit(cache_of(tmp_path), 2, states(2))
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    resumed = cache_of(tmp_path)
    assert resumed.resume() == 1
    assert holds(resumed, states(1))


def test_started_again_beside_an_older_run(tmp_path: Path) -> None:
    """Killed before the older run's file was removed, the new run still goes on from its own."""
    old = cache_of(tmp_path)
    commit(old, 5, states(5))
    stale = (tmp_path / "hidden-00005.bin").read_bytes()
    commit(cache_of(tmp_path), 0, states(0))
    (tmp_path / "hidden-00005.bin").write_bytes(stale)
    resumed = cache_of(tmp_path)
    assert resumed.resume() == 0
    assert holds(resumed, states(0))


@either
def test_states_behind_a_block_whose_files_are_gone_are_not_resumed(limit: int, tmp_path: Path) -> None:
    commit(cache_of(tmp_path, limit), 2, states(2))
    assert cache_of(tmp_path, limit).resume([True, True, False]) == 2
    for finished in ([False, True, True], [True, False, False]):
        cache = cache_of(tmp_path, limit)
        assert cache.resume(finished) is None
        assert cache.position == -1


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert cache_of(tmp_path).resume() is None
    cache_of(tmp_path).put(0, states(0)[0])
    assert cache_of(tmp_path).resume() is None


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"shapes": SHAPES[:2]},
        {"shapes": [(1, 3, 8), (2, 5, 8), (2, 5, 8)]},  # as many bytes
        {"shapes": [(5, 2, 8), (5, 2, 8), (1, 3, 8)]},  # as many bytes, the same offsets
        {"dtype": torch.int32},  # as many bytes
    ],
)
@either
def test_another_shape_or_dtype_is_not_resumed(limit: int, other: dict, tmp_path: Path) -> None:
    commit(cache_of(tmp_path, limit), 1, states(1))
    assert cache_of(tmp_path, limit, **other).resume() is None


@pytest.mark.parametrize(
    "description", ["", "{", "[]", "null", "{}", '{"position": "one"}', '{"position": null}', "\0"]
)
def test_a_damaged_description_is_not_resumed(description: str, tmp_path: Path) -> None:
    commit(cache_of(tmp_path), 1, states(1))
    (tmp_path / "hidden.json").write_text(description)
    assert cache_of(tmp_path).resume() is None


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_damaged_file_is_not_resumed(change: str, tmp_path: Path) -> None:
    commit(cache_of(tmp_path), 1, states(1))
    file = tmp_path / "hidden-00001.bin"
    content = file.read_bytes()
    file.unlink() if change == "gone" else file.write_bytes(content[:-1] if change == "shorter" else content + b"x")
    assert cache_of(tmp_path).resume() is None


@either
def test_clear_leaves_nothing(limit: int, tmp_path: Path) -> None:
    folder = tmp_path / "hidden"
    cache = cache_of(folder, limit)
    commit(cache, 1, states(1))
    cache.put(0, states(2)[0])
    (folder / "next.part").write_bytes(b"torn")
    (folder / ".hidden-00002.bin.1234.part").write_bytes(b"torn")
    cache.clear()
    assert not folder.exists()
    cache.clear()  # once more does no harm


def test_clear_keeps_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    cache = cache_of(tmp_path)
    commit(cache, 0, states(0))
    cache.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@either
def test_a_block_that_changes_the_shape_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"\(2, 5, 8\) into \(2, 4, 8\)"):
        cache_of(tmp_path, limit).put(0, torch.zeros(2, 4, 8))


def test_the_description_says_what_is_there(tmp_path: Path) -> None:
    commit(cache_of(tmp_path), 3, states(0))
    assert json.loads((tmp_path / "hidden.json").read_text()) == {
        "position": 3,
        "shapes": [list(shape) for shape in SHAPES],
        "dtype": "torch.float32",
    }
