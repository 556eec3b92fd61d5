"""inspect: what a path is."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError
from quantcli.formats.declared import read_configuration
from quantcli.formats.table import find_format, open_weights
from quantcli.model.checkpoint import read_json
from quantcli.model.float_weights import require_floats
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.rundir import RECORD, is_run
from quantcli.pipeline.source import locate_model, where_checkpoints_are
from quantcli.recipe.schema import ModelSection


def inspect_path(path: Path) -> dict[str, Any]:
    """Facts about a model directory, a .gguf file, a quantized checkpoint or a run directory."""
    if is_run(path):
        return _inspect_run(path)
    directory = locate_model(ModelSection(path=str(path.absolute()))) if path.is_file() else path
    if not directory.is_dir():
        raise ModelError(f"There is nothing at {path}.", "Check the path.")
    if not (directory / "config.json").is_file():
        raise ModelError(f"{path} is neither a model, a checkpoint nor a run directory.", where_checkpoints_are(path))
    structure = find_structure(directory)
    checkpoint = open_weights(directory)
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
    if layers := [block.experts for block in structure.blocks if block.experts]:
        count = sum(len(experts.linears) for layer in layers for experts in layer)
        facts["experts"] = f"{count} in {len(layers)} layers"
    if (form := find_format(directory, read_configuration(directory, checkpoint.entries))) is not None:
        from quantcli.pipeline.standalone import open_checkpoint

        _, quantized, _ = open_checkpoint(directory)
        schemes = Counter(scheme.name for scheme in quantized.schemes.values())
        facts |= {"kind": f"quantized checkpoint ({form.NAME})"}
        facts |= {"schemes": ", ".join(f"{count} × {name}" for name, count in schemes.items())}
        if quantized.attention is not None:
            facts["attention"] = quantized.attention.name
        if disputed := quantized.disputed:
            facts["zero points"] = disputed
    else:
        require_floats(directory, structure, checkpoint)
    return facts


def _inspect_run(path: Path) -> dict[str, Any]:
    record = read_json(path / RECORD)
    facts: dict[str, Any] = {"kind": "run directory", "model": record.get("model")}
    stages = record.get("stages", {})
    for name, stage in stages.items():
        count = len(stage.get("files", {}))
        seconds = "" if stage.get("seconds") is None else f", {stage['seconds']:.1f} s"
        facts[name] = f"{count} file{'' if count == 1 else 's'}{seconds}"
    results = path / "eval-ppl" / "results.json"
    if "eval-ppl" in stages and results.is_file():
        scores = json.loads(results.read_text(encoding="utf-8"))
        values = [scores[name]["value"] for name in ("float_model", "quantized")]
        facts["perplexity"] = " → ".join("undefined" if value is None else f"{value:.3f}" for value in values)
    return facts
