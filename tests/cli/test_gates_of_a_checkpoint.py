"""Gates of a recipe that scores a checkpoint alone: judged where they can be, and named where they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(("bound", "status"), [(0.0, 4), (1e6, 0)])
def test_gates_of_predictions_are_judged_beside_the_float_model(
    quantcli: Callable[..., Any], recipe_file: Callable[..., Path], finished: Path, tiny_llama: Path,
    bound: float, status: int,
) -> None:  # fmt: skip
    gates = {"kl_divergence": bound, "agreement": "0%", "size": "1B", "fallbacks": {"all": 0}}
    file = recipe_file(**{"evaluate.gates": gates})
    command = ("eval-ppl", file, "--checkpoint", finished / "export" / "compressed-tensors", "--json")
    judged = quantcli(*command, "--model", tiny_llama)
    assert judged.status == status
    found = json.loads(judged.out)
    assert [(gate["name"], gate["passed"]) for gate in found["gates"]] == [
        ("kl_divergence", status == 0),
        ("agreement", True),
    ]
    assert found["gates"][0]["value"] == found["kl_divergence"]
    assert "not judged of a checkpoint alone: size, fallbacks.all; a run judges them." in judged.err
    assert ("evaluate.gates.kl_divergence" in judged.err) == bool(status) == bool(found["missed_gate"])


def test_without_the_float_model_a_warning_names_them(
    quantcli: Callable[..., Any], recipe_file: Callable[..., Path], finished: Path
) -> None:
    file = recipe_file(**{"evaluate.gates": {"perplexity_increase": "1%", "bits_per_weight": 9}})
    found = quantcli("eval-ppl", file, "--checkpoint", finished / "export" / "compressed-tensors", "--json")
    assert found.status == 0
    assert "not judged of a checkpoint alone: perplexity_increase, bits_per_weight;" in found.err
    assert json.loads(found.out)["gates"] == []
