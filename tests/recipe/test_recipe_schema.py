"""Refusals of single keys and of combinations, each at its line; the JSON schema for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from quantcli.errors import RecipeError
from quantcli.recipe import json_schema, load_recipe, shipped_names, shipped_path
from quantcli.recipe.aliases import ALIASES
from quantcli.recipe.explain import known_keys
from quantcli.recipe.quantization import QuantizeSection, WeightsSection, named_scheme

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
        ([("model:", "model: ./m\nmodle:")], "r.yaml:2: model: is './m'", "as {path: ./m}."),
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
            "Keys of calibration.mix: dataset, path, field, split, subset, share.",
        ),
        (
            [("seed: 0", "mix:\n- share: 1\n- dataset: builtin")],
            "r.yaml:13: calibration.mix[1]: names the same text",
            "both shares",
        ),
        ([("bits: 8", "bits: 5")], "r.yaml:14: quantize.weights.bits: is 5", "8, 4, 3 or 2"),
        ([("bits: 8", "bits: 8.0")], "r.yaml:14: quantize.weights.bits: is 8.0", "whole number"),
        ([("method: minmax", "method: gtpq")], "r.yaml:17: quantize.weights.method: is 'gtpq'", "low_bit_sigma"),
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
            "r.yaml:20: quantize.activations.bits: 8-bit activations of static scales need 8-bit",
            "activations.scope: token",
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
        (
            [("bits: 8", "bits: 4"), ("scope: tensor", "scope: token")],
            "r.yaml:22: quantize.activations.symmetric: is false, and engines have zero points per token beside 8-bit",
            "weights.bits: 8",
        ),
        (
            [("granularity: channel", "granularity: group"), ("scope: tensor", "scope: token")],
            "r.yaml:22: quantize.activations.symmetric: is false, and engines have zero points per token beside 8-bit",
            "granularity: channel",
        ),
        ([("scope: tensor", "scope: channel")], "r.yaml:21: quantize.activations.scope:", "tensor, token or mix"),
        ([("names: []", "names: '*.q'")], "r.yaml:24: quantize.rollback.names: is '*.q'", "a list"),
        ([("names: []", "names:\n- a\n- 're:('")], "r.yaml:26: quantize.rollback.names[1]: 're:('", "Mend"),
        ([("names: []", "names: [*.down_proj]")], "r.yaml:24: no valid YAML", "needs quotes"),
        ([("names: []", "names: []\ndisable_names: []")], "r.yaml:25: quantize.rollback.disable_names:", "Keep one"),
        ([("evaluate:", "prune: {share: 1}\nevaluate:")], "r.yaml:27: prune: unknown key", "Keys of a recipe"),
        ([("device: auto", "cache_memory: 1")], "r.yaml:5: model.cache_memory: 1 is no size", "as 1GiB or 500MB"),
        ([("device: auto", "cache_memory: 1 gibi")], "r.yaml:5: model.cache_memory: '1 gibi' is no size", "1GiB"),
        ([("device: auto", "cache_memory: -1GiB")], "r.yaml:5: model.cache_memory: '-1GiB' is no size", "1GiB"),
        ([("evaluate:", "bits: 8\nevaluate:")], "r.yaml:27: bits: unknown key", "quantize.weights.bits"),
        ([("formats: [compressed-tensors]", "formats: awq")], "r.yaml:26: export.formats: is 'awq'", "as [awq]."),
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
        ([("gates:", "speed: true\ngates:")], "r.yaml:31: evaluate.speed: unknown key", "perplexity, tasks"),
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


QUANTIZE = """\
model: {path: org/name}
output: out
calibration: {}
evaluate: {perplexity: {}}
quantize:
"""
STATIC = "  activations: {bits: 8}\n"


@pytest.mark.parametrize(
    ("quantize", "start", "part"),
    [
        # weights
        ("  weights: {bits: 16}\n", "6: quantize.weights.bits: is 16, so nothing is quantized", "add kv_cache"),
        (
            "  weights:\n    method: low_bit\n    bits: 4\n" + STATIC,
            "7: quantize.weights.method: low_bit makes symmetric 8-bit codes",
            "bits: 8, symmetric: true, granularity: channel",
        ),
        (
            "  weights:\n    method: co_sparse\n    symmetric: false\n" + STATIC,
            "7: quantize.weights.method: co_sparse makes symmetric 8-bit codes",
            "symmetric: true",
        ),
        (
            "  weights:\n    method: low_bit_sigma\n    granularity: group\n" + STATIC,
            "7: quantize.weights.method: low_bit_sigma makes",
            "granularity: channel",
        ),
        (
            "  weights:\n    method: co_sparse\n",
            "7: quantize.weights.method: co_sparse is for static 8-bit activations",
            "activations: {bits: 8, scope: tensor}",
        ),
        (
            "  weights:\n    method: co_sparse\n  activations: {bits: 8, scope: token}\n",
            "7: quantize.weights.method: co_sparse is for static",
            "scope: tensor",
        ),
        (
            "  weights:\n    fraction: 0.05\n",
            "7: quantize.weights.fraction: has no effect on method minmax",
            "co_sparse or low_bit",
        ),
        (
            "  weights:\n    method: low_bit_sigma\n    fraction: 0.05\n" + STATIC,
            "8: quantize.weights.fraction: has no effect on method low_bit_sigma",
            "co_sparse or low_bit",
        ),
        (
            "  weights:\n    method: low_bit\n    sigma_factor: 4\n" + STATIC,
            "8: quantize.weights.sigma_factor: has no effect on method low_bit",
            "Set method: low_bit_sigma.",
        ),
        ("  weights:\n    fraction: 0.2\n", "7: quantize.weights.fraction: is 0.2", "at most 0.1"),
        ("  weights:\n    fraction: 0.001\n", "7: quantize.weights.fraction: is 0.001", "at least 0.01"),
        ("  weights:\n    sigma_factor: 2.5\n", "7: quantize.weights.sigma_factor: is 2.5", "at least 3"),
        # activations
        (
            STATIC.replace("}", ", quantized_share: 0.5}"),
            "6: quantize.activations.quantized_share: has no effect while the float model is observed",
            "propagation: quantized",
        ),
        (
            "  activations:\n    bits: 8\n    propagation: quantized\n    quantized_share: 1.5\n",
            "9: quantize.activations.quantized_share: is 1.5",
            "at most 1",
        ),
        (
            "  activations:\n    bits: 8\n    method: histogram\n    aggregation: mean\n",
            "9: quantize.activations.aggregation: has no effect on method histogram",
            "method: minmax",
        ),
        (
            "  activations:\n    bits: 8\n    percentile: 50\n",
            "8: quantize.activations.percentile: is 50",
            "more than 50",
        ),
        (
            "  activations:\n    bits: 8\n    method: histogramm\n",
            "8: quantize.activations.method: is 'histogramm'",
            "Did you mean histogram?",
        ),
        (
            "  weights: {symmetric: false}\n  activations:\n    bits: 8\n    scope: mix\n",
            "6: quantize.weights.symmetric: integer products",
            "Set it true",
        ),
        (
            "  activations:\n    bits: 8\n    percentile: 99\n",
            "8: quantize.activations.percentile: has no effect on method minmax",
            "method: percentile",
        ),
        *(
            (
                f"  activations:\n    bits: 8\n    scope: token\n    {key}: {value}\n",
                f"9: quantize.activations.{key}: has no effect with scope token",
                "scope: tensor or mix",
            )
            for key, value in (("method", "mse"), ("aggregation", "mean"), ("propagation", "quantized"))
        ),
        # methods of weights
        *(
            (
                f"  weights:\n    bits: 4\n    method: {method}\n  {section}:\n    {key}: {value}\n",
                f"10: quantize.{section}.{key}: has no effect",
                part,
            )
            for method, section, key, value, part in (
                ("mse", "gptq", "damping", 0.1, "gptq or signround"),
                ("mse", "gptq", "sweeps", 3, "gptq or signround"),
                ("mse", "gptq", "shrink", "false", "gptq or signround"),
                ("mse", "gptq", "prefix", "float", "gptq or signround"),
                ("mse", "gptq", "asymmetric", "true", "gptq or signround"),
                ("mse", "gptq", "compared", 0.5, "gptq or signround"),
                ("gptq", "gptq", "compared", 0.5, "asymmetric: true"),
                ("gptq", "signround", "iterations", 5, "Set weights.method: signround"),
                ("gptq", "signround", "check_every", 1, "Set weights.method: signround"),
                ("mse", "signround", "patience", 1, "Set weights.method: signround"),
                ("mse", "signround", "minutes", 1.5, "Set weights.method: signround"),
            )
        ),
        (
            "  weights:\n    method: signround\n  gptq:\n    prefix: float\n",
            "9: quantize.gptq.prefix: is float, and signround learns behind quantized linears",
            "prefix: quantized",
        ),
        (
            "  weights:\n    method: gptq\n  gptq:\n    output_samples: 1\n",
            "9: quantize.gptq.output_samples: is 1",
            "more than 1",
        ),
        # fp8
        (
            "  weights: {bits: 4, type: float}\n",
            "6: quantize.weights.bits: is 4, and float codes have 8",
            "Set bits: 8, or type: int.",
        ),
        (
            "  weights: {type: float, symmetric: false}\n",
            "6: quantize.weights.symmetric: is false, and fp8 has no zero point",
            "type: int",
        ),
        (
            "  weights: {type: float, granularity: group}\n",
            "6: quantize.weights.granularity: is group, and fp8 weights have a scale a channel or tensor",
            "channel or tensor",
        ),
        *(
            (
                f"  weights: {{type: float, method: {method}}}\n",
                f"6: quantize.weights.method: {method} finds integers",
                "minmax, mse or gptq",
            )
            for method in ("hqq", "ssz", "signround", "low_bit")
        ),
        (
            "  weights: {type: float}\n  activations: {bits: 8, scope: token}\n",
            "7: quantize.activations.type: is int, and that of weights is float",
            "Set activations.type: float, or weights.type: int.",
        ),
        (
            "  weights: {bits: 8}\n  activations: {bits: 8, type: float}\n",
            "7: quantize.activations.type: is float, and that of weights is int",
            "Set activations.type: int, or weights.type: float.",
        ),
        (
            "  weights: {type: float}\n  activations: {bits: 4, type: float, scope: token}\n",
            "7: quantize.activations.bits: is 4, and float codes have 8",
            "bits: 8",
        ),
        (
            "  weights: {type: float}\n  activations: {bits: 8, type: float, scope: mix}\n",
            "7: quantize.activations.scope: is mix, which engines have for integers only",
            "token or tensor",
        ),
        (
            "  weights: {type: float}\n  activations: {bits: 8, type: float, symmetric: false}\n",
            "7: quantize.activations.symmetric: is false, and fp8 has no zero point",
            "type: int",
        ),
        *(
            (
                f"  weights: {{type: float}}\n  activations: {{bits: 8, type: float, method: {method}}}\n",
                f"7: quantize.activations.method: {method} is for the even steps of integers",
                "minmax or percentile",
            )
            for method in ("histogram", "mixed", "mse")
        ),
        (
            "  weights: {type: float}\n  overrides: [{match: '*', weights: {bits: 4}}]\n",
            "7: quantize.overrides[0].weights: bits is 4, and float codes have 8",
            "type: int",
        ),
        # inside attention
        (
            "  kv_cache:\n    type: float\n    symmetric: false\n",
            "8: quantize.kv_cache.symmetric: is false, and fp8 has no zero point",
            "type: int",
        ),
        ("  kv_cache:\n    bits: 4\n", "7: quantize.kv_cache.bits: is 4", "Allowed: 8."),
        ("  kv_cache:\n    observe: k_proj\n", "7: quantize.kv_cache.observe: is 'k_proj'", "cache or projection"),
        ("  attention:\n    coverage: 0.5\n", "7: quantize.attention.coverage: is 0.5", "more than 0.5"),
        (
            "  kv_cache: {}\n  attention: {}\n",
            "7: quantize.attention: excludes kv_cache",
            "Remove one of them.",
        ),
        # integer products
        ("  activations: {bits: 4}\n", "6: quantize.activations.scope: is tensor, and 4-bit", "scope: token"),
        ("  activations: {bits: 4, scope: mix}\n", "6: quantize.activations.scope: is mix, and 4-bit", "scope: token"),
        ("  activations: {bits: 6, scope: token}\n", "6: quantize.activations.bits: is 6", "16, 8 or 4"),
        ("  activations: {bits: 4, scope: token, symmetric: false}\n", "6: quantize.activations.symmetric: is", "true"),
        (
            "  activations: {bits: 8, scope: token, symmetric: false}\n"
            "  overrides:\n  - match: a\n    weights: {bits: 4}\n",
            "8: quantize.overrides[0].activations.symmetric: is false, and engines have zero points per token",
            "Set it true",
        ),
        (
            "  activations: {bits: 8, scope: token, symmetric: false}\n  target:\n"
            "    bits_per_weight: 6\n    candidates: [{bits: 4}, {bits: 8}]\n",
            "9: quantize.target.candidates[0].activations.symmetric: is false, and engines have zero points per token",
            "Set it true",
        ),
        (
            "  weights: {bits: 4, symmetric: false}\n  activations: {bits: 8, scope: token}\n",
            "6: quantize.weights.symmetric: integer products need symmetric weights",
            "Set it true",
        ),
        (
            "  weights: {bits: 16}\n  activations: {bits: 4, scope: token}\n  kv_cache: {}\n",
            "7: quantize.activations.bits: 4-bit activations need quantized weights, and weights.bits is 16",
            "activations.bits: 16",
        ),
        (
            "  overrides:\n  - match: a\n    scheme: W8A8\n    activations: {bits: 4}\n",
            "9: quantize.overrides[0].activations: scope is tensor, and 4-bit activations",
            "scope: token",
        ),
        # rollback
        ("  rollback:\n    level: 5.5\n", "7: quantize.rollback.level: is 5.5", "L5 or 5"),
        ("  rollback:\n    level: l5\n", "7: quantize.rollback.level: is 'l5'", "L5 or 5"),
        ("  rollback:\n    level: L05\n", "7: quantize.rollback.level: is 'L05'", "L0 for none"),
        ("  rollback:\n    level: -1\n", "7: quantize.rollback.level: is -1", "L5 or 5"),
        ("  rollback:\n    level: true\n", "7: quantize.rollback.level: is True", "L5 or 5"),
        ("  rollback:\n    metric: std\n", "7: quantize.rollback.metric: is 'std'", "range_parm"),
        ("  rollback:\n    to: W4A6\n", "7: quantize.rollback.to: is 'W4A6'", "W4A4"),
        ("  rollback:\n    siblings: split\n", "7: quantize.rollback.siblings: is 'split'", "together or apart"),
        ("  rollback:\n    last_linear: L1\n", "7: quantize.rollback.last_linear: is 'L1'", "true or false"),
        (
            "  rollback:\n    level: 3\n    target: {size: 1}\n",
            "7: quantize.rollback.level: is given beside a target",
            "Remove one of them.",
        ),
        ("  rollback:\n    target: {}\n", "7: quantize.rollback.target: has no bound", "Give one of"),
        (
            "  rollback:\n    target: {size: 1, kl_divergence: 0.1}\n",
            "7: quantize.rollback.target: has kl_divergence and size",
            "Give one of perplexity_increase, kl_divergence and size.",
        ),
        (
            "  rollback:\n    target:\n      perplexity_increase: 1\n",
            "8: quantize.rollback.target.perplexity_increase: 1 is no fraction",
            "1% or 0.01",
        ),
        (
            "  rollback:\n    target:\n      kl_divergence: 0\n",
            "8: quantize.rollback.target.kl_divergence: is 0",
            "more than 0",
        ),
        ("  rollback:\n    target:\n      size: 1GB\n", "8: quantize.rollback.target.size: is '1GB'", "a number"),
        (
            "  rollback:\n    target:\n      size: 1\n      windows: 0\n",
            "9: quantize.rollback.target.windows: is 0",
            "more than 0",
        ),
        ("  rollback:\n    levels: 5\n", "7: quantize.rollback.levels: unknown key", "Did you mean level?"),
        # overrides
        ("  overrides:\n  - scheme: float\n", "7: quantize.overrides[0].match: is missing", "Add it."),
        ("  overrides:\n  - match: a\n", "7: quantize.overrides[0]: changes nothing", "scheme, weights or activations"),
        (
            "  overrides:\n  - match: a\n    scheme: float\n    weights: {bits: 8}\n",
            "8: quantize.overrides[0].scheme: is float, beside keys of another scheme",
            "Remove one of them.",
        ),
        (
            "  overrides:\n  - match: a\n    scheme: W4A6\n",
            "8: quantize.overrides[0].scheme: is 'W4A6'",
            "W8A8-dynamic",
        ),
        ("  overrides:\n  - match: 're:('\n    scheme: float\n", "7: quantize.overrides[0].match: 're:('", "Mend"),
        (
            "  overrides:\n  - match: a\n    scheme: float\n  - match: b\n    weights: {bit: 4}\n",
            "10: quantize.overrides[1].weights: has the unknown key bit",
            "Keys: bits, type, symmetric, granularity",
        ),
        (
            "  overrides:\n  - match: a\n    activations: {scpoe: token}\n",
            "8: quantize.overrides[0].activations: has the unknown key scpoe",
            "Keys: bits, type, scope",
        ),
        (
            "  overrides:\n  - match: a\n    weights: {bits: 5}\n",
            "8: quantize.overrides[0].weights: bits is 5",
            "",
        ),
        (
            "  overrides:\n  - match: a\n    weights: {group_size: 32}\n",
            "8: quantize.overrides[0].weights: group_size has no meaning with granularity channel",
            "Remove it.",
        ),
        (
            "  overrides:\n  - match: a\n    scheme: W4A4\n    activations: {symmetric: false}\n",
            "9: quantize.overrides[0].activations: symmetric is false, and engines have zero points of 8-bit",
            "bits: 8",
        ),
        (
            "  overrides:\n  - match: a\n    scheme: W8A8\n    weights:\n      bits: 4\n",
            "7: quantize.overrides[0].activations.bits: 8-bit activations of static scales need 8-bit weights",
            "activations.bits: 16",
        ),
    ],
)
def test_refusal_of_what_quantize_says(tmp_path: Path, quantize: str, start: str, part: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(QUANTIZE + quantize)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{start}")
    assert part in message
    assert len(message.splitlines()) == 1


def quantize_of(text: str, *overrides: str) -> Any:
    return load_recipe(yaml.safe_load(QUANTIZE + text), overrides).quantize


@pytest.mark.parametrize(
    ("older", "present"),
    [
        ("activations: {bits: 8, act_method: 1}", "activations: {bits: 8, method: minmax}"),
        ("activations: {bits: 8, act_method: 2}", "activations: {bits: 8, method: histogram}"),
        ("activations: {bits: 8, act_method: 3}", "activations: {bits: 8, method: mixed}"),
        (
            "activations: {bits: 8, propagation: quantized, pr: 0.5}",
            "activations: {bits: 8, propagation: quantized, quantized_share: 0.5}",
        ),
        ("weights: {mm_tensor: true}", "weights: {granularity: tensor}"),
        ("weights: {mm_tensor: false}", "weights: {granularity: channel}"),
        ("weights: {w_sym: false}", "weights: {symmetric: false}"),
        ("rollback: {disable_level: L5}", "rollback: {level: 5}"),
        ("rollback: {disable_level: L0}", "rollback: {level: 0}"),
        ("rollback: {disable_names: ['*.o_proj']}", "rollback: {names: ['*.o_proj']}"),
        ("rollback: {disable_last_linear: false}", "rollback: {last_linear: false}"),
    ],
)
def test_older_names_mean_what_they_meant(tmp_path: Path, older: str, present: str) -> None:
    expected = quantize_of(f"  {present}\n")
    (tmp_path / "r.yaml").write_text(f"{QUANTIZE}  {older}\n")
    assert load_recipe(tmp_path / "r.yaml").quantize == expected
    assert quantize_of(f"  {older}\n") == expected
    section, _, keys = older.partition(": ")
    settings = [f"quantize.{section}.{entry.replace(': ', '=')}" for entry in keys[1:-1].split(", ")]
    assert quantize_of("  weights: {}\n", *settings) == expected


@pytest.mark.parametrize(
    ("written", "option", "start"),
    [
        ("activations: {bits: 8, act_method: 4}", "quantize.activations.act_method=4",
         "quantize.activations.act_method: is 4. Allowed: 1 (minmax), 2 (histogram), 3 (mixed)."),
        ("activations: {bits: 8, act_method: true}", "quantize.activations.act_method=true",
         "quantize.activations.act_method: is true. Allowed: 1 (minmax)"),
        ("weights: {mm_tensor: 1}", "quantize.weights.mm_tensor=1",
         "quantize.weights.mm_tensor: is 1. Allowed: true (tensor), false (channel)."),
        ("rollback: {disable_level: 5L}", "quantize.rollback.disable_level=5L",
         "quantize.rollback.level: is '5L'. Write L5 or 5"),
        ("weights: {w_sym: 1}", "quantize.weights.w_sym=1", "quantize.weights.symmetric: is 1."),
    ],
)  # fmt: skip
def test_older_names_are_refused_like_the_others(tmp_path: Path, written: str, option: str, start: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"{QUANTIZE}  {written}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}:6: {start}")
    file.write_text(f"{QUANTIZE}  weights: {{}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [option])
    assert str(caught.value).startswith(f"--set {option}: {start}")


@pytest.mark.parametrize(("older", "name"), [(key, name) for key, name in ALIASES.items()])
def test_a_key_by_two_names_is_refused(tmp_path: Path, older: tuple[str, ...], name: str) -> None:
    *sections, key = older
    text = QUANTIZE if sections[0] == "quantize" else QUANTIZE + "  weights: {}\n"
    opened = [section for section in sections if section != "quantize"]
    for section in opened:
        text += "  " * (len(sections) - 1) + f"{section}:\n"
    text += "".join("  " * len(sections) + f"{written}: null\n" for written in (name, key))
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    line, place = len(text.splitlines()), ".".join(older)
    assert str(caught.value) == f"{file}:{line}: {place}: is the older name of {name}. Keep one of the two."


def test_an_override_changes_a_named_scheme_or_that_of_the_recipe() -> None:
    section = quantize_of(
        """\
  weights: {granularity: group, group_size: 64, bits: 4, method: mse, importance: second_moment}
  overrides:
  - {match: a, scheme: W8A8, activations: {method: histogram}}
  - {match: b, scheme: W4A16, weights: {group_size: 32}}
  - {match: c, weights: {bits: 3}}
  - {match: d, weights: {bits: 8, granularity: channel, method: minmax}, activations: {bits: 8, scope: token}}
  - {match: e, scheme: W4A16, weights: {bits: 16}}
  - {match: f, scheme: float}
