"""compressed-tensors, the format of llm-compressor and vLLM. https://github.com/vllm-project/compressed-tensors

W8A8 (`int-quantized`): X.weight int8 [out, in], X.weight_scale float32 [out, 1] or [1], and for static inputs
X.input_scale float32 [1] and, if asymmetric, X.input_zero_point int8 [1]; dynamic ones stand in the configuration
alone, symmetric or not. FP8 (`float-quantized`, and `naive-quantized` where inputs stay in float): the same, symmetric,
with X.weight float8_e4m3fn. All else (`pack-quantized`), which is integer weights alone, and dynamic inputs of 8 or 4
bits beside weights of fewer bits or with a scale a group: X.weight_packed int32 [out, in·bits/32], X.weight_scale in
the model's dtype, X.weight_zero_point int32 packed along the output, X.weight_shape int64 [2]. An fp8 cache of
attention A: A.k_scale and A.v_scale float32 [1].

W4A8 could be `int-quantized`, too, a byte a code, as llm-compressor writes it; so it is read. vLLM loads that on CPUs
and XPUs; packed it loads it on GPUs and CPUs, and W4A4 with it (CompressedTensorsW4A8Int; CompressedTensorsWNA8Int,
WNA4Int).

quantization_config has a group of linears a scheme. With one scheme its target is the class, `Linear`; with several
each group names its modules in full, which vLLM and transformers read alike. vLLM finds the linears that it joins
(q/k/v, gate/up) by the names of their parts, and translates names to those of its own modules, but not regular
expressions; earlier versions take a class before such parts. Its output head is no `Linear`: the head is always named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import common
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear

NAME = "compressed-tensors"
STEM = "model"
WRITES_TIED_HEAD = False
ONE_SCHEME = False
ALL_ATTENTION = True
"""kv_cache_scheme is that of every layer. Of one without scales vLLM takes 1.0 for them, where it is refused here."""
FLOAT16_SCALES = False

recognizes = common.named_by_config(NAME)


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "describes Linear modules only, and this model's are stored transposed (Conv1D)"
    if scheme.activations == "mix":
        return "holds static or dynamic activations, not both for one linear"
    if scheme.activations != "none" and not scheme.symmetric:
        return "holds integer activations with symmetric weights"
    if scheme.activations == "static" and not _by_the_byte(scheme):
        return "holds static activations of 8 bits with 8-bit weights, one scale a channel or tensor"
    if scheme.token_zero_points and not scheme.int8_products:
        return "is written with a zero point a token beside int8 weights only, one scale a channel or tensor"
    return ""


def layout(
    linear: Linear, scheme: Scheme, dtype: str, *, bytewise: bool = False
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape), without a value. Known before anything is computed.
    `bytewise`: those of symmetric codes of any bits that others have stored a byte each."""
    out, inner = linear.out_features, linear.in_features
    scale_shape: tuple[int, ...] = scheme.scale_shape(out, inner) if scheme.granularity != "tensor" else (1,)
    scale = (scheme.scale_dtype(dtype), scale_shape)
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    if bytewise or _by_the_byte(scheme):
        codes = "float8_e4m3fn" if scheme.type == "float" else "int8"
        tensors = {"weight": (codes, (out, inner)), "weight_scale": scale}
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


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout`, from the store's codes; nothing is rounded here, and the linear's bias is not needed.

    Raises ModelError for a scale that the model's dtype, in which engines hold it, does not hold.
    """
    import torch

    from quantcli.formats.store import held_scale
    from quantcli.quant.packing import pack_int32

    codes, scale, zero_point = stored.weight
    scale = held_scale(scale, getattr(torch, scheme.scale_dtype(dtype)))
    scale = scale.view(-1) if scheme.granularity == "tensor" else scale
    if _by_the_byte(scheme):
        tensors = {"weight": codes, "weight_scale": scale}
        if stored.input_scale is not None:
            tensors["input_scale"] = stored.input_scale.float()
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


def reading(
    config: Mapping[str, Any], has: Callable[[str], object]
) -> tuple[Callable[..., dict[str, tuple[str, tuple[int, ...]]]], Callable[..., StoredLinear]]:
    """`layout` and `decode` for a linear that `has` tensors of these suffixes, which `described` has checked."""
    content = config["quantization_config"]
    forms = {content.get("format"), *(group.get("format") for group in content["config_groups"].values())}
    bytewise = "int-quantized" in forms and bool(has("weight")) and not has("weight_packed")
    return partial(layout, bytewise=bytewise), decode


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode`, from tensors by suffix, which have to have the shapes of `layout`, bytewise or not.

    Raises ModelError for codes, a byte each, that do not fit the bits of the scheme.
    """
    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight
    from quantcli.quant.packing import unpack_int32

    scale, zero_point = tensors["weight_scale"], tensors.get("weight_zero_point")
    if scheme.scale_dtype("bfloat16") == "float32":  # in which engines multiply, also where a file has 16 bits
        scale = scale.float()
    if scheme.granularity == "tensor":
        scale = scale.view(1, 1)
    if "weight" in tensors:
        codes = tensors["weight"]
        low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
        if scheme.bits < 8 and bool(((codes < low) | (codes > high)).any()):
            raise ModelError(f"weight holds codes outside of {low} to {high}, those of {scheme.bits} bits.")
        weight = QuantizedWeight(codes, scale, None)
        return StoredLinear(weight, tensors.get("input_scale"), tensors.get("input_zero_point"))
    rows, columns = (int(size) for size in tensors["weight_shape"])
    codes = unpack_int32(tensors["weight_packed"], scheme.bits, columns)
    if zero_point is not None and scheme.granularity == "tensor":
        zero_point = zero_point.view(1, 1)
    elif zero_point is not None:
        zero_point = unpack_int32(zero_point.t().contiguous(), scheme.bits, rows).t().contiguous()
    return StoredLinear(QuantizedWeight(codes, scale, zero_point))


def attention_refusal(attention: AttentionScheme) -> str:
    """Why this format cannot hold keys, values and queries under the scheme; empty when it can."""
    if attention.heads:
        return "has no scales for int8 products a head"
    if attention.kv == "int8":
        return "holds an fp8 cache, with one scale for keys and one for values, not int8 with a scale a channel"
    return ""


def attention_names(path: str, scheme: AttentionScheme) -> dict[str, str]:
    """The tensors of `attention_tensors`: name → part of the store."""
    return {f"{path}.{part}": part for part in ("k_scale", "v_scale")} if scheme.kv == "fp8" else {}


def attention_tensors(
    path: str, parts: Mapping[str, Tensor], scheme: AttentionScheme, dtype: str = "float32"
) -> dict[str, Tensor]:
    """The tensors of the attention module `path` with an fp8 cache: path.k_scale and path.v_scale, float32 [1].

    `parts` are the store's (ATTENTION_PARTS). A key is k ≈ k_scale·e4m3(k / k_scale). llm-compressor writes these names
    and transformers has these parameters; vLLM renames them to path.attn.k_scale, its module inside the attention
    (maybe_remap_kv_scale_name, get_cache_scale_mapper), so path.attn in the file would be vLLM's alone. Raises
    ModelError for another scheme, or scales that are missing or not [1].
    """
    _refuse_attention(scheme)
    tensors = {}
    for name, part in attention_names(path, scheme).items():
        scale = parts.get(part)
        if scale is None or scale.numel() != 1:
            found = "is missing" if scale is None else f"has shape {list(scale.shape)}, not [1]"
            raise ModelError(f"{path}: {part} of the fp8 cache {found}.", "Quantize again.")
        tensors[name] = scale.float().view(1)
    return tensors


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """config.json with its quantization_config, or without one where nothing is quantized."""
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    if store.schemes or store.attention is not None:
        content["quantization_config"] = configuration(store.schemes, kept, store.attention)
    return {"config.json": content}


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """Scheme of each quantized linear, and of attention, that config.json says. `weights` names the model's linears.

    Raises ModelError where the tensors of a linear are of another layout than its group says, and for what
    config.json says that is not supported.
    """
    content = config["quantization_config"]
    try:
        groups, attention = _groups_of(content, weights), parse_attention(content)
    except ModelError as error:
        raise ModelError(f"{checkpoint.directory / 'config.json'}: {error.message}", error.remedy) from error
    for name, (scheme, form) in groups.items():
        if form != layout_name(scheme):
            prefix = weights[name].removesuffix(".weight")
            if f"{prefix}.weight_packed" in checkpoint.entries or f"{prefix}.weight" not in checkpoint.entries:
                raise ModelError(f"{checkpoint.directory}: quantization_config says that {name} is {form}, but its "
                                 "tensors are not.", "Export it again.")  # fmt: skip
    return {name: scheme for name, (scheme, _) in groups.items()}, attention


def configuration(
    schemes: Mapping[str, Scheme], kept: Iterable[str], attention: AttentionScheme | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json, built and checked by the format's own library.

    One group a scheme, each with its own `format`; that of the whole is mixed-precision where they differ, and dense
    where nothing but the cache is quantized. A model without any quantization has no quantization_config: do not call
    this for one. Raises ModelError for attention that the format cannot hold, see `attention_refusal`.
    """
    from compressed_tensors.quantization import QuantizationConfig

    _refuse_attention(attention)
    names: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names.setdefault(replace(scheme, sparse=False), []).append(name)  # sparse codes are codes like any others
    # transformers unpacks experts by the first group, and where there are experts, most linears are theirs
    names = dict(sorted(names.items(), key=lambda item: -len(item[1])))
    if len(names) == 1:
        ((scheme, modules),) = names.items()
        names = {scheme: [*(name for name in modules if not common.in_block(name)), "Linear"]}
    groups = {f"group_{i}": _group(scheme, targets) for i, (scheme, targets) in enumerate(names.items())}
    forms = {layout_name(scheme) for scheme in names} or {"dense"}
    config = QuantizationConfig(
        config_groups=groups,
        format=forms.pop() if len(forms) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=sorted(kept),
        kv_cache_scheme=_FP8 if attention is not None and attention.kv == "fp8" else None,
    )
    content: dict[str, Any] = config.to_dict()
    return content


_FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def _by_the_byte(scheme: Scheme) -> bool:
    """Whether a code is a byte of its own, not packed into words."""
    return scheme.int8_products or scheme.type == "float"


def layout_name(scheme: Scheme) -> str:
    """The name that the format's own library gives the layout of a scheme (infer_module_format)."""
    if scheme.type == "float":
        return "naive-quantized" if scheme.activations == "none" else "float-quantized"
    return "int-quantized" if scheme.int8_products else "pack-quantized"


def _group(scheme: Scheme, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type=scheme.type,
        symmetric=scheme.symmetric,
        strategy=scheme.granularity,
        group_size=scheme.group_size,
        dynamic=False,
    )
    activations = None
    if scheme.activations != "none":
        dynamic = scheme.activations == "dynamic"
        activations = QuantizationArgs(
            num_bits=scheme.activation_bits,
            type=scheme.type,
            symmetric=scheme.activations_symmetric,
            strategy="token" if dynamic else "tensor",
            dynamic=dynamic,
        )
    return QuantizationScheme(
        targets=targets, weights=weights, input_activations=activations, format=layout_name(scheme)
    )


def _refuse_attention(attention: AttentionScheme | None) -> None:
    reason = attention_refusal(attention) if attention is not None else ""
    if reason:
        raise ModelError(f"compressed-tensors {reason}.", "Export it as ascend, or choose another attention scheme.")


