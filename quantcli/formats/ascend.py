"""AscendV1, the format of msModelSlim that vLLM-Ascend and MindIE load. https://gitcode.com/Ascend/msmodelslim

Weights in quant_model_weights*.safetensors; quant_model_description.json maps the name of every tensor to a type. Of a
linear X with weight [n, k]:

    all              X.weight int8 [n, k]; X.weight_scale, X.weight_offset [n, 1]
    W4A16            X.weight int8 [n, k/2], a pair of inputs a byte, or with groups [n/2, k], a pair of outputs, the
                     first in the low nibble; X.weight_scale, X.weight_offset [n, groups]
    W4A8_DYNAMIC     X.weight int8 [n/2, k], a pair of outputs a byte likewise; X.scale_bias float32 [n, 1], or [n, 16]
                     for linears that engines split along the input (`Linear.splits_input`)
    WFP8AFP8_DYNAMIC X.weight float8_e4m3fn [n, k]
    W8A8, W8A8S,     X.input_scale, X.input_offset float32 [1]; X.quant_bias int32 [n]; X.deq_scale [n], float32 for
    W8A8_MIX         bfloat16 models, else int64 that holds the bits of the float32
    FLOAT            X.weight, X.bias; a bias stays beside every other type, too. Norms N have N.weight and N.bias,
                     which engines add where the architecture has none, too, if the name ends in `norm.bias`

and of an attention module A: for C8 A.k_proj.kv_cache_scale and .kv_cache_offset, and A.v_proj's, float32 [kv_heads ·
head_size]; for FAQuant A.fa_q.scale float32 [heads, 1] and .offset int8, and A.fa_k's and A.fa_v's [kv_heads, 1].

msModelSlim also writes, and only `reading` knows: with mm_tensor one scale a tensor, weight_scale, weight_offset and
deq_scale [1]; and W4A8_DYNAMIC with groups, whose weight_scale [n, 1] is multiplied by X.weight_scale_second
[n, groups] beside X.weight_offset_second, zeros.

    W ≈ (weight − weight_offset) · weight_scale
    static:  q = clamp(round(x / input_scale + input_offset), −128, 127);  y = (q · weightᵀ + quant_bias) · deq_scale
             deq_scale = input_scale · weight_scale;  quant_bias = round(bias / deq_scale − input_offset · Σ_k weight)
    dynamic: y = (q · weightᵀ) · s_token · weight_scale + bias
    W4A8:    scale_bias = 8 · Σ_k weight · weight_scale, over all inputs or each of 16 equal parts of them, by which
             kernels correct for the high nibbles of activations; a device of several adds up its own parts
    cache:   q = clamp(round(k / kv_cache_scale + kv_cache_offset), −128, 127)

Engines hold input_scale, the weight_scale of dynamic inputs, and the scales of attention in the model's dtype. They are
rounded to it here, before what is derived from them is computed, and `decode` returns what is written: what is
evaluated is what is served. The weight_scale of static inputs is not rounded, since engines multiply by deq_scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats.ascend_description import SECOND, TYPES, described_in
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear

NAME = "ascend"
STEM = "quant_model_weights"
WRITES_TIED_HEAD = True
"""An output head that is tied to the embedding is written as a copy: engines look for its name in the description."""
ONE_SCHEME = False
FLOAT16_SCALES = False
RESTRICTED = True

DESCRIPTION = "quant_model_description.json"
ONE_GROUP_SIZE = True
"""The description names one for all linears that have groups."""
PARTS = 16
"""Into how many devices a linear of 4 bits can be split along its input, each with sums in scale_bias of its own."""

_WHOLE = ("weight_scale", "weight_offset", "deq_scale")
_CACHE = {"k_scale": "k_proj.kv_cache_scale", "k_offset": "k_proj.kv_cache_offset",
          "v_scale": "v_proj.kv_cache_scale", "v_offset": "v_proj.kv_cache_offset"}  # fmt: skip
_HEADS = {"fa_q_scale": "fa_q.scale", "fa_k_scale": "fa_k.scale", "fa_v_scale": "fa_v.scale"}


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "holds weights as [out, in], and this model's are stored transposed (Conv1D)"
    if scheme.type == "float":
        return "" if scheme.activations == "dynamic" else "holds fp8 weights with a scale for every token of the input"
    if scheme.bits == 4 and scheme.activations == "none":
        along_out = scheme.scale_shape(linear.out_features, linear.in_features)[1] > 1
        odd = (linear.out_features if along_out else linear.in_features) % 2
        return f"packs {'outputs' if along_out else 'inputs'} in pairs, and their number is odd" if odd else ""
    if scheme.bits not in (4, 8):
        return f"is written with weights of 8 and 4 bits, not {scheme.name}"
    if scheme.bits == 4 and scheme.activations != "dynamic":
        return f"holds 4-bit weights beside dynamic inputs or inputs in float, not {scheme.name}"
    if scheme.activations != "none" and scheme.activation_bits != 8:
        return f"is written with 8-bit activations only, not {scheme.activation_bits}-bit ones"
    if scheme.granularity == "group":
        kind = "8-bit weights" if scheme.bits == 8 else "4-bit weights beside 8-bit inputs"
        return f"holds {kind} with one scale a channel or tensor, not a group: set weights.granularity to channel"
    if scheme.activations != "none" and not scheme.symmetric:
        return "holds int8 activations with symmetric weights"
    if scheme.activations == "dynamic" and not scheme.activations_symmetric:
        return "holds symmetric dynamic activations"
    if scheme.sparse and scheme.activations != "static":
        return "holds sparse codes with static activations (W8A8S)"
    if scheme.bits == 4 and linear.out_features % 2:
        return "packs outputs in pairs, and their number is odd"
    if scheme.bits == 4 and linear.splits_input and linear.in_features % PARTS:
        return f"adds up scale_bias over {PARTS} parts of the input, and {linear.in_features} channels make none"
    return ""


def attention_refusal(attention: AttentionScheme) -> str:
    """Why this format cannot hold keys, values and queries under the scheme; empty when it can."""
    if attention.kv == "fp8":
        return "holds an int8 cache, not fp8"
    if attention.heads and attention.kv != "none":
        return "holds either an int8 cache or int8 products a head, not both"
    return ""


def takes_added_bias(scheme: Scheme) -> bool:
    """Whether engines add a bias that the architecture lacks to what a linear of this scheme puts out: where it is in
    quant_bias, which they look for in any case. A bias in float they take for architectures alone that have one."""
    return scheme.activations == "static"


def type_name(scheme: Scheme) -> str:
    """The format's name of a scheme that it does not refuse."""
    if scheme.type == "float":
        return "WFP8AFP8_DYNAMIC"
    if scheme.bits == 4:
        return "W4A16" if scheme.activations == "none" else "W4A8_DYNAMIC"
    if scheme.activations == "static":
        return "W8A8S" if scheme.sparse else "W8A8"
    return {"none": "W8A16", "dynamic": "W8A8_DYNAMIC", "mix": "W8A8_MIX"}[scheme.activations]