"""
    )
    a, b, c, d, e, f = map(section.treatment, section.overrides)
    assert (a[0].bits, a[0].granularity, a[0].method) == (8, "channel", "minmax")
    assert (a[1].bits, a[1].scope, a[1].symmetric, a[1].method) == (8, "tensor", False, "histogram")
    assert (b[0].bits, b[0].group_size, b[0].method, b[0].importance) == (4, 32, "mse", "auto")
    assert (c[0].bits, c[0].group_size, c[0].method, c[0].importance) == (3, 64, "mse", "second_moment")
    assert (d[0].bits, d[0].group_size, d[0].method, d[0].importance) == (8, None, "minmax", "auto")
    assert (d[1].bits, d[1].scope, d[1].symmetric) == (8, "token", True)
    assert (e, f) == (None, None)
    assert section.treatment(None) == (section.weights, section.activations)


def test_keys_of_a_method_are_taken_for_an_override_of_it() -> None:
    section = quantize_of(
        """\
  weights: {bits: 4, method: mse}
  gptq: {asymmetric: true, compared: 0.5}
  signround: {iterations: 5}
  overrides: [{match: a, weights: {method: signround}}]
""",
        "calibration={}",
    )
    assert section.solves
    assert section.tunes


@pytest.mark.parametrize(
    ("base", "override"),
    [
        ("{}", "{bits: 8, scope: token}"),
        ("{bits: 8}", "{scope: token}"),
        ("{bits: 8, scope: token}", "{scope: tensor}"),
        ("{bits: 8, scope: token}", "{scope: tensor, symmetric: true}"),
        ("{bits: 8, symmetric: true}", "{method: mse}"),
        ("{bits: 8, method: mse, propagation: quantized, quantized_share: 0.5}", "{scope: token}"),
        ("{bits: 8, method: percentile, percentile: 99}", "{method: mse}"),
        ("{bits: 8, method: percentile, percentile: 99}", "{scope: token}"),
        ("{bits: 8, aggregation: mean}", "{method: mse}"),
        ("{bits: 8, aggregation: mean}", "{scope: token}"),
        ("{bits: 8, propagation: quantized, quantized_share: 0.5}", "{propagation: float}"),
    ],
)
def test_an_override_means_the_same_in_the_resolved_recipe(base: str, override: str) -> None:
    """What a default follows from is the override's, whether the default was written out or not."""
    section = quantize_of(f"  activations: {base}\n  overrides: [{{match: a, activations: {override}}}]\n")
    again = QuantizeSection.model_validate(section.model_dump())
    (one,), (other,) = section.overrides, again.overrides
    assert section.treatment(one) == again.treatment(other)
    treatment = section.treatment(one)
    assert treatment is not None
    assert treatment[1].symmetric == (treatment[1].scope == "token" or "symmetric: true" in base + override)


