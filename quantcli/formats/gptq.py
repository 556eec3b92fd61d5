"""GPTQ checkpoints, the format of AutoGPTQ and GPTQModel, which vLLM and transformers load.

Of a linear X [out, in] with b-bit codes q, groups of g inputs (or one, of all) and u = q + 2^(b-1), z likewise:

    X.qweight  int32 [in·b/32, out]         u packed along the input, from the lowest bit on, without gaps
    X.qzeros   int32 [in/g, out·b/32]       z packed along the output likewise; v1 holds z − 1
    X.scales   float16 [in/g, out]          s, negative where the grid's full range is used: kernels multiply by it
    X.g_idx    int32 [in]                   the group of each input: i // g; of others' with desc_act, in any order
    X.bias                                  as in the float model

    W[o, i] = (u − z)·s

checkpoint_format in config.json is `gptq` (v1) or `gptq_v2`. All loaders know v1, but of z = 0 it cannot hold z − 1:
writers let it wrap around and borrow from the next zero point, or clamp it, and loaders disagree about what they find:
of b ones some make z = 0, some 2^b. So symmetric weights, whose z is 2^(b-1), are written as v1 and asymmetric ones as
v2. Both are read of both, but for asymmetric ones of v1 that hold b ones. Symmetric ones have that z whatever their
qzeros hold of the two, as writers mean them: GPTQModel has written 8 under the name of v1. `disputed` says so.

AutoRound writes the same tensors, but for g_idx, under `quant_method: auto-round`: packing_format is
`auto_round:auto_gptq` for zero points of v1, `auto_round` and `auto_round:gptqmodel` for those of v2
(auto_round_extension/torch/qlinear_torch_zp.py and qlinear_torch.py of auto-round 0.16).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import common
from quantcli.formats.declared import CONFIG, Declared
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear

NAME = "gptq"
STEM = "model"
WRITES_TIED_HEAD = False
ONE_SCHEME = True
FLOAT16_SCALES = True

PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2", "auto_round": "gptq_v2"}
"""packing_format of AutoRound → the version whose zero points it has."""

recognizes = common.named_by_config(NAME, PACKINGS)
attention_refusal = common.attention_refusal
attention_names = common.attention_names
attention_tensors = common.attention_tensors

BITS = (2, 3, 4, 8)


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "is written for Linear modules only, and this model's are stored transposed (Conv1D)"
    if scheme.activations != "none":
        return "holds weights alone, with inputs in float"
    if scheme.type == "float":
        return "holds integer codes, not fp8"
    if scheme.bits not in BITS:
        return f"holds weights of 2, 3, 4 and 8 bits, not {scheme.bits}"
    if scheme.granularity == "tensor":
        return "holds a scale a channel or group, not a tensor"
    for width in (linear.in_features, linear.out_features):
        if width * scheme.bits % 32:
            return f"packs whole words of 32 bits, which {width} values of {scheme.bits} bits do not fill"
    return ""


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape), without a value. Known before anything is computed."""
    out, inner = linear.out_features, linear.in_features
    groups = scheme.scale_shape(out, inner)[1]
    return {
        "qweight": ("int32", (inner * scheme.bits // 32, out)),
        "qzeros": ("int32", (groups, out * scheme.bits // 32)),
        "scales": ("float16", (groups, out)),
        "g_idx": ("int32", (inner,)),
    }


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout` from the store's codes. Raises ModelError for a scale that float16 does not hold."""
    import torch

    from quantcli.formats.store import held_scale
    from quantcli.quant.packing import pack_int32

    codes, scale, zero_point = stored.weight
    inner = codes.shape[1]
    if zero_point is None:
        zero_point = torch.full(scale.shape, -1, dtype=torch.int8)  # v1: one less than the middle
    return {
        "qweight": pack_int32(codes, scheme.bits).t().contiguous(),
        "qzeros": pack_int32(zero_point.t().contiguous(), scheme.bits),
        "scales": held_scale(scale, torch.float16).t().contiguous(),
        "g_idx": torch.arange(inner, dtype=torch.int32) // (inner // scale.shape[1]),
    }


def reading(
    config: Mapping[str, Any], has: Callable[[str], object]
) -> tuple[Callable[..., dict[str, tuple[str, tuple[int, ...]]]], Callable[..., StoredLinear]]:
    """`layout` and `decode` for a linear of a checkpoint with this config.json that `has` tensors of some suffixes."""
    content = config["quantization_config"]

    def found(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = layout(linear, scheme, dtype)
        return tensors if has("g_idx") else {key: value for key, value in tensors.items() if key != "g_idx"}

    return found, partial(decode, less_one=_version(content) == "gptq")


def _version(content: Mapping[str, Any]) -> str:
    if common.by_autoround(content):
        return PACKINGS[common.packing_of(content)]
    return str(content.get("checkpoint_format") or content.get("format") or "gptq")


def decode(tensors: Mapping[str, Tensor], scheme: Scheme, *, less_one: bool = False) -> StoredLinear:
    """The inverse of `encode`, from tensors by suffix, which have to have the shapes of `layout`; without g_idx inputs
    are grouped in their order. `less_one`: zero points of asymmetric weights are those of v1.

    Raises ModelError if inputs are grouped out of their order under a scheme that is not `ordered`, symmetric weights
    have zero points, or zero points of v1 may stand for 0.
    """
    import torch

    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight
    from quantcli.quant.packing import unpack_int32

    groups, out = tensors["scales"].shape
    inner = tensors["qweight"].shape[0] * 32 // scheme.bits
    order = tensors.get("g_idx")
    if order is not None and not scheme.ordered:
        if not torch.equal(order.long(), torch.arange(inner) // (inner // groups)):
            raise ModelError("g_idx groups inputs out of their order, and quantization_config has no desc_act: true.",
                             "Take the configuration that belongs to these weights.")  # fmt: skip
        order = None
    codes = unpack_int32(tensors["qweight"].t().contiguous(), scheme.bits, inner)
    zero_point: Tensor | None = unpack_int32(tensors["qzeros"], scheme.bits, out).t().contiguous()
    if scheme.symmetric:
        assert zero_point is not None
        if not bool(((zero_point == -1) | (zero_point == 0)).all()) or zero_point.unique().numel() > 1:
            raise ModelError("qzeros holds zero points, though the weights are said to be symmetric.")
        zero_point = None
    elif less_one:
        assert zero_point is not None
        if bool((zero_point == (1 << (scheme.bits - 1)) - 1).any()):
            raise ModelError(f"qzeros holds {(1 << scheme.bits) - 1}, the zero point less one of 0, which some loaders "
                             f"take for {1 << scheme.bits}.", "Save it as gptq_v2.")  # fmt: skip
        zero_point += 1
    weight = QuantizedWeight(codes, tensors["scales"].t().contiguous(), zero_point)
    return StoredLinear(weight if order is None else common.ungrouped(weight, order))


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """config.json with its quantization_config, and that alone for older loaders; a float model where nothing is
    quantized."""
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    if not store.schemes:
        return {"config.json": content}
    quantization = configuration(store.schemes, store.kept)
    return {CONFIG: quantization, "config.json": content | {"quantization_config": quantization}}


def configuration(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config`: one scheme for all linears but those of `kept`.

    What of the blocks stays in float is told twice: `dynamic` is GPTQModel's way, `modules_in_block_to_quantize` that
    of transformers; vLLM reads both. Raises ModelError for several schemes.
    """
    if len(set(schemes.values())) > 1:
        raise ModelError("gptq holds one scheme for all linears.", "Export as compressed-tensors.")
    scheme = next(iter(schemes.values()))
    content: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": any(not common.in_block(name) for name in schemes),
    }
    left = [name for name in kept if common.in_block(name)]
    if left:
        content["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
        content["modules_in_block_to_quantize"] = [[name for name in schemes if common.in_block(name)]]
    return content


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """The scheme of each linear that has a qweight: bits and groups by the shapes of its tensors, the rest from
    config.json. Raises ModelError for packed words that are not int32, tensors that are missing or of other bits or
    groups than config.json says, and what AutoRound quantizes besides weights."""
    content = config["quantization_config"]
    common.check_autoround(checkpoint.directory, content)
    declared = Declared(checkpoint.directory, content)
    version = _version(content)
    if version not in ("gptq", "gptq_v2") or content.get("pack_dtype", "int32") != "int32":
        raise ModelError(f"{checkpoint.directory}: checkpoint_format {version!r} with words of "
                         f"{content.get('pack_dtype', 'int32')} is not supported.",
                         "Known: gptq and gptq_v2 with int32.")  # fmt: skip
    schemes = {}
    for module, weight in weights.items():
        prefix = weight.removesuffix(".weight")
        packed, scales, qzeros = (
            checkpoint.entries.get(f"{prefix}.{part}") for part in ("qweight", "scales", "qzeros")
        )
        if packed is not None:
            ordered = f"{prefix}.g_idx" in checkpoint.entries or common.by_autoround(content)
            if scales is None or qzeros is None or not ordered:
                raise ModelError(f"{checkpoint.directory}: {prefix} has a qweight without scales, qzeros or g_idx.")
            groups, out = scales.shape
            bits = qzeros.shape[1] * 32 // out
            inner = packed.shape[0] * 32 // bits
            said = declared.checked((module, prefix), bits, inner, groups)
            scheme = grouped(bits, said["sym"] is not False, inner, groups, said["group_size"])
            ordered = said["desc_act"] is True and f"{prefix}.g_idx" in checkpoint.entries and groups > 1
            schemes[module] = replace(scheme, ordered=ordered)
    return schemes, None


def disputed(
    checkpoint: Checkpoint, config: Mapping[str, Any], schemes: Mapping[str, Scheme], weights: Mapping[str, str]
) -> str:
    """What loaders disagree about: qzeros of symmetric weights that are those of the other version. Empty where they
    agree. The first symmetric linear stands for all."""
    module = next((name for name, scheme in schemes.items() if scheme.symmetric), None)
    if module is None:
        return ""
    name, bits = f"{weights[module].removesuffix('.weight')}.qzeros", schemes[module].bits
    middle, version = 1 << (bits - 1), _version(config["quantization_config"])
    held = int(checkpoint.read([name])[name].view(-1)[0]) & ((1 << bits) - 1)
    added = 1 if version == "gptq" else 0
    if held + added == middle:
        return ""
    return (f"{name} holds {held}, which checkpoint_format {version} makes {held + added} of: read as {middle}, since "
            "sym is true, as kernels for symmetric weights do; other loaders compute something else")  # fmt: skip


def grouped(bits: int, symmetric: bool, inner: int, groups: int, declared: object) -> Scheme:
    """The scheme of a weight with `groups` scales a channel; one is a group where config.json declares its size.

    Raises ModelError for a last group that is shorter than the others.
    """
    short = isinstance(declared, int) and declared > 0 and inner % declared and groups == -(-inner // declared)
    if inner % groups or (short and groups > 1):
        raise ModelError(f"{groups} groups of {inner} inputs are not of one size, which is not supported.",
                         "Quantize with a group size that divides the widths.")  # fmt: skip
    if groups == 1 and declared != inner:
        return Scheme(bits, symmetric)
    return Scheme(bits, symmetric, "group", inner // groups)
