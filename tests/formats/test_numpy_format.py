"""Dictionaries of arrays: what numpy.load sees, what comes back, and files that want to do something else."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file
from tiny_exports import Export, export_tiny

from quantcli.errors import ModelError, VerificationError
from quantcli.formats import npy
from quantcli.formats.ascend import type_name
from quantcli.formats.npy import refusal
from quantcli.model import npy_file, npy_names
from quantcli.model.npy_dictionary import DictionaryWriter, read_places
from quantcli.model.npy_file import NpyCheckpoint
from quantcli.model.npy_names import FILES, name_of, place_of
from quantcli.model.structure import Linear
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme

STATIC = Scheme(8, activations="static", activations_symmetric=False)
CASES: dict[str, tuple[Scheme, AttentionScheme | None]] = {
    "W8A8": (STATIC, AttentionScheme(kv="int8", kv_symmetric=False)),
    "W8A8 dynamic": (Scheme(8, activations="dynamic"), AttentionScheme(heads=True)),
    "W8A8 mix": (Scheme(8, activations="mix"), None),
    "W8A16": (Scheme(8, symmetric=False), None),
    "W8A16 tensor": (Scheme(8, granularity="tensor"), None),
    "W4A16": (Scheme(4, symmetric=False), None),
    "W4A16 g32": (Scheme(4, granularity="group", group_size=32), None),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Q = "model.layers.0.self_attn.q_proj"
OUT = "model.layers.0.self_attn.o_proj"


def dictionaries(folder: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """All files as numpy itself reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {file.stem: np.load(file, allow_pickle=True).item() for file in sorted(folder.glob("*.npy"))}


