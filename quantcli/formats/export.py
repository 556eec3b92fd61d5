"""Writing a checkpoint: quantized linears from the store, everything else from the float checkpoint, in shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.formats.common import DESCRIPTIONS, DESCRIPTIONS_OF_OTHERS
from quantcli.formats.store import Store, block_file
from quantcli.formats.sums import write_sums
from quantcli.model import npy_names
from quantcli.model.checkpoint import Checkpoint, TensorEntry, file_digest, read_json, replacing
from quantcli.model.folding import unties
from quantcli.model.names import checkpoint_prefix
from quantcli.model.structure import Linear, Structure
from quantcli.model.untrusted import check_links, checkpoint_entries
from quantcli.model.workers import linear_workers
from quantcli.model.writer import (
    DTYPE_NAMES,
    PlannedTensor,
    shard_names,
    split_shards,
    write_index,
    write_safetensors,
)
from quantcli.quant.scheme import Scheme

SHARD_BYTES = 2 << 30
"""Size of a shard; an interrupted export goes on at the shard where it stopped."""

_METADATA = {"format": "pt"}
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".md"}
_NOT_COPIED = (
    "config.json", "README.md", "*.index.json", npy_names.ROUNDED, *DESCRIPTIONS, *DESCRIPTIONS_OF_OTHERS
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """The float checkpoint of an export. `weights` maps a linear to the checkpoint tensor that is its weight; `cast` is
    the dtype that floating tensors are stored in, or None to leave each as it is; `tied` is what `tied_head` says."""

    checkpoint: Checkpoint
    weights: Mapping[str, str]
    cast: torch.dtype | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """A tensor of the float checkpoint as an export holds it."""
        tensor = self.checkpoint.read([name])[name]
        return tensor.to(self.stored_dtype(self.checkpoint.entries[name]))

    def stored_dtype(self, entry: TensorEntry) -> torch.dtype:
        stored = _TORCH_DTYPES.get(entry.dtype)
        if stored is None:
            raise ModelError(f"{entry.file}: {entry.name} is {entry.dtype}, which is not written.",
                             "Start from a checkpoint of float16, bfloat16 or float32.")  # fmt: skip
        return self.cast if self.cast is not None and stored.is_floating_point else stored


def tied_head(structure: Structure, checkpoint: Checkpoint) -> dict[str, str]:
    """The weight of an output head that is tied and not in the checkpoint → the embedding that it is; empty otherwise.

    Raises ModelError if the embedding cannot be told from other tensors of its shape.
    """
    name = f"{structure.head}.weight"
    if not structure.tied or structure.head is None or name in checkpoint:
        return {}
    shape = (structure.vocabulary, structure.width)
    found = [entry.name for entry in checkpoint.entries.values() if entry.shape == shape]
    if len(found) != 1:
        raise ModelError(f"{len(found)} tensors of the checkpoint may be the embedding that {name} is tied to.")
    return {name: found[0]}


@dataclass(frozen=True)
class _Piece:
    """A tensor of the export, and the linear or attention module that it is quantized for, if it is."""

    planned: PlannedTensor
    produce: Callable[[], Tensor]
    owner: str | None = None


def export_checkpoint(
    folder: Path,
    form: ModuleType,
    store: Store,
    source: Source,
    linears: Mapping[str, Linear],
    shard_bytes: int | None = None,
    ahead: Path | None = None,
) -> Iterator[tuple[Path, str]]:
    """Write a checkpoint into `folder`, yielding (file, sha256) as files are finished.

    `shard_bytes`: of tensors in a file at most, SHARD_BYTES if it is None; a larger tensor has a file for itself.
    Shards that are there already are kept (the caller clears the folder when anything changed), and those that
    `write_finished_shards` left in `ahead` are taken; config.json comes last, so an engine never loads half a
    checkpoint. Raises ModelError for what the format cannot hold.
    """
    with linear_workers() as workers:
        pieces = _by_name(_pieces(form, store, source, linears, workers))
        documents = _documents(form, store, source, {name: piece.owner for name, piece in pieces.items()})
        origin = source.checkpoint.directory
        if hasattr(form, "write_weights"):
            weights = _own_files(folder, pieces, form, store.schemes, origin, json.loads(documents["config.json"]))
        else:
            waiting = None if ahead is None else partial(shard_ahead, ahead, form, shard_bytes)
            weights = _shards(folder, pieces, _stem(form, store), shard_bytes, waiting)
        yield from _write(folder, weights, documents, origin)


def export_float(folder: Path, source: Source, dtype: str) -> Iterator[tuple[Path, str]]:
    """Write the float checkpoint itself, as it is read, likewise; `dtype` is the model's."""
    pieces = _by_name(map(partial(_float_piece, source), _in_order(source.checkpoint.entries)))
    documents = {"config.json": json.dumps(_float_config(source, dtype), indent=2) + "\n"}
    yield from _write(folder, _shards(folder, pieces, "model"), documents, source.checkpoint.directory)


