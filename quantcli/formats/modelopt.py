"""FP8 checkpoints as NVIDIA's Model-Optimizer writes them, which vLLM, SGLang and TensorRT-LLM load.
https://github.com/NVIDIA/Model-Optimizer

    X.weight        float8_e4m3fn [out, in]
    X.weight_scale  float32 [1], or [out] beside dynamic inputs
    X.input_scale   float32 [1], of static inputs
    A.k_proj.k_scale, A.v_proj.v_scale   float32 [1], of an fp8 cache of attention A, where A is called self_attn;
    A.k_scale, A.v_scale                 of attention that is called otherwise

Scales of one value have no axis in its own files, and are read so, too. One `quant_algo` is that of all linears but
those that are left out by name: FP8 with static inputs and a scale a tensor, and FP8_PER_CHANNEL_PER_TOKEN with dynamic
inputs and a scale a channel. It stands in config.json, and in hf_quant_config.json under older names, where versions
before 0.31 have it alone.

What is left out is an expression of the shell, as `model.layers.0.*`; vLLM and SGLang also take an entry for a part of
a name. So a module in float whose name is in that of a quantized one cannot be told from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import common, compressed_tensors
from quantcli.formats.declared import MODELOPT as DESCRIPTION
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear

NAME = "modelopt"
STEM = "model"
WRITES_TIED_HEAD = False
ONE_SCHEME = True
ALL_ATTENTION = True
"""A cache is that of every layer. Of one without scales vLLM takes 1.0 for them, where it is refused here."""
FLOAT16_SCALES = False

attention_refusal = compressed_tensors.attention_refusal

_ALGORITHMS = {"FP8": ("tensor", "static"), "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "dynamic")}
"""quant_algo → granularity of weights, and inputs."""
_CACHE: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_PATTERNS, _LONGEST = 1000, 1000
_REMEDY = "Take the configuration that belongs to these weights, or quantize again."


def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether config.json, or hf_quant_config.json in its place, names Model-Optimizer."""
    content = config.get("quantization_config")
    if not isinstance(content, dict):
        return False
    producer = content.get("producer")
    if "quant_method" not in content and isinstance(producer, dict):
        return producer.get("name") == NAME
    return str(content.get("quant_method")).lower().startswith(NAME)


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "describes Linear modules only, and this model's are stored transposed (Conv1D)"
    if scheme.type != "float":
        return "is written with fp8 codes, not integers"
    if scheme.activations == "none":
        return "holds fp8 weights beside fp8 inputs, not alone"
    if (scheme.granularity, scheme.activations) not in _ALGORITHMS.values():
        wanted = "tensor" if scheme.activations == "static" else "channel"
        return f"holds {scheme.activations} inputs beside weights with a scale a {wanted}, not a {scheme.granularity}"
    return "" if common.in_block(linear.name) else "is loaded with an output head in float"


def refuses_together(quantized: Collection[str], in_float: Iterable[str], attention: AttentionScheme | None) -> str:
    """Why these modules cannot stand beside one another; empty when they can."""
    if attention is not None and not quantized:
        return "holds a quantized cache beside quantized linears only"
    parts = _Parts(in_float)
    found = next((name for name in quantized if parts.within(name)), None)
    if found is None:
        return ""
    return f"leaves {parts.within(found)} in float by a name that is part of {found}, so that engines leave that, too"


def layout(
    linear: Linear, scheme: Scheme, dtype: str, *, bare: Collection[str] = ()
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape), without a value. Known before anything is computed.
    `bare`: those without an axis, as others store scales of one value."""
    tensors = compressed_tensors.layout(linear, scheme, dtype)
    if scheme.granularity == "channel":
        tensors["weight_scale"] = ("float32", (linear.out_features,))
    return {name: (kind, () if name in bare and shape == (1,) else shape) for name, (kind, shape) in tensors.items()}


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout`, from the store's codes; nothing is rounded here, and the linear's bias is not needed."""
    tensors = compressed_tensors.encode(stored, scheme, dtype, bias, linear)
    return tensors | {"weight_scale": tensors["weight_scale"].view(-1)}


