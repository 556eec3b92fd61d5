"""AscendV1: what the store holds comes back, the description names every tensor, and damage of either is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import Export, export_tiny
from tiny_models import token_batches
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats import ascend, export
from quantcli.formats.engines import verdicts
from quantcli.formats.store import StoredLinear
from quantcli.formats.sums import SUMS
from quantcli.formats.verify import verify_checkpoint
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Linear
from quantcli.quant.activation import int8_linear, quantize_static
from quantcli.quant.grid import QuantizedWeight, dequantize
from quantcli.quant.scheme import AttentionScheme, Scheme

SCHEMES = {
    "W4A16": Scheme(4),
    "W4A16 asym": Scheme(4, symmetric=False),
    "W4A16 tensor": Scheme(4, granularity="tensor"),
    "W4A16 g32": Scheme(4, granularity="group", group_size=32),
    "W4A16 g32 asym": Scheme(4, symmetric=False, granularity="group", group_size=32),
    "WFP8AFP8_DYNAMIC": Scheme(8, activations="dynamic", type="float"),
    "W8A16": Scheme(8),
    "W8A16 asym": Scheme(8, symmetric=False),
    "W8A16 tensor": Scheme(8, granularity="tensor"),
    "W8A8": Scheme(8, activations="static"),
    "W8A8 asym": Scheme(8, activations="static", activations_symmetric=False),
    "W8A8 tensor": Scheme(8, granularity="tensor", activations="static", activations_symmetric=False),
    "W8A8S": Scheme(8, activations="static", activations_symmetric=False, sparse=True),
    "W8A8_DYNAMIC": Scheme(8, activations="dynamic"),
    "W8A8_MIX": Scheme(8, activations="mix", activations_symmetric=False),
    "W4A8_DYNAMIC": Scheme(4, activations="dynamic"),
    "W4A8_DYNAMIC tensor": Scheme(4, granularity="tensor", activations="dynamic"),
}
ATTENTION = {
    "C8": AttentionScheme(kv="int8"),
    "C8 asym": AttentionScheme(kv="int8", kv_symmetric=False),
    "FAQuant": AttentionScheme(heads=True),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [(name, torch.bfloat16) for name in SCHEMES]
RUNS += [(name, dtype) for name in ("W8A16 asym", "W8A8 asym", "W8A8_MIX") for dtype in (torch.float32, torch.float16)]
UP = "model.layers.1.mlp.up_proj"
EVERY_LINEAR = [
    f"model.layers.{block}.{part}_proj"
    for block in (0, 1)
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def tensors_of(made: Export) -> dict[str, Tensor]:
    return {name: t for file in made.folder.glob("*.safetensors") for name, t in load_file(file).items()}


def description_of(made: Export) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((made.folder / ascend.DESCRIPTION).read_text())
    return content


def held(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scale.to(dtype).float()


# ------------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_codes_and_scales_come_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Qwen 2 has biases at q, k and v. Scales that engines hold in the model's dtype come back rounded to it."""
    scheme = SCHEMES[name]
    made = export_tiny(tmp_path, scheme, "qwen2", dtype=dtype, form="ascend")
    reader = made.reader()
    read_as = scheme if scheme.granularity != "tensor" else Scheme(**{**scheme.to_json(), "granularity": "channel"})
    assert reader.schemes == dict.fromkeys(made.store.schemes, read_as)
    for module in made.store.schemes:
        stored, found = made.store.read(module), reader.read_linear(module)
        scale = stored.weight.scale.expand(len(stored.weight.codes), -1)
        if scheme.activations in ("dynamic", "mix"):
            scale = held(scale, dtype)
        scale = scale.to(found.weight.scale.dtype)
        assert found.weight.scale.dtype == (torch.float32 if "W4A8" in name else stored.weight.scale.dtype)
        assert torch.equal(found.weight.codes, stored.weight.codes)
        assert torch.equal(found.weight.scale, scale)
        assert (found.weight.zero_point is None) == scheme.symmetric
        if not scheme.symmetric:
            assert found.weight.zero_point is not None
            assert torch.equal(found.weight.zero_point, stored.weight.zero_point)  # type: ignore[arg-type]
        assert (found.input_scale is not None) == scheme.observed
        if found.input_scale is not None:
            assert torch.equal(found.input_scale, held(stored.input_scale, dtype))  # type: ignore[arg-type]
        assert found.input_zero_point == stored.input_zero_point
        weight = made.source.weights[module]
        assert torch.equal(reader.read([weight])[weight], dequantize(found.weight, dtype))
    assert made.verify().linears == 14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_4_bit_weights_correct_what_kernels_leave_out(dtype: torch.dtype, tmp_path: Path) -> None:
    """Kernels multiply an int8 input x as 16·(x >> 4) + ((x & 15) − 8) and add scale_bias for the 8 that they take away
    of every input; that linears whose input is split have 16 parts of it follows from the structure."""
    scheme = SCHEMES["W4A8_DYNAMIC"]
    made = export_tiny(tmp_path, scheme, "qwen2", dtype=dtype, form="ascend")
    tensors, reader = tensors_of(made), made.reader()
    x = torch.randint(-127, 128, (8, 128), generator=torch.Generator().manual_seed(0))
    for module in made.store.schemes:
        stored = reader.read_linear(module).weight
        inputs = x[:, : stored.codes.shape[1]]
        nibbles = 16 * (inputs >> 4) + (inputs & 15) - 8
        scale, sums = stored.scale.double(), tensors[f"{module}.scale_bias"]
        assert sums.dtype == torch.float32
        assert sums.shape == (len(scale), 16 if module.endswith(("o_proj", "down_proj")) else 1)
        computed = (nibbles.double() @ stored.codes.double().t()) * scale.t() + sums.double().sum(1)
        exact = (inputs.double() @ stored.codes.double().t()) * scale.t()
        torch.testing.assert_close(computed, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        each = inputs.shape[1] // sums.shape[1]
        part = dequantize(stored, torch.float32)[:, :each].double().sum(1)
        torch.testing.assert_close(sums[:, 0].double(), 8 * part, rtol=0, atol=1e-5 * float(sums.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_engine_computes_what_is_simulated(dtype: torch.dtype, tmp_path: Path) -> None:
    """(q·Wᵀ + quant_bias)·deq_scale by the file against the simulation: they part by the rounding of the bias."""
    made = export_tiny(tmp_path, SCHEMES["W8A8 asym"], "qwen2", dtype=dtype, form="ascend")
    reader, tensors = made.reader(), tensors_of(made)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
        name = f"model.layers.0.{part}"
        own = {suffix: tensors[f"{name}.{suffix}"] for suffix in ascend.layout(made.linears[name], SCHEMES["W8A8"], "")}
        deq = own["deq_scale"] if dtype == torch.bfloat16 else own["deq_scale"].int().view(torch.float32)
        assert own["deq_scale"].dtype == (torch.float32 if dtype == torch.bfloat16 else torch.int64)
        q = (x.double() / own["input_scale"].double() + own["input_offset"].double()).round().clamp(-128, 127)
        y = (q @ own["weight"].double().t() + own["quant_bias"].double()) * deq.double()
        stored, bias = reader.read_linear(name), tensors.get(f"{name}.bias")
        assert (bias is None) == (part == "mlp.up_proj")
        assert stored.input_scale is not None
        assert stored.input_zero_point is not None
        codes = quantize_static(x, stored.input_scale, stored.input_zero_point)
        assert (codes != q).double().mean() < 0.01  # ties, which float32 may see on the other side
        simulated = int8_linear(
            q.to(torch.int8), stored.input_scale, int(stored.input_zero_point), *stored.weight[:2], bias, torch.float32
        )
        assert bool(((y - simulated).abs() <= 0.5 * deq + 1e-5 * y.abs()).all())


@pytest.mark.parametrize(("linears", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("name", ATTENTION)
def test_scales_of_attention_come_back(name: str, linears: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    kept = [] if linears else EVERY_LINEAR
    made = export_tiny(tmp_path, SCHEMES["W8A8"], kept=kept, attention=ATTENTION[name], dtype=dtype, form="ascend")
    reader = made.reader()
    assert reader.attention == ATTENTION[name]
    assert reader.attention_modules == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for module in reader.attention_modules:
        stored, found = made.store.read_attention(module), reader.read_attention(module)
        assert stored.keys() == found.keys()
        for part, tensor in stored.items():
            assert torch.equal(found[part], held(tensor, dtype)), part
    description, tensors = description_of(made), tensors_of(made)
    assert description["model_quant_type"] == ("W8A8" if linears else "FLOAT")
    kind = {"fa_quant_type": "FAQuant"} if name == "FAQuant" else {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    assert {key: value for key, value in description.items() if key.startswith(("fa_", "kv_"))} == kind
    names = {f"model.layers.0.self_attn.{x}" for x in ("fa_q.scale", "fa_q.offset", "fa_k.scale", "fa_v.offset")}
    if name != "FAQuant":
        names = {f"model.layers.0.self_attn.{x}_proj.kv_cache_{y}" for x in "kv" for y in ("scale", "offset")}
    assert {description[each] for each in names} == set(kind.values())
    assert tensors["model.layers.1.self_attn.fa_q.scale"].shape == (4, 1) if name == "FAQuant" else True
    assert set(reader.entries) == set(load_file(made.model / "model.safetensors"))
    assert made.verify().linears == len(made.store.schemes)


@pytest.mark.parametrize("form", ["ascend", "compressed-tensors"])
def test_a_model_that_stays_in_float_is_a_plain_checkpoint(form: str, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, Scheme(8), kept=EVERY_LINEAR, form=form)
    original = load_file(made.model / "model.safetensors")
    tensors = tensors_of(made)
    assert original.keys() == tensors.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in original)
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())
    reader = made.reader()
    assert (reader.schemes, reader.attention, reader.attention_modules) == ({}, None, [])
    assert torch.equal(reader.read([f"{UP}.weight"])[f"{UP}.weight"], original[f"{UP}.weight"])
    assert made.verify().linears == 0
    if form == "ascend":
        assert set(description_of(made).values()) == {"FLOAT", "1.0.0", 0}


def test_an_fp8_cache_alone_is_written_and_read_as_compressed_tensors(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, Scheme(8), kept=EVERY_LINEAR, attention=AttentionScheme(kv="fp8"))
    reader = made.reader()
    assert (reader.schemes, reader.attention) == ({}, AttentionScheme(kv="fp8"))
    for module in reader.attention_modules:
        stored, found = made.store.read_attention(module), reader.read_attention(module)
        assert stored.keys() == found.keys() == {"k_scale", "v_scale"}
        assert all(torch.equal(found[part], stored[part]) for part in stored)
    assert set(reader.entries) == set(load_file(made.model / "model.safetensors"))
    assert len(reader.attention_modules) == 2
    assert made.verify().linears == 0
    file = made.folder / "model.safetensors"
    tensors = load_file(file)
    for damage in (lambda t: t.update(twice=t.pop("model.layers.1.self_attn.v_scale")),
                   lambda t: t["model.layers.0.self_attn.k_scale"].mul_(2)):  # fmt: skip
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        damage(changed)
        save_file(changed, file)
        with pytest.raises(VerificationError, match="self_attn"):
            made.verify()


# ------------------------------------------------------------------------------------------------------ files


def test_a_mixed_model_is_described_tensor_by_tensor(tmp_path: Path) -> None:
    others = {"lm_head": SCHEMES["W8A16"], "*.mlp.down_proj": SCHEMES["W8A8_MIX"], "*.o_proj": SCHEMES["W8A8_DYNAMIC"]}
    kept = [name for name in EVERY_LINEAR if "gate" in name or "up" in name]
    made = export_tiny(tmp_path, SCHEMES["W8A8"], "qwen2", others=others, kept=kept, form="ascend")
    description = description_of(made)
    about = {"model_quant_type": "W8A8", "version": "1.0.0", "group_size": 0}
    assert {key: description.pop(key) for key in about} == about
    assert description.keys() == tensors_of(made).keys()
    layer = "model.layers.0"
    for name, kind in {
        f"{layer}.self_attn.q_proj.weight": "W8A8", f"{layer}.self_attn.q_proj.quant_bias": "W8A8",
        f"{layer}.self_attn.q_proj.bias": "FLOAT", f"{layer}.self_attn.o_proj.weight_scale": "W8A8_DYNAMIC",
        f"{layer}.mlp.down_proj.deq_scale": "W8A8_MIX", f"{layer}.mlp.up_proj.weight": "FLOAT",
        f"{layer}.input_layernorm.weight": "FLOAT", "model.embed_tokens.weight": "FLOAT",
        "lm_head.weight": "W8A16", "lm_head.weight_offset": "W8A16", "model.norm.weight": "FLOAT",
    }.items():  # fmt: skip
        assert description[name] == kind, name
    reader = made.reader()
    # symmetric static inputs beside asymmetric mixed ones are read with zero points of 0
    asymmetric = Scheme(8, activations="static", activations_symmetric=False)
    read_as = {SCHEMES["W8A8"]: asymmetric}
    assert reader.schemes == {name: read_as.get(scheme, scheme) for name, scheme in made.store.schemes.items()}
    assert made.verify().linears == 11


def test_a_tied_head_is_written_as_a_copy(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A8"], "llama-tied", dtype=torch.bfloat16, form="ascend")
    tensors = tensors_of(made)
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert description_of(made)["lm_head.weight"] == "FLOAT"
    made.verify()
    reader = made.reader()
    stream = BlockStream(
        Skeleton(made.model, made.structure, dtype=reader.dtype, checkpoint=reader), token_batches((1, 4))
    )
    (hidden,) = stream.start()
    with stream.head():
        ((_, logits),) = stream.logits(hidden)
    assert bool(torch.isfinite(logits).all())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, made.folder / "quant_model_weights.safetensors")
    with pytest.raises(VerificationError, match=r"lm_head\.weight differs"):
        made.verify()


def test_config_says_nothing_of_quantization(tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A8"], form="ascend")
    assert json.loads((made.folder / "config.json").read_text()) == json.loads((made.model / "config.json").read_text())
    config = {"text_config": {"quantization_config": {}, "a": 1}, "quantization_config": {}, "b": 2}
    written = ascend.documents(config, made.store, set(), {})["config.json"]
    assert written == {"text_config": {"a": 1}, "b": 2}


def test_shards_have_the_names_of_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export_tiny(tmp_path, SCHEMES["W8A8 asym"], "llama-tied", form="ascend", attention=ATTENTION["C8"])
    whole = tensors_of(made)
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    files = [file.name for file in made.write(tmp_path / "sharded")]
    count = sum(name.endswith(".safetensors") for name in files)
    assert files[0] == f"quant_model_weights-00001-of-{count:05d}.safetensors"
    assert files[count] == "quant_model_weights.safetensors.index.json"
    assert files[-3:] == [ascend.DESCRIPTION, SUMS, "config.json"]
    sharded = Export(tmp_path / "sharded", made.model, made.structure, made.store, made.source, "ascend")
    tensors = tensors_of(sharded)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert description_of(sharded) == description_of(made)
    assert sharded.verify().linears == 14
    assert sharded.reader().schemes == made.store.schemes


# ------------------------------------------------------------------------------------------------------ refusals


def test_what_the_format_has_no_place_for_is_refused() -> None:
    linear = Linear("x", 64, 64)
    for scheme, reason in [
        (Scheme(3), "W3A16"),
        (Scheme(8, type="float"), "every token"),
        (Scheme(8, activations="static", type="float"), "every token"),
        (Scheme(8, granularity="group", group_size=32), "group"),
        (Scheme(8, symmetric=False, activations="static"), "symmetric weights"),
        (Scheme(8, activations="dynamic", activations_symmetric=False), "symmetric dynamic"),
        (Scheme(8, sparse=True), "W8A8S"),
        (Scheme(4, activations="static"), "W4A8 static"),
        (Scheme(4, granularity="group", group_size=32, activations="dynamic"), "4-bit weights beside 8-bit inputs"),
        (Scheme(4, symmetric=False, activations="dynamic"), "symmetric weights"),
        (Scheme(4, activations="dynamic", activation_bits=4), "8-bit activations only"),
        (Scheme(8, activations="dynamic", activation_bits=4), "8-bit activations only"),
    ]:
        assert reason in ascend.refusal(linear, scheme)
    assert "pairs" in ascend.refusal(Linear("x", 63, 64), Scheme(4))
    assert "pairs" in ascend.refusal(Linear("x", 64, 63), SCHEMES["W4A16 g32"])
    assert "pairs" in ascend.refusal(Linear("x", 64, 63), SCHEMES["W4A8_DYNAMIC"])
    assert "72 channels" in ascend.refusal(Linear("x", 72, 64, splits_input=True), SCHEMES["W4A8_DYNAMIC"])
    assert not ascend.refusal(Linear("x", 72, 64), SCHEMES["W4A8_DYNAMIC"])
    assert "Conv1D" in ascend.refusal(Linear("x", 64, 64, transposed=True), Scheme(8))
    assert not any(ascend.refusal(linear, scheme) for scheme in SCHEMES.values())
    assert "fp8" in ascend.attention_refusal(AttentionScheme(kv="fp8"))
    assert "not both" in ascend.attention_refusal(AttentionScheme(kv="int8", heads=True))
    assert not any(ascend.attention_refusal(attention) for attention in ATTENTION.values())


def test_integers_that_do_not_fit_are_refused() -> None:
    codes, linear = torch.ones(2, 4, dtype=torch.int8), Linear("x", 4, 2)

    def stored(scale: float) -> StoredLinear:
        return StoredLinear(QuantizedWeight(codes, torch.full((2, 1), scale), None), torch.tensor([1e-3]))

    with pytest.raises(ModelError, match="deq_scale"):
        ascend.encode(stored(1e-43), SCHEMES["W8A8"], "float32", None, linear)
    with pytest.raises(ModelError, match="quant_bias"):
        ascend.encode(stored(1e-6), SCHEMES["W8A8"], "float32", torch.tensor([1.0, 3.0]), linear)
    fits = ascend.encode(stored(1e-6), SCHEMES["W8A8"], "float32", torch.tensor([1.0, -2.0]), linear)["quant_bias"]
    torch.testing.assert_close(fits, torch.tensor([10**9, -2 * 10**9], dtype=torch.int32), rtol=1e-6, atol=0)


def test_a_mixed_model_is_loaded_only_if_all_of_it_is() -> None:
    q, k, up = (
        Linear(f"model.layers.0.{name}", 64, 64) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    )
    static, asymmetric = SCHEMES["W8A8 asym"], SCHEMES["W8A16 asym"]

    def of_vllm(*args: Any) -> tuple[bool, str]:
        found = {v.engine: v for v in verdicts(*args)}["vLLM-Ascend"]
        return found.loads, found.note

    assert of_vllm([(q, static), (k, static), (up, Scheme(8))], None, ["ascend"]) == (True, "not run here")
    loads, note = of_vllm([(q, static), (k, static), (up, asymmetric)], None, ["ascend"])
    assert not loads
    assert note.startswith("W8A16 asym: ")
    assert "q_proj and model.layers.0.self_attn.k_proj" in of_vllm([(q, static), (k, Scheme(8))], None, ["ascend"])[1]
    assert not of_vllm([(q, static)], None, ["ascend"], [k.name])[0]
    assert of_vllm([(q, static)], None, ["ascend"], [up.name])[0]
    expert, four = Linear("model.layers.0.mlp.experts.0.up_proj", 64, 64), SCHEMES["W4A8_DYNAMIC"]
    assert of_vllm([(expert, four), (q, static)], None, ["ascend"], (), [[expert.name]])[0]
    assert of_vllm([(up, four)], None, ["ascend"], (), [[expert.name]])[1].startswith("has W4A8 dynamic for experts")
    engines = [v.engine for v in verdicts([(q, Scheme(8))], None, ["ascend", "compressed-tensors"])]
    assert engines == [
        "vLLM-Ascend (ascend)", "MindIE", "SGLang (ascend)", "vLLM on a CPU", "vLLM on a GPU",
        "vLLM-Ascend (compressed-tensors)", "transformers", "SGLang (compressed-tensors)",
    ]  # fmt: skip
    fp8 = {v.engine: v.loads for v in verdicts([], AttentionScheme(kv="fp8"), ["compressed-tensors", "ascend"])}
    assert fp8 == {
        "vLLM on a CPU": True,
        "vLLM on a GPU": True,
        "vLLM-Ascend (compressed-tensors)": False,
        "transformers": True,
        "SGLang (compressed-tensors)": False,
        "vLLM-Ascend (ascend)": False,
        "MindIE": False,
        "SGLang (ascend)": False,
    }


# ------------------------------------------------------------------------------------------------------ damage


def damaged(made: Export, place: Path, change: Callable[[dict[str, Any]], Any], file: str) -> Export:
    """A copy of an export with one JSON file, or the tensors, changed."""
    shutil.rmtree(place / "copy", ignore_errors=True)
    shutil.copytree(made.folder, place / "copy")
    path = place / "copy" / file
    if file.endswith(".json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
    return Export(place / "copy", made.model, made.structure, made.store, made.source, "ascend")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Export:
    others = {"*.o_proj": SCHEMES["W8A8_DYNAMIC"], "*.down_proj": SCHEMES["W8A16 asym"]}
    return export_tiny(
        tmp_path_factory.mktemp("whole"), SCHEMES["W8A8 asym"], "qwen2", others=others, dtype=torch.float16,
        attention=ATTENTION["C8 asym"], form="ascend",
    )  # fmt: skip


def test_a_flipped_bit_in_every_tensor_is_found(whole: Export, tmp_path: Path) -> None:
    quantized = ("q_proj", "o_proj", "down_proj", "k_proj.kv")
    for name in tensors_of(whole):
        if "layers" not in name or ("layers.0" in name and any(part in name for part in quantized)):

            def flip(tensors: dict[str, Tensor], name: str = name) -> None:
                tensors[name].view(-1).view(torch.uint8)[0] ^= 1

            made = damaged(whole, tmp_path, flip, "quant_model_weights.safetensors")
            with pytest.raises(VerificationError):
                made.verify()


def test_tensors_that_are_missing_or_foreign_are_found(whole: Export, tmp_path: Path) -> None:
    file = "quant_model_weights.safetensors"
    for name in (f"{UP}.quant_bias", f"{UP}.weight_offset", "model.layers.0.self_attn.v_proj.kv_cache_offset"):
        for change in (
            lambda t, name=name: t.pop(name),
            lambda t, name=name: t.update({name: t[name].double()}),
            lambda t, name=name: t.update({f"{name}x": t[name].clone()}),
        ):
            with pytest.raises(VerificationError):
                damaged(whole, tmp_path, change, file).verify()


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no entry of a weight": lambda d: d.pop(f"{UP}.weight"),
    "no entry of a norm": lambda d: d.pop("model.norm.weight"),
    "another type": lambda d: d.update({f"{UP}.weight": "W8A8_DYNAMIC"}),
    "another type of a scale": lambda d: d.update({f"{UP}.deq_scale": "FLOAT"}),
    "a type of a bias": lambda d: d.update({"model.layers.0.self_attn.q_proj.bias": "W8A8"}),
    "float that is none": lambda d: d.update({"lm_head.weight": "W8A8"}),
    "a tensor that is none": lambda d: d.update({"model.layers.7.mlp.up_proj.weight": "W8A8"}),
    "the type of the model": lambda d: d.update(model_quant_type="W8A16"),
    "groups": lambda d: d.update(group_size=128),
    "no cache": lambda d: d.pop("kv_cache_type"),
    "cache of another type": lambda d: d.update({"model.layers.0.self_attn.k_proj.kv_cache_scale": "W8A8"}),
    "heads": lambda d: d.update(fa_quant_type="FAQuant"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_claim_of_the_description_is_found(claim: str, whole: Export, tmp_path: Path) -> None:
    made = damaged(whole, tmp_path, CLAIMS[claim], ascend.DESCRIPTION)
    with pytest.raises(VerificationError, match=r"quant_model_description\.json"):
        made.verify()


def test_an_untouched_copy_is_in_order_and_other_formats_are_not_this_one(whole: Export, tmp_path: Path) -> None:
    made = damaged(whole, tmp_path, lambda tensors: None, "quant_model_weights.safetensors")
    assert made.verify().linears == 14
    with pytest.raises(VerificationError, match="quantization_config"):
        verify_checkpoint(made.folder, made.store, made.source.checkpoint, made.source.weights, None)
    made = damaged(whole, tmp_path, lambda config: config.update(quantization_config={}), "config.json")
    with pytest.raises(VerificationError, match="quantization_config"):
        made.verify()
    (made.folder / ascend.DESCRIPTION).unlink()
    with pytest.raises(VerificationError, match="quant_model_description"):
        made.verify()


def test_our_own_reader_refuses_what_it_would_misread(whole: Export, tmp_path: Path) -> None:
    for change, match in [
        (lambda d: d.update({f"{UP}.weight": "W4A4_DYNAMIC"}), "W4A4_DYNAMIC"),
        (lambda d: d.pop(f"{UP}.weight"), "up_proj"),
        (lambda d: d.update(kv_cache_type="C4"), "C4"),
        (lambda d: d.update(fa_quant_type="FAKQuant"), "FAKQuant"),
    ]:
        with pytest.raises(ModelError, match=match):
            damaged(whole, tmp_path, change, ascend.DESCRIPTION).reader()
