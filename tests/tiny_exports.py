"""Tiny models quantized and exported, for every test that needs a quantized checkpoint.

    made = export_tiny(tmp_path, SCHEMES["W4A16 g32"], "llama")

The steps are those of the pipeline, without its run directory: structure, codes by min-max, store, checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import save_tiny_model, token_batches
from torch import Tensor, nn

from quantcli.formats import compressed_tensors
from quantcli.formats.export import Source, export_checkpoint
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.formats.store import Store, StoredLinear, write_block, write_manifest
from quantcli.formats.verify import Verified, verify_checkpoint
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.names import weight_tensors
from quantcli.model.structure import Linear, Structure
from quantcli.quant.activation import static_parameters
from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.methods import WEIGHT_METHODS
from quantcli.quant.scheme import Scheme

WEIGHT_ONLY = {
    "W8A16": Scheme(8),
    "W8A16 asym": Scheme(8, symmetric=False),
    "W8A16 g32": Scheme(8, granularity="group", group_size=32),
    "W8A16 tensor": Scheme(8, granularity="tensor"),
    "W4A16": Scheme(4),
    "W4A16 g64": Scheme(4, granularity="group", group_size=64),
    "W4A16 g32": Scheme(4, granularity="group", group_size=32),
    "W4A16 g32 asym": Scheme(4, symmetric=False, granularity="group", group_size=32),
    "W4A16 tensor asym": Scheme(4, symmetric=False, granularity="tensor"),
    "W3A16 g32": Scheme(3, granularity="group", group_size=32),
    "W3A16 g32 asym": Scheme(3, symmetric=False, granularity="group", group_size=32),
    "W2A16 g32": Scheme(2, granularity="group", group_size=32),
}
WITH_ACTIVATIONS = {
    "W8A8 dynamic": Scheme(8, activations="dynamic"),
    "W8A8 dynamic tensor": Scheme(8, granularity="tensor", activations="dynamic"),
    "W8A8 static": Scheme(8, activations="static"),
    "W8A8 static asym": Scheme(8, activations="static", activations_symmetric=False),
}
SCHEMES = WEIGHT_ONLY | WITH_ACTIVATIONS


@dataclass(frozen=True)
class Export:
    """An exported checkpoint and what it was made from."""

    folder: Path
    model: Path
    structure: Structure
    store: Store
    source: Source

    @property
    def linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.structure.linears()}

    def reader(self) -> QuantizedCheckpoint:
        return QuantizedCheckpoint(self.folder, self.linears, self.source.weights)

    def verify(self) -> Verified:
        return verify_checkpoint(self.folder, self.store, self.source.checkpoint, self.source.weights, self.source.cast)

    def write(self, folder: Path) -> list[Path]:
        """Export once more, elsewhere; the files in the order in which they were finished."""
        written = export_checkpoint(folder, compressed_tensors, self.store, self.source, self.linears)
        return [file for file, _ in written]


def export_tiny(
    place: Path,
    scheme: Scheme,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    cast: str | None = None,
    kept: Collection[str] = (),
    with_tokenizer: bool = False,
    **changes: Any,
) -> Export:
    """A random model of `family` under `place`, all its decoder linears but `kept` quantized by min-max."""
    if family != "gpt2":
        changes = {"ffn_dim" if family == "opt" else "intermediate_size": 128, **changes}
    model = save_tiny_model(family, place / "model", dtype=dtype, with_tokenizer=with_tokenizer, **changes)
    structure = discover(model, dtype=cast or "auto")
    checkpoint = Checkpoint(model)
    weights = weight_tensors(model, structure, checkpoint.entries)
    ranges = _input_ranges(model) if scheme.activations == "static" else {}
    schemes = {}
    for index, block in enumerate(structure.blocks):
        stored = {}
        for linear in block.linears:
            if linear.name not in kept:
                weight = checkpoint.read([weights[linear.name]])[weights[linear.name]]
                stored[linear.name] = _quantize(weight, scheme, structure.dtype, ranges.get(linear.name))
                schemes[linear.name] = (index, scheme)
        place.joinpath("store").mkdir(parents=True, exist_ok=True)
        write_block(place / "store", index, stored)
    reasons = dict.fromkeys(kept, "asked for") | ({structure.head: "output head"} if structure.head else {})
    write_manifest(place / "store", structure.dtype, schemes, reasons)
    source = Source(checkpoint, weights, getattr(torch, cast) if cast else None)
    made = Export(place / "export", model, structure, Store(place / "store"), source)
    made.write(made.folder)
    return made


def _quantize(weight: Tensor, scheme: Scheme, dtype: str, seen: tuple[float, float] | None) -> StoredLinear:
    scale_dtype = getattr(torch, scheme.scale_dtype(dtype))
    grid = WeightGrid(scheme.bits, scheme.symmetric, scheme.granularity, scheme.group_size, scale_dtype)
    quantized = QuantizedWeight(*WEIGHT_METHODS["minmax"](weight, grid, None))
    if seen is None:
        return StoredLinear(quantized)
    scale, zero = static_parameters(*seen, scheme.activations_symmetric)
    return StoredLinear(quantized, scale, None if scheme.activations_symmetric else zero)


def _input_ranges(directory: Path) -> dict[str, tuple[float, float]]:
    """Smallest and largest input value of every linear on random tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ranges: dict[str, tuple[float, float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: ranges.update({name: (args[0].min().item(), args[0].max().item())})
            )
    with torch.inference_mode():
        model(token_batches((4, 32))[0])
    return ranges
