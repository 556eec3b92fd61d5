"""vLLM, on the CPU, serves a real model with quantized weights and float inputs, and computes what eval-ppl says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.serving

GROUPS = ["calibration=null", "quantize.weights.group_size=64", "quantize.weights.importance=none"]
RUNS = {
    "W4A16 g64": [],
    "W4A16 g64 asym": ["quantize.weights.symmetric=false"],
    "GPTQ": ["export.formats=[gptq]"],
    "AWQ": [
        'quantize.rollback.names=["*.mlp.down_proj"]', "quantize.weights.symmetric=false", "export.formats=[awq]",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_vllm_has_the_reported_perplexity(
    name: str, smollm2: Path, run: Callable[..., Path], served: Callable[..., Any]
) -> None:
    output = run("float-inputs", "w4a16", smollm2, (10, 512), *GROUPS, *RUNS[name])
    found = served(output, "The capital of France is")
    assert found.perplexity == pytest.approx(found.reported, rel=0.01)
    assert "Paris" in found.text
