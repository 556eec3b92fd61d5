"""A changed byte anywhere in an export is found, in its run and away from it, and so are files that come or go."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

import quantcli
from quantcli.errors import QuantcliError, VerificationError
from quantcli.formats.sums import SUMS
from quantcli.pipeline.stages import verify
from quantcli.pipeline.verify import verify_path

Recipe = dict[str, Any]
SHARDS = "135kB"  # of which these exports make two or more, and an index
RUNS: list[tuple[list[str], Recipe, Recipe]] = [
    (
        ["compressed-tensors", "ascend", "mindie", "numpy", "dense"],
        {"weights": {"bits": 8, "granularity": "channel"}},
        {},
    ),
    (["gptq", "awq", "gguf"], {"weights": {"bits": 4, "granularity": "group", "group_size": 32}}, {}),
    (
        ["compressed-tensors"],
        {
            "weights": {"bits": 8},
            "activations": {"bits": 8, "scope": "tensor", "symmetric": False},
            "kv_cache": {"type": "float"},
        },
        {},
    ),
    (
        ["modelopt"],
        {
            "weights": {"bits": 8, "type": "float", "granularity": "tensor"},
            "activations": {"bits": 8, "type": "float", "scope": "tensor"},
            "kv_cache": {"type": "float"},
        },
        {},
    ),
    (
        ["compressed-tensors", "ascend", "mindie", "dense"],
        {"weights": {"bits": 8, "granularity": "channel"}},
        {"shard_size": SHARDS},
    ),
]
"""Formats, the section `quantize`, and what else the section `export` has. What has shards comes from a model with
further chat templates, which lie in a folder of an export."""
CASES = [(number, form) for number, (formats, *_) in enumerate(RUNS) for form in formats]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[0]}")
Case = tuple[int, str]


@pytest.fixture(scope="module")
def runs(
    static_recipe: Callable[[Path], Recipe], tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The runs of RUNS; read only, or put back as they were."""
    found = []
    for formats, quantize, export in RUNS:
        place = tmp_path_factory.mktemp("run")
        recipe = static_recipe(place / "run") | {"quantize": quantize, "export": {"formats": formats, **export}}
        if export:
            model = Path(shutil.copytree(tiny_llama, place / "model"))
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
            tokenizer.save_pretrained(model)
            recipe["model"] |= {"path": str(model)}
        del recipe["evaluate"]
        if len(quantize) == 1:
            del recipe["calibration"]
        quantcli.run(recipe)
        found.append(place / "run")
        for file in files_of(place / "run" / "export"):
            file.chmod(0o644)  # it is changed below, by whoever runs the tests
        for form in formats:
            shutil.copytree(place / "run" / "export" / form, place / form)
    return found


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def places(runs: list[Path], case: Case) -> list[Path]:
    """The export in its run, and a copy that stands alone."""
    run, form = runs[case[0]], case[1]
    return [run / "export" / form, run.parent / form]


def spans(file: Path) -> list[tuple[int, int]]:
    """Stretches of a file: a third of them all of it, as many its first bytes, which are the header of weights, and of
    safetensors the tensors, so that small ones are met as often as large ones."""
    size, tensors = file.stat().st_size, []
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(begin - 8))
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        tensors = [(begin + start, begin + end) for start, end in offsets]
    return [(0, size), (0, min(size, 3000))] * max(1, len(tensors)) + tensors


@cases
def test_untouched_exports_are_in_order(case: Case, runs: list[Path]) -> None:
    (inside, alone), form = places(runs, case), case[1]
    facts = verify_path(inside)
    assert facts[f"{form}: linears"] == 21
    assert facts[f"{form}: files"] == len(files_of(inside))
    assert -20 < facts[f"{form}: prompt"] < 0
    assert "checksums" in verify_path(alone)["checked against"]
    recorded = json.loads((runs[case[0]] / "verify" / "verified.json").read_text())[form]["files"]
    names = {file.relative_to(inside).as_posix(): file for file in files_of(inside)}
    assert recorded == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in names.items()}
    if RUNS[case[0]][2]:
        assert len(list(inside.glob("*-of-*.safetensors"))) > 1
        assert any(name.endswith(".safetensors.index.json") for name in names)
        assert "additional_chat_templates/tools.jinja" in names
    sums = dict(reversed(line.split("  ")) for line in (alone / SUMS).read_text().splitlines())
    assert sums == {name: digest for name, digest in recorded.items() if name != SUMS}


@cases
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(case: Case, runs: list[Path], data: st.DataObject) -> None:
    export = data.draw(st.sampled_from(places(runs, case)))
    file = data.draw(st.sampled_from(files_of(export)))
    content = file.read_bytes()
    begin, end = data.draw(st.sampled_from(spans(file)))
    place, bit = data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7))
    try:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        with pytest.raises(VerificationError):
            verify_path(export)
    finally:
        file.write_bytes(content)


@cases
def test_files_that_go_or_come_are_found(case: Case, runs: list[Path]) -> None:
    for export in places(runs, case):
        for file in files_of(export):
            content = file.read_bytes()
            if file.name in (SUMS, "config.json") and export.parent.name != "export":
                continue  # without the first it is checked against itself, and without the second it is no checkpoint
            file.unlink()
            with pytest.raises(VerificationError, match=file.name):
                verify_path(export)
            file.write_bytes(content)
        for name in ("lora.safetensors", "pytorch_model.bin", "processor_config.json", "modeling_x.py"):
            (export / name).write_text("{}")
            with pytest.raises(VerificationError, match=f"{name} was not exported"):
                verify_path(export)
            (export / name).unlink()
        (export / "NOTES.md").write_text("mine")
        (export / "NOTES.md").unlink()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(["export/stage.json", "run.json"]), place=st.floats(0, 1, exclude_max=True))
def test_damaged_records_are_typed_errors(name: str, place: float, runs: list[Path]) -> None:
    run = runs[1]
    file = run / name
    content = file.read_bytes()
    at = int(place * len(content))
    try:
        file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with suppress(QuantcliError):
            verify_path(run / "export" / "awq")
    finally:
        file.write_bytes(content)


def test_a_store_that_is_not_the_plan_is_found(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = static_recipe(tmp_path / "run") | {"quantize": {}}
    del recipe["evaluate"], recipe["calibration"]
    finished = verify.finished_store

    def without_one(*arguments: Any) -> Any:
        store = finished(*arguments)
        store.schemes.popitem()
        return store

    monkeypatch.setattr(verify, "finished_store", without_one)
    with pytest.raises(VerificationError, match="than the plan"):
        quantcli.run(recipe)
