"""The table of engines: every row has a source, and every format, scheme and engine that can meet has a row."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import pytest
import yaml

from quantcli.formats import engines
from quantcli.formats.engines import FACTS, SOURCES, TABLE, refusal, table, verdicts
from quantcli.formats.table import FORMATS
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe.schema import ExportSection

Q, OUT = (Linear(f"model.layers.0.self_attn.{name}", 768, 768) for name in ("q_proj", "o_proj"))
DOWN = Linear("model.layers.0.mlp.down_proj", 768, 768)
EXPERT, ANOTHER = (Linear(f"model.layers.{n}.mlp.experts.0.up_proj", 768, 768) for n in (0, 1))
ODD = Linear("model.layers.0.mlp.up_proj", 768, 48)
ATTENTION = [AttentionScheme(kv="fp8"), AttentionScheme(kv="int8"), AttentionScheme(heads=True)]


def schemes() -> Iterator[Scheme]:
    """All that a recipe can ask for, and some that it cannot."""
    sizes = [("tensor", None), ("channel", None), *(("group", size) for size in (16, 32, 48, 64, 128, 256))]
    inputs = [("none", 8), ("static", 8), ("dynamic", 8), ("dynamic", 4), ("mix", 8)]
    for bits, symmetric, (granularity, size), (mode, width), signed, sparse in product(
        (2, 3, 4, 8), (True, False), sizes, inputs, (True, False), (False, True)
    ):
        yield Scheme(bits, symmetric, granularity, size, mode, signed, sparse, width)  # type: ignore[arg-type]
    for granularity, mode in product(("tensor", "channel"), ("none", "static", "dynamic")):
        yield Scheme(8, True, granularity, None, mode, type="float")  # type: ignore[arg-type]


SCHEMES = list(schemes())


def test_every_row_has_a_source_and_asks_for_facts_that_there_are() -> None:
    content, sources = yaml.safe_load(TABLE.read_text()), yaml.safe_load(SOURCES.read_text())
    for key, source in sources.items():
        assert source["url"].startswith("https://"), key
        assert source["what"], key
    used = {row["source"] for row in content["rows"]} | {group["source"] for group in content["joins"]}
    assert used == set(sources)
    for row in content["rows"]:
        assert set(row) <= {"engines", "formats", "of", "when", "loads", "note", "source"}, row
        assert {"engines", "formats", "of", "loads", "source"} <= set(row), row
        assert set(row["engines"]) <= set(content["engines"]), row
        assert set(row["formats"]) <= set(FORMATS), row
        assert set(row.get("when", {})) <= FACTS[row["of"]], row
        assert row["loads"] or row.get("note"), row
        row["note"] = row.get("note", "").format_map(dict.fromkeys(FACTS[row["of"]], ""))


def test_recipes_know_the_engines_of_the_table() -> None:
    (names, _) = get_args(ExportSection.model_fields["engines"].annotation)
    assert get_args(names) == tuple(table().names)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("engine", table().names)
def test_every_scheme_that_a_format_holds_has_a_row(engine: str, form: str) -> None:
    """`verdicts` and `refusal` raise LookupError where there is none."""
    held = [scheme for scheme in SCHEMES if not FORMATS[form].refusal(Q, scheme)]
    assert held
    for scheme, linear in product(held, (Q, ODD)):
        said = refusal(engine, [(linear, scheme)], None, [form])
        assert not said or "https://" in said
    for attention in ATTENTION:
        refusal(engine, [], attention, [form])
    for scheme in [*held, None]:
        named = [(EXPERT, scheme)] if scheme else []
        refusal(engine, named, None, [form], [] if scheme else [EXPERT.name], [[EXPERT.name]])


def test_no_row_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decides something: none stands behind rows that have said it all."""
    reached: set[int] = set()
    decide = engines._decide

    def watched(*question: Any) -> Any:
        row, note = decide(*question)
        reached.add(id(row))
        return row, note

    monkeypatch.setattr(engines, "_decide", watched)
    chance = random.Random(0)
    for form in FORMATS:
        held = [scheme for scheme in SCHEMES if not FORMATS[form].refusal(Q, scheme)]
        for scheme, linear in product(held, (Q, ODD, EXPERT)):
            verdicts([(linear, scheme)], None, [form], (), [[EXPERT.name]] if linear is EXPERT else ())
        for scheme in held:
            verdicts([(DOWN, scheme)], None, [form], architecture="LlamaForCausalLM")
        for attention in ATTENTION:
            verdicts([], attention, [form])
        if hasattr(FORMATS[form], "takes_added_bias"):
            verdicts([], None, [form], biases=True)
        verdicts([], None, [form], [EXPERT.name], [[EXPERT.name]])
        verdicts([(Q, held[0])], None, [form], [EXPERT.name], [[EXPERT.name]])
        for _ in range(300):
            one, other, third = chance.choice(held), chance.choice([*held, None]), chance.choice([*held, None])
            named = [(Q, one), (OUT, one), (EXPERT, other), (ANOTHER, third)]
            linears = [(linear, scheme) for linear, scheme in named if scheme is not None]
            verdicts(linears, None, [form], (), [[EXPERT.name], [ANOTHER.name]])
            verdicts(linears[:3], None, [form], (), [[EXPERT.name]])
    left = [row for row in table().rows if row.of != "format" and id(row) not in reached]
    assert not left


