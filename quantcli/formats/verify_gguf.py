"""What a GGUF export has to hold, found from the store by other code than wrote it: block by block, in NumPy, and under
the names of the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats.store import Store, StoredLinear
from quantcli.formats.verify_gguf_keys import check_keys, frequency_divisors, tensors_of
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.gguf import open_gguf
from quantcli.model.gguf_file import FILE, configuration
from quantcli.quant.scheme import Scheme

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES = {(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1"}
_NEIGHBOURS = ("llama", "mistral", "granite", "smollm3", "arcee")
"""Model types of which llama.cpp rotates neighbouring rows of queries and keys, and transformers halves of a head."""


@dataclass(frozen=True)
class _Found:
    """A tensor of the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> NDArray[np.uint8]:
        return np.fromfile(self.file, dtype=np.uint8, count=self.nbytes, offset=self.offset)


def check_gguf(
    folder: Path, store: Store, source: Checkpoint, weights: Mapping[str, str], cast: torch.dtype | None
) -> int:
    """Every tensor of the file is the store's or the float model's, its keys say the model and its tokens, and
    quantization.json the schemes; the bytes of the tensors. Raises VerificationError with the difference."""
    try:
        reader = open_gguf(folder / FILE)
        config, record = configuration(folder), read_json(folder / "quantization.json")
    except ModelError as error:
        raise VerificationError(error.message, "Export again.") from error
    wanted = {"format": "gguf", "linears": {name: scheme.to_json() for name, scheme in store.schemes.items()}}
    if record != wanted:
        raise VerificationError(f"{folder}: quantization.json is not that of the store.", "Export again.")
    if "quantization_config" in read_json(folder / "config.json"):
        raise VerificationError(f"{folder}: config.json has a quantization_config.", "Export again.")
    tied = config.get("tie_word_embeddings")
    names = [n for n in source.entries if not n.endswith(".inv_freq") and not (tied and n == "lm_head.weight")]
    places = tensors_of(folder, config, names)
    check_keys(folder, {key: field.contents() for key, field in reader.fields.items()}, config)
    tensors = {
        t.name: _Found(
            folder / FILE, t.tensor_type.name, tuple(map(int, reversed(t.shape))), int(t.data_offset), int(t.n_bytes)
        )
        for t in reader.tensors
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    del reader  # whatever is read of the mapped file stays in memory
    _check_frequencies(folder, {name: tensors.pop(name) for name in list(tensors) if name.startswith("rope_")}, config)
    modules = {weights[module]: module for module in store.schemes}
    for name, own in places.items():
        tensor = tensors.pop(own, None)
        if tensor is None:
            raise VerificationError(f"{folder}: tensor {own} is missing.", "Export again.")
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(own.rsplit(".", 2)[-2])
        swapped = heads is not None and config["model_type"] in _NEIGHBOURS
        if name in modules:
            module = modules[name]
            kind, expected = expected_blocks(store.read(module), store.schemes[module], module)
        else:
            value = source.read([name])[name].to(cast or _DTYPES[source.entries[name].dtype])
            one_more = config["model_type"].startswith(("gemma", "nemotron")) and name.endswith("norm.weight")
            kind, expected = _expected_float(1 + value.float() if one_more else value)
        if swapped:
            expected = _interleaved(expected, config[heads])  # type: ignore[index]
        whole = (tensor.kind, tensor.shape) == (kind, source.entries[name].shape)
        if not whole or not np.array_equal(tensor.read(), expected.reshape(-1)):
            whose = "store's" if name in modules else "float model's"
            raise VerificationError(f"{folder}: {own} differs from the {whose} {name}.", "Export again.")
    if tensors:
        raise VerificationError(f"{folder}: holds {next(iter(tensors))}, which belongs to nothing.", "Export again.")
    return nbytes


def expected_blocks(stored: StoredLinear, scheme: Scheme, module: str) -> tuple[str, NDArray[np.uint8]]:
    """The ggml type, and the rows [out, bytes] of blocks that stand for the store's codes."""
    kind = _TYPES.get((scheme.bits, scheme.symmetric))
    if kind is None:
        raise VerificationError(f"{module} is {scheme.name}, which no type of GGUF holds.", "Export again.")
    codes = stored.weight.codes.numpy()
    out, inner = codes.shape
    wide = np.broadcast_to(stored.weight.scale.float().numpy(), (out, stored.weight.scale.shape[1]))
    if not np.isfinite(wide).all() or (wide == 0).any():
        raise VerificationError(f"{module}: a scale is zero or not finite.", "Quantize again.")
    step = inner // wide.shape[1]
    block = np.zeros((out, inner // 32), dtype=[("d", "<f2"), ("m", "<f2"), ("q", "u1", 32)])
    with np.errstate(over="ignore"):
        block["d"] = np.repeat(wide, step // 32, axis=1)
    if not np.array_equal(block["d"].astype(np.float32), np.repeat(wide, step // 32, axis=1)):
        raise VerificationError(f"{module}: a scale of the store is no float16 value.", "Quantize for gguf again.")
    if kind == "Q8_0":
        block["q"] = codes.reshape(out, -1, 32).view(np.uint8)
    else:
        unsigned = (codes.astype(np.int16) + 8).astype(np.uint8).reshape(out, -1, 32)
        block["q"][..., :16] = unsigned[..., :16] + 16 * unsigned[..., 16:]
    if stored.weight.zero_point is not None:
        zero = np.broadcast_to(stored.weight.zero_point.numpy(), wide.shape).astype(np.float32)
        block["m"] = np.repeat(-(zero + 8) * wide, step // 32, axis=1)
    parts = [block["d"][..., None].copy().view(np.uint8)]
    if kind == "Q4_1":
        parts.append(block["m"][..., None].copy().view(np.uint8))
    parts.append(block["q"] if kind == "Q8_0" else block["q"][..., :16])
    return kind, np.concatenate(parts, axis=-1).reshape(out, -1)


def _expected_float(value: Tensor) -> tuple[str, NDArray[np.uint8]]:
    made = value.float() if value.ndim == 1 else value
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[made.dtype]
    return kind, made.contiguous().view(len(made), -1).view(torch.uint8).numpy()


def _interleaved(rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """Of each head the rows of its halves in turns, as llama.cpp rotates neighbours."""
    made = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        made[own][0::2] = rows[own][: size // 2]
        made[own][1::2] = rows[own][size // 2 :]
    return made


def _check_frequencies(folder: Path, tensors: Mapping[str, _Found], config: Mapping[str, Any]) -> None:
    """The tensors of rotary embeddings are those of config.json."""
    wanted = frequency_divisors(config)
    for name in {**wanted, **tensors}:
        found = tensors[name].read().view(np.float32).tolist() if name in tensors else None
        if name not in wanted or found != np.array(wanted[name], dtype=np.float32).tolist():
            raise VerificationError(f"{folder}: {name} is not that of config.json.", "Export again.")
