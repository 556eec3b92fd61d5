"""Checking an exported checkpoint against the store and the float checkpoint, by other code than wrote it.

Tensors are read with safetensors and unpacked apart from the writer's code; JSON is read as a stranger would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats import verify_ascend, verify_dense, verify_gguf, verify_gptq, verify_modelopt
from quantcli.formats.store import Store, StoredLinear
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.folding import added_biases, unties
from quantcli.model.names import checkpoint_prefix
from quantcli.model.npy_file import NpyCheckpoint
from quantcli.model.workers import linear_workers
from quantcli.model.writer import DTYPE_NAMES
from quantcli.quant.scheme import Scheme

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_DESCRIPTIONS = {
    "dense": "quantization.json",
    "gptq": "quantize_config.json",
    "modelopt": "hf_quant_config.json",
}
# what a linear's tensors have to be; codes of compressed-tensors are unpacked instead
_EXPECTED = {
    "dense": verify_dense.expected_linear,
    "gptq": verify_gptq.expected_gptq,
    "awq": verify_gptq.expected_awq,
    "modelopt": verify_modelopt.expected_linear,
}


@dataclass(frozen=True)
class Verified:
    """What was found in order: counts of quantized linears, of other tensors, and of bytes."""

    linears: int
    other_tensors: int
    nbytes: int


def verify_checkpoint(
    folder: Path,
    store: Store,
    source: Checkpoint,
    weights: Mapping[str, str],
    cast: torch.dtype | None,
    form: str = "compressed-tensors",
    tied: Mapping[str, str] | None = None,
    split: Collection[str] = (),
    transposed: Collection[str] = (),
) -> Verified:
    """Check that the checkpoint holds the store's codes and scales exactly, and the float model's other tensors.

    Every linear of the store is quantized and nothing else is; no scale is zero or not finite; the JSON files say what
    the tensors are, and of the model what the float one's say. Other files beside the weights are not looked at. `tied`
    maps a head that is tied and not in the float checkpoint to its embedding; `split` are linears that engines split
    along their input, `transposed` those whose weights the model stores as [in, out]. Raises VerificationError with the
    module and the difference.
    """
    if form == "gguf":
        with _damage():
            _check_model(read_json(folder / "config.json"), source, store, {})
        nbytes = verify_gguf.check_gguf(folder, store, source, weights, cast)
        return Verified(len(store.schemes), len(source.entries) - len(store.schemes), nbytes)
    if form in ("gptq", "awq", "modelopt") and not store.schemes:
        form = "compressed-tensors"  # all are float checkpoints then
    of_ascend = form in verify_ascend.FORMS
    with _damage():
        checkpoint = NpyCheckpoint(folder) if form == "numpy" else Checkpoint(folder)
        config = read_json(folder / "config.json")
        about = verify_ascend.description_name(form, store) if of_ascend else _DESCRIPTIONS.get(form)
        description = read_json(folder / about) if about else {}
    if unties(source) and config.get("tie_word_embeddings") is not False:
        raise VerificationError(f"{folder}: config.json ties an output head that is not.", "Export again.")
    if biases := added_biases(source):
        if not of_ascend:
            raise VerificationError(f"{folder}: the architecture has no {biases[0]}, nor has {form}.", "Export again.")
        verify_ascend.check_added_biases(biases, store, weights)
    _check_model(config, source, store, verify_ascend.config_additions(form, store))
    paths = {module: checkpoint_prefix(module, weights) for module in store.attention_modules}
    if of_ascend:
        verify_ascend.check_description(form, description, config, checkpoint, store, weights, paths)
    elif form == "dense":
        verify_dense.check_record(description, config, store)
    elif form == "gptq":
        verify_gptq.check_gptq(config, description, store)
    elif form == "awq":
        verify_gptq.check_awq(config, store, _in_float(store, source, weights))
    elif form == "modelopt":
        verify_modelopt.check_modelopt(config, description, store, _in_float(store, source, weights))
    elif not isinstance(config.get("quantization_config"), dict):
        if store.schemes or store.attention is not None or "quantization_config" in config:
            raise VerificationError(f"{folder}: config.json has no quantization_config.", "Export again.")
    else:
        _check_configuration(config["quantization_config"], store, source, weights)
    left = dict(checkpoint.entries)
    for module, path in paths.items():
        for name in _check_attention(module, path, checkpoint, store, form):
            del left[name]
    by_prefix: dict[str, dict[str, str]] = {}
    for name in left:
        prefix, _, suffix = name.rpartition(".")
        by_prefix.setdefault(prefix, {})[suffix] = name
    with linear_workers() as workers:
        jobs = []
        for module in store.schemes:
            parts = by_prefix.get(weights[module].removesuffix(".weight"), {})
            bias = parts.pop("bias", None)
            how = (module in split, module in transposed)
            jobs.append(workers.submit(_check_module, module, checkpoint, parts, store, form, bias, *how))
            for name in parts.values():
                del left[name]
        try:
            for job in jobs:
                job.result()
        finally:
            workers.shutdown(cancel_futures=True)
    quantized = {weights[module] for module in store.schemes}
    originals = {name: name for name in source.entries if name not in quantized}
    if of_ascend:
        originals |= tied or {}
    for name, origin in originals.items():
        if name not in left:
            raise VerificationError(f"{folder}: tensor {name} of the float model is missing.", "Export again.")
        original = source.read([origin])[origin]
        # smoothed tensors are read in float32 and stored in the dtype that the file has
        own = _TORCH_DTYPES[source.entries[origin].dtype]
        wanted = original.to(cast if cast is not None and original.is_floating_point() else own)
        with _damage():
            found = checkpoint.read([name])[name]
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape) or not torch.equal(_bytes(found), _bytes(wanted)):
            raise VerificationError(f"{folder}: tensor {name} differs from the float model's.", "Export again.")
        del left[name]
    if left:
        raise VerificationError(f"{folder}: holds {next(iter(left))}, which belongs to nothing.", "Export again.")
    return Verified(len(store.schemes), len(source.entries) - len(quantized), checkpoint.nbytes)


def _check_model(config: Mapping[str, Any], source: Checkpoint, store: Store, additions: Mapping[str, Any]) -> None:
    """What config.json says of the model is what the float one says, in the dtype that is stored, and the `additions`
    of the format. quantization_config is compared elsewhere."""
    wanted = _unquantized(read_json(source.directory / "config.json"))
    wanted.pop("quantize", None)  # a source in MindIE's format has it; that format adds its own
    wanted |= {key: store.dtype for key in ("dtype", "torch_dtype") if key in wanted} or {"dtype": store.dtype}
    if isinstance(inner := wanted.get("text_config"), dict):
        wanted["text_config"] = inner | {key: store.dtype for key in ("dtype", "torch_dtype") if key in inner}
    if unties(source):
        wanted["tie_word_embeddings"] = False
    wanted |= additions
    found = _unquantized(config)
    for key in [*wanted, *found]:
        # as text: 1 is not true, and NaN is NaN
        one, other = (json.dumps(side.get(key, "absent"), sort_keys=True) for side in (found, wanted))
        if one != other:
            raise VerificationError(f"config.json: {key} is {one[:100]}, not {other[:100]}.", "Export again.")


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(left.get("text_config"), dict):
        left["text_config"] = _unquantized(left["text_config"])
    return left


@contextmanager
def _damage() -> Iterator[None]:
    """What cannot be read of an export is a failed verification, not a bad model of the user's."""
    try:
        yield
    except ModelError as error:
        raise VerificationError(error.message, "Export again.") from error


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _check_module(
    module: str,
    checkpoint: Checkpoint,
    parts: Mapping[str, str],
    store: Store,
    form: str,
    bias: str | None,
    split: bool,
    transposed: bool,
) -> None:
    with _damage():
        tensors = checkpoint.read(parts.values())
        bias_value = checkpoint.read([bias])[bias] if bias is not None else None
    found = {suffix: tensors[name] for suffix, name in parts.items()}
    stored, scheme = store.read(module), store.schemes[module]
    if form == "dense":
        _usable(module, "its scale", stored.weight.scale)
        found = {k: t.t() if transposed and k == "weight" else t for k, t in found.items()}
    if form in verify_ascend.FORMS:
        dtype = verify_ascend.derived_dtype(form, scheme, store.dtype)
        _check_parts(module, found, verify_ascend.expected_linear(stored, scheme, dtype, bias_value, split))
    elif form in _EXPECTED:
        _check_parts(module, found, _EXPECTED[form](stored, scheme, store.dtype, bias_value))
    else:
        _check_linear(module, found, stored, scheme, store.dtype)


