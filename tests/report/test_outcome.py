"""The rows that a user reads at the end of a run and in a plan."""

from __future__ import annotations

from typing import Any

import pytest

from quantcli.report.numbers import TYPESET
from quantcli.report.outcome import outcome_rows, scheme_rows


def linear(name: str, scheme: str, reason: str = "", shape: tuple[int, int] = (64, 32)) -> dict[str, Any]:
    return {"name": name, "scheme": scheme, "reason": reason, "shape": list(shape)}


PLAN = {
    "linears": [
        *(linear(f"model.layers.{i}.self_attn.q_proj", "W4A16 g32") for i in range(12)),
        *(linear(f"model.layers.{i}.mlp.down_proj", "W4A16 g32", shape=(64, 96)) for i in range(11)),
        linear("model.layers.11.mlp.down_proj", "float", "rolled back by *.11.*", (64, 96)),
        linear("lm_head", "float", "output head", (512, 64)),
    ],
    "notes": ["Group size 128 does not divide every input width; 32 is used."],
}
RESULT = {
    "size_before": 200_000_000,
    "size_after": 75_000_000,
    "perplexity": {
        "float_model": {"value": 20.6412, "error": 0.31},
        "quantized": {"value": 21.0541, "error": 0.33},
        "increase": 0.02,
        "increase_error": 0.0012,
        "increase_interval": [0.0177, 0.0224],
        "kl_divergence": 0.01234,
        "kl_error": 0.0001,
        "kl": {"50": 0.004, "99": 0.1234},
        "per_text": {
            "bits_per_byte": {"float_model": {"value": 1.1, "error": 0.01}, "quantized": {"value": 1.2, "error": 0.01}}
        },
        "agreement": 0.953,
        "protocol": "standard",
        "windows": 40,
        "sequence_length": 1024,
        "tokens": 40920,
    },
    "stages": {"quantize": {"reused": True, "seconds": 0.0}, "export": {"seconds": 1.26}},
    "peak_memory": 1_230_000_000,
    "exports": ["out/export/compressed-tensors"],
}


def test_the_outcome_states_every_number_with_its_uncertainty() -> None:
    rows = list(outcome_rows(PLAN, RESULT))
    assert rows == [
        ("schemes", "23 linears W4A16 g32, 2 linears float"),
        ("note", "Group size 128 does not divide every input width; 32 is used."),
        ("size", "200.0 MB → 75.0 MB (-62.5%)"),
        ("perplexity", "20.641 ± 0.310 → 21.054 ± 0.330 (+2.00% ± 0.12%; 95% interval +1.77% to +2.24%)"),
        ("KL divergence", "0.0123 ± 0.0001 nats a token, 0.123 for 1 in 100"),
        ("same top token", "95.3%"),
        ("bits per byte", "1.100 ± 0.010 → 1.200 ± 0.010"),
        ("protocol", "standard, 40 windows of 1024, 40920 tokens"),
        ("time", "export 1.3 s; up to date: quantize"),
        ("peak memory", "1.23 GB"),
        ("checkpoint", "out/export/compressed-tensors"),
    ]


def test_on_the_page_numbers_are_set_with_the_decimals_of_their_kind() -> None:
    stages = RESULT["stages"] | {"smooth": {"seconds": 190.3}}  # type: ignore[operator]
    rows = dict(outcome_rows(PLAN, RESULT | {"stages": stages}, TYPESET))
    assert rows["size"] == "200.0 MB → 75.0 MB (−62.50\u00a0%)"
    assert rows["perplexity"] == (
        "20.641 ± 0.310 → 21.054 ± 0.330 (+2.00\u00a0% ± 0.12\u00a0%; 95\u00a0% interval +1.77\u00a0% to +2.24\u00a0%)"
    )
    assert rows["KL divergence"] == "0.0123 ± 0.0001 nats a token, 0.123 for 1 in 100"
    assert rows["same top token"] == "95.30\u00a0%"
    assert rows["time"] == "export 1.3 s, smooth 3.2 min; up to date: quantize"


def test_numbers_that_json_cannot_hold_are_undefined_and_not_zero() -> None:
    scores = {
        **RESULT["perplexity"],  # type: ignore[dict-item]
        "quantized": {"value": None, "error": None},
        "increase": None,
        "increase_error": None,
        "increase_interval": [None, None],
        "windows": 1,
    }
    rows = dict(outcome_rows(PLAN, {**RESULT, "perplexity": scores}))
    assert rows["perplexity"] == "20.641 ± 0.310 → undefined ± undefined (undefined ± undefined)"
    assert rows["protocol"].startswith("standard, 1 window of 1024, ")


@pytest.mark.parametrize(
    ("arithmetic", "said"),
    [
        ("engine", ""),
        ("transformers", ", inputs rounded as by transformers"),
        ("vllm-cpu", ", cache rounded towards zero as by vLLM on a CPU"),
    ],
)
def test_another_arithmetic_than_that_of_engines_is_said(arithmetic: str, said: str) -> None:
    scores = {**RESULT["perplexity"], "arithmetic": arithmetic}  # type: ignore[dict-item]
    rows = dict(outcome_rows(PLAN, {**RESULT, "perplexity": scores}))
    assert rows["protocol"].endswith(f"40920 tokens{said}")