@pytest.mark.parametrize(
    ("base", "override"),
    [
        ("{method: low_bit, fraction: 0.05}", "{method: minmax}"),
        ("{method: low_bit_sigma, sigma_factor: 4}", "{method: low_bit}"),
        ("{method: mse, importance: second_moment}", "{method: minmax}"),
    ],
)
def test_an_override_takes_no_key_over_that_it_leaves_nothing_to_do(base: str, override: str) -> None:
    text = f"  weights: {base}\n  activations: {{bits: 8}}\n  overrides: [{{match: a, weights: {override}}}]\n"
    section = quantize_of(text, "calibration={}")
    treatment = section.treatment(section.overrides[0])
    assert treatment is not None
    assert treatment[0] == WeightsSection(**yaml.safe_load(override))


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("W8A16", (8, "channel", "minmax"), (16, "tensor", False)),
        ("W8A8", (8, "channel", "minmax"), (8, "tensor", False)),
        ("W8A8-dynamic", (8, "channel", "minmax"), (8, "token", True)),
        ("W8A8-mix", (8, "channel", "minmax"), (8, "mix", False)),
        ("W4A16", (4, "group", "mse"), (16, "tensor", False)),
        ("W4A8", (4, "group", "mse"), (8, "token", True)),
        ("W4A4", (4, "group", "mse"), (4, "token", True)),
    ],
)
def test_names_of_schemes(name: str, weights: tuple[Any, ...], activations: tuple[Any, ...]) -> None:
    pair = named_scheme(name)
    assert pair is not None
    assert (pair[0].bits, pair[0].granularity, pair[0].method) == weights
    assert (pair[1].bits, pair[1].scope, pair[1].symmetric) == activations


