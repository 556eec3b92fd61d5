"""YAML with line numbers, overrides, paths, and the way back to YAML."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quantcli.errors import ModelError, RecipeError
from quantcli.pipeline.source import locate_model
from quantcli.recipe import load_recipe, resolved_yaml
from quantcli.recipe.aliases import ALIASES
from quantcli.recipe.document import dump_yaml, parse_yaml
from quantcli.recipe.explain import known_keys

MINIMAL = "model: {path: org/name}\nquantize: {}\noutput: out\n"


def write(directory: Path, text: str | bytes) -> Path:
    file = directory / "r.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def refused(directory: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(directory, text), overrides)
    return str(caught.value).replace(f"{directory}/", "")


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (MINIMAL + "output: again\n", "r.yaml:4: output: is there twice, first on line 3."),
        ("quantize:\n  weights:\n    bits: 4\n    bits: 8\n", "r.yaml:4: quantize.weights.bits: is there twice"),
        (MINIMAL + "1: x\n", "r.yaml:4: '1' is no key"),
        (MINIMAL + "? [a]\n: x\n", "r.yaml:4: a list or section is no key"),
        (MINIMAL + "on: x\n", "r.yaml:4: on: unknown key"),
        ("# nothing\n", "r.yaml:1: holds null"),
        ("\n\n- a\n", "r.yaml:3: holds a list"),
        ("just text", "r.yaml:1: holds 'just text'"),
        ("model: {path: x\n", "r.yaml:2: no valid YAML"),
        ("model:\n\tpath: x\n", "r.yaml:2: no valid YAML"),
        (MINIMAL + "---\na: 1\n", "r.yaml:4: no valid YAML"),
        (b"model: x\nout\xff: 1\n", "r.yaml:2: is not UTF-8"),
        (b"model: x\noutput: \x01\n", "r.yaml:2: holds a character"),
        ("a: &a 1\nb:\n  <<: *a\n", "r.yaml:3: b: merge keys"),
        ("quantize: !!python/object/apply:os.system [ls]\n", "r.yaml:1: quantize: has the YAML tag"),
        ("quantize:\n  x: !!binary aGk=\n", "r.yaml:2: quantize.x: has the YAML tag"),
        ("a: &a [*a]\n", "r.yaml:1: unfolds to too many values"),
        ("a: " + "[" * 700, "r.yaml:1: "),
        (" " * (1 << 20) + "a: 1", "r.yaml: is larger than 1 MiB"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_at_its_line(tmp_path: Path, text: str | bytes, start: str) -> None:
    assert refused(tmp_path, text).startswith(start)


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))
    began = time.monotonic()
    assert "unfolds to too many values" in refused(tmp_path, f"a0: &a0 [x, x]\n{levels}\n")
    assert time.monotonic() - began < 2


def test_aliases_that_unfold_to_little_are_read(tmp_path: Path) -> None:
    names = 'quantize: {rollback: {names: [&n "*.o_proj", *n]}}\nmodel: {path: a/b}\noutput: o\n'
    assert load_recipe(write(tmp_path, names)).quantize.rollback.names == ("*.o_proj", "*.o_proj")


def test_only_true_and_false_are_booleans_and_numbers_are_what_they_look_like() -> None:
    text = "[off, on, yes, No, y, true, FALSE, 1e-3, 1.5, .5, 010, 1:30, 0x1f, 1_000, 2024-01-01, ~, 2%, -3, =, '1']"
    values, _ = parse_yaml(text, str)
    assert values == [
        *("off", "on", "yes", "No", "y", True, False, 0.001, 1.5, 0.5),
        *("010", "1:30", "0x1f", "1_000", "2024-01-01", None, "2%", -3, "=", "1"),
    ]


def test_sanity_check_off_needs_no_quotes(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/name", "org/name, sanity_check: off")
    assert load_recipe(write(tmp_path, text)).model.sanity_check == "off"


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**62), 2**62)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text().filter(lambda k: k != "<<"), inner, max_size=4)
        ),
        max_leaves=20,
    )
)
def test_dumped_yaml_reads_back_equal(value: Any) -> None:
    data = {"value": value}
    read, _ = parse_yaml(dump_yaml(data), str)
    assert read == data
    assert repr(read) == repr(data)  # 1 == 1.0 == True, but their texts differ


# --- Unknown keys, anywhere -------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "version": 1,
    "model": {"path": "org/name", "dtype": "auto"},
    "calibration": {"samples": 8, "mix": [{"share": 2.0}]},
    "smooth": {"method": "iterative", "rotation": {"seed": 1}},
    "quantize": {
        "weights": {"bits": 8},
        "activations": {"bits": 8},
        "rollback": {"names": ["a", "b"], "target": {"size": 1.5}},
        "overrides": [{"match": "c", "scheme": "float"}],
        "gptq": {"sweeps": 2},
        "signround": {"iterations": 20},
        "distill": {"passes": 2},
        "kv_cache": {"bits": 8},
    },
    "export": {"formats": ["compressed-tensors"]},
    "evaluate": {
        "perplexity": {"windows": 2},
        "tasks": [{"task": "boolq"}],
        "output_error": {"tokens": 64},
        "generate": {"max_new_tokens": 3},
        "throughput": {"batch": 2},
        "gates": {"kl_divergence": 1.0, "fallbacks": {"all": 0}},
    },
    "output": "out",
}


def with_section(keys: tuple[str, ...]) -> dict[str, Any]:
    """BASE with the section: attention and kv_cache exclude each other, and so do the two targets."""
    if keys[:2] == ("quantize", "target"):
        grid = {"bits": 8, "symmetric": True, "granularity": "group", "group_size": 32}
        mixed = {"activations": {"bits": 16}, "rollback": {"names": ["a"]}}
        target = {"size": 1.5, "candidates": [grid, {"bits": 4}]}
        return BASE | {"quantize": BASE["quantize"] | mixed | {"target": target}}
    if keys != ("quantize", "attention"):
        return BASE
    quantize = {name: value for name, value in BASE["quantize"].items() if name != "kv_cache"}
    return BASE | {"quantize": quantize | {"attention": {"bits": 8}}}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    section=st.sampled_from(sorted(known_keys(), key=str)),
    key=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=15),
    before=st.integers(0, 6),
    comments=st.integers(0, 3),
)
def test_an_unknown_key_is_refused_at_its_line_wherever_it_stands(
    tmp_path: Path, section: tuple[str, ...], key: str, before: int, comments: int
) -> None:
    key = f"{key}_" if key in known_keys()[section] else key

    def render(node: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
        entries = list(node.items())
        if keys == section:
            entries.insert(min(before, len(entries)), (key, "MARK"))
        lines = []
        for name, value in entries:
            indent = "  " * len(keys)
            if value == "MARK":
                lines += ["# a comment"] * comments + [f'{indent}"{name}": MARK']
            elif isinstance(value, dict):
                lines += [f"{indent}{name}:", *render(value, (*keys, name))]
            elif isinstance(value, list) and isinstance(value[0], dict):
                lines += [f"{indent}{name}:", f"{indent}-", *render(value[0], (*keys, name))]
            else:
                lines.append(f"{indent}{name}: {value}")
        return lines

    lines = render(with_section(section), ())
    line = next(number for number, text in enumerate(lines, 1) if text.endswith("MARK"))
    message = refused(tmp_path, "\n".join(lines))
    place = (
        ".".join((*section, key))
        .replace("mix.", "mix[0].")
        .replace("overrides.", "overrides[0].")
        .replace("candidates.", "candidates[0].")
        .replace("tasks.", "tasks[0].")
    )
    assert message.startswith(f"r.yaml:{line}: {place}: unknown key. ")
    assert message.count("\n") == 0


# --- Resolved recipes -------------------------------------------------------------------------------------------------

_texts = st.text(min_size=1, max_size=12)
_lengths = st.integers(2, 2**31 - 1)
_counts = st.integers(1, 2**31 - 1)


def _optional(keys: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


def _source(more: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    builtin = _optional({"dataset": st.just("builtin"), **more})
    local = st.fixed_dictionaries(
        {"dataset": st.sampled_from(["jsonl", "parquet"]), "path": _texts},
        optional={"field": st.none() | _texts, **more},
    )
    hub = st.fixed_dictionaries({"dataset": st.just("org/set"), "split": _texts}, optional={"field": _texts, **more})
    return builtin | local | hub


_model = st.fixed_dictionaries(
    {"path": st.sampled_from(["org/name", "./dir", "x.gguf", "~/m", "/abs/./m"])},
    optional={
        "dtype": st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "npu:0"]),
        "trust_remote_code": st.booleans(),
        "sanity_check": st.sampled_from(["stop", "warn", "off"]),
    },
) | st.fixed_dictionaries(
    {"path": st.just("org/name"), "revision": _texts | st.sampled_from(["1e5", "off", "0123", "null"])}
)
_percent = st.floats(0, 0.999) | st.integers(0, 10**6).map(lambda n: f"{n / 100}%")
_samples = {
    "samples": _counts,
    "sequence_length": _lengths,
    "packing": st.sampled_from(["auto", "packed", "line"]),
    "seed": st.integers(0, 2**63 - 1),
    "drop_outliers": st.floats(0, 0.999) | st.integers(0, 9999).map(lambda n: f"{n / 100}%"),
}
_mix = st.lists(
    _source({"share": st.floats(0, exclude_min=True, allow_infinity=False)}),
    max_size=3,
    unique_by=lambda source: str({"path": None, "field": None, "dataset": "builtin"} | source | {"share": 0}),
)
_calibration = _source(_samples) | _optional({"mix": _mix, **_samples})
_weight_only = _optional(
    {"bits": st.sampled_from([8, 4, 3, 2]), "symmetric": st.booleans(), "method": st.sampled_from(["minmax", "mse"])}
) | st.fixed_dictionaries(
    {"granularity": st.just("group"), "method": st.just("mse")},
    optional={"group_size": st.none() | _counts, "importance": st.sampled_from(["auto", "none", "second_moment"])},
)
_sparse = st.fixed_dictionaries(
    {"method": st.sampled_from(["co_sparse", "low_bit"])}, optional={"fraction": st.floats(0.01, 0.1)}
) | st.fixed_dictionaries({"method": st.just("low_bit_sigma")}, optional={"sigma_factor": st.floats(3, 4)})
_static = st.fixed_dictionaries(
    {"bits": st.just(8)},
    optional={
        "scope": st.sampled_from(["tensor", "mix"]),
        "symmetric": st.booleans(),
    },
)
_percentile = st.fixed_dictionaries(
    {"method": st.just("percentile")}, optional={"percentile": st.floats(50, 100, exclude_min=True)}
)
_activations = (
    st.sampled_from([{"bits": bits, "scope": "token"} for bits in (8, 4)])
    | st.builds(dict.__or__, _static, st.fixed_dictionaries({"aggregation": st.sampled_from(["max", "mean"])}))
    | st.builds(dict.__or__, _static, _percentile)
    | st.builds(
        dict.__or__,
        _static,
        st.fixed_dictionaries(
            {"propagation": st.just("quantized")},
            optional={"method": st.sampled_from(["histogram", "mse"]), "quantized_share": st.floats(-1, 1)},
        ),
    )
)
_names = st.lists(_texts.filter(lambda name: not name.startswith("re:")) | st.just("re:.*[0-3].*"), max_size=3)
_rollback = st.fixed_dictionaries(
    {"names": _names},
    optional={
        "metric": st.sampled_from([None, "range_parm", "kurtosis", "quantile", "output_error", "kl_divergence"]),
        "to": st.sampled_from(["float", "W8A16", "W8A8-dynamic", "W8A8-mix", "W4A16", "W4A8", "W4A4"]),
        "last_linear": st.none() | st.booleans(),
        "siblings": st.sampled_from(["together", "apart"]),
    },
)
_bounds = (
    st.fixed_dictionaries({"perplexity_increase": st.floats(0, 0.999) | st.just("1.5%")})
    | st.fixed_dictionaries({"kl_divergence": st.floats(1e-9, 10)})
    | st.fixed_dictionaries({"size": st.floats(1e-3, 1e3)})
)
_targets = st.builds(dict.__or__, _bounds, _optional({"windows": _counts, "evaluations": st.integers(2, 2**31 - 1)}))
_ranked = st.builds(dict.__or__, _rollback, st.fixed_dictionaries({"level": st.sampled_from([0, 5, "L0", "L12"])})) | (
    st.builds(dict.__or__, _rollback, st.fixed_dictionaries({"target": _targets}))
)
_overrides = st.lists(
    st.fixed_dictionaries(
        {"match": _texts.filter(lambda name: not name.startswith("re:"))},
        optional={"weights": st.just({"granularity": "tensor"})},
    ).flatmap(
        lambda item: (
            st.sampled_from(["W8A16", "W8A8", "W8A8-mix"]).map(lambda name: {**item, "scheme": name})
            | st.just({"match": item["match"], "scheme": "float"})
            | st.just(
                {"match": item["match"], "activations": {"bits": 8}, "weights": {"bits": 8, "granularity": "channel"}}
            )
        )
    ),
    max_size=2,
)
_inside = st.fixed_dictionaries(
    {"kv_cache": st.sampled_from([None, {}, {"symmetric": False, "observe": "projection"}, {"type": "float"}])}
) | st.fixed_dictionaries({"attention": st.sampled_from([None, {}, {"coverage": 0.99}])})
_quantize = st.builds(
    dict.__or__,
    st.fixed_dictionaries({}, optional={"weights": _weight_only, "rollback": _rollback})
    | st.fixed_dictionaries(
        {"activations": _activations},
        optional={"weights": st.just({"granularity": "tensor"}), "rollback": _ranked, "overrides": _overrides},
    )
    | st.fixed_dictionaries({"activations": _static, "weights": _sparse}),
    _inside,
)
_evaluate = st.fixed_dictionaries(
    {
        "perplexity": _source(
            {
                "windows": st.none() | _counts,
                "protocol": st.sampled_from(["standard", "golden-stick", "lm-eval"]),
                "phase": st.sampled_from(["prefill", "decode"]),
            }
        )
    },
    optional={
        "gates": _optional({"perplexity_increase": _percent | st.none(), "kl_divergence": st.floats(0, 1e6)}).filter(
            bool
        )
    },
)
_rotation = st.none() | _optional({"seed": st.integers(0, 2**63 - 1), "hidden": st.booleans()})
_any_method = {
    "folds": st.none() | st.lists(st.sampled_from(["norm", "attention", "mlp"]), min_size=1, unique=True),
    "exclude": _names,
    "shift": st.booleans(),
    "rotation": _rotation,
    "samples": st.none() | _counts,
    "search_samples": _counts,
    "save_model": st.booleans(),
}
_exponent = st.none() | st.floats(0, 1)
_smooth = (
    st.fixed_dictionaries({"method": st.sampled_from(["m2", "cbq"])}, optional=_any_method)
    | st.fixed_dictionaries(
        {"anti_method": st.sampled_from(["m1", "iterative"])}, optional=_any_method | {"alpha": _exponent}
    )
    | st.fixed_dictionaries({"method": st.just("flex")}, optional={"alpha": _exponent, "beta": _exponent})
    | st.fixed_dictionaries(
        {"method": st.sampled_from(["auto", "awq"])}, optional=_any_method | {"clip": st.none() | st.booleans()}
    )
    | st.fixed_dictionaries({"method": st.just("rotate")}, optional={"rotation": _rotation})
)
_recipes = st.fixed_dictionaries(
    {"model": _model, "calibration": _calibration, "quantize": _quantize, "evaluate": _evaluate, "output": _texts},
    optional={"version": st.just(1), "smooth": st.none() | _smooth, "export": st.just({})},
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(source=_recipes)
@example(source={"model": {"path": "a/b"}, "quantize": {}, "output": "o"})
def test_a_resolved_recipe_loads_back_equal_and_resolves_to_itself(tmp_path: Path, source: dict[str, Any]) -> None:
    recipe = load_recipe(source)
    text = resolved_yaml(recipe)
    again = load_recipe(write(tmp_path, text))
    assert again == recipe
    assert resolved_yaml(again) == text
    assert load_recipe(recipe.model_dump()) == recipe
    if not any(character in text for character in "\x85\u2028\u2029"):
        # YAML 1.1 readers see the same texts, numbers and truth values: what they would misread is quoted.
        assert yaml.safe_load(text) == recipe.model_dump(mode="json")


@pytest.mark.parametrize(
    ("engines", "cache", "said", "expected"),
    [
        (["vllm-cpu"], {"type": "float"}, {}, "vllm-cpu"),
        (["vllm-cpu"], {"type": "float"}, {"arithmetic": "engine"}, "engine"),
        (["vllm-cpu"], {"type": "int"}, {}, "engine"),
        (["vllm-cpu"], None, {}, "engine"),
        (["vllm-cpu", "vllm-gpu"], {"type": "float"}, {}, "engine"),
        ([], {"type": "float"}, {}, "engine"),
    ],
)
def test_an_fp8_cache_is_rounded_as_the_one_engine_does_that_is_named(
    engines: list[str], cache: dict[str, Any] | None, said: dict[str, Any], expected: str
) -> None:
    source = {
        "model": {"path": "m"}, "output": "o", "calibration": {}, "quantize": {"kv_cache": cache},
        "export": {"engines": engines}, "evaluate": {"perplexity": {"windows": 3, **said}},
    }  # fmt: skip
    recipe = load_recipe(source)
    assert recipe.evaluate is not None
    assert recipe.evaluate.perplexity is not None
    assert (recipe.evaluate.perplexity.arithmetic, recipe.evaluate.perplexity.windows) == (expected, 3)
    assert load_recipe(recipe.model_dump()) == recipe


def test_a_resolved_recipe_shows_every_key() -> None:
    def keys_of(node: dict[str, Any], keys: tuple[str, ...]) -> dict[tuple[str, ...], set[str]]:
        found = {keys: set(node)}
        for name, value in node.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value = value[0]
            if isinstance(value, dict):
                found |= keys_of(value, (*keys, name))
        return found

    found = {}
    for section in ((), ("quantize", "attention"), ("quantize", "target")):
        found |= keys_of(yaml.safe_load(resolved_yaml(load_recipe(with_section(section)))), ())
    expected = {keys: {name for name in names if (*keys, name) not in ALIASES} for keys, names in known_keys().items()}
    assert found == expected


# --- Overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_that_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, dump_yaml(BASE))
    recipe = load_recipe(
        file,
        [
            "calibration.samples=3",
            "quantize.rollback.disable_names=['*.x']",
            "quantize.activations=null",
            "quantize.weights={bits: 4, granularity: group}",
            "evaluate.gates=null",
            "evaluate.perplexity.windows=null",
            "model.sanity_check=off",
        ],
        model="a/b",
        output="/o",
        device="cuda:1",
    )
    assert recipe.calibration is not None
    assert recipe.calibration.samples == 3
    assert recipe.quantize.rollback.names == ("*.x",)
    assert recipe.quantize.activations.bits == 16
    assert (recipe.quantize.weights.bits, recipe.quantize.weights.group_size) == (4, 128)
    assert recipe.evaluate is not None
    assert recipe.evaluate.gates is None
    assert recipe.evaluate.perplexity is not None
    assert recipe.evaluate.perplexity.windows is None
    assert (recipe.model.path, recipe.model.device, recipe.model.sanity_check) == ("a/b", "cuda:1", "off")
    assert recipe.output == "/o"
    assert load_recipe(file, ["evaluate=null"]).evaluate is None
    assert load_recipe(file, ["evaluate=null", "export=null"]).export is None
    assert load_recipe(file, ["evaluate=null", "export=null", "export.formats=[compressed-tensors]"]).export is not None


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("quantize.weight.bits=4", "--set quantize.weight.bits=4: quantize.weight: unknown key. Did you mean weights?"),
        (
            "quantize.weights.bit=4",
            "--set quantize.weights.bit=4: quantize.weights.bit: unknown key. Did you mean bits?",
        ),
        ("prune.share=1", "--set prune.share=1: prune: unknown key."),
        ("smooth.beta=1", "--set smooth.beta=1: smooth.beta: has no effect on method iterative."),
        ("quantize.weights.bits=4", "r.yaml:16: quantize.activations.bits: 8-bit activations of static scales need"),
        ("quantize.weights.bits=5", "--set quantize.weights.bits=5: quantize.weights.bits: is 5."),
        ("quantize.weights={bits: 5}", "--set quantize.weights={bits: 5}: quantize.weights.bits: is 5."),
        ("version.x=1", "--set version.x=1: version is no section."),
        ("calibration=null", "r.yaml:16: quantize.activations.scope: static scales need calibration."),
        ("evaluate", "--set evaluate: is no KEY=VALUE."),
        ("=3", "--set =3: is no KEY=VALUE."),
        ("a..b=3", "--set a..b=3: is no KEY=VALUE."),
        ("output=[", "--set output=[: no valid YAML"),
        ("output={a: 1, a: 2}", "--set output={a: 1, a: 2}: a: is there twice"),
        ("output=null", "--set output=null: output: is null."),
        ("quantize=null", "--set quantize=null: quantize: is missing."),
        (
            "quantize.overrides.0.match=x",
            "--set quantize.overrides.0.match=x: items of a list are no keys. "
            "Set the whole list: quantize.overrides=[…].",
        ),
        ("export.formats.x=a", "--set export.formats.x=a: items of a list are no keys."),
    ],
)
def test_a_wrong_override_is_refused_by_its_name(tmp_path: Path, override: str, start: str) -> None:
    text = dump_yaml(BASE).replace("  activations:\n    bits: 8", "  activations: {bits: 8}")
    assert refused(tmp_path, text, override).startswith(start)


# --- Paths ------------------------------------------------------------------------------------------------------------

PATHS = """\
model: {path: MODEL}
calibration: {dataset: text, path: cal.txt}
quantize: {}
evaluate: {perplexity: {dataset: text, path: ../eval.txt}}
output: out
"""


def paths(recipe: Any) -> tuple[str, str, str, str]:
    return recipe.model.path, recipe.calibration.path, recipe.evaluate.perplexity.path, recipe.output


def test_paths_of_a_file_start_at_the_file_and_those_of_options_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "recipes", tmp_path / "here"
    for directory in (home / "org" / "name", here):
        directory.mkdir(parents=True)
    monkeypatch.chdir(here)
    file = write(home, PATHS.replace("MODEL", "./m"))
    of_file = (str(home / "m"), str(home / "cal.txt"), str(tmp_path / "eval.txt"), str(home / "out"))
    assert paths(load_recipe(file)) == of_file
    assert paths(load_recipe("../recipes/r.yaml")) == of_file
    overrides = ["calibration.path=c", "evaluate={perplexity: {dataset: text, path: ./e}}"]
    of_options = tuple(str(here / name) for name in ("x.gguf", "c", "e", "o"))
    assert paths(load_recipe(file, overrides, model="x.gguf", output="o")) == of_options
    mapping = yaml.safe_load(PATHS) | {"model": {"path": Path("x.gguf")}}
    assert paths(load_recipe(mapping)) == (
        *(str(here / name) for name in ("x.gguf", "cal.txt")),
        *(str(tmp_path / "eval.txt"), str(here / "out")),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", "{home}/org/name"),
        ("org/other", "org/other"),
        ("gpt2", "gpt2"),
        ("./org/other", "{home}/org/other"),
        ("../m", "{root}/m"),
        ("m.gguf", "{home}/m.gguf"),
        ("runs/a/export", "{home}/runs/a/export"),
        ("/abs/m", "/abs/m"),
        ("~/m", "{user}/m"),
        ("$HOME/m", "$HOME/m"),
    ],
)
def test_a_model_is_a_path_where_it_exists_or_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    home = tmp_path / "recipes"
    (home / "org" / "name").mkdir(parents=True)
    file = write(home, PATHS.replace("MODEL", text))
    assert load_recipe(file).model.path == expected.format(home=home, root=tmp_path, user=tmp_path / "user")


def test_a_name_on_the_hub_is_not_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a recipe in another directory is relative to that, wherever the command is typed."""
    (tmp_path / "here" / "org" / "name").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    file = write(tmp_path / "recipes", PATHS.replace("MODEL", "org/name"))
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError, match="There is no directory org/name"):
        locate_model(load_recipe(file).model)