def reading(
    config: Mapping[str, Any], entry: Callable[[str], Any]
) -> tuple[Callable[..., dict[str, tuple[str, tuple[int, ...]]]], Callable[..., StoredLinear]]:
    """`layout` and `decode` for a linear whose tensors `entry` has by their suffixes."""
    bare = [name for name in ("weight_scale", "input_scale") if (found := entry(name)) and found.shape == ()]
    return partial(layout, bare=bare), decode


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode`, from tensors by suffix, which have to have the shapes of `layout`, bare or not."""
    parts = dict(tensors)
    shape = (-1, 1) if scheme.granularity == "channel" else (1,)
    parts["weight_scale"] = parts["weight_scale"].view(shape)
    if "input_scale" in parts:
        parts["input_scale"] = parts["input_scale"].float().view(1)
    return compressed_tensors.decode(parts, scheme)


def attention_names(path: str, scheme: AttentionScheme) -> dict[str, str]:
    """The tensors of `attention_tensors`: name → part of the store."""
    if scheme.kv != "fp8":
        return {}
    below = ("k_proj.", "v_proj.") if path.endswith("self_attn") else ("", "")
    return {f"{path}.{where}{part}": part for where, part in zip(below, ("k_scale", "v_scale"), strict=True)}


def attention_tensors(
    path: str, parts: Mapping[str, Tensor], scheme: AttentionScheme, dtype: str = "float32"
) -> dict[str, Tensor]:
    """The scales of an attention module with an fp8 cache, float32 [1], as compressed-tensors has them.

    TensorRT-LLM looks for them below the linears of keys and values; vLLM and SGLang do that where attention is called
    self_attn, and else take them from the attention itself. Raises ModelError as `compressed_tensors` does.
    """
    tensors = compressed_tensors.attention_tensors(path, parts, scheme, dtype)
    return {name: tensors[f"{path}.{part}"] for name, part in attention_names(path, scheme).items()}


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, and config.json with its quantization_config; or a float model's where nothing is
    quantized. Raises ModelError for what `refuses_together` finds, and for several schemes."""
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    if not store.schemes and store.attention is None:
        return {"config.json": content}
    reason = refuses_together(store.schemes, kept, store.attention)
    if not reason and len(set(store.schemes.values())) > 1:
        reason = "holds one scheme for all linears"
    if reason:
        raise ModelError(f"{NAME} {reason}.", "Export as compressed-tensors.")
    scheme = next(iter(store.schemes.values()))
    algorithm = next(name for name, form in _ALGORITHMS.items() if form == (scheme.granularity, scheme.activations))
    content["quantization_config"] = _configuration(algorithm, sorted(kept), store.attention)
    older = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": None if store.attention is None else "FP8",
        "exclude_modules": sorted(kept),
    }
    return {DESCRIPTION: {"producer": {"name": "quantcli"}, "quantization": older}, "config.json": content}


def _configuration(algorithm: str, kept: list[str], attention: AttentionScheme | None) -> dict[str, Any]:
    """The `quantization_config` of config.json. Of FP8 alone Model-Optimizer describes a group of linears."""
    inputs, weights = (dict(_CACHE) for _ in range(2))
    group = {"input_activations": inputs, "weights": weights, "targets": ["Linear"]}
    return {
        "quant_method": NAME,
        "quant_algo": algorithm,
        "ignore": kept,
        **({"config_groups": {"group_0": group}} if algorithm == "FP8" else {}),
        **({"kv_cache_scheme": dict(_CACHE)} if attention is not None else {}),
        "producer": {"name": "quantcli"},
    }


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """Scheme of each linear that is not left out, and of the cache.

    Raises ModelError for another algorithm or cache than those that are written, and where hf_quant_config.json says
    something else than config.json, as engines read one or the other.
    """
    directory, content = checkpoint.directory, config["quantization_config"]
    beside = read_json(directory / DESCRIPTION) if (directory / DESCRIPTION).is_file() else None
    alone = beside is not None and content == {"quant_method": NAME} | beside
    found = _Said.of(directory / (DESCRIPTION if alone else "config.json"), content)
    names = {module: (module, weight.removesuffix(".weight")) for module, weight in weights.items()}
    quantized = [module for module, own in names.items() if not any(map(found.leaves, own))]
    if beside is not None and not alone:
        other = _Said.of(directory / DESCRIPTION, beside)
        differs = next((m for m, own in names.items() if any(map(other.leaves, own)) == (m in quantized)), None)
        if (found.algorithm, found.cache) != (other.algorithm, other.cache) or differs is not None:
            what = f"whether {differs} is quantized" if differs is not None else "quant_algo or the cache"
            raise ModelError(f"{directory}: config.json and {DESCRIPTION} differ about {what}.", _REMEDY)
    granularity, inputs = _ALGORITHMS[found.algorithm]
    scheme = Scheme(8, granularity=granularity, activations=inputs, type="float")  # type: ignore[arg-type]
    return dict.fromkeys(quantized, scheme), AttentionScheme(kv="fp8") if found.cache else None


@dataclass(frozen=True)
class _Said:
    """What a configuration says of a model. `leaves`: whether it leaves a module in float."""

    algorithm: str
    cache: bool
    leaves: Callable[[str], bool]

    @classmethod
    def of(cls, file: Path, content: Mapping[str, Any]) -> _Said:
        """From either layout; the older one has all under `quantization`. Raises ModelError for what is not read."""
        older = "quantization" in content
        said = content["quantization"] if older else content
        if not isinstance(said, dict):
            raise ModelError(f"{file}: quantization is no object.", _REMEDY)
        key, left = ("kv_cache_quant_algo", "exclude_modules") if older else ("kv_cache_scheme", "ignore")
        algorithm = str(said.get("quant_algo")).upper()
        if algorithm not in _ALGORITHMS:
            raise ModelError(f"{file}: quant_algo {str(said.get('quant_algo'))[:100]!r} is not supported.",
                             f"Known: {', '.join(_ALGORITHMS)}.")  # fmt: skip
        cache = said.get(key)
        fp8 = cache | _CACHE == cache if isinstance(cache, dict) else str(cache).upper() == "FP8"
        if cache is not None and not fp8:
            raise ModelError(f"{file}: {key} {str(cache)[:100]!r} is not supported.", "Known: an fp8 cache.")
        entries = said.get(left) or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
            raise ModelError(f"{file}: {left} is no list of names.", _REMEDY)
        try:
            return cls(algorithm, cache is not None, _matcher(entries))
        except ModelError as error:
            raise ModelError(f"{file}: {left}: {error.message}", error.remedy) from error


def _matcher(entries: Iterable[str]) -> Callable[[str], bool]:
    """Whether an entry fits a name: as an expression of the shell, or as a part of it. Raises ModelError for too many
    expressions, or one that cannot be read."""
    shapes = sorted({entry for entry in entries if set(entry) & set("*?[")})
    if len(shapes) > _PATTERNS or any(len(shape) > _LONGEST for shape in shapes):
        raise ModelError(f"there are more than {_PATTERNS} expressions, or one is longer than {_LONGEST} characters.",
                         "Name the linears.")  # fmt: skip
    for shape in shapes:
        try:
            fnmatchcase("", shape)
        except re.error as error:
            raise ModelError(f"{shape[:200]!r} is no expression: {error}.", "Name the linears.") from error
    parts = _Parts(entry for entry in entries if entry not in set(shapes))
    return lambda name: bool(parts.within(name)) or any(fnmatchcase(name, shape) for shape in shapes)


class _Parts:
    """Texts that may be parts of names, of which there may be one an expert: each name is cut, not each text sought."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = {text for text in texts if 0 < len(text) <= _LONGEST}
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)

    def within(self, name: str) -> str:
        """The longest text that is in the name; empty if none is."""
        pieces = (name[i : i + n] for n in self._lengths for i in range(len(name) - n + 1))
        return next((piece for piece in pieces if piece in self._texts), "")
