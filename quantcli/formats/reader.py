"""Reading an exported checkpoint back: the independent side of every number in a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import ModelError, QuantcliError
from quantcli.formats.declared import read_configuration
from quantcli.formats.store import Store, StoredLinear
from quantcli.formats.table import find_format, open_weights
from quantcli.model.checkpoint import TensorEntry, stored_dtype
from quantcli.model.skeleton import DTYPES
from quantcli.model.structure import Linear
from quantcli.model.writer import DTYPE_NAMES
from quantcli.quant.float8 import FP8
from quantcli.quant.grid import dequantize
from quantcli.quant.scheme import AttentionScheme, Scheme

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Suffix of a tensor → (dtype, shape)."""

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
"""Dtypes that scales may have; those of other tools' checkpoints are not always the ones written here."""
_NUMBERS = _FLOATS | {torch.int8, torch.int32, torch.int64}
"""Dtypes that offsets may have, likewise."""


class QuantizedCheckpoint:
    """A quantized checkpoint that reads like a float one: X.weight is dequantized when it is asked for.

    (q − z)·s is computed in float32 and rounded to the model's dtype, as engines do that unpack weights. `linears` are
    the model's linears by name, `weights` the float checkpoint's name of each one's weight, `config` what config.json
    says. A checkpoint in which nothing is quantized has neither schemes nor attention. `added_biases` are those that
    the architecture lacks, by the names of parameters. Raises ModelError for a format that is not known.
    """

    def __init__(self, directory: Path, linears: Mapping[str, Linear], weights: Mapping[str, str]) -> None:
        self.directory = directory
        self.raw = open_weights(directory)
        self.config = config = read_configuration(directory, self.raw.entries)
        self.form = find_format(directory, config)
        self.dtype = _declared_dtype(directory, config)
        self.linears = linears
        self.added_biases: tuple[str, ...] = ()
        self.schemes: dict[str, Scheme] = {}
        self.attention: AttentionScheme | None = None
        if self.form is not None:
            named = {name: weights[name] for name in linears if name in weights}
            with _understood(directory / "config.json"):
                self.schemes, self.attention = self.form.described(self.raw, config, named)
        self.weights = {name: weights[name] for name in self.schemes}
        self._modules = {weight: name for name, weight in self.weights.items()}
        self._attention_paths = self._find_attention(weights)
        parts = {tensor for name in self.schemes for tensor in self.tensor_names(name)}
        parts |= {name for path in self._attention_paths.values() for name in self._attention_names(path)}
        self.entries = {name: entry for name, entry in self.raw.entries.items() if name not in parts}
        for name, weight in self.weights.items():
            linear = linears[name]
            self.entries[weight] = TensorEntry(weight, directory, (linear.out_features, linear.in_features), "F32")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @property
    def disputed(self) -> str | None:
        """What loaders make different things of, and how it is read here; None where there is nothing."""
        if self.form is None or not hasattr(self.form, "disputed"):
            return None
        return str(self.form.disputed(self.raw, self.config, self.schemes, self.weights)) or None

    @property
    def attention_modules(self) -> list[str]:
        """The attention modules that have scales."""
        return list(self._attention_paths)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Float tensors by their names in the float checkpoint."""
        values, plain = {}, []
        for name in names:
            if name in self._modules:
                values[name] = dequantize(self.read_linear(self._modules[name]).weight, getattr(torch, self.dtype))
            else:
                plain.append(name)
        return values | self.raw.read(plain)

    def read_linear(self, module: str) -> StoredLinear:
        """Codes and scales of one quantized linear. Raises ModelError if a tensor is missing or misshapen, or
        holds codes that are NaN."""
        assert self.form is not None
        linear, layout = self.linears[module], self._layout(module)
        for suffix, (dtype, shape) in layout.items():  # before it is read, since it may have any size
            entry = self.raw.entries.get(self.tensor_name(module, suffix))
            if entry is None:
                continue  # named below
            found, wanted = _TORCH_DTYPES.get(entry.dtype), getattr(torch, dtype)
            alike = _NUMBERS if "_offset" in suffix else _FLOATS
            if found != wanted and not {found, wanted} <= alike:
                raise self._damaged(module, suffix, f"is {entry.dtype}, not {dtype}")
            if entry.shape != shape:
                raise self._damaged(module, suffix, f"has shape {entry.shape}, not {shape}")
        read = self.raw.read(self.tensor_name(module, suffix) for suffix in layout)
        parts = {suffix: read[self.tensor_name(module, suffix)] for suffix in layout}
        for suffix, tensor in parts.items():
            if tensor.dtype == FP8 and bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any()):
                raise self._damaged(module, suffix, "holds codes that are no numbers (NaN)")
        if "weight_shape" in parts and parts["weight_shape"].tolist() != [linear.out_features, linear.in_features]:
            raise self._damaged(module, "weight_shape", f"says {parts['weight_shape'].tolist()}")
        try:
            stored: StoredLinear = self._reading(module)[1](parts, self.schemes[module])
        except ModelError as error:
            raise ModelError(f"{self.directory}: {module}: {error.message}", error.remedy) from error
        return stored

    def read_attention(self, module: str) -> dict[str, Tensor]:
        """The scales of one attention module, by the names of parts that the store has (ATTENTION_PARTS). Raises
        ModelError for offsets that its scheme does not have."""
        found = self._attention_names(self._attention_paths[module])
        names = {name: part for name, part in found.items() if part}
        zeros = self.raw.read(name for name in found if name not in names and name in self.raw.entries)
        for name, offset in zeros.items():
            if bool(offset.any()):
                raise ModelError(f"{self.directory}: {name} is not zero, and {module} is read as symmetric.",
                                 "Quantize it again without offsets.")  # fmt: skip
        read = self.raw.read(names)
        return {part: read[name].view(read[name].shape or (1,)) for name, part in names.items()}

    def _damaged(self, module: str, suffix: str, how: str) -> ModelError:
        return ModelError(f"{self.directory}: {module}.{suffix} {how}.", "Export it again.")

    def tensor_name(self, module: str, suffix: str) -> str:
        return f"{self.weights[module].removesuffix('.weight')}.{suffix}"

    def tensor_names(self, module: str) -> list[str]:
        """The tensors that stand for a quantized linear's weight."""
        return [self.tensor_name(module, suffix) for suffix in self._layout(module)]

    def _layout(self, module: str) -> Layout:
        with _understood(self.directory / "config.json"):
            return self._reading(module)[0](self.linears[module], self.schemes[module], self.dtype)

    def _reading(self, module: str) -> tuple[Callable[..., Layout], Callable[..., StoredLinear]]:
        """`layout` and `decode` of the format as this checkpoint stores the linear."""
        assert self.form is not None
        if not hasattr(self.form, "reading"):
            return self.form.layout, self.form.decode
        found: tuple[Callable[..., Layout], Callable[..., StoredLinear]] = self.form.reading(
            self.config, lambda suffix: self.raw.entries.get(self.tensor_name(module, suffix))
        )
        return found

    def _attention_names(self, path: str) -> dict[str, str]:
        assert self.form is not None
        names: dict[str, str] = self.form.attention_names(path, self.attention)
        return names

    def _find_attention(self, weights: Mapping[str, str]) -> dict[str, str]:
        """Attention module → its prefix in the checkpoint, of every module whose first scale is there.

        Attention is what linears are directly below. Raises ModelError for scales that belong to no such module, where
        there are none, and where a module has none though the format's scheme is that of all alike in the model.
        """
        if self.attention is None:
            return {}
        parents = {
            weight.removesuffix(".weight").rpartition(".")[0]: name.rpartition(".")[0]
            for name, weight in weights.items()
        }
        firsts = {path: next(iter(self._attention_names(path))) for path in parents}
        owners, suffixes = (
            {first: path for path, first in firsts.items()},
            tuple({first.removeprefix(path) for path, first in firsts.items()}),
        )
        found = {}
        for name in self.raw.entries:
            if name in owners:
                found[parents[owners[name]]] = owners[name]
            elif name.endswith(suffixes):
                raise ModelError(f"{self.directory}: {name} belongs to no attention of this model.")
        assert self.form is not None
        alike = {re.sub(r"\d+", "", path) for path in found.values()}
        without = [path for path in parents if path not in found.values() and re.sub(r"\d+", "", path) in alike]
        if not found:
            without = sorted(parents, key=lambda path: not re.search("att", path))
        if without and (not found or getattr(self.form, "ALL_ATTENTION", False)):
            raise ModelError(f"{self.directory}: {firsts[without[0]]} is missing, where {self.attention.name} is said "
                             "of the model.", "Take the weights that belong to it, or quantize again.")  # fmt: skip
        return found