@pytest.mark.parametrize(
    ("keys", "without", "with_"),
    [
        ({"method": "mse"}, False, True),
        ({"method": "mse", "importance": "none"}, False, False),
        ({"method": "mse", "importance": "second_moment"}, True, True),
        ({"method": "minmax"}, False, False),
        ({"method": "gptq"}, False, False),
    ],
)
def test_errors_are_weighed_where_inputs_are_seen(keys: dict[str, str], without: bool, with_: bool) -> None:
    weights = WeightsSection.model_validate({"bits": 4, **keys})
    assert [weights.weighed(calibrated) for calibrated in (False, True)] == [without, with_]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weights", ["{bits: 4}", "{bits: 3, granularity: group}", "{bits: 8, granularity: group}"])
def test_inputs_with_a_scale_a_token_go_with_few_bits_and_groups(bits: int, weights: str) -> None:
    section = quantize_of(f"  weights: {weights}\n  activations: {{bits: {bits}, scope: token}}\n")
    pair = section.treatment(None)
    assert pair == (section.weights, section.activations)
    assert (section.activations.bits, section.activations.symmetric, section.activations.observed) == (
        bits,
        True,
        False,
    )


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_tokens_may_have_zero_points_beside_8_bit_weights(granularity: str) -> None:
    asymmetric = "{bits: 8, scope: token, symmetric: false}"
    section = quantize_of(
        f"  weights: {{granularity: {granularity}}}\n  activations: {asymmetric}\n  overrides:\n"
        "  - {match: a, activations: {scope: tensor}}\n  - {match: b, activations: {symmetric: true}}\n"
        "  - {match: c, scheme: W4A8}\n  - {match: d, scheme: W8A8-dynamic, activations: {symmetric: false}}\n"
    )
    assert (section.activations.observed, section.activations.symmetric) == (False, False)
    pairs = [section.treatment(override) for override in section.overrides]
    assert [pair and (pair[1].scope, pair[1].symmetric) for pair in pairs] == [
        ("tensor", False),
        ("token", True),
        ("token", True),
        ("token", False),
    ]


