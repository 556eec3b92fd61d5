"""A fixed prompt, run through an export as it is evaluated and through the store that it was made from.

The tensors of an export are compared one by one elsewhere. Here its reader is compared, on whose word the evaluation
relies: schemes, codes, scales and everything else come once from the files of the export and once from the store and
the float checkpoint, and the logits have to be the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats import ascend, dense
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.formats.store import Store, StoredLinear
from quantcli.formats.verify_ascend import FORMS, derived_dtype, expected_attention, expected_linear
from quantcli.model.folding import added_biases, unties
from quantcli.model.names import checkpoint_prefix
from quantcli.model.skeleton import Skeleton
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Linear, Structure, biased
from quantcli.pipeline.served import block_as_served, head_as_served
from quantcli.quant.grid import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from quantcli.formats.export import Source
    from quantcli.pipeline.treatment import Phase

TOKENS = 16


def check_prompt(
    folder: Path, form: str, store: Store, source: Source, structure: Structure, *, trust_remote_code: bool = False
) -> float:
    """The mean log-likelihood of the prompt, nats a token, which export and store agree on.

    Computed on the CPU, whose results do not vary from run to run. Raises VerificationError where the logits differ.
    """
    linears = {linear.name: linear for linear in structure.matrices()}
    try:
        exported = QuantizedCheckpoint(folder, linears, source.weights)
        stored = cast("QuantizedCheckpoint", _Stored(form, store, source, linears))
        phases: list[Phase] = ["prefill"]
        if any(scheme.activations == "mix" for scheme in stored.schemes.values()):
            phases.append("decode")
        for phase in phases:
            found, wanted = (_logits(read, source, structure, phase, trust_remote_code) for read in (exported, stored))
            if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):  # as bits: NaN is not NaN
                apart = float((found - wanted).abs().max())
                raise VerificationError(f"{folder}: on a fixed prompt its logits differ from those of the store's "
                                        f"codes, by {apart:.3g} at most.", "Export it again.")  # fmt: skip
    except ModelError as error:
        raise VerificationError(error.message, "Export it again.") from error
    tokens = _prompt(structure)
    scores = found.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
    return round(float(scores.mean()), 6)


def _prompt(structure: Structure) -> Tensor:
    """Token ids [1, TOKENS], spread over the vocabulary."""
    return (torch.arange(TOKENS) * 7919 + 11).remainder(structure.vocabulary)[None]


def _logits(read: QuantizedCheckpoint, source: Source, structure: Structure, phase: Phase, trust: bool) -> Tensor:
    """float32 [1, TOKENS, vocabulary] of a model that computes as engines do with what `read` gives."""
    skeleton = Skeleton(
        source.checkpoint.directory,
        biased(structure, added_biases(source.checkpoint)),
        dtype=read.dtype,
        trust_remote_code=trust,
        checkpoint=read,
        untied=unties(source.checkpoint),
    )
    stream = BlockStream(skeleton, [_prompt(structure)])
    (hidden,) = stream.start()
    for index in range(len(skeleton.blocks)):
        with block_as_served(skeleton, index, read, phase):
            hidden = stream.run(index, 0, hidden)
    with stream.head(), head_as_served(skeleton, read, phase):
        return torch.cat([piece for _, piece in stream.logits(hidden)], dim=1)


class _Stored:
    """What a QuantizedCheckpoint gives, from the store and the float checkpoint, as an export of `form` holds it."""

    def __init__(self, form: str, store: Store, source: Source, linears: Mapping[str, Linear]) -> None:
        floats = form == dense.NAME  # weights alone, and those dequantized
        self.form, self.store, self.source, self.dtype = form, store, source, store.dtype
        self.entries = source.checkpoint.entries
        self.schemes = {} if floats else store.schemes
        self.attention = None if floats else store.attention
        self.attention_modules = [] if floats else list(store.attention_modules)
        self.weights = {source.weights[module]: module for module in store.schemes}
        self.transposed = {name for name, linear in linears.items() if linear.transposed}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._weight(name) if name in self.weights else self.source.read(name) for name in names}

    def read_linear(self, module: str) -> StoredLinear:
        stored = self.store.read(module)
        if self.form not in FORMS:
            return stored
        scheme = self.store.schemes[module]
        held = expected_linear(stored, scheme, derived_dtype(self.form, scheme, self.dtype), None)  # scales rounded
        scale = held["weight_scale"]
        assert scale is not None
        weight = QuantizedWeight(stored.weight.codes, scale, _of_channels(stored.weight.zero_point, len(scale)))
        return StoredLinear(weight, held.get("input_scale"), stored.input_zero_point)

    def read_attention(self, module: str) -> dict[str, Tensor]:
        parts = self.store.read_attention(module)
        if self.form not in FORMS or self.attention is None:
            return parts
        held = expected_attention(parts, self.attention, self.dtype)
        path = checkpoint_prefix(module, self.source.weights)
        names = {
            name.removeprefix(f"{path}."): part for name, part in ascend.attention_names(path, self.attention).items()
        }
        return {part: tensor for name, tensor in held.items() if tensor is not None and (part := names[name])}

    def _weight(self, name: str) -> Tensor:
        module = self.weights[name]
        weight = dequantize(self.read_linear(module).weight, getattr(torch, self.dtype))
        return weight.t() if module in self.transposed else weight


def _of_channels(zero_point: Tensor | None, count: int) -> Tensor | None:
    return None if zero_point is None else zero_point.expand(count, -1)
