"""What commands print, for people and for scripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantcli as api
from quantcli.errors import QuantcliError

RecipeFile = Callable[..., Path]


def test_json_is_one_document_and_progress_goes_elsewhere(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file()
    outcome = quantcli("run", file, "--json")
    content = json.loads(outcome.out)
    assert content["output"] == str(file.parent / "run")
    assert content["exports"] == [str(file.parent / "run" / "export" / "compressed-tensors")]
    assert content["size_after"] < content["size_before"]
    assert content["perplexity"]["quantized"]["value"] > 1
    assert content["missed_gate"] is None
    assert [stage["reused"] for stage in content["stages"].values()] == [False] * 6
    progress = outcome.err.splitlines()
    titles = ["Checking", "Observing", "Quantizing", "Writing", "Reading", "Scoring"]
    assert [line.split()[0] for line in progress if line.split()[0] in titles] == titles
    assert "\x1b" not in outcome.err  # plain lines where there is no terminal
    again = json.loads(quantcli("run", file, "--json").out)
    assert [stage["reused"] for stage in again["stages"].values()] == [True] * 6
    assert again["perplexity"] == content["perplexity"]
    assert again["peak_memory"] >= content["peak_memory"]


def test_quiet_says_nothing_and_verbose_every_linear(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file()
    assert quantcli("run", file, "--quiet") == (0, "", "")
    outcome = quantcli("run", file, "--verbose", "--set", "quantize.rollback.names=['*.q_proj']")
    assert outcome.status == 0
    assert "module=model.layers.2.mlp.down_proj" in outcome.err
    assert "q_proj " not in outcome.err


def test_the_outcome_of_a_run_fits_a_narrow_terminal(
    quantcli: Any, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = recipe_file()
    out = quantcli("run", file).out
    assert "21 linears W8A8 static" in out
    assert "1 linear float" in out
    assert f"vllm serve {file.parent / 'run' / 'export' / 'compressed-tensors'}" in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("Serve it"))


def test_a_plan_for_people(quantcli: Any, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = recipe_file(**{"quantize.rollback.names": ["*.0.*.k_proj"]})
    out = quantcli("plan", file).out
    assert "… is model.layers.*" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["… mlp.gate_proj", "6", "96 × 64", "W8A8 static", ""] in rows
    assert ["… mlp.up_proj", "", "", "", ""] in rows
    assert [row[1] for row in rows if row[0] == "… self_attn.k_proj"] == ["1", "4"]
    every = quantcli("plan", file, "--verbose").out
    assert all(f"model.layers.{i}.self_attn.o_proj" in every for i in range(3))
    assert not (file.parent / "run").exists()


def test_a_plan_for_scripts_reads_no_weights(
    quantcli: Any, recipe_file: RecipeFile, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    file = recipe_file()
    content = json.loads(quantcli("plan", file, "--model", tmp_path, "--json").out)
    linears = {linear["name"]: linear for linear in content["linears"]}
    assert linears["model.layers.1.mlp.down_proj"]["shape"] == [64, 96]
    assert linears["model.layers.1.mlp.down_proj"]["scheme"] == "W8A8 static"
    assert linears["lm_head"]["scheme"] == "float"
    assert "head" in linears["lm_head"]["reason"]
    assert content["bits_per_weight"] > 8
    assert {"memory", "disk", "seconds", "tokens"} == set(content["estimate"])
    assert {verdict["engine"] for verdict in content["engines"]} >= {"vLLM on a CPU", "transformers"}


def test_a_plan_of_a_shipped_recipe_needs_no_output(quantcli: Any, tiny_llama: Path) -> None:
    for name in ("w8a16", "w8a8", "w8a8-dynamic"):
        assert "Llama" in quantcli("plan", name, "--model", tiny_llama).out


def test_the_plan_foretells_the_size(finished: Path) -> None:
    """Exactly, but for the headers of the files."""
    plan = api.plan(finished / "recipe.yaml")
    written = (finished / "export" / "compressed-tensors" / "model.safetensors").stat().st_size
    assert 0 <= written - plan.size_after < 20_000


def test_inspect_tells_what_a_path_is(quantcli: Any, finished: Path, tiny_llama: Path) -> None:
    model = json.loads(quantcli("inspect", tiny_llama, "--json").out)
    assert model["kind"] == "float model"
    assert (model["blocks"], model["linears"], model["dtype"]) == (3, 21, "float32")
    assert model["parameters"] * 4 == model["bytes"]
    export = json.loads(quantcli("inspect", finished / "export" / "compressed-tensors", "--json").out)
    assert export["kind"] == "quantized checkpoint (compressed-tensors)"
    assert export["schemes"] == "21 × W8A8 static"
    run = json.loads(quantcli("inspect", finished, "--json").out)
    assert run["kind"] == "run directory"
    assert run["model"] == str(tiny_llama)
    assert "→" in run["perplexity"]
    assert "kind" in quantcli("inspect", finished).out
    assert quantcli("inspect", tiny_llama / "nothing").status == 3


def test_inspect_of_a_gguf_file_converts_it(quantcli: Any) -> None:
    shared = Path(__file__).resolve().parents[3] / "shared"
    file = next(iter(sorted(shared.rglob("*.gguf"), key=lambda path: path.stat().st_size)), None)
    if file is None:
        pytest.skip("no GGUF file at hand")
    assert json.loads(quantcli("inspect", file, "--json").out)["kind"] == "float model"


def test_verify_finds_the_run_of_a_checkpoint(
    quantcli: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = finished / "export" / "compressed-tensors"
    expected = {"compressed-tensors: linears": 21}
    assert expected.items() <= json.loads(quantcli("verify", finished, "--json").out).items()
    assert expected.items() <= json.loads(quantcli("verify", export, "--json").out).items()
    monkeypatch.chdir(export)
    assert expected.items() <= json.loads(quantcli("verify", ".", "--json").out).items()
    copy = shutil.copytree(export, tmp_path / "copy")
    alone = json.loads(quantcli("verify", copy, "--json").out)
    assert alone["linears"] == 21
    assert "no run" in alone["checked against"]


def test_verify_of_a_copy_finds_what_cannot_be(quantcli: Any, finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(finished / "export" / "compressed-tensors", tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale"][3] = 0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    outcome = quantcli("verify", copy)
    assert outcome.status == 5
    assert "model.layers.0.self_attn.q_proj: a scale is zero or not finite" in outcome.err


def test_recipes_are_listed_shown_and_copied(quantcli: Any, tmp_path: Path) -> None:
    names = ("demo", "w4a16", "w8a16", "w8a8", "w8a8-dynamic")
    listed = quantcli("recipes", "list").out
    assert all(name in listed for name in names)
    shown = quantcli("recipes", "show", "w8a8").out
    assert quantcli("recipes", "copy", "w8a8", tmp_path).status == 0
    assert (tmp_path / "w8a8.yaml").read_text(encoding="utf-8") == shown
    again = quantcli("recipes", "copy", "w8a8", tmp_path)
    assert again.status == 2
    assert "is there already" in again.err
    assert (tmp_path / "w8a8.yaml").read_text(encoding="utf-8") == shown


def test_the_schema_holds_for_the_shipped_recipes(quantcli: Any) -> None:
    schema = json.loads(quantcli("schema").out)
    assert set(schema["properties"]) >= {"version", "model", "calibration", "quantize", "export", "evaluate", "output"}
    assert schema["additionalProperties"] is False
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    for name in ("demo", "w4a16", "w8a16", "w8a8", "w8a8-dynamic"):
        jsonschema.validate(yaml.safe_load(quantcli("recipes", "show", name).out), schema)


def test_help_names_every_command(quantcli: Any) -> None:
    out = quantcli("--help").out
    commands = ["run", "plan", "calibrate", "quantize", "export", "eval-ppl", "verify", "inspect", "recipes", "schema"]
    assert [command for command in commands if f" {command} " not in out] == []


def test_stage_commands_go_as_far_as_their_stage(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file()
    stages = json.loads(quantcli("calibrate", file, "--json").out)["stages"]
    assert list(stages) == ["check", "calibrate"]
    content = json.loads(quantcli("export", file, "--json").out)
    assert list(content["stages"]) == ["check", "calibrate", "quantize", "export"]
    assert content["stages"]["calibrate"]["reused"] is True
    assert content["perplexity"] is None


def test_the_interface_of_python(
    static_recipe: Callable[[Path], dict[str, Any]], finished: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    recipe = static_recipe(tmp_path / "run")
    plan = api.plan(recipe, overrides=["quantize.rollback.names=['*.down_proj']"])
    assert len(plan.kept) == 3 + 1
    assert list(api.run_stage("quantize", recipe).stages) == ["check", "calibrate", "quantize"]
    result = api.run(recipe, output=str(tmp_path / "elsewhere"), listener=events.append)
    assert result.path == tmp_path / "elsewhere"
    scores = json.loads((finished / "eval-ppl" / "results.json").read_text())
    assert result.perplexity is not None
    assert result.perplexity["quantized"] == scores["quantized"]
    blocks = [event for event in events if event["event"] == "block" and event["stage"] == "calibrate"]
    assert [(event["index"], event["of"]) for event in blocks] == [(0, 3), (1, 3), (2, 3)]
    recorded = [json.loads(line) for line in (result.path / "events.jsonl").read_text().splitlines()]
    assert recorded == events
    with pytest.raises(QuantcliError, match="There is no stage 'smoothe'"):
        api.run_stage("smoothe", recipe)