@pytest.mark.parametrize(("text", "fraction"), [("1%", 0.01), ("0.5 %", 0.005), ("0.01", 0.01), ("0%", 0.0)])
def test_a_target_is_a_share_of_the_perplexity(text: str, fraction: float) -> None:
    target = quantize_of("  activations: {bits: 8}\n", f"quantize.rollback.target.perplexity_increase={text}")
    assert target.rollback.target.perplexity_increase == fraction
    assert (target.rollback.ranked_by, target.rollback.ranks) == ("kl_divergence", True)
    assert quantize_of("  rollback: {level: 3}\n").rollback.ranked_by == "range_parm"
    assert quantize_of("  rollback: {level: 3, metric: kurtosis}\n").rollback.ranked_by == "kurtosis"
    assert not quantize_of("  rollback: {names: [a]}\n").rollback.ranks


def test_weights_stay_in_float_where_something_else_is_quantized() -> None:
    for beside in ("kv_cache: {}", "attention: {}", "overrides: [{match: a, scheme: W8A16}]"):
        section = quantize_of(f"  weights: {{bits: 16}}\n  {beside}\n")
        assert section.treatment(None) is None


NEEDS = "needs calibration. Add a section calibration: {}"


@pytest.mark.parametrize(
    ("quantize", "start"),
    [
        ("  activations: {bits: 8, scope: mix}\n",
         "quantize.activations.scope: static scales need calibration. Add a section calibration: {} or set scope"),
        ("  overrides: [{match: a, scheme: W8A8}]\n",
         "quantize.overrides[0].activations.scope: static scales need calibration."),
        ("  overrides: [{match: a, scheme: float}, {match: b, scheme: W4A16, weights: {importance: second_moment}}]\n",
         f"quantize.overrides[1].weights.importance: second_moment {NEEDS} or set importance: none."),
        ("  rollback: {names: [a], to: W8A8}\n",
         "quantize.rollback.to: is W8A8, and static scales need calibration. Add a section calibration: {} or"),
        ("  kv_cache: {}\n", "quantize.kv_cache: scales need calibration. Add a section calibration: {}."),
        ("  attention: {}\n", "quantize.attention: scales need calibration. Add a section calibration: {}."),
        ("  rollback: {level: 2}\n",
         "quantize.rollback.level: ranks linears by what they are fed. Add a section calibration: {}."),
        ("  rollback: {target: {size: 1}}\n", "quantize.rollback.target: ranks linears by what they are fed."),
    ],
)  # fmt: skip
def test_what_needs_calibration_is_refused_without(tmp_path: Path, quantize: str, start: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(QUANTIZE.replace("calibration: {}\n", "") + quantize)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}:5: {start}")
    file.write_text(QUANTIZE + quantize)
    load_recipe(file)


@pytest.mark.parametrize("bound", ["perplexity_increase: 1%", "kl_divergence: 0.1"])
def test_a_target_that_is_measured_needs_a_measurement(tmp_path: Path, bound: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(QUANTIZE + f"  rollback:\n    target: {{{bound}}}\n")
    assert load_recipe(file).quantize.rollback.ranks
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["evaluate=null"])
    assert str(caught.value) == (
        f"{file}:7: quantize.rollback.target: is measured on evaluate.perplexity, which is absent. Add that section."
    )
    load_recipe(file, ["evaluate=null", "quantize.rollback.target={size: 1}"])


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
        ("evaluate.perplexity", {}, "r.yaml:29: evaluate.gates.perplexity_increase: judges nothing"),
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
    wrongs: list[dict[str, Any]] = [{"quantize": {"weights": {"bits": 5}}}, {"quantize": {}, "prune": {}}, {}]
    for wrong in wrongs:
        assert list(validator.iter_errors(wrong))
