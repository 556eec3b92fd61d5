"""What a run found, as its stages left it in their folders, and which gates that keeps."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.errors import GateError
from quantcli.model.checkpoint import read_json
from quantcli.pipeline.context import Context
from quantcli.pipeline.experts import few_tokens, solved_experts, weighed_experts
from quantcli.pipeline.gates import WORST, Gate, Worst, judged, message_of, remove_reports, worst_linears, write_reports
from quantcli.pipeline.patterns import match_names
from quantcli.pipeline.plan import Plan, stored_bytes
from quantcli.pipeline.rundir import room_errors
from quantcli.pipeline.stages import (
    allocate,
    calibrate,
    eval_ppl,
    eval_tasks,
    export,
    quantize,
    search,
    sensitivity,
    smooth,
    throughput,
)
from quantcli.recipe.schema import Recipe
from quantcli.report.numbers import size


@dataclass(frozen=True)
class RunResult:
    """What a run did: directory, plan, records of the stages (fingerprint, files, seconds, reused), scores, memory."""

    path: Path
    plan: Plan
    stages: dict[str, dict[str, Any]]
    perplexity: dict[str, Any] | None
    peak_memory: int
    smoothing: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    rolled_back: dict[str, str] | None = None
    sizes: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    throughput: dict[str, Any] | None = None
    gates: tuple[Gate, ...] = ()
    worst: Worst | None = None

    def to_json(self) -> dict[str, Any]:
        exported = self.stages.get("export", {}).get("files", {})
        return {
            "output": str(self.path),
            "stages": {name: {k: v for k, v in r.items() if k != "files"} for name, r in self.stages.items()},
            "size_before": self.plan.size_before,
            "size_after": self.plan.size_after,
            "bits_per_weight": round(self.plan.bits_per_weight, 3),
            "exports": sorted({str(self.path / "export" / Path(file).parts[0]) for file in exported}),
            "perplexity": self.perplexity,
            "tasks": self.tasks,
            "throughput": self.throughput,
            "gates": [gate.to_json() for gate in self.gates],
            "worst_linears": list(self.worst.linears) if self.worst else [],
            "smoothing": self.smoothing,
            "experts": self.experts,
            "allocation": self.allocation,
            "rolled_back": self.rolled_back,
            "sizes": self.sizes,
            "peak_memory": self.peak_memory,
        }


class MissedGate(GateError):
    """A quality gate that was missed. The run is complete all the same: `result` holds it."""

    def __init__(self, message: str, remedy: str, result: RunResult) -> None:
        super().__init__(message, remedy)
        self.result = result


def run_result(context: Context) -> RunResult:
    """What the stages that are up to date found."""
    return RunResult(
        context.run.path,
        context.plan,
        context.results,
        _perplexity(context),
        _peak_of(context),
        smoothing=_found(context, smooth.STAGE.name, smooth.MANIFEST),
        experts=_experts(context),
        allocation=_allocation(context),
        rolled_back=_rolled_back(context),
        sizes=_sizes(context),
        tasks=_found(context, eval_tasks.STAGE.name, eval_tasks.RESULTS),
        throughput=_found(context, throughput.STAGE.name, throughput.RESULTS),
    )


def with_gates(recipe: Recipe, result: RunResult) -> tuple[RunResult, MissedGate | None]:
    """The result with its gates, which are also written, and what is to be raised if one is missed. Nothing is judged
    before there is an export."""
    section = recipe.evaluate.gates if recipe.evaluate else None
    if section is None or export.STAGE.name not in result.stages:
        return result, None
    assert recipe.export is not None
    found, measured = result.to_json(), result.path / export.STAGE.name / recipe.export.formats[0]
    gates = [
        _with_largest(recipe, result.plan, gate, measured) for gate in judged(section, found, result.path, measured)
    ]
    if not gates:  # the files that an earlier run left say nothing of this one
        remove_reports(result.path)
        return result, None
    schemes = {name: treatment.scheme.name for name, treatment in result.plan.treatments.items()}
    worst = worst_linears(result.path, result.stages, schemes)
    with room_errors(result.path):
        write_reports(result.path, gates, found, worst)
    result = replace(result, gates=tuple(gates), worst=worst)
    missed = [gate for gate in gates if not gate.passed]
    remedy = f"The run is complete in {result.path}; try a milder scheme or roll back more."
    return result, MissedGate(message_of(missed, worst), remedy, result) if missed else None


def _with_largest(recipe: Recipe, plan: Plan, gate: Gate, export: Path) -> Gate:
    """A missed gate of sizes with what is largest in the export: its modules by bytes, or linears by bits a weight."""
    schemes = {name: scheme.name for name, (_, scheme) in plan.schemes.items()}
    if gate.passed or gate.name not in ("size", "size_ratio", "bits_per_weight"):
        return gate
    if gate.name == "bits_per_weight":
        dtype = plan.structure.dtype
        bits = {p.linear.name: 8 * stored_bytes(recipe, p.linear, p.scheme, dtype) / p.linear.weights
                for p in plan.linears if p.scheme is not None}  # fmt: skip
        ranked = sorted(bits.items(), key=lambda item: -item[1])[:WORST]
        return replace(gate, named=tuple(f"{name} {each:.4g} bits ({schemes[name]})" for name, each in ranked))
    from quantcli.pipeline.sizes import largest_modules

    kinds = dict.fromkeys(plan.kept, "float") | schemes
    largest = largest_modules(export, WORST)
    named = (f"{name} {size(each)}{f' ({kinds[name]})' if name in kinds else ''}" for name, each in largest)
    return replace(gate, named=tuple(named))


def _perplexity(context: Context) -> dict[str, Any] | None:
    file = context.folder(eval_ppl.STAGE.name) / eval_ppl.RESULTS
    if eval_ppl.STAGE.name not in context.results or not file.is_file():
        return None
    content: dict[str, Any] = read_json(file)
    content.pop("per_window", None)
    return content


def _found(context: Context, stage: str, file: str) -> dict[str, Any] | None:
    """What a file of a stage that is up to date holds."""
    return read_json(context.folder(stage) / file) if stage in context.results else None


def _experts(context: Context) -> dict[str, Any] | None:
    """How many experts were observed, or solved, and which of them saw fewer than the least number of tokens."""
    content = _found(context, calibrate.STAGE.name, calibrate.MANIFEST)
    found: dict[str, Any] | None = None if content is None else content.get("experts")
    solved = solved_experts(context, quantize.STAGE.name) if quantize.STAGE.name in context.results else {}
    if not solved:
        return found
    least, counted = few_tokens(context), weighed_experts(context) if found else []
    observed = (found["observed"] if found else 0) + len(solved.keys() - {*counted})
    few = {name: count for name, count in solved.items() if count < least}
    return {"observed": observed, "least": least, "few": (found["few"] if found else {}) | few}


def _allocation(context: Context) -> dict[str, Any] | None:
    """What stage allocate chose: linears by scheme, bits a weight, and the budget."""
    found = _found(context, allocate.STAGE.name, allocate.RESULT)
    keys = ("target", "bits_per_weight", "size", "error", "linears")
    return None if found is None else {key: found[key] for key in keys}


def _rolled_back(context: Context) -> dict[str, str] | None:
    """Linears that were rolled back by their rank or by a search, and what went along with them → why; not those that
    the recipe names."""
    section, linears = context.recipe.quantize.rollback, context.plan.linears
    if not {sensitivity.STAGE.name, search.STAGE.name} & context.results.keys():
        return None
    named = match_names(section.names, [each.linear.name for each in linears], "quantize.rollback.names")
    return {p.linear.name: p.reason for p in linears if p.rolled_back and p.linear.name not in named}


def _sizes(context: Context) -> dict[str, Any] | None:
    """Bytes of the float checkpoint and the exports, by part."""
    if export.STAGE.name not in context.results:
        return None
    from quantcli.pipeline.sizes import checkpoint_sizes

    return checkpoint_sizes(context)


def _peak_of(context: Context) -> int:
    """The most memory that any of the stages took, whenever it ran."""
    return max([process_peak(), *(record["peak_memory"] or 0 for record in context.results.values())])


def process_peak() -> int:
    """Bytes. What getrusage says is, on Linux, not less than what the process that started this one had."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
