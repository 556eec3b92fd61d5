"""Reading an exported checkpoint back: the independent side of every number in a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from quantcli.errors import ModelError
from quantcli.formats.store import StoredLinear
from quantcli.formats.table import FORMATS
from quantcli.model.checkpoint import Checkpoint, TensorEntry, read_json
from quantcli.model.structure import Linear
from quantcli.quant.grid import dequantize
from quantcli.quant.scheme import Scheme


class QuantizedCheckpoint:
    """A quantized checkpoint that reads like a float one: X.weight is dequantized when it is asked for.

    (q − z)·s is computed in float32 and rounded to the model's dtype, as engines do that unpack weights. `linears` are
    the model's linears by name, `weights` the float checkpoint's name of each one's weight. Raises ModelError for a
    format that is not known.
    """

    def __init__(self, directory: Path, linears: Mapping[str, Linear], weights: Mapping[str, str]) -> None:
        self.directory = directory
        self.raw = Checkpoint(directory)
        config = read_json(directory / "config.json")
        self.content = config.get("quantization_config")
        if not isinstance(self.content, dict):
            raise ModelError(f"{directory} is not a quantized checkpoint: config.json has no quantization_config.")
        method = str(self.content.get("quant_method"))
        if method not in FORMATS:
            raise ModelError(f"{directory} is quantized by {method!r}.", f"Known formats: {', '.join(FORMATS)}.")
        self.form: ModuleType = FORMATS[method]
        self.dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        self.linears = linears
        self.schemes: dict[str, Scheme] = self.form.parse_configuration(self.content, linears)
        self.weights = {name: weights[name] for name in self.schemes}
        self._modules = {weight: name for name, weight in self.weights.items()}
        parts = {self.tensor_name(name, suffix) for name in self.schemes for suffix in self._suffixes(name)}
        self.entries = {name: entry for name, entry in self.raw.entries.items() if name not in parts}
        for name, weight in self.weights.items():
            linear = linears[name]
            self.entries[weight] = TensorEntry(weight, directory, (linear.out_features, linear.in_features), "F32")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

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
        """Codes and scales of one quantized linear. Raises ModelError if a tensor is missing or misshapen."""
        linear, scheme = self.linears[module], self.schemes[module]
        layout = self.form.layout(linear, scheme, self.dtype)
        read = self.raw.read(self.tensor_name(module, suffix) for suffix in layout)
        parts = {suffix: read[self.tensor_name(module, suffix)] for suffix in layout}
        for suffix, (dtype, shape) in layout.items():
            tensor, wanted = parts[suffix], getattr(torch, dtype)
            if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
                raise self._damaged(module, suffix, f"is {tensor.dtype}, not {wanted}")
            if tuple(tensor.shape) != shape:
                raise self._damaged(module, suffix, f"has shape {tuple(tensor.shape)}, not {shape}")
        if "weight_shape" in parts and parts["weight_shape"].tolist() != [linear.out_features, linear.in_features]:
            raise self._damaged(module, "weight_shape", f"says {parts['weight_shape'].tolist()}")
        stored: StoredLinear = self.form.decode(parts, scheme)
        return stored

    def _damaged(self, module: str, suffix: str, how: str) -> ModelError:
        return ModelError(f"{self.directory}: {module}.{suffix} {how}.", "Export it again.")

    def tensor_name(self, module: str, suffix: str) -> str:
        return f"{self.weights[module].removesuffix('.weight')}.{suffix}"

    def _suffixes(self, module: str) -> list[str]:
        return list(self.form.layout(self.linears[module], self.schemes[module], self.dtype))
