"""What an export in Model-Optimizer's layout has to hold, found from the store by other code than wrote it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from quantcli.errors import VerificationError
from quantcli.formats.store import Store, StoredLinear
from quantcli.quant.scheme import Scheme


def expected_linear(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None) -> dict[str, Tensor | None]:
    """The tensors that stand for X.weight, by suffix: codes, and scales in float32 along one axis."""
    inputs = stored.input_scale
    return {
        "weight": stored.weight.codes,
        "weight_scale": stored.weight.scale.float().flatten(),
        "input_scale": None if inputs is None else inputs.float().flatten(),
    }


def expected_attention(path: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The scales of the cache of the attention module `path`, by what follows its name."""
    where = {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"} if path.split(".")[-1] == "self_attn" else {}
    return {where.get(part, part): scale for part, scale in parts.items()}


def check_modelopt(
    config: Mapping[str, Any], beside: Mapping[str, Any], store: Store, in_float: Collection[str]
) -> None:
    """quantization_config and hf_quant_config.json say the one scheme, the cache, and what stays in float: `in_float`,
    by names that engines take for no other module. Raises VerificationError."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise VerificationError("config.json has no quantization_config.", "Export again.")
    schemes = set(store.schemes.values())
    if len(schemes) != 1:
        raise VerificationError(f"The store has {len(schemes)} schemes, and the format holds one.", "Export again.")
    static = next(iter(schemes)).activations == "static"
    algorithm, left = "FP8" if static else "FP8_PER_CHANNEL_PER_TOKEN", sorted(in_float)
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    wanted: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": left}
    wanted["producer"] = {"name": "quantcli"}
    if static:
        group = {"input_activations": eight, "weights": eight, "targets": ["Linear"]}
        wanted["config_groups"] = {"group_0": group}
    if store.attention is not None:
        wanted["kv_cache_scheme"] = eight
    _check_same("quantization_config", found, wanted)
    cache = None if store.attention is None else "FP8"
    older = {"quant_algo": algorithm, "kv_cache_quant_algo": cache, "exclude_modules": left}
    _check_same("hf_quant_config.json", beside, {"producer": {"name": "quantcli"}, "quantization": older})
    lengths, names = {*map(len, left)}, {*left}
    shapes = [entry for entry in left if set(entry) & set("*?[")]
    for module in store.schemes:
        pieces = {module[i : i + n] for n in lengths for i in range(len(module) - n + 1)}
        if not names.isdisjoint(pieces) or any(fnmatchcase(module, shape) for shape in shapes):
            raise VerificationError(f"{module} is quantized, but engines leave it in float by the name of another.",
                                    "Export in another format.")  # fmt: skip


def _check_same(where: str, found: object, wanted: object) -> None:
    """Two JSON values are the same; 1 is not true."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*wanted, *found]:
            if key not in found or key not in wanted:
                raise VerificationError(f"{where}: {key} is {'missing' if key in wanted else 'too much'}.",
                                        "Export again.")  # fmt: skip
            _check_same(f"{where}.{key}", found[key], wanted[key])
    elif type(found) is not type(wanted) or found != wanted:
        raise VerificationError(f"{where} is not that of the store.", "Export again.")
