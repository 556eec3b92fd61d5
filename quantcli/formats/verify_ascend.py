"""What an export in AscendV1, or in its older layout, has to hold, found from the store by other code than wrote it: in
NumPy, from the formulas.

Names, types and formulas are those that engines read, not those of `formats.ascend`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantcli.errors import VerificationError
from quantcli.formats.store import Store, StoredLinear
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure import Structure
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from quantcli.formats.reader import QuantizedCheckpoint

FORMS = ("ascend", "mindie", "numpy")
"""Formats whose linears and attention have the tensors of AscendV1."""

_ABOUT_THE_MODEL = {"model_quant_type", "version", "group_size", "kv_cache_type", "kv_quant_type", "fa_quant_type"}


def type_of_model(store: Store) -> str:
    """The type that stands for all linears of a model."""
    return _highest({_type(scheme) for scheme in store.schemes.values()})


def description_name(form: str, store: Store) -> str:
    """The file that describes the tensors."""
    if form == "numpy":
        return "quantization.json"
    kind = f"_{type_of_model(store).lower()}" if form == "mindie" else ""
    return f"quant_model_description{kind}.json"


def config_additions(form: str, store: Store) -> dict[str, Any]:
    """What config.json says beside what the float model's does, quantization_config apart."""
    return {"quantize": type_of_model(store).lower()} if form == "mindie" else {}


def check_description(
    form: str,
    description: Mapping[str, Any],
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    store: Store,
    weights: Mapping[str, str],
    attention_paths: Mapping[str, str],
) -> None:
    """Every tensor has the type of its linear or attention module, or FLOAT, and nothing else is described; files have
    the names, and quantization_config says, what engines look for.

    `attention_paths` are the prefixes of attention modules. Raises VerificationError.
    """
    if form != "mindie" and "quantization_config" in config:
        raise VerificationError("config.json has a quantization_config, which hides the description.", "Export again.")
    if form == "numpy":
        _check_record(description, store)
        return
    types = {weights[module].removesuffix(".weight"): _type(scheme) for module, scheme in store.schemes.items()}
    attention, prefixes = store.attention, tuple(f"{path}." for path in attention_paths.values())
    heads = attention is not None and attention.heads
    of_attention = ("fa_q.", "fa_k.", "fa_v.") if heads else ("k_proj.kv_", "v_proj.kv_")
    wanted: dict[str, Any] = {"model_quant_type": type_of_model(store)}
    for name in checkpoint.entries:
        prefix, _, suffix = name.rpartition(".")
        wanted[name] = types.get(prefix, "FLOAT") if suffix != "bias" else "FLOAT"
        below = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), "")
        if below.startswith(of_attention):
            wanted[name] = "FAQuant" if heads else "C8"
    sizes = {scheme.group_size for scheme in store.schemes.values() if scheme.granularity == "group"}
    size = sizes.pop() if sizes else 0
    if heads:
        wanted["fa_quant_type"] = "FAQuant"
    elif attention is not None:
        wanted["kv_cache_type"] = "C8"
    if form == "ascend":
        wanted |= {"version": "1.0.0", "group_size": size}
        wanted |= {"kv_quant_type": "C8"} if "kv_cache_type" in wanted else {}
    else:
        said = {"kv_quant_type": wanted.get("kv_cache_type"), "fa_quant_type": wanted.get("fa_quant_type"),
                "group_size": size}  # fmt: skip
        _check_mindie(config, said, checkpoint, store)
    for name in [*wanted, *description]:
        if description.get(name) != wanted.get(name):
            kind = "entry" if name in _ABOUT_THE_MODEL else "tensor"
            raise VerificationError(
                f"{description_name(form, store)}: {kind} {name} is {description.get(name)!r}, not "
                f"{wanted.get(name)!r}.",
                "Export again.",
            )


def check_added_biases(biases: Iterable[str], store: Store, weights: Mapping[str, str]) -> None:
    """Biases that the architecture lacks are of linears whose quant_bias has them, or of norms that engines give one,
    which they know by `norm.bias`. `biases` are parameters, `weights` as above. Raises VerificationError."""
    for name in biases:
        owner = name.removesuffix(".bias")
        scheme = store.schemes.get(owner)
        static = scheme is not None and _type(scheme) in ("W8A8", "W8A8S")
        if not (static if owner in weights else name.endswith("norm.bias")):
            raise VerificationError(f"{name} is added to the architecture, and no engine would add it.",
                                    "Smooth again.")  # fmt: skip


