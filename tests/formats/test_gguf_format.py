"""GGUF: codes and scales come back, the blocks are those that the gguf package and transformers read, what llama.cpp
cannot compute is refused, and damage is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_exports import Export, export_tiny
from tiny_models import save_tiny_model, tiny_tokenizer
from torch import Tensor

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats import gguf
from quantcli.formats.engines import verdicts
from quantcli.formats.store import StoredLinear
from quantcli.model.discovery import discover
from quantcli.model.gguf_tokenizer import tokenizer_keys
from quantcli.model.structure import Linear
from quantcli.pipeline.plan import make_plan
from quantcli.quant.grid import QuantizedWeight, dequantize
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe.schema import Recipe

SCHEMES = {
    "W8": Scheme(8, float16_scales=True),
    "W8 tensor": Scheme(8, granularity="tensor", float16_scales=True),
    "W8 g32": Scheme(8, granularity="group", group_size=32, float16_scales=True),
    "W4": Scheme(4, float16_scales=True),
    "W4 g64": Scheme(4, granularity="group", group_size=64, float16_scales=True),
    "W4 asym": Scheme(4, symmetric=False, float16_scales=True),
    "W4 g32 asym": Scheme(4, symmetric=False, granularity="group", group_size=32, float16_scales=True),
}
TYPES = {"W8": "Q8_0", "W4": "Q4_0", "W4 asym": "Q4_1"}
UP, DOWN, QUERY = (f"model.layers.1.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))

Made = Callable[..., Export]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(name of a scheme, dtype) → an export of the tiny llama with one linear in float, not to be changed."""
    known: dict[tuple[str, torch.dtype], Export] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16) -> Export:
        if (name, dtype) not in known:
            place = tmp_path_factory.mktemp("gguf")
            known[name, dtype] = export_tiny(
                place, SCHEMES[name], dtype=dtype, form="gguf", kept=[DOWN], with_tokenizer=True
            )
        return known[name, dtype]

    return get


def copy_of(export: Export, place: Path) -> Export:
    shutil.rmtree(place / "copy", ignore_errors=True)
    shutil.copytree(export.folder, place / "copy")
    return replace(export, folder=place / "copy")


def parts_of(export: Export) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in package.GGUFReader(export.folder / "model.gguf").tensors}


def keys_of(export: Export) -> dict[str, Any]:
    fields = package.GGUFReader(export.folder / "model.gguf").fields
    return {key: field.contents() for key, field in fields.items()}


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_come_back(name: str, dtype: torch.dtype, made: Made) -> None:
    export, scheme = made(name, dtype), SCHEMES[name]
    reader = export.reader()
    assert reader.schemes == export.store.schemes
    assert set(reader.schemes.values()) == {scheme}
    for module in export.store.schemes:
        found, stored = reader.read_linear(module).weight, export.store.read(module).weight
        assert torch.equal(found.codes, stored.codes)
        assert found.scale.dtype == torch.float16
        assert torch.equal(found.scale.float(), stored.scale.float())
        assert found.zero_point is None if scheme.symmetric else torch.equal(found.zero_point, stored.zero_point)
    original = export.source.checkpoint
    quantized = {export.source.weights[module] for module in export.store.schemes}
    for weight in original.entries.keys() - quantized:
        assert torch.equal(reader.read([weight])[weight], original.read([weight])[weight])
    assert export.verify().linears == 13
    kinds = {tensor.tensor_type.name for tensor in parts_of(export).values() if tensor.tensor_type.name[0] == "Q"}
    assert kinds == {kind for short, kind in TYPES.items() if (scheme.bits, scheme.symmetric) == (
        SCHEMES[short].bits, SCHEMES[short].symmetric)}  # fmt: skip


@pytest.mark.parametrize("name", ["W8", "W4 g64", "W4 asym", "W4 g32 asym"])
def test_transformers_reads_the_same_model(name: str, made: Made) -> None:
    """transformers has its own way from the blocks and rows of a GGUF file to parameters."""
    export = made(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        export.folder, gguf_file="model.gguf", dtype=torch.float32
    )
    reader, read = export.reader(), model.state_dict()
    for parameter in export.structure.parameters:
        module = parameter.removesuffix(".weight")
        if module not in reader.schemes:
            assert torch.equal(read[parameter], reader.read([parameter])[parameter].float())
            continue
        weight = reader.read_linear(module).weight
        exact, step = dequantize(weight), weight.scale.float().abs().max()
        bound = 0.0 if SCHEMES[name].symmetric else float(step) / 136
        assert (read[parameter] - exact).abs().max() <= bound
    assert model.config.num_key_value_heads == 2