def write(path: Path, entries: dict[str, np.ndarray[Any, Any]]) -> None:
    with path.open("wb") as file:
        writer = DictionaryWriter(file)
        for key, array in entries.items():
            writer.add(key, array)
        writer.close()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_numpy_loads_is_what_ascend_holds(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    scheme, attention = CASES[name]
    made = export_tiny(tmp_path, scheme, "qwen2", dtype=dtype, attention=attention, form="numpy")
    other = replace(made, folder=tmp_path / "ascend", form="ascend")
    other.write(other.folder)
    found = dictionaries(made.folder)
    tensors = load_file(other.folder / "quant_model_weights.safetensors")
    assert sum(map(len, found.values())) == len(tensors)
    for tensor_name, tensor in tensors.items():
        file, key = place_of(tensor_name)
        array = found[file.removesuffix(".npy")][key]
        wanted = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert (array.dtype, array.shape) == (wanted.numpy().dtype, tuple(tensor.shape)), tensor_name
        assert np.array_equal(array, wanted.numpy()), tensor_name
    assert found["quant_weight"][Q].dtype == np.int8
    assert np.array_equal(found["others"][f"{Q}.bias"], tensors[f"{Q}.bias"].float().numpy())
    reader, by_other = made.reader(), other.reader()
    assert (reader.schemes, reader.attention) == (by_other.schemes, by_other.attention)
    for module in made.store.schemes:
        one, two = (read.read_linear(module).tensors() for read in (reader, by_other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[part].double(), two[part].double()) for part in one)
    embedding = "model.embed_tokens.weight"
    read = reader.read([embedding])[embedding]
    assert read.dtype == dtype
    assert torch.equal(read, tensors[embedding])
    assert made.verify().linears == 14
    assert "itself" in verify_path(made.folder)["checked against"]


def test_the_files_are_the_same_bytes_each_time_and_are_kept(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, STATIC, dtype=torch.bfloat16, form="numpy")
    names = [file.name for file in made.write(tmp_path / "again")]
    assert names[-1] == "config.json"
    assert {file.name for file in (tmp_path / "again").iterdir()} == set(names)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (made.folder / name).read_bytes()
    before = {name: (tmp_path / "again" / name).stat().st_ino for name in names if name.endswith(".npy")}
    made.write(tmp_path / "again")
    assert before == {name: (tmp_path / "again" / name).stat().st_ino for name in before}
    (tmp_path / "again" / "deq_scale.npy").unlink()
    made.write(tmp_path / "again")
    assert all((tmp_path / "again" / n).read_bytes() == (made.folder / n).read_bytes() for n in before)


@pytest.mark.parametrize(
    "name",
    [f"{Q}.{suffix}" for suffix in ("weight", "bias", "deq_scale", "quant_bias", "input_scale", "weight_offset")]
    + [f"{Q}.kv_cache_scale", "model.norm.weight", "model.layers.0.final_layer_norm.bias", "lm_head.weight"]
    + ["model.layers.0.self_attn.fa_q.offset", "weight", "model.layers.0.mlp.gate.e_score_correction_bias"],
)
def test_every_name_has_one_place(name: str) -> None:
    file, key = place_of(name)
    assert file in FILES
    assert name_of(file, key) == name


def test_what_has_no_place_is_refused() -> None:
    linear = Linear("x", 64, 64)
    assert "fp8" in refusal(linear, Scheme(8, activations="dynamic", type="float"))
    assert "W4A8" in refusal(linear, Scheme(4, activations="dynamic"))
    assert "Conv1D" in refusal(replace(linear, transposed=True), Scheme(8))
    assert not any(refusal(linear, scheme) for scheme, _ in CASES.values())


def test_conversions_keep_codes_and_dtypes(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, Scheme(8), dtype=torch.bfloat16, form="compressed-tensors", kept=[OUT])
    convert_checkpoint(made.folder, "numpy", tmp_path / "numpy")
    convert_checkpoint(tmp_path / "numpy", "compressed-tensors", tmp_path / "back")
    one, other = (load_file(folder / "model.safetensors") for folder in (made.folder, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one)
    assert (tmp_path / "numpy" / npy_names.ROUNDED).is_file()
    assert not (tmp_path / "back" / npy_names.ROUNDED).exists()
    # another checkpoint in its place, and back
    convert_checkpoint(made.folder, "ascend", tmp_path / "numpy", overwrite=True)
    assert not list((tmp_path / "numpy").glob("*.npy"))
    convert_checkpoint(made.folder, "numpy", tmp_path / "numpy", overwrite=True)
    assert verify_path(tmp_path / "numpy")["linears"] == 13


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (STATIC, "W8A8"),
        (Scheme(8, activations="static"), "W8A8"),
        (Scheme(8, symmetric=False), "W8A16"),
        (Scheme(4, granularity="group", group_size=32), "W4A16"),
        (Scheme(4, symmetric=False, granularity="group", group_size=32), "W4A16"),
    ],
)
def test_without_a_record_dictionaries_tell_the_scheme_where_only_one_has_them(
    scheme: Scheme, kind: str, tmp_path: Path
) -> None:
    made = export_tiny(
        tmp_path, scheme, dtype=torch.bfloat16, form="numpy", kept=[OUT], attention=AttentionScheme(kv="int8")
    )
    by_record = made.reader()
    (made.folder / "quantization.json").unlink()
    reader = made.reader()
    assert (reader.schemes, reader.attention) == (by_record.schemes, by_record.attention)
    assert {type_name(scheme) for scheme in reader.schemes.values()} == {kind}
    one, two = (read.read_linear(Q).tensors() for read in (reader, by_record))
    assert all(torch.equal(one[part], two[part]) for part in two)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, activations="dynamic"), Scheme(4)])
def test_without_a_record_what_looks_alike_is_refused(scheme: Scheme, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, scheme, form="numpy")
    (made.folder / "quantization.json").unlink()
    with pytest.raises(ModelError, match=r"has no quantization.json, and dictionaries do not say"):
        made.reader()


def test_codes_that_a_bias_has_replaced_are_named(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, STATIC, "qwen2", form="numpy")
    (made.folder / "quantization.json").unlink()
    changed(made.folder / "quant_weight.npy", lambda entries: entries.update({Q: np.zeros(64, np.float32)}))
    with pytest.raises(ModelError, match=r"holds no codes of .*q_proj, but it has scales"):
        made.reader()


# ------------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_tiny(
        tmp_path_factory.mktemp("whole"), STATIC, "qwen2", dtype=torch.bfloat16, form="numpy",
        attention=AttentionScheme(kv="int8"),
    )  # fmt: skip


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    entries = np.load(file, allow_pickle=True).item()
    change(entries)
    write(file, entries)


