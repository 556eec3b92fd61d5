"""What a second run does: nothing, or only what depends on the change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

import quantcli
from quantcli.errors import DataError, GateError, OutputError, RecipeError, VerificationError
from quantcli.pipeline.verify import verify_path

Recipe = dict[str, Any]
Tree = dict[str, str]
MEASURED = ["eval-ppl", "layers", "generate"]
ALL = ["check", "calibrate", "quantize", "export", "verify", "reference", *MEASURED]


def worked(recipe: Recipe, until: str | None = None) -> list[str]:
    """Run, and name the stages that were not up to date."""
    result = quantcli.run_stage(until, recipe)
    return [name for name, record in result.stages.items() if not record["reused"]]


def changed(recipe: Recipe, keys: str, value: Any) -> Recipe:
    copy: Recipe = json.loads(json.dumps(recipe))
    *path, last = keys.split(".")
    section = copy
    for key in path:
        section = section.setdefault(key, {})
    section[last] = value
    return copy


@pytest.fixture(scope="module")
def finished(static_recipe: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert worked(static_recipe(run)) == ALL
    return run


@pytest.fixture
def done(finished: Path, static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> Recipe:
    """The recipe of a finished run, a copy of its own: a run directory may be moved."""
    recipe = static_recipe(Path(shutil.copytree(finished, tmp_path / "run")))
    assert worked(recipe) == []
    return recipe


def test_a_second_run_writes_nothing(done: Recipe, tree: Callable[[Path], Tree]) -> None:
    run = Path(done["output"])
    before, times = tree(run), {path: path.stat().st_mtime_ns for path in run.rglob("*/*") if path.is_file()}
    record = json.loads((run / "run.json").read_text())
    assert worked(done) == []
    after = tree(run)
    assert before.pop("events.jsonl") != after.pop("events.jsonl")
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert json.loads((run / "run.json").read_text()) == record


@pytest.mark.parametrize(
    ("keys", "value", "stages"),
    [
        ("evaluate.perplexity.windows", 3, ["reference", "eval-ppl"]),
        ("evaluate.gates", {"kl_divergence": 100.0}, []),
        ("evaluate.output_error", {"tokens": 16}, ["layers"]),
        ("evaluate.output_error", None, []),
        ("evaluate.generate", {"max_new_tokens": 3}, ["generate"]),
        ("quantize.rollback.names", ["*.down_proj"], ["quantize", "export", "verify", *MEASURED]),
        ("quantize.weights.method", "mse", ["calibrate", "quantize", "export", "verify", *MEASURED]),
        ("calibration.samples", 3, ["calibrate", "quantize", "export", "verify", *MEASURED]),
        ("model.sanity_check", "off", []),
        ("model.dtype", "bfloat16", ALL),
    ],
)
def test_a_change_redoes_what_depends_on_it(done: Recipe, keys: str, value: Any, stages: list[str]) -> None:
    assert worked(changed(done, keys, value)) == stages


def test_calibration_of_a_scheme_that_needs_none_is_no_reason_to_work(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    recipe = changed(static_recipe(tmp_path / "run"), "quantize.activations", {"bits": 8, "scope": "token"})
    assert worked(recipe) == ["check", "quantize", "export", "verify", "reference", *MEASURED]
    assert worked(changed(recipe, "calibration.samples", 9)) == []


def test_a_format_with_scales_of_its_own_is_quantized_for(
    static_recipe: Callable[[Path], Recipe], tmp_path: Path
) -> None:
    weights = {"bits": 4, "granularity": "group", "group_size": 32}
    recipe = changed(static_recipe(tmp_path / "run"), "quantize", {"weights": weights})
    assert worked(recipe) == ["check", "quantize", "export", "verify", "reference", *MEASURED]
    halves = changed(recipe, "export", {"formats": ["gptq"]})  # scales in float16
    assert worked(halves) == ["quantize", "export", "verify", *MEASURED]


def test_a_touched_model_is_quantized_anew(done: Recipe, tmp_path: Path) -> None:
    model = Path(shutil.copytree(done["model"]["path"], tmp_path / "model"))
    recipe = changed(changed(done, "model.path", str(model)), "output", str(tmp_path / "other"))
    assert worked(recipe) == ALL
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert worked(recipe) == ALL


def test_a_stage_of_its_own_brings_only_what_it_needs(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    recipe = static_recipe(tmp_path / "run")
    assert worked(recipe, "quantize") == ["check", "calibrate", "quantize"]
    assert not (tmp_path / "run" / "export").exists()
    assert worked(recipe, "eval-ppl") == ["export", "verify", "reference", "eval-ppl"]
    assert worked(recipe) == ["layers", "generate"]
    assert worked(recipe) == []


def test_a_stage_of_its_own_leaves_what_is_up_to_date_in_the_results(done: Recipe) -> None:
    bounded = changed(done, "evaluate.gates", {"kl_divergence": 100.0, "size_ratio": "1%"})
    result = quantcli.run_stage("quantize", bounded)  # has nothing to do with what the gate is missed by
    assert list(result.stages) == ALL
    assert result.perplexity is not None
    summary = json.loads((Path(done["output"]) / "summary.json").read_text())
    assert summary["result"]["perplexity"] == result.perplexity
    assert [gate["name"] for gate in summary["result"]["gates"]] == ["kl_divergence", "size_ratio"]
    with pytest.raises(GateError, match="size_ratio"):
        quantcli.run_stage("export", bounded)
    other = quantcli.run_stage("quantize", changed(done, "quantize.weights.method", "mse"))
    assert (list(other.stages), other.perplexity) == (["check", "calibrate", "quantize", "reference"], None)


def test_a_stage_of_its_own_asks_for_no_text_that_it_does_not_read(done: Recipe, tmp_path: Path) -> None:
    gone = changed(done, "evaluate.perplexity.path", str(tmp_path / "gone.txt"))
    assert worked(gone, "export") == []
    with pytest.raises(DataError, match=r"gone\.txt"):
        worked(gone, "eval-ppl")
    with pytest.raises(DataError, match=r"gone\.txt"):
        worked(gone)


def test_a_task_whose_file_is_gone_does_not_stop_a_stage_before_it(done: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "boolq.jsonl"
    file.write_text(json.dumps({"question": "is it so", "passage": "It is so.", "answer": True}) + "\n")
    asked = changed(done, "evaluate.tasks", [{"task": "boolq", "path": str(file)}])
    assert worked(asked) == ["reference-tasks", "eval-tasks"]
    file.unlink()
    assert worked(asked, "quantize") == []
    with pytest.raises(DataError, match=r"boolq\.jsonl"):
        worked(asked)


def test_what_is_measured_is_the_first_format(static_recipe: Callable[[Path], Recipe], tmp_path: Path) -> None:
    both = ["compressed-tensors", "ascend"]
    recipe = changed(static_recipe(tmp_path / "run"), "export", {"formats": both})
    worked(recipe)
    again = ["export", "verify", "eval-ppl", "layers", "generate"]
    for formats in (both[::-1], both):
        result = quantcli.run(changed(recipe, "export", {"formats": formats}))
        assert [name for name, record in result.stages.items() if not record["reused"]] == again
        assert result.perplexity is not None
        assert result.perplexity["checkpoint"] == formats[0]


@pytest.mark.parametrize("damage", ["remove", "truncate", "lengthen"])
@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("calibrate/block-00001.safetensors", ["calibrate"]),
        ("quantize/block-00002.safetensors", ["quantize"]),
        ("reference/states/hidden-00003.bin", ["reference"]),
        ("eval-ppl/results.json", ["eval-ppl"]),
        ("layers/errors.json", ["layers"]),
        ("generate/generated.json", ["generate"]),
    ],
)
def test_a_damaged_artifact_is_made_again(
    done: Recipe, tree: Callable[[Path], Tree], file: str, stages: list[str], damage: str
) -> None:
    """And nothing behind it, since its bytes come out the same."""
    run = Path(done["output"])
    before = artifacts(tree, run)
    damaged(run / file, damage)
    assert worked(done) == stages
    assert artifacts(tree, run) == before


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "remove":
        path.unlink()
    elif how == "flip":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.write_bytes(content[:-7] if how == "truncate" else content + b"more")


def artifacts(tree: Callable[[Path], Tree], run: Path) -> Tree:
    varying = ("events.jsonl", "run.json", "summary.json", "report.html")
    return {name: digest for name, digest in tree(run).items() if name not in varying}


def exported(files: Tree) -> Tree:
    return {name: digest for name, digest in files.items() if name.startswith("export/")}


@pytest.mark.parametrize("how", ["flip", "truncate", "lengthen", "remove"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_changed_file_of_an_export_is_replaced_only_if_that_is_asked_for(
    done: Recipe, tree: Callable[[Path], Tree], name: str, how: str
) -> None:
    run = Path(done["output"])
    before = artifacts(tree, run)
    damaged(file := run / "export" / "compressed-tensors" / name, how)
    changed_to = artifacts(tree, run)
    if how == "flip":  # nothing is going to be written, so that the verification finds it
        with pytest.raises(VerificationError, match=rf"{name} is not what was exported"):
            worked(done)
        assert worked(done, "export") == []
    elif how != "remove":
        # by the same recipe, by one that would remove the export, and by a stage of its own
        for recipe, until in ((done, None), (changed(done, "quantize.weights.method", "mse"), None), (done, "export")):
            with pytest.raises(OutputError, match=rf"{name} was changed since the run wrote it\. Move it .*--overw"):
                worked(recipe, until)
    assert exported(artifacts(tree, run)) == exported(changed_to)
    result = quantcli.run(done, overwrite=how != "remove")
    again = ["export", "verify"] if how == "flip" else ["export"]
    assert [stage for stage, record in result.stages.items() if not record["reused"]] == again
    assert artifacts(tree, run) == before
    assert worked(done) == []
    assert file.is_file()


def test_a_file_that_was_moved_away_and_one_that_was_only_touched_are_no_edits(
    done: Recipe, tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    run = Path(done["output"])
    before, export = artifacts(tree, run), run / "export" / "compressed-tensors"
    (export / "config.json").write_text("mine")
    (export / "config.json").rename(tmp_path / "config.json")
    (export / "model.safetensors").touch()
    assert worked(done) == ["export"]
    assert artifacts(tree, run) == before


def test_an_older_file_of_the_same_size_is_found_before_it_is_removed(done: Recipe) -> None:
    """As one of an earlier run that was moved there: its time tells nothing."""
    file = Path(done["output"], "export", "compressed-tensors", "model.safetensors")
    damaged(file, "flip")
    os.utime(file, ns=(1, 1))
    mine, other = file.read_bytes(), changed(done, "quantize.weights.method", "mse")
    with pytest.raises(OutputError, match="was changed"):
        quantcli.run(other)
    assert file.read_bytes() == mine
    events: list[dict[str, Any]] = []
    quantcli.run(other, overwrite=True, listener=events.append)
    assert any("model.safetensors was changed" in event.get("text", "") for event in events)
    assert verify_path(Path(done["output"]))


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_so_is_a_changed_file_of_the_smoothed_model(done: Recipe, how: str) -> None:
    recipe = changed({**done, "export": None, "evaluate": None}, "smooth", {"method": "iterative", "save_model": True})
    worked(recipe)
    file = Path(done["output"], "smooth", "model", "model.safetensors")
    before = file.read_bytes()
    damaged(file, how)
    mine = file.read_bytes()
    for other in [recipe] * (how == "truncate") + [changed(recipe, "smooth.method", "smoothquant")]:
        with pytest.raises(OutputError, match=r"model.safetensors was changed since .*--overw"):
            quantcli.run(other)
        assert file.read_bytes() == mine
    quantcli.run(recipe, overwrite=True)
    assert file.read_bytes() == before
    assert worked(recipe) == []


def test_lost_statistics_of_the_output_head_are_made_again(
    static_recipe: Callable[[Path], Recipe], tree: Callable[[Path], Tree], tmp_path: Path
) -> None:
    recipe = changed(static_recipe(tmp_path / "run"), "quantize.rollback.last_linear", False)
    recipe = {**recipe, "export": None, "evaluate": None}
    assert worked(recipe) == ["check", "calibrate", "quantize"]
    before = tree(tmp_path / "run" / "calibrate")
    (tmp_path / "run" / "calibrate" / "block-00003.safetensors").unlink()  # of three blocks; the head comes behind
    assert worked(recipe) == ["calibrate"]
    assert tree(tmp_path / "run" / "calibrate") == before


def test_files_of_the_user_stay(done: Recipe) -> None:
    run = Path(done["output"])
    kept = [
        run / name for name in ("notes.txt", "quantize/why.md", "export/compressed-tensors/README.md", "mine/a.bin")
    ]
    for file in kept:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"mine: {file.name}")
    worked(changed(done, "quantize.rollback.names", ["*.o_proj"]))
    assert [file.read_text() for file in kept] == [f"mine: {file.name}" for file in kept]


def test_what_is_out_of_date_is_no_result(done: Recipe) -> None:
    """Results of another quantization stay on the disk, and the record does not claim them."""
    run = Path(done["output"])
    quantcli.run_stage("quantize", changed(done, "quantize.weights.method", "mse"))
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert list(stages) == ["check", "calibrate", "quantize", "reference"]
    with pytest.raises(VerificationError, match="no finished export"):
        verify_path(run)


def test_the_record_tells_what_was_made_and_with_what(done: Recipe, tree: Callable[[Path], Tree]) -> None:
    run = Path(done["output"])
    record = json.loads((run / "run.json").read_text())
    files = tree(run)
    for name, stage in record["stages"].items():
        assert stage["files"], name
        assert {f"{name}/{file}": digest for file, digest in stage["files"].items()}.items() <= files.items()
        assert stage["seconds"] >= 0
        assert stage["peak_memory"] > 1 << 20
        assert set(stage["versions"]) == {"quantcli", "torch", "transformers", "compressed-tensors"}
    assert record["seed"] == 0
    recorded = {f"{name}/{file}" for name, stage in record["stages"].items() for file in stage["files"]}
    others = {name for name, digest in files.items() if digest != "/"} - recorded
    own = {"run.json", "summary.json", "report.html", "recipe.yaml", "events.jsonl"}
    assert others == own | {f"{name}/stage.json" for name in ALL}


def test_the_resolved_recipe_gives_the_same_run(done: Recipe) -> None:
    run = Path(done["output"])
    again = quantcli.run(run / "recipe.yaml")
    assert all(stage["reused"] for stage in again.stages.values())


def test_an_edited_recipe_in_the_run_directory_is_kept(done: Recipe) -> None:
    run = Path(done["output"])
    edited = "# why so few windows: it is a test\n" + (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(edited)
    events: list[dict[str, Any]] = []
    quantcli.run(run / "recipe.yaml", listener=events.append)
    assert (run / "recipe.edited.yaml").read_text() == edited
    assert "# why" not in (run / "recipe.yaml").read_text()
    assert any("recipe.edited.yaml" in event.get("text", "") for event in events)


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.edited.yaml", "events.jsonl", "summary.json", "report.html"])
def test_a_directory_with_the_name_of_a_file_of_a_run_is_refused_before_any_work(
    name: str, done: Recipe, tree: Callable[[Path], Tree]
) -> None:
    place = Path(done["output"], name)
    place.unlink(missing_ok=True)
    (place / "mine").mkdir(parents=True)
    before = tree(place.parent)
    with pytest.raises(OutputError, match=f"{name} is a directory where a file belongs. Move it elsewhere"):
        quantcli.run(done)
    assert tree(place.parent) == before
    place.rename(place.with_name("mine"))
    assert worked(done) == []


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("calibrate", "stands where a directory belongs"),
        ("calibrate/stage.json", "is a directory where a file belongs"),
        ("quantize/block-00001.safetensors", "is a directory where a file belongs"),
        ("reference/states", "stands where a directory belongs"),
        ("export/compressed-tensors", "stands where a directory belongs"),
        ("export/compressed-tensors/model.safetensors", "is a directory where a file belongs"),
    ],
)
def test_what_is_in_the_way_of_a_stage_is_named_and_kept(name: str, why: str, done: Recipe) -> None:
    place = Path(done["output"], name)
    if place.is_dir():
        shutil.rmtree(place)
        place.write_text("mine")
    else:
        place.unlink()
        (place / "mine").mkdir(parents=True)
    kind = place.is_dir()
    with pytest.raises(OutputError, match=f"{name} {why}. Move it elsewhere and run again"):
        quantcli.run(done)
    assert place.is_dir() == kind
    place.rename(Path(done["output"], "mine"))
    assert name.partition("/")[0] in worked(done)
    assert worked(done) == []


def test_a_directory_that_is_called_like_a_leftover_is_left_alone(done: Recipe) -> None:
    places = [Path(done["output"], folder, ".new.4711.part") for folder in ("", "quantize")]
    for place in places:
        (place / "mine").mkdir(parents=True)
    assert worked(changed(done, "quantize.weights.method", "mse"))[1:] == ["quantize", "export", "verify", *MEASURED]
    assert all((place / "mine").is_dir() for place in places)


def test_every_byte_of_an_export_is_verified(done: Recipe) -> None:
    """One flipped bit in any file, the tokenizer's too."""
    export = Path(done["output"]) / "export" / "compressed-tensors"
    assert verify_path(export)["compressed-tensors: linears"] == 21
    for file in sorted(export.iterdir()):
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        with pytest.raises(VerificationError, match=file.name):
            verify_path(export)
        file.write_bytes(content)
    verify_path(export)


