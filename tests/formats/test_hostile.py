"""Mutated checkpoints of every format: what is not read as it was is refused with a typed error, never otherwise."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_exports import Export, export_tiny

from quantcli.errors import ModelError, QuantcliError
from quantcli.formats.compressed_tensors import parse_configuration
from quantcli.formats.dense import NAME as DENSE
from quantcli.pipeline.inspect import inspect_path
from quantcli.pipeline.source import load_tokenizer
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme

FORMS = {
    "compressed-tensors": Scheme(8, activations="static", activations_symmetric=False),
    "ascend": Scheme(8, activations="static", activations_symmetric=False),
    "mindie": Scheme(8, activations="dynamic"),
    "gptq": Scheme(4, symmetric=False, granularity="group", group_size=32, float16_scales=True),
    "awq": Scheme(4, granularity="group", group_size=32, float16_scales=True),
    "modelopt": Scheme(8, granularity="tensor", activations="static", type="float"),
    "dense": Scheme(4, granularity="group", group_size=32),
}
OTHER_FILES = {"numpy": FORMS["ascend"], "gguf": FORMS["dense"]}
"""Forms whose weights are no safetensors; the tests of GGUF's header and of dictionaries change those."""
HOSTILE = [None, True, -1, 0, 1, 7, 1 << 21, 1 << 27, 1 << 31, 1 << 62, 1 << 70, 1e308, float("nan"), "", "x", "re:(",
           "re:(.*)*x", "\ud800", "../../x.safetensors", [], [[]], {}, {"a": {}}]  # fmt: skip
Made = Callable[[str], Export]
quickly = settings(
    max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found: dict[str, Export] = {}

    def get(form: str) -> Export:
        if form not in found:
            place = tmp_path_factory.mktemp(form)
            found[form] = export_tiny(
                place, (FORMS | OTHER_FILES)[form], dtype=torch.bfloat16, form=form, with_tokenizer=True
            )
        return found[form]

    return get


def copied(made: Export, place: Path) -> Path:
    shutil.rmtree(place / "copy", ignore_errors=True)
    return Path(shutil.copytree(made.folder, place / "copy"))


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything that can be read of a checkpoint: shapes of codes, and of all tensors."""
    inspect_path(folder)
    _, checkpoint, _ = open_checkpoint(folder)
    found = {name: tuple(checkpoint.read_linear(name).weight.codes.shape) for name in checkpoint.schemes}
    for name in checkpoint.raw.entries:
        found[f"tensor {name}"] = tuple(checkpoint.raw.read([name])[name].shape)
    for name in checkpoint.weights.values():
        found[f"weight {name}"] = tuple(checkpoint.read([name])[name].shape)
    return found


def read_or_refused(folder: Path, original: Export) -> None:
    wanted = shapes_of(original.folder)
    for use in (shapes, verify_path):
        found, refusal = {}, None
        try:
            found = use(folder)
        except QuantcliError as error:
            refusal = error
        if refusal is not None:
            assert refusal.exit_code in (3, 5) or (original.form == DENSE and "not a quantized" in refusal.message)
            assert len(str(refusal)) < 5000
        elif use is shapes:
            # Model-Optimizer itself stores scales of one value without an axis
            bare = {(): (1,)} if original.form == "modelopt" else {}
            assert all(bare.get(found[name], found[name]) == shape for name, shape in wanted.items() if name in found)


shapes_of = cache(shapes)


def nodes(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path] * bool(path) + [below for key, value in inner for below in nodes(value, (*path, key))]


def mutated(content: Any, data: st.DataObject) -> Any:
    """JSON with one value replaced, removed, or put under another key."""
    path = data.draw(st.sampled_from(nodes(content)))
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
    if how == "replace":
        owner[path[-1]] = data.draw(st.sampled_from(HOSTILE))
    else:
        value = owner.pop(path[-1])
        if how == "rename" and isinstance(owner, dict):
            owner[data.draw(st.sampled_from(["", "x", "dtype", "__metadata__", "model.norm.weight"]))] = value
    return content


def change_header(folder: Path, data: st.DataObject) -> None:
    (file,) = folder.glob("*.safetensors")
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(mutated(json.loads(raw[8 : 8 + length]), data)).encode()
    claimed = data.draw(st.sampled_from([len(header)] * 4 + [0, len(header) - 1, len(header) + 1, 1 << 40, 1 << 63]))
    file.write_bytes(struct.pack("<Q", claimed) + header + raw[8 + length :])


def change_json(folder: Path, data: st.DataObject) -> None:
    names = ("config.json", "quantize_config.json", "quant_model_description*.json", "quantization.json")
    file = data.draw(st.sampled_from(sorted(file for name in names for file in folder.glob(name))))
    file.write_text(json.dumps(mutated(json.loads(file.read_text()), data)))


def change_bytes(folder: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors")) * 2 + sorted(folder.glob("*.json"))))
    raw = file.read_bytes()
    place = int(data.draw(st.floats(0, 1, exclude_max=True)) * min(len(raw), 4000))
    piece = data.draw(st.binary(max_size=4))
    file.write_bytes(raw[:place] + piece + raw[place + data.draw(st.sampled_from([0, 1, len(piece), 1 << 30])) :])


CHANGES = {"header": change_header, "json": change_json, "bytes": change_bytes}
CASES = [*((form, kind) for form in FORMS for kind in CHANGES), *((form, "json") for form in OTHER_FILES)]


@pytest.mark.parametrize(("form", "kind"), CASES)
@quickly
@given(data=st.data())
def test_changed_checkpoints(form: str, kind: str, made: Made, tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(made(form), tmp_path)
    (folder / "SHA256SUMS").unlink()  # by which any change would be found
    CHANGES[kind](folder, data)
    read_or_refused(folder, made(form))


RANDOMIZED = """
import resource, sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path[:0] = sys.argv[1].split(":")
import test_hostile as hostile
from tiny_exports import export_tiny

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

torch.set_num_threads(1)
place, examples = Path(sys.argv[2]), int(sys.argv[3])
limit = 6 << 30  # what is asked for beyond it is an error here that would take the machine's memory elsewhere
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
chosen = settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate], print_blob=True,
                  suppress_health_check=list(HealthCheck))