def test_a_changed_array_is_found(whole: Export) -> None:
    for file in sorted(whole.folder.glob("*.npy")):
        content = file.read_bytes()
        key = next(iter(np.load(file, allow_pickle=True).item()))

        def flip(entries: dict[str, Any], key: str = key) -> None:
            entries[key].reshape(-1).view(np.uint8)[1 if entries[key].itemsize > 1 else 0] ^= 1

        for change in (
            flip,
            lambda entries, key=key: entries.pop(key),
            lambda entries, key=key: entries.update({key: entries[key].astype(np.float64)}),
            lambda entries, key=key: entries.update({key: entries[key][..., None]}),
            lambda entries, key=key: entries.update({f"{key}x": entries[key]}),
        ):
            changed(file, change)
            with pytest.raises(VerificationError):
                whole.verify()
            file.write_bytes(content)
        file.unlink()
        with pytest.raises(VerificationError):
            whole.verify()
        file.write_bytes(content)
    assert whole.verify().linears == 14


CLAIMS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no linear": ("quantization.json", lambda d: d["linears"].pop(Q)),
    "another scheme": ("quantization.json", lambda d: d["linears"][Q].update(activations="dynamic")),
    "no cache": ("quantization.json", lambda d: d.update(attention=None)),
    "one more": ("quantization.json", lambda d: d.update(group_size=32)),
    "a method": ("config.json", lambda d: d.update(quantization_config={})),
    "a dtype": ("bfloat16.json", lambda d: d["bfloat16"].pop()),
    "no tensor": ("bfloat16.json", lambda d: d["bfloat16"].append("x")),
    "codes": ("bfloat16.json", lambda d: d["bfloat16"].append(f"{Q}.weight")),
    "no list": ("bfloat16.json", lambda d: d.update(bfloat16={"x": 1})),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_claim_is_found(claim: str, whole: Export) -> None:
    name, change = CLAIMS[claim]
    file = whole.folder / name
    content = file.read_text()
    try:
        parsed = json.loads(content)
        change(parsed)
        file.write_text(json.dumps(parsed))
        with pytest.raises(VerificationError):
            whole.verify()
    finally:
        file.write_text(content)


