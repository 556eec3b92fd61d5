"""inspect: what a path is."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.rundir import RECIPE, RECORD
from quantcli.pipeline.source import locate_model
from quantcli.recipe.schema import ModelSection


def inspect_path(path: Path) -> dict[str, Any]:
    """Facts about a model directory, a .gguf file, a quantized checkpoint or a run directory."""
    if (path / RECIPE).is_file():
        return _inspect_run(path)
    directory = locate_model(ModelSection(path=str(path.resolve()))) if path.suffix == ".gguf" else path
    if not directory.is_dir():
        raise ModelError(f"There is nothing at {path}.", "Check the path.")
    structure = find_structure(directory)
    checkpoint = Checkpoint(directory)
    facts: dict[str, Any] = {
        "kind": "float model",
        "architecture": structure.architecture,
        "dtype": structure.dtype,
        "parameters": sum(map(prod, structure.parameters.values())),
        "bytes": checkpoint.nbytes,
        "files": len(checkpoint.files),
        "blocks": len(structure.blocks),
        "linears": sum(1 for _ in structure.linears()),
        "head": "tied to the embedding" if structure.tied else structure.head,
    }
    if any(block.experts for block in structure.blocks):
        facts["experts"] = "mixture of experts"
    if (config := read_json(directory / "config.json").get("quantization_config")) is not None:
        from quantcli.formats.reader import QuantizedCheckpoint

        linears = {linear.name: linear for linear in structure.linears()}
        quantized = QuantizedCheckpoint(directory, linears, {name: f"{name}.weight" for name in linears})
        schemes = Counter(scheme.name for scheme in quantized.schemes.values())
        facts |= {"kind": f"quantized checkpoint ({config.get('quant_method')})"}
        facts |= {"schemes": ", ".join(f"{count} linears {name}" for name, count in schemes.items())}
    return facts


def _inspect_run(path: Path) -> dict[str, Any]:
    record = json.loads((path / RECORD).read_text(encoding="utf-8")) if (path / RECORD).is_file() else {}
    facts: dict[str, Any] = {"kind": "run directory"}
    for name, stage in record.get("stages", {}).items():
        facts[name] = f"{len(stage['files'])} files, {stage['seconds']:.1f} s"
    results = path / "eval-ppl" / "results.json"
    if results.is_file():
        scores = json.loads(results.read_text(encoding="utf-8"))
        facts["perplexity"] = f"{scores['float_model']['value']:.3f} → {scores['quantized']['value']:.3f}"
    return facts