def check_description_alone(checkpoint: QuantizedCheckpoint, structure: Structure, weights: Mapping[str, str]) -> None:
    """Without a store: every tensor is described and every described one is there, the parts of a linear have its type,
    linears that engines join have one type, and a tied output head is described, since engines look for it.

    `weights` maps linears to their weights. Raises VerificationError.
    """
    file = checkpoint.directory / "quant_model_description.json"
    if not file.is_file():  # the older layout, of which there is one or it was not read
        (file,) = checkpoint.directory.glob("quant_model_description_*.json")
    description = read_json(file)
    tensors = Checkpoint(checkpoint.directory).entries  # without those that are derived
    for name in tensors:
        if not isinstance(description.get(name), str):
            raise VerificationError(f"{file}: {name} is not described, and engines look for it.", "Export it again.")
    for name, kind in description.items():
        if "." in name and isinstance(kind, str) and name not in tensors:
            raise VerificationError(f"{file}: describes {name}, which is not there.", "Export it again.")
    head = f"{structure.head}.weight"
    if structure.head is not None and structure.tied and head not in description:
        raise VerificationError(f"{file}: {head} is not described, and engines look for it.", "Export it again.")
    for module in checkpoint.schemes:
        kind = description[weights[module]]
        for name in checkpoint.tensor_names(module):
            if description.get(name, kind) != kind:
                raise VerificationError(f"{file}: {name} is {description[name]}, and the weight {kind}.",
                                        "Export it again.")  # fmt: skip
    for block in structure.blocks:
        for first, *others in block.fused:
            for other in others:
                one, two = (description.get(weights.get(name, "")) for name in (first, other))
                if one != two:
                    raise VerificationError(f"{file}: {first} is {one} and {other} is {two}, and engines join them.",
                                            "Quantize both alike.")  # fmt: skip


def check_added_alone(checkpoint: QuantizedCheckpoint, module: str, stored: StoredLinear) -> None:
    """Without a store: what engines add to the products of a linear belongs to its codes, scales and bias, which the
    evaluation reads instead. Raises VerificationError.

    Tools compute these from scales of more or fewer bits than they store: quant_bias may be one off, and 2^-8 of the
    bias, and scale_bias 2^-6 of the largest sum of its linear.
    """
    parts = {name.rpartition(".")[2]: name for name in checkpoint.tensor_names(module)}
    codes = stored.weight.codes.double().numpy()
    if "quant_bias" in parts and stored.input_scale is not None:
        name = parts["quant_bias"]
        prefix = name.removesuffix("quant_bias")
        bias = checkpoint.raw.read([f"{prefix}bias"])[f"{prefix}bias"] if f"{prefix}bias" in checkpoint.raw else None
        scale = stored.input_scale.double() * stored.weight.scale.double().view(-1)
        added = np.zeros(len(codes)) if bias is None else (bias.double() / scale).numpy()
        offset = 0 if stored.input_zero_point is None else int(stored.input_zero_point)
        wanted, room = added - offset * codes.sum(1), 1 + np.abs(added) / 256
    elif "scale_bias" in parts:
        name = parts["scale_bias"]
        count = checkpoint.raw.entries[name].shape[1]
        values = codes.reshape(*stored.weight.scale.shape, -1) * stored.weight.scale.double().numpy()[..., None]
        wanted = 8 * values.reshape(len(codes), count, -1).sum(2)
        room = np.abs(wanted).max() / 64
    else:
        return
    if not bool((np.abs(checkpoint.raw.read([name])[name].double().numpy() - wanted) <= room).all()):
        raise VerificationError(f"{checkpoint.directory}: {name} is not that of the codes, scales and bias.",
                                "Quantize it again.")  # fmt: skip


