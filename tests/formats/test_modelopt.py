"""FP8 in the layout of Model-Optimizer: what is written, what is read of others, and damage that is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import Export, export_tiny, flip_bit
from torch import Tensor

from quantcli.errors import ModelError, QuantcliError, RecipeError, VerificationError
from quantcli.formats import modelopt, verify_modelopt
from quantcli.formats.table import FORMATS, find_format, quantized_as
from quantcli.model.structure import Linear
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.engine import plan_recipe
from quantcli.pipeline.inspect import inspect_path
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe import load_recipe

FP8 = Scheme(8, granularity="tensor", activations="static", type="float")
DYNAMIC = Scheme(8, activations="dynamic", type="float")
CACHE = AttentionScheme(kv="fp8")
UP, DOWN, K = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"
EIGHT = {"dynamic": False, "num_bits": 8, "type": "float"}
Json = dict[str, Any]


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_tiny(tmp_path_factory.mktemp("static"), FP8, dtype=torch.bfloat16, attention=CACHE, kept=[DOWN],
                       form="modelopt", with_tokenizer=True)  # fmt: skip


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_tiny(tmp_path_factory.mktemp("dynamic"), DYNAMIC, dtype=torch.bfloat16, form="modelopt",
                       with_tokenizer=True)  # fmt: skip


def read(file: Path) -> Json:
    content: Json = json.loads(file.read_text())
    return content


def test_the_files_are_those_that_engines_of_it_read(static: Export, dynamic: Export) -> None:
    left = ["lm_head", "model.embed_tokens", DOWN]
    assert read(static.folder / "config.json")["quantization_config"] == {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": left,
        "config_groups": {"group_0": {"input_activations": EIGHT, "weights": EIGHT, "targets": ["Linear"]}},
        "kv_cache_scheme": EIGHT,
        "producer": {"name": "quantcli"},
    }
    assert read(static.folder / "hf_quant_config.json") == {
        "producer": {"name": "quantcli"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": left},
    }
    assert read(dynamic.folder / "config.json")["quantization_config"] == {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
        "ignore": left[:2],
        "producer": {"name": "quantcli"},
    }
    assert read(dynamic.folder / "hf_quant_config.json")["quantization"]["kv_cache_quant_algo"] is None


def test_the_tensors_are_the_codes_and_scales_of_the_store(static: Export, dynamic: Export) -> None:
    for made in (static, dynamic):
        tensors, stored = load_file(made.folder / "model.safetensors"), made.store.read(UP)
        assert tensors[f"{UP}.weight"].dtype == torch.float8_e4m3fn
        assert torch.equal(tensors[f"{UP}.weight"].view(torch.uint8), stored.weight.codes.view(torch.uint8))
        assert tensors[f"{UP}.weight_scale"].dtype == torch.float32
        assert torch.equal(tensors[f"{UP}.weight_scale"], stored.weight.scale.view(-1))
        below = {name for name in tensors if name.startswith(f"{UP}.")}
        assert below == {f"{UP}.{part}" for part in ("weight", "weight_scale", *(["input_scale"] * (made is static)))}
        read_back = made.reader().read_linear(UP)
        assert torch.equal(read_back.weight.scale, stored.weight.scale)
    tensors = load_file(static.folder / "model.safetensors")
    scales = static.store.read_attention("model.layers.0.self_attn")
    assert torch.equal(tensors[f"{K}.k_scale"], scales["k_scale"])
    assert torch.equal(tensors[K.replace("k_proj", "v_proj.v_scale")], scales["v_scale"])


def test_attention_that_is_called_otherwise_has_its_scales_itself() -> None:
    parts = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([0.25])}
    found = modelopt.attention_tensors("gpt_neox.layers.0.attention", parts, CACHE)
    assert found == {f"gpt_neox.layers.0.attention.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize(
    ("linear", "scheme", "reason"),
    [
        (Linear("l.0.x", 64, 64, transposed=True), FP8, "Conv1D"),
        (Linear("l.0.x", 64, 64), Scheme(8, activations="static"), "fp8 codes, not integers"),
        (Linear("l.0.x", 64, 64), Scheme(8, type="float"), "beside fp8 inputs, not alone"),
        (Linear("l.0.x", 64, 64), Scheme(8, activations="static", type="float"), "static .* a tensor, not a channel"),
        (Linear("l.0.x", 64, 64), Scheme(8, granularity="tensor", activations="dynamic", type="float"),
         "dynamic .* a channel, not a tensor"),
        (Linear("lm_head", 64, 64), FP8, "output head in float"),
        (Linear("l.0.x", 64, 64), FP8, "^$"),
        (Linear("l.0.x", 64, 64), DYNAMIC, "^$"),
    ],
)  # fmt: skip
def test_what_it_does_not_hold(linear: Linear, scheme: Scheme, reason: str) -> None:
    from re import search

    assert search(reason, modelopt.refusal(linear, scheme))


def test_a_name_in_float_that_is_part_of_another_is_refused(tmp_path: Path) -> None:
    """Engines would leave the other in float, too."""
    assert modelopt.refuses_together(["m.0.gate_proj"], ["m.0.gate", "m.0.x"], None).startswith("leaves m.0.gate in")
    assert not modelopt.refuses_together(["m.0.gate_proj"], ["m.1.gate", "gate_proj.m"], CACHE)
    assert "beside quantized linears" in modelopt.refuses_together([], ["m.0.gate"], CACHE)
    with pytest.raises(ModelError, match=r"is part of model\.layers\.0\.self_attn\.q_proj"):
        export_tiny(tmp_path, FP8, form="modelopt", kept=["model.layers.0.self_attn.q"])


def test_a_plan_refuses_what_it_does_not_hold(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    weights, inputs = {"bits": 8, "type": "float", "granularity": "tensor"}, {"bits": 8, "type": "float"}
    text = {"dataset": "text", "path": str(prose), "samples": 2, "sequence_length": 32}
    content: Json = {"model": {"path": str(tiny_llama)}, "calibration": text, "output": str(tmp_path / "run")}
    content["export"] = {"formats": ["modelopt"]}
    static = {"weights": weights, "activations": inputs | {"scope": "tensor"}}
    plan = plan_recipe(load_recipe(content | {"quantize": static}))
    assert {v.engine: v.loads for v in plan.engines} == {
        "vLLM on a CPU": False, "vLLM on a GPU": True, "SGLang": True,
    }  # fmt: skip
    rolled = static | {"rollback": {"names": ["*.down_proj"]}}
    plan = plan_recipe(load_recipe(content | {"quantize": rolled}))
    assert all(v.loads for v in plan.engines)
    asked = {"export": {"formats": ["modelopt"], "engines": ["vllm-cpu"]}}
    with pytest.raises(RecipeError, match=r"static inputs of .*\.down_proj in LlamaForCausalLM: leave"):
        plan_recipe(load_recipe(content | asked | {"quantize": static}))
    plan_recipe(load_recipe(content | asked | {"quantize": rolled}))
    mixed = static | {"overrides": [{"match": "*.down_proj", "weights": weights | {"granularity": "channel"},
                                     "activations": inputs | {"scope": "token"}}]}  # fmt: skip
    cache = {"rollback": {"names": ["*"]}, "kv_cache": {"type": "float"}}
    for quantize, reason in (
        (mixed, "one scheme for all linears"),
        (static | cache, "a quantized cache beside quantized linears only"),
        ({"weights": weights | {"granularity": "channel"}, "activations": inputs | {"scope": "tensor"}}, "a scale a"),
    ):
        with pytest.raises(RecipeError, match=reason):
            plan_recipe(load_recipe(content | {"quantize": quantize}))


# ------------------------------------------------------------------------------------------------ as others write it


def copied(made: Export, place: Path) -> Path:
    folder = Path(shutil.copytree(made.folder, place / "copy"))
    (folder / "SHA256SUMS").unlink()
    return folder


def alter(folder: Path, change: Callable[[Json], object], name: str = "config.json") -> None:
    content = read(folder / name)
    change(content["quantization_config"] if name == "config.json" else content)
    (folder / name).write_text(json.dumps(content))


def alter_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_axes(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_scale") and tensors[name].shape == (1,)]:
        tensors[name] = tensors[name].view(())


def alone(folder: Path, **said: Any) -> None:
    """What versions before 0.31 wrote: nothing in config.json."""
    config = read(folder / "config.json")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    producer = {"producer": {"name": "modelopt", "version": "0.29.0"}}
    alter(folder, lambda content: (content.update(producer), content["quantization"].update(said)),
          "hf_quant_config.json")  # fmt: skip


def codes(folder: Path) -> dict[str, tuple[Tensor, ...]]:
    _, opened, _ = open_checkpoint(folder)
    found = {}
    for name in opened.schemes:
        stored = opened.read_linear(name)
        assert stored.input_scale is not None
        found[name] = (stored.weight.codes.view(torch.uint8), stored.weight.scale, stored.input_scale)
    for name in opened.attention_modules:
        found[name] = tuple(opened.read_attention(name).values())
    return found


SHAPES = ["lm_head", "model.embed*", "model.layers.1.mlp.down_pro?"]
FOREIGN: dict[str, Callable[[Path], object]] = {
    "config.json alone": lambda folder: (folder / "hf_quant_config.json").unlink(),
    "hf_quant_config.json alone": alone,
    "expressions": lambda folder: alone(folder, exclude_modules=SHAPES),
    "parts of names": lambda folder: alone(folder, exclude_modules=["lm_head", "layers.1.mlp.down"]),
    "small letters": lambda folder: alone(folder, quant_algo="fp8", kv_cache_quant_algo="fp8"),
    "no axes": lambda folder: alter_tensors(folder, without_axes),
    "the older layout in config.json": lambda folder: alter(
        folder,
        lambda said: (said.clear(), said.update(read(folder / "hf_quant_config.json")),
                      said["producer"].update(name="modelopt")),
    ),
    "more of the cache": lambda folder: alter(folder, lambda said: said["kv_cache_scheme"].update(strategy="tensor")),
    "the cache by its name": lambda folder: alter(folder, lambda said: said.update(kv_cache_scheme="FP8")),
    "nothing of groups": lambda folder: alter(folder, lambda said: said.pop("config_groups")),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_of_others_are_read(kind: str, static: Export, tmp_path: Path) -> None:
    folder, wanted = copied(static, tmp_path), codes(static.folder)
    FOREIGN[kind](folder)
    assert quantized_as(folder) == "modelopt" or kind == "the older layout in config.json"
    assert inspect_path(folder)["kind"] == "quantized checkpoint (modelopt)"
    assert verify_path(folder)["linears"] == 13
    found = codes(folder)
    assert found.keys() == wanted.keys()
    for name, parts in wanted.items():
        for one, other in zip(found[name], parts, strict=True):
            assert torch.equal(one, other)
            assert one.shape == other.shape
    output = tmp_path / "out"
    convert_checkpoint(folder, "modelopt", output)
    assert read(output / "hf_quant_config.json") == read(static.folder / "hf_quant_config.json")
    convert_checkpoint(folder, "compressed-tensors", output, overwrite=True)
    assert not (output / "hf_quant_config.json").exists()


def test_a_float_model_beside_a_description_is_a_float_model(static: Export, tmp_path: Path) -> None:
    model = Path(shutil.copytree(static.model, tmp_path / "model"))
    shutil.copy(static.folder / "hf_quant_config.json", model)
    assert quantized_as(model) is None
    assert inspect_path(model)["kind"] == "float model"


OLDER = "hf_quant_config.json"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another algorithm": (lambda f: alter(f, lambda c: c.update(quant_algo="NVFP4")), "'NVFP4' is not supported"),
    "no algorithm": (lambda f: alter(f, lambda c: c.pop("quant_algo")), "quant_algo 'None'"),
    "another cache": (
        lambda f: alter(f, lambda c: c.update(kv_cache_scheme=EIGHT | {"num_bits": 4})), "kv_cache_scheme .* is not",
    ),
    "no list": (lambda f: alter(f, lambda c: c.update(ignore="lm_head")), "ignore is no list"),
    "an empty name": (lambda f: alter(f, lambda c: c.update(ignore=["lm_head", ""])), "ignore is no list"),
    "expressions without end": (
        lambda f: alter(f, lambda c: c.update(ignore=[f"*{i}" for i in range(2000)])), "more than 1000 expressions",
    ),
    "a long expression": (lambda f: alter(f, lambda c: c.update(ignore=["*a" * 2000])), "longer than 1000"),
    "two algorithms": (
        lambda f: alter(f, lambda c: c["quantization"].update(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"), OLDER),
        "config.json and hf_quant_config.json differ about quant_algo",
    ),
    "two caches": (
        lambda f: alter(f, lambda c: c["quantization"].update(kv_cache_quant_algo=None), OLDER), "differ about",
    ),
    "two lists": (
        lambda f: alter(f, lambda c: c["quantization"].update(exclude_modules=["lm_head"]), OLDER),
        f"differ about whether {DOWN} is quantized",
    ),
    "one more in float": (
        lambda f: (alter(f, lambda c: c["ignore"].append(UP)), (f / OLDER).unlink()), "leaves it in float|no tensor of",
    ),
    "a part of many": (
        lambda f: (alter(f, lambda c: c["ignore"].append("mlp")), (f / OLDER).unlink()), "leaves it in float|no tensor",
    ),
    "one too few in float": (
        lambda f: (alter(f, lambda c: c["ignore"].remove(DOWN)), (f / OLDER).unlink()), f"{DOWN}.weight",
    ),
    "no scale of a cache": (
        lambda f: alter_tensors(f, lambda t: t.pop(f"{K}.k_scale")), "k_proj.k_scale is missing, where KV fp8 is said",
    ),
    "scales of no cache": (
        lambda f: (alter(f, lambda c: c.pop("kv_cache_scheme")), (f / OLDER).unlink()), "k_scale is no tensor of",
    ),
    "a scale of an attention that is none": (
        lambda f: alter_tensors(f, lambda t: t.update({"model.extra.k_proj.k_scale": torch.ones(1)})),
        "belongs to no attention",
    ),
    "a scale with two values": (
        lambda f: alter_tensors(f, lambda t: t.update({f"{UP}.weight_scale": torch.ones(2)})), "has shape",
    ),
    "a scale of zero": (lambda f: alter_tensors(f, lambda t: t[f"{UP}.input_scale"].zero_()), "zero or not finite"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_read_is_refused_with_the_reason(kind: str, static: Export, tmp_path: Path) -> None:
    change, reason = WRONG[kind]
    folder = copied(static, tmp_path)
    change(folder)
    with pytest.raises(QuantcliError, match=reason) as caught:
        verify_path(folder)
    assert caught.value.exit_code in (3, 5)


def test_one_name_an_expert_is_no_expression_an_expert() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(48) for expert in range(128)]
    leaves = modelopt._matcher(names[::2])
    assert [leaves(name) for name in names[:8]] == [True, False] * 4
    assert sum(map(leaves, names)) == len(names) // 2


def test_other_methods_are_not_taken_for_it(tmp_path: Path) -> None:
    assert FORMATS["modelopt"].recognizes(tmp_path, {"quantization_config": {"quant_method": "modelopt_fp4"}})
    for content in ({"quant_method": "fp8"}, {"producer": {"name": "other"}}, {"producer": "modelopt"}, "modelopt"):
        assert not FORMATS["modelopt"].recognizes(tmp_path, {"quantization_config": content})
    with pytest.raises(ModelError, match="is quantized by 'fp8'"):
        find_format(tmp_path, {"quantization_config": {"quant_method": "fp8"}})


# ------------------------------------------------------------------------------------------------- damage to an export


def damaged(made: Export, place: Path) -> Export:
    shutil.rmtree(place / "copy", ignore_errors=True)
    folder = Path(shutil.copytree(made.folder, place / "copy"))
    return Export(folder, made.model, made.structure, made.store, made.source, made.form)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_changed_bit_of_any_tensor_is_found(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made = request.getfixturevalue(kind)
    assert damaged(made, tmp_path).verify().linears == (13 if kind == "static" else 14)
    for step in range(40):
        copy = damaged(made, tmp_path)
        flip_bit(copy.folder / "model.safetensors", step / 40, step % 8)
        with pytest.raises(VerificationError):
            copy.verify()
    for name in load_file(made.folder / "model.safetensors"):
        if not name.endswith("scale"):
            continue
        changes: list[Callable[[dict[str, Tensor]], object]] = [
            lambda t, name=name: t.pop(name),
            lambda t, name=name: t.update({name: t[name] * 2}),
            lambda t, name=name: t.update({name: t[name][None]}),
            lambda t, name=name: t.update({name: t[name].half()}),
            lambda t, name=name: t.update({name + "_2": t[name].clone()}),
        ]
        for change in changes[:: 1 if "layers.0.self_attn" in name else 5]:
            copy = damaged(made, tmp_path)
            alter_tensors(copy.folder, change)
            with pytest.raises(VerificationError):
                copy.verify()


CLAIMS: list[Callable[[Json], object]] = [
    lambda c: c.update(quant_method="modelopt_fp4"),
    lambda c: c.update(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"),
    lambda c: c.pop("quant_algo"),
    lambda c: c["ignore"].append(UP),
    lambda c: c["ignore"].remove(DOWN),
    lambda c: c.update(ignore=["*"]),
    lambda c: c.pop("kv_cache_scheme"),
    lambda c: c.update(kv_cache_scheme=EIGHT | {"dynamic": 0}),
    lambda c: c.pop("config_groups"),
    lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=4),
    lambda c: c.update(group_size=16),
    lambda c: c.update(quantization={}),
    lambda c: c.update(producer={"name": "modelopt"}),
]
OLDER_CLAIMS: list[Callable[[Json], object]] = [
    lambda c: c.pop("producer"),
    lambda c: c.pop("quantization"),
    lambda c: c["quantization"].update(quant_algo="NVFP4"),
    lambda c: c["quantization"].update(kv_cache_quant_algo=None),
    lambda c: c["quantization"]["exclude_modules"].append(UP),
    lambda c: c["quantization"].update(group_size=16),
]


def test_a_changed_claim_is_found(static: Export, tmp_path: Path) -> None:
    for name, claims in (("config.json", CLAIMS), (OLDER, OLDER_CLAIMS)):
        for claim in claims:
            copy = damaged(static, tmp_path)
            alter(copy.folder, claim, name)
            with pytest.raises(VerificationError):
                copy.verify()
    for name in ("config.json", OLDER):
        copy = damaged(static, tmp_path)
        (copy.folder / name).unlink()
        with pytest.raises(VerificationError):
            copy.verify()


def test_what_the_store_does_not_have_is_found(static: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each planned linear is quantized and nothing else is: the export is whole, and the store is another."""
    for change in (
        lambda schemes: schemes.pop(UP),
        lambda schemes: schemes.update({DOWN: FP8}),
        lambda schemes: schemes.update({UP: DYNAMIC}),
    ):
        copy, schemes = damaged(static, tmp_path), dict(static.store.schemes)
        change(schemes)
        with monkeypatch.context() as patched:
            patched.setattr(copy.store, "schemes", schemes)
            with pytest.raises((VerificationError, KeyError)):
                copy.verify()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up", "model.layers.1.mlp.u[pq]_proj"])
def test_verification_sees_a_name_in_float_that_takes_a_quantized_linear_along(
    name: str, static: Export, tmp_path: Path
) -> None:
    copy = damaged(static, tmp_path)
    left = sorted(["lm_head", "model.embed_tokens", DOWN, name])
    alter(copy.folder, lambda c: c.update(ignore=left))
    alter(copy.folder, lambda c: c["quantization"].update(exclude_modules=left), OLDER)
    config, beside = (read(copy.folder / file) for file in ("config.json", OLDER))
    with pytest.raises(VerificationError, match=f"{UP} is quantized, but engines leave it in float"):
        verify_modelopt.check_modelopt(config, beside, copy.store, set(left))
