"""Which tensor of a checkpoint lies in which dictionary of arrays, and under which key.

They are msModelSlim's (save_type numpy): X.weight of whatever X lies under X in quant_weight.npy, norms under their own
names in anti_fp_norm.npy, X.deq_scale under X in deq_scale.npy, and so on. What it has no place for lies in others.npy
under its own name: biases, for which it takes the key of the weight that they then replace, and parameters that are
neither weights nor biases.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

WEIGHTS, NORMS, OTHERS = "quant_weight.npy", "anti_fp_norm.npy", "others.npy"
ROUNDED = "bfloat16.json"
"""Names the tensors in bfloat16, which NumPy does not have."""
_SUFFIXES = ("input_scale", "input_offset", "quant_bias", "deq_scale", "weight_scale", "weight_offset")
_WHOLE_NAMES = {
    "*.fa_*scale": "fa_quant_scale.npy",
    "*.fa_*offset": "fa_quant_offset.npy",
    "*.kv_cache_scale": "kv_cache_scale.npy",
    "*.kv_cache_offset": "kv_cache_offset.npy",
    "*norm.weight": NORMS,
    "*norm.bias": NORMS,
}
FILES = (WEIGHTS, *(f"{suffix}.npy" for suffix in _SUFFIXES), *dict.fromkeys(_WHOLE_NAMES.values()), OTHERS)
"""All dictionaries that there may be."""


def place_of(name: str) -> tuple[str, str]:
    """The file and the key of a tensor."""
    for pattern, file in _WHOLE_NAMES.items():
        if fnmatchcase(name, pattern):
            return file, name
    module, _, suffix = name.rpartition(".")
    if suffix == "weight" and module:
        return WEIGHTS, module
    return (f"{suffix}.npy", module) if suffix in _SUFFIXES and module else (OTHERS, name)


def name_of(file: str, key: str) -> str:
    """The inverse of `place_of`."""
    if file in (OTHERS, *_WHOLE_NAMES.values()):
        return key
    return f"{key}.{'weight' if file == WEIGHTS else file.removesuffix('.npy')}"