def _check_attention(module: str, path: str, checkpoint: Checkpoint, store: Store, form: str) -> list[str]:
    """The tensors of an attention module, which are those of the store."""
    wanted: Mapping[str, Tensor | None] = {} if form == "dense" else store.read_attention(module)
    if form in verify_ascend.FORMS:
        assert store.attention is not None
        wanted = verify_ascend.expected_attention(store.read_attention(module), store.attention, store.dtype)
    if form == "modelopt":
        wanted = verify_modelopt.expected_attention(path, store.read_attention(module))
    names = {suffix: f"{path}.{suffix}" for suffix in wanted if f"{path}.{suffix}" in checkpoint}
    with _damage():
        tensors = checkpoint.read(names.values())
    _check_parts(module, {suffix: tensors[name] for suffix, name in names.items()}, wanted)
    return list(names.values())


def _check_linear(module: str, tensors: dict[str, Tensor], expected: StoredLinear, scheme: Scheme, dtype: str) -> None:
    codes, stored, zero_point = expected.weight
    scale = stored.to(getattr(torch, scheme.scale_dtype(dtype)))
    if not torch.equal(torch.nan_to_num(scale.double()), torch.nan_to_num(stored.double())):
        raise VerificationError(f"{module}: a scale of the store is no value of {dtype}.", "Quantize again.")
    whole = scheme.granularity == "tensor"
    wanted = {
        "weight_scale": scale.view(1) if whole else scale,
        "input_scale": None if expected.input_scale is None else expected.input_scale.float(),
        "input_zero_point": expected.input_zero_point,
    }
    if scheme.int8_products or scheme.type == "float":
        wanted["weight"] = codes
    else:
        wanted |= {"weight_packed": codes, "weight_shape": torch.tensor(codes.shape)}
        _unpack_in_place(module, tensors, "weight_packed", scheme.bits, codes.shape)
        if zero_point is not None:
            wanted["weight_zero_point"] = zero_point.view(1) if whole else zero_point.t()
        if zero_point is not None and not whole:
            packed = tensors.get("weight_zero_point")
            if packed is not None and packed.ndim == 2:
                tensors["weight_zero_point"] = packed.t().contiguous()
            _unpack_in_place(module, tensors, "weight_zero_point", scheme.bits, zero_point.t().shape)
    _check_parts(module, tensors, wanted)


