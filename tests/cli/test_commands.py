"""What commands print, for people and for scripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

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
    assert [stage["reused"] for stage in content["stages"].values()] == [False] * 9
    progress = outcome.err.splitlines()
    titles = ["Checking", "Observing", "Quantizing", "Writing", "Reading", "Scoring"]
    assert [line.split()[0] for line in progress if line.split()[0] in titles] == titles
    assert "\x1b" not in outcome.err  # plain lines where there is no terminal
    again = json.loads(quantcli("run", file, "--json").out)
    assert [stage["reused"] for stage in again["stages"].values()] == [True] * 9
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
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("Report", "Serve it")))


def test_a_plan_for_people(quantcli: Any, recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = recipe_file(**{"quantize.rollback.names": ["*.0.*.k_proj"]})
    out = quantcli("plan", file).out
    assert "… is model.layers.*" in out
    assert "Source of vLLM on a CPU: vLLM 0.32 on a CPU, run by tests/serving, https://" in out
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
    assert {verdict["engine"] for verdict in content["engines"]} >= {"vLLM on a CPU", "transformers", "SGLang"}
    assert all("https://" in verdict["source"] for verdict in content["engines"])


def test_a_plan_of_a_shipped_recipe_needs_no_output(quantcli: Any, tiny_llama: Path) -> None:
    for name in ("w8a16", "w8a8", "w8a8-dynamic"):
        assert "Llama" in quantcli("plan", name, "--model", tiny_llama).out


def test_a_plan_of_a_copied_recipe_needs_no_output(quantcli: Any, tiny_llama: Path, tmp_path: Path) -> None:
    assert quantcli("recipes", "copy", "w8a16", tmp_path).status == 0
    assert quantcli("plan", tmp_path / "w8a16.yaml", "--model", tiny_llama).status == 0
    assert quantcli("run", tmp_path / "w8a16.yaml", "--model", tiny_llama).status == 2


def test_a_plan_warns_of_sequences_that_a_run_refuses(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(**{"calibration.sequence_length": 300, "evaluate.perplexity.sequence_length": 257})
    warnings = json.loads(quantcli("plan", file, "--json").out)["warnings"]
    assert [[word for word in text.replace(",", "").split() if word.isdigit()] for text in warnings] == [
        ["300", "256", "256"],
        ["257", "256", "256"],
    ]
    shown = quantcli("plan", file)
    assert shown.status == 0
    lines = shown.out.splitlines()
    assert [line for line in lines if line.startswith("Warning")] == [f"Warning: {text}" for text in warnings]
    refused = quantcli("run", file)
    assert refused.status == 2
    assert refused.err.strip() == warnings[0].removeprefix("A run refuses this: ")
    fits = quantcli("plan", recipe_file(**{"evaluate.perplexity.sequence_length": 256}), "--json")
    assert json.loads(fits.out)["warnings"] == []


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
    assert "model.safetensors is not what was exported" in outcome.err
    (copy / "SHA256SUMS").unlink()  # as of a checkpoint that another tool made
    outcome = quantcli("verify", copy)
    assert outcome.status == 5
    assert "model.layers.0.self_attn.q_proj: a scale is zero or not finite" in outcome.err


def test_recipes_are_listed_shown_and_copied(quantcli: Any, tmp_path: Path) -> None:
    names = ("demo", "w4a16", "w4a16-awq", "w4a16-best", "w4a16-gptq", "w8a16", "w8a8", "w8a8-dynamic", "w8a8-tuned")
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

    for name in (
        "demo",
        "w4a16",
        "w4a16-awq",
        "w4a16-best",
        "w4a16-gptq",
        "w8a16",
        "w8a8",
        "w8a8-dynamic",
        "w8a8-tuned",
    ):
        jsonschema.validate(yaml.safe_load(quantcli("recipes", "show", name).out), schema)


def test_the_version(quantcli: Any) -> None:
    assert quantcli("--version") == (0, f"quantcli {api.__version__}\n", "")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{api.__version__}"' in project


def test_help_names_every_command(quantcli: Any) -> None:
    out = quantcli("--help").out
    commands = ["run", "plan", "smooth", "calibrate", "sensitivity", "search", "quantize", "export", "eval-ppl"]
    commands += ["verify", "convert", "inspect", "recipes", "schema"]
    assert [command for command in commands if f" {command} " not in out] == []


def test_stage_commands_go_as_far_as_their_stage(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file()
    stages = json.loads(quantcli("calibrate", file, "--json").out)["stages"]
    assert list(stages) == ["check", "calibrate"]
    content = json.loads(quantcli("export", file, "--json").out)
    assert list(content["stages"]) == ["check", "calibrate", "quantize", "export"]
    assert content["stages"]["calibrate"]["reused"] is True
    assert content["perplexity"] is None


def test_a_checkpoint_is_scored_without_a_run(
    quantcli: Any, finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export = finished / "export" / "compressed-tensors"
    words = ["eval-ppl", finished / "recipe.yaml", "--checkpoint", export, "--model", tiny_llama]
    outcome = quantcli(*words, "--json")
    content, scores = json.loads(outcome.out), json.loads((finished / "eval-ppl" / "results.json").read_text())
    assert {key: content[key] for key in scores if key not in ("checkpoint", "per_window")} == {
        key: value for key, value in scores.items() if key not in ("checkpoint", "per_window")
    }
    assert content["schemes"] == {"W8A8 static": 21}
    assert "Scoring" in outcome.err
    shown = quantcli(*words, "--quiet")
    assert shown.err == ""
    for label in ("21 × W8A8 static", "float model", "kl divergence"):
        assert label in shown.out
    text = ["--set", "evaluate.perplexity.windows=2", "--set", "evaluate.perplexity.sequence_length=32"]
    alone = json.loads(quantcli("eval-ppl", "--checkpoint", export, *text, "--json").out)
    assert (alone["windows"], alone["float_model"], alone["agreement"]) == (2, None, None)
    assert list(tmp_path.iterdir()) == []


def test_convert_says_what_it_wrote(
    quantcli: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["convert", finished / "export" / "compressed-tensors", "--to", "ascend", "--output", tmp_path / "new"]
    content = json.loads(quantcli(*words, "--json").out)
    assert (content["format"], content["linears"]) == ("compressed-tensors → ascend", 21)
    assert content["schemes"] == {"W8A8 static": 21}
    assert quantcli("verify", tmp_path / "new").status == 0
    monkeypatch.setenv("COLUMNS", "300")
    title, *lines = quantcli(*words, "--overwrite").out.splitlines()
    assert title.strip() == f"{tmp_path / 'new'} is in order"
    rows = dict([cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│"))
    assert rows == {
        "output": str(tmp_path / "new"),
        "format": "compressed-tensors → ascend",
        "schemes": "21 × W8A8 static",
        "linears": "21",
        "other tensors": str(content["other_tensors"]),
        "fixed prompt": f"log-likelihood {content['prompt']:.4f} a token",
        "size": f"{content['bytes'] / 1e3:.1f} kB",
    }
    cut = ["convert", tmp_path / "new", "--to", "ascend", "--output", tmp_path / "cut", "--shard-size", "64 kB"]
    assert quantcli(*cut).status == 0
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    to_dense = ["convert", tmp_path / "new", "--to", "dense", "--output", tmp_path / "dense"]
    assert "quantized inputs of linears" in quantcli(*to_dense).out


METRICS = ["range_parm", "kurtosis", "quantile", "output_error", "block_error"]


def pasted_block(out: str) -> str:
    """The rollback block that `quantcli sensitivity` prints behind its table."""
    lines = out.splitlines()
    return "\n".join(lines[lines.index("quantize:") :])


def test_sensitivity_ranks_every_linear(
    quantcli: Any, recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = recipe_file()
    content = json.loads(quantcli("sensitivity", file, "--json").out)
    assert content["metric"] == "range_parm"
    assert content["rolled_back"] == {}
    rows = content["linears"]
    assert len({row["name"] for row in rows}) == 21
    assert all(list(row) == ["name", *METRICS] for row in rows)
    assert all(row["output_error"] > 0 < row["block_error"] for row in rows)
    for metric in METRICS:
        ranked = json.loads(quantcli("sensitivity", file, "--json", "--metric", metric, "--quiet").out)
        values = [row[metric] for row in ranked["linears"]]
        assert values == sorted(values, reverse=True)
        assert ranked["metric"] == metric
        assert sorted(map(str, ranked["linears"])) == sorted(map(str, rows))  # the same numbers, in another order
    siblings = {row["name"]: row for row in rows}
    query, key = (siblings[f"model.layers.1.self_attn.{short}_proj"] for short in "qk")
    assert all(query[metric] == key[metric] for metric in METRICS if metric != "output_error")

    outcome = quantcli("sensitivity", file, "--top", "3")
    assert "3 of 21 linears, by range_parm" in outcome.out
    assert f"{rows[0]['range_parm']:.3g}" in outcome.out
    pasted = tmp_path / "pasted.yaml"
    pasted.write_text(pasted_block(outcome.out))
    plan = api.plan(pasted, model=json.loads(file.read_text())["model"]["path"], output=str(tmp_path / "out"))
    named = [name for name, reason in plan.kept.items() if reason.startswith("rolled back")]
    assert sorted(named) == sorted(row["name"] for row in rows[:3])


def test_sensitivity_of_a_recipe_that_needs_no_data(quantcli: Any, recipe_file: RecipeFile, tmp_path: Path) -> None:
    """Without a calibration section it is ranked on the default text; errors are those of the recipe's own scheme."""
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True, num_hidden_layers=1, intermediate_size=64)
    weights_only = {"quantize.activations": {"bits": 16}, "calibration": None, "evaluate": None}
    file = recipe_file(model={"path": str(model), "sanity_check": "off"}, **weights_only)
    outcome = quantcli("sensitivity", file, "--top", "1")
    assert "16384 tokens in 64 sequences" in outcome.err
    assert "1 of 7 linears" in outcome.out
    found = {}
    for bits in (8, 4):
        quick = ["calibration={samples: 8, sequence_length: 32}", f"quantize.weights.bits={bits}"]
        content = json.loads(
            quantcli("sensitivity", file, "--json", "--quiet", "--set", quick[0], "--set", quick[1]).out
        )
        found[bits] = {row["name"]: row for row in content["linears"]}
    for name, row in found[4].items():
        assert row["range_parm"] == found[8][name]["range_parm"]
        assert 100 < row["output_error"] / found[8][name]["output_error"] < 1000  # 16 to 18 times coarser


