"""GGUF, the file that llama.cpp and what is built on it (Ollama, LM Studio) load, with its tokenizer inside.

Of a linear X [out, in] each row is in/32 blocks of 32 inputs with a float16 scale d, and u = q + 8:

    Q8_0    d, 32 × int8 q                                       W = q·d                symmetric 8-bit codes
    Q4_0    d, 16 bytes: u of inputs j and j + 16 in byte j      W = (u − 8)·d          symmetric 4-bit codes
    Q4_1    d, float16 m, 16 bytes likewise                      W = u·d + m            asymmetric 4-bit codes

A scale that covers more than 32 inputs is repeated. Codes and scales go in as they are. m = −(z + 8)·d is rounded to
float16: by at most 2^-11 of itself, so by less than 1/136 of a step. The zero point is read back from it without loss.

Everything else is in the model's dtype, but for vectors, which llama.cpp wants in float32. Beside model.gguf lie
config.json, the tokenizer's files and quantization.json, which names the scheme of each linear: blocks do not tell
whether a scale was one of a channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.formats import common
from quantcli.model import gguf_layout
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.structure import Linear, Structure
from quantcli.quant.scheme import AttentionScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantcli.formats.store import Store, StoredLinear
    from quantcli.model.writer import PlannedTensor

NAME = "gguf"
STEM = "model"
WRITES_TIED_HEAD = False
ONE_SCHEME = False
FLOAT16_SCALES = True

RECORD = "quantization.json"
BLOCK = 32
KINDS = {(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1"}
"""(bits, symmetric) → the ggml type of such codes."""
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}

attention_refusal = common.attention_refusal
attention_names = common.attention_names
attention_tensors = common.attention_tensors


def kind_of(scheme: Scheme) -> str:
    """The ggml type of codes of a scheme; empty if there is none."""
    return KINDS.get((scheme.bits, scheme.symmetric), "")


def refusal(linear: Linear, scheme: Scheme) -> str:
    """Why this format cannot hold the linear under the scheme; empty when it can."""
    if linear.transposed:
        return "is written for Linear modules only, and this model's are stored transposed (Conv1D)"
    if scheme.activations != "none":
        return "holds weights alone, with inputs in float"
    if scheme.type == "float":
        return "holds integer codes, not fp8"
    if not kind_of(scheme):
        return "holds codes of 4 bits, and symmetric ones of 8 bits"
    if linear.in_features % BLOCK or (scheme.group_size or BLOCK) % BLOCK:
        return f"has a scale for each {BLOCK} inputs, so that groups and widths have to be multiples of it"
    return ""


def refuses_model(directory: Path, structure: Structure, tensors: Iterable[str]) -> str:
    """Why the model cannot be in this format, whatever its schemes; empty when it can. `tensors` are the names that its
    float checkpoint has, as far as they are known. Raises ModelError for a damaged tokenizer."""
    from quantcli.model.gguf_file import configuration
    from quantcli.model.gguf_tokenizer import tokenizer_keys

    config = configuration(directory)
    written = config | {"tie_word_embeddings": structure.tied}
    if reason := gguf_layout.refusal(written, structure.parameters):
        return reason
    own = {name for name in tensors if is_parameter(name, config)}
    if other := sorted(own - set(structure.parameters)):
        return f"wants tensors named as transformers names parameters, and {other[0]} is none"
    try:
        tokenizer_keys(directory, int(config["vocab_size"]))
    except ModelError as error:
        if error.remedy:  # of a model that no format can mend
            raise
        return error.message
    return ""


def layout(linear: Linear, scheme: Scheme, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that stand for X.weight: suffix → (dtype, shape): rows of blocks."""
    blocks = linear.in_features // BLOCK
    return {"weight": ("uint8", (linear.out_features, blocks * BLOCK_BYTES[kind_of(scheme)]))}


