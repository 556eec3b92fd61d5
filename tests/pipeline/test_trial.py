"""A trial gives what evaluation gives of the exported checkpoint, whatever was tried before it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, opened
from tiny_models import save_tiny_model
from transformers.pytorch_utils import Conv1D

import quantcli
from quantcli.evaluation.protocols import EvaluationText
from quantcli.evaluation.scores import Scores
from quantcli.formats.store import Store
from quantcli.model.discovery import discover
from quantcli.pipeline import trial
from quantcli.pipeline.context import Context
from quantcli.pipeline.samples import windows_of
from quantcli.pipeline.trial import TrialModel
from quantcli.quant.grid import dequantize

Recipe = dict[str, Any]


@pytest.fixture
def recipe(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    return static_recipe(tmp_path / "run")


def text_of(context: Context) -> EvaluationText:
    assert context.recipe.evaluate is not None
    section = context.recipe.evaluate.perplexity
    assert section is not None
    return windows_of(section, context.tokenizer())


@contextmanager
def models(recipe: Recipe, phase: Any = "prefill", arithmetic: Any = "engine") -> Iterator[Callable[[], TrialModel]]:
    with opened(recipe, "quantize") as context:
        store = Store(context.folder("quantize"))
        yield lambda: TrialModel(context, store, None, text_of(context), phase, arithmetic)


def numbers(scores: Scores) -> list[float]:
    found = asdict(scores)
    windows = [value for row in found.pop("per_window") for value in row]
    return [*windows, *(found[key] for key in ("increase", "kl_divergence", "agreement"))]


SCHEMES: dict[str, dict[str, Any]] = {
    "static": {"activations": {"bits": 8}},
    "dynamic": {"activations": {"bits": 8, "scope": "token"}},
    "groups": {"weights": {"bits": 4, "granularity": "group", "group_size": 16, "symmetric": False}},
    "W4A8": {
        "weights": {"bits": 4, "granularity": "group", "group_size": 16},
        "activations": {"bits": 8, "scope": "token"},
        "overrides": [{"match": "*.o_proj", "scheme": "W4A4", "weights": {"group_size": 32}}],
    },
    "fp8 static": {"weights": {"type": "float"}, "activations": {"bits": 8, "type": "float"}},
    "fp8 and others": {
        "weights": {"type": "float", "granularity": "tensor", "method": "mse"},
        "activations": {"bits": 8, "type": "float", "scope": "token"},
        "overrides": [{"match": "*.o_proj", "scheme": "W8A16-fp8"}, {"match": "*.down_proj", "scheme": "W8A8-dynamic"}],
    },
    "head": {"activations": {"bits": 8}, "rollback": {"last_linear": False}},
    "fp8 cache": {"kv_cache": {"type": "float"}},
    "mixed": {
        "activations": {"bits": 8, "scope": "token"},
        "overrides": [{"match": "*.down_proj", "scheme": "float"}, {"match": "*.o_proj", "scheme": "W8A16"}],
    },
}
ASCEND: dict[str, dict[str, Any]] = {
    "mix": {"activations": {"bits": 8, "scope": "mix"}},
    "int8 cache": {"activations": {"bits": 8}, "kv_cache": {"symmetric": False}},
    "heads": {"attention": {}},
}


@pytest.mark.parametrize(
    ("name", "phase"), [*((name, "prefill") for name in (*SCHEMES, *ASCEND)), ("mix", "decode"), ("static", "decode")]
)
def test_with_nothing_rolled_back_it_is_the_exported_checkpoint(recipe: Recipe, name: str, phase: str) -> None:
    recipe["quantize"] = {**SCHEMES, **ASCEND}[name]
    recipe["evaluate"]["perplexity"]["phase"] = phase
    if name in ASCEND:
        recipe["export"] = {"formats": ["ascend"]}
    outcome = quantcli.run(recipe)
    with models(recipe, phase) as model:
        scores = asdict(model().measure(()))
    assert outcome.perplexity is not None
    for key in ("increase", "kl_divergence", "agreement", "tokens", "windows"):
        assert math.isclose(scores[key], outcome.perplexity[key], rel_tol=1e-6, abs_tol=1e-9), key
    assert scores["kl_divergence"] > 0


@pytest.mark.parametrize(("name", "arithmetic"), [("dynamic", "transformers"), ("fp8 cache", "vllm-cpu")])
def test_it_computes_by_the_arithmetic_of_the_evaluation(recipe: Recipe, name: str, arithmetic: str) -> None:
    recipe["quantize"] = SCHEMES[name]
    found = {}
    for each in ("engine", arithmetic):
        outcome = quantcli.run(changed(recipe, evaluate__perplexity__arithmetic=each))
        with models(recipe, arithmetic=each) as model:
            scores = model().measure(())
        assert outcome.perplexity is not None
        assert math.isclose(scores.kl_divergence or 0, outcome.perplexity["kl_divergence"], rel_tol=1e-6)
        found[each] = outcome.perplexity["kl_divergence"]
    assert not math.isclose(found["engine"], found[arithmetic], rel_tol=1e-4)


def test_with_everything_rolled_back_it_is_the_float_model(recipe: Recipe) -> None:
    recipe["quantize"] |= {"rollback": {"last_linear": False}}
    with models(recipe) as model:
        scores = model().measure([*LINEARS, "lm_head"])
    assert scores.increase == 0
    assert scores.kl_divergence == 0
    assert scores.agreement == 1
    assert scores.quantized == scores.float_model


LINEARS = [
    f"model.layers.{index}.{name}_proj"
    for index in range(3)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]


def some_sets(count: int, *, head: bool) -> list[frozenset[str]]:
    generator = random.Random(1)
    names = [*LINEARS, "lm_head"] if head else LINEARS
    return [frozenset(generator.sample(names, generator.randint(0, len(names)))) for _ in range(count)]


@pytest.mark.parametrize("room", [1 << 30, 40_000, 0])
def test_the_order_of_trials_makes_no_difference(recipe: Recipe, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hidden states of earlier trials are kept: all, those of the last, none."""
    monkeypatch.setattr(trial, "PATHS_BYTES", room)
    recipe["quantize"] |= {"rollback": {"last_linear": False}}
    sets = [*some_sets(5, head=True), frozenset(LINEARS[:-1]), frozenset(LINEARS), frozenset()]
    with models(recipe) as model:
        alone = {members: numbers(model().measure(members)) for members in sets}
        together = model()
        for members in [*sets, *reversed(sets), sets[3], sets[3]]:
            assert numbers(together.measure(sorted(members))) == alone[members]
    assert len({tuple(found) for found in alone.values()}) == len(sets)