def write_finished_shards(
    place: Path,
    form: ModuleType,
    store: Store,
    source: Source,
    linears: Mapping[str, Linear],
    shard_bytes: int | None = None,
) -> None:
    """Write into `place`, under names of `shard_ahead`, those shards of an export for which the store has all blocks,
    while others are still to come; nothing of one that has a single file, or whose tensors are not known before.

    What is not quantized is counted to the next linear behind it, in the order of `export_checkpoint`.
    """
    if hasattr(form, "write_weights") or store.attention is not None:
        return
    stored = {index for index in set(store.blocks.values()) if block_file(store.folder, index).is_file()}
    with linear_workers() as workers:
        pieces = _by_name(_pieces(form, store, source, linears, workers))
        missing, ready = False, {}
        for name, piece in reversed(pieces.items()):
            missing = missing if piece.owner is None else store.blocks[piece.owner] not in stored
            ready[name] = not missing
        shards = split_shards([piece.planned for piece in pieces.values()], shard_bytes or SHARD_BYTES)
        names = shard_names(len(shards), _stem(form, store)) if len(shards) > 1 else []
        for name, shard in zip(names, shards, strict=False):
            file = shard_ahead(place, form, shard_bytes, name)
            if not file.exists() and all(ready[tensor.name] for tensor in shard):
                write_safetensors(file, shard, _producer(pieces), _METADATA)


def shard_ahead(place: Path, form: ModuleType, shard_bytes: int | None, name: str) -> Path:
    """Where a shard of this name waits until its export is written: a temporary file as those of `replacing`."""
    return place / f".{form.NAME}-{name}.{shard_bytes or SHARD_BYTES}.part"


def _stem(form: ModuleType, store: Store) -> str:
    stem: str = form.stem(store.schemes.values()) if hasattr(form, "stem") else form.STEM
    return stem


def _by_name(pieces: Iterable[_Piece]) -> dict[str, _Piece]:
    return {piece.planned.name: piece for piece in pieces}


