"""What strangers may put in the place of a model's files: refused with the place, soon, and within bounded memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantcli.errors import ModelError
from quantcli.model import untrusted
from quantcli.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json
from quantcli.model.discovery import discover
from quantcli.model.untrusted import check_links, check_texts, parse_object, read_regular
from quantcli.pipeline.source import load_tokenizer


def test_a_regular_file_of_the_allowed_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("f")
    for name in ("f", "link"):
        assert read_regular(tmp_path / name, 5) == b"12345"
        with pytest.raises(ModelError, match="larger than"):
            read_regular(tmp_path / name, 4)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "zero", "directory", "loop", "nothing", "impossible"])
def test_what_is_no_regular_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("a\0b" if kind == "impossible" else "config.json")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "zero":
        file.symlink_to("/dev/zero")
    elif kind == "directory":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to("config.json")
    with pytest.raises(ModelError, match=r"no regular file|cannot be read"):
        read_json(file)
    with pytest.raises(ModelError):
        discover(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [SINGLE_NAME, "weights.safetensors", "shard.safetensors"])
def test_weights_are_regular_files(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    if name.startswith("shard"):
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"no regular file|is not there"):
        Checkpoint(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "merges.txt", "tokenizer.model"])
def test_files_that_transformers_reads_are_looked_at_before(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    load_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for use in (load_tokenizer, discover):
        with pytest.raises(ModelError, match=f"{name} is no regular file"):
            use(tmp_path)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 34)  # takes no room on the disk
    for use in (load_tokenizer, discover):
        with pytest.raises(ModelError, match=f"{name} is larger"):
            use(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is there twice"),
        (b"[1]", "no JSON object|not hold a JSON object"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "cannot be read"),
    ],
)
def test_json_that_is_refused(content: bytes, match: str) -> None:
    with pytest.raises(ModelError, match=f"here.*({match})"):
        parse_object(content, "here")


def test_many_values_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAXIMUM_JSON_VALUES", 5)
    assert parse_object(b'{"a": [1, 2, 3]}', "here") == {"a": [1, 2, 3]}
    with pytest.raises(ModelError, match="here holds 6 values"):
        parse_object(b'{"a": [1, 2, 3, 4, 5]}', "here")


def hub_cache(place: Path) -> Path:
    """A snapshot as the hub's cache lays it out."""
    snapshot, blobs = place / "models--a--b" / "snapshots" / "abc", place / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    return snapshot


def test_links_of_the_hub_and_inside_of_the_model_may_be_copied(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "LICENSE").write_text("free")
    (snapshot / "LICENSE.txt").symlink_to("LICENSE")
    check_links(sorted(snapshot.iterdir()), snapshot)
    check_texts(snapshot)


def test_links_out_of_the_model_are_not_copied(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (tmp_path / "secret").write_text("password")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"notes\.txt leads out of the model, to .*secret"):
        check_links(sorted(snapshot.iterdir()), snapshot)
    plain = tmp_path / "model"
    plain.mkdir()
    (plain / "notes.txt").symlink_to("../models--a--b/blobs/0123")
    with pytest.raises(ModelError, match="leads out"):
        check_links([plain / "notes.txt"], plain)


def header(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
         "'a' is there twice"),
        ({"a": ENTRY, "b": ENTRY}, "begins at 0, where 4 is due"),
        ({"a": {**ENTRY, "data_offsets": [4, 8]}}, "begins at 4, where 0 is due"),
        ({"a": {**ENTRY, "shape": [2], "data_offsets": [0, 2]}}, "have 2 bytes, and the file 4"),
        ({"a": {**ENTRY, "shape": [-4]}}, "has the shape"),
        ({"a": {**ENTRY, "shape": [True, 4]}}, "has the shape"),
        ({"a": {**ENTRY, "shape": [4.0]}}, "has the shape"),
        ({"a": {**ENTRY, "shape": [1] * 1000 + [4]}}, "has the shape"),
        ({"a": {**ENTRY, "shape": [1 << 62, 1 << 62, 4]}}, "has 4 bytes, and its shape"),
        ({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, "has the shape"),
        ({"a": {**ENTRY, "dtype": "PICKLE"}}, "dtype 'PICKLE'"),
        ({"a": {**ENTRY, "dtype": ["U8"]}}, "dtype"),
        ({"a": {**ENTRY, "more": 1}}, "not described by"),
        ({"a": [ENTRY]}, "not described by"),
    ],
)  # fmt: skip
def test_headers_that_are_not_true(content: object, match: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(header(content) + b"\0" * 4)
    with pytest.raises(ModelError, match=f"truncated or damaged: .*{match}") as caught:
        Checkpoint(tmp_path)
    assert len(str(caught.value)) < 1000


def test_names_are_those_of_safetensors_in_its_order(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {name: torch.zeros(2, size) for size, name in enumerate(["b", "ä", "a.10", "a.9", "Z"])}
    save_file(tensors, tmp_path / SINGLE_NAME)
    with safe_open(tmp_path / SINGLE_NAME, framework="pt") as opened:
        assert list(Checkpoint(tmp_path).entries) == list(opened.keys())


SIZES: dict[str, tuple[dict[str, object], str]] = {
    "blocks": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "blocks of a family that lists them": ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "num_hidden_layers"),
    "blocks of another name": ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer"),
    "blocks in lists": ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, "attention_types"),
    "more blocks than any model has": ({"num_hidden_layers": 1 << 18}, "num_hidden_layers"),
    "no blocks": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "blocks in words": ({"num_hidden_layers": "all"}, "num_hidden_layers"),
    "labels": ({"num_labels": 10**9}, "num_labels"),
    "width": ({"hidden_size": 1 << 62}, ""),
    "a width that tensors can have": ({"hidden_size": 1 << 31}, "hidden_size 2147483648"),
    "a width that memory may have room for": ({"hidden_size": 1 << 28}, "hidden_size 268435456"),
    "intermediate width": ({"intermediate_size": 1 << 28}, "intermediate_size 268435456"),
    "head size": ({"head_dim": 1 << 40}, ""),
    "a head size that tensors can have": ({"head_dim": 1 << 26}, "head_dim 67108864"),
    "heads": ({"num_key_value_heads": 1 << 28}, "num_key_value_heads 268435456"),
    "vocabulary": ({"vocab_size": -7}, ""),
    "a vocabulary that tensors can have": ({"vocab_size": 1 << 31}, "vocab_size 2147483648"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 1 << 30, "num_experts_per_tok": 2}, "num_local_experts"),
    "a router": ({"model_type": "mixtral", "num_local_experts": 1 << 16, "hidden_size": 1 << 16},
                 "chooses among 65536 experts by 65536 channels"),
}  # fmt: skip
"""What is changed in the configuration of a tiny Llama, and what beside config.json the error names."""

