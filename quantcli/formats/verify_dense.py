"""What a dense export has to hold, found from the store by other code than wrote it: in NumPy, from the formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import VerificationError
from quantcli.formats.store import Store, StoredLinear
from quantcli.quant.scheme import Scheme


def check_record(record: Mapping[str, Any], config: Mapping[str, Any], store: Store) -> None:
    """quantization.json says what became of every linear, and config.json says nothing of quantization."""
    if "quantization_config" in config:
        raise VerificationError("config.json has a quantization_config, and the weights are floats.", "Export again.")
    inputs = any(scheme.activations != "none" for scheme in store.schemes.values())
    wanted = {
        "format": "dense",
        "weights": "dequantized",
        "linears": {name: scheme.to_json() for name, scheme in store.schemes.items()},
        "attention": store.attention and store.attention.to_json(),
    }
    for key in {*wanted, *record} - {"not_in_it"}:
        if record.get(key) != wanted.get(key):
            raise VerificationError(f"quantization.json: {key} is not that of the store.", "Export again.")
    if bool(record.get("not_in_it")) != bool(inputs or store.attention):
        raise VerificationError("quantization.json: not_in_it does not say what is missing.", "Export again.")


def expected_linear(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None) -> dict[str, Tensor | None]:
    """X.weight [out, in]: (q − z)·s in float32, rounded to the nearest value of `dtype`, ties to even."""
    codes, scale, zero_point = stored.weight
    values = codes.float().numpy()  # NumPy has no float8
    size = values.shape[1] // scale.shape[1]
    if zero_point is not None:
        values -= np.repeat(zero_point.numpy().astype(np.float32), size, axis=1)
    values *= np.repeat(scale.float().numpy(), size, axis=1)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return {"weight": torch.from_numpy((bits >> np.uint32(16)).astype(np.uint16)).view(torch.bfloat16)}
    with np.errstate(over="ignore"):  # an engine's float16 is infinite there, too
        return {"weight": torch.from_numpy(values.astype(np.float16 if dtype == "float16" else np.float32))}
