"""A GGUF file as a model: converted once into an ordinary Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    load_gguf_checkpoint,
    read_field,
)

from quantcli.errors import ModelError, OutputError, QuantcliError, RoomError, is_of_library
from quantcli.model.checkpoint import clear_leftovers
from quantcli.model.gguf_header import check_header
from quantcli.model.gguf_layout import computed
from quantcli.model.skeleton import check_size
from quantcli.model.writer import PlannedTensor, shard_names, split_shards, write_index, write_safetensors

MAXIMUM_SHARD_BYTES = 4 << 30
USE_ORIGINAL = "Use the model's original directory of safetensors files instead."


def convert_gguf(path: Path, destination: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model of the GGUF file `path` as a Hugging Face directory at `destination`.

    Every tensor is dequantized to float32, brought into the layout of transformers (llama.cpp permutes the rows of some
    query and key projections and adds one to some norms) and rounded to `dtype`. That takes room for about one tensor
    in float32, not for the model. The directory holds config.json, generation_config.json, the tokenizer and
    safetensors files of at most 4 GiB; tied embeddings are stored once. It appears under its name only when complete,
    and depends on the file alone, not on what lies beside it.
    File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Raises ModelError where the gguf package is missing, or the file is damaged, split, of an architecture or a tensor
    type that is not known, lacks a tensor of the model or holds one with no place in it; OutputError where
    `destination` exists; RoomError where the disk is too small.
    """
    reader = open_gguf(path)
    if destination.exists():
        raise OutputError(f"{destination} already exists.", "Remove it or name another place for the converted model.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(destination, hours=24)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        model = _write_configuration(path, reader, partial, dtype)
        _write_tokenizer(path, partial)
        _write_weights(path, reader, model, partial, dtype)
        try:
            partial.rename(destination)
        except OSError:
            if not destination.is_dir():  # another process was first: what it wrote is the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_gguf(path: Path) -> Any:
    """The file's GGUFReader, once its header is known to be sound: the reader trusts every count in it."""
    if find_spec("gguf") is None:
        raise ModelError(f"{path}: reading GGUF needs the gguf package.", "Install it: pip install 'quantcli[gguf]'")
    from gguf import GGUFReader

    if not path.is_file():
        raise ModelError(f"{path}: no such file.")
    check_header(path)
    with _at_fault(f"{path} is no complete GGUF file", "Download it again."):
        reader = GGUFReader(path)
    if not read_field(reader, "general.architecture"):
        raise ModelError(f"{path} names no architecture (general.architecture).", USE_ORIGINAL)
    if (read_field(reader, "split.count") or [1])[0] > 1:
        raise ModelError(
            f"{path} is one part of a split GGUF model.", "Join the parts first: llama-gguf-split --merge."
        )
    return reader


def _write_configuration(path: Path, reader: Any, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Write config.json and generation_config.json; return the model without weights (on the meta device)."""
    with _at_fault(f"{path}: transformers cannot build this model", USE_ORIGINAL):
        config: PretrainedConfig = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
        check_size(path, config)
        keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
        try:
            config.update(computed(config.to_dict(), keys))
        except ModelError as error:
            raise ModelError(f"{path} {error.message}.", USE_ORIGINAL) from error
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    return model


def _write_tokenizer(path: Path, directory: Path) -> None:
    with TemporaryDirectory() as alone:  # transformers would also read tokenizer files that lie beside the model
        Path(alone, "model.gguf").symlink_to(path.resolve())
        with _at_fault(f"{path}: transformers cannot read its tokenizer", USE_ORIGINAL):
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        tokenizer.save_pretrained(directory)
        with _at_fault(f"{path}: its tokenizer does not work in transformers", USE_ORIGINAL):
            AutoTokenizer.from_pretrained(directory, local_files_only=True).encode("a b")


def _write_weights(path: Path, reader: Any, model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> None:
    """Write the model's tensors as transformers would save them, in shards.

    transformers fuse experts when loading, so one parameter may be stored as several tensors: the plan is drawn up on
    the meta device, then each parameter is made once and its tensors are handed out in turn.
    """
    make = _parameter_maker(path, reader, model)
    owner: dict[str, str] = {}
    planned: list[PlannedTensor] = []
    for parameter, meta in _parameters(model).items():
        for name, piece in revert_weight_conversion(model, {parameter: meta}).items():
            owner[name] = parameter
            planned.append(PlannedTensor(name, dtype, tuple(piece.shape)))

    needed, free = sum(tensor.nbytes for tensor in planned), shutil.disk_usage(directory).free
    if needed > free:
        raise RoomError(
            f"{directory.parent}: converting {path.name} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free."
        )

    pieces: dict[str, Tensor] = {}

    def produce(name: str) -> Tensor:
        if name not in pieces:
            pieces.clear()
            pieces.update(revert_weight_conversion(model, {owner[name]: make(owner[name]).to(dtype)}))
        return pieces.pop(name)

    shards = split_shards(planned, MAXIMUM_SHARD_BYTES)
    for file, shard in zip(shard_names(len(shards)), shards, strict=True):
        write_safetensors(directory / file, shard, produce, {"format": "pt"})
    write_index(directory, shards)


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under their first name only."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _gguf_names(architecture: str, model: PreTrainedModel, processor: TensorProcessor) -> dict[str, str]:
    """Parameter names by GGUF name, as in blk.0.attn_q.weight: model.layers.0.self_attn.q_proj.weight.

    Raises KeyError for an architecture that the gguf package does not know.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    names: dict[str, str] = {}
    for parameter in map(processor.preprocess_name, _parameters(model)):
        stem, dot, suffix = parameter.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = parameter, "", ""
        # Some models were converted without their language-model head, and are named without its prefix.
        found = table.get_name(stem) or table.get_name(stem.removeprefix(model.base_model_prefix + "."))
        if found:
            names[found + dot + suffix] = parameter
        else:
            processor.perform_fallback_tensor_mapping(names, dot + suffix, "", parameter)
    return names


def _parameter_maker(path: Path, reader: Any, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its values in float32.

    Raises ModelError unless the file holds every parameter of the model and nothing else.
    """
    from gguf import dequantize

    architecture = read_field(reader, "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = _gguf_names(architecture, model, processor)
    except KeyError as error:
        raise ModelError(f"{path}: the gguf package does not know {architecture}.", USE_ORIGINAL) from error
    # Experts are mapped without the suffix.
    target = {t.name: names.get(t.name) or names.get(t.name.removesuffix(".weight")) for t in reader.tensors}
    shapes = {name: tuple(tensor.shape) for name, tensor in _parameters(model).items()}
    sources = {name: [t for t in reader.tensors if target[t.name] == name] for name in shapes}
    if missing := [name for name, found in sources.items() if not found]:
        raise ModelError(f"{path} lacks {_some(missing)} of {type(model).__name__}.", USE_ORIGINAL)
    # Such a tensor means another model: rope_freqs.weight, for one, scales positions that transformers would not scale.
    if unplaced := [name for name, parameter in target.items() if parameter not in shapes]:
        raise ModelError(f"{path}: {_some(unplaced)} has no place in {type(model).__name__}.", USE_ORIGINAL)

    def make(parameter: str) -> Tensor:
        made: dict[str, Tensor] = {}
        for source in sources[parameter]:
            with _at_fault(f"{path}: {source.name}", USE_ORIGINAL):
                values = dequantize(source.data, source.tensor_type)
                result = processor.process(
                    weights=values, name=source.name, tensor_key_mapping=names, parsed_parameters={"tensors": made}
                )
            if result.name is not None:  # None: the processor has put its part into `made` itself
                made[parameter] = torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))
        if tuple(made[parameter].shape) != shapes[parameter]:
            raise ModelError(
                f"{path}: {sources[parameter][0].name} has shape {tuple(made[parameter].shape)}, "
                f"{parameter} needs {shapes[parameter]}.",
                USE_ORIGINAL,
            )
        return made[parameter]

    return make


@contextmanager
def _at_fault(what: str, remedy: str) -> Iterator[None]:
    """Whatever other packages raise on reading the file in the body, the file is at fault."""
    try:
        yield
    except QuantcliError:
        raise
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise ModelError(f"{what}: {' '.join(str(error).split())}.", remedy) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
