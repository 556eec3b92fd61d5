"""AWQ checkpoints of version GEMM, the format of AutoAWQ, which vLLM and transformers load.

Of a linear X [out, in] with 4-bit codes q, groups of g inputs (or one, of all), u = q + 8 and z likewise:

    X.qweight  int32 [in, out/8]            u packed along the output, eight to a word
    X.qzeros   int32 [in/g, out/8]          z packed likewise; 8 everywhere for symmetric weights
    X.scales   float16 [in/g, out]          s, negative where the grid's full range is used: kernels multiply by it
    X.bias                                  as in the float model

    W[o, i] = (u − z)·s

Nibble n of a word, the lowest first, belongs to output ORDER[n] of its eight, which suits the unpacking of a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import common, gptq
from quantcli.formats.declared import Declared
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear

NAME = "awq"
STEM = "model"
WRITES_TIED_HEAD = False
ONE_SCHEME = True
FLOAT16_SCALES = True

recognizes = common.named_by_config(NAME, {"auto_round:auto_awq"})
attention_refusal = common.attention_refusal
attention_names = common.attention_names
attention_tensors = common.attention_tensors

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "is written for Linear modules only, and this model's are stored transposed (Conv1D)"
    if scheme.activations != "none":
        return "holds weights alone, with inputs in float"
    if scheme.type == "float":
        return "holds integer codes, not fp8"
    if scheme.bits != BITS:
        return f"holds weights of 4 bits, not {scheme.bits}"
    if scheme.granularity == "tensor":
        return "holds a scale a channel or group, not a tensor"
    if linear.out_features % 8:
        return f"packs outputs by eight, which {linear.out_features} are not a multiple of"
    return "" if common.in_block(linear.name) else "is loaded with an output head in float"


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape), without a value. Known before anything is computed."""
    out, inner = linear.out_features, linear.in_features
    groups = scheme.scale_shape(out, inner)[1]
    return {
        "qweight": ("int32", (inner, out // 8)),
        "qzeros": ("int32", (groups, out // 8)),
        "scales": ("float16", (groups, out)),
    }


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout` from the store's codes. Raises ModelError for a scale that float16 does not hold."""
    import torch

    from quantcli.formats.store import held_scale

    codes, scale, zero_point = stored.weight
    if zero_point is None:
        zero_point = torch.zeros(scale.shape, dtype=torch.int8)  # u of q = 0 is 8
    return {
        "qweight": _interleaved(codes),
        "qzeros": _interleaved(zero_point),
        "scales": held_scale(scale, torch.float16).t().contiguous(),
    }


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode`, from tensors by suffix, which have to have the shapes of `layout`."""
    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight

    zero_point = None if scheme.symmetric else _in_line(tensors["qzeros"])
    return StoredLinear(QuantizedWeight(_in_line(tensors["qweight"]), tensors["scales"].t().contiguous(), zero_point))


def _interleaved(values: Tensor) -> Tensor:
    """Signed int8 [out, n] to words int32 [n, out/8]."""
    from quantcli.quant.packing import pack_int32

    out, count = values.shape
    return pack_int32(values.t().reshape(count, out // 8, 8)[..., ORDER].reshape(count, out), BITS)


def _in_line(words: Tensor) -> Tensor:
    """The inverse of `_interleaved`."""
    from quantcli.quant.packing import unpack_int32

    count, eights = words.shape
    places = [ORDER.index(column) for column in range(8)]
    return unpack_int32(words, BITS, eights * 8).view(count, eights, 8)[..., places].view(count, -1).t().contiguous()


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """config.json with its quantization_config, or a float model's where nothing is quantized."""
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    if store.schemes:
        content["quantization_config"] = configuration(store.schemes, kept)
    return {"config.json": content}


def configuration(schemes: Mapping[str, Scheme], kept: set[str]) -> dict[str, Any]:
    """The `quantization_config`: one scheme for all linears but `kept`. Raises ModelError for several schemes."""
    if len(set(schemes.values())) > 1:
        raise ModelError("awq holds one scheme for all linears.", "Export as compressed-tensors.")
    return {
        "quant_method": NAME,
        "version": "gemm",
        "bits": BITS,
        "group_size": next(iter(schemes.values())).group_size or -1,
        "zero_point": True,
        "modules_to_not_convert": sorted(kept),
    }


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """The scheme of each linear that has a qweight: groups by the shapes of its tensors.

    Zero points of 8 in the whole model are those of symmetric weights. Raises ModelError for another version than GEMM,
    other bits than 4, or tensors that are missing or of other groups than config.json says.
    """
    content = config["quantization_config"]
    common.check_autoround(checkpoint.directory, content)
    version, bits = content.get("version") or "gemm", content.get("bits", content.get("w_bit"))
    if str(version).lower() != "gemm" or bits != BITS or content.get("zero_point") is False:
        raise ModelError(f"{checkpoint.directory}: AWQ weights of version {version!r}, {bits} bits and zero_point "
                         f"{content.get('zero_point')} are not supported.", "Known: gemm, 4, true.")  # fmt: skip
    declared = Declared(checkpoint.directory, content)
    groups: dict[str, tuple[int, int, object]] = {}
    zeros = []
    for module, weight in weights.items():
        prefix = weight.removesuffix(".weight")
        parts = [f"{prefix}.{part}" for part in ("qweight", "scales", "qzeros")]
        packed, scales, qzeros = map(checkpoint.entries.get, parts)
        if packed is not None:
            if scales is None or qzeros is None:
                raise ModelError(f"{checkpoint.directory}: {parts[0]} stands without scales or qzeros.")
            inner, count = packed.shape[0], scales.shape[0]
            said = declared.checked((module, prefix), BITS, inner, count)
            groups[module] = inner, count, said["group_size"]
            zeros.append(parts[2])
    middle = int.from_bytes(b"\x88" * 4, "little", signed=True)
    symmetric = all(bool((checkpoint.read([name])[name] == middle).all()) for name in zeros)
    return {module: gptq.grouped(BITS, symmetric, *shape) for module, shape in groups.items()}, None
