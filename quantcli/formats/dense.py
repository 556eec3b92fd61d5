"""dense, the dequantized model as an ordinary float checkpoint, for any program that loads one (fake quantization).

Of a linear X there is X.weight, [out, in] or transposed as the model stores it, in its dtype: (q − z)·s in float32,
rounded once, as engines unpack weights. config.json says nothing of quantization, so any tool takes the checkpoint for
a float one. What the weights went through stands in quantization.json, with what the checkpoint does not have: integer
inputs of linears and quantized caches happen while a model runs, and no float weight can hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import common
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear

NAME = "dense"
STEM = "model"
WRITES_TIED_HEAD = False
ONE_SCHEME = False
FLOAT16_SCALES = False

attention_names = common.attention_names
attention_tensors = common.attention_tensors

RECORD = "quantization.json"


def left_out(schemes: Iterable[Scheme], attention: AttentionScheme | None) -> str:
    """What of a quantized model is not in this format, as words; empty if weights are all that is quantized."""
    inputs = any(scheme.activations != "none" for scheme in schemes)
    parts = ["quantized inputs of linears"] if inputs else []
    if attention is not None:
        parts.append(f"what {attention.name} does inside attention")
    return " and ".join(parts)


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    return ""


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape)."""
    shape = linear.out_features, linear.in_features
    return {"weight": (dtype, shape[::-1] if linear.transposed else shape)}


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The weight that the codes stand for, in the model's dtype."""
    import torch

    from quantcli.quant.grid import dequantize

    weight = dequantize(stored.weight, getattr(torch, dtype))
    return {"weight": weight.t().contiguous() if linear.transposed else weight}


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """Raises ModelError: a float weight does not tell its codes. `described` names no linear, so nothing is decoded."""
    raise ModelError("A dense checkpoint holds no codes.", "Name the checkpoint or the run that it was made from.")


def attention_refusal(attention: AttentionScheme) -> str:
    """Nothing is refused; `left_out` says that it is not in the files."""
    return ""


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """quantization.json, which tells what the weights went through, and config.json of the float model."""
    missing = left_out(store.schemes.values(), store.attention)
    record: dict[str, Any] = {
        "format": NAME,
        "weights": "dequantized",
        "not_in_it": missing or None,
        **common.recorded_schemes(store),
    }
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return {RECORD: record, "config.json": plain}


def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a directory holds a checkpoint of this format."""
    record = directory / RECORD
    return "quantization_config" not in config and record.is_file() and read_json(record).get("format") == NAME


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """No linear has codes, and attention has no scales: the checkpoint is read as the float one that it is."""
    return {}, None
