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
    scale = (scheme.scale_dtype(dtype), scheme.scale_shape(out, inner))
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    if scheme.activations != "none":
        tensors = {"weight": ("int8", (out, inner)), "weight_scale": scale}
        if scheme.granularity == "tensor":
            tensors["weight_scale"] = (scale[0], (1,))
        if scheme.activations == "static":
            tensors["input_scale"] = ("float32", (1,))
            if not scheme.activations_symmetric:
                tensors["input_zero_point"] = ("int8", (1,))
        return tensors
    tensors = {"weight_packed": ("int32", (out, _words(inner, scheme.bits))), "weight_scale": scale}
    if not scheme.symmetric:
        tensors["weight_zero_point"] = ("int32", (_words(scale[1][0], scheme.bits), scale[1][1]))
    tensors["weight_shape"] = ("int64", (2,))
    return tensors


def encode(stored: StoredLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of `layout`, from the store's codes; nothing is rounded here."""
    import torch

    from quantcli.quant.packing import pack_int32

    codes, scale, zero_point = stored.weight
    if scheme.activations != "none":
        tensors = {"weight": codes, "weight_scale": scale.view(-1) if scheme.granularity == "tensor" else scale}
        if stored.input_scale is not None:
            tensors["input_scale"] = stored.input_scale
        if stored.input_zero_point is not None:
            tensors["input_zero_point"] = stored.input_zero_point
        return tensors
    tensors = {"weight_packed": pack_int32(codes, scheme.bits), "weight_scale": scale}
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_int32(zero_point.t().contiguous(), scheme.bits).t().contiguous()
    tensors["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    return tensors


def decode(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode`, from tensors by suffix. Raises ModelError when one is missing or has a wrong shape."""
    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight
    from quantcli.quant.packing import unpack_int32

    try:
        scale = tensors["weight_scale"]
        if scheme.activations != "none":
            weight = QuantizedWeight(tensors["weight"], scale.view(-1, 1), None)
            return StoredLinear(weight, tensors.get("input_scale"), tensors.get("input_zero_point"))
        rows, columns = (int(size) for size in tensors["weight_shape"])
        codes = unpack_int32(tensors["weight_packed"], scheme.bits, columns)
        zero_point = None
        if not scheme.symmetric:
            packed = tensors["weight_zero_point"].t().contiguous()
            zero_point = unpack_int32(packed, scheme.bits, scale.shape[0]).t().contiguous()
    except (KeyError, ValueError) as error:
        raise ModelError(f"{name}: the checkpoint lacks or garbles {error}.", "Export it again.") from error
    if tuple(codes.shape) != (rows, columns):
        raise ModelError(f"{name}: codes {tuple(codes.shape)} differ from weight_shape {(rows, columns)}.")
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
    except (ValidationError, ValueError) as error:
        raise ModelError(f"quantization_config is not valid: {str(error).splitlines()[0]}.") from error
    found: dict[str, Scheme] = {}
    for name in linears:
        if any(match_name(name, pattern) for pattern in config.ignore or []):
            continue
        for group in config.config_groups.values():
            if any(target == "Linear" or match_name(name, target) for target in group.targets):
                found[name] = _scheme(group)
                break
    return found


def _scheme(group: Any) -> Scheme:
    weights, activations = group.weights, group.input_activations
    if weights is None or str(getattr(weights.type, "value", weights.type)) != "int":
        raise ModelError("only integer weights of compressed-tensors are supported yet.")
    mode = "none" if activations is None else ("dynamic" if activations.dynamic else "static")
    return Scheme(
        bits=weights.num_bits,
        symmetric=weights.symmetric,
        granularity=str(getattr(weights.strategy, "value", weights.strategy)),  # type: ignore[arg-type]
        group_size=weights.group_size,
        activations=mode,  # type: ignore[arg-type]
        activations_symmetric=True if activations is None else activations.symmetric,
    )


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)
