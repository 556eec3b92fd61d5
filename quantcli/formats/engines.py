"""Which serving engines load which scheme.

Read from the engines' sources (vLLM 0.32 kernels/linear and quantization/compressed_tensors; transformers 5 with
compressed-tensors 0.20; vLLM-Ascend quantization/methods and modelslim_config) and from MindIE's documentation. For
vLLM on a CPU and transformers it is run by the tests; Ascend hardware was not at hand.

Of experts: vLLM 0.32 compressed_tensors_moe (CompressedTensorsMoEMethod.get_moe_method: one scheme for all of a layer),
fused_moe/oracle/int_wna16.py and int8.py (which kernel), fused_moe/experts/cpu_moe.py (CPUExpertsInt4 and
CPUExpertsInt8 ask for torch.cpu._is_amx_tile_supported(), ArmCPUExpertsInt8 for Arm) and marlin_moe.py; transformers
5.23 integrations/compressed_tensors.py (CompressedTensorsDequantize).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

_NO_TENSOR = "takes packed weights with a scale a channel or group, not a tensor"

# Linears that vLLM and vLLM-Ascend join into one, which then has one scheme (packed_modules_mapping).
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))

UNPACKING = frozenset({"transformers"})
"""Engines that unpack weights on loading: they compute with any scheme, and gain no speed by it."""


@dataclass(frozen=True)
class Verdict:
    engine: str
    loads: bool
    note: str = ""


def verdicts(
    linears: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None = None,
    formats: Sequence[str] = ("compressed-tensors",),
    kept: Collection[str] = (),
    experts: Sequence[Collection[str]] = (),
) -> list[Verdict]:
    """For each engine that reads one of the formats, whether it loads a checkpoint of these linears and this attention.

    A mixed model is loaded by an engine only if every scheme is; the note is about the first that is not. `kept` are
    linears that stay in float beside them; `experts` the linears of the experts of each layer. An engine that reads
    several of the formats is named with each.
    """
    times = Counter(engine.name for name in formats for engine in ENGINES[name])
    return [
        replace(found, engine=f"{engine.name} ({name})") if times[engine.name] > 1 else found
        for name in formats
        for engine in ENGINES[name]
        for found in [_verdict(engine, linears, attention, kept, experts)]
    ]


@dataclass(frozen=True)
class _Engine:
    """`linear` and `cache` give (loads, note) for a scheme; `joined` are linears that the engine gives one scheme.
    `experts` gives them for the schemes of layers of experts (None: float), among how many linears have each scheme.
    `experts_alone` says whether other linears cannot have a scheme."""

    name: str
    linear: Callable[[Scheme, Sequence[Linear]], tuple[bool, str]]
    cache: Callable[[AttentionScheme], tuple[bool, str]]
    joined: tuple[tuple[str, ...], ...] = ()
    experts: Callable[[Collection[Scheme | None], Mapping[Scheme, int]], tuple[bool, str]] = lambda *_: (True, "")
    experts_alone: Callable[[Scheme], bool] = lambda _: False


def _verdict(
    engine: _Engine,
    linears: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    kept: Collection[str],
    experts: Sequence[Collection[str]],
) -> Verdict:
    by_scheme: dict[Scheme, list[Linear]] = {}
    for linear, scheme in linears:
        by_scheme.setdefault(scheme, []).append(linear)
    found = [(scheme.name, *engine.linear(scheme, members)) for scheme, members in by_scheme.items()]
    if attention is not None:
        found.append((attention.name, *engine.cache(attention)))
    for name, loads, note in found:
        if not loads:
            return Verdict(engine.name, False, f"{name}: {note}" if len(found) > 1 else note)
    schemes = {**dict.fromkeys(kept), **{linear.name: scheme for linear, scheme in linears}}
    inside = {name for layer in experts for name in layer}
    for linear, scheme in linears:
        if engine.experts_alone(scheme) and linear.name not in inside:
            return Verdict(engine.name, False, f"has {scheme.name} for experts alone, and {linear.name} is none")
    if split := _split(schemes, engine.joined):
        return Verdict(engine.name, False, f"joins {split}, which have different schemes")
    of_experts: dict[Scheme | None, None] = {}
    for layer in experts:
        own = {schemes.get(name) for name in layer}
        if len(own) > 1 and engine.joined:
            return Verdict(engine.name, False, "gives all experts of a layer one scheme")
        of_experts |= dict.fromkeys(own)
    loads, note = (
        engine.experts(of_experts, {s: len(members) for s, members in by_scheme.items()}) if experts else (True, "")
    )
    notes = [note] if not loads else [*(found_note for _, _, found_note in found), note]
    return Verdict(engine.name, loads, "; ".join(dict.fromkeys(filter(None, notes))))


def _split(schemes: Mapping[str, Scheme | None], joined: Iterable[tuple[str, ...]]) -> str:
    """Two linears of one group that have different schemes (None: float), as words; empty if there are none."""
    for name, scheme in schemes.items():
        parent, dot, own = name.rpartition(".")
        for group in joined:
            for other in (f"{parent}{dot}{part}" for part in group if own in group):
                if schemes.get(other, scheme) != scheme:
                    return f"{name} and {other}"
    return ""


def _vllm_cpu(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.type == "float":
        return _vllm_cpu_fp8(scheme)
    if scheme.int8_products:
        if scheme.activations == "static" and scheme.activations_symmetric:  # CPUInt8ScaledMMLinearKernel
            return True, "int8 products (oneDNN); a CPU with AMX computes it as W8A8 dynamic"
        return True, "int8 products (oneDNN)"
    if scheme.granularity == "tensor":
        return False, _NO_TENSOR
    if scheme.bits != 4:
        inputs = "float" if scheme.activations == "none" else f"{scheme.activation_bits}-bit"
        return False, f"has no kernel for packed {scheme.bits}-bit weights with {inputs} activations"
    odd = [linear.name for linear in linears if linear.in_features % 32 or linear.out_features % 32]
    if odd:
        return False, f"needs widths that are multiples of 32; {odd[0]} has none"
    # WNA8Int and WNA4Int get CPUWNA16LinearKernel, too, as vLLM's log and its numbers show
    if scheme.activations != "none":
        return True, f"computes it as W4A16: inputs stay in float, where W4A{scheme.activation_bits} is evaluated"
    return True, "weights unpacked in the kernel"


def _vllm_cpu_fp8(scheme: Scheme) -> tuple[bool, str]:
    """_POSSIBLE_WFP8A16_KERNELS has none for a CPU. A scale a tensor is rounded anew on loading by scaled_fp8_quant,
    which CPUs do not have (requantize_with_max_scale); ChannelWiseTorchFP8ScaledMMLinearKernel takes an input scale for
    each token (torch.narrow)."""
    if scheme.activations == "none":
        return False, "has no kernel for fp8 weights with float activations"
    if scheme.granularity == "tensor":
        return False, "loads fp8 weights with a scale a channel, not a tensor"
    if scheme.activations == "static":
        return False, "multiplies fp8 inputs with a scale a token, not a static one"
    return True, "fp8 products by torch, without a fast kernel: far slower than int8"


def _vllm_cpu_experts(experts: Collection[Scheme | None], counts: Mapping[Scheme, int]) -> tuple[bool, str]:
    """The kernels of CPUs; on one with AVX-512 and without AMX, quantized experts were refused as the sources say."""
    notes = []
    for scheme in experts:
        if scheme is None:
            notes.append("experts in float")
        elif scheme.int8_products and scheme.granularity == "channel":
            notes.append("int8 experts need a CPU with AMX, or Arm; not run here")
        elif (
            scheme.activations == "none"
            and scheme.bits == 4
            and scheme.symmetric
            and scheme.group_size not in (None, 32)
        ):
            notes.append("4-bit experts need a CPU with AMX; not run here")
        else:
            return False, f"has no kernel for experts of {scheme.name}"
    return True, "; ".join(notes)


def _vllm_gpu_experts(experts: Collection[Scheme | None], counts: Mapping[Scheme, int]) -> tuple[bool, str]:
    for scheme in filter(None, experts):
        if scheme.int8_products and scheme.granularity != "channel":
            return False, "takes int8 experts with a scale a channel only"
        if scheme.type == "float" and scheme.activations == "none":
            return False, f"has no kernel for experts of {scheme.name}"
        if scheme.type == "int" and scheme.activations != "none" and not scheme.int8_products:
            return False, f"has no kernel for experts of {scheme.name}"
    return True, ""


def _transformers_experts(experts: Collection[Scheme | None], counts: Mapping[Scheme, int]) -> tuple[bool, str]:
    """Experts are unpacked on loading, all by the group that stands first: that of the most linears."""
    kinds = list(experts)
    first = kinds[0]
    if len(kinds) > 1 or (first is None and counts):
        return False, "unpacks all experts by one scheme, and none in float beside quantized linears"
    if first is None:
        return True, ""
    if first.int8_products or first.type == "float":
        return False, "unpacks packed experts only, and these are a byte a code"
    if counts[first] < max(counts.values()):
        return False, "unpacks experts by the scheme that most linears have, which is another"
    return True, "" if first.activations == "none" else "inputs of experts stay in float"


def _vllm_gpu_fp8(scheme: Scheme) -> str:
    if scheme.activations == "none":
        return "fp8 weights unpacked in the kernel (Marlin); not run here"
    if scheme.granularity == "tensor":  # requantize_with_max_scale
        return "fp8 products, for which codes of joined linears are rounded anew to one scale; not run here"
    return "fp8 products from Ada on, weights unpacked before; not run here"


def _vllm_gpu(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.type == "float":
        return True, _vllm_gpu_fp8(scheme)
    if scheme.int8_products:
        return True, "int8 products (CUTLASS); not run here"
    if scheme.granularity == "tensor":
        return False, _NO_TENSOR
    if scheme.bits not in (4, 8):
        return False, f"has no kernel for {scheme.bits}-bit weights"
    if scheme.bits == 8 and not scheme.symmetric:
        return False, "has no kernel for asymmetric 8-bit weights"
    if scheme.group_size not in (None, 32, 64, 128):
        return False, f"Marlin kernels take groups of 32, 64 or 128, not {scheme.group_size}"
    # choose_mp_linear_kernel takes Machete or Marlin before Humming, the only one that heeds input_activations
    if scheme.activations != "none":
        return True, "inputs stay in float unless --linear-backend humming; not run here"
    return True, "Marlin kernels; not run here"


def _transformers(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.activations == "none" and not scheme.symmetric and scheme.granularity != "tensor":
        return False, "compressed-tensors 0.20 fails to load packed zero points, its own too"
    return True, "with the compressed-tensors package"


def _vllm_ascend(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.sparse or (scheme.bits == 4 and scheme.activations == "none"):
        return False, f"has no type {'W8A8S' if scheme.sparse else 'W4A16'} of linears"
    if not scheme.symmetric:
        return False, "adds weight_offset where the format subtracts it"
    if scheme.activations == "mix":
        return True, "static where decoding is apart from prompts, else dynamic; not run here"
    return True, "not run here"


def _mindie(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.type == "float":
        return False, "documents no type of fp8 weights"
    if scheme.sparse:
        return True, "compressed by its own tool first; not run here"
    return True, "not run here"


def _vllm_cpu_words(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    """GPTQ on a CPU, by the kernel that packed weights of compressed-tensors have."""
    if scheme.bits == 4 and not scheme.symmetric:
        return False, "reads symmetric GPTQ weights only"
    return _vllm_group_sizes(scheme) or _vllm_cpu(scheme, linears)


def _vllm_gpu_words(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.bits in (4, 8) and not scheme.symmetric:
        return False, "reads symmetric GPTQ weights only"
    return _vllm_gpu(scheme, linears)


def _vllm_group_sizes(scheme: Scheme) -> tuple[bool, str] | None:
    """vLLM asks on a CPU, too, for groups that Marlin has (verify_marlin_supported)."""
    if scheme.group_size in (None, 32, 64, 128):
        return None
    return False, f"takes groups of 32, 64 or 128, not {scheme.group_size}"


def _gptqmodel(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    if scheme.group_size is not None and (scheme.group_size < 16 or scheme.group_size & (scheme.group_size - 1)):
        return False, f"its kernels take groups of powers of two from 16 on, not {scheme.group_size}"
    return True, "with the packages gptqmodel and optimum; float16 is exact, bfloat16 nearly"


def _no_cache(attention: AttentionScheme) -> tuple[bool, str]:
    return False, "the format has no scales for it"


def _experts_in_float(experts: Collection[Scheme | None], counts: Mapping[Scheme, int]) -> tuple[bool, str]:
    quantized = any(experts)
    return not quantized, "quantized experts in this format were not tried" if quantized else "experts in float"


def _llama_cpp(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    return True, "on a CPU it rounds inputs to 8 bits in blocks of 32"


def _as_float(scheme: Scheme, linears: Sequence[Linear]) -> tuple[bool, str]:
    """A dense checkpoint, which is a float model to all that load it."""
    return True, "as a float model" + ("" if scheme.activations == "none" else ", with inputs in float")


def _float_cache(attention: AttentionScheme) -> tuple[bool, str]:
    return True, f"without {attention.name}"


def _fp8_only(note: str) -> Callable[[AttentionScheme], tuple[bool, str]]:
    return lambda attention: (attention.kv == "fp8", note if attention.kv == "fp8" else "reads an fp8 cache only")


def _vllm_ascend_cache(attention: AttentionScheme) -> tuple[bool, str]:
    if attention.heads:
        return False, "has FAKQuant for compressed keys and values only, not FAQuant"
    return attention.kv == "int8", "not run here"


ENGINES: dict[str, tuple[_Engine, ...]] = {
    "compressed-tensors": (
        _Engine("vLLM on a CPU", _vllm_cpu, _fp8_only("fp8 cache, rounded towards zero"), _JOINED, _vllm_cpu_experts),
        _Engine("vLLM on a GPU", _vllm_gpu, _fp8_only("fp8 cache; not run here"), _JOINED, _vllm_gpu_experts),
        _Engine(
            "transformers",
            _transformers,
            _fp8_only("rounds keys and values, holds them in float; from 5.24 on it leaves them as they are"),
            experts=_transformers_experts,
        ),
    ),
    "ascend": (
        _Engine("vLLM-Ascend", _vllm_ascend, _vllm_ascend_cache, _JOINED, experts_alone=lambda s: s.bits == 4),
        _Engine("MindIE", _mindie, lambda attention: (attention.kv != "fp8", "not run here")),
    ),
    "numpy": (),
    "mindie": (_Engine("MindIE", _mindie, lambda attention: (attention.kv != "fp8", "not run here")),),
    "gptq": (
        _Engine("vLLM on a CPU", _vllm_cpu_words, _no_cache, _JOINED, _experts_in_float),
        _Engine("vLLM on a GPU", _vllm_gpu_words, _no_cache, _JOINED, _experts_in_float),
        _Engine("transformers", _gptqmodel, _no_cache, experts=_experts_in_float),
    ),
    "awq": (
        _Engine("vLLM on a CPU", _vllm_cpu, _no_cache, _JOINED, _experts_in_float),
        _Engine("vLLM on a GPU", _vllm_gpu, _no_cache, _JOINED, _experts_in_float),
        _Engine("transformers", _gptqmodel, _no_cache, experts=_experts_in_float),
    ),
    "gguf": (_Engine("llama.cpp", _llama_cpp, _no_cache),),
    "dense": tuple(
        _Engine(name, _as_float, _float_cache) for name in ("vLLM on a CPU", "vLLM on a GPU", "transformers")
    ),
}
"""Format → the engines that read it."""
