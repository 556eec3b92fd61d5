"""The section `smooth`: its defaults, msModelSlim's names, and what it refuses; sizes with units."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantcli.errors import RecipeError
from quantcli.recipe import json_schema, load_recipe, resolved_yaml
from quantcli.recipe.fields import as_size, size_of
from quantcli.recipe.schema import Recipe
from quantcli.recipe.smoothing import NUMBERED, SmoothSection

BASE = """\
model: {path: org/name}
output: out
calibration: {}
quantize:
  activations: {bits: 8}
"""


def recipe_of(smooth: str, *overrides: str) -> Recipe:
    return load_recipe(yaml.safe_load(BASE + f"smooth: {smooth}\n"), overrides)


def section_of(smooth: str) -> SmoothSection:
    section = recipe_of(smooth).smooth
    assert section is not None
    return section


def test_an_absent_section_smooths_nothing() -> None:
    assert load_recipe(yaml.safe_load(BASE)).smooth is None
    assert load_recipe(yaml.safe_load(BASE), ["smooth=null"]).smooth is None


@pytest.mark.parametrize(("number", "name"), NUMBERED.items())
def test_a_method_has_two_names_under_either_key(number: str, name: str) -> None:
    found = {section_of(f"{{{key}: {value}}}") for key in ("method", "anti_method") for value in (number, name)}
    assert found == {section_of(f"{{method: {name}}}")}
    assert resolved_yaml(recipe_of(f"{{anti_method: {number}}}")) == resolved_yaml(recipe_of(f"{{method: {name}}}"))
    for key in ("method", "anti_method"):
        section = recipe_of("{}", f"smooth.{key}={number}").smooth if key == "method" else None
        section = section or load_recipe(yaml.safe_load(BASE), [f"smooth.{key}={number}"]).smooth
        assert section is not None
        assert section.method == name


def test_older_names_of_excluded_linears() -> None:
    assert section_of("{disable_anti_names: ['*.o_proj']}") == section_of("{exclude: ['*.o_proj']}")


@pytest.mark.parametrize(
    ("smooth", "alpha", "beta"),
    [
        ("{method: m1}", 0.5, None),
        ("{method: m1, alpha: 0.8}", 0.8, None),
        ("{method: m4}", 0.9, None),
        ("{method: m4, alpha: 0}", 0, None),
        ("{method: m6}", None, None),
        ("{method: m6, alpha: 0.7, beta: 0.3}", 0.7, 0.3),
        ("{method: m3}", None, None),
        ("{}", None, None),
        ("{method: rotate}", None, None),
    ],
)
def test_exponents_and_their_defaults(smooth: str, alpha: float | None, beta: float | None) -> None:
    section = section_of(smooth)
    assert (section.alpha, section.beta) == (alpha, beta)


def test_rotation_is_off_unless_asked_for() -> None:
    assert section_of("{method: m4}").rotation is None
    for smooth in ("{method: rotate}", "{method: rotate, rotation: null}", "{method: m4, rotation: {}}"):
        rotation = section_of(smooth).rotation
        assert rotation is not None
        assert (rotation.seed, rotation.hidden, rotation.heads) == (0, True, True)
    heads = section_of("{method: rotate, rotation: {seed: 3, hidden: false}}").rotation
    assert heads is not None
    assert (heads.seed, heads.hidden, heads.heads) == (3, False, True)


def test_rotation_alone_needs_no_calibration() -> None:
    rotated = recipe_of("{method: rotate}", "calibration=null", "quantize.activations.scope=token")
    assert rotated.smooth is not None
    assert not rotated.smooth.scales
    assert recipe_of("{}").smooth.scales  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "weights", "activations", "by_default"),
    [
        ("awq", {"bits": 4}, {}, True),
        ("awq", {"bits": 3, "granularity": "group"}, {}, True),
        ("awq", {"bits": 8}, {}, False),
        ("awq", {"bits": 8}, {"bits": 8}, False),
        ("auto", {"bits": 4}, {}, True),
        ("auto", {"bits": 8}, {"bits": 8}, False),
        ("auto", {"bits": 8}, {}, False),
        ("iterative", {"bits": 4}, {}, False),
    ],
)
def test_the_clip_is_searched_where_few_bits_of_weights_are_all_there_is(
    method: str, weights: dict[str, Any], activations: dict[str, Any], by_default: bool
) -> None:
    content = yaml.safe_load(BASE) | {"quantize": {"weights": weights, "activations": activations}}
    recipe = load_recipe(content | {"smooth": {"method": method}})
    assert recipe.smooth is not None
    assert recipe.smooth.clips(recipe.quantize.weights, recipe.quantize.activations) == by_default
    for said in (True, False) if method in ("awq", "auto") else ():
        section = load_recipe(content | {"smooth": {"method": method, "clip": said}}).smooth
        assert section is not None
        assert section.clips(recipe.quantize.weights, recipe.quantize.activations) == said


@pytest.mark.parametrize(
    ("smooth", "start", "part"),
    [
        ("method: m7", "smooth.method: is 'm7'", "smoothquant, outlier_suppression, awq, iterative"),
        ("method: smooth_quant", "smooth.method: is 'smooth_quant'", "Did you mean smoothquant?"),
        ("anti_method: m0", "smooth.method: is 'm0'", "Allowed: auto"),
        ("method: 4", "smooth.method: is 4", "Allowed: auto"),
        ("alpha: 0.5", "smooth.alpha: has no effect on method auto", "smoothquant, iterative or flex"),
        ("{method: m3, alpha: 0.5}", "smooth.alpha: has no effect on method awq", "Remove it"),
        ("{method: m4, alpha: 1.5}", "smooth.alpha: is 1.5", "at most 1"),
        ("{method: m4, alpha: -0.1}", "smooth.alpha: is -0.1", "at least 0"),
        ("{method: m4, beta: 0.1}", "smooth.beta: has no effect on method iterative", "method: flex"),
        ("{method: m4, clip: true}", "smooth.clip: has no effect on method iterative", "method: awq or auto"),
        ("{method: m4, folds: []}", "smooth.folds: is empty", "remove the key"),
        ("{method: m4, folds: [norm, norm]}", "smooth.folds: names a kind twice", "once"),
        ("{method: m4, folds: [norms]}", "smooth.folds[0]: is 'norms'", "Did you mean norm?"),
        ("{exclude: ['re:(']}", "smooth.exclude[0]: 're:('", "Mend"),
        ("{exclude: '*.q'}", "smooth.exclude: is '*.q'", "a list"),
        ("{samples: 0}", "smooth.samples: is 0", "more than 0"),
        ("{search_samples: 0}", "smooth.search_samples: is 0", "more than 0"),
        ("{search_tokens: 0}", "smooth.search_tokens: is 0", "more than 0"),
        ("{rotation: {hidden: false, heads: false}}", "smooth.rotation: rotates nothing", "rotation: null"),
        ("{rotation: {seed: -1}}", "smooth.rotation.seed: is -1", "at least 0"),
        ("{rotation: true}", "smooth.rotation: is true", "a section of keys"),
        ("{method: rotate, alpha: 0.5}", "smooth.alpha: has no effect on method rotate", "Remove it"),
        ("{method: rotate, beta: 0.5}", "smooth.beta: has no effect on method rotate", "Remove it"),
        ("{method: rotate, shift: true}", "smooth.shift: has no effect on method rotate", "Remove it"),
        ("{method: rotate, clip: false}", "smooth.clip: has no effect on method rotate", "Remove it"),
        ("{method: rotate, folds: [norm]}", "smooth.folds: has no effect on method rotate", "Remove it"),
        ("{method: rotate, exclude: [a]}", "smooth.exclude: has no effect on method rotate", "Remove it"),
        ("{method: rotate, search_tokens: 9}", "smooth.search_tokens: has no effect on method rotate", "Remove it"),
        ("{methods: m1}", "smooth.methods: unknown key", "Did you mean method?"),
        ("{flex_config: {}}", "smooth.flex_config: unknown key", "Keys of smooth: method, alpha, beta"),
    ],
)
def test_refusals(tmp_path: Path, smooth: str, start: str, part: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(BASE + f"smooth: {smooth if smooth.startswith('{') else '{' + smooth + '}'}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:6: {start}")
    assert part in message.removeprefix(f"{file}:6: {start}")


@pytest.mark.parametrize("method", ["auto", *NUMBERED.values()])
def test_scales_need_calibration(tmp_path: Path, method: str) -> None:
    file = tmp_path / "r.yaml"
    text = BASE.replace("calibration: {}\n", "").replace("8}", "8, scope: token}")
    file.write_text(text + f"smooth:\n  method: {method}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == (
        f"{file}:6: smooth.method: {method} needs calibration. Add a section calibration: {{}} or set method: rotate."
    )
    load_recipe(file, ["calibration={}"])


@pytest.mark.parametrize("method", ["auto", "rotate"])
def test_smoothing_is_for_linears_that_are_quantized(tmp_path: Path, method: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(BASE.replace("  activations: {bits: 8}", "  weights: {bits: 16}\n  kv_cache: {}"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [f"smooth.method={method}"])
    assert "smooth: is for linears that are quantized, and none is. Remove the section." in str(caught.value)
    load_recipe(file, [f"smooth.method={method}", "quantize.overrides=[{match: a, scheme: W8A16}]"])


@pytest.mark.parametrize(
    ("smooth", "line"),
    [
        ("{}", "auto"),
        ("{method: m4}", "iterative (alpha 0.9)"),
        ("{method: m6}", "flex (alpha and beta searched)"),
        ("{method: m6, alpha: 0.7}", "flex (alpha 0.7, beta searched)"),
        ("{method: m6, alpha: 0.7, beta: 0.25, shift: true}", "flex (alpha 0.7, beta 0.25, with shift)"),
        ("{method: m2, folds: [norm, mlp]}", "outlier_suppression; folds through norm, mlp"),
        ("{method: rotate}", "rotation of the residual stream and the heads of the values"),
        ("{method: m3, rotation: {hidden: false}, exclude: ['*.0.*']}",
         "rotation of the heads of the values; awq; not *.0.*"),
    ],
)  # fmt: skip
def test_the_line_of_the_plan(smooth: str, line: str) -> None:
    assert section_of(smooth).described() == line


@pytest.mark.parametrize("smooth", ["{}", "{method: m6, exclude: [a, 're:b.*'], folds: [norm]}", "{method: rotate}"])
def test_the_resolved_section_reads_back(tmp_path: Path, smooth: str) -> None:
    recipe = recipe_of(smooth, "model.cache_memory=1.5GiB")
    (tmp_path / "r.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize("old", ["auto", "rotate", *NUMBERED.values()])
@pytest.mark.parametrize("new", ["auto", "rotate", *NUMBERED.values()])
def test_another_method_set_over_a_stored_recipe_takes_its_own_defaults(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "r.yaml").write_text(resolved_yaml(recipe_of(f"{{method: {old}}}")))
    assert load_recipe(tmp_path / "r.yaml", [f"smooth.method={new}"]) == recipe_of(f"{{method: {new}}}")


def test_what_was_given_is_stored(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(resolved_yaml(recipe_of("{method: m4, alpha: 0.7, rotation: {}}")))
    found = load_recipe(tmp_path / "r.yaml", ["smooth.method=m1"]).smooth
    assert found is not None
    assert found.alpha == 0.7
    assert found.rotation is not None
    with pytest.raises(RecipeError, match="alpha: has no effect on method awq"):
        load_recipe(tmp_path / "r.yaml", ["smooth.method=awq"])


def test_the_schema_for_editors_knows_both_names_of_a_method() -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())

    def wrong(**smooth: object) -> bool:
        return any(True for _ in validator.iter_errors({"quantize": {}, "smooth": smooth}))

    assert not wrong()
    for key, value in itertools.product(("method", "anti_method"), [*NUMBERED, *NUMBERED.values(), "auto", "rotate"]):
        assert not wrong(**{key: value})
        assert wrong(**{key: f"{value}x"})
    assert wrong(folds=["norms"])
    assert wrong(anti_methods="m1")


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        ("1GiB", 1 << 30, "1GiB"),
        ("500 MB", 500_000_000, "500MB"),
        ("1.5gib", 3 << 29, "1536MiB"),
        ("0B", 0, "0B"),
        ("1024", None, ""),
        ("GiB", None, ""),
        ("1 G", None, ""),
        ("1e9B", None, ""),
        ("nanB", None, ""),
    ],
)
def test_sizes_have_units_and_read_back(text: str, size: int | None, shown: str) -> None:
    if size is None:
        with pytest.raises(Exception, match="is no size"):
            size_of(text)
        return
    assert size_of(text) == size
    assert as_size(size) == shown
    assert size_of(shown) == size


@pytest.mark.parametrize("size", [1, 1000, 1023, 1024, 999_999, 10**12, 1 << 40, 3 * 10**9, 7 * (1 << 20)])
def test_every_size_is_written_exactly(size: int) -> None:
    assert size_of(as_size(size)) == size
