"""The structure of a decoder: plain data, without torch, so that it can be kept and planned with.

It is found by `quantcli.model.discovery` from one watched forward, never from a table of architectures.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal


@dataclass(frozen=True)
class Linear:
    """A linear layer: `y = x Wᵀ + b`, W [out_features, in_features]; `transposed` if it is stored as [in, out].

    splits_input: engines that spread a model over devices cut W along the input, not the output (row parallel). So they
    do with linears that add to the residual stream, or whose input channels are output channels of another linear: o of
    attention and down of an MLP. read_apart: something other than the linear reads W, so that codes cannot take its
    place.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    transposed: bool = False
    splits_input: bool = False
    read_apart: bool = False

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Producer:
    """The module whose output channels are, up to a scale a channel, the input channels of some linears.

    kind `norm`: its output is the very tensor (`weight_offset` is 1 for norms that multiply by 1 + w). kind `linear`:
    its output reaches the input through operations that keep channels apart (v to o through attention, up to down
    through a product). Scaling through it must still be checked numerically.

    segments: the input channels, in order, are the producer's output channels [start, start + length) of each segment;
    heads that share keys and values repeat a segment, and a part of a fused projection starts inside. Empty: identity.

    obstacle: in words, what else reads those channels, so that scaling them would change the model; empty if only the
    linears of this input read them.
    """

    name: str
    kind: Literal["norm", "linear"]
    weight_offset: float = 0.0
    segments: tuple[tuple[int, int], ...] = ()
    obstacle: str = ""
    attention: bool = False

    def channels(self, width: int) -> list[int]:
        """The producer's output channel behind each of `width` input channels."""
        return [channel for start, length in self.segments or ((0, width),) for channel in range(start, start + length)]


@dataclass(frozen=True)
class SharedInput:
    """One activation tensor and the linears that read it. Named after its first reader."""

    linears: tuple[str, ...]
    width: int
    producer: Producer | None = None

    @property
    def name(self) -> str:
        return self.linears[0]

    def is_output_of(self, norm: Norm) -> bool:
        return self.producer is not None and self.producer.name == norm.name


@dataclass(frozen=True)
class Norm:
    """A norm: y = normalized(x) · (w + weight_offset) + b; `centred` if it subtracts the mean, as LayerNorm does."""

    name: str
    weight_offset: float
    centred: bool
    bias: bool


@dataclass(frozen=True)
class Residual:
    """How a block meets the residual stream.

    norms: those that read the stream itself. writers: linears whose output is added to it as it is. experts: modules of
    experts of which this is so. obstacle: in words, why the stream cannot be rotated through this block; empty if it
    can.
    """

    norms: tuple[Norm, ...]
    writers: tuple[str, ...]
    obstacle: str = ""
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """A module that holds the weights of many experts in 3-D `parameters`, named from the root, that which makes the
    output last.

    linears: of each expert the names of its linears as a checkpoint has them, which no modules have: those that read
    the expert's input, in the order in which their outputs stand in the module, then the one that makes its output.
    Empty if the module holds its experts in a form that is not known. inputs_before: how many of the block's shared
    inputs are read before the module is called.
    """

    name: str
    parameters: tuple[str, ...]
    linears: tuple[tuple[str, ...], ...]
    inputs_before: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The linears of all experts, expert by expert."""
        return tuple(name for expert in self.linears for name in expert)

    @property
    def entering(self) -> tuple[str, ...]:
        """Those that read what enters an expert."""
        return tuple(name for expert in self.linears for name in expert[:-1])

    @property
    def leaving(self) -> tuple[str, ...]:
        """Those that make what leaves an expert."""
        return tuple(expert[-1] for expert in self.linears)


@dataclass(frozen=True)
class Block:
    """A decoder block. `fused`: linears that serving engines give one scheme: those that they join (same input, same
    parent: q/k/v, gate/up), and all experts of a layer.

    `linears` are those of modules and of `experts`. `routers` choose among experts, or weigh what they put out; they
    are among the linears, too. `inputs` have the linears of modules alone; `mixed` are inputs that linears of experts
    read, each with all of its readers: routers and shared experts too.

    held: values that a pass holds at most where it is about to read one of `inputs` or to enter `experts`, beside what
    entered the block: for each token, and for each pair of tokens of a sequence, as scores of attention are.
    """

    name: str
    linears: tuple[Linear, ...]
    inputs: tuple[SharedInput, ...]
    fused: tuple[tuple[str, ...], ...]
    experts: tuple[Experts, ...] = ()
    routers: tuple[str, ...] = ()
    residual: Residual | None = None
    mixed: tuple[SharedInput, ...] = ()
    held: tuple[float, float] = (0.0, 0.0)

    @property
    def groups(self) -> tuple[SharedInput, ...]:
        """The inputs with everything that reads them: `mixed` in the place of those of `inputs` that they include."""
        included = {name for shared in self.mixed for name in shared.linears}
        return (*(shared for shared in self.inputs if not included.issuperset(shared.linears)), *self.mixed)

    def values_of(self, shared: SharedInput) -> tuple[str, list[int]] | None:
        """The linear that makes the values which attention adds up, and which of its outputs they are, if it reads this
        input."""
        for other in self.inputs:
            producer = other.producer
            if producer is not None and producer.attention and producer.name in shared.linears:
                return producer.name, sorted(set(producer.channels(other.width)))
        return None

    @property
    def writers(self) -> tuple[str, ...]:
        """The linears that write to the residual stream, those of experts too."""
        if self.residual is None:
            return ()
        layers = (experts for experts in self.experts if experts.name in self.residual.experts)
        return (*self.residual.writers, *(name for experts in layers for name in experts.leaving))

    @property
    def local_experts(self) -> tuple[Experts, ...]:
        """The experts by names without the block's."""

        def local(name: str) -> str:
            return name.removeprefix(f"{self.name}.")

        return tuple(
            replace(
                experts,
                name=local(experts.name),
                parameters=tuple(map(local, experts.parameters)),
                linears=tuple(tuple(map(local, expert)) for expert in experts.linears),
            )
            for experts in self.experts
        )


