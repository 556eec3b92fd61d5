"""A treatment carried out on one linear, and what takes the linear's place, against loops in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, opened, read
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import quantcli
from quantcli.errors import ModelError
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store, StoredLinear
from quantcli.pipeline.gates import fallbacks
from quantcli.pipeline.plan import Treatment
from quantcli.pipeline.treatment import (
    Phase,
    WeightSource,
    input_parameters,
    quantize_weight,
    replacement,
    with_input,
)
from quantcli.quant.observers import Observed
from quantcli.quant.scheme import Scheme
from quantcli.recipe.quantization import ActivationsSection, WeightsSection

Recipe = dict[str, Any]
OUT, IN = 12, 32

WEIGHT_ONLY = [
    {"bits": 8},
    {"bits": 8, "granularity": "tensor"},
    {"bits": 4, "granularity": "group", "group_size": 16, "symmetric": False},
    {"bits": 4, "granularity": "group", "group_size": 16, "full_range": False},
    {"bits": 3, "symmetric": False, "method": "mse"},
    {"bits": 2, "granularity": "group", "group_size": 16, "method": "mse"},
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def treated(weights: dict[str, Any], weight: Tensor) -> StoredLinear:
    section = WeightsSection(**weights)
    scheme = Scheme(section.bits, section.symmetric, section.granularity, section.group_size)
    return quantize_weight("proj", weight, Treatment(scheme, section, ActivationsSection()), "float32", None)[0]


def slow_dequantized(stored: StoredLinear) -> Tensor:
    """(q - z) * s of every weight, one at a time; float64, which holds the product of an int9 and a float32."""
    codes, scale, zero = stored.weight
    values = torch.zeros(codes.shape, dtype=torch.float64)
    rows, groups = scale.shape
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            at = (row if rows > 1 else 0, column * groups // codes.shape[1])
            offset = 0 if zero is None else int(zero[at])
            values[row, column] = (int(codes[row, column]) - offset) * float(scale[at])
    return values


def slow_input(x: Tensor, scale: float | None, zero: int) -> Tensor:
    """Every token quantized and back in float64, with its own scale where none is given."""
    tokens = x.double().reshape(-1, x.shape[-1])
    rows = []
    for token in tokens:
        s = scale if scale is not None else float((token.float().abs().max() / 127).double())
        codes = [min(127, max(-128, round(float(value) / s) + zero)) for value in token]
        rows.append([(code - zero) * s for code in codes])
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


def linear_with_bias() -> nn.Linear:
    module = nn.Linear(IN, OUT)
    module.bias.data = random(OUT, seed=5)
    return module


def conv_with_bias() -> Conv1D:
    module = Conv1D(OUT, IN)
    module.bias.data = random(OUT, seed=5)
    return module


@pytest.mark.parametrize("weights", WEIGHT_ONLY, ids=str)
def test_weights_alone_give_the_product_with_what_they_stand_for(weights: dict[str, Any]) -> None:
    module, weight, x = linear_with_bias(), random(OUT, IN), random(2, 5, IN, seed=1)
    stored = treated(weights, weight)
    expected = slow_dequantized(stored).float()
    with simulated(
        nn.ModuleDict({"proj": module}), {"proj": replacement(stored, Scheme(4), x.dtype, "cpu", "prefill")}
    ):
        found = module(x)
    module.weight.data = expected
    assert torch.equal(found, module(x))
    step = stored.weight.scale.abs().max()
    if "method" not in weights and "full_range" not in weights:
        assert (expected - weight).abs().max() <= step / 2 * 1.0001


@pytest.mark.parametrize("weights", WEIGHT_ONLY, ids=str)
def test_transposed_linears_compute_the_same(weights: dict[str, Any]) -> None:
    module, x = conv_with_bias(), random(2, 5, IN, seed=1)
    stored = treated(weights, random(OUT, IN))
    with simulated(
        nn.ModuleDict({"proj": module}), {"proj": replacement(stored, Scheme(4), x.dtype, "cpu", "prefill")}
    ):
        found = module(x)
    module.weight.data = slow_dequantized(stored).float().t().contiguous()
    torch.testing.assert_close(found, module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [linear_with_bias, conv_with_bias])
@pytest.mark.parametrize("zero", [None, -9])
@pytest.mark.parametrize(
    ("mode", "phase", "static"),
    [
        ("static", "prefill", True),
        ("static", "decode", True),
        ("dynamic", "prefill", False),
        ("dynamic", "decode", False),
        ("mix", "prefill", False),
        ("mix", "decode", True),
    ],
)
def test_inputs_have_the_scale_of_their_mode_and_phase(
    make: Callable[[], nn.Module], zero: int | None, mode: str, phase: Phase, static: bool
) -> None:
    module, x = make(), random(2, 5, IN, seed=2) * torch.tensor([0.1, 1, 10, 1, 3]).view(1, 5, 1)
    stored = treated({"bits": 8}, random(OUT, IN))
    if mode != "dynamic":
        stored = with_input(stored, torch.tensor([0.07]), None if zero is None else torch.tensor([zero]).to(torch.int8))
    with simulated(
        nn.ModuleDict({"proj": module}),
        {"proj": replacement(stored, Scheme(8, activations=mode), x.dtype, "cpu", phase)},
    ):
        found = module(x)
    scale = float(torch.tensor(0.07)) if static else None
    inputs = slow_input(x, scale, zero or 0 if static else 0)
    assert isinstance(module.bias, Tensor)
    expected = inputs @ slow_dequantized(stored).t() + module.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weight = random(OUT, IN)
    weight[3, 4] = value
    with pytest.raises(ModelError, match=r"proj\.weight .* not finite") as caught:
        treated({"bits": 8}, weight)
    assert caught.value.remedy


def gpt2_recipe(root: Path) -> Recipe:
    return {
        "model": {"path": str(save_tiny_model("gpt2", root / "gpt2", with_tokenizer=True)), "sanity_check": "off"},
        "quantize": {"weights": {"bits": 8}},
        "export": None,
        "output": str(root / "run"),
    }


def test_transposed_weights_are_read_with_outputs_first(tmp_path: Path) -> None:
    with opened(gpt2_recipe(tmp_path), "quantize") as context:
        checkpoint = load_file(context.model / "model.safetensors")
        source = WeightSource(context)
        for name in context.plan.treatments:
            assert torch.equal(source.read(name), checkpoint[f"{name}.weight"].t())


@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
def test_fp8_linears_that_engines_join_have_one_scale(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, method: str
) -> None:
    weights = {"type": "float", "granularity": "tensor", "method": method}
    recipe = changed(static_recipe(tmp_path / "run"), export=None, evaluate=None, quantize={"weights": weights})
    with opened(recipe, "quantize") as context:
        store, model = Store(context.folder("quantize")), load_file(context.model / "model.safetensors")
    for short in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        names = [f"model.layers.1.{name}" for name in short]
        found = [store.read(name).weight for name in names]
        assert len({float(each.scale) for each in found}) == 1
        if method == "minmax":
            largest = max(float(model[f"{name}.weight"].abs().max()) for name in names)
            assert float(found[0].scale) == pytest.approx(largest / 448, rel=1e-2)
            for name, each in zip(names, found, strict=True):
                codes = (model[f"{name}.weight"].float() / each.scale.float()).to(torch.float8_e4m3fn)
                assert torch.equal(codes.float(), each.codes.float())
    alone = {float(store.read(f"model.layers.1.{name}").weight.scale) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert len(alone) == 2


# faults of a whole run


@pytest.fixture
def damaged(
    static_recipe: Callable[[Path], Recipe], tiny_llama: Path, tmp_path: Path
) -> Callable[[dict[str, Callable[[Tensor], Tensor]]], Recipe]:
    """The recipe of the tiny Llama with some tensors of its checkpoint changed."""

    def make(changes: dict[str, Callable[[Tensor], Tensor]]) -> Recipe:
        model = tmp_path / "model"
        model.mkdir()
        for file in tiny_llama.iterdir():
            if file.suffix != ".safetensors":
                (model / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tiny_llama / "model.safetensors")
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        return changed(static_recipe(tmp_path / "run"), model={"path": str(model), "sanity_check": "off"})

    return make


def infinite(x: Tensor) -> Tensor:
    return torch.full_like(x, math.inf)


def test_inputs_that_are_not_finite_are_named(damaged: Callable[..., Recipe]) -> None:
    recipe = damaged({"model.layers.1.post_attention_layernorm.weight": infinite})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.gate_proj: .* not finite") as caught:
        quantcli.run(recipe)
    assert "model.dtype" in caught.value.remedy


@pytest.mark.parametrize("propagation", ["float", "quantized"])
def test_so_are_those_of_the_output_head(damaged: Callable[..., Recipe], propagation: str) -> None:
    recipe = damaged({"model.norm.weight": infinite})
    recipe["quantize"] |= {"rollback": {"last_linear": False}}
    recipe["quantize"]["activations"]["propagation"] = propagation
    with pytest.raises(ModelError, match=r"lm_head: .* not finite") as caught:
        quantcli.run(recipe)
    assert "model.dtype" in caught.value.remedy


def texts(recipe: Recipe, kind: str = "warning") -> list[str]:
    """What the events of a run say; each line has to be JSON as others read it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (Path(recipe["output"]) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    return [event["text"] for event in events if event["event"] == kind]


@pytest.mark.parametrize("metric", ["range_parm", "output_error", "block_error"])
def test_weights_and_inputs_of_zeros_are_named_and_lose_nothing(damaged: Callable[..., Recipe], metric: str) -> None:
    """Any scale represents them; they are no reason to roll a linear back."""
    recipe = damaged({f"model.layers.{index}.mlp.up_proj.weight": torch.zeros_like for index in range(3)})
    recipe |= {"export": None, "evaluate": None}
    recipe["quantize"]["rollback"] = {"level": 1, "metric": metric, "siblings": "apart"}
    fed_zeros = {f"model.layers.{index}.mlp.down_proj" for index in range(3)}
    with opened(recipe, "quantize") as context:
        assert not fed_zeros & set(context.plan.kept)
        store = Store(context.folder("quantize"))
        assert all(store.read(name).input_scale == 1 for name in fed_zeros)
    assert all(row[metric] == 0 for row in read(recipe, "sensitivity", "sensitivity.json")["linears"]
               if row["name"] in fed_zeros)  # fmt: skip
    warnings = texts(recipe)
    for name in fed_zeros:
        assert [w for w in warnings if f"input of {name} was zero" in w and "roll it back" in w]
        assert [w for w in warnings if f"of {name.replace('down', 'up')} hold zeros only" in w and "Check" in w]


def test_constant_inputs_are_named_and_come_first(damaged: Callable[..., Recipe]) -> None:
    """Every token enters the first linears as the same value in all channels: infinitely far out for a spread of 0."""
    recipe = damaged(
        {"model.embed_tokens.weight": torch.ones_like, "model.layers.0.input_layernorm.weight": torch.ones_like}
    )
    recipe |= {"export": None, "evaluate": None}
    recipe["quantize"]["rollback"] = {"level": 1}
    with opened(recipe, "quantize") as context:
        names = [f"model.layers.0.self_attn.{short}_proj" for short in "qkv"]
        assert set(names) == {name for name in context.plan.kept if name != "lm_head"}
    rows = read(recipe, "sensitivity", "sensitivity.json")["linears"]
    assert [row["name"] for row in rows[:3]] == names
    assert [row["range_parm"] for row in rows[:3]] == [None] * 3
    assert [w for w in texts(recipe) if "64 of 64 input channels" in w and names[0] in w and "more calibration" in w]


@pytest.mark.parametrize("static", [False, True])
def test_channels_that_nothing_is_solved_for_are_named_once(damaged: Callable[..., Recipe], static: bool) -> None:
    """GPTQ rounds them to nearest; of static inputs the stage calibrate has warned."""

    def some(tensor: Tensor) -> Tensor:
        return tensor.index_fill(0, torch.arange(16), 0)

    recipe = damaged(
        {"model.layers.0.input_layernorm.weight": some, "model.layers.1.mlp.up_proj.weight": torch.zeros_like}
    )
    recipe |= {"export": None, "evaluate": None}
    recipe["quantize"] = {"weights": {"bits": 8, "method": "gptq"}}
    if static:
        recipe["quantize"]["activations"] = {"bits": 8, "scope": "tensor"}
    quantcli.run(recipe)
    few, every = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    about = [text for text in texts(recipe) if "hold zeros only" not in text]
    assert len(about) == 2
    assert f"16 of 64 input channels of {few} " in about[0]
    assert f"The input of {every} was zero" in about[1]
    assert all(("rounded to nearest" in text) != static for text in about)
    assert fallbacks(Path(recipe["output"]), ("calibrate", "quantize"))["constant_inputs"] == 2


def test_inputs_whose_squares_are_infinite_are_named(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    """Values of 1e22 are finite in float32 and in bfloat16; their squares are not."""
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e22
    for short in "qkv":
        tensors[f"model.layers.1.self_attn.{short}_proj.weight"][:, 3] = 1e-25
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    recipe = changed(
        static_recipe(tmp_path / "run"), model__path=str(model), export=None, evaluate=None,
        quantize={"weights": {"bits": 4, "method": "mse"}},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.self_attn\.[qkv]_proj: input values of a channel are so"):
        quantcli.run(recipe)


def test_an_input_without_spread_is_recorded_as_json() -> None:
    """All channels of all tokens have one value, as behind a LayerNorm whose weight is 0: range_parm is infinite."""
    observed = Observed(torch.ones(2), torch.ones(2), range_parm=math.inf)
    treatment = Treatment(Scheme(8, activations="static"), WeightsSection(), ActivationsSection(bits=8))
    scale, _, facts = input_parameters(observed, treatment)
    assert scale.item() == pytest.approx(1 / 255)
    assert json.loads(json.dumps(facts, allow_nan=False)) == {"input_min": 0, "input_max": 1, "range_parm": None}
