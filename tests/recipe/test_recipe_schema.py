"""Refusals of single keys and of combinations, each at its line; the JSON schema for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from quantcli.errors import RecipeError
from quantcli.recipe import json_schema, load_recipe, shipped_names, shipped_path
from quantcli.recipe.explain import known_keys

# One key a line, so that every refusal has a line of its own.
FULL = """\
version: 1
model:
  path: org/name
  dtype: auto
  device: auto
calibration:
  dataset: builtin
  samples: 64
  sequence_length: 512
  packing: packed
  seed: 0
quantize:
  weights:
    bits: 8
    symmetric: true
    granularity: channel
    method: minmax
    importance: none
  activations:
    bits: 8
    scope: tensor
    symmetric: false
  rollback:
    names: []
export:
  formats: [compressed-tensors]
evaluate:
  perplexity:
    dataset: builtin
    windows: 4
  gates:
    perplexity_increase: 2%
    kl_divergence: 0.1
output: out
"""


def refuse(directory: Path, *edits: tuple[str, str]) -> str:
    """The error of FULL with its lines `old` replaced by `new`.

    `old` may begin with the line of its section and " > " where it stands more than once.
    """
    lines = FULL.splitlines()
    for old, new in edits:
        section, _, old = old.rpartition(" > ")
        start = next(i for i, line in enumerate(lines) if line.strip() == section) if section else 0
        index = next(i for i in range(start, len(lines)) if lines[i].strip() == old)
        indent = lines[index][: len(lines[index]) - len(lines[index].lstrip())]
        lines[index] = "\n".join(indent + line for line in new.split("\n")) if new else ""
    file = directory / "r.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert len(message.splitlines()) <= 4
    return message.replace(f"{directory}/", "")


def test_the_recipe_that_refusals_start_from_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(FULL)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.evaluate is not None
    assert recipe.evaluate.gates is not None
    assert recipe.evaluate.gates.perplexity_increase == 0.02


@pytest.mark.parametrize(
    ("edits", "start", "part"),
    [
        ([("version: 1", "version: 2")], "r.yaml:1: version: is 2", "version: 1"),
        ([("version: 1", "version: true")], "r.yaml:1: version: is true", "whole number"),
        ([("model:", "model: 3\nmodle:")], "r.yaml:2: model: is 3", "section"),
        ([("dtype: auto", "dtype: bf16")], "r.yaml:4: model.dtype: is 'bf16'", "Did you mean bfloat16?"),
        ([("device: auto", "device: gpu")], "r.yaml:5: model.device: is 'gpu'", "cuda:N"),
        ([("device: auto", "trust_remote_code: yes")], "r.yaml:5: model.trust_remote_code: is 'yes'", "true or false"),
        ([("device: auto", "sanity_check: of")], "r.yaml:5: model.sanity_check: is 'of'", "Did you mean off?"),
        ([("device: auto", "revision: 123")], "r.yaml:5: model.revision: is 123", "quotes"),
        (
            [("path: org/name", "path: ./m"), ("device: auto", "revision: main")],
            "r.yaml:5: model.revision: there are no revisions",
            "Remove",
        ),
        ([("samples: 64", "samples: 0")], "r.yaml:8: calibration.samples: is 0", "more than 0"),
        ([("samples: 64", 'samples: "64"')], "r.yaml:8: calibration.samples: is '64'", "without quotes"),
        ([("samples: 64", "samples: 6.5")], "r.yaml:8: calibration.samples: is 6.5", "whole number"),
        ([("samples: 64", "samples: 010")], "r.yaml:8: calibration.samples: is '010'", "whole number"),
        ([("sequence_length: 512", "sequence_length: 1")], "r.yaml:9: calibration.sequence_length:", "more than 1"),
        ([("packing: packed", "packing: lines")], "r.yaml:10: calibration.packing: is 'lines'", "Did you mean line?"),
        ([("seed: 0", "seed: -1")], "r.yaml:11: calibration.seed: is -1", "at least 0"),
        ([("dataset: builtin", "dataset: builtn")], "r.yaml:7: calibration.dataset: 'builtn'", "wikitext2"),
        ([("dataset: builtin", "dataset: text")], "r.yaml:6: calibration.path: is missing", "Name the file"),
        ([("seed: 0", "path: a.txt")], "r.yaml:11: calibration.path: is a local file", "dataset text"),
        ([("seed: 0", "field: text")], "r.yaml:11: calibration.field: names a column", "Remove"),
        ([("seed: 0", "split: test")], "r.yaml:11: calibration.split: is for datasets on the hub", "Remove"),
        (
            [("dataset: builtin", "dataset: boolq\npath: b\nsplit: dev")],
            "r.yaml:9: calibration.split: is for datasets on the hub",
            "Remove",
        ),
        (
            [("dataset: builtin", "dataset: boolq"), ("seed: 0", "field: text")],
            "r.yaml:11: calibration.field: names a column",
            "Remove",
        ),
        ([("seed: 0", "drop_outliers: 10")], "r.yaml:11: calibration.drop_outliers: 10 is no fraction", "10% or 0.1"),
        ([("seed: 0", "drop_outliers: 100%")], "r.yaml:11: calibration.drop_outliers: is '100%'", "less than 1"),
        (
            [("dataset: builtin", "dataset: wikitext2"), ("seed: 0", "mix:\n- share: 1")],
            "r.yaml:7: calibration.dataset: is replaced by mix",
            "into an item of mix",
        ),
        ([("seed: 0", "mix:\n- share: 0")], "r.yaml:12: calibration.mix[0].share: is 0", "more than 0"),
        ([("seed: 0", "mix:\n- share: 50%")], "r.yaml:12: calibration.mix[0].share: is '50%'", "a number"),
        ([("seed: 0", "mix:\n- dataset: jsonl")], "r.yaml:12: calibration.mix[0].path: is missing", "Name the file"),
        (
            [("seed: 0", "mix:\n- shares: 1")],
            "r.yaml:12: calibration.mix[0].shares: unknown key",
            "Did you mean share?",
        ),
        (
            [("seed: 0", "mix:\n- weird: 1")],
            "r.yaml:12: calibration.mix[0].weird: unknown key",
            "Keys of calibration.mix: dataset, path, field, split, share.",
        ),
        (
            [("seed: 0", "mix:\n- share: 1\n- dataset: builtin")],
            "r.yaml:13: calibration.mix[1]: names the same text",
            "both shares",
        ),
        ([("bits: 8", "bits: 5")], "r.yaml:14: quantize.weights.bits: is 5", "8, 4, 3 or 2"),
        ([("bits: 8", "bits: 8.0")], "r.yaml:14: quantize.weights.bits: is 8.0", "whole number"),
        ([("method: minmax", "method: gptq")], "r.yaml:17: quantize.weights.method: is 'gptq'", "minmax or mse"),
        (
            [("method: minmax", "group_size: 64")],
            "r.yaml:17: quantize.weights.group_size: has no meaning with granularity channel",
            "Remove",
        ),
        (
            [("importance: none", "importance: second_moment")],
            "r.yaml:18: quantize.weights.importance: second_moment has no effect",
            "method: mse",
        ),
        (
            [("bits: 8", "bits: 4")],
            "r.yaml:20: quantize.activations.bits: 8-bit activations need",
            "activations.bits: 16",
        ),
        (
            [("granularity: channel", "granularity: group")],
            "r.yaml:16: quantize.weights.granularity: integer products",
            "channel or tensor",
        ),
        (
            [("symmetric: true", "symmetric: false")],
            "r.yaml:15: quantize.weights.symmetric: integer products",
            "Set it true",
        ),
        ([("scope: tensor", "scope: token")], "r.yaml:22: quantize.activations.symmetric: is false", "scope: tensor"),
        ([("scope: tensor", "scope: channel")], "r.yaml:21: quantize.activations.scope:", "tensor or token"),
        ([("names: []", "names: '*.q'")], "r.yaml:24: quantize.rollback.names: is '*.q'", "a list"),
        ([("names: []", "names:\n- a\n- 're:('")], "r.yaml:26: quantize.rollback.names[1]: 're:('", "Mend"),
        ([("names: []", "names: [*.down_proj]")], "r.yaml:24: no valid YAML", "needs quotes"),
        ([("names: []", "names: []\ndisable_names: []")], "r.yaml:25: quantize.rollback.disable_names:", "Keep one"),
        ([("names: []", "level: 5")], "r.yaml:24: quantize.rollback.level: unknown key", "names"),
        ([("rollback:", "kv_cache: {bits: 8}\nrollback:")], "r.yaml:23: quantize.kv_cache: unknown key", "rollback"),
        ([("rollback:", "overrides: []\nrollback:")], "r.yaml:23: quantize.overrides: unknown key", "Keys of quantize"),
        ([("evaluate:", "smooth: {method: m4}\nevaluate:")], "r.yaml:27: smooth: unknown key", "Keys of a recipe"),
        ([("evaluate:", "bits: 8\nevaluate:")], "r.yaml:27: bits: unknown key", "quantize.weights.bits"),
        ([("formats: [compressed-tensors]", "formats: []")], "r.yaml:26: export.formats: is empty", "remove"),
        (
            [("formats: [compressed-tensors]", "formats: [compressed_tensors]")],
            "r.yaml:26: export.formats[0]: is 'compressed_tensors'",
            "Did you mean compressed-tensors?",
        ),
        (
            [("formats: [compressed-tensors]", "formats: [compressed-tensors, compressed-tensors]")],
            "r.yaml:26: export.formats: names a format twice",
            "once",
        ),
        ([("windows: 4", "windows: 0")], "r.yaml:30: evaluate.perplexity.windows: is 0", "more than 0"),
        ([("gates:", "tasks: [boolq]\ngates:")], "r.yaml:31: evaluate.tasks: unknown key", "perplexity, gates"),
        (
            [("perplexity_increase: 2%", "perplexity_increase: 2")],
            "r.yaml:32: evaluate.gates.perplexity_increase: 2 is",
            "2% or 0.02",
        ),
        (
            [("perplexity_increase: 2%", "perplexity_increase: -2%")],
            "r.yaml:32: evaluate.gates.perplexity_increase:",
            "2% or 0.02",
        ),
        (
            [("kl_divergence: 0.1", "kl_divergence: 10%")],
            "r.yaml:33: evaluate.gates.kl_divergence: is '10%'",
            "a number",
        ),
        ([("output: out", "")], "r.yaml:1: output: is missing", "--output"),
        ([("path: org/name", "")], "r.yaml:2: model.path: is missing", "--model"),
        ([("output: out", "output:")], "r.yaml:34: output: is null", "text"),
    ],
)
def test_refusal_names_line_key_and_remedy(tmp_path: Path, edits: list[tuple[str, str]], start: str, part: str) -> None:
    message = refuse(tmp_path, *edits)
    first = message.splitlines()[0]
    assert first.startswith(start)
    assert part in first.removeprefix(start)


@pytest.mark.parametrize(
    ("removed", "changes", "start"),
    [
        ("calibration", {}, "r.yaml:15: quantize.activations.scope: static scales need calibration"),
        (
            "calibration",
            {
                "bits: 8\n    scope": "bits: 16\n    scope",
                "importance: none": "importance: second_moment",
                "minmax": "mse",
            },
            "r.yaml:12: quantize.weights.importance: second_moment needs calibration",
        ),
        ("evaluate.perplexity", {}, "r.yaml:28: evaluate.gates: judges nothing"),
    ],
)
def test_refusal_of_a_combination_with_an_absent_section(
    tmp_path: Path, removed: str, changes: dict[str, str], start: str
) -> None:
    text = FULL
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    name = removed.split(".")[-1]
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip() == f"{name}:")
    depth = len(lines[begin]) - len(lines[begin].lstrip())
    end = next(i for i in range(begin + 1, len(lines)) if len(lines[i]) - len(lines[i].lstrip()) <= depth)
    file = tmp_path / "r.yaml"
    file.write_text("\n".join(lines[:begin] + lines[end:]))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{tmp_path}/{start}")


def test_evaluation_needs_an_export_and_something_to_measure(tmp_path: Path) -> None:
    lines = FULL.replace("export:\n  formats: [compressed-tensors]", "export: null")
    (tmp_path / "r.yaml").write_text(lines)
    with pytest.raises(RecipeError, match=r"r\.yaml:26: evaluate: measures the exported checkpoint"):
        load_recipe(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml", ["evaluate=null"]).export is None
    with pytest.raises(RecipeError, match=r"--set evaluate=\{\}: evaluate: asks for no measurement"):
        load_recipe(tmp_path / "r.yaml", ["export={}", "evaluate={}"])


def test_the_first_three_errors_are_told_in_the_order_of_lines(tmp_path: Path) -> None:
    message = refuse(
        tmp_path,
        ("kl_divergence: 0.1", "kl: 1"),
        ("samples: 64", "samples: x"),
        ("dtype: auto", "dtyp: auto"),
        ("names: []", "names: 1"),
    )
    starts = [line.split(": ")[0] for line in message.splitlines()]
    assert starts == ["r.yaml:4", "r.yaml:8", "r.yaml:24", "... and 1 more."]


def test_a_wrong_key_hides_no_default_that_hangs_on_it(tmp_path: Path) -> None:
    message = refuse(tmp_path, ("scope: tensor", "scope: x"), ("activations: > symmetric: false", ""))
    assert message.count("\n") == 0
    assert message.startswith("r.yaml:21: quantize.activations.scope")


@pytest.mark.parametrize(
    ("text", "fraction"), [("2%", 0.02), ("2.5 %", 0.025), ("0%", 0.0), ("0.07", 0.07), ("7%", 0.07), ("150%", 1.5)]
)
def test_percentages_are_exact_fractions(text: str, fraction: float) -> None:
    source = yaml.safe_load(FULL)
    recipe = load_recipe(source, [f"evaluate.gates.perplexity_increase={text}"])
    assert recipe.evaluate is not None
    assert recipe.evaluate.gates is not None
    assert recipe.evaluate.gates.perplexity_increase == fraction


def test_defaults_that_depend_on_other_keys() -> None:
    def scheme(**sections: object) -> Any:
        return load_recipe({"model": {"path": "m/n"}, "output": "o", "calibration": {}, "quantize": sections}).quantize

    assert scheme(activations={"bits": 8, "scope": "token"}).activations.symmetric is True
    assert scheme(activations={"bits": 8, "scope": "tensor"}).activations.symmetric is False
    assert scheme(weights={"bits": 4, "granularity": "group"}).weights.group_size == 128
    assert scheme(weights={"bits": 4, "granularity": "channel"}).weights.group_size is None
    assert scheme(activations=None, weights=None, rollback=None) == scheme()
    assert scheme(activations=None).activations.bits == 16
    assert scheme(rollback={"disable_names": ["*.o_proj"]}).rollback.names == ("*.o_proj",)


def test_a_recipe_cannot_be_changed_after_loading() -> None:
    recipe = load_recipe("w8a16", model="m/n", output="o")
    with pytest.raises(ValueError, match="frozen"):
        recipe.quantize.weights.bits = 4


def _described(node: Any, name: str = "") -> list[str]:
    """Names of properties without a description, anywhere in a JSON schema."""
    bare = []
    if isinstance(node, dict):
        for key, value in node.get("properties", {}).items():
            bare += [f"{name}.{key}"] if "description" not in value else []
        for key, value in node.items():
            bare += _described(value, f"{name}.{key}")
    return bare


def test_json_schema_describes_every_key_and_refuses_others() -> None:
    schema = json_schema()
    assert _described(schema) == []
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())
    written = {key for part in [schema, *schema["$defs"].values()] for key in part["properties"]}
    assert written == {key for keys in known_keys().values() for key in keys}


def test_json_schema_accepts_shipped_recipes_and_refuses_wrong_ones() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    for name in shipped_names():
        assert list(validator.iter_errors(yaml.safe_load(shipped_path(name).read_text()))) == []
    wrongs: list[dict[str, Any]] = [{"quantize": {"weights": {"bits": 5}}}, {"quantize": {}, "smooth": {}}, {}]
    for wrong in wrongs:
        assert list(validator.iter_errors(wrong))
