"""quantize: codes and scales of every planned linear, block by block, into the neutral store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder
from quantcli.quant.scheme import Scheme

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor

    from quantcli.formats.store import StoredLinear
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.quant.grid import WeightGrid

    Jobs = dict[str, Future[tuple[StoredLinear, dict[str, Any]]]]


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    return {
        "quantize": recipe.quantize.model_dump(mode="json"),
        "dtype": recipe.model.dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        "device": context.device,
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes block-00000.safetensors … and manifest.json, as `formats.store` describes. No forward pass is made.

    Raises ModelError, with the module, for weights that are not finite.
    """
    from quantcli.formats.store import MANIFEST, block_file, write_block, write_manifest
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.names import weight_tensors
    from quantcli.model.workers import linear_workers

    checkpoint = Checkpoint(context.model)
    trust = context.recipe.model.trust_remote_code
    weights = weight_tensors(context.model, context.plan.structure, checkpoint.entries, trust_remote_code=trust)
    by_block: dict[int, list[tuple[str, Scheme]]] = {}
    for name, (block, scheme) in context.plan.schemes.items():
        by_block.setdefault(block, []).append((name, scheme))
    with linear_workers(context.device) as workers:

        def submit(index: int) -> Jobs:
            # the largest first, so that no worker is left alone with it
            heaviest = sorted(by_block[index], key=lambda entry: -context.linears[entry[0]].weights)
            return {
                name: workers.submit(_quantize, context, checkpoint, weights[name], index, name, scheme)
                for name, scheme in heaviest
            }

        def finish(index: int, jobs: Jobs) -> None:
            started = time.perf_counter()
            stored = {}
            for name, scheme in by_block[index]:
                stored[name], facts = jobs.pop(name).result()
                context.emit("linear", module=name, scheme=scheme.name, **facts)
            folder.add(block_file(folder.path, index), write_block(folder.path, index, stored))
            context.emit("block", index=index, of=context.blocks, seconds=round(time.perf_counter() - started, 3))

        # one block ahead: the workers go on while a finished block is written
        ahead: tuple[int, Jobs] | None = None
        try:
            for index in sorted(by_block):
                if not folder.adopt(block_file(folder.path, index)):
                    behind, ahead = ahead, (index, submit(index))
                    if behind is not None:
                        finish(*behind)
            if ahead is not None:
                finish(*ahead)
        finally:
            workers.shutdown(cancel_futures=True)
    write_manifest(folder.path, context.plan.structure.dtype, context.plan.schemes, context.plan.kept)
    folder.add(folder.path / MANIFEST)


def _quantize(
    context: Context, checkpoint: Checkpoint, tensor: str, block: int, name: str, scheme: Scheme
) -> tuple[StoredLinear, dict[str, Any]]:
    """Codes and scales of one linear, and the facts that events.jsonl keeps of it."""
    import torch

    from quantcli.formats.store import StoredLinear
    from quantcli.quant.activation import static_parameters
    from quantcli.quant.grid import QuantizedWeight
    from quantcli.quant.methods import WEIGHT_METHODS, weight_error

    weight = checkpoint.read([tensor])[tensor]
    weight = (weight.t().contiguous() if context.linears[name].transposed else weight).to(context.device)
    statistics = _statistics(context, block, name)
    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ModelError(f"{name}.weight holds values that are not finite.", "The checkpoint is damaged; get it again.")
    section = context.recipe.quantize.weights
    grid = _grid(scheme, context.plan.structure.dtype)
    importance = None
    if section.importance == "second_moment":
        assert statistics is not None
        importance = statistics["second_moment"].to(context.device)
    codes, scale, zero_point = WEIGHT_METHODS[section.method](weight, grid, importance)
    quantized = QuantizedWeight(codes.cpu(), scale.cpu(), None if zero_point is None else zero_point.cpu())
    facts: dict[str, Any] = {"scale_max": float(f"{scale.abs().max().item():.6g}")}
    if section.method != "minmax":
        facts["error"] = float(f"{weight_error(weight, QuantizedWeight(codes, scale, zero_point), importance):.6g}")
    if scheme.activations != "static":
        return StoredLinear(quantized), facts
    assert statistics is not None
    low_input, high_input = statistics["minimum"].min().item(), statistics["maximum"].max().item()
    input_scale, input_zero = static_parameters(low_input, high_input, scheme.activations_symmetric)
    facts |= {"input_min": float(f"{low_input:.6g}"), "input_max": float(f"{high_input:.6g}")}
    return StoredLinear(quantized, input_scale, None if scheme.activations_symmetric else input_zero), facts


def _grid(scheme: Scheme, dtype: str) -> WeightGrid:
    import torch

    from quantcli.quant.grid import WeightGrid

    scale_dtype = getattr(torch, scheme.scale_dtype(dtype))
    return WeightGrid(scheme.bits, scheme.symmetric, scheme.granularity, scheme.group_size, scale_dtype)


def _statistics(context: Context, block: int, linear: str) -> dict[str, Tensor] | None:
    """The statistics of the linear's input, or None when the recipe calibrates nothing."""
    from safetensors import safe_open

    file = context.folder("calibrate") / f"block-{block:05d}.safetensors"
    shared = next(s for s in context.plan.structure.blocks[block].inputs if linear in s.linears)
    if "calibrate" not in context.results:
        return None
    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.rpartition(".")[0] == shared.name]  # noqa: SIM118
        return {name.rpartition(".")[2]: opened.get_tensor(name) for name in names}


def _writes(context: Context) -> tuple[str, ...]:
    from quantcli.formats.store import MANIFEST, block_file

    return (*(block_file(Path(), index).name for index in range(context.blocks)), MANIFEST)


STAGE = Stage("quantize", ("calibrate",), lambda recipe: True, _identity, run, _writes)
