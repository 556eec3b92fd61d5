"""Checkpoints that stand alone are scored as their runs were, and converted without a change of their codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_exports import Export, export_tiny
from tiny_models import save_tiny_model

from quantcli.errors import ModelError, OutputError, RecipeError
from quantcli.formats import export
from quantcli.formats.reader import _declared_dtype
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.skeleton import load_config, resolve_dtype
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.engine import run_recipe
from quantcli.pipeline.standalone import open_checkpoint, score_recipe
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe import load_recipe

FOUR = Scheme(4, granularity="group", group_size=32, float16_scales=True)
EIGHT = Scheme(8, granularity="group", group_size=32, float16_scales=True)
FOUR_ASYM = Scheme(4, symmetric=False, granularity="group", group_size=32, float16_scales=True)
DOWN = "model.layers.1.mlp.down_proj"


def scored(checkpoint: Path, prose: Path, original: Path | str | None = None, **model: Any) -> dict[str, Any]:
    text = {"dataset": "text", "path": str(prose), "sequence_length": 32, "windows": 4}
    recipe = {"model": {"path": str(checkpoint), **model}, "quantize": {}, "evaluate": {"perplexity": text}}
    return score_recipe(load_recipe(recipe | {"output": "unused"}), str(original) if original else None)


def made(place: Path, scheme: Scheme, form: str, **changes: Any) -> Export:
    return export_tiny(place, scheme, dtype=torch.bfloat16, form=form, with_tokenizer=True, **changes)


def codes_of(checkpoint: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    _, opened, _ = open_checkpoint(checkpoint)
    found = {name: opened.read_linear(name).weight for name in opened.schemes}
    return {name: (weight.codes, weight.scale.float()) for name, weight in found.items()}


def test_every_export_of_a_run_scores_as_the_run_did(static_recipe: Any, prose: Path, tmp_path: Path) -> None:
    recipe = static_recipe(tmp_path / "run") | {
        "quantize": {"weights": {"bits": 4, "granularity": "group", "group_size": 32}},
        "export": {"formats": ["compressed-tensors", "gptq", "awq", "gguf", "dense"]},
    }
    del recipe["calibration"]
    result = run_recipe(load_recipe(recipe))
    assert result.perplexity is not None
    original = Path(recipe["model"]["path"])
    for form in recipe["export"]["formats"]:
        found = scored(tmp_path / "run" / "export" / form, prose, original)
        for key in ("quantized", "float_model", "kl_divergence", "agreement", "increase", "tokens"):
            assert found[key] == result.perplexity[key], (form, key)
        assert found["format"] == form
    alone = scored(tmp_path / "run" / "export" / "awq", prose)
    assert alone["quantized"] == result.perplexity["quantized"]
    assert alone["float_model"] is None
    assert alone["kl_divergence"] is None
    assert scored(original, prose)["quantized"] == result.perplexity["float_model"]


def test_the_float_model_beside_it_may_be_a_file_of_llama_cpp(tmp_path: Path, prose: Path) -> None:
    export_ = made(tmp_path / "export", FOUR, "gguf")
    alone = Path(shutil.copy(export_.folder / "model.gguf", tmp_path / "alone.gguf"))
    found = scored(export_.folder, prose, alone)
    assert found["float_model"] == scored(alone, prose)["quantized"]
    assert 0 <= found["kl_divergence"] < 1e-3  # the same weights, rounded to bfloat16 in the file's model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("starcoder2", {}),
        ("stablelm", {"use_qkv_bias": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("phi3", {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ],
)
def test_a_file_alone_scores_as_the_export_that_it_is_part_of(
    family: str, changes: dict[str, Any], tmp_path: Path, prose: Path
) -> None:
    export_ = made(tmp_path / "export", EIGHT, "gguf", family=family, **changes)
    alone = Path(shutil.copy(export_.folder / "model.gguf", tmp_path / "alone.gguf"))
    expected = scored(export_.folder, prose)["quantized"]["value"]
    assert scored(alone, prose)["quantized"]["value"] == pytest.approx(expected, rel=1e-3)


def test_ascend_holds_a_float32_model_whose_scales_another_format_has_in_float16(
    static_recipe: Any, tmp_path: Path
) -> None:
    recipe = static_recipe(tmp_path / "run") | {
        "quantize": {"weights": {"bits": 8, "granularity": "channel"}},
        "export": {"formats": ["ascend", "numpy", "gguf"]},
    }
    del recipe["calibration"], recipe["evaluate"]
    run_recipe(load_recipe(recipe))
    scales = {
        form: [scale for _, scale in codes_of(tmp_path / "run" / "export" / form).values()]
        for form in recipe["export"]["formats"]
    }
    for form in ("ascend", "numpy"):
        assert all(torch.equal(one, other) for one, other in zip(scales[form], scales["gguf"], strict=True))


def test_integer_inputs_are_in_the_score(tmp_path: Path, prose: Path) -> None:
    static = made(tmp_path / "static", Scheme(8, activations="static"), "compressed-tensors")
    plain = made(tmp_path / "plain", Scheme(8, activations="static"), "dense")
    assert scored(static.folder, prose)["quantized"] != scored(plain.folder, prose)["quantized"]


def test_a_checkpoint_is_scored_in_its_own_dtype(tmp_path: Path, prose: Path) -> None:
    export_ = made(tmp_path, FOUR, "gptq")
    with pytest.raises(RecipeError, match="own data type"):
        scored(export_.folder, prose, dtype="float32")


@pytest.mark.parametrize(
    ("scheme", "route"),
    [
        (FOUR, ["compressed-tensors", "gptq", "awq", "gguf", "compressed-tensors"]),
        (FOUR_ASYM, ["gptq", "gguf", "compressed-tensors", "awq", "gptq"]),
        (Scheme(8), ["ascend", "compressed-tensors", "ascend"]),
        (Scheme(4, activations="dynamic"), ["compressed-tensors", "ascend", "compressed-tensors"]),
        (Scheme(8, activations="static", activations_symmetric=False), ["compressed-tensors", "ascend"]),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else "",
)
def test_codes_and_scales_survive_every_conversion(
    scheme: Scheme, route: list[str], tmp_path: Path, prose: Path
) -> None:
    first = made(tmp_path / "first", scheme, route[0], kept=[DOWN])
    source, wanted = first.folder, codes_of(first.folder)
    for number, form in enumerate(route[1:]):
        output = tmp_path / f"{number}-{form}"
        facts = convert_checkpoint(source, form, output)
        assert (facts["linears"], facts["left_out"]) == (13, None)
        assert facts["prompt"] < 0
        found = codes_of(output)
        assert found.keys() == wanted.keys()
        for name, (codes, scale) in wanted.items():
            assert torch.equal(found[name][0], codes)
            if scheme.activations == "none":  # ascend rounds the scale of integer inputs
                assert torch.equal(found[name][1], scale)
        assert (output / "tokenizer.json").is_file()
        source = output
    if route[0] == route[-1]:
        one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in (first.folder, source))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert json.loads((first.folder / "config.json").read_text()) == json.loads(
            (source / "config.json").read_text()
        )
    if scheme.activations == "none":
        assert scored(source, prose)["quantized"] == scored(first.folder, prose)["quantized"]


@pytest.mark.parametrize(
    ("family", "form", "changes"),
    [
        ("gemma2", "compressed-tensors", {"query_pre_attn_scalar": 16}),
        ("phi3", "gptq", {}),
        ("granite", "compressed-tensors", {"attention_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_families_become_gguf_and_come_back(
    family: str, form: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    first = made(tmp_path / "first", FOUR, form, family=family, **changes)
    convert_checkpoint(first.folder, "gguf", tmp_path / "gguf")
    assert verify_path(tmp_path / "gguf")["linears"] == len(first.store.schemes)
    convert_checkpoint(tmp_path / "gguf", form, tmp_path / "again")
    one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in (first.folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_family_that_llama_cpp_does_not_compute_is_not_converted(tmp_path: Path) -> None:
    first = made(tmp_path / "first", FOUR, "compressed-tensors", family="phi3", sliding_window=8)
    with pytest.raises(RecipeError, match="sliding_window: 8"):
        convert_checkpoint(first.folder, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_dense_conversion_says_what_is_missing_and_is_no_source(tmp_path: Path) -> None:
    first = made(tmp_path / "first", Scheme(8, activations="dynamic"), "compressed-tensors")
    facts = convert_checkpoint(first.folder, "dense", tmp_path / "dense")
    assert facts["left_out"] == "quantized inputs of linears"
    for source in (tmp_path / "dense", first.model):
        with pytest.raises(ModelError, match="holds no codes"):
            convert_checkpoint(source, "gptq", tmp_path / "again")


def test_what_a_format_cannot_hold_is_refused_before_work(tmp_path: Path) -> None:
    dynamic = made(tmp_path / "a", Scheme(8, activations="dynamic"), "compressed-tensors")
    mixed = made(tmp_path / "b", FOUR, "compressed-tensors", others={"*.down_proj": Scheme(4)})
    apart = made(tmp_path / "d", Scheme(8), "compressed-tensors", kept=["model.layers.1.self_attn.v_proj"])
    cached = made(tmp_path / "c", FOUR, "compressed-tensors", attention=AttentionScheme(kv="fp8"))
    for source, form, reason in [
        (dynamic, "gptq", "weights alone"),
        (dynamic, "exl2", "there is no format"),
        (mixed, "awq", "one scheme for all linears"),
        (apart, "ascend", r"q_proj is W8A16 and model.layers.1.self_attn.v_proj FLOAT, and engines .* join them"),
        (apart, "mindie", "join them"),
        (cached, "gptq", "KV fp8"),
    ]:
        with pytest.raises(RecipeError, match=reason):
            convert_checkpoint(source.folder, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_the_format_does_not_hold_end_it_without_a_trace(tmp_path: Path) -> None:
    fine = export_tiny(tmp_path / "a", Scheme(4), dtype=torch.float32)
    with pytest.raises(ModelError, match="no float16 value"):
        convert_checkpoint(fine.folder, "gptq", tmp_path / "out" / "new")
    assert not any((tmp_path / "out").iterdir())


def test_nothing_is_overwritten_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(tmp_path / "first", FOUR, "compressed-tensors")
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(export, "SHARD_BYTES", 10_000)
        convert_checkpoint(first.folder, "gptq", output)
    (output / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(OutputError, match="holds a checkpoint already"):
        convert_checkpoint(first.folder, "awq", output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    convert_checkpoint(first.folder, "awq", output, overwrite=True)
    assert [file.name for file in output.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (output / "quantize_config.json").exists()
    assert (output / "notes.txt").read_text() == "mine"
    (output / "quantities.json").write_text("mine")
    (output / "lora.safetensors").write_bytes(b"mine")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(OutputError, match=r"lora.safetensors is not a name"):
        convert_checkpoint(first.folder, "gptq", output, overwrite=True)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    (output / "lora.safetensors").unlink()
    convert_checkpoint(first.folder, "gptq", output, overwrite=True)
    assert (output / "quantities.json").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    for place, reason in [(other, "something else"), (first.folder / "x", "in one another"),
                          (output / "notes.txt", "is a file")]:  # fmt: skip
        with pytest.raises(OutputError, match=reason):
            convert_checkpoint(first.folder, "awq", place, overwrite=True)
    assert not list(tmp_path.rglob("*.part"))


def test_sequences_longer_than_the_positions_are_refused(tmp_path: Path, prose: Path) -> None:
    export_ = made(tmp_path, Scheme(8), "compressed-tensors", family="opt")
    text = {"dataset": "text", "path": str(prose), "sequence_length": 257}
    recipe = {"model": {"path": str(export_.folder)}, "quantize": {}, "evaluate": {"perplexity": text}, "output": "o"}
    with pytest.raises(RecipeError, match=r"evaluate\.perplexity\.sequence_length: is 257, .* 256 positions"):
        score_recipe(load_recipe(recipe))


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path, prose: Path) -> None:
    export_ = made(tmp_path, Scheme(8), "compressed-tensors", vocab_size=64)
    with pytest.raises(ModelError, match=r"The tokenizer gives token .* the model knows 64"):
        scored(export_.folder, prose)


def test_a_float_model_of_another_vocabulary_is_refused(tmp_path: Path, prose: Path) -> None:
    export_ = made(tmp_path / "a", Scheme(8), "compressed-tensors")
    other = save_tiny_model("llama", tmp_path / "b", with_tokenizer=True, vocab_size=1024)
    with pytest.raises(ModelError, match=r"knows 1024 tokens, and .* 512"):
        scored(export_.folder, prose, other)


def test_a_conversion_from_mindie_leaves_nothing_of_it_in_the_configuration(tmp_path: Path) -> None:
    export_ = made(tmp_path / "export", Scheme(8, activations="dynamic"), "mindie")
    assert "quantize" in json.loads((export_.folder / "config.json").read_text())
    for form in ("compressed-tensors", "ascend"):
        convert_checkpoint(export_.folder, form, tmp_path / form)
        assert "quantize" not in json.loads((tmp_path / form / "config.json").read_text())


def test_an_export_says_its_dtype_where_the_model_does_not(static_recipe: Any, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16, with_tokenizer=True)
    config = json.loads((model / "config.json").read_text())
    assert {config.pop(key) for key in ("dtype", "torch_dtype") if key in config} == {"bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    recipe = static_recipe(tmp_path / "run") | {"quantize": {"weights": {"bits": 8}}}
    recipe["model"] = {**recipe["model"], "path": str(model), "dtype": "bfloat16"}
    del recipe["calibration"]
    result = run_recipe(load_recipe(recipe))
    exported = result.path / "export" / "compressed-tensors"
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.perplexity is not None


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_dtype_of_a_model_of_several_parts(tmp_path: Path, kind: str, inside: bool) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512} | ({"dtype": "bfloat16"} if inside else {})
    config = {"model_type": kind, "text_config": text} | ({} if inside else {"dtype": "bfloat16"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_dtype(load_config(tmp_path), "auto") == torch.bfloat16
    assert _declared_dtype(tmp_path, config) == "bfloat16"


def test_without_a_word_the_dtype_is_that_of_the_weights(static_recipe: Any, tmp_path: Path) -> None:
    """Two directories of one configuration, which the cache of structures tells apart."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        model = save_tiny_model("llama", tmp_path / name, dtype=dtype, with_tokenizer=True)
        config = json.loads((model / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
        (model / "config.json").write_text(json.dumps(config))
        recipe = static_recipe(tmp_path / f"run-{name}") | {"quantize": {"weights": {"bits": 8}}}
        recipe["model"] = {**recipe["model"], "path": str(model)}
        recipe["evaluate"] = {**recipe["evaluate"], "gates": {"size_ratio": "100%"}}
        del recipe["calibration"]
        result = run_recipe(load_recipe(recipe))
        assert result.plan.structure.dtype == name
        exported = result.path / "export" / "compressed-tensors"
        assert json.loads((exported / "config.json").read_text())["dtype"] == name
        (gate,) = result.gates
        files = [folder / "model.safetensors" for folder in (exported, model)]
        stored = [sum(entry.nbytes for entry in Checkpoint(file.parent).entries.values()) for file in files]
        assert gate.value == pytest.approx(files[0].stat().st_size / stored[1])
