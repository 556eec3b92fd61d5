"""Calibration samples are dropped by what quantization does to the model's output on each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contexts import changed, float_model, opened, read
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import quantcli
from quantcli.evaluation.simulate import simulated
from quantcli.formats.store import Store
from quantcli.pipeline.samples import calibration_samples
from quantcli.pipeline.treatment import replacement

Recipe = dict[str, Any]
SAMPLES = 8
ABSURD = 5
"""The sample of tildes, whose embedding is five times as far out in one channel as all others are."""


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("outlying") / "model"))
    tensors = load_file(folder / "model.safetensors")
    tilde = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("~")
    tensors["model.embed_tokens.weight"][tilde, 5] = 5 * tensors["model.embed_tokens.weight"].abs().max()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Recipe:
    """Prompts of several lengths, one of them absurd; ranges that leave out what is rare."""
    texts = [f"In the year {year} the river rose against the stones of bridge {year % 7}" for year in range(SAMPLES)]
    texts[2] += " and the sheep were moved"
    texts[ABSURD] = "~" * 24
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    return {
        "model": {"path": str(model), "sanity_check": "off"},
        "calibration": {"dataset": "jsonl", "path": str(file), "samples": SAMPLES, "sequence_length": 64},
        "quantize": {"activations": {"bits": 8, "method": "percentile", "percentile": 99}},
        "export": None,
        "output": str(tmp_path / "run"),
    }


def selection(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = read(recipe, "select", "selection.json")
    return content


def test_what_is_solved_is_tried_as_data_weighted_mse(recipe: Recipe) -> None:
    weights = {"bits": 4, "granularity": "group", "group_size": 32, "method": "mse", "importance": "second_moment"}
    found = []
    for method in ({}, {"method": "gptq", "importance": "auto"}):
        own = changed(
            recipe, quantize={"weights": weights | method}, output=f"{recipe['output']}{len(found)}",
            calibration__drop_outliers=0.2,
        )  # fmt: skip
        quantcli.run_stage("select", own)
        found.append(selection(own))
    assert found[0] == found[1]


@torch.inference_mode()
def divergences(recipe: Recipe) -> tuple[list[float], list[list[int]]]:
    """KL of each sample's logits, from the whole model with the linears of a run on all samples; and the samples."""
    with opened(changed(recipe, calibration__drop_outliers=0), "quantize") as context:
        store = Store(context.folder("quantize"))
        samples = calibration_samples(context).samples
        whole = float_model(context.model)
        replaced = {
            name: replacement(store.read(name), scheme, torch.float32, "cpu", "decode")
            for name, scheme in store.schemes.items()
        }
    found = []
    for sample in samples:
        tokens = torch.tensor([sample])
        exact = whole(tokens).logits[0, :-1].double().log_softmax(-1)
        with simulated(whole, replaced):
            rounded = whole(tokens).logits[0, :-1].double().log_softmax(-1)
        found.append(float((exact.exp() * (exact - rounded)).sum(-1).mean()))
    return found, samples


QUANTIZE: list[dict[str, Any]] = [
    {"activations": {"bits": 8, "method": "percentile", "percentile": 99}},
    {"weights": {"bits": 4, "granularity": "group", "group_size": 16, "method": "mse", "importance": "second_moment"}},
]


@pytest.mark.parametrize("quantize", QUANTIZE, ids=["static", "weights"])
def test_differences_are_those_of_the_whole_model(recipe: Recipe, quantize: dict[str, Any]) -> None:
    recipe = changed(recipe, quantize=quantize, calibration__drop_outliers="25%")
    plain = changed(recipe, output=recipe["output"] + "-plain")
    expected, samples = divergences(plain)
    quantcli.run_stage("select", recipe)
    content = selection(recipe)
    assert content["differences"] == pytest.approx(expected, rel=1e-3)
    assert len({len(sample) for sample in samples}) > 1
    worst = sorted(range(SAMPLES), key=lambda index: -expected[index])[:2]
    assert content["kept"] == [index for index in range(SAMPLES) if index not in worst]