def _check_parts(module: str, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor | None]) -> None:
    """The tensors are exactly the wanted ones, and scales are such as engines can use."""
    for name, value in wanted.items():
        found = tensors.pop(name, None)
        _same(module, name, found, value)
        if found is not None and name.endswith(("scale", "scales")):
            _usable(module, name, found)
    if tensors:
        raise VerificationError(f"{module} has {next(iter(tensors))}, which its scheme does not.", "Export again.")


def _unpack_in_place(module: str, tensors: dict[str, Tensor], name: str, bits: int, shape: torch.Size) -> None:
    """Replace packed words by signed codes int8: by the format's own library where speed allows, which is not for 4
    and 8 bits."""
    packed = tensors.get(name)
    if packed is None:
        return
    if packed.dtype != torch.int32 or packed.shape != (shape[0], -(-shape[1] * bits // 32)):
        raise VerificationError(f"{module}: {name} is {packed.dtype} {tuple(packed.shape)}, not the codes of "
                                f"{tuple(shape)}.", "Export again.")  # fmt: skip
    if bits not in (4, 8):
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        tensors[name] = unpack_from_int32(packed, bits, shape).to(torch.int8)
        return
    octets = packed.contiguous().numpy().view(np.uint8)
    if bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=-1).reshape(len(octets), -1)
    # subtracting the offset modulo 256 gives the two's complement of the signed code
    tensors[name] = torch.from_numpy((octets[:, : shape[1]] - np.uint8(1 << (bits - 1))).view(np.int8))


def _same(module: str, what: str, found: Tensor | None, expected: Tensor | None) -> None:
    if (found is None) != (expected is None):
        raise VerificationError(f"{module}: {what} {'missing' if found is None else 'unexpected'}.", "Export again.")
    if found is None or expected is None:
        return
    alike = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if not alike or not torch.equal(_bytes(found), _bytes(expected)):  # which has no rule for float8 itself
        raise VerificationError(f"{module}: {what} in the checkpoint differ from the store's.", "Export again.")


def _usable(module: str, name: str, scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()) or bool((scale == 0).any()):
        raise VerificationError(f"{module}: {name} holds a zero or a value that is not finite.", "Quantize again.")


def _check_configuration(
    config: Mapping[str, Any], store: Store, source: Checkpoint, weights: Mapping[str, str]
) -> None:
    """quantization_config, read literally, must give every linear of the store its scheme, and no other linear one."""
    _check_whole(config, store)
    ignored = config.get("ignore")
    if not isinstance(ignored, list):
        raise VerificationError("config.json: quantization_config.ignore is no list.", "Export again.")
    in_float = _in_float(store, source, weights)
    ignores = _matcher(ignored)
    for module in store.schemes:
        if ignores(module):
            raise VerificationError(f"{module} is quantized, but config.json ignores it.", "Export again.")
    for module in sorted(in_float.symmetric_difference(ignored)):
        how = "is in float, but config.json does not ignore it" if module in in_float else "is ignored without reason"
        raise VerificationError(f"{module} {how}.", "Export again.")
    groups = _groups(config)
    for target in (target for group in groups for target in group.get("targets") or ()):
        named = isinstance(target, str) and target in store.schemes
        if not named and not any(_matches(target, module) for module in store.schemes):
            raise VerificationError(f"config.json: {target} is a target, but no quantized linear.", "Export again.")
    claims = [(group, _matcher(group.get("targets") or ())) for group in groups]
    for module, scheme in store.schemes.items():
        found = [group for group, claimed in claims if claimed(module)]
        if len(found) != 1 or not _describes(found[0], scheme):
            raise VerificationError(
                f"{module}: config.json does not describe its scheme {scheme.name}.", "Export again."
            )


def _in_float(store: Store, source: Checkpoint, weights: Mapping[str, str]) -> set[str]:
    """Modules with a matrix that is not quantized, linear or not."""
    names = {tensor: module for module, tensor in weights.items()}
    matrices = {n for n, e in source.entries.items() if n.endswith(".weight") and len(e.shape) == 2}
    found = {names.get(name, name.removesuffix(".weight")) for name in matrices} - set(store.schemes)
    return found | set(store.kept)


def _check_whole(config: Mapping[str, Any], store: Store) -> None:
    """What quantization_config says beside its groups, and nothing else that an engine would act on."""
    forms = {_form(scheme) for scheme in store.schemes.values()} or {"dense"}
    expected: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "mixed-precision" if len(forms) > 1 else forms.pop(),
    }
    if store.attention is not None and store.attention.kv == "fp8":
        expected["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor",
                                       "dynamic": False}  # fmt: skip
    found = _said(config, {"config_groups", "ignore"})
    assert isinstance(found, dict)
    for key in [*expected, *found]:
        if _said(found.get(key)) != expected.get(key):
            raise VerificationError(
                f"config.json: quantization_config.{key} is not that of the store.", "Export again."
            )


