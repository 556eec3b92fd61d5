"""Writing a checkpoint: quantized linears from the store, everything else from the float checkpoint, in shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantcli.formats.store import Store
from quantcli.model.checkpoint import Checkpoint, read_json, replacing
from quantcli.model.structure import Linear
from quantcli.model.workers import linear_workers
from quantcli.model.writer import (
    DTYPE_NAMES,
    PlannedTensor,
    shard_names,
    split_shards,
    write_index,
    write_safetensors,
)

SHARD_BYTES = 2 << 30
"""Size of a shard; an interrupted export goes on at the shard where it stopped."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".md"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


@dataclass(frozen=True)
class Source:
    """The float checkpoint of an export. `weights` maps a linear to the checkpoint tensor that is its weight; `cast` is
    the dtype that floating tensors are stored in, or None to leave each as it is."""

    checkpoint: Checkpoint
    weights: Mapping[str, str]
    cast: torch.dtype | None = None


@dataclass(frozen=True)
class _Piece:
    planned: PlannedTensor
    produce: Callable[[], Tensor]


def export_checkpoint(
    folder: Path, form: ModuleType, store: Store, source: Source, linears: Mapping[str, Linear]
) -> Iterator[tuple[Path, str]]:
    """Write a checkpoint into `folder`, yielding (file, sha256) as files are finished.

    Shards that are there already are kept (the caller clears the folder when anything changed); config.json comes last,
    so an engine never loads half a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with linear_workers() as workers:
        pieces = {piece.planned.name: piece for piece in _pieces(form, store, source, linears, workers)}
        shards = split_shards([piece.planned for piece in pieces.values()], SHARD_BYTES)
        for file, shard in zip(shard_names(len(shards)), shards, strict=True):
            digest = ""
            if not (folder / file).exists():
                digest = write_safetensors(folder / file, shard, _producer(pieces), {"format": "pt"})
            yield folder / file, digest
    write_index(folder, shards)
    if len(shards) > 1:
        yield folder / "model.safetensors.index.json", ""
    yield from _copy_companions(source.checkpoint.directory, folder)
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(_config(form, store, source), indent=2) + "\n", encoding="utf-8")
    yield folder / "config.json", ""


def _encoder(
    form: ModuleType, store: Store, modules: Sequence[str], workers: ThreadPoolExecutor
) -> Callable[[str], dict[str, Tensor]]:
    """module → its tensors, while those of the next module are already being made: at most two are held."""
    following = dict(pairwise(modules))
    jobs: dict[str, Future[dict[str, Tensor]]] = {}

    def start(module: str) -> None:
        if module not in jobs:
            jobs[module] = workers.submit(lambda: form.encode(store.read(module), store.schemes[module]))

    def encoded(module: str) -> dict[str, Tensor]:
        wanted = [name for name in (module, following.get(module)) if name is not None]
        for name in set(jobs) - set(wanted):
            del jobs[name]
        for name in wanted:
            start(name)
        return jobs[module].result()

    return encoded


def _pieces(
    form: ModuleType, store: Store, source: Source, linears: Mapping[str, Linear], workers: ThreadPoolExecutor
) -> Iterator[_Piece]:
    """Every tensor of the export, in the order of the float checkpoint."""
    by_tensor = {tensor: name for name, tensor in source.weights.items() if name in store.schemes}
    modules = [by_tensor[name] for name in source.checkpoint.entries if name in by_tensor]
    encoded = _encoder(form, store, modules, workers)
    for name, entry in source.checkpoint.entries.items():
        if name not in by_tensor:
            stored = _TORCH_DTYPES[entry.dtype]
            dtype = source.cast if source.cast is not None and stored.is_floating_point else stored
            yield _Piece(
                PlannedTensor(name, dtype, entry.shape),
                lambda name=name, dtype=dtype: source.checkpoint.read([name])[name].to(dtype),  # type: ignore[misc]
            )
            continue
        module = by_tensor[name]
        for suffix, (dtype_name, shape) in form.layout(linears[module], store.schemes[module], store.dtype).items():
            yield _Piece(
                PlannedTensor(f"{name.removesuffix('.weight')}.{suffix}", getattr(torch, dtype_name), shape),
                lambda module=module, suffix=suffix: encoded(module)[suffix],  # type: ignore[misc]
            )


def _producer(pieces: Mapping[str, _Piece]) -> Callable[[str], Tensor]:
    return lambda name: pieces[name].produce()


def _copy_companions(origin: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Tokenizer, chat template, generation settings, licence and code files: whatever stands beside the weights."""
    for file in sorted(origin.iterdir()):
        wanted = file.suffix in _COPIED or file.name.upper().startswith("LICEN")
        if file.is_file() and wanted and file.name not in _NOT_COPIED:
            with replacing(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
            yield folder / file.name, ""


def _config(form: ModuleType, store: Store, source: Source) -> dict[str, Any]:
    config = read_json(source.checkpoint.directory / "config.json")
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = store.dtype
    config["quantization_config"] = form.configuration(store.schemes, {*store.kept, *_other_matrices(store, source)})
    return config


def _other_matrices(store: Store, source: Source) -> Iterator[str]:
    """Modules outside the blocks that have a matrix: projections around the embedding (OPT) are linears to an engine,
    which would look for their codes. That embeddings are among them does no harm."""
    names = {tensor: module for module, tensor in source.weights.items()}
    for entry in source.checkpoint.entries.values():
        if entry.name.endswith(".weight") and len(entry.shape) == 2 and entry.name not in names:
            yield entry.name.removesuffix(".weight")
