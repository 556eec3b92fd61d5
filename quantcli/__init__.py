"""quantcli: post-training quantization of language models, from a recipe.

    import quantcli

    result = quantcli.run("w8a16", model="./Qwen2.5-0.5B", output="./out")
    quantcli.run_stage("quantize", "recipe.yaml")
    plan = quantcli.plan({"model": {"path": "./Qwen2.5-0.5B"}, "quantize": {}, "output": "./out"})

A recipe is a file, the name of a shipped one, or a mapping. Errors are `quantcli.errors.QuantcliError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantcli.pipeline.context import Listener
    from quantcli.pipeline.plan import Plan
    from quantcli.pipeline.result import RunResult

__version__ = "0.1.0"
__all__ = ["plan", "run", "run_stage"]


def run(
    recipe: str | Path | Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Bring all stages of a run up to date. `overrides` are `key=value` as after --set; `listener` gets every event;
    `overwrite` lets files of an export be replaced that somebody changed.

    A missed quality gate raises GateError, whose attribute `result` is what would have been returned.
    """
    return run_stage(
        None,
        recipe,
        overrides=overrides,
        model=model,
        output=output,
        device=device,
        listener=listener,
        overwrite=overwrite,
    )


def run_stage(
    stage: str | None,
    recipe: str | Path | Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
    listener: Listener | None = None,
    overwrite: bool = False,
) -> RunResult:
    """Bring one stage, and those before it, up to date: calibrate, quantize, export, verify or eval-ppl."""
    from quantcli.pipeline.engine import run_recipe
    from quantcli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, model=model, output=output, device=device)
    return run_recipe(loaded, until=stage, listener=listener, overwrite=overwrite)


def plan(
    recipe: str | Path | Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
) -> Plan:
    """What a run would do: every linear with its scheme, sizes, estimates and engines. Weights are not read."""
    from quantcli.pipeline.engine import plan_recipe
    from quantcli.recipe import load_recipe

    # a plan writes nothing, so it needs no place to write to
    loaded = load_recipe(recipe, overrides, model=model, output=output, device=device, default_output="runs")
    return plan_recipe(loaded)