def test_transposed_linears_are_quantized_but_not_exported(tmp_path: Path) -> None:
    """GPT-2 stores its linears as [in, out]; the store holds them as [out, in]; the codes must match."""
    import torch
    from safetensors.torch import load_file

    from quantcli.formats.store import Store

    model = save_tiny_model("gpt2", tmp_path / "model")
    recipe: Recipe = {"model": {"path": str(model)}, "quantize": {}, "output": str(tmp_path / "run")}
    with pytest.raises(RecipeError, match=r"cannot hold transformer\.h\.0.*Conv1D"):
        quantcli.plan(recipe)
    assert worked({**recipe, "export": None}) == ["quantize"]
    stored = Store(tmp_path / "run" / "quantize").read("transformer.h.1.mlp.c_fc").weight
    weight = load_file(model / "model.safetensors")["transformer.h.1.mlp.c_fc.weight"].t()
    assert torch.all((stored.codes.float() * stored.scale - weight).abs() <= stored.scale / 2 * 1.001)


def test_linears_that_are_called_with_keywords_are_observed(tiny_llama: Path) -> None:
    import torch
    from torch import nn

    from quantcli.calibration.statistics import inputs_observed
    from quantcli.model.structure import Block, Linear, SharedInput

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(input=x)

    block = Block("b", (Linear("b.inner", 4, 2),), (SharedInput(("b.inner",), 4),), ())
    module = Keywords()
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 5.0, -1.0, 0.0]])
    with inputs_observed(module, block, "cpu") as statistics:
        module(x)
    assert statistics["b.inner"].minimum.tolist() == [0.0, -2.0, -1.0, 0.0]
    assert statistics["b.inner"].maximum.tolist() == [1.0, 5.0, 3.0, 0.0]
    module(x)
    assert statistics["b.inner"].count == 2


def test_sequences_longer_than_the_model_has_positions_for_are_refused(
    static_recipe: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    recipe = static_recipe(tmp_path / "run")
    recipe["calibration"]["sequence_length"] = 257
    with pytest.raises(RecipeError, match=r"calibration\.sequence_length: is 257, and the model has 256 positions"):
        quantcli.run(recipe)
    assert not (tmp_path / "run").exists()
    recipe["calibration"]["sequence_length"] = 256
    recipe["evaluate"]["perplexity"]["sequence_length"] = 1024
    with pytest.raises(RecipeError, match=r"evaluate\.perplexity\.sequence_length: is 1024"):
        quantcli.run(recipe)
