"""A GGUF file written from the tensors of a checkpoint, and read back as a checkpoint of the same names.

File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Beside it lie config.json and the tokenizer, so
that the directory is a model directory whose weights are in another kind of file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.model import gguf_layout, gguf_tokenizer
from quantcli.model.checkpoint import Checkpoint, TensorEntry, replacing
from quantcli.model.gguf import open_gguf
from quantcli.model.gguf_families import ARCHITECTURES
from quantcli.model.skeleton import DTYPES, load_config
from quantcli.model.structure_cache import find_structure
from quantcli.model.writer import DTYPE_NAMES, PlannedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "model.gguf"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""general.file_type by the type that most of the quantized weights have."""
_ROW_DTYPES = {"Q4_0": "U8", "Q4_1": "U8", "Q8_0": "U8"}


def gguf_file(directory: Path) -> Path | None:
    """The only GGUF file of a directory without safetensors; None if there is none."""
    found = sorted(directory.glob("*.gguf"))
    return found[0] if len(found) == 1 and not any(directory.glob("*.safetensors")) else None


def configuration(directory: Path) -> dict[str, Any]:
    """config.json with the defaults of transformers filled in."""
    content: dict[str, Any] = load_config(directory).to_dict()
    return content


def write_gguf(
    path: Path,
    planned: Sequence[PlannedTensor],
    produce: Callable[[str], Tensor],
    types: Mapping[str, str],
    directory: Path,
    config: Mapping[str, Any],
) -> None:
    """Write the planned tensors, named as in the float model `directory`, whose tokenizer goes into the file, too.

    `types` names the ggml type of tensors whose uint8 rows are blocks of quantized weights; of others vectors become
    float32, as llama.cpp wants them, and matrices stay as they are. `config` is the configuration with all defaults.
    Rows are put into the order of llama.cpp, blocks and all. `produce` is asked for one tensor at a time. The file
    appears under its name only when complete. Raises ModelError for what llama.cpp has no place or no rules for.
    """
    from gguf import GGUFWriter

    names = gguf_layout.tensor_names(config, [tensor.name for tensor in planned])
    rotary = {name: np.array(values, dtype=np.float32) for name, values in gguf_layout.rope_tensors(config).items()}
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURES[config["model_type"]].name)
        try:
            _describe(writer, planned, names, types)
            for key, value in gguf_layout.architecture_keys(config).items():
                _add(writer, key, value)
            for key, value in gguf_tokenizer.tokenizer_keys(directory, int(config["vocab_size"])).items():
                _add(writer, key, value)
            for name, made in rotary.items():
                writer.add_tensor_info(name, made.shape, made.dtype, made.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in planned:
                writer.write_tensor_data(_ordered(tensor, produce, names[tensor.name], config))
            for made in rotary.values():
                writer.write_tensor_data(made)
        finally:
            writer.close()


def _describe(
    writer: Any, planned: Sequence[PlannedTensor], names: Mapping[str, str], types: Mapping[str, str]
) -> None:
    """What kind of file it is, and which tensors will follow."""
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType

    weights: Counter[str] = Counter()
    for tensor in planned:
        kind = types.get(tensor.name) or _float_type(tensor)
        weights[kind] += tensor.nbytes
        in_blocks = kind not in _FLOATS
        nbytes = tensor.nbytes if in_blocks else prod(tensor.shape) * _FLOATS[kind].itemsize
        own = np.dtype(np.uint8 if in_blocks else np.float32)
        writer.add_tensor_info(names[tensor.name], tensor.shape, own, nbytes, GGMLQuantizationType[kind])
    blocks = {kind: nbytes for kind, nbytes in weights.items() if kind not in _FLOATS} or weights
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[max(blocks, key=blocks.__getitem__)])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _ordered(
    tensor: PlannedTensor, produce: Callable[[str], Tensor], name: str, config: Mapping[str, Any]
) -> NDArray[np.uint8]:
    """The bytes of a tensor as they stand in the file."""
    made = produce(tensor.name)
    if (made.dtype, tuple(made.shape)) != (tensor.dtype, tensor.shape):
        raise ValueError(f"{name}: {made.dtype} {tuple(made.shape)} was planned as {tensor}")
    order = gguf_layout.neighbour_order(name, config)
    made = made if order is None else made[order]
    made = made.float() + gguf_layout.norm_offset(name, config) if made.ndim == 1 else made
    raw: NDArray[np.uint8] = made.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return raw


