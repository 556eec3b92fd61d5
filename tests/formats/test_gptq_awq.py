"""GPTQ and AWQ: codes and scales come back, the words are those of the formats, and damage of either is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_exports import Export, export_tiny, flip_bit, shuffle_groups, weights
from tiny_models import save_tiny_model
from torch import Tensor

from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats import awq, gptq
from quantcli.formats.engines import verdicts
from quantcli.formats.store import held_scale
from quantcli.model.discovery import discover
from quantcli.model.structure import Linear
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.inspect import inspect_path
from quantcli.pipeline.plan import make_plan
from quantcli.pipeline.verify import verify_path
from quantcli.quant.grid import WeightGrid, dequantize
from quantcli.quant.methods import WEIGHT_METHODS
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe.schema import Recipe

GPTQ = {
    "W4 g32": weights(4),
    "W4": weights(4, group_size=None),
    "W8 g32": weights(8),
    "W3 g32": weights(3),
    "W2 g64": weights(2, group_size=64),
    "W4 g32 asym": weights(4, symmetric=False),
    "W3 asym": weights(3, symmetric=False, group_size=None),
    "W8 g32 asym": weights(8, symmetric=False),
}
AWQ = {name: GPTQ[name] for name in ("W4 g32", "W4", "W4 g32 asym")}
RUNS = [("gptq", name) for name in GPTQ] + [("awq", name) for name in AWQ]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"

Made = Callable[..., Export]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(format, name of a scheme, dtype) → an export of the tiny llama with one linear in float, not to be changed."""
    known: dict[tuple[str, str, torch.dtype], Export] = {}

    def get(form: str, name: str, dtype: torch.dtype = torch.bfloat16) -> Export:
        key = (form, name, dtype)
        if key not in known:
            place = tmp_path_factory.mktemp(form)
            known[key] = export_tiny(place, GPTQ[name], dtype=dtype, form=form, kept=[DOWN])
        return known[key]

    return get


def tensors_of(export: Export) -> dict[str, Tensor]:
    return load_file(export.folder / "model.safetensors")


def copy_of(export: Export, place: Path) -> Export:
    shutil.rmtree(place / "copy", ignore_errors=True)
    shutil.copytree(export.folder, place / "copy")
    return Export(place / "copy", export.model, export.structure, export.store, export.source, export.form)


def change_tensors(export: Export, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in tensors_of(export).items()}
    change(tensors)
    save_file(tensors, export.folder / "model.safetensors", {"format": "pt"})


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "name"), RUNS)
def test_codes_and_scales_come_back(form: str, name: str, dtype: torch.dtype, made: Made) -> None:
    export, scheme = made(form, name, dtype), GPTQ[name]
    reader = export.reader()
    assert reader.schemes.keys() == export.store.schemes.keys()
    assert {s.name for s in reader.schemes.values()} == {scheme.name}
    for module in export.store.schemes:
        found, stored = reader.read_linear(module).weight, export.store.read(module).weight
        assert torch.equal(found.codes, stored.codes)
        assert found.scale.dtype == torch.float16
        assert torch.equal(found.scale.float(), stored.scale.float())
        assert (found.zero_point is None) == scheme.symmetric
        assert found.zero_point is None or torch.equal(found.zero_point, stored.zero_point)
        assert torch.equal(dequantize(found, dtype), dequantize(stored, dtype))
    assert export.verify().linears == 13
    assert f"{DOWN}.weight" in tensors_of(export)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma3", "phi3", "opt", "falcon", "gpt-neox"])
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_every_family_is_written_and_read(form: str, family: str, tmp_path: Path) -> None:
    export = export_tiny(tmp_path, weights(4), family, dtype=torch.bfloat16, form=form)
    reader = export.reader()
    for module in export.store.schemes:
        assert torch.equal(reader.read_linear(module).weight.codes, export.store.read(module).weight.codes)
    export.verify()


