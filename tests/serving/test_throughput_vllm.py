"""evaluate.throughput with vLLM itself, on the CPU: once for each of two models of a few layers.

VLLM_PYTHON names the Python of an environment with vLLM (make serve-test makes one).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

import quantcli

VLLM_PYTHON = os.environ.get("VLLM_PYTHON") and os.path.abspath(os.environ["VLLM_PYTHON"])

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON is not set"),
]


def test_both_models_are_served_and_timed(tmp_path: Path) -> None:
    # heads of 64, since vLLM's attention on a CPU takes no smaller ones
    model = save_tiny_model("llama", tmp_path / "model", with_tokenizer=True, hidden_size=256)
    section = {"python": VLLM_PYTHON, "prompt_tokens": 128, "new_tokens": 16, "batch": 2, "repeats": 2, "rounds": 1,
               "eager": True}  # fmt: skip
    quantcli.run(
        {
            "model": {"path": str(model), "sanity_check": "off"},
            "quantize": {"activations": {"bits": 8, "scope": "token"}},
            "evaluate": {"throughput": section, "generate": None, "output_error": None},
            "output": str(tmp_path / "run"),
        }
    )
    found = json.loads((tmp_path / "run" / "throughput" / "results.json").read_text())
    for name in ("float_model", "quantized"):
        rates = found[name]
        assert len(rates["samples"][0]["prefill"]) == 2
        assert rates["prefill"]["low"] <= rates["prefill"]["median"] <= rates["prefill"]["high"]
        # a step of decoding computes 2 tokens, one of prefill 256
        assert 0 < rates["decode"]["median"] < rates["prefill"]["median"]
        assert 100e6 < rates["peak_memory"] < 20e9
    print(f"vLLM {found['version']} on {found['device']}: {found['change']}")