def _check_record(record: Mapping[str, Any], store: Store) -> None:
    attention = store.attention
    wanted = {
        "format": "numpy",
        "linears": {name: scheme.to_json() for name, scheme in store.schemes.items()},
        "attention": None if attention is None else attention.to_json(),
    }
    for key in [*wanted, *record]:
        if json.dumps(record.get(key), sort_keys=True) != json.dumps(wanted.get(key), sort_keys=True):
            raise VerificationError(f"quantization.json: {key} is not that of the store.", "Export again.")


def _check_mindie(config: Mapping[str, Any], said: Mapping[str, Any], checkpoint: Checkpoint, store: Store) -> None:
    stem = f"quant_model_weight_{type_of_model(store).lower()}"
    names = re.compile(rf"{stem}(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors(\.index\.json)?")
    for file in sorted(checkpoint.directory.glob("*.safetensors*")):
        if names.fullmatch(file.name) is None:
            raise VerificationError(f"{file}: engines look for {stem}.", "Export again.")
    if json.dumps(config.get("quantization_config"), sort_keys=True) != json.dumps(said, sort_keys=True):
        raise VerificationError("config.json: quantization_config is not that of the store.", "Export again.")


def _type(scheme: Scheme) -> str:
    if scheme.sparse:
        return "W8A8S"
    if scheme.type == "float":
        return "WFP8AFP8_DYNAMIC"
    if scheme.bits == 4:
        return "W4A16" if scheme.activations == "none" else "W4A8_DYNAMIC"
    return "W8A16" if scheme.activations == "none" else "W8A8" + {
        "static": "", "dynamic": "_DYNAMIC", "mix": "_MIX"
    }[scheme.activations]  # fmt: skip


def _highest(types: set[str]) -> str:
    ascending = ["W4A16", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8", "W8A8S", "WFP8AFP8_DYNAMIC",
                 "W4A8_DYNAMIC"]  # fmt: skip
    return next((kind for kind in reversed(ascending) if kind in types), "FLOAT")


def derived_dtype(form: str, scheme: Scheme, dtype: str) -> str:
    """The dtype that tensors of a linear in a model of `dtype` follow: in dictionaries of NumPy, which has no bfloat16,
    scales that no product of 8-bit inputs hangs on are float32."""
    return "float32" if (form, scheme.activations, dtype) == ("numpy", "none", "bfloat16") else dtype


def expected_linear(
    stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, split: bool = False
) -> dict[str, Tensor | None]:
    """The tensors that stand for X.weight in a model of `dtype`, by suffix. `bias` [n] is as the checkpoint holds it,
    `split` says that engines cut the linear along its input. Raises VerificationError for a scale beside inputs in
    float that is no value of `dtype`."""
    if scheme.bits == 4:
        dynamic = scheme.activations == "dynamic"
        return _expected_w4a8(stored, dtype, 16 if split else 1) if dynamic else _expected_four_bits(stored, dtype)
    codes = stored.weight.codes.float().numpy()
    scale = np.repeat(_float32(stored.weight.scale).reshape(-1), 1 if len(stored.weight.scale) > 1 else len(codes))
    zero = np.zeros_like(scale) if stored.weight.zero_point is None else _float32(stored.weight.zero_point)
    zero = np.broadcast_to(zero.reshape(-1), scale.shape)
    if scheme.activations in ("dynamic", "mix"):
        scale = _rounded(scale, dtype)
    held = dtype if scheme.activations == "none" else "float32"
    tensors: dict[str, Tensor | None] = {
        "weight": stored.weight.codes,
        "weight_scale": _held(torch.from_numpy(scale[:, None].copy()), held),
        "weight_offset": torch.from_numpy(zero[:, None].copy()).to(getattr(torch, held)),
    }
    if scheme.activations not in ("static", "mix") or stored.input_scale is None:
        return tensors
    input_scale = _rounded(_float32(stored.input_scale), dtype)
    offset = 0 if stored.input_zero_point is None else stored.input_zero_point.item()
    # other tools round the products of scales that they have in 16 bits to these, too
    deq_scale = _nearest(input_scale * scale, str(stored.weight.scale.dtype).removeprefix("torch."))[0]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # a scale of zero is found in the export
        quotient = np.zeros_like(deq_scale) if bias is None else _float32(bias) / deq_scale
        quant_bias = np.rint(quotient.astype(np.float64) - offset * codes.astype(np.float64).sum(1)).astype(np.int32)
    bits = deq_scale if dtype == "bfloat16" else deq_scale.view(np.uint32).astype(np.int64)
    return tensors | {
        "input_scale": torch.from_numpy(input_scale),
        "input_offset": torch.tensor([float(offset)]),
        "deq_scale": torch.from_numpy(bits),
        "quant_bias": torch.from_numpy(quant_bias),
    }