def test_a_quantized_head_is_said(tmp_path: Path) -> None:
    export = export_tiny(tmp_path, weights(4), form="gptq", others={"lm_head": weights(4)}, vocab_size=256)
    assert json.loads((export.folder / "quantize_config.json").read_text())["lm_head"] is True
    assert "lm_head" in export.reader().schemes
    export.verify()


# ------------------------------------------------------------------------------------------------------ the words


def bits_of(word: int, start: int, count: int) -> int:
    return (word >> start) & ((1 << count) - 1)


@pytest.mark.parametrize("name", GPTQ)
def test_a_gptq_weight_by_the_formula(name: str, made: Made) -> None:
    """Value i of a row is bits i·b to i·b + b of the words as one long number; v1 zero points are one less."""
    scheme, bits = GPTQ[name], GPTQ[name].bits
    export = made("gptq", name)
    t = {part: tensors_of(export)[f"{UP}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    weight = dequantize(export.store.read(UP).weight)
    version = json.loads((export.folder / "config.json").read_text())["quantization_config"]["checkpoint_format"]
    assert version == ("gptq" if scheme.symmetric else "gptq_v2")
    for out, inner in [(0, 0), (0, 31), (5, 10), (77, 42), (127, 63)]:
        column = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(t["qweight"][:, out].tolist()))
        group = int(t["g_idx"][inner])
        row = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(t["qzeros"][group].tolist()))
        zero = bits_of(row, out * bits, bits) + (version == "gptq")
        value = (bits_of(column, inner * bits, bits) - zero) * float(t["scales"][group, out])
        assert value == float(weight[out, inner])


def test_zero_points_of_symmetric_weights(made: Made) -> None:
    assert set(tensors_of(made("gptq", "W4 g32"))[f"{UP}.qzeros"].unique().tolist()) == {0x77777777}
    assert set(tensors_of(made("awq", "W4 g32"))[f"{UP}.qzeros"].unique().tolist()) == {0x88888888 - (1 << 32)}