def test_what_misleads_is_dropped_and_never_observed(recipe: Recipe) -> None:
    plain = changed(recipe, output=recipe["output"] + "-plain")
    expected, samples = divergences(plain)
    misleading = max(range(SAMPLES), key=expected.__getitem__)
    assert len(set(samples[misleading])) == 2  # the tildes, behind the first token
    recipe = changed(recipe, calibration__drop_outliers="12.5%")
    events: list[dict[str, Any]] = []
    quantcli.run_stage("quantize", recipe, listener=events.append)
    assert selection(recipe)["kept"] == [index for index in range(SAMPLES) if index != misleading]
    rest = sum(len(sample) for index, sample in enumerate(samples) if index != misleading)
    assert read(recipe, "calibrate", "manifest.json")["tokens"] == rest
    (seen,) = [event for event in events if event["event"] == "tokens" and event["stage"] == "calibrate"]
    assert (seen["samples"], seen["tokens"]) == (SAMPLES - 1, rest)
    (note,) = [event["text"] for event in events if event["event"] == "note" and event["stage"] == "select"]
    assert note.startswith(f"1 of {SAMPLES} calibration samples ")
    alone = changed(
        recipe, calibration={**recipe["calibration"], "drop_outliers": 0}, output=recipe["output"] + "-rest"
    )
    lines = Path(recipe["calibration"]["path"]).read_text(encoding="utf-8").splitlines()
    kept = Path(alone["output"]).with_suffix(".jsonl")
    kept.write_text("\n".join(line for line in lines if "~" not in line) + "\n", encoding="utf-8")
    alone["calibration"] |= {"path": str(kept), "samples": SAMPLES - 1}
    with opened(alone, "quantize") as context:
        without = Store(context.folder("quantize"))
    with opened(recipe, "quantize") as context:
        store = Store(context.folder("quantize"))
        for name in store.schemes:  # as if the sample had never been there
            assert torch.equal(store.read(name).input_scale, without.read(name).input_scale)  # type: ignore[arg-type]


def worked(recipe: Recipe, until: str) -> set[str]:
    return {name for name, record in quantcli.run_stage(until, recipe).stages.items() if not record["reused"]}


def test_what_is_dropped_is_decided_once(recipe: Recipe) -> None:
    recipe = changed(recipe, calibration__drop_outliers=0.25)
    assert worked(recipe, "quantize") == {"select", "calibrate", "quantize"}
    assert worked(recipe, "quantize") == set()
    assert worked(changed(recipe, calibration__drop_outliers=0.5), "quantize") == {"select", "calibrate", "quantize"}
    assert len(selection(recipe)["kept"]) == SAMPLES // 2
    plain = changed(recipe, calibration__drop_outliers=0)
    assert worked(plain, "quantize") == {"calibrate", "quantize"}
    assert read(plain, "calibrate", "manifest.json")["tokens"] > 0


def test_ranges_and_ranks_are_found_on_what_is_kept(recipe: Recipe) -> None:
    """Stages behind calibrate that read the samples again read those that were kept."""
    recipe = changed(
        recipe, calibration__drop_outliers=0.5, quantize={"activations": {"bits": 8, "propagation": "quantized"}}
    )
    with opened(recipe, "quantize") as context:
        kept = selection(recipe)["kept"]
        assert len(kept) == SAMPLES // 2
        every, chosen = calibration_samples(context, every=True).samples, calibration_samples(context).samples
        assert chosen == [every[index] for index in kept]
        store = Store(context.folder("quantize"))
        whole = float_model(context.model)
        seen: list[float] = []
        whole.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(
            lambda _module, args: seen.extend([float(args[0].min()), float(args[0].max())])
        )
        with torch.inference_mode():
            for sample in chosen:
                whole(torch.tensor([sample]))
        scale = store.read("model.layers.0.self_attn.q_proj").input_scale
        assert scale is not None
        assert float(scale) == pytest.approx((max(seen) - min(seen)) / 255, rel=1e-5)


def test_a_scheme_without_calibration_drops_nothing(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    recipe = changed(static_recipe(tmp_path / "run"), quantize={"weights": {"bits": 8}}, export=None, evaluate=None)
    recipe["calibration"]["drop_outliers"] = 0.5
    assert "select" not in quantcli.run(recipe).stages


def test_smoothing_alone_reads_samples_and_sees_what_is_kept(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    quantize = {"activations": {"bits": 8, "scope": "token"}}
    recipe = changed(
        static_recipe(tmp_path / "run"), quantize=quantize, smooth={"method": "smoothquant"}, evaluate=None
    )
    recipe["calibration"]["drop_outliers"] = 0.5
    events: list[dict[str, Any]] = []
    quantcli.run_stage("smooth", recipe, listener=events.append)
    seen = [event["samples"] for event in events if event["event"] == "tokens" and event["stage"] == "smooth"]
    assert seen == [len(selection(recipe)["kept"])]
    assert seen[0] < len(selection(recipe)["differences"])