def test_paths_of_a_mix_start_where_those_of_other_sections_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "recipes", tmp_path / "here"
    for directory in (home, here):
        directory.mkdir()
    monkeypatch.chdir(here)
    mix = "{mix: [{dataset: text, path: a.txt}, {dataset: builtin}, {dataset: boolq, path: ../b}]}"
    file = write(home, PATHS.replace("MODEL", "a/b").replace("{dataset: text, path: cal.txt}", mix))

    def found(*overrides: str) -> list[str | None]:
        recipe = load_recipe(file, overrides)
        assert recipe.calibration is not None
        return [source.path for source in recipe.calibration.mix]

    assert found() == [str(home / "a.txt"), None, str(tmp_path / "b")]
    assert found("calibration.mix=[{dataset: jsonl, path: c}]") == [str(here / "c")]
    assert found("calibration.mix=[]") == []


def test_a_parent_of_a_link_is_that_of_its_target(tmp_path: Path) -> None:
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "far" / "cal.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    text = PATHS.replace("MODEL", "a/b").replace("cal.txt", "link/../cal.txt")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.calibration is not None
    assert recipe.calibration.path == str(tmp_path / "far" / "cal.txt")


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_sources_that_are_neither_file_nor_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w8a16").mkdir()  # a directory of that name hides no shipped recipe
    assert load_recipe("w8a16", model="a/b", output="o").output == str(tmp_path / "o")
    with pytest.raises(RecipeError, match=r"neither a file nor a shipped recipe\. Did you mean w8a8-dynamic"):
        load_recipe("w8a8-dynamc")
    with pytest.raises(RecipeError, match="Shipped recipes: demo, w4a16"):
        load_recipe("zzz")
    with pytest.raises(RecipeError, match=r"nope\.yaml: no such recipe file"):
        load_recipe("nope.yaml")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "w8a16")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL)
    file.chmod(0)
    with pytest.raises(RecipeError, match=r"r\.yaml: cannot be read"):
        load_recipe(file)