for form, scheme in (hostile.FORMS | hostile.OTHER_FILES).items():
    made = export_tiny(place / form, scheme, dtype=torch.bfloat16, form=form, with_tokenizer=True)
    hostile.read_or_refused(made.folder, made)
    before = peak()
    for kind in [kind for other, kind in hostile.CASES if other == form]:
        change = hostile.CHANGES[kind]
        @chosen
        @given(data=st.data())
        def check(data):
            folder = hostile.copied(made, place)
            (folder / "SHA256SUMS").unlink()
            change(folder, data)
            hostile.read_or_refused(folder, made)
            assert peak() - before < 1500
        check()
        print(form, kind, peak() - before, "MB", flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_changes_at_random_take_little_memory(tmp_path: Path) -> None:
    """Other examples at every run; what is printed says which one failed."""
    rooms = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    arguments = [sys.executable, "-c", RANDOMIZED, rooms, str(tmp_path), "40"]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@quickly
@given(data=st.data())
def test_mutated_tokenizers(made: Made, tmp_path: Path, data: st.DataObject) -> None:
    folder = copied(made("awq"), tmp_path)
    file = data.draw(st.sampled_from(sorted(folder.glob("*token*.json"))))
    if data.draw(st.booleans()):
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), data)))
    else:
        raw = file.read_bytes()
        place = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(raw))
        file.write_bytes(
            raw[:place] + data.draw(st.sampled_from([b"", b"[" * 100_000, b"\0", b"{"])) + raw[place + 1 :]
        )
    with suppress(ModelError):
        load_tokenizer(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "expression",
    ["re:(a+)+$", "re:(.*)*x", "re:((a|b)+c?)+x", "re:" + ".*" * 12 + "x", "re:" + "(a|.)" * 40 + "x",
     "re:" + "a?" * 60 + "x", "re:[", "re:(?P<n>", "re:" + "(" * 5000, "re:a{999999999999}"],
)  # fmt: skip
def test_expressions_that_take_for_ever_are_refused(expression: str, made: Made) -> None:
    content = json.loads((made("compressed-tensors").folder / "config.json").read_text())["quantization_config"]
    names = ["model.layers.0." + "a" * 40]
    for change in (content["ignore"], content["config_groups"]["group_0"]["targets"]):
        change.append(expression)
        with pytest.raises(ModelError, match="quantization_config"):
            parse_configuration(content, names)
        change.pop()


@pytest.mark.parametrize(
    "expression",
    ["re:.*lm_head", r"re:model\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\.mlp\.(gate|up|down)_proj$", "re:.*mlp.gate$",
     "re:.*block_sparse_moe.gate", r"re:^(?!.*experts).*\.(q|k|v)_proj", r"re:.*layers\.\d+\.self_attn\..*"],
)  # fmt: skip
def test_expressions_that_people_write_are_read(expression: str, made: Made) -> None:
    content = json.loads((made("compressed-tensors").folder / "config.json").read_text())["quantization_config"]
    content["ignore"].append(expression)
    assert parse_configuration(content, ["model.layers.20.mlp.up_proj"])


def test_a_dense_checkpoint_is_not_taken_for_codes(made: Made) -> None:
    _, checkpoint, _ = open_checkpoint(made(DENSE).folder)
    assert not checkpoint.schemes