def _expected_four_bits(stored: StoredLinear, dtype: str) -> dict[str, Tensor | None]:
    """Bytes of two codes each: along the inputs with one scale a row, along the outputs with several."""
    codes = stored.weight.codes.numpy().astype(np.uint8) & 15
    scale = stored.weight.scale.expand(len(codes), -1).contiguous()
    packed = codes[:, ::2] + 16 * codes[:, 1::2] if scale.shape[1] == 1 else codes[::2] + 16 * codes[1::2]
    zero = torch.zeros_like(scale) if stored.weight.zero_point is None else stored.weight.zero_point.to(scale.dtype)
    return {
        "weight": torch.from_numpy(packed.astype(np.uint8).view(np.int8)),
        "weight_scale": _held(scale, dtype),
        "weight_offset": zero.expand(scale.shape).to(getattr(torch, dtype)),
    }


def _expected_w4a8(stored: StoredLinear, dtype: str, parts: int) -> dict[str, Tensor | None]:
    """Bytes of two outputs each, one scale a row, and eight times the sum of weights over each part of the inputs."""
    codes = stored.weight.codes.numpy()
    nibbles = codes.astype(np.uint8) & 15
    scale = np.broadcast_to(_rounded(_float32(stored.weight.scale), dtype), (len(codes), 1))
    sums = np.stack([8 * part.astype(np.float64).sum(1) for part in np.split(codes, parts, axis=1)], axis=1)
    return {
        "weight": torch.from_numpy((nibbles[::2] + 16 * nibbles[1::2]).astype(np.uint8).view(np.int8)),
        "weight_scale": torch.from_numpy(scale.copy()),
        "weight_offset": torch.zeros(scale.shape),
        "scale_bias": torch.from_numpy(sums.astype(np.float32) * scale),
    }


def expected_attention(parts: Mapping[str, Tensor], attention: AttentionScheme, dtype: str) -> dict[str, Tensor | None]:
    """The tensors below an attention module, by the rest of their names."""
    tensors: dict[str, Tensor | None] = {}
    for letter in "qkv" if attention.heads else "kv":
        scale = parts[f"fa_{letter}_scale" if attention.heads else f"{letter}_scale"]
        rounded = torch.from_numpy(_rounded(_float32(scale), dtype))
        if attention.heads:
            tensors[f"fa_{letter}.scale"] = rounded
            tensors[f"fa_{letter}.offset"] = torch.zeros(scale.shape, dtype=torch.int8)
        else:
            tensors[f"{letter}_proj.kv_cache_scale"] = rounded
            tensors[f"{letter}_proj.kv_cache_offset"] = parts.get(f"{letter}_offset", torch.zeros(scale.shape))
    return tensors


def _held(scale: Tensor, dtype: str) -> Tensor:
    """The store's very values in `dtype`."""
    held = scale.to(getattr(torch, dtype))
    if not np.array_equal(_float32(held), _float32(scale), equal_nan=True):
        raise VerificationError(f"A scale of the store is no {dtype} value.", "Quantize for this format again.")
    return held


def _float32(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.float().numpy()


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Scales as `dtype` holds them; what underflows is the smallest normal number, not zero."""
    found, tiny = _nearest(values, dtype)
    return np.where((found == 0) & (values != 0), np.float32(tiny), found).astype(np.float32)


def _nearest(values: NDArray[np.float32], dtype: str) -> tuple[NDArray[np.float32], float]:
    """The values of `dtype` that are nearest, ties to even and none infinite, and its smallest normal number."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits & np.uint32(0xFFFF0000)).view(np.float32), 2.0**-126
    if dtype == "float16":
        return values.clip(None, 65504).astype(np.float16).astype(np.float32), 2.0**-14
    return values, 0.0
