"""What README and docs say of keys, options, constants, files and engines is what the code says."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from doc_blocks import DOCUMENTS, MODEL, ROOT, codes, rows, section, text_of
from pydantic import BaseModel

from quantcli import errors
from quantcli.cli import app
from quantcli.recipe import load_recipe, shipped_names
from quantcli.recipe.aliases import ALIAS_VALUES, ALIASES
from quantcli.recipe.document import parse_yaml
from quantcli.recipe.explain import known_keys
from quantcli.recipe.fields import size_of
from quantcli.recipe.schema import Recipe

Quantcli = Callable[[list[str]], tuple[int, str, str]]
STAGES = ["smooth", "calibrate", "search", "allocate", "quantize", "export", "eval-ppl"]


# ------------------------------------------------------------------------------------------------------ recipe


def _section_of(keys: tuple[str | int, ...]) -> type[BaseModel]:
    found: type[BaseModel] = Recipe
    for key in keys:
        annotation = found.model_fields[str(key)].annotation
        (found,) = [p for p in (annotation, *get_args(annotation)) if isinstance(p, type) and issubclass(p, BaseModel)]
    return found


@pytest.mark.parametrize("keys", known_keys(), ids=lambda keys: ".".join(map(str, keys)) or "top level")
def test_every_key_is_documented_with_its_default(keys: tuple[str | int, ...]) -> None:
    heading = f"`{'.'.join(map(str, keys))}`" if keys else "top level"
    text = section("docs/recipes.md", heading)
    if not keys:
        text = text.split("\n### ")[0]
    documented = {codes(key)[0]: default for key, default, _ in rows(text)}
    assert set(documented) == set(known_keys()[keys])
    model = _section_of(keys)
    for name, cell in documented.items():
        place = (*map(str, keys), name)
        key = model.model_fields[ALIASES.get(place, name)]
        if key.is_required():
            assert cell == "required"
        elif key.default_factory is not None:
            assert place == ("quantize", "activations", "symmetric")  # depends on the scope, in words
        else:
            value, _ = parse_yaml(codes(cell)[0], str)
            value = ALIAS_VALUES[place][value] if place in ALIAS_VALUES else value
            expected = key.get_default()
            if isinstance(value, str) and isinstance(expected, int):
                value = size_of(value)
            if isinstance(expected, BaseModel):
                value = type(expected).model_validate(value)
            elif isinstance(expected, tuple):
                value = tuple(value)
            assert value == expected, f"{heading}.{name}"


def test_the_default_of_symmetric_activations_is_as_documented() -> None:
    (cell,) = [row[1] for row in rows(section("docs/recipes.md", "`quantize.activations`")) if row[0] == "`symmetric`"]
    assert codes(cell) == ["true", "token", "false", "tensor", "mix"]
    for value, scope in (("true", "token"), ("false", "tensor"), ("false", "mix")):
        recipe = load_recipe("w8a8", [f"quantize.activations={{bits: 8, scope: {scope}}}"], model="a/b", output="o")
        assert str(recipe.quantize.activations.symmetric).lower() == value
    assert load_recipe("w8a8-fp8-static", model="a/b", output="o").quantize.activations.symmetric


def test_every_shipped_recipe_is_in_the_table() -> None:
    table = {codes(row[0])[0]: row[2].split(",")[0] for row in rows(section("docs/recipes.md", "Shipped recipes"))}
    assert set(table) == set(shipped_names())
    for name, calibration in table.items():
        recipe = load_recipe(name, model="org/name", output="out")
        assert (recipe.calibration is not None) == (calibration == "yes")


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if d.stem not in ("ARCHITECTURE", "extending")],
    ids=lambda document: document.stem,
)
def test_dotted_keys_in_sentences_exist(document: Path) -> None:
    known = {".".join(map(str, (*keys, name))) for keys, names in known_keys().items() for name in names}
    top = "|".join(known_keys()[()])
    for code in codes(document.read_text(encoding="utf-8")):
        match = re.match(rf"(?:{top})(?:\.\w+)+", code)
        if match and not code.endswith((".safetensors", ".gguf")):
            assert match[0] in known, code


# ------------------------------------------------------------------------------------------------------ commands


def _commands() -> dict[str, Any]:
    top: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    nested = {f"recipes {name}": command for name, command in top["recipes"].commands.items()}
    return {name: command for name, command in top.items() if name != "recipes"} | nested


def test_every_command_is_documented() -> None:
    documented = [codes(row[0])[0] for row in rows(section("docs/commands.md", "All commands"))]
    names = {" ".join(w for w in code.split()[1:] if w == w.lower() and w[0] != "[") for code in documented}
    assert names == set(_commands())


def test_every_option_is_documented_for_its_commands() -> None:
    documented: dict[str, set[str]] = {name: {"--help"} for name in _commands()}
    for option, of, _ in rows(section("docs/commands.md", "Options")):
        for name in codes(of) + (STAGES if "the stages" in of else []):
            documented[name].add(codes(option)[0].split()[0])
    for name, command in _commands().items():
        options = {opt for parameter in command.params for opt in parameter.opts if opt.startswith("--")} | {"--help"}
        assert documented[name] == options, name


def test_every_exit_status_is_documented() -> None:
    found = {int(n) for row in rows(section("docs/commands.md", "Exit statuses")) for n in row[0].split(",")}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.QuantcliError)]
    assert found == {0, 1, 130, 141, 143} | {c.exit_code for c in classes}
    titles = re.findall(r"^## (\d): ", text_of("docs/troubleshooting.md"), re.MULTILINE)
    assert {int(title) for title in titles} == {1} | {c.exit_code for c in classes}


def test_every_key_of_the_json_is_documented(examples: Path, quantcli: Quantcli) -> None:
    named = set(codes(section("docs/commands.md", "JSON")))
    _, out, _ = quantcli(["plan", "w8a16", "--model", MODEL, "--json"])
    plan = json.loads(out)
    for content in (plan, plan["linears"][0], plan["estimate"], plan["engines"][0]):
        assert set(content) <= named
    quick = ["--set", "evaluate.perplexity={windows: 2, sequence_length: 32}", "--set", "model.sanity_check=off"]
    status, out, err = quantcli(["run", "w8a16", "--model", MODEL, "--output", "out", "--quiet", "--json", *quick])
    assert status == 0, err
    result = json.loads(out)
    for content in (result, *result["stages"].values()):
        assert set(content) <= named
    short = ["--set", "calibration={samples: 2, sequence_length: 32}", "--set", "model.sanity_check=off"]
    _, out, _ = quantcli(["sensitivity", "w8a16", "--model", MODEL, "--output", "out", "--quiet", "--json", *short])
    ranking = json.loads(out)
    for content in (ranking, ranking["linears"][0]):
        assert set(content) <= named
    numbers = set(codes(section("docs/evaluation.md", "The numbers")))
    scores = result["perplexity"]
    for name in numbers & {"increase", "increase_error", "kl_divergence", "kl_error", "agreement"}:
        assert name in scores
    assert "value" in scores["float_model"]
    assert "float_model.value" in numbers


# ------------------------------------------------------------------------------------------------------ code


def test_the_engines_table_is_what_plan_says() -> None:
    from quantcli.formats.engines import verdicts
    from quantcli.model.structure import Linear
    from quantcli.quant.scheme import Scheme

    def scheme(name: str) -> Scheme:
        bits, activations = (int(n) for n in re.match(r"W(\d)A(\d+)", name).groups())  # type: ignore[union-attr]
        group = re.search(r" g(\d+)", name)
        mode = "none" if activations == 16 else re.search("static|dynamic", name)[0]  # type: ignore[index]
        kind = "float" if "fp8" in name else "int"
        size, granularity = (int(group[1]), "group") if group else (None, "channel")
        inputs, signed = min(activations, 8), ["asym" not in name or mode != whose for whose in ("none", "dynamic")]
        made = Scheme(bits, signed[0], granularity, size, mode, signed[1], activation_bits=inputs, type=kind)  # type: ignore[arg-type]
        assert made.name == name
        return made

    table = rows(section("docs/formats.md", "Which engine loads what"))
    assert len(table) > 8
    for name, *cells in table:
        found = verdicts([(Linear("x", 512, 512), scheme(codes(name)[0]))])
        assert ["yes" if verdict.loads else "no" for verdict in found] == cells, name


def test_the_engines_of_modelopt_are_what_plan_says() -> None:
    from quantcli.formats import modelopt
    from quantcli.formats.engines import verdicts
    from quantcli.model.structure import Linear
    from quantcli.quant.scheme import Scheme

    linear = Linear("m.0.x", 512, 512)
    wanted = {
        "FP8": Scheme(8, granularity="tensor", activations="static", type="float"),
        "FP8_PER_CHANNEL_PER_TOKEN": Scheme(8, activations="dynamic", type="float"),
    }
    table = {
        codes(row[0])[0]: row[1:] for row in rows(section("docs/formats.md", "modelopt")) if codes(row[0])[0] in wanted
    }
    for algorithm, scheme in wanted.items():
        assert not modelopt.refusal(linear, scheme)
        said, *cells = table[algorithm]
        assert codes(said)[0] == scheme.name
        found = verdicts([(linear, scheme)], None, ["modelopt"])
        assert [verdict.engine for verdict in found] == ["vLLM on a CPU", "vLLM on a GPU", "SGLang"]
        assert ["yes" if verdict.loads else "no" for verdict in found] == cells


def test_the_engines_of_ascend_are_what_plan_says() -> None:
    from quantcli.formats.ascend import attention_refusal, refusal, type_name
    from quantcli.formats.engines import verdicts
    from quantcli.model.structure import Linear
    from quantcli.quant.scheme import AttentionScheme, Scheme

    linear = Linear("x", 512, 512)
    kinds = ["none", "static", "dynamic", "mix"]
    schemes = [Scheme(8, activations=kind) for kind in kinds]  # type: ignore[arg-type]
    schemes += [Scheme(8, symmetric=False), Scheme(8, activations="static", sparse=True)]
    schemes += [Scheme(4), Scheme(4, activations="dynamic"), Scheme(8, activations="dynamic", type="float")]
    wanted = {
        type_name(s) + ("" if s.symmetric else " asym"): [
            verdict
            for experts in ([], [["x"]])
            for verdict in verdicts([(linear, s)], None, ["ascend"], experts=experts)
        ]
        for s in schemes
    }
    attentions = {"C8": AttentionScheme(kv="int8"), "FAQuant": AttentionScheme(heads=True)}
    wanted |= {name: verdicts([], attention, ["ascend"]) for name, attention in attentions.items()}
    assert not any(map(attention_refusal, attentions.values()))
    assert not any(refusal(linear, s) for s in schemes)
    table = rows(section("docs/formats.md", "Which Ascend engine loads what"))
    assert {codes(name)[0]: [cell for cell in cells if cell] for name, *cells in table} == {
        name: ["yes" if verdict.loads else "no" for verdict in found] for name, found in wanted.items()
    }


def test_the_readme_says_of_each_shipped_recipe_what_plan_says(examples: Path) -> None:
    from quantcli import plan

    table = [row for row in rows(section("README.md", "Schemes")) if codes(row[1])[0] in shipped_names()]
    assert {codes(row[1])[0] for row in table} == set(shipped_names()) - {"demo"}
    for _, recipe, _, *engines in table:
        loads = {v.engine: v.loads for v in plan(codes(recipe)[0], model=MODEL, output="out").engines}
        assert [cell == "yes" for cell in engines] == [loads["vLLM on a CPU"], loads["vLLM on a GPU"]]


def test_every_file_is_in_the_architecture_and_nothing_else_is() -> None:
    text = section("ARCHITECTURE.md", "The rooms")
    named: set[str] = set()
    for room, part in re.findall(r"^`quantcli/([\w/]*)`(.*?)(?=^`quantcli/|\Z)", text, re.MULTILINE | re.DOTALL):
        named |= {room + codes(row[0])[0] for row in rows(part)}
    package = ROOT / "quantcli"
    files = {file.relative_to(package).as_posix() for file in package.rglob("*.py")}
    assert named == {file for file in files if not file.endswith("/__init__.py")}


def test_the_constants_of_the_architecture_are_those_of_the_code() -> None:
    unit = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    table = rows(section("ARCHITECTURE.md", "What bounds memory"))
    assert len(table) > 5
    for name, value, _ in table:
        module, _, constant = codes(name)[0].rpartition(".")
        number, *units = value.split()
        assert getattr(importlib.import_module(module), constant) == int(number) * (unit[units[0]] if units else 1), (
            name
        )


def test_the_layers_of_the_architecture_are_those_that_are_checked() -> None:
    layers = re.search(r"^layers = \[(.*?)\]", text_of("pyproject.toml"), re.MULTILINE | re.DOTALL)
    assert layers is not None
    rooms = [re.findall(r"\w+", line) for line in re.findall(r'"(.*)"', layers[1])]
    package = ROOT / "quantcli"
    present = [{r for r in row if (package / r).is_dir() or (package / f"{r}.py").is_file()} for row in rooms]
    rule = section("ARCHITECTURE.md", "Import rules").split("\n1. ")[1].split("\n2. ")[0].split(". The rooms")[0]
    assert [set(codes(level)) for level in rule.split("→")] == present


def test_what_a_stage_and_a_format_need_is_in_the_guide() -> None:
    from quantcli.formats.table import FORMATS
    from quantcli.pipeline.context import Stage

    names = [re.split(r"\W", codes(row[0])[0])[0] for row in rows(section("docs/extending.md", "A stage"))]
    assert sorted(names) == sorted(f.name for f in fields(Stage))
    for row in rows(section("docs/extending.md", "A format")):
        name = re.split(r"\W", codes(row[0])[0])[0]
        assert all(hasattr(module, name) for module in FORMATS.values()), name


def test_the_ratios_of_the_search_are_as_many_as_documented() -> None:
    from quantcli.quant.search import RATIOS

    text = section("docs/algorithms.md", "Weights: `mse`")
    assert f"({len(RATIOS)} ratios" in text
    assert f"times {', '.join(str(r) for r in RATIOS[:4])}, … {RATIOS[-1]} " in text.replace("\n", " ")


def test_the_limits_of_the_sanity_check_are_as_documented() -> None:
    from quantcli.pipeline.stages import check

    text = section("docs/evaluation.md", "The sanity check")
    assert f"first {check.TOKENS} tokens" in text
    assert f"more than {check.MOST_TOKENS_A_WORD:g} tokens a word" in text
    assert f"perplexity is {check.HIGHEST_PERPLEXITY:g} or more" in text


def test_the_messages_under_troubleshooting_are_those_of_the_code() -> None:
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "quantcli").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # adjacent literals are one text
    table = [row for row in rows(text_of("docs/troubleshooting.md")) if row[0].startswith("`")]
    assert len(table) > 15
    for message, _ in table:
        for code in codes(message):
            for part in code.split("…"):
                assert part.strip() in source, part