def said(engine: str, scheme: Scheme, form: str = "compressed-tensors") -> tuple[bool, str, str]:
    (found,) = (v for v in verdicts([(Q, scheme)], None, [form]) if v.engine == engine)
    return found.loads, found.note, found.source


def test_a_verdict_names_its_source() -> None:
    loads, note, source = said("SGLang", Scheme(8, activations="static"))
    assert loads
    assert "a scale a token where a static one is evaluated" in note
    assert source.startswith("SGLang, compressed_tensors_w8a8_int8.py, https://github.com/sgl-project/sglang/")
    asymmetric = Scheme(8, activations="dynamic", activations_symmetric=False)
    assert "takes for symmetric, where zero points are evaluated" in said("SGLang", asymmetric)[1]
    assert said("vLLM-Ascend", asymmetric)[:2] == (
        False,
        "takes products of 8 bits with a scale a channel: int8 of symmetric inputs, fp8 of dynamic ones",
    )
    assert said("vLLM on a CPU", asymmetric)[:2] == (True, "int8 products (oneDNN)")
    assert said("SGLang", Scheme(3))[:2] == (False, "takes packed weights of 4 and 8 bits, not 3")
    assert said("SGLang", Scheme(8, activations="mix"), "ascend")[0] is False
    mixed = verdicts([(Q, Scheme(8, activations="dynamic")), (OUT, Scheme(4))])
    assert "one layout" in next(v.note for v in mixed if v.engine == "SGLang")
    apart = verdicts([(Q, Scheme(4)), (Linear(Q.name.replace("q_proj", "k_proj"), 768, 768), Scheme(8))])
    (vllm,) = (v for v in apart if v.engine == "vLLM on a GPU")
    assert "joins" in vllm.note
    assert "packed_modules_mapping" in vllm.source


def test_static_fp8_is_loaded_on_a_cpu_but_for_what_follows_the_gate_of_llama() -> None:
    """Of modelopt, which keeps codes; tests/serving runs what is said here."""
    scheme = Scheme(8, granularity="tensor", activations="static", type="float")
    assert said("vLLM on a CPU", scheme)[0] is False
    for architecture, linears, loads in [
        ("Qwen2ForCausalLM", (Q, DOWN), True),
        ("LlamaForCausalLM", (Q,), True),
        ("LlamaForCausalLM", (Q, DOWN), False),
        ("Phi3ForCausalLM", (DOWN,), False),
    ]:
        named = [(linear, scheme) for linear in linears]
        found = {v.engine: v for v in verdicts(named, None, ["modelopt"], architecture=architecture)}
        assert found["vLLM on a CPU"].loads is loads
        assert (f"static inputs of {DOWN.name} in {architecture}" in found["vLLM on a CPU"].note) is not loads
        assert found["vLLM on a GPU"].loads
        assert "transformers" not in found
        why = refusal("vllm-cpu", named, None, ["modelopt"], (), (), architecture)
        assert bool(why) is not loads
    dynamic = Scheme(8, activations="dynamic", type="float")
    assert all(v.loads is (v.engine != "SGLang") for v in verdicts([(DOWN, dynamic)], None, ["modelopt"]))


def test_engines_that_add_the_biases_of_a_shift_are_named_with_their_source() -> None:
    linears = [(Q, Scheme(8, activations="static", activations_symmetric=False))]
    for form in ("ascend", "mindie"):
        for plain, biased in zip(
            verdicts(linears, None, [form]), verdicts(linears, None, [form], biases=True), strict=True
        ):
            assert biased.loads
            assert biased.note == f"{plain.note}; adds the biases of a shift"
            assert biased.source.startswith(f"{plain.source}; {biased.engine.partition(' ')[0]}")
    assert "AscendRMSNorm" in next(v.source for v in verdicts(linears, None, ["ascend"], biases=True))


def test_an_engine_is_refused_only_if_it_loads_no_format() -> None:
    linears = [(Q, Scheme(4, symmetric=False, granularity="group", group_size=64, float16_scales=True))]
    why = refusal("vllm-cpu", linears, None, ["gptq", "numpy"])
    assert why.startswith("vLLM on a CPU does not load this export. gptq: reads symmetric GPTQ weights only (vLLM 0.32")
    assert "numpy: reads no layout of msModelSlim" in why
    assert not refusal("vllm-cpu", linears, None, ["gptq", "awq"])
