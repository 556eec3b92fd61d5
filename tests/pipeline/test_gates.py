"""Gates, the fallbacks they count and the reports they leave; and runs that keep or miss them, by the command line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from run_contexts import changed

import quantcli
from quantcli.cli import run_command
from quantcli.errors import RecipeError
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline import engine
from quantcli.pipeline.gates import Gate, Worst, fallbacks, judged, junit, message_of, summary, worst_linears
from quantcli.pipeline.report import run_facts
from quantcli.recipe import load_recipe
from quantcli.recipe.evaluation import GatesSection

Recipe = dict[str, Any]

SCORES = {
    "float_model": {"value": 20.0, "error": 0.3}, "quantized": {"value": 21.0, "error": 0.3},
    "increase": 0.05, "increase_error": 0.001, "kl_divergence": 0.04, "kl_error": 0.002,
    "agreement": 0.9, "agreement_error": 0.01, "protocol": "standard", "description": "Protocol standard.",
}  # fmt: skip
METRICS = {
    "accuracy": {"float_model": {"value": 0.62}, "quantized": {"value": 0.6}, "change": -0.02, "change_error": 0.01},
    "f1": {"float_model": {"value": 0.5}, "quantized": {"value": 0.51}, "change": 0.01, "change_error": 0.01},
}
RESULT = {
    "perplexity": SCORES,
    "tasks": {"tasks": {"squad": {"metrics": METRICS}}},
    "size_before": 4000,
    "size_after": 1000,
    "bits_per_weight": 4.25,
    "stages": {name: {} for name in ("smooth", "calibrate", "export")},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with an export of 1500 bytes and events."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "a.safetensors").write_bytes(bytes(1000))
    (tmp_path / "export" / "b.safetensors").write_bytes(bytes(500))
    (tmp_path / "export" / "tokenizer.json").write_bytes(bytes(900))
    return tmp_path


def events(run: Path, *rows: dict[str, Any]) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def warning(stage: str, fallback: str, text: str, **more: Any) -> dict[str, Any]:
    return {"event": "warning", "stage": stage, "fallback": fallback, "text": text, **more}


@pytest.mark.parametrize(
    ("gates", "value", "passed"),
    [
        ({"perplexity_increase": "5%"}, 0.05, True),
        ({"perplexity_increase": "4.9%"}, 0.05, False),
        ({"kl_divergence": 0.05}, 0.04, True),
        ({"agreement": "89%"}, 0.9, True),
        ({"agreement": "91%"}, 0.9, False),
        ({"bits_per_weight": 4.25}, 4.25, True),
        ({"size": "1500B"}, 1500, True),
        ({"size": "1499B"}, 1500, False),
        ({"size_ratio": "37%"}, 0.375, False),
        ({"fallbacks": {"not_smoothed": 0}}, 0, True),
    ],
)
def test_a_gate_compares_what_was_found_with_its_bound(run: Path, gates: Any, value: float, passed: bool) -> None:
    (gate,) = judged(GatesSection.model_validate(gates), RESULT, run, run / "export")
    assert gate.value == pytest.approx(value)
    assert gate.passed is passed
    assert ("keeps" in gate.sentence()) is passed


def test_every_metric_of_every_task_is_judged_by_its_drop(run: Path) -> None:
    drops = judged(GatesSection(task_drop="1%"), RESULT, run, run / "export")
    assert [(gate.name, gate.value, gate.passed) for gate in drops] == [
        ("task_drop (squad, accuracy)", 0.02, False),
        ("task_drop (squad, f1)", -0.01, True),
    ]
    errors = {"error_rate": {**METRICS["f1"], "change": 0.02, "lower_is_better": True}}
    (gate,) = judged(
        GatesSection(task_drop="1%"), {**RESULT, "tasks": {"tasks": {"x": {"metrics": errors}}}}, run, run / "export"
    )
    assert (gate.value, gate.passed) == (0.02, False)


def test_a_task_without_a_metric_that_can_be_judged_misses_its_gate(run: Path) -> None:
    aggregates = {"float_model": {"word_perplexity,none": 20.0}, "quantized": {"word_perplexity,none": 90.0}}
    tasks = {"squad": {"metrics": METRICS}, "lm-eval/wikitext": {"description": "", "lm_eval": aggregates}}
    drops = judged(GatesSection(task_drop="50%"), {**RESULT, "tasks": {"tasks": tasks}}, run, run / "export")
    assert [gate.passed for gate in drops] == [True, True, False]
    assert drops[-1].sentence() == (
        "evaluate.gates.task_drop (lm-eval/wikitext): cannot be judged, since the task has no metric between 0 and 1 "
        "for each question."
    )
    assert 'message="evaluate.gates.task_drop (lm-eval/wikitext): cannot be judged' in junit(drops, Worst("error"))


def test_what_is_not_defined_misses_and_what_was_not_measured_is_not_judged(run: Path) -> None:
    undefined = {**RESULT, "perplexity": {**SCORES, "kl_divergence": None}}
    (gate,) = judged(GatesSection(kl_divergence=1.0), undefined, run, run / "export")
    assert not gate.passed
    assert gate.sentence() == "evaluate.gates.kl_divergence: the value is undefined."
    gates = GatesSection(kl_divergence=1.0, task_drop="1%")
    assert judged(gates, {**RESULT, "perplexity": None, "tasks": None}, run, run / "export") == []


def test_fallbacks_are_those_of_each_stages_last_work(run: Path) -> None:
    started, finished = ({"event": kind, "stage": "smooth"} for kind in ("started", "finished"))
    events(run, started, warning("smooth", "not_smoothed", "a"), warning("smooth", "not_smoothed", "b"), finished)
    events(run, {"event": "warning", "stage": "smooth", "text": "no fallback"})
    stages = RESULT["stages"]
    assert fallbacks(run, stages) == {"not_smoothed": 2}
    # interrupted, and gone on with: both parts count, what is said twice once
    events(run, started, warning("smooth", "not_smoothed", "c"))
    resumed = {**started, "resumed": True}
    events(run, resumed, warning("smooth", "not_smoothed", "c"), warning("smooth", "not_smoothed", "d"), finished)
    assert fallbacks(run, stages) == {"not_smoothed": 2}
    # interrupted, and begun anew under other settings: the first part is no work of this run
    events(run, started, warning("smooth", "not_smoothed", "x"), warning("smooth", "not_smoothed", "y"))
    events(run, started, warning("smooth", "not_smoothed", "c"), warning("smooth", "not_smoothed", "d"), finished)
    assert fallbacks(run, stages) == {"not_smoothed": 2}
    events(run, {"event": "started", "stage": "calibrate"}, warning("calibrate", "data_free_experts", "e", count=5))
    assert fallbacks(run, stages) == {"not_smoothed": 2, "data_free_experts": 5}
    assert fallbacks(run, ("calibrate", "export")) == {"data_free_experts": 5}, "smooth is in the recipe no more"
    gates = judged(GatesSection.model_validate({"fallbacks": {"all": 6}}), RESULT, run, run / "export")
    assert [gate.sentence() for gate in gates] == [
        "evaluate.gates.fallbacks.all: 7 (not_smoothed 2, data_free_experts 5) is above 6, by 1."
    ]
    worst = Worst("output error", (("model.layers.0.mlp.down_proj", 0.25),))
    assert message_of(gates, worst) == gates[0].sentence(), "no linear's error has to do with fallbacks"
    assert "down_proj" not in junit(gates, worst) + summary(gates, RESULT, worst)


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        (Gate("perplexity_increase", 0.05, 0.0525, error=0.0012), "5.25% ± 0.12% is above 5%, by 0.25%."),
        (Gate("agreement", 0.95, 0.9123, least=True, error=0.01), "91.23% ± 1% is below 95%, by 3.77%."),
        (Gate("task_drop (squad, f1)", 0.01, -0.01), "-1% keeps 1%."),
        (Gate("size", 120_000_000, 162_815_304), "162.815 MB is above 120 MB, by 42.82 MB."),
        (Gate("size", 1499, 1500), "1.5 kB is above 1.499 kB, by 1 B."),
        (Gate("size_ratio", 0.55, 0.5), "50% keeps 55%."),
        (Gate("kl_divergence", 0.02, 0.05, error=0.001), "0.05 ± 0.001 is above 0.02, by 0.03."),
    ],
)
def test_amounts_have_the_units_of_the_recipe(gate: Gate, sentence: str) -> None:
    assert gate.sentence() == f"evaluate.gates.{gate.name}: {sentence}"
    found = gate.to_json()
    assert (found["missed_by"] is None) is found["passed"] is gate.passed
    assert gate.passed or found["missed_by"] == abs(gate.value - gate.bound)


def test_the_worst_linears_are_those_of_the_last_quantization_by_the_plans_schemes(run: Path) -> None:
    def quantized(scheme: str, *rows: tuple[str, float]) -> None:
        events(run, {"event": "started", "stage": "quantize", "resumed": False})
        events(run, *({"event": "linear", "stage": "quantize", "module": name, "scheme": scheme, "error": error}
                      for name, error in rows))  # fmt: skip

    quantized("W4A16", ("a", 0.5), ("gone", 0.9))
    quantized("W8A16", ("b", 0.1), ("a", 0.01), ("c", 0.02), ("now float", 0.7), *((f"d{i}", 1e-3) for i in range(5)))
    events(run, {"event": "linear", "stage": "quantize", "module": "c", "scheme": "W4A16", "error": 0.8})
    schemes = dict.fromkeys(("a", "b", "c", "gone", *(f"d{i}" for i in range(5))), "W8A16")
    found = worst_linears(run, ("quantize", "export"), schemes)
    assert found.measure == "weight error"
    assert found.linears[:3] == (("b", 0.1), ("c", 0.02), ("a", 0.01))
    assert len(found.linears) == 5


def test_output_errors_of_the_export_name_the_worst_linears_where_this_run_measured_them(run: Path) -> None:
    (run / "layers").mkdir()
    rows = [{"name": "a", "output_error": 0.1}, {"name": "b", "output_error": 0.3}, {"name": "c", "output_error": None}]
    (run / "layers" / "errors.json").write_text(json.dumps({"tokens": 32, "linears": rows}))
    schemes = dict.fromkeys("abc", "W8A16")
    assert worst_linears(run, ("export", "layers"), schemes) == Worst("output error", (("b", 0.3), ("a", 0.1)))
    assert worst_linears(run, ("export",), schemes) == Worst("weight error")


def test_reports_say_which_gate_was_missed_by_how_much_and_where() -> None:
    gates = [Gate("kl_divergence", 0.02, 0.05, error=0.001), Gate("agreement", 0.9, 0.95, least=True)]
    worst = Worst("output error", (("model.layers.0.mlp.down_proj", 0.25),))
    text = message_of(gates[:1], worst)
    assert text == (
        "evaluate.gates.kl_divergence: 0.05 ± 0.001 is above 0.02, by 0.03. "
        "Largest output errors: model.layers.0.mlp.down_proj 0.25."
    )
    suite = ElementTree.fromstring(junit(gates, worst))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failures = {case.get("name"): case.find("failure") for case in suite.findall("testcase")}
    assert failures["agreement"] is None
    assert failures["kl_divergence"] is not None
    assert "by 0.03" in (failures["kl_divergence"].get("message") or "")
    assert "down_proj: output error 0.25" in (failures["kl_divergence"].text or "")
    page = summary(gates, RESULT, worst)
    assert page.startswith("### Quantization: 1 of 2 gates missed\n")
    assert "| `kl_divergence` | ≤ 0.02 | 0.05 ± 0.001 | **missed** |" in page
    assert "| `agreement` | ≥ 90% | 95% | kept |" in page
    assert "| `model.layers.0.mlp.down_proj` | 0.25 |" in page
    assert "| squad accuracy, % ↑ | 62.00 | 60.00 | -2.00 |" in page
    assert "down_proj" not in summary(gates[1:], RESULT, worst)


def flip_codes(file: Path) -> None:
    """Flip the second highest bit of every eighth code; scales stay as they are."""
    data = bytearray(file.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__" and entry["dtype"] == "I8":
            for place in range(*entry["data_offsets"], 8):
                data[begin + place] ^= 64
    file.write_bytes(data)


def test_a_run_keeps_its_gates_until_codes_are_flipped(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    recipe = changed(static_recipe(out), quantize={"weights": {"bits": 8}})
    gates = {"perplexity_increase": "50%", "kl_divergence": 0.002, "agreement": "80%", "size_ratio": "60%",
             "bits_per_weight": 9, "fallbacks": {"all": 0, "insane_model": None}}  # fmt: skip
    recipe = changed(recipe, evaluate__gates=gates, model__sanity_check="off")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))

    def ran() -> tuple[int, dict[str, Any], str, ElementTree.Element]:
        capsys.readouterr()
        status = run_command(["run", str(file), "--json", "--quiet"])
        captured = capsys.readouterr()
        return status, json.loads(captured.out), captured.err, ElementTree.parse(out / "gates" / "junit.xml").getroot()

    status, content, err, suite = ran()
    assert (status, err) == (0, "")
    assert content["missed_gate"] is None
    assert {gate["name"]: gate["passed"] for gate in content["gates"]} == dict.fromkeys(
        ["perplexity_increase", "kl_divergence", "agreement", "bits_per_weight", "size_ratio", "fallbacks.all"], True
    )
    assert suite.get("failures") == "0"
    kept = (out / "gates" / "summary.md").read_text()
    assert "all 6 gates kept" in kept

    files = sorted((out / "export" / "compressed-tensors").iterdir())
    for path in files:  # as a copy does
        os.utime(path)
    status, content, err, suite = ran()
    assert status == 0
    assert all(stage["reused"] for stage in content["stages"].values())

    weights = out / "export" / "compressed-tensors" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64] + bytes(64))
    status = run_command(["run", str(file), "--quiet"])
    assert status == 5, "an export that was damaged since it was scored is found before its old scores count"
    assert "model.safetensors" in capsys.readouterr().err
    weights.write_bytes(whole)
    assert ran()[0] == 0

    before = (out / "quantize" / "block-00001.safetensors").stat().st_size
    flip_codes(out / "quantize" / "block-00001.safetensors")
    assert (out / "quantize" / "block-00001.safetensors").stat().st_size == before
    shutil.rmtree(out / "export")
    status, content, err, suite = ran()
    assert status == 4
    missed = [gate["name"] for gate in content["gates"] if not gate["passed"]]
    assert "kl_divergence" in missed
    assert "evaluate.gates.kl_divergence: " in err
    assert " is above 0.002, by " in err
    assert "Largest output errors: model.layers.1." in err
    found = json.loads((out / "gates" / "gates.json").read_text())
    assert found["worst_by"] == "output error"
    # every code of block 1 was changed and none elsewhere: its linears come first, far before the others
    flipped = [name.startswith("model.layers.1.") for name, _ in found["worst_linears"]]
    assert flipped == [True] * 5
    assert content["missed_gate"] in " ".join(err.split())
    assert content["worst_linears"] == found["worst_linears"]
    assert all((gate["missed_by"] is None) is gate["passed"] for gate in content["gates"])
    assert int(suite.get("failures") or 0) == len(missed)
    assert "**missed**" in (out / "gates" / "summary.md").read_text()
    status, again, _, _ = ran()
    assert (status, again["missed_gate"]) == (4, content["missed_gate"])


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"tasks": ["boolq"], "gates": {"kl_divergence": 0.1}}, "evaluate.gates.kl_divergence: judges nothing"),
        ({"perplexity": {}, "gates": {"task_drop": "1%"}}, "evaluate.gates.task_drop: judges nothing"),
        ({"gates": {}}, "evaluate.gates: judges nothing"),
        ({"perplexity": {}, "gates": {"size": 5}}, "evaluate.gates.size: 5 is no size"),
        ({"perplexity": {}, "gates": {"fallbacks": {"experts": 0}}}, "evaluate.gates.fallbacks.experts: unknown key"),
    ],
)
def test_gates_that_make_no_sense_are_refused(evaluate: Any, words: str) -> None:
    recipe = {"model": {"path": "a/b"}, "quantize": {}, "evaluate": evaluate, "output": "o"}
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe)


def test_gates_of_sizes_need_no_measurement() -> None:
    recipe = {"model": {"path": "a/b"}, "quantize": {}, "evaluate": {"gates": {"size": "1GiB"}}, "output": "o"}
    loaded = load_recipe(recipe)
    assert loaded.evaluate is not None
    assert loaded.evaluate.gates is not None
    assert loaded.evaluate.gates.size == 1 << 30


def test_linears_that_no_input_reaches_are_counted(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(static_recipe(tmp_path / "run"), evaluate=None, model__sanity_check="off")
    found = find_structure(Path(recipe["model"]["path"]))
    first = found.blocks[0]
    blind = replace(found, blocks=(replace(first, inputs=first.inputs[:-1]), *found.blocks[1:]))
    monkeypatch.setattr(engine, "float_structure", lambda *_, **__: blind)
    quantcli.run(recipe)
    assert fallbacks(tmp_path / "run", ("quantize",)) == {"unreached": 1}
    texts = [problem["text"] for problem in run_facts(tmp_path / "run")["problems"]]
    assert "1 linear stays in float: no input reaches model.layers.0.mlp.down_proj." in texts