def test_a_record_that_does_not_fit_is_not_read(whole: Export) -> None:
    file = whole.folder / "quantization.json"
    content = file.read_text()
    for change, match in [
        (lambda d: d["linears"].pop(Q), "disagree about"),
        (lambda d: d["linears"].update({"model.x": d["linears"][Q]}), "no linear of this model"),
        (lambda d: d["linears"][Q].update(colour=3), "not understood"),
        (lambda d: d.pop("linears"), "not understood"),
    ]:
        parsed = json.loads(content)
        change(parsed)
        file.write_text(json.dumps(parsed))
        with pytest.raises(ModelError, match=match):
            whole.reader()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ModelError, match="no regular file"):
        whole.reader()
    file.unlink()
    file.symlink_to("nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        whole.reader()
    file.unlink()
    file.write_text(content)


# ------------------------------------------------------------------------------------------------------ any file

KINDS = st.sampled_from([np.int8, np.int32, np.int64, np.float32, np.float16, np.uint8, np.bool_])
ENTRIES = st.dictionaries(
    st.text(max_size=12),
    KINDS.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, max_dims=3, max_side=4))),
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(entries=ENTRIES, protocol=st.sampled_from([3, 4]))
def test_both_writers_are_read_by_both_readers(
    entries: dict[str, Any], protocol: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ours, theirs = (tmp_path_factory.mktemp("any") / name for name in ("ours.npy", "theirs.npy"))
    write(ours, entries)
    np.save(theirs, np.array(entries, dtype=object))
    head = theirs.read_bytes()
    head = head[: head.index(b"\n") + 1]
    outer = np.empty((), dtype=object)
    outer[()] = entries
    theirs.write_bytes(head + pickle.dumps(outer, protocol=protocol))
    for path in (ours, theirs):
        places, loaded = read_places(path), np.load(path, allow_pickle=True).item()
        assert places.keys() == loaded.keys() == entries.keys()
        with path.open("rb") as file:
            for key, array in entries.items():
                for found in (places[key].read(file), loaded[key]):
                    assert (found.dtype, found.shape) == (array.dtype, array.shape)
                    assert found.tobytes() == array.tobytes()


def test_an_array_in_the_order_of_fortran_is_read(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4))
    np.save(tmp_path / "x.npy", {"a": array}, allow_pickle=True)  # type: ignore[arg-type]
    with (tmp_path / "x.npy").open("rb") as file:
        assert np.array_equal(read_places(tmp_path / "x.npy")["a"].read(file), array)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("shape", [(5, 9), (4, 7), (3,), (0, 4), (2, 3, 7)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_tensor_of_bfloat16_is_read_in_parts(
    shape: tuple[int, ...], order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy_file, "_PIECE", 7)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    array = np.array(tensor.float().numpy(), order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "others.npy", {"n.bias": array})  # type: ignore[arg-type]
    (tmp_path / "bfloat16.json").write_text('{"bfloat16": ["n.bias"]}', encoding="utf-8")
    assert torch.equal(NpyCheckpoint(tmp_path).read(["n.bias"])["n.bias"], tensor)
    if array.size:
        array[(-1,) * array.ndim] += 1e-6
        np.save(tmp_path / "others.npy", {"n.bias": array})  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="not bfloat16"):
            NpyCheckpoint(tmp_path).read(["n.bias"])


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    for number, content in enumerate([Evil(tmp_path / "made"), {"a": Evil(tmp_path / "made")}, {"a": 1}, [1], {1: 2},
                                      {"a": np.array(["x"], dtype=object)}, {"a": np.zeros(2, ">f4")},
                                      {"a": np.zeros(2, "c16")}, {"a": {"b": np.zeros(1)}}]):  # fmt: skip
        file = tmp_path / f"{number}.npy"
        np.save(file, content, allow_pickle=True)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="no dictionary of arrays"):
            read_places(file)
    assert not (tmp_path / "made").exists()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_are_typed_errors_or_dictionaries(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x.npy"
    entries = {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.ones(2, np.float32)}
    if data.draw(st.booleans()):
        write(file, entries)
    else:
        np.save(file, entries, allow_pickle=True)  # type: ignore[arg-type]
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "swap"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        content[at:] = data.draw(st.binary(max_size=40))
    file.write_bytes(content)
    try:
        for place in read_places(file).values():
            assert place.offset + place.nbytes <= len(content)
    except ModelError:
        pass


def test_sizes_that_leave_the_file_and_pickles_without_end_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.npy", {"a": np.arange(64, dtype=np.int8)})
    content = (tmp_path / "x.npy").read_bytes()
    for wrong in (content.replace(b"B\x40\x00\x00\x00", b"B\xff\xff\xff\xff"), content + b"x", content[:-1],
                  content.replace(b"B\x40\x00\x00\x00", b"\x8e\xff\xff\xff\xff")):  # fmt: skip
        (tmp_path / "y.npy").write_bytes(wrong)
        with pytest.raises(ModelError, match="no dictionary of arrays"):
            read_places(tmp_path / "y.npy")
    (tmp_path / "y.npy").write_bytes(content[:130] + b"N" * (1 << 20))
    with pytest.raises(ModelError, match="nested too deeply"):
        read_places(tmp_path / "y.npy")
    (tmp_path / "y.npy").write_bytes(content[:130] + b"X" + b"\xff\xff\xff\x7f")
    with pytest.raises(ModelError, match="no name"):
        read_places(tmp_path / "y.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ModelError, match="no regular file"):
        read_places(tmp_path / "pipe.npy")


def test_a_key_twice_and_a_tensor_in_the_wrong_file_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        writer = DictionaryWriter(file)
        for _ in range(2):
            writer.add("a", np.zeros(1, np.int8))
        writer.close()
    with pytest.raises(ModelError, match="twice"):
        read_places(tmp_path / "x.npy")
    (tmp_path / "x.npy").unlink()
    write(tmp_path / "others.npy", {"model.norm.weight": np.zeros(1, np.float32)})
    with pytest.raises(ModelError, match="does not belong there"):
        NpyCheckpoint(tmp_path)
    assert npy.FILES[-1] == "bfloat16.json"
