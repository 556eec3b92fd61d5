"""What a plan decides for every linear, from a structure alone: no weights are read and no model is made."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_model, tiny_config

import quantcli
from quantcli.errors import ModelError, RecipeError
from quantcli.model.structure import Block, Experts, Linear, SharedInput, Structure
from quantcli.pipeline.estimate import BASE_MEMORY, Estimate
from quantcli.pipeline.fused import fused_groups
from quantcli.pipeline.patterns import match_names
from quantcli.pipeline.plan import Plan, dividing_group_size, make_plan
from quantcli.recipe import load_recipe

WIDTH, INNER, VOCABULARY = 64, 96, 512
ATTENTION = ("q_proj", "k_proj", "v_proj")


def _block(index: int) -> Block:
    name = f"model.layers.{index}"
    linears = [Linear(f"{name}.self_attn.{short}", WIDTH, WIDTH) for short in (*ATTENTION, "o_proj")]
    linears += [Linear(f"{name}.mlp.{short}", WIDTH, INNER) for short in ("gate_proj", "up_proj")]
    linears.append(Linear(f"{name}.mlp.down_proj", INNER, WIDTH))
    q, k, v, o, gate, up, down = (linear.name for linear in linears)
    inputs = [SharedInput((q, k, v), WIDTH), SharedInput((o,), WIDTH)]
    inputs += [SharedInput((gate, up), WIDTH), SharedInput((down,), INNER)]
    return Block(name, tuple(linears), tuple(inputs), ((q, k, v), (gate, up)))


def _structure(blocks: int = 2, tied: bool = False) -> Structure:
    made = tuple(_block(index) for index in range(blocks))
    parameters = {f"{l.name}.weight": (l.out_features, l.in_features) for block in made for l in block.linears}  # noqa: E741
    parameters["model.embed_tokens.weight"] = (VOCABULARY, WIDTH)
    if not tied:
        parameters["lm_head.weight"] = (VOCABULARY, WIDTH)
    return Structure("LlamaForCausalLM", "bfloat16", made, parameters, "lm_head", tied, VOCABULARY, WIDTH)


LLAMA = _structure()
LLAMA_NAMES = [linear.name for block in LLAMA.blocks for linear in block.linears]


def planned(structure: Structure = LLAMA, *, ranked: dict[str, str] | None = None, **quantize: Any) -> Plan:
    """The plan of a recipe whose section `quantize` has these keys, with `export` beside them if given."""
    export = quantize.pop("export", {"formats": ["compressed-tensors"]})
    recipe = load_recipe(
        {"model": {"path": "m/n"}, "calibration": {}, "quantize": quantize, "export": export,
         "evaluate": {"perplexity": {}} if export else None, "output": "o"}
    )  # fmt: skip
    return make_plan(recipe, Path("m"), structure, ranked)


def schemes(plan: Plan) -> dict[str, str]:
    """Names without `model.layers.` → scheme, or float."""
    return {p.linear.name.removeprefix("model.layers."): p.scheme.name if p.scheme else "float" for p in plan.linears}


def kept(plan: Plan) -> set[str]:
    """Linears in float, without `model.layers.` and without the head."""
    return {name.removeprefix("model.layers.") for name in plan.kept} - {"lm_head"}


STATIC = {"activations": {"bits": 8}}
TOKEN = {"activations": {"bits": 8, "scope": "token"}}
W4A8 = {"weights": {"bits": 4}, "activations": {"bits": 8, "scope": "token"}}

# ------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.1.mlp.down_proj", {"1.mlp.down_proj"}),
        ("*.down_proj", {"0.mlp.down_proj", "1.mlp.down_proj"}),
        ("model.layers.0.*o_proj", {"0.self_attn.o_proj"}),
        ("model.layers.[1-9].self_attn.o_?roj", {"1.self_attn.o_proj"}),
        (r"re:.*\.[01]\.(mlp\.down|self_attn\.o)_proj", {f"{i}.{n}" for i in (0, 1)
                                                        for n in ("mlp.down_proj", "self_attn.o_proj")}),
    ],
)  # fmt: skip
def test_names_are_exact_globs_or_regular_expressions(pattern: str, expected: set[str]) -> None:
    plan = planned(**TOKEN, rollback={"names": [pattern]})
    assert kept(plan) == expected
    assert all(reason == f"rolled back by {pattern}" for name, reason in plan.kept.items() if name != "lm_head")
    assert kept(planned(**TOKEN, overrides=[{"match": pattern, "scheme": "float"}])) == expected


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.1.mlp.dwon_proj", "Did you mean model.layers.1.mlp.down_proj"),
        ("down_proj", ""),  # a glob matches whole names
        ("re:down_proj", ""),
        ("re:.*down", ""),
        ("zzz", ""),
    ],
)
@pytest.mark.parametrize("place", ["quantize.rollback.names", "quantize.overrides[1].match"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, near: str, place: str) -> None:
    sections: dict[str, Any] = {"rollback": {"names": ["*.o_proj", pattern]}}
    if "overrides" in place:
        sections = {"overrides": [{"match": m, "scheme": "W8A16"} for m in ("*.mlp.*", pattern)]}
    with pytest.raises(RecipeError) as caught:
        planned(**TOKEN, **sections)
    assert str(caught.value).startswith(f"{place}: {pattern!r} matches no linear of this model.")
    assert near in str(caught.value)


def test_the_first_of_several_patterns_is_the_reason() -> None:
    assert match_names(["*.a", "x.*"], ["x.a", "x.b", "y.a"], "k") == {"x.a": "*.a", "y.a": "*.a", "x.b": "x.*"}


# ------------------------------------------------------------------------------------------------------ siblings


@pytest.mark.parametrize(
    ("named", "carried"),
    [("q_proj", {"k_proj", "v_proj"}), ("v_proj", {"q_proj", "k_proj"}), ("up_proj", {"gate_proj"}), ("o_proj", set())],
)
def test_siblings_go_along_unless_they_may_part(named: str, carried: set[str]) -> None:
    plan = planned(**TOKEN, rollback={"names": [f"*.0.*.{named}"]})
    assert {name.rpartition(".")[2] for name in kept(plan)} == {named} | carried
    for name in carried:
        (reason,) = [why for linear, why in plan.kept.items() if linear.endswith(name)]
        assert reason == f"fused with {named} in serving engines"
    noted = {
        1: ["1 linear is rolled back because engines fuse it with one that is."],
        2: ["2 linears are rolled back because engines fuse them with one that is."],
    }
    assert [note for note in plan.notes if "fuse" in note] == noted.get(len(carried), [])
    apart = planned(**TOKEN, rollback={"names": [f"*.0.*.{named}"], "siblings": "apart"})
    assert {name.rpartition(".")[2] for name in kept(apart)} == {named}
    assert not any("because engines fuse" in note for note in apart.notes)
    assert bool(_idle(apart)) == (not carried)


@pytest.mark.parametrize("form", ["ascend", "mindie"])
def test_siblings_stay_together_in_formats_whose_engines_join_them(form: str) -> None:
    apart: dict[str, Any] = {"siblings": "apart"}
    both = {"formats": ["compressed-tensors", form]}
    split = rf"export\.formats: .*q_proj is FLOAT and .*k_proj W8A8_DYNAMIC, and engines that load {form} join them"
    names = {"names": ["*.1.*.q_proj"]}
    with pytest.raises(RecipeError, match=split) as caught:
        planned(**TOKEN, rollback=apart | names, export=both)
    assert "Leave out quantize.rollback.siblings: apart" in caught.value.remedy
    for other in ("compressed-tensors", "gptq", "numpy"):
        quantize = {"weights": {"bits": 8}} if other == "gptq" else TOKEN
        assert kept(planned(**quantize, rollback=apart | names, export={"formats": [other]})) == {"1.self_attn.q_proj"}
    milder = planned(**STATIC, rollback=apart | {"names": ["*.down_proj"], "to": "W8A8-dynamic"}, export=both)
    assert schemes(milder)["1.mlp.down_proj"] == "W8A8 dynamic"
    level = apart | {"level": 1}
    noted = f"engines of {form} join"
    assert any(noted in note for note in planned(**STATIC, rollback=level, export=both).notes)
    assert not any("engines of" in note for note in planned(**STATIC, rollback=level).notes)
    assert planned(**STATIC, rollback=level, export=both, ranked={"model.layers.1.mlp.down_proj": "rolled back"})
    with pytest.raises(RecipeError, match="up_proj FLOAT, and engines"):
        planned(**STATIC, rollback=level, export=both, ranked={"model.layers.1.mlp.up_proj": "rolled back"})
    searched = apart | {"target": {"kl_divergence": 0.1}}
    with pytest.raises(RecipeError, match=rf"engines that load {form} join linears that a search may part"):
        planned(**STATIC, rollback=searched, export=both)


def test_what_was_ranked_is_rolled_back_with_its_siblings() -> None:
    name = "model.layers.1.self_attn.k_proj"
    plan = planned(**STATIC, rollback={"level": 1}, ranked={name: "rolled back by range_parm 41.2"})
    assert plan.kept[name] == "rolled back by range_parm 41.2"
    assert kept(plan) == {f"1.self_attn.{short}" for short in ATTENTION}
    assert not any("After calibration" in note for note in plan.notes)


def test_groups_go_together_in_the_order_of_the_model() -> None:
    names = [linear.name for linear in LLAMA.blocks[0].linears]
    q, k, v, o, gate, up, down = names
    assert list(fused_groups(LLAMA, [*reversed(names), "lm_head"])) == [
        (q, k, v), (o,), (gate, up), (down,), ("lm_head",),
    ]  # fmt: skip
    assert list(fused_groups(LLAMA, [up, v, q])) == [(q, v), (up,)]


# ------------------------------------------------------------------------------------------------------ overrides


def test_the_first_override_that_matches_wins_and_rollback_wins_over_all() -> None:
    plan = planned(
        weights={"bits": 8, "granularity": "group", "group_size": 32},
        rollback={"names": ["*.1.mlp.down_proj"]},
        overrides=[
            {"match": "*.0.mlp.down_proj", "scheme": "float"},
            {"match": "*.mlp.*", "scheme": "W4A16", "weights": {"group_size": 16}},
            {"match": "*", "scheme": "W8A8-dynamic"},
        ],
    )
    found = schemes(plan)
    assert found["0.mlp.down_proj"] == "float"
    assert found["0.mlp.up_proj"] == found["1.mlp.gate_proj"] == "W4A16 g16"
    assert found["1.mlp.down_proj"] == "float"
    assert found["0.self_attn.q_proj"] == found["1.self_attn.o_proj"] == "W8A8 dynamic"
    assert plan.kept["model.layers.0.mlp.down_proj"] == "override *.0.mlp.down_proj"
    assert plan.kept["model.layers.1.mlp.down_proj"] == "rolled back by *.1.mlp.down_proj"
    reasons = {p.linear.name: p.reason for p in plan.linears}
    assert reasons["model.layers.0.mlp.up_proj"] == "override *.mlp.*"
    swapped = planned(
        **TOKEN,
        overrides=[{"match": "*", "scheme": "W8A16"}, {"match": "*.mlp.*", "scheme": "float"}],
    )
    assert set(schemes(swapped).values()) == {"W8A16", "float"}
    assert kept(swapped) == set()


@pytest.mark.parametrize(
    ("match", "pair"), [("*.0.*.k_proj", "q_proj and .*k_proj"), ("*.up_proj", "gate_proj and .*up_proj")]
)
def test_parts_of_a_fused_linear_with_different_schemes_are_refused(match: str, pair: str) -> None:
    overrides = [{"match": match, "scheme": "W8A16"}]
    with pytest.raises(RecipeError, match=rf"quantize\.overrides: .*{pair} have different schemes") as caught:
        planned(**TOKEN, overrides=overrides)
    assert "siblings: apart" in caught.value.remedy
    plan = planned(**TOKEN, overrides=overrides, rollback={"siblings": "apart"})
    assert schemes(plan)[f"0.{'self_attn.k_proj' if 'k_proj' in match else 'mlp.up_proj'}"] == "W8A16"
    assert [v.loads for v in plan.engines if v.engine.startswith("vLLM on")] == [False, False]


def test_the_same_scheme_found_by_another_method_is_another_treatment() -> None:
    with pytest.raises(RecipeError, match="have different schemes"):
        planned(**STATIC, overrides=[{"match": "*.q_proj", "activations": {"method": "histogram"}}])


# ------------------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize(
    ("last_linear", "scheme", "reason"),
    [
        (None, "float", "output head, stays in float by default"),
        (True, "float", "output head, stays in float rollback.last_linear"),
        (False, "W8A8 static", ""),
    ],
)
def test_the_output_head(last_linear: bool | None, scheme: str, reason: str) -> None:
    plan = planned(**STATIC, rollback={"last_linear": last_linear})
    assert schemes(plan)["lm_head"] == scheme
    assert plan.linears[-1].reason == reason
    assert plan.linears[-1].block == len(LLAMA.blocks)
    assert ("lm_head" in plan.schemes) == (last_linear is False)


def test_a_tied_head_stays_in_float_and_says_so() -> None:
    plan = planned(_structure(tied=True), **STATIC, rollback={"last_linear": False})
    assert plan.kept["lm_head"] == "output head, tied to the embedding"
    assert "The output head is tied to the embedding and stays in float." in plan.notes
    assert not any("tied" in note for note in planned(_structure(tied=True), **STATIC).notes)


def test_no_pattern_reaches_the_head_but_with_last_linear_false() -> None:
    plan = planned(**TOKEN, overrides=[{"match": "lm_head", "scheme": "W8A16"}])
    assert schemes(plan)["lm_head"] == "float"
    asked = planned(**TOKEN, overrides=[{"match": "lm_head", "scheme": "W8A16"}], rollback={"last_linear": False})
    assert schemes(asked)["lm_head"] == "W8A16"
    back = planned(**TOKEN, rollback={"last_linear": False, "names": ["lm_head"]})
    assert back.kept == {"lm_head": "rolled back by lm_head"}


# ------------------------------------------------------------------------------------------------------ treatments


@pytest.mark.parametrize(
    ("to", "name"), [("W8A16", "W8A16"), ("W8A8-dynamic", "W8A8 dynamic"), ("W4A16", "W4A16 g32"), ("float", "float")]
)
def test_a_rolled_back_linear_becomes_what_to_says(to: str, name: str) -> None:
    plan = planned(**STATIC, rollback={"names": ["*.down_proj"], "to": to})
    found = schemes(plan)
    assert found["0.mlp.down_proj"] == found["1.mlp.down_proj"] == name
    assert found["0.mlp.up_proj"] == "W8A8 static"
    (reason,) = {p.reason for p in plan.linears if p.linear.name.endswith("down_proj")}
    assert reason == "rolled back by *.down_proj" + ("" if to == "float" else f", to {to}")


def test_16_bits_leave_in_float_what_no_override_matches() -> None:
    plan = planned(weights={"bits": 16}, overrides=[{"match": "*.mlp.*", "scheme": "W8A16"}])
    assert {name.split(".")[1] for name, scheme in schemes(plan).items() if scheme == "W8A16"} == {"mlp"}
    assert plan.kept["model.layers.0.self_attn.q_proj"] == "weights.bits is 16"
    cache = planned(weights={"bits": 16}, kv_cache={"type": "float"})
    assert cache.schemes == {}
    assert cache.attention is not None
    assert cache.attention.name == "KV fp8"
    assert cache.size_after == cache.size_before


def test_group_sizes_are_made_to_divide_for_each_size_that_is_asked_for() -> None:
    narrow = planned(weights={"bits": 4, "granularity": "group"})  # 128 of widths 64 and 96
    assert set(schemes(narrow).values()) == {"W4A16 g32", "float"}
    assert any(note.startswith("Group size 128 does not divide every input width; 32 is used") for note in narrow.notes)
    assert narrow.narrowed == {}, "the recipe names no size"
    assert planned(weights={"bits": 4, "granularity": "group", "group_size": None}).narrowed == {}
    named = planned(weights={"bits": 4, "granularity": "group", "group_size": 128})
    ((said, names),) = named.narrowed.items()
    assert said in named.notes
    assert names == list(named.schemes)
    assert planned(weights={"bits": 4, "granularity": "group", "group_size": 32}).narrowed == {}
    several = planned(
        weights={"bits": 4, "granularity": "group"},
        overrides=[{"match": "*.down_proj", "weights": {"group_size": 48}}],
    )
    assert schemes(several)["0.mlp.down_proj"] == "W4A16 g48"
    assert schemes(several)["0.mlp.up_proj"] == schemes(several)["0.self_attn.o_proj"] == "W4A16 g64"  # all are 64 wide
    odd = replace(LLAMA, blocks=(replace(LLAMA.blocks[0], linears=(Linear("x", 40, 8),), fused=()),))
    with pytest.raises(RecipeError, match=r"no power of two from 16 to 128 divides the input widths \[40\]"):
        planned(odd, weights={"bits": 4, "granularity": "group"})
    group = {"bits": 4, "granularity": "group"}
    fine = group | {"group_size": 8}
    for place, quantize in (
        ("weights.group_size: 7 does", {"weights": group | {"group_size": 7}}),
        ("overrides[1].weights.group_size: 7 does", {"weights": fine, "overrides": [
            {"match": "y", "scheme": "W8A16"}, {"match": "x", "weights": {"group_size": 7}}]}),
        ("overrides[0]: no power", {"weights": fine, "overrides": [{"match": "x", "scheme": "W4A16"}]}),
        ("rollback.to: no power", {"weights": fine, "rollback": {"names": ["x"], "to": "W4A16"}}),
        ("weights.group_size: no power", {"weights": group, "overrides": [
            {"match": "x", "weights": {"method": "minmax"}}]}),
    ):  # fmt: skip
        two = replace(
            LLAMA.blocks[0],
            linears=(Linear("x", 40, 8), Linear("y", 40, 8)),
            inputs=(SharedInput(("x", "y"), 40),),
            fused=(),
        )
        pair = replace(LLAMA, blocks=(two,))
        with pytest.raises(RecipeError, match=re.escape(f"quantize.{place}")):
            planned(pair, **quantize)


def test_linears_that_no_forward_reaches_stay_in_float_where_something_is_observed() -> None:
    first = LLAMA.blocks[0]
    blind = replace(LLAMA, blocks=(replace(first, inputs=first.inputs[:-1]), *LLAMA.blocks[1:]))
    assert planned(blind, **STATIC).kept["model.layers.0.mlp.down_proj"] == "no input reaches it"
    assert kept(planned(blind, **TOKEN)) == set()


def test_linears_whose_weights_the_model_reads_itself_stay_in_float() -> None:
    first = LLAMA.blocks[0]
    down = replace(first.linears[-1], read_apart=True)
    apart = replace(LLAMA, blocks=(replace(first, linears=(*first.linears[:-1], down)), *LLAMA.blocks[1:]))
    for quantize in (STATIC, TOKEN, {"weights": {"bits": 4}}):
        plan = planned(apart, **quantize, overrides=[{"match": "*.down_proj", "weights": {"bits": 8}}])
        assert plan.kept[down.name] == "the model reads its weight itself, stays in float"
        assert kept(plan) == {"0.mlp.down_proj"}


def test_experts_in_a_form_that_is_not_known_are_refused() -> None:
    unknown = Experts("model.layers.0.mlp.experts", ("model.layers.0.mlp.experts.w",), ())
    experts = replace(LLAMA, blocks=(replace(LLAMA.blocks[0], experts=(unknown,)),))
    with pytest.raises(ModelError, match="in a form that is not known"):
        planned(experts, **TOKEN)


@pytest.mark.parametrize(
    ("family", "smooth", "reason"),
    [
        ("gemma2", {"method": "rotate"}, "post_attention_layernorm"),
        ("gemma2", {"method": "smoothquant", "rotation": {"heads": False}}, "post_attention_layernorm"),
        ("gemma2", {"rotation": {"hidden": False}}, None),
        ("gemma2", {}, None),
        ("llama", {"method": "rotate"}, None),
    ],
)
def test_a_rotation_that_the_residual_stream_does_not_allow_is_refused(
    family: str, smooth: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    from quantcli.model.discovery import discover

    directory = save_tiny_model(family, tmp_path / "model")
    content = {"model": {"path": str(directory)}, "calibration": {}, "smooth": smooth, "quantize": TOKEN, "output": "o"}
    recipe = load_recipe(content)
    structure = discover(directory)
    if reason is None:
        assert make_plan(recipe, directory, structure).smoothing
        return
    with pytest.raises(RecipeError, match=reason) as caught:
        make_plan(recipe, directory, structure)
    assert caught.value.message.startswith("smooth.rotation.hidden: Gemma2ForCausalLM cannot be rotated: ")
    assert "smooth.rotation.hidden: false" in caught.value.remedy


def test_the_estimate_counts_what_tuning_by_gradients_takes(tmp_path: Path) -> None:
    from quantcli.model.discovery import discover

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "dtype": "bfloat16"}
    tiny_config("llama-tied", **sizes, **heads).save_pretrained(tmp_path)
    structure = discover(tmp_path)

    def estimated(bits: int, distill: dict[str, Any] | None, **calibration: int) -> Estimate:
        text = {"samples": 8, "sequence_length": 512, **calibration}
        quantize = {"weights": {"bits": 8}, "activations": {"bits": bits, "scope": "token"}, "distill": distill}
        recipe = load_recipe({"model": {"path": "m/n"}, "calibration": text, "quantize": quantize, "output": "o"})
        return make_plan(recipe, tmp_path, structure).estimate

    plain = estimated(8, None)
    # a W8A8 and a W4A16 of this shape took 1.37 and 1.01 GB
    assert estimated(8, {}).memory == pytest.approx(1.37e9, rel=1 / 6)
    assert estimated(16, {}).memory == pytest.approx(1.01e9, rel=1 / 6)
    assert estimated(8, {}, samples=64).memory > estimated(8, {}).memory > 1.5 * plain.memory
    assert estimated(8, {}).seconds > plain.seconds
    assert estimated(8, {"passes": 3}).tokens == estimated(8, {}).tokens + 8 * 4096


def test_the_estimate_counts_gradients_of_outputs(tmp_path: Path) -> None:
    from quantcli.model.discovery import discover

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "dtype": "bfloat16"}
    tiny_config("llama-tied", **sizes, **heads).save_pretrained(tmp_path)
    structure = discover(tmp_path)

    def estimated(samples: int | None, **weights: Any) -> Estimate:
        whole = {"model": {"path": "m/n"}, "calibration": {"samples": 64, "sequence_length": 512}, "output": "o"}
        group = {"bits": 4, "granularity": "group", "group_size": 64, "method": "gptq"}
        quantize = {"weights": {**group, **weights}, "gptq": {"output_samples": samples}}
        return make_plan(load_recipe(whole | {"quantize": quantize}), tmp_path, structure).estimate

    plain, mixed = estimated(None), estimated(16)
    linears = [linear for block in structure.blocks for linear in block.linears]
    states = 32 * 16 * 512 * 576 * 2
    assert mixed.disk - plain.disk == states + sum(2 * linear.out_features**2 for linear in linears)
    assert mixed.seconds > plain.seconds + 1e-6 * sum(linear.weights for linear in linears)
    assert estimated(128).disk == estimated(64).disk > mixed.disk  # of no more samples than there are
    assert mixed.memory == pytest.approx(1.05e9, rel=1 / 5)  # as measured


def test_the_estimate_counts_what_smoothing_holds_and_saves(tmp_path: Path) -> None:
    from quantcli.model.discovery import discover

    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 30000, "dtype": "bfloat16"}
    tiny_config("llama-tied", **sizes).save_pretrained(tmp_path)
    structure = discover(tmp_path)

    def estimated(**smooth: Any) -> Estimate:
        whole = {"model": {"path": "m/n"}, "calibration": {"samples": 1, "sequence_length": 8}, "output": "o"}
        quantize = {"weights": {"bits": 4, "granularity": "group"}}
        recipe = load_recipe(whole | {"quantize": quantize} | ({"smooth": smooth} if smooth else {}))
        return make_plan(recipe, tmp_path, structure).estimate

    block = sum(linear.weights for linear in structure.blocks[0].linears)
    plain, clipped = estimated(method="awq", clip=False).memory, estimated(method="awq").memory
    assert plain > BASE_MEMORY + 8 * block  # in float32 as it was and as it is changed
    assert estimated(method="auto").memory > clipped > plain > estimated().memory
    moments = 4 * (3 * 2048**2 + 5 * 6144**2)  # of the inputs of qkv, o, gate and up, and down, which is factored
    assert estimated(method="balance").memory > plain + moments
    embedding = 30000 * 2048
    assert estimated(method="rotate").memory > BASE_MEMORY + 4 * embedding
    for hidden in (True, False):
        rotation = {"method": "rotate", "rotation": {"hidden": hidden}}
        saved = estimated(**rotation, save_model=True).disk - estimated(**rotation).disk
        assert saved == 2 * (sum(map(prod, structure.parameters.values())) + hidden * embedding)


@pytest.mark.parametrize(
    ("head_dim", "reason"),
    [(None, "it is not known how many channels"), (24, "no attention output in whole heads of 24 channels")],
)
def test_a_rotation_of_heads_that_are_not_known_is_refused(head_dim: int | None, reason: str, tmp_path: Path) -> None:
    from quantcli.model.discovery import discover

    found = discover(save_tiny_model("llama", tmp_path / "model"))
    assert found.head_dim == 16
    structure = replace(found, head_dim=head_dim)

    def plan(rotation: dict[str, Any]) -> Plan:
        smooth = {"method": "rotate", "rotation": rotation}
        recipe = load_recipe({"model": {"path": "m/n"}, "smooth": smooth, "quantize": TOKEN, "output": "o"})
        return make_plan(recipe, tmp_path, structure)

    assert plan({"heads": False}).smoothing
    for rotation in ({}, {"hidden": False}):
        with pytest.raises(RecipeError, match=reason) as caught:
            plan(rotation)
        assert caught.value.message.startswith("smooth.rotation.heads: LlamaForCausalLM cannot be rotated: ")
        assert caught.value.remedy.startswith("Set smooth.rotation.heads: false")


def test_a_head_that_rotation_unties_is_stored_beside_the_embedding(tmp_path: Path) -> None:
    from quantcli.model.discovery import discover

    structure = discover(save_tiny_model("llama-tied", tmp_path / "model"))
    sizes = {}
    for hidden in (True, False):
        smooth = {"method": "rotate", "rotation": {"hidden": hidden}}
        recipe = load_recipe({"model": {"path": "m/n"}, "smooth": smooth, "quantize": TOKEN, "output": "o"})
        plan = make_plan(recipe, tmp_path, structure)
        sizes[hidden] = plan.size_after
        assert any("tensor of its own" in note for note in plan.notes) == hidden
    assert sizes[True] - sizes[False] == structure.vocabulary * structure.width * 4  # float32


# ------------------------------------------------------------------------------------------------------ notes


def test_notes_say_what_is_decided_after_calibration() -> None:
    level = planned(**STATIC, rollback={"level": "L5"})
    assert "After calibration 5 more are rolled back: those of the highest range_parm." in level.notes
    kurtosis = planned(**STATIC, rollback={"level": 2, "metric": "kurtosis"})
    assert "After calibration 2 more are rolled back: those of the highest kurtosis." in kurtosis.notes
    target = planned(**STATIC, rollback={"target": {"kl_divergence": 0.1}})
    assert "After calibration the fewest linears that meet rollback.target are rolled back." in target.notes
    assert kept(level) == kept(target) == set()


def test_calibration_that_is_not_needed_is_noted() -> None:
    def noted(**quantize: Any) -> bool:
        return any("needs no calibration data" in note for note in planned(**quantize).notes)

    assert noted(**TOKEN)
    assert not noted(**TOKEN, overrides=[{"match": "*.down_proj", "scheme": "W8A8"}])
    assert not noted(**TOKEN, rollback={"names": ["*.down_proj"], "to": "W8A8-mix"}, export=None)
    assert not noted(**TOKEN, rollback={"level": 1})
    assert not noted(**TOKEN, kv_cache={"type": "float"})


# ------------------------------------------------------------------------------------------------------ formats


ASCEND = {"formats": ["ascend"]}
ASYMMETRIC_TOKEN = {"bits": 8, "scope": "token", "symmetric": False}
FP8 = {"weights": {"type": "float"}, "activations": {"bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"kv_cache": {}}, "compressed-tensors cannot hold C8: it holds an fp8 cache"),
        ({"kv_cache": {"symmetric": False}}, "compressed-tensors cannot hold C8 asym"),
        ({"attention": {}}, "compressed-tensors cannot hold FA int8"),
        (
            {"activations": {"bits": 8, "scope": "mix"}},
            "compressed-tensors cannot hold model.layers.0.self_attn.q_proj as W8A8 mix: it holds static or dynamic",
        ),
        ({"overrides": [{"match": "*.1.mlp.down_proj", "scheme": "W8A8-mix"}]},
         "compressed-tensors cannot hold model.layers.1.mlp.down_proj as W8A8 mix"),
        ({"weights": {"bits": 3}, "export": ASCEND},
         "ascend cannot hold model.layers.0.self_attn.q_proj as W3A16: it is written with weights of 8 and 4 bits"),
        ({"weights": {"bits": 4, "granularity": "group", "group_size": 32}, "export": ASCEND,
          "overrides": [{"match": "*.down_proj", "weights": {"group_size": 16}}]},
         "ascend holds groups of one size, and there are some of 16 and of 32"),
        ({"weights": {"granularity": "group"}, "export": ASCEND}, "ascend cannot hold .* as W8A16 g32"),
        ({"kv_cache": {"type": "float"}, "export": ASCEND}, "ascend cannot hold KV fp8: it holds an int8 cache"),
        ({"rollback": {"names": ["*.down_proj"], "to": "W4A8"}, "export": ASCEND}, "down_proj as W4A8"),
        ({"weights": {"bits": 3}, "export": {"formats": ["compressed-tensors", "ascend"]}}, "ascend cannot hold"),
        ({"weights": {"type": "float"}, "export": ASCEND},
         "ascend cannot hold .* as W8A16 fp8: it holds fp8 weights with a scale for every token"),
        ({**FP8, "export": ASCEND}, "ascend cannot hold .* as W8A8 fp8 static: it holds fp8 weights with a scale"),
        *(({"weights": {"type": "float"}, "export": {"formats": [form]}},
           f"{form} cannot hold .* as W8A16 fp8: it holds integer codes, not fp8") for form in ("gptq", "awq", "gguf")),
        ({**TOKEN, "weights": {"bits": 4, "granularity": "group", "group_size": 32}, "export": ASCEND},
         "ascend cannot hold .* as W4A8 dynamic g32: it holds 4-bit weights beside 8-bit inputs with one scale a"),
        *(({"activations": ASYMMETRIC_TOKEN, "export": {"formats": [form]}},
           f"{form} cannot hold .* as W8A8 dynamic asym: it holds symmetric dynamic activations")
          for form in ("ascend", "mindie", "numpy")),
        *(({"activations": ASYMMETRIC_TOKEN, "export": {"formats": [form]}},
           f"{form} cannot hold .* as W8A8 dynamic asym: it holds weights alone") for form in ("gptq", "awq", "gguf")),
        ({**TOKEN, "activations": {"bits": 4, "scope": "token"}, "export": ASCEND},
         "ascend cannot hold .* as W8A4 dynamic: it is written with 8-bit activations only"),
    ],
)  # fmt: skip
def test_a_format_that_cannot_hold_a_scheme_refuses(quantize: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"export\.formats: .*{message}"):
        planned(**quantize)
    schemeless = planned(**{**quantize, "export": None})
    assert schemeless.engines == ()
    assert schemeless.schemes


@pytest.mark.parametrize(
    ("granularity", "scope", "by_token"),
    [("channel", "token", True), ("channel", "tensor", False), ("tensor", "token", False), ("tensor", "tensor", False),
     ("channel", None, False)],
)  # fmt: skip
def test_the_plan_says_which_engines_load_fp8(granularity: str, scope: str | None, by_token: bool) -> None:
    inputs = {"bits": 16} if scope is None else {"bits": 8, "type": "float", "scope": scope}
    plan = planned(weights={"type": "float", "granularity": granularity}, activations=inputs)
    assert plan.bits_per_weight == pytest.approx(8, abs=1)
    loads = {verdict.engine: verdict.loads for verdict in plan.engines}
    assert loads == {
        "vLLM on a CPU": by_token, "vLLM on a GPU": True, "vLLM-Ascend": by_token, "transformers": True, "SGLang": True
    }  # fmt: skip
    assert all("fp8" in verdict.note for verdict in plan.engines if verdict.engine.startswith("vLLM on"))


def test_an_engine_that_is_named_has_to_load_the_plan() -> None:
    three: dict[str, Any] = {"weights": {"bits": 3}}
    assert planned(**three, export={"engines": ["transformers"]}).schemes
    with pytest.raises(
        RecipeError, match=r"^export\.engines: vLLM on a CPU does not load .*3-bit .*https://"
    ) as caught:
        planned(**three, export={"engines": ["transformers", "vllm-cpu"]})
    assert caught.value.exit_code == 2
    both = {"formats": ["ascend", "compressed-tensors"], "engines": ["vllm-ascend", "vllm-cpu"]}
    assert planned(weights={"bits": 4}, export=both | {"engines": ["vllm-cpu"]}).schemes
    with pytest.raises(RecipeError, match=r"vLLM-Ascend does not load this export\. ascend: has no type W4A16"):
        planned(weights={"bits": 4}, export=both)


def test_what_linears_are_rolled_back_to_is_asked_before_they_are_ranked() -> None:
    export = {"engines": ["vllm-cpu"]}
    assert planned(**TOKEN, rollback={"level": 2}, export=export).schemes
    with pytest.raises(RecipeError, match="vLLM on a CPU does not load this export"):
        planned(**TOKEN, rollback={"level": 2, "to": "W8A16"}, export=export)
    mindie = {"formats": ["mindie"]}
    assert planned(**TOKEN, rollback={"level": 2, "to": "W8A16"}, export=mindie).schemes
    with pytest.raises(RecipeError, match=r"export\.formats: mindie"):
        planned(**TOKEN, rollback={"level": 2, "to": "W8A8-fp8"}, export=mindie)


def test_the_plan_says_how_engines_compute_inputs_of_few_bits() -> None:
    """Packed 4-bit weights are loaded, and their inputs left in float; other widths have no kernel on a CPU."""
    four = planned(weights=W4A8["weights"], activations={"bits": 4, "scope": "token"})
    assert set(schemes(four).values()) == {"W4A4 dynamic", "float"}
    notes = {verdict.engine: verdict.note for verdict in four.engines if verdict.loads}
    assert notes["vLLM on a CPU"] == "computes it as W4A16: inputs stay in float, where W4A4 is evaluated"
    assert notes["vLLM on a GPU"].startswith("inputs stay in float unless --linear-backend humming")
    three = planned(weights={"bits": 3}, activations={"bits": 8, "scope": "token"})
    assert [(v.loads, "kernel" in v.note) for v in three.engines if v.engine.startswith("vLLM on")] == [
        (False, True)
    ] * 2
    # a code takes 4 bits and the scales their 16, as W4A16
    assert four.bits_per_weight == planned(weights=W4A8["weights"]).bits_per_weight < 5


def test_schemes_of_few_bits_by_name() -> None:
    plan = planned(
        overrides=[{"match": "*.mlp.*", "scheme": "W4A8"}, {"match": "*.self_attn.*", "scheme": "W4A4"}],
        rollback={"names": ["*.0.mlp.down_proj"], "to": "W4A8"},
    )
    found = schemes(plan)
    assert found["1.mlp.up_proj"] == found["0.mlp.down_proj"] == "W4A8 dynamic g32"
    assert found["0.self_attn.q_proj"] == "W4A4 dynamic g32"


@pytest.mark.parametrize(
    ("quantize", "name", "attention"),
    [
        ({"activations": {"bits": 8, "scope": "mix"}}, "W8A8 mix", None),
        ({**STATIC, "kv_cache": {}}, "W8A8 static", "C8"),
        ({**TOKEN, "attention": {}}, "W8A8 dynamic", "FA int8"),
        ({**STATIC, "weights": {"method": "co_sparse"}}, "W8A8S static", None),
    ],
)
def test_ascend_holds_them(quantize: dict[str, Any], name: str, attention: str | None) -> None:
    plan = planned(**quantize, export=ASCEND)
    assert set(schemes(plan).values()) == {name, "float"}
    assert (plan.attention.name if plan.attention else None) == attention
    assert plan.to_json()["attention"] == attention
    assert "MindIE" in [verdict.engine for verdict in plan.engines if verdict.loads]


def test_nothing_left_to_quantize_is_refused() -> None:
    with pytest.raises(RecipeError, match="every linear is rolled back"):
        planned(**TOKEN, rollback={"names": ["*"]})
    for more in (
        {"target": {"kl_divergence": 0.01}},
        {"target": {"size": 1.0}},
        {"level": 2},
    ):
        with pytest.raises(RecipeError, match="names: every linear is rolled back"):
            planned(**TOKEN, rollback={"names": ["*"], **more})
    with pytest.raises(RecipeError, match="overrides: every linear stays in float"):
        planned(overrides=[{"match": "*", "scheme": "float"}])
    with pytest.raises(RecipeError, match="overrides: every linear stays in float"):
        planned(overrides=[{"match": "*", "scheme": "float"}], rollback={"level": 2})
    assert planned(**TOKEN, rollback={"names": ["*"], "to": "W8A16"}).schemes
    assert planned(**TOKEN, rollback={"level": 14}, ranked=dict.fromkeys(LLAMA_NAMES, "ranked")).schemes == {}


def _idle(plan: Plan) -> list[str]:
    return [note for note in plan.notes if "has no effect" in note]


MIX = {"activations": {"bits": 8, "scope": "mix"}}


@pytest.mark.parametrize(
    ("quantize", "said"),
    [
        ({"rollback": {"to": "W8A16"}}, "quantize.rollback.to"),
        ({"rollback": {"metric": "kurtosis", "names": ["*.0.*"]}}, "quantize.rollback.metric"),
        ({"overrides": [{"match": "*", "scheme": "W8A16"}, {"match": "*.up_proj", "scheme": "float"}]}, "overrides[1]"),
        ({"overrides": [{"match": "lm_head", "scheme": "W8A16"}]}, "overrides[0]"),
        ({"activations": {"scope": "token"}}, "quantize.activations has no effect: its bits are 16"),
        (
            {"activations": {"method": "mse"}, "overrides": [{"match": "*", "scheme": "W8A8-dynamic"}]},
            "quantize.activations has no effect",
        ),
        ({"rollback": {"siblings": "apart"}}, "quantize.rollback.siblings has no effect"),
        ({"rollback": {"siblings": "apart", "names": ["*.down_proj"]}}, "quantize.rollback.siblings has no effect"),
        ({"weights": {"full_range": False}}, "quantize.weights.full_range has no effect"),
        ({"weights": {"bits": 4, "symmetric": False, "full_range": False}}, "quantize.weights.full_range"),
    ],
)
def test_keys_that_come_to_nothing_are_noted(quantize: dict[str, Any], said: str) -> None:
    (note,) = _idle(planned(**quantize))
    assert said in note


@pytest.mark.parametrize(
    "quantize",
    [
        {"rollback": {"to": "W8A16", "level": 1, "metric": "kurtosis"}},
        {"rollback": {"to": "W8A16", "target": {"size": 1.0}}},
        {"overrides": [{"match": "*.0.*", "scheme": "W8A16"}, {"match": "*.[mg]*", "scheme": "float"}]},
        {"overrides": [{"match": "lm_head", "scheme": "W8A16"}], "rollback": {"last_linear": False}},
        {"overrides": [{"match": "lm_head", "scheme": "float"}]},
        {"activations": {"bits": 16, "scope": "token"}},
        {"activations": {"scope": "token"}, "overrides": [{"match": "*.0.*", "activations": {"bits": 8}}]},
        {"rollback": {"siblings": "apart", "level": 1}},
        {"rollback": {"siblings": "apart", "names": ["*.v_proj"]}},
        {"rollback": {"siblings": "apart"}, "overrides": [{"match": "*.v_proj", "scheme": "float"}]},
        {"weights": {"bits": 4, "full_range": False}},
        {"weights": {"full_range": False, "granularity": "group", "group_size": 32}},
        {
            "weights": {"full_range": False},
            "overrides": [{"match": "*.v_proj", "weights": {"bits": 4}}],
            "export": None,
            "rollback": {"siblings": "apart"},
        },
    ],
)
def test_keys_that_do_something_are_not(quantize: dict[str, Any]) -> None:
    assert _idle(planned(**quantize)) == []


def test_what_is_said_of_experts_is_noted_where_there_are_none(tiny_llama: Path, tmp_path: Path) -> None:
    calibration = {"expert_tokens": 8, "route_all_experts": True}
    recipe = {"calibration": calibration, "quantize": {"weights": {"bits": 4}}, "output": str(tmp_path / "run")}
    dense = quantcli.plan({**recipe, "model": {"path": str(tiny_llama)}})
    assert _idle(dense) == [
        "calibration.expert_tokens has no effect: this model has no experts.",
        "calibration.route_all_experts has no effect: this model has no experts.",
    ]
    written = {**recipe, "calibration": {"expert_tokens": 64, "route_all_experts": False}}
    assert _idle(quantcli.plan({**written, "model": {"path": str(tiny_llama)}})) == []
    mixture = save_tiny_model("qwen3-moe", tmp_path / "mixture", with_tokenizer=True)
    assert _idle(quantcli.plan({**recipe, "model": {"path": str(mixture)}})) == []


@pytest.mark.parametrize(("quantize", "idle"), [({}, True), (MIX, False), (TOKEN, True)])
def test_the_phase_matters_to_mixed_activations_alone(quantize: dict[str, Any], idle: bool) -> None:
    content = {"model": {"path": "m/n"}, "calibration": {}, "quantize": quantize, "export": ASCEND, "output": "o"}
    recipe = load_recipe({**content, "evaluate": {"perplexity": {"phase": "decode"}}})
    assert bool(_idle(make_plan(recipe, Path("m"), LLAMA))) == idle


# ------------------------------------------------------------------------------------------------------ a real model


def test_discovered_siblings_are_those_of_the_engines(tmp_path: Path) -> None:
    from quantcli.model.discovery import discover

    structure = discover(save_tiny_model("qwen2", tmp_path / "model"))
    plan = planned(structure, **TOKEN, rollback={"names": ["*.0.*.v_proj"]})
    assert kept(plan) == {f"0.self_attn.{short}" for short in ATTENTION}


@pytest.mark.parametrize(
    ("weights", "calibration", "noted"),
    [
        ({"bits": 4, "method": "mse"}, None, True),
        ({"bits": 4, "method": "mse", "importance": "none"}, {}, True),
        ({"bits": 4, "method": "mse"}, {}, False),
        ({"bits": 8, "method": "mse"}, None, False),
        ({"bits": 8, "type": "float", "method": "mse"}, None, False),
        ({"bits": 4, "method": "minmax"}, None, False),
    ],
)
def test_a_search_of_few_bits_without_inputs_is_noted(
    tiny_llama: Path, weights: dict[str, Any], calibration: dict[str, Any] | None, noted: bool
) -> None:
    recipe = {"model": {"path": str(tiny_llama)}, "calibration": calibration, "quantize": {"weights": weights}}
    found = quantcli.plan({**recipe, "output": "out"}).notes
    assert any("by the error of weights alone" in note for note in found) == noted


def test_the_estimate_counts_what_solving_holds(tmp_path: Path) -> None:
    """Of a random model of this shape the stage quantize took 1.56 GB, and 2.04 GB with asymmetric calibration
    (BENCHMARKS.md). Where what waits is more than may, no batch waits."""
    from quantcli.model.discovery import discover

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "dtype": "bfloat16"}
    tiny_config("llama", **sizes, **heads).save_pretrained(tmp_path)
    structure = discover(tmp_path)

    def estimated(asymmetric: bool, memory: str = "1GiB") -> int:
        weights = {"bits": 4, "granularity": "group", "group_size": 64, "method": "gptq"}
        content = {"model": {"path": "m/n", "cache_memory": memory}, "output": "o", "evaluate": None}
        quantize = {"weights": weights, "gptq": {"asymmetric": asymmetric}}
        content |= {"calibration": {"samples": 16, "sequence_length": 512}, "quantize": quantize}
        return make_plan(load_recipe(content), tmp_path, structure).estimate.memory

    assert estimated(False) == pytest.approx(1.559e9, rel=0.1)
    assert estimated(True) == pytest.approx(2.036e9, rel=0.1)
    waiting = 8192 * 2 * structure.waiting_values(1, 0, compared=False)
    assert waiting < 200 << 20
    assert estimated(False) - estimated(False, "180MiB") == waiting


@given(st.lists(st.integers(1, 300).map(lambda n: n * 16), min_size=1, max_size=4), st.integers(16, 600))
def test_group_size_is_the_largest_that_the_rule_allows(widths: list[int], requested: int) -> None:
    size = dividing_group_size(widths, requested)
    allowed = [2**n for n in range(4, 10) if 2**n <= requested and all(w % 2**n == 0 for w in widths)]
    assert size == (requested if all(w % requested == 0 for w in widths) else max(allowed))


def test_group_size_refusal_names_the_width() -> None:
    assert dividing_group_size([576], 128) == 64
    assert dividing_group_size([24, 48], 24) == 24
    with pytest.raises(RecipeError, match="1000"):
        dividing_group_size([1024, 1000], 128)
    with pytest.raises(RecipeError, match="30"):
        dividing_group_size([32, 30], 8)