def model_type(schemes: Iterable[Scheme]) -> str:
    """The type of a model whose linears have these schemes."""
    return max({"FLOAT", *map(type_name, schemes)}, key=TYPES.index)


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape), without a value. Known before anything is computed."""
    out, inner = linear.out_features, linear.in_features
    groups = scheme.scale_shape(out, inner)[1]
    codes: tuple[int, ...] = (out, inner)
    if scheme.bits == 4:
        codes = (out // 2, inner) if _packed_axis(scheme, groups) == 0 else (out, inner // 2)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("float8_e4m3fn" if scheme.type == "float" else "int8", codes)
    }
    if scheme.observed:
        tensors |= {
            "input_scale": ("float32", (1,)),
            "input_offset": ("float32", (1,)),
            "quant_bias": ("int32", (out,)),
            "deq_scale": ("float32" if dtype == "bfloat16" else "int64", (out,)),
        }
    scale = _scale_dtype(scheme, dtype)
    tensors |= {"weight_scale": (scale, (out, groups)), "weight_offset": (scale, (out, groups))}
    if scheme.bits == 4 and scheme.activations == "dynamic":
        tensors["scale_bias"] = ("float32", (out, PARTS if linear.splits_input else 1))
    return tensors


def _packed_axis(scheme: Scheme, groups: int) -> int:
    """The axis along which two codes of 4 bits share a byte, with scales of so many groups."""
    return 1 if scheme.activations == "none" and groups == 1 else 0


def _scale_dtype(scheme: Scheme, dtype: str) -> str:
    """The dtype of weight_scale in the file: float32 beside 8-bit inputs, whose values are those of the model's; else
    the model's, also where another format of the run has the scales of a float32 model be values of float16."""
    return dtype if scheme.activations == "none" else "float32"


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout` from the store's codes, for a model of `dtype` and the linear's bias [n], if it has one.

    One scale a tensor is repeated for every channel, as engines want it. Raises ModelError for a scale beside inputs in
    float that the model's dtype does not hold, and if deq_scale underflows or quant_bias does not fit int32.
    """
    import torch

    from quantcli.formats.store import held_scale

    codes, scale, zero_point = stored.weight
    own = getattr(torch, dtype)
    written = getattr(torch, _scale_dtype(scheme, dtype))
    if scheme.activations in ("dynamic", "mix"):
        scale = _rounded(scale, own).to(scale.dtype)
    scale = scale.expand(len(codes), scale.shape[1])
    tensors = {"weight": codes if scheme.bits == 8 else _paired(codes, _packed_axis(scheme, scale.shape[1]))}
    if scheme.observed:
        assert stored.input_scale is not None
        input_scale = _rounded(stored.input_scale, own)
        offset = 0 if stored.input_zero_point is None else int(stored.input_zero_point)
        # in the precision of the scale, which is float32 beside 8-bit activations unless another tool rounded it
        deq_scale = (input_scale * scale.float()).to(scale.dtype).float().view(-1)
        tensors |= {
            "input_scale": input_scale,
            "input_offset": torch.tensor([float(offset)]),
            "quant_bias": _quant_bias(codes, offset, deq_scale, bias),
            "deq_scale": deq_scale if dtype == "bfloat16" else deq_scale.view(torch.int32).to(torch.int64),
        }
    weight_scale = held_scale(scale, written).contiguous()
    weight_offset = torch.zeros_like(weight_scale)
    if zero_point is not None:
        weight_offset.copy_(zero_point)
    tensors |= {"weight_scale": weight_scale, "weight_offset": weight_offset}
    if scheme.bits == 4 and scheme.activations == "dynamic":
        sums = codes.unflatten(1, (PARTS if linear.splits_input else 1, -1)).sum(2, dtype=torch.int64)
        tensors["scale_bias"] = (8 * sums).float() * weight_scale
    return tensors


def _paired(codes: Tensor, axis: int) -> Tensor:
    """Two codes of 4 bits a byte, neighbours along an axis, the first in the low nibble: int8."""
    first, second = codes.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return ((first & 15) | (second << 4)).contiguous()


def reading(
    config: Mapping[str, Any], has: Callable[[str], bool]
) -> tuple[Callable[..., dict[str, tuple[str, tuple[int, ...]]]], Callable[..., StoredLinear]]:
    """`layout` and `decode` for a linear as msModelSlim may have written it, too, which its scheme tells."""
    return layout_of_others, decode


def layout_of_others(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`layout`, but for what only msModelSlim writes: one scale a tensor as [1], and groups of W4A8 in two stages."""
    tensors = layout(linear, scheme, dtype)
    if scheme.granularity == "tensor":
        tensors |= {name: (tensors[name][0], (1,)) for name in _WHOLE if name in tensors}
    if scheme.granularity == "group" and scheme.activations == "dynamic":
        groups = scheme.scale_shape(linear.out_features, linear.in_features)
        tensors |= dict.fromkeys(("weight_scale", "weight_offset"), ("float32", (linear.out_features, 1)))
        tensors |= {SECOND: ("float32", groups), "weight_offset_second": ("float32", groups)}
    return tensors


def _apart(paired: Tensor, axis: int) -> Tensor:
    """The inverse of `_paired`: int8 codes."""
    import torch

    return torch.stack(((paired << 4) >> 4, paired >> 4), axis + 1).flatten(axis, axis + 1)


def _quant_bias(codes: Tensor, offset: int, deq_scale: Tensor, bias: Tensor | None) -> Tensor:
    """round(bias / deq_scale − offset · Σ_k codes): int32 [n]. The quotient is made in float32 as engines' tools do."""
    import torch

    if not bool((torch.isfinite(deq_scale) & (deq_scale != 0)).all()):
        raise ModelError("deq_scale = input_scale · weight_scale is zero or not finite in float32.", "Roll it back.")
    correction = offset * codes.sum(1, dtype=torch.int64)
    values = -correction.double()
    if bias is not None:
        values += (bias.float() / deq_scale).double()
    rounded = values.round()
    if not bool((rounded.abs() < 2**31).all()):
        raise ModelError("quant_bias = bias / deq_scale does not fit int32.", "Roll it back.")
    return rounded.to(torch.int32)


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """What the file holds of a linear, from tensors by suffix, which have to have the shapes of `layout_of_others`.

    The two scales of a group become their product in float32. Raises ModelError for offsets that the scheme does not
    have or int8 does not hold, and a deq_scale that is not input_scale · weight_scale.
    """
    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight

    unused = [name for name in ("weight_offset", "weight_offset_second") if scheme.symmetric and name in tensors]
    if moved := [name for name in unused if bool(tensors[name].any())]:
        raise ModelError(f"{moved[0]} is not zero, and weights of {scheme.name} are read as symmetric.",
                         "Quantize it again with symmetric weights.")  # fmt: skip
    codes, scale = tensors["weight"], tensors["weight_scale"]
    if scheme.granularity == "tensor":
        scale = scale.view(1, 1)
    zero_point = None if scheme.symmetric else _zero_point(tensors["weight_offset"], "weight_offset").view(scale.shape)
    if scheme.bits == 4:
        codes = _apart(codes, _packed_axis(scheme, scale.shape[1]))
    if SECOND in tensors:
        scale = scale.float() * tensors[SECOND].float()
    weight = QuantizedWeight(codes, scale, zero_point)
    if not scheme.observed:
        return StoredLinear(weight)
    _check_served(tensors, scale)
    input_zero = None if scheme.activations_symmetric else _zero_point(tensors["input_offset"], "input_offset")
    return StoredLinear(weight, tensors["input_scale"], input_zero)


def _zero_point(offset: Tensor, name: str) -> Tensor:
    """An offset as int8, which it has to be a value of."""
    import torch

    found = offset.clamp(-128, 127).to(torch.int8)
    if not torch.equal(found.double(), offset.double()):
        raise ModelError(f"{name} is no integer from -128 to 127.", "Quantize it again.")
    return found


def _check_served(tensors: Mapping[str, Tensor], scale: Tensor) -> None:
    """deq_scale, by which engines multiply, is the product that it stands for, as exactly as 16 bits hold it."""
    import torch

    served = tensors["deq_scale"]
    if served.dtype == torch.int64:  # the bits of a float32
        served = served.to(torch.int32).view(torch.float32)
    product = tensors["input_scale"].double() * scale.double().view(-1)
    # what float16 holds below 2^-14 has steps of 2^-24
    if not torch.allclose(served.double(), product, rtol=2**-6, atol=2**-25, equal_nan=True):
        raise ModelError("deq_scale is not input_scale · weight_scale.", "Quantize it again.")


def attention_names(path: str, attention: AttentionScheme) -> dict[str, str]:
    """Tensors of the attention module `path`: name → part of the store, or empty for offsets that are all zero."""
    if attention.heads:
        names = {f"{path}.{name}": part for part, name in _HEADS.items()}
        return names | {name.removesuffix("scale") + "offset": "" for name in names}
    names = {f"{path}.{name}": part for part, name in _CACHE.items()}
    return {name: "" if attention.kv_symmetric and part.endswith("offset") else part for name, part in names.items()}


def attention_tensors(
    path: str, parts: Mapping[str, Tensor], attention: AttentionScheme, dtype: str
) -> dict[str, Tensor]:
    """The tensors of `attention_names`, scales rounded to the model's dtype."""
    import torch

    own = getattr(torch, dtype)
    tensors: dict[str, Tensor] = {}
    for name, part in attention_names(path, attention).items():
        if not part:
            scale = tensors[name.removesuffix("offset") + "scale"]
            tensors[name] = torch.zeros_like(scale, dtype=torch.int8 if attention.heads else torch.float32)
        else:
            tensors[name] = _rounded(parts[part], own) if part.endswith("scale") else parts[part].float()
    return tensors


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values that `dtype` holds, neither zero nor infinite."""
    from quantcli.quant.grid import stored_scale

    return stored_scale(scale.float(), dtype)


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """The JSON files: the description of every tensor, and config.json, which says nothing of quantization.

    `owners` maps every tensor of the export to the linear or attention module that it is quantized for, or None.
    """
    description: dict[str, Any] = {
        "model_quant_type": model_type(store.schemes.values()),
        "version": "1.0.0",
        "group_size": max((scheme.group_size or 0 for scheme in store.schemes.values()), default=0),
    }
    attention = store.attention
    if attention is not None and attention.heads:
        description["fa_quant_type"] = "FAQuant"
    elif attention is not None:
        description |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    for name, owner in owners.items():
        if owner is None:
            description[name] = "FLOAT"
        elif owner in store.schemes:
            description[name] = type_name(store.schemes[owner])
        else:
            description[name] = "FAQuant" if attention is not None and attention.heads else "C8"
    return {DESCRIPTION: description, "config.json": without_quantization(config)}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of quantization, that of a language model inside it likewise."""
    left = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(left.get("text_config"), dict):
        left["text_config"] = without_quantization(left["text_config"])
    return left


def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a directory holds a checkpoint of this format."""
    return (directory / DESCRIPTION).is_file()


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """Scheme of each quantized linear, and of attention, from the description and the offsets.

    `weights` maps every linear to the checkpoint name of its weight. One scale a tensor was written as one a channel
    and is read so. Raises ModelError for a type that is not understood, or a linear that has none.
    """
    return described_in(checkpoint.directory / DESCRIPTION, checkpoint, weights)