def test_an_awq_weight_by_the_formula(made: Made) -> None:
    export = made("awq", "W4 g32 asym")
    t = {part: tensors_of(export)[f"{UP}.{part}"] for part in ("qweight", "qzeros", "scales")}
    weight = dequantize(export.store.read(UP).weight)
    nibble = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # of each of eight outputs
    for out, inner in [(0, 0), (1, 0), (6, 33), (77, 42), (127, 63)]:
        place = 4 * nibble[out % 8]
        code = bits_of(int(t["qweight"][inner, out // 8]), place, 4)
        zero = bits_of(int(t["qzeros"][inner // 32, out // 8]), place, 4)
        assert (code - zero) * float(t["scales"][inner // 32, out]) == float(weight[out, inner])


def test_what_stays_in_float_is_named(made: Made) -> None:
    config = json.loads((made("gptq", "W4 g32").folder / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {r"-:^model\.layers\.1\.mlp\.down_proj$": {}}
    assert len(config["modules_in_block_to_quantize"][0]) == 13
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    config = json.loads((made("awq", "W4").folder / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.embed_tokens", DOWN]
    assert (config["bits"], config["group_size"], config["zero_point"]) == (4, -1, True)


# ------------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize("method", ["minmax", "mse", "ssz", "hqq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bfloat16_scales_are_float16_values_however_small(method: str, symmetric: bool) -> None:
    scheme = weights(4, symmetric)
    assert scheme.scale_dtype("float32") == scheme.scale_dtype("float16") == "float16"
    assert scheme.scale_dtype("bfloat16") == "bfloat16"
    size = scheme.smallest_scale("bfloat16")
    grid = WeightGrid(4, symmetric, "group", 32, torch.bfloat16, smallest_scale=size)
    rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight = rows * torch.logspace(-12, 1, 64)[:, None]
    weight[5] = 0
    scale = WEIGHT_METHODS[method](weight, grid, None).scale
    assert scale.dtype == torch.bfloat16
    assert held_scale(scale, torch.float16).dtype == torch.float16
    assert scale.float().abs().min() == size
    assert bool((scale[5] == 1).all())
    plain = WEIGHT_METHODS[method](weight, WeightGrid(4, symmetric, "group", 32, torch.bfloat16), None).scale
    assert torch.equal(plain[40:], scale[40:])
    with pytest.raises(ModelError, match="no float16 value"):
        held_scale(plain, torch.float16)


def test_quantized_for_another_format_scales_may_not_fit(tmp_path: Path) -> None:
    scheme = Scheme(4, granularity="group", group_size=32)
    with pytest.raises(ModelError, match=r"_proj: A scale of its codes is no float16 value"):
        export_tiny(tmp_path, scheme, dtype=torch.float32, form="gptq")


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("form", "linear", "scheme", "reason"),
    [
        (gptq, Linear("l.0.x", 64, 64, transposed=True), weights(4), "Conv1D"),
        (gptq, Linear("l.0.x", 64, 64), Scheme(8, activations="dynamic"), "weights alone"),
        (gptq, Linear("l.0.x", 64, 64), Scheme(5), "2, 3, 4 and 8 bits"),
        (gptq, Linear("l.0.x", 64, 64), Scheme(4, granularity="tensor"), "not a tensor"),
        (gptq, Linear("l.0.x", 48, 64), weights(3, group_size=16), "48 values of 3 bits"),
        (gptq, Linear("l.0.x", 64, 36), weights(4), "36 values of 4 bits"),
        (awq, Linear("l.0.x", 64, 64, transposed=True), weights(4), "Conv1D"),
        (awq, Linear("l.0.x", 64, 64), weights(8), "weights of 4 bits"),
        (awq, Linear("l.0.x", 64, 64), Scheme(4, activations="dynamic"), "weights alone"),
        (awq, Linear("l.0.x", 64, 64), Scheme(4, granularity="tensor"), "not a tensor"),
        (awq, Linear("l.0.x", 64, 36), weights(4), "by eight"),
        (awq, Linear("lm_head", 64, 64), weights(4), "output head in float"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(form: Any, linear: Linear, scheme: Scheme, reason: str) -> None:
    assert reason in form.refusal(linear, scheme)
    assert not form.refusal(Linear("l.0.x", 64, 64), weights(4))
    assert form.attention_refusal(AttentionScheme(kv="fp8"))


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_a_plan_takes_one_scheme_and_scales_that_both_dtypes_hold(form: str, tmp_path: Path) -> None:
    structure = discover(save_tiny_model("llama", tmp_path / "model"))

    def plan(quantize: dict[str, Any], formats: list[str]) -> Any:
        content = {"version": 1, "model": {"path": "model"}, "output": "out", "calibration": {},
                   "quantize": quantize, "export": {"formats": formats}}  # fmt: skip
        return make_plan(Recipe.model_validate(content), tmp_path / "model", structure)

    four: dict[str, Any] = {"weights": {"bits": 4, "granularity": "group", "group_size": 32}}
    made = plan(four | {"rollback": {"names": ["*.down_proj"]}}, ["compressed-tensors", form])
    assert {scheme.float16_scales for _, scheme in made.schemes.values()} == {True}
    assert not any(scheme.float16_scales for _, scheme in plan(four, ["compressed-tensors"]).schemes.values())
    mixed = {"overrides": [{"match": "*.down_proj", "weights": {"group_size": 16}}]}
    with pytest.raises(RecipeError, match=rf"{form} holds one scheme for all linears, and there are W4A16 g32 and"):
        plan(four | mixed, [form])
    with pytest.raises(RecipeError, match="one scheme for all linears, and there are W4A16 g32 and W8A16"):
        plan(four | {"rollback": {"level": 2, "to": "W8A16"}}, [form])
    with pytest.raises(RecipeError, match="weights alone"):
        plan({"activations": {"bits": 8}}, [form])


@pytest.mark.parametrize(
    ("form", "scheme", "loads"),
    [
        ("gptq", weights(4), [True, True, True, True, True]),
        ("gptq", weights(4, group_size=None), [True, True, True, True, True]),
        ("gptq", weights(4, symmetric=False), [False, False, True, True, False]),
        ("gptq", weights(8), [False, True, True, True, True]),
        ("gptq", weights(3), [False, False, False, True, False]),
        ("gptq", weights(4, group_size=16), [False, False, True, True, False]),
        ("gptq", weights(4, group_size=48), [False, False, True, False, False]),
        ("awq", weights(4), [True, True, True, True, True]),
        ("awq", weights(4, symmetric=False), [True, True, True, True, True]),
        ("awq", weights(4, group_size=256), [True, False, True, True, False]),
    ],
)
def test_the_table_of_engines(form: str, scheme: Scheme, loads: list[bool]) -> None:
    found = verdicts([(Linear("l.0.x", 768, 768), scheme)], None, [form])
    assert [(v.engine, v.loads) for v in found] == list(
        zip(("vLLM on a CPU", "vLLM on a GPU", "vLLM-Ascend", "transformers", "SGLang"), loads, strict=True)
    )


def test_experts_are_loaded_in_float_only() -> None:
    linears = [(Linear("l.0.q", 768, 768), weights(4)), (Linear("l.0.e", 768, 768), weights(4))]
    assert not any(v.loads for v in verdicts(linears, None, ["gptq"], experts=[("l.0.e",)]))
    assert all(v.loads for v in verdicts(linears[:1], None, ["awq"], kept=["l.0.e"], experts=[("l.0.e",)]))


# ------------------------------------------------------------------------------------------------------ others' files


def change_config(export: Export, change: Callable[[dict[str, Any]], Any]) -> None:
    for file in ("config.json", "quantize_config.json"):
        if (export.folder / file).is_file():
            content = json.loads((export.folder / file).read_text())
            change(content.get("quantization_config", content))
            (export.folder / file).write_text(json.dumps(content))


def test_symmetric_weights_of_v2_are_read(made: Made, tmp_path: Path) -> None:
    export = copy_of(made("gptq", "W4 g32"), tmp_path)
    change_config(export, lambda config: config.update(checkpoint_format="gptq_v2"))
    change_tensors(
        export, lambda t: [v.add_(0x11111111) for k, v in t.items() if k.endswith("qzeros")]
    )  # as loaders turn v1 into v2
    stored = export.store.read(UP).weight
    assert torch.equal(dequantize(export.reader().read_linear(UP).weight), dequantize(stored))


@pytest.mark.parametrize(
    ("version", "added", "held", "made_of_it"), [("gptq", 0x11111111, 8, 9), ("gptq_v2", 0, 7, 7), (None, 0, 7, 8)]
)
def test_symmetric_zero_points_of_the_other_version_are_said(
    version: str | None, added: int, held: int, made_of_it: int, made: Made, tmp_path: Path
) -> None:
    """They are read as 8, which sym: true means; who adds one to them computes with something else."""
    export = copy_of(made("gptq", "W4 g32"), tmp_path)
    (export.folder / "SHA256SUMS").unlink()
    change_config(export, lambda config: config.pop("checkpoint_format"))
    if version:
        change_config(export, lambda config: config.update(checkpoint_format=version))
    change_tensors(export, lambda t: [v.add_(added) for k, v in t.items() if k.endswith("qzeros")])
    stored = export.store.read(UP).weight
    assert torch.equal(dequantize(export.reader().read_linear(UP).weight), dequantize(stored))
    said = {
        export.reader().disputed,
        verify_path(export.folder).get("zero points"),
        inspect_path(export.folder).get("zero points"),
        convert_checkpoint(export.folder, "compressed-tensors", tmp_path / "converted")["zero_points"],
    }
    (note,) = said
    if version is None:
        assert note is None
    else:
        assert note is not None
        assert f"qzeros holds {held}, which checkpoint_format {version} makes {made_of_it} of: read as 8" in note


def hand_packed(rows: list[list[int]], bits: int) -> Tensor:
    """Unsigned values as int32 words, by Python's integers: each row a number whose lowest bits are its first value."""
    words = [sum(value << (bits * place) for place, value in enumerate(row)) for row in rows]
    count = len(rows[0]) * bits // 32
    parts = [[(word >> (32 * n)) & 0xFFFFFFFF for n in range(count)] for word in words]
    return torch.tensor([[part - (1 << 32) if part >> 31 else part for part in row] for row in parts]).int()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_weights_of_v1_have_zero_points_less_one(bits: int) -> None:
    """u = 0, 1, … and z from 1 to the largest, in two groups of 32 inputs; 32 outputs."""
    levels = 1 << bits
    u = [[(i + 3 * o) % levels for i in range(64)] for o in range(32)]
    z = [[1 + (o + 7 * g) % (levels - 1) for o in range(32)] for g in range(2)]
    scales = torch.arange(1, 65).reshape(2, 32).half() / 64
    tensors = {
        "qweight": hand_packed(u, bits).t().contiguous(),
        "qzeros": hand_packed([[value - 1 for value in row] for row in z], bits),
        "scales": scales,
        "g_idx": torch.arange(64).int() // 32,
    }
    scheme, config = weights(bits, symmetric=False), {"quantization_config": {"quant_method": "gptq", "sym": False}}
    _, decode = gptq.reading(config, lambda suffix: True)
    wanted = torch.tensor(
        [[(u[o][i] - z[i // 32][o]) * float(scales[i // 32, o]) for i in range(64)] for o in range(32)]
    )
    assert torch.equal(dequantize(decode(tensors, scheme).weight), wanted)
    _, of_v2 = gptq.reading({"quantization_config": config["quantization_config"] | {"format": "gptq_v2"}}, bool)
    tensors["qzeros"] = hand_packed(z, bits)
    assert torch.equal(dequantize(of_v2(tensors, scheme).weight), wanted)
    z[1][5] = levels  # stored as so many ones
    tensors["qzeros"] = hand_packed([[value - 1 for value in row] for row in z], bits)
    with pytest.raises(
        ModelError, match=rf"qzeros holds {levels - 1}, the zero point less one of 0.* {levels}\."
    ) as caught:
        decode(tensors, scheme)
    assert "gptq_v2" in caught.value.remedy


def test_asymmetric_weights_of_v1_are_read_from_files(made: Made, tmp_path: Path) -> None:
    """An export of v2 turned into v1 as writers do it. Where a zero point is 0, the linear is named."""
    export = copy_of(made("gptq", "W4 g32 asym"), tmp_path)
    stored = {module: export.store.read(module).weight for module in export.store.schemes}
    change_config(export, lambda config: config.update(checkpoint_format="gptq"))
    change_tensors(export, lambda t: [v.sub_(0x11111111) for k, v in t.items() if k.endswith("qzeros")])
    reader = export.reader()
    ambiguous = {module for module, weight in stored.items() if bool((weight.zero_point == -8).any())}
    assert ambiguous != set(stored)
    for module, weight in stored.items():
        if module in ambiguous:
            with pytest.raises(ModelError, match=module.replace(".", r"\.")):
                reader.read_linear(module)
        else:
            assert torch.equal(dequantize(reader.read_linear(module).weight), dequantize(weight))


def as_autoround(export: Export, packing: str | None, symmetric: bool, **changes: Any) -> None:
    """The export as AutoRound lays it out: no g_idx, no sums, and a quantization_config of its own kind."""
    (export.folder / "SHA256SUMS").unlink()
    (export.folder / "quantize_config.json").unlink(missing_ok=True)
    own = {
        "autoround_version": "0.16.1", "bits": 4, "block_name_to_quantize": "model.layers", "data_type": "int",
        "group_size": 32, "quant_method": "auto-round", "sym": symmetric, **changes,
    }  # fmt: skip
    if packing is not None:
        own["packing_format"] = packing
    content = json.loads((export.folder / "config.json").read_text())
    (export.folder / "config.json").write_text(json.dumps(content | {"quantization_config": own}))
    change_tensors(export, lambda t: [t.pop(key) for key in [*t] if key.endswith(".g_idx")])


AUTOROUND = [
    ("gptq", "W4 g32", "auto_round:auto_gptq"),
    ("gptq", "W4 g32", None),
    ("gptq", "W4 g32 asym", "auto_round"),
    ("gptq", "W4 g32 asym", "auto_round:gptqmodel"),
    ("gptq", "W8 g32 asym", "auto_round:gptqmodel"),
    ("awq", "W4 g32", "auto_round:auto_awq"),
    ("awq", "W4 g32 asym", "auto_round:auto_awq"),
]


@pytest.mark.parametrize(("form", "name", "packing"), AUTOROUND)
def test_the_layout_of_autoround_is_read(form: str, name: str, packing: str | None, made: Made, tmp_path: Path) -> None:
    """Which zero points each has is from qlinear_torch_zp.py, qlinear_torch.py and WQLinear_GEMM of auto-round 0.16."""
    export = copy_of(made(form, name), tmp_path)
    as_autoround(export, packing, GPTQ[name].symmetric, bits=GPTQ[name].bits, extra_config={DOWN: {"bits": 16}})
    reader = export.reader()
    assert reader.form is {"gptq": gptq, "awq": awq}[form]
    assert {scheme.name for scheme in reader.schemes.values()} == {GPTQ[name].name}
    for module in export.store.schemes:
        found, stored = reader.read_linear(module).weight, export.store.read(module).weight
        assert torch.equal(dequantize(found), dequantize(stored))
    assert verify_path(export.folder)["linears"] == 13
    converted = tmp_path / "converted"
    convert_checkpoint(export.folder, "compressed-tensors", converted)
    assert verify_path(converted)["linears"] == 13


def test_autoround_packs_zero_points_less_one_as_gptq_of_v1(made: Made, tmp_path: Path) -> None:
    export = copy_of(made("gptq", "W4 g32 asym"), tmp_path)
    as_autoround(export, "auto_round:auto_gptq", symmetric=False)
    change_tensors(export, lambda t: [v.sub_(0x11111111) for k, v in t.items() if k.endswith("qzeros")])
    stored = {module: export.store.read(module).weight for module in export.store.schemes}
    sure = [module for module, weight in stored.items() if not bool((weight.zero_point == -8).any())]
    assert sure
    for module in sure:
        assert torch.equal(dequantize(export.reader().read_linear(module).weight), dequantize(stored[module]))


@pytest.mark.parametrize(
    ("packing", "changes", "message"),
    [
        ("auto_round:llm_compressor", {}, "'auto-round', packed as 'auto_round:llm_compressor'"),
        ("auto_round:auto_gptq", {"act_bits": 8}, "inputs of 8 bits"),
        ("auto_round:auto_gptq", {"data_type": "mx_fp"}, "'mx_fp'"),
        ("auto_round:auto_gptq", {"extra_config": {UP: {"bits": 8, "sym": False}}}, "sym False"),
    ],
)
def test_what_else_autoround_makes_is_refused(packing: str, changes: dict[str, Any], message: str, made: Made,
                                              tmp_path: Path) -> None:  # fmt: skip
    export = copy_of(made("gptq", "W4 g32"), tmp_path)
    as_autoround(export, packing, symmetric=True, **changes)
    with pytest.raises(ModelError, match=message):
        export.reader()


def test_a_last_group_that_is_shorter_is_refused() -> None:
    """One of 64 and one of 32."""
    with pytest.raises(ModelError, match="2 groups of 96 inputs are not of one size"):
        gptq.grouped(4, True, 96, 2, 64)
    assert gptq.grouped(4, True, 96, 3, 32).group_size == 32
    assert gptq.grouped(4, True, 96, 1, 128).granularity == "channel"


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"pack_dtype": "int8"}, "int8"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"bits": 3}, "3 bits"),
        ("awq", {"zero_point": False}, "zero_point False"),
    ],
)
def test_what_is_not_understood_is_refused(form: str, change: dict[str, Any], message: str, made: Made,
                                           tmp_path: Path) -> None:  # fmt: skip
    export = copy_of(made(form, "W4 g32"), tmp_path)
    change_config(export, lambda config: config.update(change))
    with pytest.raises(ModelError, match=message):
        export.reader()


@pytest.mark.parametrize("name", ["W4 g32", "W3 g32", "W8 g32 asym"])
def test_groups_of_inputs_in_any_order_are_read(name: str, made: Made, tmp_path: Path) -> None:
    export = copy_of(made("gptq", name), tmp_path)
    shuffle_groups(export.folder, desc_act=True)
    reader, tensors = export.reader(), tensors_of(export)
    weight = f"{UP}.weight"
    found = reader.read([weight])[weight]
    codes, scale, zero_point = export.store.read(UP).weight
    for row, column in ((0, 0), (5, 1), (17, 63), (127, 40), (64, 33)):
        group = int(tensors[f"{UP}.g_idx"][column])
        zero = 0 if zero_point is None else float(zero_point[row, group])
        exact = (float(codes[row, column]) - zero) * float(scale[row, group])
        assert float(found[row, column]) == torch.tensor(exact).to(found.dtype)
    assert {scheme.name for scheme in reader.schemes.values()} == {f"{GPTQ[name].name} ordered"}
    assert verify_path(export.folder)["linears"] == 13
    with pytest.raises(
        RecipeError, match=r"compressed-tensors is not written with inputs in groups out of their order"
    ):
        convert_checkpoint(export.folder, "compressed-tensors", tmp_path / "converted")
    convert_checkpoint(export.folder, "dense", tmp_path / "dense")
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")[weight], found)


def test_an_order_that_is_none_is_refused(made: Made, tmp_path: Path) -> None:
    export = copy_of(made("gptq", "W4 g32"), tmp_path)
    shuffle_groups(export.folder)
    with pytest.raises(ModelError, match=r"up_proj.*has no desc_act: true"):
        export.reader().read_linear(UP)
    shuffle_groups(export.folder, desc_act=True)
    for group in (-2, 2):
        change_tensors(export, lambda t, group=group: t[f"{UP}.g_idx"][3:4].fill_(group))  # type: ignore[misc]
        with pytest.raises(ModelError, match=r"up_proj.*there are 2"):
            export.reader().read_linear(UP)


def test_zero_points_of_weights_that_are_called_symmetric_are_refused(made: Made, tmp_path: Path) -> None:
    export = copy_of(made("gptq", "W4 g32"), tmp_path)
    change_tensors(export, lambda t: t[f"{UP}.qzeros"][0, :1].add_(1))
    with pytest.raises(ModelError, match=r"up_proj.*symmetric"):
        export.reader().read_linear(UP)


@pytest.mark.parametrize(
    ("form", "part"), [("gptq", "scales"), ("gptq", "g_idx"), ("awq", "scales"), ("awq", "qzeros")]
)
def test_a_missing_part_is_named(form: str, part: str, made: Made, tmp_path: Path) -> None:
    export = copy_of(made(form, "W4 g32"), tmp_path)
    change_tensors(export, lambda t: t.pop(f"{UP}.{part}"))
    with pytest.raises(ModelError, match=r"up_proj.*without"):
        export.reader()


# ------------------------------------------------------------------------------------------------------ damage


DAMAGED = [("gptq", "W4 g32"), ("gptq", "W3 asym"), ("awq", "W4 g32 asym")]


@pytest.mark.parametrize(("form", "name"), DAMAGED)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_tensor_is_found(
    form: str, name: str, made: Made, tmp_path: Path, place: float, bit: int
) -> None:
    export = copy_of(made(form, name), tmp_path)
    file = export.folder / "model.safetensors"
    flip_bit(file, place, bit)
    with pytest.raises(VerificationError):
        export.verify()


@pytest.mark.parametrize(("form", "name"), DAMAGED)
def test_a_flipped_bit_of_every_part_is_found(form: str, name: str, made: Made, tmp_path: Path) -> None:
    for key in [key for key in tensors_of(made(form, name)) if key.startswith(f"{UP}.")]:

        def flip(tensors: dict[str, Tensor], key: str = key) -> None:
            tensors[key].view(-1).view(torch.uint8)[0] ^= 1

        export = copy_of(made(form, name), tmp_path)
        change_tensors(export, flip)
        with pytest.raises(VerificationError, match="up_proj"):
            export.verify()
        export = copy_of(made(form, name), tmp_path)
        change_tensors(export, lambda tensors, key=key: tensors.pop(key))  # type: ignore[misc]
        with pytest.raises(VerificationError):
            export.verify()


CLAIMS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "bits": ("gptq", lambda c: c.update(bits=8)),
    "group size": ("gptq", lambda c: c.update(group_size=64)),
    "symmetric": ("gptq", lambda c: c.update(sym=False)),
    "order": ("gptq", lambda c: c.update(desc_act=True)),
    "order as a number": ("gptq", lambda c: c.update(desc_act=0)),
    "version": ("gptq", lambda c: c.update(checkpoint_format="gptq_v2")),
    "method": ("gptq", lambda c: c.update(quant_method="awq")),
    "head": ("gptq", lambda c: c.update(lm_head=True)),
    "nothing in float": ("gptq", lambda c: c.pop("dynamic")),
    "too much in float": ("gptq", lambda c: c.update(dynamic={r"-:.*\.1\.mlp.*": {}})),
    "another rule": ("gptq", lambda c: c["dynamic"].update({"+:.*q_proj": {"bits": 8}})),
    "not all quantized": ("gptq", lambda c: c["modules_in_block_to_quantize"][0].pop()),
    "foreign": ("gptq", lambda c: c.update(true_sequential=True)),
    "awq bits": ("awq", lambda c: c.update(bits=8)),
    "awq group size": ("awq", lambda c: c.update(group_size=-1)),
    "awq zero point": ("awq", lambda c: c.update(zero_point=False)),
    "awq version": ("awq", lambda c: c.update(version="gemv")),
    "awq nothing in float": ("awq", lambda c: c.update(modules_to_not_convert=None)),
    "awq one more in float": ("awq", lambda c: c["modules_to_not_convert"].append(UP)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_wrong_claim_is_found(claim: str, made: Made, tmp_path: Path) -> None:
    form, change = CLAIMS[claim]
    export = copy_of(made(form, "W4 g32"), tmp_path)
    change_config(export, change)
    with pytest.raises(VerificationError, match="quantization_config"):
        export.verify()


def test_configurations_that_differ_are_found(made: Made, tmp_path: Path) -> None:
    export = copy_of(made("gptq", "W4 g32"), tmp_path)
    file = export.folder / "quantize_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bits": 8}))
    with pytest.raises(VerificationError, match="differ"):
        export.verify()


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_nothing_quantized_is_a_float_checkpoint(form: str, tmp_path: Path) -> None:
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    parts = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    every = [f"model.layers.{i}.{part}" for i in (0, 1) for part in parts]
    export = export_tiny(tmp_path, weights(4), form=form, kept=every)
    assert "quantization_config" not in json.loads((export.folder / "config.json").read_text())
    assert export.verify().linears == 0
    assert export.reader().form is None
