"""The formats that can be written and read. A new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from quantcli.errors import ModelError
from quantcli.formats import ascend, awq, common, compressed_tensors, declared, dense, gguf, gptq, mindie, modelopt, npy
from quantcli.formats.msmodelslim import MsModelSlimCheckpoint
from quantcli.model.checkpoint import Checkpoint

FORMATS: dict[str, ModuleType] = {
    form.NAME: form for form in (compressed_tensors, ascend, mindie, npy, gptq, awq, modelopt, gguf, dense)
}
"""Name in a recipe → module with

NAME, STEM (of its weight files, or a pattern of it), WRITES_TIED_HEAD, ONE_SCHEME, FLOAT16_SCALES;
stem, where the model's schemes decide what STEM is a pattern of;
RESTRICTED, where files get the modes of `formats.permissions`;
ONE_GROUP_SIZE, where groups have one size in a checkpoint;
takes_added_bias, where norms may have biases that the architecture lacks: the schemes of linears that may, too;
type_name, where each linear has a type by name, which engines want to be one for those that they join;
refusal, layout, encode, decode: a linear as tensors and back;
ALL_ATTENTION, where a scheme of attention is that of all layers;
attention_refusal, attention_names, attention_tensors: the scales of an attention module;
reading: layout and decode for checkpoints of others, where these differ from what is written;
disputed: what loaders of a checkpoint make different things of, where there is such a thing;
documents: its JSON files; recognizes, described: what a directory is, and the schemes in it;
refuses_model, where it is not for every model; refuses_together, where modules may stand against one another;
write_weights and FILES, where its weights are no safetensors.
"""


def open_weights(directory: Path) -> Checkpoint:
    """The tensors of a model directory, in whichever kind of file. Raises ModelError as `Checkpoint` does."""
    if npy.recognizes(directory, {}):
        from quantcli.model.npy_file import NpyCheckpoint

        return NpyCheckpoint(directory)
    if ascend.recognizes(directory, {}) or mindie.recognizes(directory, {}):
        return MsModelSlimCheckpoint(directory)
    if not gguf.recognizes(directory, {}):
        return Checkpoint(directory)
    from quantcli.model.gguf_file import GgufCheckpoint

    return GgufCheckpoint(directory)


def quantized_as(directory: Path) -> str | None:
    """What has quantized the weights of a model directory, by its files; None for a float model. A file of settings
    beside config.json counts where a tensor is one of that method."""
    has_weights = any(directory.glob("*.safetensors"))  # a plan is made without
    told = has_weights and declared.stands_alone(directory)
    tensors = Checkpoint(directory).entries if told else ()
    config = declared.read_configuration(directory, tensors) if (directory / "config.json").is_file() else {}
    if (content := config.get("quantization_config")) is not None:
        method = content.get("quant_method") if isinstance(content, dict) else None
        return str(method or "some method")
    return next((form.NAME for form in (ascend, mindie, npy) if form.recognizes(directory, config)), None)


def find_format(directory: Path, config: Mapping[str, Any]) -> ModuleType | None:
    """The format of a checkpoint with this config.json; None for a float one.

    Raises ModelError for a checkpoint that another tool has quantized in a format that is not known.
    """
    for form in FORMATS.values():
        if form.recognizes(directory, config):
            return form
    content = config.get("quantization_config")
    if content is None:
        return None
    method = content.get("quant_method") if isinstance(content, dict) else content
    packing = f", packed as {str(content.get('packing_format'))!r}" if method == common.AUTOROUND else ""
    raise ModelError(f"{directory} is quantized by {str(method)!r}{packing}.", f"Known formats: {', '.join(FORMATS)}.")
