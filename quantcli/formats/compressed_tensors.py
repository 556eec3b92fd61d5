"""compressed-tensors, the format of llm-compressor and vLLM. https://github.com/vllm-project/compressed-tensors

With quantized activations (`int-quantized`): X.weight int8 [out, in], X.weight_scale float32 [out, 1] or [1], and for
static ones X.input_scale float32 [1] and, if asymmetric, X.input_zero_point int8 [1]. Weights alone (`pack-quantized`):
X.weight_packed int32 [out, in·bits/32], X.weight_scale in the model's dtype, X.weight_zero_point int32 packed along the
output, X.weight_shape int64 [2].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.model.structure import Linear
from quantcli.quant.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import StoredLinear

NAME = "compressed-tensors"


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "describes Linear modules only, and this model's are stored transposed (Conv1D)"
    if scheme.activations != "none" and (scheme.bits != 8 or scheme.granularity == "group" or not scheme.symmetric):
        return "holds int8 activations with symmetric 8-bit weights, one scale a channel or tensor"
    return ""


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape), without a value. Known before anything is computed."""
    out, inner = linear.out_features, linear.in_features
    scale_shape: tuple[int, ...] = scheme.scale_shape(out, inner) if scheme.granularity != "tensor" else (1,)
    scale = (scheme.scale_dtype(dtype), scale_shape)
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    if scheme.activations != "none":
        tensors = {"weight": ("int8", (out, inner)), "weight_scale": scale}
        if scheme.activations == "static":
            tensors["input_scale"] = ("float32", (1,))
            if not scheme.activations_symmetric:
                tensors["input_zero_point"] = ("int8", (1,))
        return tensors
    tensors = {"weight_packed": ("int32", (out, _words(inner, scheme.bits))), "weight_scale": scale}
    if not scheme.symmetric and scheme.granularity == "tensor":
        tensors["weight_zero_point"] = ("int8", (1,))  # the format packs zero points of channels and groups only
    elif not scheme.symmetric:
        tensors["weight_zero_point"] = ("int32", (_words(scale_shape[0], scheme.bits), scale_shape[1]))
    tensors["weight_shape"] = ("int64", (2,))
    return tensors