@given(
    scale=st.floats(2.0**-17, 64.0),
    negative=st.booleans(),
    zero=st.integers(-8, 7),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_a_lowest_value_is_rounded_by_less_than_the_documented_part_of_a_step(
    scale: float, negative: bool, zero: int, seed: int
) -> None:
    half = torch.tensor([[-scale if negative else scale]]).half()
    codes = torch.randint(-8, 8, (1, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    stored = StoredLinear(QuantizedWeight(codes, half, torch.tensor([[zero]], dtype=torch.int8)))
    scheme = SCHEMES["W4 asym"]
    encoded = gguf.encode(stored, scheme, "float32", None, Linear("x", codes.shape[1], len(codes)))
    values = package.dequantize(encoded["weight"].numpy(), package.GGMLQuantizationType.Q4_1)
    assert np.abs(values - dequantize(stored.weight).numpy()).max() <= abs(half.item()) / 136
    decoded = gguf.decode(encoded, scheme).weight
    assert (decoded.zero_point, decoded.scale) == (zero, half)
    assert torch.equal(decoded.codes, codes)


def test_the_same_export_has_the_same_bytes(made: Made, tmp_path: Path) -> None:
    export = made("W8")
    export.write(tmp_path / "again")
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (export.folder / "model.gguf").read_bytes()


def test_files_of_others_are_read_by_their_types(made: Made, tmp_path: Path) -> None:
    """Without quantization.json a scale is one of 32 inputs, and types of other grids are read as floats."""
    export = copy_of(made("W8"), tmp_path)
    (export.folder / "quantization.json").unlink()
    reader = export.reader()
    assert {scheme.name for scheme in reader.schemes.values()} == {"W8A16 g32"}
    codes = reader.read_linear(QUERY).weight
    stored = export.store.read(QUERY).weight
    assert torch.equal(codes.codes, stored.codes)
    assert torch.equal(codes.scale, stored.scale.half().expand(-1, 2))

    (tmp_path / "other").mkdir()
    shutil.copy(export.folder / "config.json", tmp_path / "other")
    shutil.copytree(export.folder, tmp_path / "other", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.gguf"))
    expected = requantized(export, tmp_path / "other" / "some.gguf", package.GGMLQuantizationType.Q5_0)
    other = replace(export, folder=tmp_path / "other").reader()
    assert other.schemes == {}
    assert torch.equal(other.read([f"{UP}.weight"])[f"{UP}.weight"], expected.bfloat16())


def requantized(export: Export, path: Path, kind: package.GGMLQuantizationType) -> Tensor:
    """The file with all matrices of blocks in another type; what the weight of UP became."""
    reader = package.GGUFReader(export.folder / "model.gguf")
    writer = package.GGUFWriter(path, "llama")
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "Q8_0":
            data = package.quantize(package.dequantize(tensor.data, tensor.tensor_type), kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
            if tensor.name == "blk.1.ffn_up.weight":
                up = torch.from_numpy(package.dequantize(data, kind))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return up


# -------------------------------------------------------------------------------------------------------- refusals


LINEAR = Linear("model.layers.0.mlp.up_proj", 64, 96)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(3), "4 bits, and symmetric ones of 8"),
        (Scheme(2), "4 bits, and symmetric ones of 8"),
        (Scheme(8, symmetric=False), "4 bits, and symmetric ones of 8"),
        (Scheme(8, activations="dynamic"), "weights alone"),
        (Scheme(4, granularity="group", group_size=16), "multiples of"),
        (Scheme(4, granularity="group", group_size=48), "multiples of"),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else "",
)
def test_schemes_that_have_no_type_are_refused(scheme: Scheme, reason: str) -> None:
    assert reason in gguf.refusal(LINEAR, scheme)


def test_widths_that_blocks_do_not_fill_are_refused() -> None:
    assert "multiples of" in gguf.refusal(replace(LINEAR, in_features=80), SCHEMES["W8"])
    assert "Conv1D" in gguf.refusal(replace(LINEAR, transposed=True), SCHEMES["W8"])
    assert gguf.attention_refusal(AttentionScheme("int8"))


def planned(model: Path, **export: Any) -> Any:
    recipe = Recipe.model_validate({
        "model": {"path": str(model)},
        "quantize": {"weights": {"bits": 8}, "activations": {"bits": 16}},
        "export": {"formats": ["gguf"]},
        "output": "unused",
    })  # fmt: skip
    return make_plan(recipe, model, discover(model))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("falcon", {}, "model types llama, mistral, qwen2, qwen3, .*, and this one is falcon"),
        ("mixtral", {}, "this one is mixtral"),
        ("gemma2", {}, "query_pre_attn_scalar: 256"),
        ("phi3", {"sliding_window": 8}, "sliding_window: 8"),
        ("mistral", {}, "sliding_window: 8"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embeddings of type dynamic",
        ),
        ("llama", {"vocab_size": 384}, "384 rows of the embedding for the"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused_when_planning(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model", with_tokenizer=True, **changes)
    with pytest.raises(RecipeError, match=reason):
        planned(model)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs a tokenizer, .*: there is no file of one"):
        planned(save_tiny_model("llama", tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c d"]}}'),
        ("tokenizer.json", '{"model": {"type": "none"}}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 3}], "model": '),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_a_fault_of_the_model(file: str, content: str, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    (model / file).write_text(content)
    with pytest.raises(ModelError, match=re.escape(str(model / file))):
        planned(model)


def test_tokens_beyond_the_embedding_are_counted_by_their_numbers(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    change_tokenizer(tmp_path, lambda content: content["model"]["vocab"].update(far=900))
    with pytest.raises(ModelError, match="has 600 rows of the embedding for the 901 tokens"):
        tokenizer_keys(tmp_path, 600)
    tokens = tokenizer_keys(tmp_path, 901)["tokenizer.ggml.tokens"]
    assert (tokens[899], tokens[900]) == ("[PAD899]", "far")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    monkeypatch.setattr("quantcli.model.gguf_layout.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'quantcli\[gguf\]'"):
        planned(model)


def change_tokenizer(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "the rules by which this tokenizer cuts words"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "the rules by which this tokenizer cuts words"),
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda c: c["model"].update(ignore_merges=True), "the rules by which this tokenizer cuts words"),
        (lambda c: c["post_processor"]["single"].append({"SpecialToken": {"id": "<s>", "type_id": 0}}), "bos and eos"),
    ],
)
def test_tokenizers_that_llama_cpp_has_no_rules_for_are_refused(
    change: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        tokenizer_keys(change_tokenizer(tmp_path, change), 512)


@pytest.mark.parametrize(
    "rules",
    [
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": False}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}},
    ],
)
def test_other_treatments_of_spaces_are_refused(rules: dict[str, Any], tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)

    def change(content: dict[str, Any]) -> None:
        content["model"]["byte_fallback"] = True
        content.update({"normalizer": None, "pre_tokenizer": None} | rules)

    with pytest.raises(ModelError, match="no rules like those by which this tokenizer treats spaces"):
        tokenizer_keys(change_tokenizer(tmp_path, change), 512)


def test_every_token_has_its_type_and_the_embedding_its_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    count = len(tokenizer)
    keys = tokenizer_keys(tmp_path, count + 3)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[:count] == tokenizer.convert_ids_to_tokens(range(count))
    assert tokens[count:] == [f"[PAD{count + i}]" for i in range(3)]
    assert types[:3] == [3, 3, 3]
    assert set(types[3 : count - 1]) == {1}
    assert types[count - 1 :] == [4, 5, 5, 5]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


def test_the_engine_is_named() -> None:
    found = verdicts([(LINEAR, SCHEMES["W4"])], None, ["gguf"])
    assert [(verdict.engine, verdict.loads) for verdict in found] == [("llama.cpp", True), ("SGLang", True)]


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["W8", "W4 g64", "W4 g32 asym"])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_tensor_is_found(name: str, place: float, bit: int, made: Made, tmp_path: Path) -> None:
    export = copy_of(made(name), tmp_path)
    file = export.folder / "model.gguf"
    parts = sorted(parts_of(export).values(), key=lambda tensor: tensor.data_offset)
    position = int(place * sum(tensor.n_bytes for tensor in parts))
    for tensor in parts:  # gaps between tensors mean nothing
        if position < tensor.n_bytes:
            break
        position -= tensor.n_bytes
    data = bytearray(file.read_bytes())
    data[tensor.data_offset + position] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(VerificationError):
        export.verify()


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda c: c.update(num_key_value_heads=4)),
        ("config.json", lambda c: c.update(rms_norm_eps=1e-3)),
        ("config.json", lambda c: c["rope_parameters"].update(rope_theta=1e6)),
        ("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
        ("quantization.json", lambda c: c["linears"].pop(UP)),
        ("quantization.json", lambda c: c["linears"][UP].update(bits=8)),
        ("tokenizer.json", lambda c: c["model"]["vocab"].update({"a": 68, "b": 67})),
    ],
)
def test_files_beside_the_weights_that_say_something_else_are_found(
    file: str, change: Callable[[dict[str, Any]], Any], made: Made, tmp_path: Path
) -> None:
    export = copy_of(made("W4 g64"), tmp_path)
    export.verify()
    change_json(export.folder / file, change)
    with pytest.raises(VerificationError):
        export.verify()


@pytest.mark.parametrize("kept", [0, 10, 2000, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept: float, made: Made, tmp_path: Path) -> None:
    export = copy_of(made("W4 g64"), tmp_path)
    file = export.folder / "model.gguf"
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(VerificationError):
        export.verify()
    with pytest.raises(ModelError):
        export.reader()


def test_our_own_reader_refuses_what_it_would_misread(made: Made, tmp_path: Path) -> None:
    export = copy_of(made("W4 g32 asym"), tmp_path)
    change_json(export.folder / "quantization.json", lambda c: c["linears"][UP].update(group_size=64))
    with pytest.raises(ModelError, match="Blocks that share a scale"):
        export.reader().read_linear(UP)
    change_json(export.folder / "quantization.json", lambda c: c["linears"][UP].update(bits=8, symmetric=True))
    with pytest.raises(ModelError, match="and it is Q4_1"):
        export.reader()
    change_json(export.folder / "quantization.json", lambda c: c["linears"].pop(UP))
    with pytest.raises(ModelError, match="disagree"):
        export.reader()