def parse_configuration(content: Mapping[str, Any], linears: Iterable[str]) -> dict[str, Scheme]:
    """Scheme of each linear that a `quantization_config` says is quantized, as `_groups_of` finds it."""
    return {name: scheme for name, (scheme, _) in _groups_of(content, linears).items()}


def _groups_of(content: Mapping[str, Any], linears: Iterable[str]) -> dict[str, tuple[Scheme, str]]:
    """Scheme and layout of each linear that a `quantization_config` says is quantized.

    A target that names a module, in full or by a regular expression, goes before the class `Linear`, in engines and
    here. Raises ModelError for what is not understood, and where two groups claim one linear, which engines settle
    differently.
    """
    config = _validated(content)
    schemes = {name: _scheme(group, config.format) for name, group in config.config_groups.items()}
    ignored = _matcher(config.ignore or [])
    claimed = {key: _matcher(group.targets) for key, group in config.config_groups.items()}
    classes = {schemes[key] for key, group in config.config_groups.items() if "Linear" in group.targets}
    found: dict[str, tuple[Scheme, str]] = {}
    for name in linears:
        if ignored(name):
            continue
        claims = {schemes[key] for key, claims_it in claimed.items() if claims_it(name)} or set(classes)
        if len(claims) > 1:
            raise ModelError(f"quantization_config gives {name} {len(claims)} schemes.", "Export it again.")
        if claims:
            found[name] = claims.pop()
    return found


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether one of the patterns names a module, in full or by a regular expression; there may be a name an expert."""
    from compressed_tensors.utils import match_name

    exact = {pattern for pattern in patterns if not pattern.startswith("re:")}
    others = sorted({pattern for pattern in patterns if pattern.startswith("re:")})
    common.check_expressions([pattern.removeprefix("re:") for pattern in others])
    return lambda name: name in exact or any(match_name(name, pattern) for pattern in others)


def parse_attention(content: Mapping[str, Any]) -> AttentionScheme | None:
    """What a `quantization_config` says of the cache; None for nothing. Raises ModelError for another than fp8."""
    return None if _validated(content).kv_cache_scheme is None else AttentionScheme(kv="fp8")


def _validated(content: Mapping[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    _refuse_beside_codes(content)
    try:
        config = QuantizationConfig.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        # between the names of fields stand those of the library's own functions
        place = ".".join(str(part) for part in ("quantization_config", *first["loc"]) if "[" not in str(part))
        raise ModelError(
            f"{place}: {first['msg'].removeprefix('Value error, ').rstrip('.')}.",
            "Correct it, or download the file again.",
        ) from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"quantization_config is not valid: {str(error).splitlines()[0]}.") from error
    if config.quantization_status != "compressed":
        raise ModelError("quantization_config: only compressed weights are supported.")
    cache = config.kv_cache_scheme
    if cache is not None and {key: getattr(cache, key) for key in _FP8} != _FP8:
        raise ModelError("quantization_config: of caches only fp8 ones with a scale for keys and one for values are "
                         "supported.")  # fmt: skip
    return config


def _refuse_beside_codes(content: Mapping[str, Any]) -> None:
    """Raise ModelError for what the format's own library has no field for any more, and would pass over: transforms
    that engines apply while the model runs, without which it computes something else, and sparse weights."""
    if content.get("transform_config") not in (None, {}, {"config_groups": {}}):
        raise ModelError("quantization_config.transform_config: rotations that engines apply while the model runs "
                         "(of SpinQuant and QuIP) are not supported.",
                         "Quantize again without them, or use an engine that has them.")  # fmt: skip
    sparsity = content.get("sparsity_config") or {"format": "dense"}
    form = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if form != "dense":
        raise ModelError(f"quantization_config.sparsity_config: weights of format {str(form)[:100]!r} are not "
                         "supported.", "Save it again without sparse compression.")  # fmt: skip


def _scheme(group: Any, form: str) -> tuple[Scheme, str]:
    """The scheme that a config group describes, and the name of its layout. ModelError for one that this program
    neither writes nor simulates."""
    weights, inputs = group.weights, group.input_activations
    mode = "none" if inputs is None else ("dynamic" if inputs.dynamic else "static")
    understood = (
        weights is not None
        and (bool(weights.dynamic), weights.actorder != "group") == (False, True)
        and weights.strategy in ("tensor", "channel", "group")
        and (weights.type == "int" or (weights.num_bits, weights.symmetric, weights.group_size) == (8, True, None))
        and group.output_activations is None
    )
    if understood and inputs is not None:
        strategy, widths = ("token", (8, 4)) if mode == "dynamic" else ("tensor", (8,))
        widths = (8,) if weights.type == "float" else widths
        understood = (inputs.type, inputs.strategy) == (weights.type, strategy) and inputs.num_bits in widths
        understood &= weights.symmetric and (inputs.symmetric or weights.type == "int")
    if understood:
        scheme = Scheme(
            bits=weights.num_bits,
            symmetric=weights.symmetric,
            granularity=str(getattr(weights.strategy, "value", weights.strategy)),  # type: ignore[arg-type]
            group_size=weights.group_size,
            activations=mode,  # type: ignore[arg-type]
            activations_symmetric=True if inputs is None else inputs.symmetric,
            activation_bits=8 if inputs is None else inputs.num_bits,
            type=str(getattr(weights.type, "value", weights.type)),  # type: ignore[arg-type]
        )
        said, own = group.format or form, layout_name(scheme)
        if scheme.type == "float" and said in (own, "float-quantized"):  # two names of one layout
            said = own
        # llm-compressor has no weights of more bits than inputs
        bytewise = said == "int-quantized" and scheme.type == "int" and mode != "none"
        bytewise &= scheme.symmetric and scheme.bits <= scheme.activation_bits
        held = (mode != "static" or _by_the_byte(scheme)) and (not scheme.token_zero_points or scheme.int8_products)
        if (said == own or bytewise) and held:
            return scheme, said
    raise ModelError("quantization_config describes a scheme that is not supported: only integer and fp8 weights with "
                     "a scale a tensor, channel or group of inputs (fp8: no group), alone or with inputs of their type "
                     "that are dynamic a token (asymmetric ones beside 8-bit weights without groups), or static a "
                     "tensor.")  # fmt: skip


def _words(values: int, bits: int) -> int:
    """`quant.packing.packed_columns` without torch."""
    return -(-values * bits // 32)