@dataclass(frozen=True)
class Structure:
    """A whole model. `parameters` maps every stored parameter to its shape, tied ones once; `head` is the output
    linear; `tuple_length` is that of the tuple which blocks return, hidden states first; 0 if they return those alone.

    embeddings: parameters [·, width] whose rows are added up to what enters the first block. final_norm: what the head
    reads. outer_obstacle: in words, why the stream cannot be rotated outside the blocks; empty if it can. head_dim:
    channels of an attention head by the configuration, None if it does not say. latents: whether its cache holds
    compressed latents, not keys and values (`attention.caches_latents`).
    """

    architecture: str
    dtype: str
    blocks: tuple[Block, ...]
    parameters: dict[str, tuple[int, ...]]
    head: str | None
    tied: bool
    vocabulary: int
    width: int
    tuple_length: int = 0
    embeddings: tuple[str, ...] = ()
    final_norm: Norm | None = None
    outer_obstacle: str = ""
    head_dim: int | None = None
    latents: bool = False

    def linears(self) -> Iterator[Linear]:
        for block in self.blocks:
            yield from block.linears

    def matrices(self) -> Iterator[Linear]:
        """Everything that can be quantized: the linears of the blocks, and the output head if it is not tied."""
        yield from self.linears()
        if self.head_linear is not None:
            yield self.head_linear

    def waiting_values(self, tokens: int, pairs: int, compared: bool) -> int:
        """Values that passes over `tokens` tokens, `pairs` with each other in sequences, hold while they wait inside a
        block (`Block.held`): what entered it, what it has made and, if it is `compared` with another pass, what it has
        added to the residual stream."""
        made = max(tokens * block.held[0] + pairs * block.held[1] for block in self.blocks)
        return int(tokens * self.width * (1 + compared) + made)

    @property
    def head_linear(self) -> Linear | None:
        """The output head where it has weights of its own: not of a model whose head is tied to the embedding."""
        return None if self.head is None or self.tied else Linear(self.head, self.width, self.vocabulary)

    @property
    def token_embeddings(self) -> list[str]:
        """The embeddings that may be the one of tokens, by their shape; others are of positions."""
        return [name for name in self.embeddings if self.parameters[name] == (self.vocabulary, self.width)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Structure:
        return cls(
            **{
                **content,
                "blocks": tuple(_block(block) for block in content["blocks"]),
                "parameters": {name: tuple(shape) for name, shape in content["parameters"].items()},
                "embeddings": tuple(content["embeddings"]),
                "final_norm": Norm(**content["final_norm"]) if content["final_norm"] else None,
            }
        )


def biased(structure: Structure, biases: Collection[str]) -> Structure:
    """The structure with biases that its architecture lacks, of linears of modules and of norms, by the names that
    they have as parameters."""
    if not biases:
        return structure
    shapes = {f"{linear.name}.bias": (linear.out_features,) for linear in structure.linears()}
    owners = {name: name.removesuffix(".bias") for name in biases}
    added = {name: shapes.get(name) or structure.parameters[f"{owner}.weight"] for name, owner in owners.items()}

    def block(each: Block) -> Block:
        linears = tuple(replace(own, bias=own.bias or f"{own.name}.bias" in added) for own in each.linears)
        if each.residual is None:
            return replace(each, linears=linears)
        norms = tuple(replace(own, bias=own.bias or f"{own.name}.bias" in added) for own in each.residual.norms)
        return replace(each, linears=linears, residual=replace(each.residual, norms=norms))

    return replace(structure, blocks=tuple(map(block, structure.blocks)), parameters={**structure.parameters, **added})


def rms_norms(structure: Structure) -> list[Norm]:
    """The norms before linears of blocks that are RMSNorm as engines have it: x / rms(x) · w, and no (1 + w)."""
    norms = (norm for block in structure.blocks if block.residual is not None for norm in block.residual.norms)
    return [norm for norm in norms if not norm.centred and norm.weight_offset == 0]


def rotation_obstacles(structure: Structure) -> list[str]:
    """Why the residual stream cannot be rotated, in words, each reason once; empty if it can."""
    found: dict[str, None] = {}
    for block in structure.blocks:
        if block.residual is None:
            found.setdefault(f"it is not known how {block.name} meets the residual stream")
        elif block.residual.obstacle:
            found.setdefault(block.residual.obstacle)
        else:
            for norm in block.residual.norms:
                readers = [shared.producer for shared in block.groups if shared.is_output_of(norm)]
                reasons = [producer.obstacle for producer in readers if producer is not None and producer.obstacle]
                found |= dict.fromkeys(reasons if readers else [f"no linear is known to read {norm.name}"])
    if structure.outer_obstacle:
        found.setdefault(structure.outer_obstacle)
    elif not structure.embeddings or structure.final_norm is None or structure.head is None:
        found.setdefault("it is not known how the residual stream begins and ends")
    elif structure.tied and len(structure.token_embeddings) != 1:
        found.setdefault("it is not known which embedding the head is tied to")
    return list(found)


def heads_obstacles(structure: Structure) -> list[str]:
    """Why the values of attention cannot be rotated head by head, in words; empty if they can in some block."""
    if structure.head_dim is None:
        return ["it is not known how many channels its attention heads have"]
    if not rotatable_heads(structure, structure.head_dim):
        return [f"it has no attention output in whole heads of {structure.head_dim} channels that is known"]
    return []


def rotatable_heads(structure: Structure, head_dim: int) -> list[SharedInput]:
    """The inputs that are outputs of attention in whole heads of `head_dim`, whose values a known linear makes.

    Attention is known by its weights, which multiply the values, and by what is beside these: queries as wide as its
    output, and keys as wide as the values, made by siblings of that linear or by the same one. Then no gate or other
    factor lies between values and output.
    """
    return [shared for block in structure.blocks for shared in block.inputs if _is_rotatable(block, shared, head_dim)]


def joined(structure: Structure) -> dict[str, tuple[str, ...]]:
    """The linears of blocks that engines join into one, as q, k and v, or gate and up of one expert: those that are
    fused, of one parent, with inputs of one width. By the name of each of them."""
    found: dict[str, tuple[str, ...]] = {}
    for block in structure.blocks:
        widths = {linear.name: linear.in_features for linear in block.linears}
        for fused in block.fused:
            parts: dict[tuple[str, int], list[str]] = {}
            for name in fused:
                parts.setdefault((name.rpartition(".")[0], widths[name]), []).append(name)
            found |= {name: tuple(names) for names in parts.values() if len(names) > 1 for name in names}
    return found


def _is_rotatable(block: Block, shared: SharedInput, size: int) -> bool:
    starts = head_starts(shared, size)
    if shared.producer is None or not shared.producer.attention or shared.producer.obstacle or not starts:
        return False
    features = {linear.name: linear.out_features for linear in block.linears}
    values, name = len(starts) * size, shared.producer.name
    siblings = next((group for group in block.fused if name in group), (name,))
    if len(siblings) == 1:
        return features[name] == shared.width + 2 * values
    return sorted(features[sibling] for sibling in siblings) == sorted((shared.width, values, values))


def head_starts(shared: SharedInput, size: int) -> list[int]:
    """First output channel of each head of values behind an input; none if it does not consist of whole heads."""
    producer = shared.producer
    if producer is None or producer.kind != "linear":
        return []
    segments = producer.segments or ((0, shared.width),)
    if any(length % size for _, length in segments):
        return []
    starts = sorted({head for start, length in segments for head in range(start, start + length, size)})
    overlapping = any(after - before < size for before, after in pairwise(starts))
    return [] if overlapping else starts


def _block(content: dict[str, Any]) -> Block:
    residual = content["residual"]
    return Block(
        content["name"],
        tuple(Linear(**linear) for linear in content["linears"]),
        tuple(map(_input, content["inputs"])),
        tuple(tuple(group) for group in content["fused"]),
        tuple(
            Experts(
                e["name"], tuple(e["parameters"]), tuple(tuple(expert) for expert in e["linears"]), e["inputs_before"]
            )
            for e in content["experts"]
        ),
        tuple(content["routers"]),
        residual
        and Residual(
            tuple(Norm(**n) for n in residual["norms"]),
            tuple(residual["writers"]),
            residual["obstacle"],
            tuple(residual["experts"]),
        ),
        tuple(map(_input, content["mixed"])),
        tuple(content["held"]),
    )


def _input(content: dict[str, Any]) -> SharedInput:
    producer = content["producer"]
    return SharedInput(tuple(content["linears"]), content["width"], _producer(producer) if producer else None)


def _producer(content: dict[str, Any]) -> Producer:
    return Producer(**{**content, "segments": tuple((start, length) for start, length in content["segments"])})