def test_mappings_are_copied_and_their_keys_are_text() -> None:
    source = {"model": {"path": "a/b"}, "quantize": {"rollback": {"names": ("x",)}}, "output": Path("o")}
    assert load_recipe(source, ["quantize.rollback.names=[y]"]).quantize.rollback.names == ("y",)
    assert source["quantize"] == {"rollback": {"names": ("x",)}}
    with pytest.raises(RecipeError, match=r"^recipe: quantize\.3: 3 is no key"):
        load_recipe({"quantize": {3: 4}})
    with pytest.raises(RecipeError, match=r"^recipe: quantize\.weights\.bits: is 5"):
        load_recipe({"model": {"path": "a/b"}, "quantize": {"weights": {"bits": 5}}, "output": "o"})


def test_recipes_need_no_torch() -> None:
    code = "import sys, quantcli.recipe; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    root = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("recipe", "override", "unset"),
    [
        ("w4a16", "quantize.weights.granularity=channel", "quantize.weights.group_size=null"),
        ("w8a8", "quantize.activations.method=histogram", "quantize.activations.aggregation=max"),
        ("w4a16-awq", "smooth.method=rotate", "smooth.folds=null"),
    ],
)
def test_a_key_of_the_file_that_an_option_made_useless_is_taken_back_by_another(
    recipe: str, override: str, unset: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override], model="org/name", output="out")
    assert f"Remove it (--set {unset})" in caught.value.remedy
    taken_back = [override, unset]
    if recipe == "w4a16-awq":
        with pytest.raises(RecipeError, match=r"smooth\.search_tokens") as caught:
            load_recipe(recipe, taken_back, model="org/name", output="out")
        taken_back.append(caught.value.remedy.split("--set ")[1].split(")")[0])
    load_recipe(recipe, taken_back, model="org/name", output="out")


def test_a_key_in_a_file_alone_is_simply_removed(tmp_path: Path) -> None:
    text = MINIMAL.replace("quantize: {}", "quantize: {weights: {group_size: 64}}")
    assert refused(tmp_path, text).endswith("Remove it.")
    item = MINIMAL.replace("{}", "{overrides: [{match: a, weights: {group_size: 64}}]}")
    assert "--set" not in refused(tmp_path, item, "quantize.weights.bits=4")
