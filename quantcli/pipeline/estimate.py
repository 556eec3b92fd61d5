"""Memory, disk and time that a run is expected to take. Estimates, to be printed as such."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from quantcli.model.structure import Block, Linear, SharedInput, Structure
from quantcli.pipeline.batches import BATCH_TOKENS
from quantcli.recipe.quantization import WeightsSection
from quantcli.recipe.schema import Recipe
from quantcli.recipe.smoothing import CLIPPING, SmoothSection

# Resident memory of Python with torch and transformers loaded; measured on Linux, CPU build (BENCHMARKS.md).
BASE_MEMORY = 420 << 20
JUDGED_WEIGHTS = 1 << 26
"""Weights of the experts by whose outputs smoothing judges scales, but for a single one that has more."""
HEAD_MEMORY = 320 << 20  # logits of both models in 16 bits, half of model.stream.HEAD_BYTES each, and their scores
# Nanoseconds a weight on one core of 2024, by weight method.
SECONDS_A_WEIGHT = {
    "minmax": 1e-9,
    "mse": 60e-9,
    "gptq": 250e-9,
    "signround": 250e-9,
    "hqq": 220e-9,
    "ssz": 60e-9,
    "co_sparse": 30e-9,
    "low_bit": 30e-9,
    "low_bit_sigma": 5e-9,
}
# Of smoothing, for a plain method; one that clips, which AWQ does for each of 20 scales; auto, which measures few; auto
# that clips for each of those; balance, with its factors of moments.
SECONDS_A_SMOOTHED_WEIGHT = (30e-9, 1800e-9, 350e-9, 1000e-9, 200e-9)
# What it holds of its widest group of linears in float32, in copies of its weights (on a block of 44 M weights).
SMOOTHING_COPIES = (1.5, 5.5, 11.0, 11.0, 4.5)
SECONDS_A_MIXED_WEIGHT = 600e-9
"""Of rounding with what outputs are to each other, which little of runs on more than one core."""
MOST_OUTPUTS = 2048
"""Outputs of a part; those of a wider linear are taken in parts of one size, and each part by itself."""
SOLVING_MATRICES = 4
"""Float32 matrices [in, in] that exist at a time while a linear is solved; one more with asymmetric calibration."""
# Of stage distill, measured on blocks of 3.5 M and 44 M weights in bfloat16, W8A8 and W4A16, within a fifth: bytes of
# each value that a linear of a block reads or puts out, with float inputs and with quantized ones, whose codes are
# floats with a gradient; and logits of both models with logarithms and gradients, model.stream.GRADED_BYTES at a time,
# with about as much that was freed and stays with the process.
GRADED_VALUE = (4, 12)
GRADED_HEAD = 16 * (24 << 20)
SECONDS_A_BYTE = 1.5e-9  # written once, read back once to verify, hashed
SECONDS_A_BYTE_READ = 0.4e-9  # of weights, by a model that writes one token after the other
SECONDS_A_BYTE_STREAMED = 1.0e-9  # of weights that are read from files for that, and decoded
START = 6.0  # imports and the first look at a model


@dataclass(frozen=True)
class Estimate:
    """Bytes of peak memory, bytes of disk, seconds, and tokens run through the model."""

    memory: int
    disk: int
    seconds: float
    tokens: int


def estimate(
    recipe: Recipe,
    structure: Structure,
    size_after: int,
    quantized: Collection[tuple[Linear, WeightsSection]],
    passes: int,
) -> Estimate:
    """A model of the run: one block and the activations in memory; two operations a weight and token in time. `passes`
    counts how often the calibration samples run through the model."""
    width = 2 if structure.dtype != "float32" else 4
    block_weights = max(sum(linear.weights for linear in block.linears) for block in structure.blocks)
    inside = {f"{block.name}." for block in structure.blocks}
    outer = sum(
        prod(shape) * width
        for name, shape in structure.parameters.items()
        if not any(name.startswith(b) for b in inside)
    )
    linear_weights = sum(linear.weights for linear in structure.linears())
    calibration = recipe.calibration
    observed = calibration.samples * calibration.sequence_length if calibration and passes else 0
    perplexity = recipe.evaluate.perplexity if recipe.evaluate else None
    scored = (perplexity.windows or 300) * perplexity.sequence_length if perplexity else 0
    memory = BASE_MEMORY + block_weights * (width + 2)
    if observed or scored:
        hidden = min(max(observed, 2 * scored) * structure.width * width, 2 * recipe.model.cache_memory)
        memory += max(outer + HEAD_MEMORY * bool(scored), block_weights * width * (2 if scored else 1)) + 2 * hidden
    routed = observed * structure.width * width if _solves_experts(structure, quantized) else 0
    memory += min(routed, recipe.model.cache_memory)
    memory += _solving_memory(recipe, structure, observed, quantized)
    tokens = passes * observed + 2 * scored
    headed = 2 * scored
    if recipe.quantize.distill is not None:
        memory = max(memory, BASE_MEMORY + _distillation_memory(recipe, structure, observed, quantized))
        headed += 3 * recipe.quantize.distill.passes * observed  # of the float model once, of the other with gradients
    if recipe.quantize.mixes and calibration is not None:
        memory = max(memory, BASE_MEMORY + _curvature_memory(recipe, structure, quantized))
    if recipe.smooth is not None:
        hidden = min(observed * structure.width * width, recipe.model.cache_memory)
        memory = max(memory, BASE_MEMORY + _smoothing_memory(recipe.smooth, structure, outer, quantized) + 2 * hidden)
    seconds = START + SECONDS_A_BYTE * size_after
    whole, generate = (
        sum(map(prod, structure.parameters.values())) * width,
        recipe.evaluate and recipe.evaluate.generate,
    )
    if generate and recipe.export:
        readings = 2 * generate.max_new_tokens
        if whole <= generate.memory:
            memory = max(memory, BASE_MEMORY + whole)
            seconds += readings * SECONDS_A_BYTE_READ * whole
        elif readings * whole <= generate.streamed:
            memory = max(memory, BASE_MEMORY + outer + 2 * block_weights * width)
            seconds += readings * SECONDS_A_BYTE_STREAMED * whole
    if recipe.smooth is not None and recipe.smooth.scales:
        seconds += SECONDS_A_SMOOTHED_WEIGHT[_smoothing_cost(recipe.smooth, quantized)] * linear_weights
    seconds += sum(SECONDS_A_WEIGHT[weights.method] * linear.weights for linear, weights in quantized)
    if tokens:
        seconds += 2.0 * (tokens * linear_weights + headed * structure.width * structure.vocabulary) / _rate()
    disk = size_after + linear_weights + tokens * structure.width * width
    if recipe.quantize.mixes and calibration is not None:
        backward = _backward_tokens(recipe)
        # experts and the head are counted too, which are solved without
        mixed = [linear for linear, weights in quantized if weights.mixed]
        seconds += 2.0 * backward * (4 * linear_weights + 3 * structure.width * structure.vocabulary) / _rate()
        seconds += SECONDS_A_MIXED_WEIGHT * sum(linear.weights for linear in mixed)
        disk += sum(2 * linear.out_features * min(linear.out_features, MOST_OUTPUTS) for linear in mixed)
        disk += (len(structure.blocks) + 2) * backward * structure.width * width
    disk += routed if routed > recipe.model.cache_memory else 0
    if recipe.smooth is not None and recipe.smooth.save_model:
        head = structure.vocabulary * structure.width * (structure.tied and recipe.smooth.unties)
        disk += (sum(map(prod, structure.parameters.values())) + head) * width
    return Estimate(int(memory), int(disk), round(seconds, 1), tokens)


def with_trials(
    found: Estimate, structure: Structure, tokens: int, tried: Collection[tuple[Linear, WeightsSection]]
) -> Estimate:
    """The estimate with `tokens` more run through the blocks, for which the linears of `tried` are quantized."""
    quantizing = sum(SECONDS_A_WEIGHT[weights.method] * linear.weights for linear, weights in tried)
    running = 2.0 * tokens * sum(linear.weights for linear in structure.linears()) / _rate()
    return replace(found, seconds=round(found.seconds + quantizing + running, 1), tokens=found.tokens + tokens)


def _solves_experts(structure: Structure, quantized: Collection[tuple[Linear, WeightsSection]]) -> bool:
    """Whether what enters a layer of experts is kept while these are solved."""
    experts = {name for block in structure.blocks for layer in block.experts for name in layer.names}
    return any(linear.name in experts and weights.solves for linear, weights in quantized)


def _solving_memory(
    recipe: Recipe, structure: Structure, observed: int, quantized: Collection[tuple[Linear, WeightsSection]]
) -> int:
    """Bytes that weights take which are solved: what all calibration tokens hold inside a block, if they wait there,
    and the matrices [in, in] of the widest input."""
    section, calibration = recipe.quantize, recipe.calibration
    widths = [linear.in_features for linear, weights in quantized if weights.solves]
    if calibration is None or not widths:
        return 0
    compared = section.gptq.asymmetric or section.tunes
    waiting = structure.waiting_values(observed, observed * calibration.sequence_length, compared)
    waiting = int(waiting * (1 + section.gptq.compared * compared)) * (2 if structure.dtype != "float32" else 4)
    matrices = SOLVING_MATRICES + section.gptq.asymmetric
    return (waiting if waiting <= recipe.model.cache_memory else 0) + 4 * matrices * max(widths) ** 2


def _backward_tokens(recipe: Recipe) -> int:
    """Tokens that run backward through the float model."""
    assert recipe.calibration is not None
    samples = min(recipe.calibration.samples, recipe.quantize.gptq.output_samples or 0)
    return samples * recipe.calibration.sequence_length


def _curvature_memory(
    recipe: Recipe, structure: Structure, quantized: Collection[tuple[Linear, WeightsSection]]
) -> int:
    """Most bytes of stage curvature, beside the process itself: a block and the copy of it that has gradients, those
    of a batch, two matrices of each linear's outputs and a product that is added to one, the head with its logits, and
    hidden states at every block."""
    width, tokens = 2 if structure.dtype != "float32" else 4, _backward_tokens(recipe)
    mixed = {linear.name for linear, weights in quantized if weights.mixed}
    most = 0
    for block in structure.blocks:
        values = sum(linear.in_features + linear.out_features for linear in block.linears)
        held = min(BATCH_TOKENS, tokens) * values * GRADED_VALUE[False] * width // 2
        held += 2 * width * sum(linear.weights for linear in block.linears)
        outputs = [linear.out_features for linear in block.linears if linear.name in mixed]
        moments = [each * min(each, MOST_OUTPUTS) for each in outputs]
        product = 2 if structure.dtype == "bfloat16" else 4
        most = max(most, held + 8 * sum(moments) + product * max(moments, default=0))
    states = min((len(structure.blocks) + 2) * tokens * structure.width * width, recipe.model.cache_memory)
    return max(most, structure.vocabulary * structure.width * width + GRADED_HEAD) + states


def _smoothing_cost(section: SmoothSection, quantized: Collection[tuple[Linear, WeightsSection]]) -> int:
    """0 for a plain method, 1 for one that clips, 2 for auto, 3 for auto that clips, 4 for balance."""
    if section.method == "balance":
        return 4
    few = section.method in CLIPPING and section.clip is not False and any(each.bits < 8 for _, each in quantized)
    return 2 * (section.method == "auto") + few


def _smoothing_memory(
    section: SmoothSection, structure: Structure, outer: int, quantized: Collection[tuple[Linear, WeightsSection]]
) -> int:
    """Most bytes of the stage smooth beside its hidden states: the block in float32 on which folds are checked, its
    changed copy, and what a search holds of a group, for balance also second moments of all inputs of the block; or,
    before that, what is outside the blocks, which a rotated embedding or head is in float32."""
    weights = {linear.name: linear.weights for linear in structure.linears()}
    block = max(sum(weights[linear.name] for linear in block.linears) for block in structure.blocks)
    groups = (_judged(block, shared, weights) for block in structure.blocks for shared in block.groups)
    copies = SMOOTHING_COPIES[_smoothing_cost(section, quantized)]
    rotated = structure.vocabulary * structure.width * 4 * section.unties
    searched = 4 * copies * max(groups, default=0) if section.scales else 0
    moments = max(map(_moments, structure.blocks)) if section.method == "balance" else 0
    return max(outer + rotated, 8 * block + int(searched) + moments)


def _moments(block: Block) -> int:
    """Bytes of E[x xᵀ] of inputs of groups, but for those inside experts, and of the widest while it is factored."""
    inside = {name for layer in block.experts for name in layer.leaving}
    squares = [4 * each.width**2 for each in block.groups if each.name not in inside]
    return sum(squares) + SOLVING_MATRICES * max(squares, default=0)


def _judged(block: Block, shared: SharedInput, weights: Mapping[str, int]) -> int:
    """Most weights of a group that a search holds: of experts only some."""
    of_experts = {name for experts in block.experts for name in experts.names}.intersection(shared.linears)
    experts = [weights[name] for name in of_experts]
    beside = sum(weights[name] for name in shared.linears if name not in of_experts)
    return beside + min(sum(experts), max(JUDGED_WEIGHTS, *experts, 0))


def _distillation_memory(
    recipe: Recipe, structure: Structure, observed: int, quantized: Collection[tuple[Linear, WeightsSection]]
) -> int:
    """Most bytes of the stage distill, beside the process itself: a block with gradients for a batch, what enters every
    block of it, the head with its logits, the hidden states of all samples before and behind the blocks, and the scales
    with what Adam keeps of them."""
    width = 2 if structure.dtype != "float32" else 4
    batch = min(BATCH_TOKENS, observed // 2 or 1)
    values = max(sum(each.in_features + each.out_features for each in block.linears) for block in structure.blocks)
    treatments = map(recipe.quantize.treatment, (None, *recipe.quantize.overrides))
    rounded = any(activations.bits < 16 for _, activations in filter(None, treatments))
    block = max(sum(linear.weights for linear in block.linears) for block in structure.blocks) * (1 + 2 * width)
    block += batch * values * GRADED_VALUE[rounded] * width // 2
    scales = sum(
        linear.out_features * linear.in_features // (weights.group_size or linear.in_features)
        for linear, weights in quantized
    )
    states = ((len(structure.blocks) + 1) * batch + 4 * observed) * structure.width * width
    head = structure.vocabulary * structure.width * width + GRADED_HEAD
    return block + states + head + 16 * scales


@cache
def _rate() -> float:
    """Operations a second of this machine in a float32 matrix product, the best of four; measured once."""
    import numpy as np

    a = np.ones((768, 768), np.float32)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return float(2 * 768**3 / min(seconds))