def _form(scheme: Scheme) -> str:
    if scheme.type == "float":
        return "naive-quantized" if scheme.activations == "none" else "float-quantized"
    return "int-quantized" if scheme.int8_products else "pack-quantized"


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _matcher(entries: Iterable[object]) -> Callable[[str], bool]:
    """Whether `_matches` holds for any of the entries, of which there may be a name an expert."""
    exact = {entry for entry in entries if isinstance(entry, str)}
    others = [entry for entry in exact if entry == "Linear" or entry.startswith("re:")]
    return lambda module: module in exact or any(_matches(entry, module) for entry in others)


def _matches(entry: object, module: str) -> bool:
    if isinstance(entry, str) and entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    # the head, which no number is part of the name of, is no Linear to vLLM
    return entry == module or (entry == "Linear" and any(part.isdigit() for part in module.split(".")))


def _describes(group: Mapping[str, Any], scheme: Scheme) -> bool:
    """Whether the group says all of the scheme and nothing else that an engine would act on."""
    weights = {"num_bits": scheme.bits, "type": scheme.type, "symmetric": scheme.symmetric,
               "strategy": scheme.granularity, "group_size": scheme.group_size, "dynamic": False}  # fmt: skip
    inputs = None
    if scheme.activations != "none":
        dynamic = scheme.activations == "dynamic"
        inputs = {"num_bits": scheme.activation_bits, "type": scheme.type, "symmetric": scheme.activations_symmetric,
                  "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}  # fmt: skip
    return (
        _said(group, {"targets", "weights", "input_activations"}) == {"format": _form(scheme)}
        and _said(group.get("weights")) == _said(weights)
        and _said(group.get("input_activations")) == _said(inputs)
    )


def _said(entries: object, apart: Collection[str] = ()) -> object:
    """The entries that mean something: null is the default, and codes of zero points are int8 in any case."""
    if not isinstance(entries, Mapping):
        return entries
    said = {key: value for key, value in entries.items() if value is not None and key not in apart}
    return {key: value for key, value in said.items() if (key, value) != ("zp_dtype", "torch.int8")}
