"""A dense export is a float model: transformers loads it, knowing nothing of quantization, and computes what the
evaluation of the packed export computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_exports import SCHEMES, WEIGHT_ONLY, Export, export_tiny, flip_bit
from tiny_models import save_tiny_model, token_batches
from transformers import AutoTokenizer

import quantcli
from quantcli.errors import ModelError, RecipeError, VerificationError
from quantcli.formats import dense
from quantcli.formats.engines import verdicts
from quantcli.formats.export import export_checkpoint
from quantcli.formats.store import Store
from quantcli.formats.verify import verify_checkpoint
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.pipeline.inspect import inspect_path
from quantcli.pipeline.plan import make_plan
from quantcli.pipeline.samples import windows_of
from quantcli.pipeline.verify import verify_path
from quantcli.quant.grid import dequantize
from quantcli.quant.scheme import AttentionScheme
from quantcli.recipe.data import PerplexitySection
from quantcli.recipe.schema import Recipe

Exported = Callable[..., Export]
(TOKENS,) = token_batches((3, 24))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense_of(made: Export, folder: Path) -> Export:
    """The store of an export, exported densely."""
    for _ in export_checkpoint(folder, dense, made.store, made.source, made.linears):
        pass
    return Export(folder, made.model, made.structure, made.store, made.source, "dense")


def evaluated(made: Export) -> torch.Tensor:
    reader = made.reader()
    stream = BlockStream(Skeleton(made.model, made.structure, dtype=reader.dtype, checkpoint=reader), [TOKENS])
    (hidden,) = stream.start()
    for index in range(len(made.structure.blocks)):
        with stream.block(index):
            hidden = stream.run(index, 0, hidden)
    with stream.head():
        return torch.cat([logits for _, logits in stream.logits(hidden)], 1)


@pytest.mark.parametrize("smooth", [None, {"method": "smoothquant"}], ids=str)
def test_linears_that_are_stored_transposed_are_written_so(tmp_path: Path, smooth: dict[str, Any] | None) -> None:
    """GPT-2, whose weights [in, out] no other format holds: transformers computes what was measured."""
    model = save_tiny_model("gpt2", tmp_path / "model", with_tokenizer=True)
    recipe = {
        "model": {"path": str(model), "sanity_check": "off"},
        "calibration": {"samples": 8, "sequence_length": 32},
        "smooth": smooth,
        "quantize": {"weights": {"bits": 4, "granularity": "group", "group_size": 32, "method": "gptq"}},
        "export": {"formats": ["dense"]},
        "evaluate": {"perplexity": {"sequence_length": 32, "windows": 3}, "generate": None},
        "output": str(tmp_path / "run"),
    }
    outcome = quantcli.run(recipe)
    folder, store = tmp_path / "run" / "export" / "dense", Store(tmp_path / "run" / "quantize")
    stored = load_file(folder / "model.safetensors")
    square, wide = "transformer.h.1.attn.c_proj", "transformer.h.0.mlp.c_fc"
    for name in (square, wide):
        assert torch.equal(stored[f"{name}.weight"].t(), dequantize(store.read(name).weight, torch.float32))
    assert stored[f"{wide}.weight"].shape == (64, 256)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    text = windows_of(PerplexitySection(sequence_length=32, windows=3), AutoTokenizer.from_pretrained(folder))
    with torch.inference_mode():
        losses = [loaded(ids, labels=ids).loss for ids in torch.tensor(text.windows)[:, None]]
    assert math.isclose(math.exp(sum(losses) / 3), outcome.perplexity["quantized"]["value"], rel_tol=1e-5)
    if smooth is None:  # the square one, whose shape does not tell, laid the other way round
        save_file(
            stored | {f"{square}.weight": stored[f"{square}.weight"].t().contiguous()}, folder / "model.safetensors"
        )
        weights = {name: f"{name}.weight" for name in store.schemes}
        with pytest.raises(VerificationError, match=square):
            verify_checkpoint(folder, store, Checkpoint(model), weights, None, "dense", transposed=set(weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_it_is_the_model_that_the_packed_export_stands_for(
    name: str, dtype: torch.dtype, exported: Exported, tmp_path: Path
) -> None:
    packed = exported(name, dtype)
    made = dense_of(packed, tmp_path / "dense")
    assert made.verify().linears == 14
    tensors = load_file(made.folder / "model.safetensors")
    for module in made.store.schemes:
        wanted = dequantize(made.store.read(module).weight, dtype)
        assert torch.equal(tensors[f"{module}.weight"], wanted)
    config = json.loads((made.folder / "config.json").read_text())
    assert config == json.loads((made.model / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits = model(TOKENS).logits.float()
    assert torch.equal(logits, evaluated(made))
    assert torch.equal(logits, evaluated(packed))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma3", "phi3", "opt", "falcon", "gpt-neox", "mixtral"])
def test_every_family_loads(family: str, tmp_path: Path) -> None:
    made = export_tiny(tmp_path, SCHEMES["W4A16 g32"], family, form="dense")
    made.verify()
    assert load_file(made.folder / "model.safetensors").keys() == load_file(made.model / "model.safetensors").keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder).eval()
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits.float(), evaluated(made))


def test_what_is_not_in_it_is_said(tmp_path: Path) -> None:
    cache = AttentionScheme(kv="fp8")
    made = export_tiny(tmp_path, SCHEMES["W8A8 static"], attention=cache, form="dense")
    record = json.loads((made.folder / "quantization.json").read_text())
    assert record["not_in_it"] == "quantized inputs of linears and what KV fp8 does inside attention"
    assert record["linears"].keys() == made.store.schemes.keys()
    assert record["attention"]["kv"] == "fp8"
    assert set(load_file(made.folder / "model.safetensors")) == set(load_file(made.model / "model.safetensors"))
    made.verify()


def test_a_plan_says_what_is_missing_and_refuses_to_measure_it(tmp_path: Path) -> None:
    structure = discover(save_tiny_model("llama", tmp_path / "model"))

    def plan(formats: list[str], **sections: Any) -> Any:
        content = {"version": 1, "model": {"path": "model"}, "output": "out", "calibration": {},
                   "quantize": {"activations": {"bits": 8}}, "export": {"formats": formats}} | sections  # fmt: skip
        return make_plan(Recipe.model_validate(content), tmp_path / "model", structure)

    note = "The export dense holds weights alone, without quantized inputs of linears."
    measured = {"evaluate": {"perplexity": {}}}
    assert note in plan(["dense"]).notes
    assert note in plan(["compressed-tensors", "dense"], **measured).notes
    assert note not in plan(["compressed-tensors"], **measured).notes
    assert note not in plan(["dense"], quantize={}, **measured).notes
    with pytest.raises(RecipeError, match=r"the first is measured, and dense does not have quantized inputs"):
        plan(["dense", "compressed-tensors"], **measured)


def test_engines_load_it_as_a_float_model(exported: Exported) -> None:
    linears = [(linear, SCHEMES["W3A16 g32"]) for linear in exported("W3A16 g32").structure.linears()]
    found = verdicts(linears, None, ["compressed-tensors", "dense"])
    said = {v.engine: v.loads for v in found}
    assert said["vLLM on a CPU (dense)"]
    assert not said["vLLM on a CPU (compressed-tensors)"]
    assert {v.note for v in verdicts(linears, None, ["dense"])} == {"as a float model"}


def test_it_stands_alone_and_gives_no_codes(exported: Exported, tmp_path: Path) -> None:
    made = dense_of(exported("W4A16 g32"), tmp_path / "dense")
    assert inspect_path(made.folder)["kind"] == "quantized checkpoint (dense)"
    assert verify_path(made.folder)["linears"] == 0
    with pytest.raises(ModelError, match="holds no codes"):
        dense.decode({}, SCHEMES["W4A16 g32"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(exported: Exported, tmp_path: Path, place: float, bit: int) -> None:
    made = dense_of(exported("W4A16 g32"), tmp_path / "dense")
    file = made.folder / "model.safetensors"
    flip_bit(file, place, bit)
    with pytest.raises(VerificationError):
        made.verify()
    file.unlink()  # the next example starts from a whole export


CLAIMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda c: c.update(format="float"),
    "weights": lambda c: c.update(weights="packed"),
    "a linear less": lambda c: c["linears"].popitem(),
    "another scheme": lambda c: next(iter(c["linears"].values())).update(bits=3),
    "attention": lambda c: c.update(attention={"kv": "fp8"}),
    "missing": lambda c: c.update(not_in_it="inputs"),
    "foreign": lambda c: c.update(extra=1),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_wrong_claim_is_found(claim: str, exported: Exported, tmp_path: Path) -> None:
    made = dense_of(exported("W4A16 g32"), tmp_path / "dense")
    file = made.folder / "quantization.json"
    content = json.loads(file.read_text())
    CLAIMS[claim](content)
    file.write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=r"quantization\.json"):
        made.verify()


def test_a_quantization_config_is_found(exported: Exported, tmp_path: Path) -> None:
    made = dense_of(exported("W4A16 g32"), tmp_path / "dense")
    file = made.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(VerificationError, match="quantization_config"):
        made.verify()
