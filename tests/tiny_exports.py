"""Tiny models quantized and exported, for every test that needs a quantized checkpoint.

    made = export_tiny(tmp_path, SCHEMES["W4A16 g32"], "llama")

The steps are those of the pipeline, without its run directory: structure, codes by min-max, store, checkpoint.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model, token_batches
from torch import Tensor, nn

from quantcli.formats.export import Source, export_checkpoint, tied_head
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.formats.store import Store, StoredLinear, write_block, write_manifest
from quantcli.formats.table import FORMATS
from quantcli.formats.verify import Verified, verify_checkpoint
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.discovery import discover
from quantcli.model.names import weight_tensors
from quantcli.model.structure import Linear, Structure
from quantcli.quant.activation import static_parameters
from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.methods import WEIGHT_METHODS
from quantcli.quant.scheme import AttentionScheme, Scheme

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
    "W8A8 dynamic asym": Scheme(8, activations="dynamic", activations_symmetric=False),
    "W8A8 dynamic tensor asym": Scheme(8, granularity="tensor", activations="dynamic", activations_symmetric=False),
    "W8A8 static": Scheme(8, activations="static"),
    "W8A8 static asym": Scheme(8, activations="static", activations_symmetric=False),
}
PACKED_WITH_ACTIVATIONS = {
    "W4A8 dynamic": Scheme(4, activations="dynamic"),
    "W4A8 dynamic g32": Scheme(4, granularity="group", group_size=32, activations="dynamic"),
    "W4A4 dynamic": Scheme(4, activations="dynamic", activation_bits=4),
    "W4A4 dynamic g32": Scheme(4, granularity="group", group_size=32, activations="dynamic", activation_bits=4),
    "W8A4 dynamic": Scheme(8, activations="dynamic", activation_bits=4),
    "W8A8 dynamic g32": Scheme(8, granularity="group", group_size=32, activations="dynamic"),
    "W3A8 dynamic g32": Scheme(3, granularity="group", group_size=32, activations="dynamic"),
}
WITH_ACTIVATIONS |= PACKED_WITH_ACTIVATIONS
FLOAT8 = {
    "W8A16 fp8": Scheme(8, type="float"),
    "W8A16 fp8 tensor": Scheme(8, granularity="tensor", type="float"),
    "W8A8 fp8 dynamic": Scheme(8, activations="dynamic", type="float"),
    "W8A8 fp8 static": Scheme(8, activations="static", type="float"),
    "W8A8 fp8 static tensor": Scheme(8, granularity="tensor", activations="static", type="float"),
}
WEIGHT_ONLY |= {name: scheme for name, scheme in FLOAT8.items() if scheme.activations == "none"}
WITH_ACTIVATIONS |= {name: scheme for name, scheme in FLOAT8.items() if scheme.activations != "none"}
SCHEMES = WEIGHT_ONLY | WITH_ACTIVATIONS


def weights(bits: int, symmetric: bool = True, group_size: int | None = 32) -> Scheme:
    """The scheme of weights for gptq and awq, whose scales are float16."""
    granularity = "group" if group_size else "channel"
    return Scheme(bits, symmetric, granularity, group_size, float16_scales=True)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Export:
    """An exported checkpoint and what it was made from."""

    folder: Path
    model: Path
    structure: Structure
    store: Store
    source: Source
    form: str = "compressed-tensors"

    @property
    def linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.structure.matrices()}

    @property
    def split(self) -> set[str]:
        return {linear.name for linear in self.structure.matrices() if linear.splits_input}

    @property
    def transposed(self) -> set[str]:
        return {linear.name for linear in self.structure.matrices() if linear.transposed}

    def reader(self) -> QuantizedCheckpoint:
        return QuantizedCheckpoint(self.folder, self.linears, self.source.weights)

    def verify(self) -> Verified:
        source = self.source
        return verify_checkpoint(
            self.folder, self.store, source.checkpoint, source.weights, source.cast, self.form, source.tied, self.split,
            self.transposed,
        )  # fmt: skip

    def write(self, folder: Path) -> list[Path]:
        """Export once more, elsewhere; the files in the order in which they were finished."""
        written = export_checkpoint(folder, FORMATS[self.form], self.store, self.source, self.linears)
        return [file for file, _ in written]


def flip_bit(file: Path, place: float, bit: int) -> None:
    """Flip a bit of the tensors of a safetensors file: at `place`, from 0 to 1, of their bytes."""
    data = bytearray(file.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    data[begin + int(place * (len(data) - begin))] ^= 1 << bit
    file.write_bytes(data)


def shuffle_groups(folder: Path, **said: Any) -> None:
    """Make of an export in `gptq` one whose groups are not of neighbouring inputs, as tools write it that round in an
    order: the codes stay and belong to the scales of other groups. `said`: what quantization_config says of it.
    """
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(5)
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))
    for beside in ("quantize_config.json", "SHA256SUMS"):
        (folder / beside).unlink(missing_ok=True)


def export_tiny(
    place: Path,
    scheme: Scheme,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    cast: str | None = None,
    kept: Collection[str] = (),
    others: Mapping[str, Scheme] | None = None,
    attention: AttentionScheme | None = None,
    form: str = "compressed-tensors",
    with_tokenizer: bool = False,
    **changes: Any,
) -> Export:
    """A random model of `family` under `place`, all its decoder linears but `kept` quantized by min-max.

    `others` maps patterns of names to schemes in the place of `scheme`, the first that fits; the head is quantized if
    one of them fits it. `attention` gets scales from a random generator.
    """
    if family != "gpt2":
        changes = {"ffn_dim" if family == "opt" else "intermediate_size": 128, **changes}
    model = save_tiny_model(family, place / "model", dtype=dtype, with_tokenizer=with_tokenizer, **changes)
    structure = discover(model, dtype=cast or "auto")
    checkpoint = Checkpoint(model)
    weights = weight_tensors(model, structure, checkpoint.entries)
    ranges = _input_ranges(model) if any(s.observed for s in (scheme, *(others or {}).values())) else {}
    reasons = dict.fromkeys(kept, "asked for")
    schemes = {}
    modules: dict[str, int] = {}
    blocks = [block.linears for block in structure.blocks]
    head = structure.head_linear
    if head is not None and any(fnmatchcase(head.name, pattern) for pattern in others or {}):
        blocks.append((head,))
    elif structure.head:
        reasons[structure.head] = "output head"
    place.joinpath("store").mkdir(parents=True, exist_ok=True)
    for index, linears in enumerate(blocks):
        stored = {}
        for linear in linears:
            if linear.name not in kept:
                weight = checkpoint.read([weights[linear.name]])[weights[linear.name]]
                own = next((s for pattern, s in (others or {}).items() if fnmatchcase(linear.name, pattern)), scheme)
                stored[linear.name] = _quantize(
                    weight, own, structure.dtype, ranges[linear.name] if own.observed else None
                )
                schemes[linear.name] = (index, own)
        caches = {
            linear.name.rpartition(".")[0]: _attention_parts(linear.out_features, attention)
            for linear in linears
            if attention is not None and linear.name.endswith(".k_proj")
        }
        write_block(place / "store", index, stored, caches)
        modules |= dict.fromkeys(caches, index)
    write_manifest(place / "store", structure.dtype, schemes, reasons, attention, modules)
    source = Source(checkpoint, weights, getattr(torch, cast) if cast else None, tied_head(structure, checkpoint))
    made = Export(place / "export", model, structure, Store(place / "store"), source, form)
    made.write(made.folder)
    return made


def _quantize(weight: Tensor, scheme: Scheme, dtype: str, seen: tuple[float, float] | None) -> StoredLinear:
    scale_dtype = getattr(torch, scheme.scale_dtype(dtype))
    smallest = scheme.smallest_scale(dtype)
    grid = WeightGrid(
        scheme.bits, scheme.symmetric, scheme.granularity, scheme.group_size, scale_dtype,
        smallest_scale=smallest, type=scheme.type,
    )  # fmt: skip
    quantized = QuantizedWeight(*WEIGHT_METHODS["minmax"](weight, grid, None))
    if seen is None:
        return StoredLinear(quantized)
    scale, zero = static_parameters(*seen, scheme.activations_symmetric, scheme.type)
    return StoredLinear(quantized, scale, None if scheme.activations_symmetric else zero)


def _attention_parts(width: int, attention: AttentionScheme) -> dict[str, Tensor]:
    """Scales of keys and values with `width` channels, in heads of 16; as many heads of queries again."""
    if attention.heads:
        return {
            f"fa_{x}_scale": torch.rand(heads * width // 16, 1) + 0.01
            for x, heads in zip("qkv", (2, 1, 1), strict=True)
        }
    size = 1 if attention.kv == "fp8" else width
    parts = {f"{x}_scale": torch.rand(size) + 0.01 for x in "kv"}
    if not attention.kv_symmetric:
        parts |= {f"{x}_offset": torch.randint(-128, 128, (size,)).float() for x in "kv"}
    return parts


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