@contextmanager
def _understood(config: Path) -> Iterator[None]:
    """Whatever values of a configuration make of the body, the file is at fault."""
    try:
        yield
    except (QuantcliError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{config}: what it says of quantization is not understood: {type(error).__name__}: {error}.",
                         "Download the checkpoint again.") from error  # fmt: skip


def _declared_dtype(directory: Path, config: Mapping[str, Any]) -> str:
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, dict) else {})
    named = (part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key))
    dtype = next(named, None) or stored_dtype(directory) or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{directory / 'config.json'}: the dtype {repr(dtype)[:100]} is not known.",
                         f"Known: {', '.join(DTYPES)}.")  # fmt: skip
    return dtype


class ReadStore(Store):
    """The codes and scales of a checkpoint in the place of the store that it was written from."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self.folder = checkpoint.directory
        self.checkpoint = checkpoint
        self.dtype = checkpoint.dtype
        self.schemes = checkpoint.schemes
        self.kept = {name: "in float" for name in checkpoint.linears if name not in checkpoint.schemes}
        self.attention = checkpoint.attention
        self.attention_modules = dict.fromkeys(checkpoint.attention_modules, 0)

    def read(self, name: str) -> StoredLinear:
        """The codes and scales of one linear."""
        return self.checkpoint.read_linear(name)

    def read_attention(self, module: str) -> dict[str, Tensor]:
        """The scales of one attention module."""
        return self.checkpoint.read_attention(module)