def test_a_level_rolls_back_the_first_of_the_ranking(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(**{"quantize.rollback": {"level": "L2", "metric": "output_error", "siblings": "apart"}})
    ranked = json.loads(quantcli("sensitivity", file, "--json", "--quiet").out)
    first = [row["name"] for row in ranked["linears"][:2]]
    assert list(ranked["rolled_back"]) == first
    outcome = quantcli("run", file, "--json")
    assert json.loads(outcome.out)["stages"]["sensitivity"]["reused"] is True
    manifest = json.loads((file.parent / "run" / "quantize" / "manifest.json").read_text())
    assert {name for name in manifest["float"] if name != "lm_head"} == set(first)
    assert all(manifest["float"][name].startswith("rolled back by output_error ") for name in first)
    every = quantcli("quantize", file, "--set", "quantize.rollback={level: 99, siblings: apart, to: W8A16}")
    assert "quantize.rollback.level is 99, and 21 linears are quantized: all of them are rolled back." in every.err
    manifest = json.loads((file.parent / "run" / "quantize" / "manifest.json").read_text())
    assert len(manifest["quantized"]) == 21
    assert {entry["activations"] for entry in manifest["quantized"].values()} == {"none"}


def test_a_search_writes_the_recipe_that_it_found(quantcli: Any, recipe_file: RecipeFile) -> None:
    """That recipe, run as any other, has the same schemes and keeps the bound."""
    bound = 7e-4  # half the divergence of this model without rollback
    file = recipe_file(**{"quantize.rollback": {"target": {"kl_divergence": bound, "windows": 4}}})
    outcome = quantcli("search", file, "--json")
    assert outcome.status == 0, outcome.err
    assert list(json.loads(outcome.out)["stages"]) == ["check", "calibrate", "sensitivity", "search"]
    folder = file.parent / "run" / "search"
    found = json.loads((folder / "found.json").read_text())
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert found["evaluations"] == len(trials) == outcome.err.count(" linears rolled back, perplexity")
    assert 0 < found["measured"]["kl_divergence"] <= bound < trials[0]["kl_divergence"]
    assert trials[0]["rolled_back"] == []
    met = [trial for trial in trials if trial["kl_divergence"] <= bound]
    assert len(found["rolled_back"]) == min(len(trial["rolled_back"]) for trial in met)
    assert not (folder / "base").exists()

    run = json.loads(quantcli("run", file, "--json", "--quiet").out)
    assert run["stages"]["search"]["reused"] is True
    plain = json.loads(quantcli("run", folder / "recipe.yaml", "--output", file.parent / "plain", "--json").out)
    assert "search" not in plain["stages"]
    first, second = (
        json.loads((path / "quantize" / "manifest.json").read_text())
        for path in (file.parent / "run", file.parent / "plain")
    )
    assert first["quantized"] == second["quantized"]
    assert set(first["float"]) == set(second["float"]) == {*found["rolled_back"], "lm_head"}
    assert plain["perplexity"]["kl_divergence"] == run["perplexity"]["kl_divergence"] <= bound
    assert run["perplexity"]["kl_divergence"] == pytest.approx(found["measured"]["kl_divergence"], rel=1e-3)


def test_a_search_for_a_size_takes_what_fits(quantcli: Any, recipe_file: RecipeFile) -> None:
    file = recipe_file(evaluate=None)
    sizes = [json.loads(quantcli("plan", file, "--json").out)[key] for key in ("size_after", "size_before")]
    size = (sum(sizes) / 2) / 1e9
    target = ["--set", f"quantize.rollback.target.size={size}"]
    assert quantcli("search", file, *target).status == 0
    found = json.loads((file.parent / "run" / "search" / "found.json").read_text())
    assert found["size"] <= size * 1e9
    ranking = json.loads((file.parent / "run" / "sensitivity" / "sensitivity.json").read_text())
    assert ranking["metric"] == "kl_divergence"
    assert found["rolled_back"].keys() & {row["name"] for row in ranking["linears"][:5]}
    assert json.loads(quantcli("run", file, *target, "--json", "--quiet").out)["size_after"] == found["size"]


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


# ------------------------------------------------------------------------------------------------------ report


def test_a_run_ends_with_its_page_and_report_makes_the_same(quantcli: Any, finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    outcome = quantcli("report", finished, "--output", page)
    assert outcome == (0, f"Wrote {page}.\n", "")
    assert page.read_bytes() == (finished / "report.html").read_bytes()
    text = page.read_text(encoding="utf-8")
    command = json.loads((finished / "summary.json").read_text())["command"]
    assert command.startswith("quantcli run ")
    assert command in text
    for part in ("Output error by layer", "Activation ranges", "Generated text", "together", "W8A8 static"):
        assert part in text, part


def test_the_json_of_a_report_is_the_outcome_and_what_to_beware_of(
    quantcli: Any, finished: Path, tmp_path: Path
) -> None:
    found = json.loads(quantcli("report", finished, "--output", tmp_path / "page.html", "--json").out)
    scores = json.loads((finished / "eval-ppl" / "results.json").read_text())
    assert found["perplexity"]["kl_divergence"] == scores["kl_divergence"]
    assert found["run"] == finished.name
    assert len(found["errors"]["values"]) == 21
    assert {each["kind"] for each in found["problems"]} <= {"warning", "note", "fallback"}
    folder = finished / "export" / "compressed-tensors"
    sizes = found["sizes"]["compressed-tensors"]
    header = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert sizes["bytes"] == sum(sizes["parts"].values()) == (folder / "model.safetensors").stat().st_size - header
    linears = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert sizes["parts"]["codes"] == linears
    assert sizes["parts"]["embeddings"] == sizes["parts"]["output head"] == 512 * 64 * 4
    assert sizes["bits_per_weight"] == pytest.approx(
        8 * (linears + sizes["parts"]["scales and zero points"]) / linears, abs=1e-4
    )


def test_runs_are_compared_and_a_file_that_is_there_is_kept(
    quantcli: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    outcome = quantcli("report", finished, other)
    assert outcome.status == 0
    assert "comparison.html" in outcome.out
    assert "KL divergence" in outcome.out
    again = quantcli("report", finished, other)
    assert again.status == 2
    assert "comparison.html exists. Name another file by --output, or add --overwrite." in " ".join(again.err.split())
    found = json.loads(quantcli("report", finished, other, "--overwrite", "--json").out)
    assert found["comparable"] == [row["run"] for row in found["runs"]] == ["run", "other"]


def test_what_is_no_run_is_not_reported(quantcli: Any, tmp_path: Path) -> None:
    outcome = quantcli("report", tmp_path)
    assert outcome.status == 2
    assert "is no run directory. Name the output of `quantcli run`." in " ".join(outcome.err.split())


def test_brackets_in_names_are_no_markup(quantcli: Any, recipe_file: RecipeFile, tmp_path: Path) -> None:
    outcome = quantcli("run", recipe_file(output=str(tmp_path / "w[b]" / "x[/b]")))
    assert outcome.status == 0
    assert outcome.out.replace("\n", "").replace("│", "").replace(" ", "").count("w[b]/x[/b]") >= 2
    assert f"'{tmp_path}/w[b]/x[/b]/export/compressed-tensors'" in outcome.out


def test_no_command_serves_what_no_engine_loads(quantcli: Any, recipe_file: RecipeFile, tmp_path: Path) -> None:
    eight = quantcli("run", recipe_file(), "--output", tmp_path / "8")
    assert f"Serve it: vllm serve {tmp_path / '8'}" in eight.out
    three = quantcli(
        "run", recipe_file(), "--output", tmp_path / "3", "--set", "quantize={weights: {bits: 3}}",
        "--set", "export.formats=[compressed-tensors]",
    )  # fmt: skip
    assert three.status == 0
    assert "Serve it" not in three.out


def test_a_model_that_runs_its_own_code_is_served_with_leave_to(quantcli: Any, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Own\n"
    )
    run = ("run", "w8a16", "--model", model, "--set", "evaluate=null", "--set", "model.trust_remote_code=true")
    found = quantcli(*run, "--output", tmp_path / "out")
    place = tmp_path / "out" / "export" / "compressed-tensors"
    assert f"Serve it: vllm serve {place} --trust-remote-code" in found.out.splitlines()
    assert (place / "own.py").read_text() == (model / "own.py").read_text()