def _in_order(names: Iterable[str]) -> list[str]:
    """Names of tensors with block 2 before block 10, so that a shard has blocks that follow each other."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        parts = [(part, part.isdecimal() and len(part) < 10) for part in name.split(".")]
        return [(not number, int(part) if number else 0, part) for part, number in parts]

    return sorted(names, key=key)


def _write(
    folder: Path, weights: Iterator[tuple[Path, str]], documents: Mapping[str, str], origin: Path
) -> Iterator[tuple[Path, str]]:
    """All files, weights first: checksums of the others come before config.json, which is last."""
    folder.mkdir(parents=True, exist_ok=True)
    *others, (name, config) = documents.items()
    digests = {name: sha256(config.encode()).hexdigest()}
    for file, digest in chain(weights, _beside(folder, dict(others), origin)):
        name_below = file.relative_to(folder).as_posix()
        digests[name_below] = digest or file_digest(file)
        yield file, digests[name_below]
    yield write_sums(folder, digests), ""
    yield _write_text(folder / name, config), digests[name]


def _shards(
    folder: Path,
    pieces: Mapping[str, _Piece],
    stem: str,
    shard_bytes: int | None = None,
    waiting: Callable[[str], Path] | None = None,
) -> Iterator[tuple[Path, str]]:
    """Files of the weights and their index; those that are there are kept, and those that are `waiting` taken."""
    shards = split_shards([piece.planned for piece in pieces.values()], shard_bytes or SHARD_BYTES)
    for file, shard in zip(shard_names(len(shards), stem), shards, strict=True):
        digest = ""
        if waiting is not None and (made := waiting(file)).exists() and not (folder / file).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # in another file system it is written anew
                os.replace(made, folder / file)
        if not (folder / file).exists():
            digest = write_safetensors(folder / file, shard, _producer(pieces), _METADATA)
        yield folder / file, digest
    for index in write_index(folder, shards, stem):
        yield index, ""


def _own_files(
    folder: Path,
    pieces: Mapping[str, _Piece],
    form: ModuleType,
    schemes: Mapping[str, Scheme],
    origin: Path,
    config: dict[str, Any],
) -> Iterator[tuple[Path, str]]:
    """The weights in the files that the format itself writes."""
    owned = {name: schemes[p.owner] for name, p in pieces.items() if p.owner is not None and p.owner in schemes}
    planned = [piece.planned for piece in pieces.values()]
    for file in form.write_weights(folder, planned, _producer(pieces), owned, origin, config):
        yield file, ""


def _beside(folder: Path, documents: Mapping[str, str], origin: Path) -> Iterator[tuple[Path, str]]:
    """What is copied, then the JSON files."""
    yield from _copy_companions(origin, folder, set(documents))
    for name, content in documents.items():
        yield _write_text(folder / name, content), ""


def _write_text(file: Path, content: str) -> Path:
    with replacing(file) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return file


def _encoder(
    form: ModuleType,
    store: Store,
    source: Source,
    linears: Mapping[str, Linear],
    modules: Sequence[str],
    workers: ThreadPoolExecutor,
) -> Callable[[str], dict[str, Tensor]]:
    """module → its tensors, while those of the next module are already being made: at most two are held."""
    following = dict(pairwise(modules))
    jobs: dict[str, Future[dict[str, Tensor]]] = {}

    def encode(module: str) -> dict[str, Tensor]:
        name = source.weights[module].removesuffix("weight") + "bias"
        bias = source.read(name) if name in source.checkpoint else None
        try:
            stored, scheme = store.read(module), store.schemes[module]
            tensors: dict[str, Tensor] = form.encode(stored, scheme, store.dtype, bias, linears[module])
        except ModelError as error:
            raise ModelError(f"{module}: {error.message}", error.remedy) from error
        return tensors

    def start(module: str) -> None:
        if module not in jobs:
            jobs[module] = workers.submit(encode, module)

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
    """Every tensor of the export, block by block; what the float checkpoint does not have comes last."""
    by_tensor = {tensor: name for name, tensor in source.weights.items() if name in store.schemes}
    names = _in_order(source.checkpoint.entries)
    modules = [by_tensor[name] for name in names if name in by_tensor]
    encoded = _encoder(form, store, source, linears, modules, workers)
    for name in names:
        if name not in by_tensor:
            yield _float_piece(source, name)
            continue
        module = by_tensor[name]
        for suffix, (dtype_name, shape) in form.layout(linears[module], store.schemes[module], store.dtype).items():
            yield _Piece(
                PlannedTensor(f"{name.removesuffix('.weight')}.{suffix}", getattr(torch, dtype_name), shape),
                lambda module=module, suffix=suffix: encoded(module)[suffix],  # type: ignore[misc]
                module,
            )
    for name, embedding in source.tied.items() if form.WRITES_TIED_HEAD else ():
        entry = source.checkpoint.entries[embedding]
        planned = PlannedTensor(name, source.stored_dtype(entry), entry.shape)
        yield _Piece(planned, lambda embedding=embedding: source.read(embedding))  # type: ignore[misc]
    for module in store.attention_modules:
        path = checkpoint_prefix(module, source.weights)
        tensors = form.attention_tensors(path, store.read_attention(module), store.attention, store.dtype)
        for name, tensor in tensors.items():
            planned = PlannedTensor(name, tensor.dtype, tuple(tensor.shape))
            yield _Piece(planned, lambda tensor=tensor: tensor, module)  # type: ignore[misc]


def _float_piece(source: Source, name: str) -> _Piece:
    entry = source.checkpoint.entries[name]
    return _Piece(PlannedTensor(name, source.stored_dtype(entry), entry.shape), lambda: source.read(name))


def _producer(pieces: Mapping[str, _Piece]) -> Callable[[str], Tensor]:
    return lambda name: pieces[name].produce()


def companions(origin: Path) -> list[Path]:
    """What of a model directory an export copies: tokenizer, chat templates, generation settings, licence and code
    files, whatever stands beside the weights but what describes or indexes them.

    Raises ModelError for a link that leads out of the model.
    """
    found = []
    for file in checkpoint_entries(origin):
        wanted = file.suffix in _COPIED or file.name.upper().startswith("LICEN")
        if file.is_file() and wanted and not any(fnmatchcase(file.name, pattern) for pattern in _NOT_COPIED):
            found.append(file)
    check_links(found, origin)
    return found


def _copy_companions(origin: Path, folder: Path, written: set[str]) -> Iterator[tuple[Path, str]]:
    for file in companions(origin):
        if file.name not in written:
            copy = folder / file.relative_to(origin)
            copy.parent.mkdir(exist_ok=True)
            with replacing(copy) as temporary:
                shutil.copyfile(file, temporary)
            yield copy, ""


def _documents(form: ModuleType, store: Store, source: Source, owners: Mapping[str, str | None]) -> dict[str, str]:
    """The JSON files of the export as text, config.json last."""
    config = _float_config(source, store.dtype)
    documents = form.documents(config, store, {*store.kept, *_other_matrices(store, source)}, owners)
    return {name: json.dumps(content, indent=2) + "\n" for name, content in documents.items()}


def _float_config(source: Source, dtype: str) -> dict[str, Any]:
    """config.json of the float model as it is read, in the dtype that it is stored in."""
    config = read_json(source.checkpoint.directory / "config.json")
    inner = config.get("text_config")
    for part in (config, inner) if isinstance(inner, dict) else (config,):
        part |= dict.fromkeys({"dtype", "torch_dtype"} & part.keys(), dtype)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype  # without it readers would take float32
    config.pop("quantize", None)  # MindIE's, of a source in its format
    if unties(source.checkpoint):  # a head that was tied has a weight of its own
        config["tie_word_embeddings"] = False
    return config


def _other_matrices(store: Store, source: Source) -> Iterator[str]:
    """Modules outside the blocks that have a matrix: projections around the embedding (OPT) are linears to an engine,
    which would look for their codes. That embeddings are among them does no harm."""
    names = {tensor: module for module, tensor in source.weights.items()}
    for entry in source.checkpoint.entries.values():
        if entry.name.endswith(".weight") and len(entry.shape) == 2 and entry.name not in names:
            yield entry.name.removesuffix(".weight")
