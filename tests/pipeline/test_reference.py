"""The float model runs over a text once: its hidden states are kept, taken over, and give what full logits give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_contexts import changed
from safetensors.torch import load_file

import quantcli
from quantcli.pipeline.samples import windows_of
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]
STATES = "reference/states/hidden-00003.bin"


def ran(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Run: the models that went through blocks for the evaluation, and what was noted of the reference."""
    events: list[dict[str, Any]] = []
    quantcli.run(recipe, listener=events.append)
    models = {e["model"] for e in events if e["event"] == "block" and e["stage"] in ("reference", "eval-ppl")}
    notes = [e["text"] for e in events if e["stage"] == "reference" and e["event"] in ("note", "warning")]
    return sorted(models), notes


def results(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(recipe["output"]) / "eval-ppl" / "results.json").read_text())
    return content


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    recipe = static_recipe(tmp_path / "runs" / "one")
    del recipe["calibration"]
    return changed(recipe, quantize={"weights": {"bits": 4, "granularity": "group", "group_size": 32}})


def test_variants_cost_one_pass_of_the_float_model(recipe: Recipe, tmp_path: Path) -> None:
    assert ran(recipe) == (["float", "quantized"], [])
    eight = changed(recipe, quantize__weights__bits=8)
    assert ran(eight) == (["quantized"], [])

    beside = changed(eight, output=str(tmp_path / "runs" / "two"))
    models, (note,) = ran(beside)
    assert models == ["quantized"]
    assert str(tmp_path / "runs" / "one") in note
    assert results(beside) == results(eight)
    assert ran(changed(beside, evaluate__perplexity__arithmetic="transformers")) == (["quantized"], [])
    own, other = (Path(each["output"]) / STATES for each in (beside, eight))
    assert own.stat().st_ino == other.stat().st_ino  # a second name, not a second copy

    away = changed(eight, output=str(tmp_path / "away" / "three"))
    named = changed(away, evaluate__reference=str(tmp_path / "runs" / "two"))
    models, (note,) = ran(named)
    assert models == ["quantized"]
    assert str(tmp_path / "runs" / "two") in note
    assert results(away) == results(eight)

    text = changed(away, evaluate__perplexity__windows=3, evaluate__reference=str(tmp_path / "runs" / "two"))
    models, (warning,) = ran(text)
    assert models == ["float", "quantized"]
    assert "has no results of this model on the same text" in warning


def test_a_text_of_one_window_is_told(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One old sheep saw the hill.")
    for path, told in ((str(tmp_path / "short.txt"), True), (recipe["evaluate"]["perplexity"]["path"], False)):
        events: list[dict[str, Any]] = []
        recipe = changed(recipe, evaluate__perplexity__path=path)
        quantcli.run_stage("eval-ppl", recipe, listener=events.append)
        notes = [e["text"] for e in events if e["event"] == "note" and "one window alone" in e["text"]]
        assert bool(notes) == told == (results(recipe)["quantized"]["error"] is None)


def test_damaged_states_are_not_taken_over(recipe: Recipe, tmp_path: Path) -> None:
    ran(recipe)
    file = Path(recipe["output"]) / STATES
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    beside = changed(recipe, output=str(tmp_path / "runs" / "two"))
    assert ran(beside) == (["float", "quantized"], [])


def test_states_that_are_too_large_are_not_kept(recipe: Recipe, tmp_path: Path) -> None:
    ran(recipe)
    small = changed(recipe, output=str(tmp_path / "small"), evaluate__reference_size="1KiB")
    models, (note,) = ran(small)
    assert models == ["float", "quantized"]
    assert "evaluate.reference_size" in note
    assert not (tmp_path / "small" / STATES).exists()
    assert not list((tmp_path / "small" / "eval-ppl").glob("hidden*"))
    assert results(small) == results(recipe)
    assert ran(small) == ([], [])
    assert ran(changed(small, quantize__weights__bits=8))[0] == ["float", "quantized"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_gives_the_numbers_of_full_logits(recipe: Recipe, dtype: str) -> None:
    recipe = changed(recipe, export={"formats": ["dense"]}, model__dtype=dtype)
    quantcli.run(recipe)
    found = results(recipe)

    loaded = load_recipe(recipe)
    assert loaded.evaluate is not None
    assert loaded.evaluate.perplexity is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe["model"]["path"])
    windows = torch.tensor(windows_of(loaded.evaluate.perplexity, tokenizer).windows)
    logits = []
    for folder in (recipe["model"]["path"], Path(recipe["output"]) / "export" / "dense"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        with torch.inference_mode():
            logits.append(model(windows).logits[:, :-1].double().flatten(0, 1))
    logp, logq = (one.log_softmax(-1) for one in logits)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    bound = 1e-4 if dtype == "float32" else 0.01  # batches of other sizes round otherwise
    assert found["kl_divergence"] == pytest.approx(kl.mean().item(), rel=bound)
    assert found["kl"]["90"] == pytest.approx(kl.quantile(0.9).item(), rel=bound)
    if dtype == "float32":  # no ties
        assert found["agreement"] == (logp.argmax(-1) == logq.argmax(-1)).double().mean().item()
        five = [one.topk(5).indices for one in (logp, logq)]
        shared = (five[0][:, :, None] == five[1][:, None, :]).any(-1).double().mean().item()
        assert found["top5_agreement"] == pytest.approx(shared, rel=1e-6)

    columns = load_file(Path(recipe["output"]) / "eval-ppl" / "tokens.safetensors")
    assert columns["kl"].double().mean().item() == pytest.approx(found["kl_divergence"], rel=1e-5)
    assert len(columns["nll_quantized"]) == found["tokens"]