def encode(stored: StoredLinear, scheme: Scheme, dtype: str, bias: Tensor | None, linear: Linear) -> dict[str, Tensor]:
    """The tensors of `layout` from the store's codes. Raises ModelError for a scale, or a scale times its zero point,
    that float16 does not hold."""
    import torch

    from quantcli.formats.store import held_scale

    codes, scale, zero_point = stored.weight
    out, inner = codes.shape
    blocks = inner // BLOCK
    halves = held_scale(scale, torch.float16)
    parts = [_spread(halves, out, blocks)]
    if zero_point is not None:
        lowest = (-(zero_point.float() + 8) * halves.float()).to(torch.float16)
        if not bool(torch.isfinite(lowest).all()):
            raise ModelError("A scale times its zero point is no float16 value.", "Quantize with symmetric: true.")
        parts.append(_spread(lowest, out, blocks))
    if scheme.bits == 8:
        packed = codes.view(torch.uint8).view(out, blocks, BLOCK)
    else:
        unsigned = (codes + 8).view(torch.uint8).view(out, blocks, 2, BLOCK // 2)
        packed = unsigned[:, :, 0] | (unsigned[:, :, 1] << 4)
    parts = [part.view(torch.uint8) for part in parts]
    return {"weight": torch.cat([*parts, packed], dim=-1).view(out, -1)}


def _spread(values: Tensor, out: int, blocks: int) -> Tensor:
    """Scales [out or 1, groups] as one a block: [out, blocks, 1]."""
    return values.repeat_interleave(blocks // values.shape[1], dim=1).expand(out, blocks).contiguous().unsqueeze(-1)


def decode(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode`. Raises ModelError if blocks that the scheme gives one scale have several, or if a lowest
    value is no multiple of its scale."""
    import torch

    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight

    kind = kind_of(scheme)
    rows = tensors["weight"]
    out = len(rows)
    raw = rows.view(out, -1, BLOCK_BYTES[kind])
    blocks = raw.shape[1]
    scale = _joined(raw[..., :2].contiguous().view(torch.float16).squeeze(-1), scheme, blocks)
    zero_point = None
    if kind == "Q8_0":
        codes = raw[..., 2:].contiguous().view(torch.int8)
    else:
        packed = raw[..., BLOCK_BYTES[kind] - BLOCK // 2 :]
        codes = torch.cat((packed & 15, packed >> 4), dim=-1).view(torch.int8) - 8
    if kind == "Q4_1":
        lowest = _joined(raw[..., 2:4].contiguous().view(torch.float16).squeeze(-1), scheme, blocks).float()
        exact = -lowest / scale.float()
        zeros = exact.round()
        if not bool(((zeros - exact).abs() <= 2.0**-6).all()) or bool(((zeros < 0) | (zeros > 15)).any()):
            raise ModelError("A block's lowest value is no whole number of steps, so its zero point is none.",
                             "Score the file itself, which is converted then.")  # fmt: skip
        zero_point = (zeros - 8).to(torch.int8)
    return StoredLinear(QuantizedWeight(codes.reshape(out, -1), scale, zero_point))


def _joined(values: Tensor, scheme: Scheme, blocks: int) -> Tensor:
    """Values [out, blocks] as one for all that a scale of the scheme covers. Raises ModelError if those differ."""
    rows, groups = scheme.scale_shape(len(values), blocks * BLOCK)
    if groups == 0 or blocks % groups:
        raise ModelError(f"Groups of {scheme.group_size} by {RECORD} are no blocks of {BLOCK}.", "Export it again.")
    apart = values.view(rows, len(values) // rows, groups, blocks // groups)
    kept = apart[:, :1, :, :1]
    if not bool((apart == kept).all()):
        raise ModelError(f"Blocks that share a scale by {RECORD} have several.", "Export it again.")
    return kept.reshape(rows, groups).contiguous()


def write_weights(
    folder: Path,
    planned: Sequence[PlannedTensor],
    produce: Callable[[str], Tensor],
    schemes: Mapping[str, Scheme],
    origin: Path,
    config: Mapping[str, Any],
) -> list[Path]:
    """Write the one file of the weights, unless it is there, and return it.

    `schemes` are those of tensors, `origin` is the float model, whose tokenizer goes into the file, and `config` the
    config.json of the export. Tensors that are no parameters are left out.
    """
    from quantcli.model.gguf_file import FILE, configuration, write_gguf

    types = {name: kind_of(scheme) for name, scheme in schemes.items()}
    full = configuration(origin)
    full["tie_word_embeddings"] = full.get("tie_word_embeddings") and config.get("tie_word_embeddings") is not False
    if not (folder / FILE).exists():
        kept = [tensor for tensor in planned if is_parameter(tensor.name, full)]
        write_gguf(folder / FILE, kept, produce, types, origin, full)
    return [folder / FILE]


def is_parameter(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor of a float checkpoint is a parameter: tables of rotary embeddings and copies of a tied head,
    which old checkpoints have, are none."""
    return not name.endswith(".rotary_emb.inv_freq") and not (
        config.get("tie_word_embeddings") and name == "lm_head.weight"
    )


def documents(
    config: Mapping[str, Any], store: Store, kept: set[str], owners: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """quantization.json with the scheme of each linear, and config.json of the float model."""
    record = {"format": NAME, "linears": {name: scheme.to_json() for name, scheme in store.schemes.items()}}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return {RECORD: record, "config.json": plain}


def recognizes(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a directory holds a checkpoint of this format."""
    return any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors"))


def described(
    checkpoint: Checkpoint, config: Mapping[str, Any], weights: Mapping[str, str]
) -> tuple[dict[str, Scheme], AttentionScheme | None]:
    """The scheme of each linear of a type of integers: that of quantization.json, else groups of a block.

    Raises ModelError where the two disagree.
    """
    from quantcli.model.gguf_file import GgufCheckpoint

    assert isinstance(checkpoint, GgufCheckpoint)
    record = checkpoint.directory / RECORD
    said = read_json(record).get("linears", {}) if os.path.lexists(record) else {}
    plain = {kind: Scheme(bits, symmetric, "group", BLOCK) for (bits, symmetric), kind in KINDS.items()}
    found = {}
    for module, weight in weights.items():
        place = checkpoint.places.get(weight)
        kind = place.kind if place is not None else ""
        if (kind in plain) != (module in said) and said:
            raise ModelError(f"{record} and the file disagree about {module}.", "Export it again.")
        if kind in plain:
            found[module] = _scheme(module, said, record) if said else plain[kind]
            if kind_of(found[module]) != kind:
                raise ModelError(f"{record} says that {module} is {found[module].name}, and it is {kind}.")
    return found, None


def _scheme(module: str, said: Mapping[str, Any], record: Path) -> Scheme:
    try:
        return Scheme.from_json(said[module])
    except TypeError as error:
        raise ModelError(f"{record}: {module} has no scheme that is known: {error}.") from error
