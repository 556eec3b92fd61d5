"""What README and docs tell users to type works: commands and Python run, recipes load and fit a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doc_blocks import DOCUMENTS, MODEL, ROOT, Command, blocks, codes, commands, prose, section, text_of

from quantcli import plan, run_stage
from quantcli.errors import ModelError
from quantcli.recipe import load_recipe, shipped_names, shipped_path

Quantcli = Callable[[list[str]], tuple[int, str, str]]

STAGES = {"run", "smooth", "calibrate", "sensitivity", "search", "allocate", "quantize", "export", "eval-ppl"}
PLACEHOLDERS = {"RECIPE", "PATH", "NAME"}
# What quicker runs need, by section of the recipe; the example's own options come after and win.
QUICKER = {
    "calibration": ["calibration.samples=4", "calibration.sequence_length=64"],
    "evaluate": [
        "evaluate.perplexity.windows=2",
        "evaluate.perplexity.sequence_length=64",
        "evaluate.output_error.tokens=64",
        "evaluate.generate.max_new_tokens=3",
    ],
}

with_commands = pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if commands(document)], ids=lambda document: document.stem
)


def _quicker(arguments: list[str]) -> list[str]:
    """The same command on less text, with a sanity check that does not stop at a random model."""
    if arguments[0] not in STAGES:
        return arguments
    recipe = Path(arguments[1]) if Path(arguments[1]).is_file() else shipped_path(arguments[1])
    text = recipe.read_text(encoding="utf-8")
    overrides = ["model.sanity_check=warn"]
    overrides += [o for key, some in QUICKER.items() if re.search(f"^{key}:", text, re.MULTILINE) for o in some]
    return [*arguments[:2], *(word for override in overrides for word in ("--set", override)), *arguments[2:]]


@with_commands
def test_commands_run_in_the_order_in_which_they_stand(document: Path, examples: Path, quantcli: Quantcli) -> None:
    for command in commands(document):
        if command.words[0] != "quantcli":
            _check_other(command)
            continue
        status, out, err = quantcli(_quicker(command.words[1:]))
        assert status == command.status, f"{' '.join(command.words)}: {err}"
        if command.status:
            assert err.split() == " ".join(command.output).split()
        if command.redirect:
            (examples / command.redirect).write_text(out, encoding="utf-8")


def _check_other(command: Command) -> None:
    """Other programs are not run; what can be checked of them without is."""
    program, *rest = command.words
    assert program in {"make", "vllm"}, f"nothing is known of {program}"
    if program == "make":
        assert re.search(rf"^{rest[0]}:", text_of("Makefile"), re.MULTILINE)
    else:
        assert rest[0] == "serve"
        assert Path(rest[1]).parts[-2:] == ("export", "compressed-tensors")


@pytest.mark.parametrize(
    ("document", "index"),
    [(document, i) for document in DOCUMENTS for i in range(len(blocks(document, "yaml")))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_recipes_load_and_fit_a_model(document: Path, index: int, examples: Path) -> None:
    file = examples / "recipe.yaml"
    file.write_text(blocks(document, "yaml")[index], encoding="utf-8")
    recipe = load_recipe(file, model=MODEL, output="out")
    assert recipe.model.path == str(examples / MODEL)
    made = plan(file, model=MODEL, output="out")
    assert made.schemes or made.attention
    reasons = [linear.reason for linear in made.linears]
    assert any("rolled back" in reason for reason in reasons) == bool(recipe.quantize.rollback.names)
    assert any("override" in reason for reason in reasons) == bool(recipe.quantize.overrides)


@pytest.mark.parametrize(
    ("document", "index"),
    [(document, i) for document in DOCUMENTS for i in range(len(blocks(document, "python")))],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_python_runs(document: Path, index: int, examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = compile(blocks(document, "python")[index], f"{document.name}, python block {index}", "exec")
    exec(code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()  # every example shows something


def test_models_that_are_saved_anew_as_shown_are_the_same_and_can_be_quantized(examples: Path) -> None:
    """What troubleshooting.md does to weights in .bin files, in FP8 blocks, and beside a vision tower."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config

    for code in blocks(ROOT / "docs" / "troubleshooting.md", "python"):
        exec(code, {"__name__": "__main__"})
    fp8 = {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    seeing = AutoModelForImageTextToText.from_pretrained("./gemma-3-4b-it")
    tokens = torch.arange(3, 40)[None]
    for original, saved in (
        (AutoModelForCausalLM.from_pretrained("./old-model"), "./old-model-safetensors"),
        (AutoModelForCausalLM.from_pretrained("./model-fp8", **fp8), "./model-bf16"),
        (seeing, "./gemma-3-4b-text"),
    ):
        with torch.inference_mode():
            wanted = original(input_ids=tokens).logits
            assert torch.equal(AutoModelForCausalLM.from_pretrained(saved)(input_ids=tokens).logits, wanted)
        assert plan("w4a16", model=saved, output="out").schemes
    for refused in ("./old-model", "./model-fp8", "./gemma-3-4b-it"):
        with pytest.raises(ModelError) as caught:
            run_stage("quantize", "w8a16", model=refused, output="out")
        assert "docs/troubleshooting.md" in caught.value.remedy


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_commands_inside_a_sentence_exist(document: Path) -> None:
    import typer

    from quantcli.cli import app

    command = typer.main.get_command(app)
    known = command.commands  # type: ignore[attr-defined]
    own = {option for parameter in command.params for option in parameter.opts}
    for code in codes(prose(document)):
        words = code.split()
        if words[0] != "quantcli" or len(words) == 1 or words[1] in own:
            continue
        assert words[1] in known, code
        if words[1] == "recipes" and len(words) > 2:
            assert words[2] in known["recipes"].commands, code
        elif words[1] in STAGES | {"plan"} and len(words) > 2 and not words[2].startswith("-"):
            assert words[2] in {*PLACEHOLDERS, *shipped_names()}, code


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_runs(name: str, examples: Path, quantcli: Quantcli) -> None:
    gates = ["--set", "evaluate.gates=null"] if "gates" in shipped_path(name).read_text(encoding="utf-8") else []
    status, out, err = quantcli(_quicker(["run", name, "--model", MODEL, "--output", "out", *gates]))
    assert status == 0, err
    recipe = load_recipe(name, model=MODEL, output="out")
    assert ("smoothing" in _labels(out.splitlines())) == (recipe.smooth is not None)
    assert quantcli(["verify", "out"])[0] == 0


def test_the_outcome_of_the_readme_is_what_a_run_prints(examples: Path, quantcli: Quantcli) -> None:
    (run,) = [c for c in commands(ROOT / "README.md") if c.words[:2] == ["quantcli", "run"]]
    _, out, _ = quantcli(_quicker(run.words[1:]))
    assert _labels(run.output) == _labels(out.splitlines())
    serve = [line.split()[:4] for line in out.splitlines() if line.startswith("Serve it: ")]
    assert serve == [line.split()[:4] for line in run.output if line.startswith("Serve it: ")] != []


def test_the_plan_of_the_readme_is_what_plan_prints(examples: Path, quantcli: Quantcli) -> None:
    (shown,) = [c for c in commands(ROOT / "README.md") if c.words[:2] == ["quantcli", "plan"]]
    _, out, _ = quantcli(shown.words[1:])
    labels = _labels(out.splitlines())
    assert _labels(shown.output) == labels[labels.index("smoothing") :]


def _labels(lines: list[str]) -> list[str]:
    """First cells of the rows of printed tables; continued rows have none."""
    first = [line[1:].split("│")[0].strip() for line in lines if line.startswith("│")]
    return [label for label in first if label]


def test_the_directory_tree_is_what_a_run_leaves(examples: Path, quantcli: Quantcli) -> None:
    tree = [line.split("  ")[1].strip() for line in blocks(ROOT / "docs" / "commands.md", "text")[0].splitlines()[1:]]
    status, _, err = quantcli(_quicker(["run", "w8a8", "--model", MODEL, "--output", "out"]))
    assert status == 0, err
    left = {entry.name for entry in (examples / "out").iterdir()}
    assert left == {name.split("/")[0] for name in tree}
    assert all((examples / "out" / name).exists() for name in tree)
    for name in re.findall(r"`(\w+\.json)`", section("docs/commands.md", "The run directory")):
        assert list((examples / "out").rglob(name)), name