DISCOVERED = """
import json, resource, sys, time
from pathlib import Path
from quantcli.errors import ModelError
from quantcli.model.discovery import discover

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

place = Path(sys.argv[1])
discover(place)
before = peak()
content = json.loads((place / "config.json").read_text())
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # else a failure would take the machine's memory
for name, (changes, named) in json.loads(sys.argv[2]).items():
    (place / "config.json").write_text(json.dumps(content | changes))
    started = time.process_time()
    try:
        discover(place)
        sys.exit(f"{name} was read")
    except ModelError as error:
        assert "config.json" in str(error) and named in str(error) and error.remedy, (name, str(error))
        assert error.exit_code == 3 and len(str(error)) < 1000, name
    print(name, peak() - before, "MB", round(time.process_time() - started, 1), "s", flush=True)
    assert time.process_time() - started < 20, name
    assert peak() - before < 500, name
"""


def test_configurations_of_impossible_models_take_little_memory_and_time(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    arguments = [str(tmp_path), json.dumps(SIZES)]
    run = subprocess.run([sys.executable, "-c", DISCOVERED, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_configuration_may_ask_for_the_channels_of_the_largest_models(tiny_llama: Path, tmp_path: Path) -> None:
    """The widths of Llama 3.1 405B, two blocks of it."""
    content = json.loads((tiny_llama / "config.json").read_text())
    content |= {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "head_dim": 128,
                "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert discover(tmp_path).width == 16384


HOSTILE = """
import json, os, resource, struct, sys, time
from pathlib import Path
from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.gguf_header import check_header
import torch, gguf

place = Path(sys.argv[1])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

def weights(header, length=None):
    (place / "model.safetensors").write_bytes(struct.pack("<Q", length or len(header)) + header)
    Checkpoint(place)

def content(data):
    (place / "config.json").write_bytes(data)
    read_json(place / "config.json")

def sparse(name, use):
    with open(place / name, "wb") as file:
        file.write(struct.pack("<Q", 1 << 36))
        file.truncate(1 << 37)
    use()

def array(kind, count, data=b""):
    key = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    (place / "m.gguf").write_bytes(head + struct.pack("<IIQ", 9, kind, count) + data)
    check_header(place / "m.gguf")

cases = {
    "lists in lists": lambda: weights(b'{"a":' + b"[" * (30 << 20)),
    "empty lists": lambda: weights(b'{"a":[' + b"[]," * (10 << 20) + b"[]]}"),
    "a header that is a file": lambda: sparse("model.safetensors", lambda: Checkpoint(place)),
    "a length without a header": lambda: weights(b"{}", (1 << 63) + 5),
    "numbers": lambda: content(b'{"a":[' + b"1," * (31 << 20) + b"1]}"),
    "a number": lambda: content(b'{"a":' + b"1" * (60 << 20) + b"}"),
    "nothing but space": lambda: sparse("config.json", lambda: read_json(place / "config.json")),
    "as many elements as fit into 64 bits": lambda: array(0, (1 << 64) - 1),
    "as many strings": lambda: array(8, (1 << 64) - 1),
    "elements that are there": lambda: array(0, 8 << 20, b"0" * (8 << 20)),
}
before = peak()
for name, case in cases.items():
    started = time.process_time()
    try:
        case()
        sys.exit(f"{name} was read")
    except ModelError as error:
        assert len(str(error)) < 1000, name
    print(name, peak() - before, "MB", round(time.process_time() - started, 1), "s", flush=True)
    assert time.process_time() - started < 20, name
    assert peak() - before < 500, name
"""


def test_hostile_files_take_little_memory_and_time(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    run = subprocess.run([sys.executable, "-c", HOSTILE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