def encode(stored: StoredLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `layout`, from the store's codes; nothing is rounded here."""
    import torch

    from quantcli.quant.packing import pack_int32

    codes, scale, zero_point = stored.weight
    scale = scale.view(-1) if scheme.granularity == "tensor" else scale
    if scheme.activations != "none":
        tensors = {"weight": codes, "weight_scale": scale}
        if stored.input_scale is not None:
            tensors["input_scale"] = stored.input_scale
        if stored.input_zero_point is not None:
            tensors["input_zero_point"] = stored.input_zero_point
        return tensors
    tensors = {"weight_packed": pack_int32(codes, scheme.bits), "weight_scale": scale}
    if zero_point is not None and scheme.granularity == "tensor":
        tensors["weight_zero_point"] = zero_point.view(-1)
    elif zero_point is not None:
        tensors["weight_zero_point"] = pack_int32(zero_point.t().contiguous(), scheme.bits).t().contiguous()
    tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    return tensors


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode`, from tensors by suffix, which have to have the shapes of `layout`."""
    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight
    from quantcli.quant.packing import unpack_int32

    scale, zero_point = tensors["weight_scale"], tensors.get("weight_zero_point")
    if scheme.granularity == "tensor":
        scale = scale.view(1, 1)
    if scheme.activations != "none":
        weight = QuantizedWeight(tensors["weight"], scale, None)
        return StoredLinear(weight, tensors.get("input_scale"), tensors.get("input_zero_point"))
    rows, columns = (int(size) for size in tensors["weight_shape"])
    codes = unpack_int32(tensors["weight_packed"], scheme.bits, columns)
    if zero_point is not None and scheme.granularity == "tensor":
        zero_point = zero_point.view(1, 1)
    elif zero_point is not None:
        zero_point = unpack_int32(zero_point.t().contiguous(), scheme.bits, rows).t().contiguous()
    return StoredLinear(QuantizedWeight(codes, scale, zero_point))


def configuration(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, built and checked by the format's own library.

    Raises ModelError if the linears do not all have one scheme: mixed schemes are not supported yet.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    distinct = set(schemes.values())
    if len(distinct) != 1:
        raise ModelError(f"compressed-tensors export of {len(distinct)} schemes in one model is not supported yet.")
    (scheme,) = distinct
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy=scheme.granularity,
        group_size=scheme.group_size,
        dynamic=False,
    )
    activations = None
    if scheme.activations != "none":
        dynamic = scheme.activations == "dynamic"
        activations = QuantizationArgs(
            num_bits=8,
            type="int",
            symmetric=scheme.activations_symmetric,
            strategy="token" if dynamic else "tensor",
            dynamic=dynamic,
        )
    form = "pack-quantized" if activations is None else "int-quantized"
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=form)
    config = QuantizationConfig(
        config_groups={"group_0": group}, format=form, quantization_status="compressed", ignore=sorted(kept)
    )
    content: dict[str, Any] = config.to_dict()
    return content


def parse_configuration(content: Mapping[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """Scheme of each linear that a `quantization_config` says is quantized.

    Raises ModelError for what is not understood.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_name
    from pydantic import ValidationError

    try:
        config = QuantizationConfig.model_validate(dict(content))
    except (ValidationError, ValueError, TypeError) as error:
        raise ModelError(f"quantization_config is not valid: {str(error).splitlines()[0]}.") from error
    if config.quantization_status != "compressed" or config.kv_cache_scheme is not None:
        raise ModelError("quantization_config: only compressed weights without a kv_cache_scheme are supported yet.")
    schemes = {name: _scheme(group, config.format) for name, group in config.config_groups.items()}
    found: dict[str, Scheme] = {}
    for name in linears:
        if any(match_name(name, pattern) for pattern in config.ignore or []):
            continue
        for key, group in config.config_groups.items():
            if any(target == "Linear" or match_name(name, target) for target in group.targets):
                found[name] = schemes[key]
                break
    return found


def _scheme(group: Any, form: str) -> Scheme:
    """The scheme that a config group describes; ModelError for one that this program neither writes nor simulates."""
    weights, inputs = group.weights, group.input_activations
    mode = "none" if inputs is None else ("dynamic" if inputs.dynamic else "static")
    wanted = "pack-quantized" if inputs is None else "int-quantized"
    understood = (
        weights is not None
        and (weights.type, bool(weights.dynamic), weights.actorder != "group") == ("int", False, True)
        and weights.strategy in ("tensor", "channel", "group")
        and group.output_activations is None
        and (group.format or form) == wanted
    )
    if understood and inputs is not None:
        strategy = "token" if mode == "dynamic" else "tensor"
        understood = (inputs.type, inputs.num_bits, inputs.strategy) == ("int", 8, strategy)
        understood &= weights.symmetric and (inputs.symmetric or mode == "static")
        understood &= weights.num_bits == 8 and weights.strategy != "group"
    if not understood:
        raise ModelError("quantization_config describes a scheme that is not supported: only integer weights, alone or "
                         "with 8-bit inputs, are.")  # fmt: skip
    return Scheme(
        bits=weights.num_bits,
        symmetric=weights.symmetric,
        granularity=str(getattr(weights.strategy, "value", weights.strategy)),  # type: ignore[arg-type]
        group_size=weights.group_size,
        activations=mode,  # type: ignore[arg-type]
        activations_symmetric=True if inputs is None else inputs.symmetric,
    )


def _words(values: int, bits: int) -> int:
    """`quant.packing.packed_columns` without torch."""
    return -(-values * bits // 32)
