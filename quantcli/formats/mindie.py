"""The older layout of msModelSlim (save_type safe_tensor), which MindIE picks by config.json. Tensors as in AscendV1.

    quant_model_weight_<type>.safetensors, or shards of it with an index: the tensors of `formats.ascend`
    quant_model_description_<type>.json: model_quant_type, and the name of every tensor with its type
    config.json: quantize, which is <type> and by which MindIE finds both files; quantization_config, which has no
    quant_method, with kv_quant_type (C8 or null), fa_quant_type (FAQuant or null) and group_size (0 without groups)

<type> is the model_quant_type in lower case: w8a8, w8a8_dynamic, w8a16, …
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import ascend
from quantcli.formats.ascend_description import check_group_size, described_in
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from quantcli.formats.store import Store

NAME = "mindie"
STEM = "quant_model_weight_*"
WRITES_TIED_HEAD = True
ONE_SCHEME = False
FLOAT16_SCALES = False
RESTRICTED = True
ONE_GROUP_SIZE = True

type_name = ascend.type_name
layout = ascend.layout
encode = ascend.encode
reading = ascend.reading
decode = ascend.decode
takes_added_bias = ascend.takes_added_bias
attention_refusal = ascend.attention_refusal
attention_names = ascend.attention_names
attention_tensors = ascend.attention_tensors

DESCRIPTIONS = "quant_model_description_*.json"


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if scheme.type == "float" and not linear.transposed:
        return "is read by engines that know no fp8 weights"
    return ascend.refusal(linear, scheme)


def stem(schemes: Iterable[Scheme]) -> str:
    """How the names of its weight files begin, by the schemes of the model's linears."""
    return STEM.replace("*", ascend.model_type(schemes).lower())


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """The description, and config.json with what MindIE looks for; `owners` as for `ascend.documents`."""
    files = ascend.documents(config, store, kept, owners)
    description, plain = files[ascend.DESCRIPTION], files["config.json"]
    kind = description["model_quant_type"].lower()
    said = {
        "kv_quant_type": description.pop("kv_quant_type", None),
        "fa_quant_type": description.get("fa_quant_type"),
        "group_size": description.pop("group_size"),
    }
    del description["version"]
    name = DESCRIPTIONS.replace("*", kind)
    return {name: description, "config.json": plain | {"quantize": kind, "quantization_config": said}}


def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a directory holds a checkpoint of this format, with or without what config.json should say of it."""
    return not ascend.recognizes(directory, config) and any(directory.glob(DESCRIPTIONS))


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """As `ascend.described`; the size of groups stands in config.json. Raises ModelError, too, for several
    descriptions."""
    found = sorted(checkpoint.directory.glob(DESCRIPTIONS))
    if len(found) != 1:
        raise ModelError(f"{checkpoint.directory} holds {len(found)} files {DESCRIPTIONS}.", "Leave one there.")
    schemes, attention = described_in(found[0], checkpoint, weights)
    said = config.get("quantization_config") or {}
    check_group_size(checkpoint.directory / "config.json", said.get("group_size"), schemes)
    return schemes, attention
