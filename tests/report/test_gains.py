"""The table of what quantization gained and cost."""

from __future__ import annotations

from typing import Any

from quantcli.report.gains import gain_rows

RESULT: dict[str, Any] = {
    "sizes": {"float": {"bytes": 13e9}, "compressed-tensors": {"bytes": 7.1e9}},
    "perplexity": {"protocol": "golden-stick", "float_model": {"value": 15.130}, "quantized": {"value": 15.129}},
    "tasks": {
        "tasks": {"squad": {"metrics": {"f1": {"float_model": {"value": 0.6048}, "quantized": {"value": 0.6076}}}}}
    },
    "throughput": {
        "float_model": {"prefill": {"median": 17000.4}, "decode": {"median": 30.24}, "peak_memory": 27_000_000_000},
        "quantized": {"prefill": {"median": 16000.0}, "decode": {"median": 21.08}, "peak_memory": 16_000_000_000},
    },
}


def test_rows_are_those_of_golden_sticks_table() -> None:
    assert gain_rows(RESULT) == [
        ("checkpoint, GB ↓", "13.000", "7.100", "-45.38%"),
        ("perplexity (golden-stick) ↓", "15.130", "15.129", "-0.001"),
        ("squad f1, % ↑", "60.48", "60.76", "+0.28"),
        ("prefill, tokens/s ↑", "17000", "16000", "-5.88%"),
        ("decode, tokens/s ↑", "30.24", "21.08", "-30.29%"),
        ("memory in use, GB ↓", "27.000", "16.000", "-40.74%"),
    ]


def test_both_sizes_have_the_decimals_that_show_the_smaller_one() -> None:
    sizes = {"float": {"bytes": 269_000_000}, "dense": {"bytes": 163_480_000}}
    assert gain_rows({"sizes": sizes}) == [("checkpoint, GB ↓", "0.2690", "0.1635", "-39.23%")]


def test_the_arrow_is_that_of_the_metric() -> None:
    error = {"float_model": {"value": 0.2}, "quantized": {"value": 0.25}, "lower_is_better": True}
    rows = gain_rows({"tasks": {"tasks": {"x": {"metrics": {"error_rate": error}}}}})
    assert rows == [("x error rate, % ↓", "20.00", "25.00", "+5.00")]


def test_what_was_not_measured_has_no_row_and_what_is_undefined_a_dash() -> None:
    assert gain_rows({}) == []
    served = {"prefill": {"median": 5.0}, "decode": {"median": None}, "peak_memory": None}
    assert gain_rows({"throughput": {"float_model": served, "quantized": served}}) == [
        ("prefill, tokens/s ↑", "5", "5", "+0.00%"),
        ("decode, tokens/s ↑", "–", "–", "–"),
        ("memory in use, GB ↓", "–", "–", "–"),
    ]
    undefined = {"protocol": "standard", "float_model": {"value": 20.0}, "quantized": {"value": None}}
    assert gain_rows({"perplexity": undefined}) == [("perplexity (standard) ↓", "20.000", "–", "–")]