def test_a_rolled_back_linear_is_as_if_the_recipe_had_named_it(recipe: Recipe) -> None:
    names = [LINEARS[3], LINEARS[6], LINEARS[13]]
    with models(recipe) as model:
        scores = model().measure(names)
    outcome = quantcli.run(changed(recipe, quantize__rollback={"names": names}))
    assert outcome.perplexity is not None
    assert math.isclose(scores.kl_divergence or 0, outcome.perplexity["kl_divergence"], rel_tol=1e-6)


def test_a_trial_begins_at_the_first_block_that_differs(recipe: Recipe) -> None:
    with models(recipe) as model:
        trials = model()
        blocks: list[int] = []
        run = trials.stream.run
        trials.stream.run = lambda index, batch, hidden: (blocks.append(index), run(index, batch, hidden))[1]  # type: ignore[method-assign]
        for members, expected in (
            ([], [0, 1, 2]),
            ([LINEARS[-1]], [2]),
            ([LINEARS[7]], [1, 2]),
            ([LINEARS[7], LINEARS[-1]], [2]),
            ([LINEARS[0], LINEARS[7]], [0, 1, 2]),
        ):
            blocks.clear()
            trials.measure(members)
            windows = len(trials.batches)
            assert blocks == [block for block in expected for _ in range(windows)]


def test_transposed_linears_are_those_of_the_whole_model(prose: Path, tmp_path: Path) -> None:
    """GPT-2, whose weights lie the other way round and have biases."""
    model = save_tiny_model("gpt2", tmp_path / "gpt2", with_tokenizer=True)
    recipe = {
        "model": {"path": str(model), "sanity_check": "off"},
        "quantize": {"weights": {"bits": 4, "granularity": "group", "group_size": 16}},
        "export": None,
        "output": str(tmp_path / "run"),
    }
    tokens = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = float_model(model)
    with torch.inference_mode():
        exact = whole(tokens).logits
    with opened(recipe, "quantize") as context, torch.inference_mode():
        store = Store(context.folder("quantize"))
        text = EvaluationText("standard", tokens.tolist(), 38, None, "")
        trials = TrialModel(context, store, None, text, "prefill")
        hidden = torch.cat(trials.hidden(frozenset()))
        with trials.stream.head():
            found = torch.cat([piece for _, piece in trials.logits(hidden, ())], dim=1)
        for name in store.schemes:
            module = whole.get_submodule(name)
            assert isinstance(module, Conv1D)
            module.weight.copy_(dequantize(store.read(name).weight).t())
        expected = whole(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - exact).abs().max() > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_the_same_inside_inference_mode(family: str, tmp_path: Path) -> None:
    """Whoever calls from there, as evaluation code does, gets the same structure."""
    model = save_tiny_model(family, tmp_path / family)
    expected = discover(model)
    with torch.inference_mode():
        assert discover(model) == expected