def test_the_protocol_is_told_with_all_that_the_number_depends_on() -> None:
    scores = {
        **RESULT["perplexity"],  # type: ignore[dict-item]
        "protocol": "golden-stick",
        "data": {"dataset": "wikitext2", "file": "wiki.valid.tokens", "split": None, "digest": "0" * 64},
        "begin": [],
        "batch_size": 4,
        "masked": {"token": 0, "predictions": 3},
    }
    rows = dict(outcome_rows(PLAN, {**RESULT, "perplexity": scores}))
    assert rows["protocol"] == (
        "golden-stick, wikitext2 wiki.valid.tokens, 40 windows of 1024, mean over batches of 4, 40920 tokens, "
        "3 predictions of 0 masked"
    )
    scores |= {"protocol": "standard", "batch_size": None, "masked": None, "begin": [2], "stride": 512}
    scores |= {"data": {"dataset": "builtin", "file": None, "split": "test", "digest": "0" * 64}}
    rows = dict(outcome_rows(PLAN, {**RESULT, "perplexity": scores}))
    assert rows["protocol"] == (
        "standard, builtin test, 40 windows of 1024 every 512 tokens, begun with 2, 40920 tokens"
    )


def test_a_run_without_evaluation_says_nothing_of_perplexity() -> None:
    labels = [label for label, _ in outcome_rows(PLAN, {**RESULT, "perplexity": None})]
    assert labels == ["schemes", "note", "size", "time", "peak memory", "checkpoint"]


def test_what_was_smoothed_stands_behind_the_schemes() -> None:
    def row(**smoothing: Any) -> str:
        rows = list(outcome_rows(PLAN, {**RESULT, "smoothing": smoothing}))
        assert [label for label, _ in rows[:3]] == ["schemes", "smoothing", "note"]
        return rows[1][1]

    methods = {"iterative": 30, "smoothquant": 17}
    assert row(methods=methods, left={}, rotated=[]) == "47 groups of linears scaled (iterative 30, smoothquant 17)"
    assert row(methods={"awq": 1}, left={"check": 1, "no gain": 4}, rotated=["residual stream"]) == (
        "residual stream rotated; 1 group of linears scaled (awq 1); 5 left as found (check 1, no gain 4)"
    )
    found = {"none, descent": 1, "strength 0.5 0": 2, "strength 0.8 0.3, descent": 3}
    assert row(methods=found, left={}, rotated=[]) == "6 groups of linears scaled (descent 1, strength 5)"
    assert row(methods={}, left={}, rotated=["residual stream", "heads"]) == "residual stream rotated; heads rotated"
    assert row(methods={}, left={}, rotated=[]) == "0 groups of linears scaled"
    assert "smoothing" not in dict(outcome_rows(PLAN, {**RESULT, "smoothing": None}))


def test_linears_that_differ_in_their_block_alone_share_a_row() -> None:
    assert list(scheme_rows(PLAN["linears"])) == [  # type: ignore[arg-type]
        ("model.layers.*.self_attn.q_proj", "12", "64 × 32", "W4A16 g32", ""),
        ("model.layers.*.mlp.down_proj", "11", "64 × 96", "W4A16 g32", ""),
        ("model.layers.*.mlp.down_proj", "1", "64 × 96", "float", "rolled back by *.11.*"),
        ("lm_head", "1", "512 × 64", "float", "output head"),
    ]
    every = list(scheme_rows(PLAN["linears"], every=True))  # type: ignore[arg-type]
    assert [row[0] for row in every] == [entry["name"] for entry in PLAN["linears"]]  # type: ignore[index]
    assert all(row[1] == "1" for row in every)


def test_mixed_bits_are_told_with_their_budget() -> None:
    found = {"target": {"bits_per_weight": 4.5}, "bits_per_weight": 4.4913, "linears": {"W4A16 g64": 23, "float": 1}}
    rows = dict(outcome_rows(PLAN, {**RESULT, "allocation": found}))
    assert rows["mixed bits"] == "4.491 bits a weight for at most 4.5 bits: 23 linears W4A16 g64, 1 linear float"
    rows = dict(outcome_rows(PLAN, {**RESULT, "allocation": {**found, "target": {"size": 0.07}}}))
    assert "for at most 0.07 GB:" in rows["mixed bits"]
    assert "mixed bits" not in dict(outcome_rows(PLAN, RESULT))


def test_linears_that_were_ranked_or_found_are_named_with_their_rank() -> None:
    ranked = {
        "model.layers.1.mlp.down_proj": "rolled back by range_parm 5.523, to W8A8-dynamic",
        "model.layers.0.mlp.gate_proj": "rolled back by range_parm 4.381",
        "model.layers.0.mlp.up_proj": "fused with gate_proj in serving engines",
    }
    rows = dict(outcome_rows(PLAN, {**RESULT, "rolled_back": ranked}))
    assert rows["rolled back"] == (
        "model.layers.1.mlp.down_proj (range_parm 5.523), model.layers.0.mlp.gate_proj (range_parm 4.381), "
        "model.layers.0.mlp.up_proj"
    )
    many = {f"model.layers.{i}.mlp.down_proj": "rolled back to reach KL 0.01" for i in range(70)}
    rows = dict(outcome_rows(PLAN, {**RESULT, "rolled_back": many}))
    assert rows["rolled back"].endswith("model.layers.63.mlp.down_proj and 6 more")
    assert "rolled back" not in dict(outcome_rows(PLAN, {**RESULT, "rolled_back": {}}))