def _float_type(tensor: PlannedTensor) -> str:
    if tensor.dtype not in _FLOATS.values():
        raise ModelError(f"{tensor.name} is {tensor.dtype}, which no GGUF file of a model holds.")
    return "F32" if len(tensor.shape) == 1 else DTYPE_NAMES[tensor.dtype]


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file, how its rows are ordered there (None: as in the parameter), and by how much it
    is more than the parameter."""

    kind: str
    offset: int
    shape: tuple[int, ...]
    raw_shape: tuple[int, ...]
    nbytes: int
    order: list[int] | None
    added: float


class GgufCheckpoint(Checkpoint):
    """A model directory whose weights are in a GGUF file, under the names of the parameters of transformers.

    Matrices of types Q8_0, Q4_0 and Q4_1 are read as the uint8 rows of blocks that they are; floats, and what other
    types stand for, in the dtype of config.json. Rows are put back into their order. Raises ModelError for a damaged
    file, one of several parts, and one that lacks a parameter or holds a tensor that is none.
    """

    def __init__(self, directory: Path) -> None:
        path = gguf_file(directory)
        assert path is not None
        self.directory = directory
        self.files = [path]
        config = configuration(directory)
        parameters = list(find_structure(directory).parameters)
        if reason := gguf_layout.refusal(config, parameters):
            raise ModelError(f"{path}: gguf {reason}.", "Score the file itself, which is converted then.")
        names = {found: name for name, found in gguf_layout.tensor_names(config, parameters).items()}
        self.places: dict[str, _Place] = {}
        for tensor in open_gguf(path).tensors:
            if tensor.name in (gguf_layout.FREQUENCIES, gguf_layout.LONG, gguf_layout.SHORT):
                continue
            if tensor.name not in names:
                raise ModelError(f"{path}: {tensor.name} belongs to nothing in this model.", "Check config.json.")
            self.places[names[tensor.name]] = _Place(
                tensor.tensor_type.name,
                int(tensor.data_offset),
                tuple(int(size) for size in reversed(tensor.shape)),
                tuple(tensor.data.shape),
                int(tensor.n_bytes),
                gguf_layout.neighbour_order(tensor.name, config),
                gguf_layout.norm_offset(tensor.name, config),
            )
        if missing := [name for name in parameters if name not in self.places]:
            raise ModelError(f"{path} lacks {missing[0]} ({len(missing)} of {len(parameters)} parameters are missing).")
        declared = str(config.get("dtype") or "float32").removeprefix("torch.")
        if declared not in DTYPES:
            raise ModelError(f"{directory / 'config.json'}: the dtype {declared[:100]!r} is not known.",
                             f"Known: {', '.join(DTYPES)}.")  # fmt: skip
        dtype = DTYPE_NAMES[DTYPES[declared]]
        self.entries = {
            name: TensorEntry(name, path, place.raw_shape if place.kind in _ROW_DTYPES else place.shape,
                              _ROW_DTYPES.get(place.kind, dtype))
            for name, place in self.places.items()
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the CPU, as `entries` describes them."""
        found = {}
        with self.files[0].open("rb") as file:
            for name in names:
                if name not in self.places:
                    raise ModelError(f"{self.directory}: tensor {name} is missing.", "Export it again.")
                place = self.places[name]
                file.seek(place.offset)
                raw = np.fromfile(file, dtype=np.uint8, count=place.nbytes)
                if len(raw) != place.nbytes:
                    raise ModelError(f"{self.files[0]} ends inside {name}.", "Export it again.")
                found[name] = self._made(name, torch.from_numpy(raw))
        return found

    def _made(self, name: str, raw: Tensor) -> Tensor:
        place, entry = self.places[name], self.entries[name]
        if place.kind in _ROW_DTYPES:
            made = raw.view(place.raw_shape)
        elif place.kind in _FLOATS:
            made = raw.view(_FLOATS[place.kind]).view(place.shape)
        else:
            made = _dequantized(raw, place)
        if place.order is not None:
            made = made[torch.tensor(place.order).argsort()]
        if place.added:
            made = made - place.added
        dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[entry.dtype]
        return made.to(dtype)


def _dequantized(raw: Tensor, place: _Place) -> Tensor:
    from gguf import GGMLQuantizationType, dequantize

    try:
        values = dequantize(raw.numpy().reshape(place.raw_shape), GGMLQuantizationType[place.kind])
    except NotImplementedError as error:
        raise ModelError(f"The GGUF type {place.kind} cannot be read: {error}.") from error
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
