"""What is exported is what the store holds: read back by this program, by the format's own library, and as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from tiny_exports import FLOAT8, PACKED_WITH_ACTIVATIONS, SCHEMES, WEIGHT_ONLY, Export, export_tiny
from tiny_models import save_tiny_model
from torch import Tensor, nn

from quantcli.errors import RecipeError
from quantcli.formats import compressed_tensors, export
from quantcli.formats.store import StoredLinear
from quantcli.model.discovery import discover
from quantcli.pipeline.plan import make_plan
from quantcli.quant.grid import dequantize
from quantcli.recipe.schema import Recipe

SCHEME = pytest.mark.parametrize("name", SCHEMES)
Exported = Callable[..., Export]


def assert_same(found: StoredLinear, stored: StoredLinear) -> None:
    one, other = found.tensors(), stored.tensors()
    assert one.keys() == other.keys()
    for part, tensor in other.items():
        assert one[part].dtype == tensor.dtype, part
        assert torch.equal(one[part].view(torch.uint8), tensor.view(torch.uint8)), part


def files_of(made: Export) -> dict[str, Tensor]:
    return {name: t for file in made.folder.glob("*.safetensors") for name, t in load_file(file).items()}


@SCHEME
def test_our_reader_returns_the_store(name: str, exported: Exported) -> None:
    made = exported(name)
    reader = made.reader()
    assert reader.schemes == made.store.schemes
    assert set(reader.schemes.values()) == {SCHEMES[name]}
    for module in made.store.schemes:
        assert_same(reader.read_linear(module), made.store.read(module))
    assert made.verify().linears == len(made.store.schemes) == 14


@pytest.mark.parametrize("name", [n for n in (*WEIGHT_ONLY, *PACKED_WITH_ACTIVATIONS) if n not in FLOAT8])
def test_the_library_unpacks_the_store(name: str, exported: Exported) -> None:
    made, scheme, dtype = exported(name), SCHEMES[name], torch.bfloat16
    tensors = files_of(made)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    for module in made.store.schemes:
        stored = made.store.read(module).weight
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == module}
        assert torch.equal(unpack_from_int32(parts["weight_packed"], scheme.bits, stored.codes.shape), stored.codes)
        decompressed = PackedQuantizationCompressor.decompress(parts, group)
        if stored.zero_point is not None:
            zero = decompressed["weight_zero_point"]
            assert torch.equal(zero.view(stored.zero_point.shape), stored.zero_point)
        # (q − z)·s has to come out alike, since engines dequantize in the dtype of the scale
        assert decompressed["weight"].dtype == dtype
        assert torch.equal(decompressed["weight"], dequantize(stored, dtype))
        weight = made.source.weights[module]
        assert torch.equal(made.reader().read([weight])[weight], dequantize(stored, dtype))


@pytest.mark.parametrize("name", FLOAT8)
def test_the_library_has_the_codes_of_the_store_of_float8(name: str, exported: Exported) -> None:
    """Its compressor makes them from the float weights and these scales, its decompressor gives the weights back."""
    made = exported(name)
    tensors = files_of(made)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert group.format == config["format"] == infer_module_format(nn.Linear, group)
    compressor = BaseCompressor.get_value_from_registry(group.format)
    for module in made.store.schemes:
        codes, scale, _ = made.store.read(module).weight
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == module}
        assert parts["weight"].dtype == torch.float8_e4m3fn
        assert torch.equal(compressor.decompress(parts, group)["weight"], codes.to(scale.dtype) * scale)
        weight = made.source.checkpoint.read([made.source.weights[module]])[made.source.weights[module]].float()
        held = scale.float().view_as(parts["weight_scale"])
        theirs = compressor.compress({"weight": weight, "weight_scale": held}, group)["weight"]
        assert torch.equal(theirs.view(torch.uint8), codes.view(torch.uint8))


@SCHEME
def test_configuration_is_the_librarys_own(name: str, exported: Exported) -> None:
    made, scheme = exported(name), SCHEMES[name]
    content = json.loads((made.folder / "config.json").read_text())
    config = QuantizationConfig.model_validate(content["quantization_config"])
    (group,) = config.config_groups.values()
    assert group.weights.num_bits == scheme.bits
    assert group.weights.type == scheme.type
    assert group.weights.symmetric == scheme.symmetric
    assert group.weights.strategy == scheme.granularity
    assert group.weights.group_size == scheme.group_size
    assert (group.input_activations is None) == (scheme.activations == "none")
    if group.input_activations is not None:
        assert f"A{group.input_activations.num_bits} " in name
        assert group.input_activations.strategy == ("token" if scheme.activations == "dynamic" else "tensor")
        assert group.input_activations.type == scheme.type
        assert group.input_activations.dynamic == (scheme.activations == "dynamic")
        assert group.input_activations.symmetric == scheme.activations_symmetric
    assert config.quantization_status == "compressed"
    assert set(config.ignore) == {"lm_head", "model.embed_tokens"}
    original = json.loads((made.model / "config.json").read_text())
    del content["quantization_config"]
    assert content == original


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma3", "phi3", "opt", "falcon", "gpt-neox", "cohere"])
def test_everything_else_is_the_float_model_byte_for_byte(family: str, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A8 dynamic"], family, dtype=torch.bfloat16)
    float_tensors, tensors = load_file(made.model / "model.safetensors"), files_of(made)
    quantized = {made.source.weights[name] for name in made.store.schemes}
    others = {name for name in tensors if not name.endswith(".weight_scale")} - quantized
    assert others == set(float_tensors) - quantized
    for name in others:
        assert tensors[name].dtype == float_tensors[name].dtype
        assert torch.equal(tensors[name], float_tensors[name]), name
    biased = [linear for linear in made.linears.values() if linear.bias]
    assert all(f"{linear.name}.bias" in others for linear in biased)
    assert bool(biased) == (family in {"qwen2", "opt", "gpt-neox"})
    if made.structure.tied:
        assert made.structure.head not in tensors
    assert made.verify().other_tensors == len(others)


def test_a_tied_head_is_named_as_float_though_no_tensor_is_its_own(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A16"], "llama-tied")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    assert "lm_head.weight" not in files_of(made)


def test_linears_outside_the_blocks_are_named_as_float(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A16"], "opt")
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(config["ignore"])


def test_linears_kept_in_float_are_ignored_and_untouched(tmp_path: Path) -> None:
    kept = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    made = export_tiny(tmp_path, SCHEMES["W4A16 g32"], kept=kept)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert set(kept) < set(config["ignore"])
    original, tensors = load_file(made.model / "model.safetensors"), files_of(made)
    for name in kept:
        assert torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"])
    assert kept[0] not in made.reader().schemes
    assert made.verify().linears == 12


@pytest.mark.parametrize("name", ["W4A16 g32 asym", "W8A8 static asym"])
def test_shards_hold_the_same_tensors(
    name: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported(name)
    whole = files_of(made)
    monkeypatch.setattr(export, "SHARD_BYTES", 10_000)
    folder = tmp_path / "sharded"
    made.write(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 5
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in files:
        for tensor_name, tensor in load_file(file).items():
            assert index["weight_map"][tensor_name] == file.name
            tensors[tensor_name] = tensor
    assert tensors.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[key], whole[key]) for key in whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert Export(folder, made.model, made.structure, made.store, made.source).verify().linears == 14


def test_an_interrupted_export_goes_on_and_ends_with_the_same_bytes(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("W4A16 g32 asym")
    monkeypatch.setattr(export, "SHARD_BYTES", 10_000)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    order = [file.name for file in made.write(whole)]
    assert order[-1] == "config.json"  # an engine never finds half a checkpoint
    steps = export.export_checkpoint(cut, compressed_tensors, made.store, made.source, made.linears)
    next(steps)
    next(steps)
    steps.close()
    first = (cut / order[0]).stat().st_mtime_ns
    assert not (cut / "config.json").exists()
    made.write(cut)
    assert (cut / order[0]).stat().st_mtime_ns == first
    assert {f.name: f.read_bytes() for f in cut.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_what_stands_beside_the_weights_is_copied(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A16"], with_tokenizer=True)
    beside = {
        "LICENSE": "free",
        "chat_template.jinja": "{{ messages }}",
        "modeling_own.py": "x = 1",
        "vocab.txt": "a b",
    }
    for name, text in beside.items():
        (made.model / name).write_text(text)
    stale = ["pytorch_model.bin.index.json", "model.safetensors.index.json", "tf_model.h5.index.json"]
    stale += ["quant_config.json", "quantize_config.json", "quantization_config.json", "hf_quant_config.json"]
    stale += ["quantization.json", "quant_model_description.json", "quant_model_description_w8a8.json", "bfloat16.json"]
    stale += ["README.md", "training.log"]
    for name in stale:
        (made.model / name).write_text("{}")
    folder = tmp_path / "again"
    made.write(folder)
    for name, text in beside.items():
        assert (folder / name).read_text() == text
    names = {file.name for file in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names
    assert not names.intersection(stale)
    assert (folder / "tokenizer.json").read_bytes() == (made.model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "scale"),
    [("W4A16 g32", torch.bfloat16), ("W4A8 dynamic", torch.bfloat16), ("W8A8 static asym", torch.float32)],
)
def test_a_float32_model_can_be_exported_in_bfloat16(name: str, scale: torch.dtype, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES[name], cast="bfloat16")
    original, tensors = load_file(made.model / "model.safetensors"), files_of(made)
    assert original["model.norm.weight"].dtype == torch.float32
    for name in ("model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(tensors[name], original[name].bfloat16())
    scales = {t.dtype for name, t in tensors.items() if name.endswith("weight_scale")}
    assert scales == {scale}
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"
    made.verify()


def test_transposed_linears_are_refused_with_the_reason(tmp_path: Path) -> None:
    structure = discover(save_tiny_model("gpt2", tmp_path / "gpt2"))
    linear = next(structure.linears())
    assert "Conv1D" in compressed_tensors.refusal(linear, SCHEMES["W8A16"])
    recipe = Recipe.model_validate({"version": 1, "model": {"path": "gpt2"}, "quantize": {}, "output": "out"})
    with pytest.raises(RecipeError, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D"):
        make_plan(recipe, tmp_path / "gpt2", structure)
