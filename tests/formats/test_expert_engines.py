"""What engines make of experts: transformers loads what the table says, to the bit; the rest is as in the sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import save_tiny_model, token_batches

import quantcli
from quantcli.formats.engines import refusal, verdicts
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.model.skeleton import Skeleton
from quantcli.model.structure import Linear
from quantcli.quant.scheme import Scheme

G32: dict[str, Any] = {"bits": 4, "granularity": "group", "group_size": 32, "method": "minmax"}
DYNAMIC = {"bits": 8, "scope": "token"}
FLOAT = {"match": "*.experts.*", "scheme": "float"}
W4_EXPERTS = {"match": "*.experts.*", "scheme": "W4A16", "weights": {"group_size": 32, "method": "minmax"}}
RECIPES: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": G32},
    "W8A16": {"weights": {"bits": 8}},
    "W8A8": {"weights": {"bits": 8}, "activations": DYNAMIC},
    "W4A16, experts in float": {"weights": G32, "overrides": [FLOAT]},
    "W8A16, experts in W4A16": {"weights": {"bits": 8}, "overrides": [W4_EXPERTS]},
}
ONE, OTHER = "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.1.gate_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2-moe", tmp_path_factory.mktemp("moe") / "model", num_hidden_layers=1)


@pytest.mark.parametrize(("name", "smooth"), [*((name, None) for name in RECIPES), ("W4A16", {"method": "rotate"})])
def test_transformers_loads_experts_as_the_table_says(
    name: str, smooth: dict[str, Any] | None, model: Path, tmp_path: Path
) -> None:
    recipe = {"model": {"path": str(model)}, "output": str(tmp_path), "smooth": smooth}
    plan = quantcli.run({**recipe, "quantize": {"activations": {"bits": 16}, **RECIPES[name]}}).plan
    (verdict,) = (v for v in plan.engines if v.engine == "transformers")
    folder = tmp_path / "export" / "compressed-tensors"
    assert verdict.loads == (name not in ("W8A8", "W4A16, experts in float"))
    if not verdict.loads:
        with pytest.raises(RuntimeError):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    linears = {linear.name: linear for linear in plan.structure.matrices()}
    reader = QuantizedCheckpoint(folder, linears, {name: f"{name}.weight" for name in linears})
    ours = Skeleton(model, plan.structure, checkpoint=reader)
    (tokens,) = token_batches((2, 16))
    with torch.inference_mode(), ours.resident(ours.model.state_dict()):
        assert torch.equal(theirs(tokens).logits, ours.model(tokens).logits)


def test_a_model_of_experts_alone_in_another_scheme_names_each(model: Path, tmp_path: Path) -> None:
    quantize = {"activations": {"bits": 16}, **RECIPES["W8A16, experts in W4A16"]}
    quantcli.run({"model": {"path": str(model)}, "output": str(tmp_path), "quantize": quantize})
    config = json.loads((tmp_path / "export" / "compressed-tensors" / "config.json").read_text())
    first, second = config["quantization_config"]["config_groups"].values()
    assert all(".experts." in name for name in first["targets"])
    assert first["weights"]["num_bits"] == 4
    assert len(first["targets"]) == 12 > len(second["targets"])


def said(engine: str, *schemes: Scheme | None) -> tuple[bool, str]:
    """The verdict on two experts of these schemes (the last for all others) beside as many linears of the first."""
    named = dict(zip((ONE, OTHER), schemes * 2, strict=False))
    linears = [(Linear(name, 256, 256), scheme) for name, scheme in named.items() if scheme is not None]
    kept = [name for name, scheme in named.items() if scheme is None]
    if kept:
        linears.append(
            (Linear("model.layers.0.self_attn.o_proj", 256, 256), Scheme(4, granularity="group", group_size=64))
        )
    (verdict,) = (v for v in verdicts(linears, kept=kept, experts=[(ONE, OTHER)]) if v.engine == engine)
    return verdict.loads, verdict.note


def g(size: int, bits: int = 4, **changes: Any) -> Scheme:
    return Scheme(bits, granularity="group", group_size=size, **changes)


DYNAMIC_ASYM = Scheme(8, activations="dynamic", activations_symmetric=False)


@pytest.mark.parametrize(
    ("engine", "schemes", "loads", "note"),
    [
        ("vLLM on a CPU", [g(64)], True, "4-bit experts need a CPU with AMX; not run here"),
        ("vLLM on a CPU", [g(32)], False, "has no kernel for experts of W4A16 g32"),
        ("vLLM on a CPU", [Scheme(4)], False, "has no kernel for experts of W4A16"),
        ("vLLM on a CPU", [Scheme(8, activations="dynamic")], True, "int8 experts need a CPU with AMX, or Arm"),
        ("vLLM on a CPU", [DYNAMIC_ASYM], True, "int8 experts, whose inputs it takes for symmetric"),
        ("vLLM on a GPU", [DYNAMIC_ASYM], True, "takes inputs of experts for symmetric"),
        ("vLLM on a CPU", [None], True, "experts in float"),
        ("vLLM on a GPU", [g(32)], True, "Marlin"),
        ("vLLM on a GPU", [g(64, activations="dynamic")], False, "has no kernel for experts of W4A8 dynamic g64"),
        ("vLLM on a GPU", [g(64), g(32)], False, "gives all experts of a layer one scheme"),
        ("transformers", [g(32), g(64)], False, "unpacks all experts by one scheme"),
        ("transformers", [g(32)], True, "compressed-tensors package"),
    ],
)
def test_the_table(engine: str, schemes: list[Scheme | None], loads: bool, note: str) -> None:
    assert said(engine, *schemes)[0] == loads
    assert note in said(engine, *schemes)[1]


@pytest.mark.parametrize("form", ["ascend", "mindie"])
@pytest.mark.parametrize(
    ("scheme", "vllm_ascend"),
    [
        (Scheme(8), "has classes for experts of dynamic inputs, not of W8A16"),
        (Scheme(8, activations="static"), "has classes for experts of dynamic inputs, not of W8A8 static"),
        (Scheme(8, activations="dynamic"), ""),
        (Scheme(8, activations="mix"), ""),
        (Scheme(4, activations="dynamic"), ""),
        (None, ""),
    ],
)
def test_experts_in_ascend_are_loaded_by_type(form: str, scheme: Scheme | None, vllm_ascend: str) -> None:
    """The static linears beside them are loaded; what is refused is said with its source."""
    beside = (Linear("model.layers.0.self_attn.o_proj", 256, 256), Scheme(8, activations="static"))
    linears = [beside, *([(Linear(ONE, 256, 256), scheme)] if scheme else [])]
    kept = [] if scheme else [ONE]
    found = {v.engine: v for v in verdicts(linears, None, [form], kept, [[ONE]])}
    assert found["MindIE"].loads
    assert "moe_weight_wrapper.py" in found["MindIE"].source
    why = refusal("vllm-ascend", linears, None, [form], kept, [[ONE]])
    if form == "mindie":
        assert "looks for quant_model_description.json" in why
    else:
        assert found["vLLM-Ascend"].loads == (not vllm_ascend)
        assert vllm_ascend in why
        assert bool(why) == bool(vllm_ascend) == ("w8a8_pdmix.py, https://" in why.replace(" and others", ""))


def test_the_name_of_fp8_in_ascend_is_one_that_vllm_ascend_lacks() -> None:
    """It registers the type as W8A8FP8_DYNAMIC; from compressed-tensors it makes that name itself."""
    linears = [(Linear(ONE, 256, 256), Scheme(8, activations="dynamic", type="float"))]
    assert "does not know WFP8AFP8_DYNAMIC" in refusal("vllm-ascend", linears, None, ["ascend"])
    assert not refusal("vllm-ascend", linears, None, ["compressed-tensors"])
