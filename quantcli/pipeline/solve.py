"""Weights of one decoder block found from the inputs that its quantized linears will have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantcli.calibration.hessian import Hessian, attended, shares
from quantcli.errors import ModelError
from quantcli.evaluation.simulate import Replacement, forward_of, simulated
from quantcli.formats.store import StoredLinear
from quantcli.model.expert_loop import Weight, run_expert
from quantcli.model.heap import release_freed_memory
from quantcli.model.hidden import HiddenCache
from quantcli.model.lockstep import Forward, Lockstep, Routed, stopping
from quantcli.model.stream import BlockStream
from quantcli.model.structure import Block, Experts, SharedInput
from quantcli.pipeline.curvature import read_outputs
from quantcli.pipeline.experts import HIDDEN_EXPERTS, RoutedTokens, warn_of_few, weighed_experts
from quantcli.pipeline.plan import Treatment
from quantcli.pipeline.rundir import six_digits
from quantcli.pipeline.treatment import (
    StatisticsOf,
    WeightSource,
    input_parameters,
    observed_of,
    replacement,
    require_finite_weight,
    weight_grid,
    with_input,
)
from quantcli.pipeline.tune import Aims, tuned_block
from quantcli.pipeline.vectors import put_in_place
from quantcli.quant.compensate import compensation
from quantcli.quant.gptq import Curvature, factored
from quantcli.quant.grid import QuantizedWeight, WeightGrid
from quantcli.quant.outputs import mixed_outputs
from quantcli.quant.refine import relative_error
from quantcli.quant.shrinkage import shrunk
from quantcli.quant.solver import solved

if TYPE_CHECKING:
    from quantcli.pipeline.context import Context
    from quantcli.pipeline.treatment import Facts
    from quantcli.recipe.quantization import QuantizeSection
    from quantcli.recipe.solver import GptqSection

    Results = dict[str, tuple[StoredLinear, Facts]]


@dataclass
class Passes:
    """Two passes over the calibration samples, block by block: with quantized linears and, where it is asked for, the
    float model beside it, which only the first batches take. `again`: batches start anew for every input of a block
    rather than wait inside of it (`model.lockstep`)."""

    stream: BlockStream
    quantized: HiddenCache
    plain: HiddenCache | None = None
    beside: BlockStream | None = None
    again: bool = False

    def waiting_bytes(self) -> int:
        """What all batches hold while they wait inside a block."""
        skeleton = self.stream.skeleton
        streams = [self.stream] if self.beside is None else [self.stream, self.beside]
        shapes = [batch.shape for stream in streams for batch in stream.batches]
        tokens, pairs = sum(shape.numel() for shape in shapes), sum(shape.numel() * shape[-1] for shape in shapes)
        values = skeleton.structure.waiting_values(tokens, pairs, self.beside is not None)
        return values * skeleton.dtype.itemsize


def solve_block(
    source: WeightSource, passes: Passes, index: int, block: Block, section: QuantizeSection, statistics: StatisticsOf
) -> tuple[Results, dict[str, Tensor]]:
    """Codes and scales of every planned linear of a block, in the order in which their inputs come about; and norms and
    biases that were tuned with them, float32, by the names of parameters.

    Each input is taken as the linears before it, quantized by then, make it (true-sequential); what leaves the
    quantized block enters the next one. Experts of other methods are quantized from the start. Raises ModelError for
    inputs that are not finite, and for a Hessian that does not factor.
    """
    treatments, solver = source.context.plan.treatments, section.gptq
    found: Results = {}
    aims: Aims = {}
    hows: dict[str, Replacement] = {}
    replaced: dict[str, Forward] = {}
    every = [name for shared in block.inputs for name in shared.linears]
    device, dtype = passes.stream.skeleton.device, passes.stream.skeleton.dtype
    wanted: dict[int, Tensor] = {}
    vectors: dict[str, Tensor] = {}

    def replace_linear(name: str, linear: nn.Module) -> None:
        hows[name] = replacement(found[name][0], treatments[name].scheme, dtype, device, "decode")
        replaced[name] = forward_of(linear, hows[name])

    layers = [layer for layer in block.experts if any(name in treatments for name in layer.names)]
    of_experts = [name for layer in layers for name in layer.names if name in treatments]
    for name in [name for name in of_experts if not treatments[name].weights.solves]:
        found[name] = source.quantize(name, statistics, with_inputs=True)
        replace_linear(name, nn.Module())
    stops: list[SharedInput | Experts] = [*block.inputs]
    for layer in reversed([layer for layer in layers if _solving(source, layer.names)]):
        stops.insert(layer.inputs_before, layer)
    with passes.stream.block(index) as module:
        writers = _writers(passes, index, block) if solver.asymmetric else ()
        with stopping(module, block.name, every, layers):
            prefix = replaced if solver.prefix == "quantized" else {}
            walking = partial(Lockstep, index=index, inputs=stops, again=passes.again, writers=writers)
            walk = walking(passes.stream, enters=passes.quantized.get, replaced=prefix)
            beside = None
            if passes.plain is not None and passes.beside is not None:
                beside = walking(passes.beside, enters=passes.plain.get, replaced={})
            for position, shared in enumerate(stops):
                if isinstance(shared, Experts):
                    entering = walk.advance_to_experts(position)
                    holder = module.get_submodule(shared.name.removeprefix(f"{block.name}."))
                    for results in _solve_experts(source, passes, shared, holder, entering, prefix, solver, statistics):
                        found |= results
                        for name in results:
                            replace_linear(name, nn.Module())
                    continue
                solving = _solving(source, shared.linears)
                hessian = None
                if solving:
                    direct = beside is not None and solver.asymmetric and _narrows(source, solving)
                    weight = source.weight(solving[0]).to(device, dtype) if direct else None
                    hessian = Hessian(shared.width, device, weight)
                values = _values(source, passes, block, shared) if solving else None
                others = beside.advance(position) if beside is not None and solver.asymmetric else iter(())
                writes = all(name in writers for name in solving)
                for batch, value in enumerate(walk.advance(position)):
                    other = next(others, None)
                    importance = None if values is None else attended(functional.linear(value, *values))
                    if hessian is not None and other is not None:
                        assert passes.plain is not None
                        lack = _lacking(passes, batch, walk, beside) if writes else None
                        meant = passes.plain.get(batch) if writes else other
                        hessian.update(value, other, lack, shares(meant).to(device), importance)
                    elif hessian is not None:
                        hessian.update(value, importance=importance)
                for name in shared.linears:
                    if name in treatments and name not in solving:
                        found[name] = source.quantize(name, statistics, with_inputs=True)
                if hessian is not None:
                    found |= _solve_input(source, solving, hessian, solver, statistics, aims)
                for name in shared.linears:
                    if name in treatments:
                        replace_linear(name, module.get_submodule(name.removeprefix(f"{block.name}.")))
            if beside is not None and passes.plain is not None:
                for batch, value in enumerate(beside.finish()):
                    passes.plain.put(batch, value)
                    if aims:
                        wanted[batch] = value
            if aims:
                walk.close()
            else:
                for batch, value in enumerate(walk.finish()):
                    passes.quantized.put(batch, value)
        if aims:
            tuned, vectors = tuned_block(
                source, passes.stream, index, passes.quantized, wanted, aims, found, hows, section.signround
            )
            found |= tuned
            put_in_place(passes.stream.skeleton, vectors)
            for name in aims:
                hows[name] = replacement(found[name][0], treatments[name].scheme, dtype, device, "decode")
            local = {name.removeprefix(f"{block.name}."): how for name, how in hows.items()}
            with simulated(module, local, block.local_experts):
                for batch in range(len(passes.stream.batches)):
                    passes.quantized.put(batch, passes.stream.run(index, batch, passes.quantized.get(batch)))
    return found, vectors


def _solving(source: WeightSource, names: Iterable[str]) -> list[str]:
    treatments = source.context.plan.treatments
    return [name for name in names if name in treatments and treatments[name].weights.solves]


def _solve_experts(
    source: WeightSource,
    passes: Passes,
    layer: Experts,
    holder: nn.Module,
    entering: Iterable[Routed],
    replaced: Mapping[str, Forward],
    section: GptqSection,
    statistics: StatisticsOf,
) -> Iterator[Results]:
    """Codes and scales of the linears of experts that are solved, one expert after the other.

    Those that read an expert's input come first, for the tokens that it computes; then the one behind them, for what
    they make of these tokens by `replaced`, which is to have them by then. `holder` is the module of the layer. Experts
    of too few tokens are quantized without them. The float model has no part in it: it routes other tokens to them.
    """
    context, device = source.context, passes.stream.skeleton.device
    calibration, linears = context.recipe.calibration, context.linears
    assert calibration is not None
    width = linears[layer.linears[0][0]].in_features
    routed = RoutedTokens(
        passes.quantized.folder.with_name(HIDDEN_EXPERTS),
        entering,
        [(batch.numel(), width) for batch in passes.stream.batches],
        passes.stream.skeleton.dtype,
        context.recipe.model.cache_memory,
        calibration.route_all_experts,
    )
    counts: dict[str, int] = {}
    for index, names in enumerate(layer.linears):
        count = routed.count(index)
        for members in (_solving(source, names[:-1]), _solving(source, names[-1:])):
            if not members:
                continue
            counts[names[0]] = count
            if count < calibration.expert_tokens:
                results = {name: source.quantize(name, statistics, with_inputs=True) for name in members}
                facts: Facts = {"data_free": True, "tokens": count}
            else:
                hessian = Hessian(linears[members[0]].in_features, device)
                for tokens in routed.of(index):
                    x = tokens.to(device)
                    hessian.update(x if members[0] != names[-1] else _between(holder, layer, index, x, replaced))
                results = _solve_input(source, members, hessian, section, statistics, {})
                facts = {}
            for name, (_, own) in results.items():
                own |= _left_out(source, name, section) | facts
            yield results
    # the stage calibrate has warned of those that it observed to be few, for linears that are weighed
    observed = {name: int(statistics(name)["count"]) for name in weighed_experts(context) if name in counts}
    told = {name for name, count in observed.items() if count < calibration.expert_tokens}
    warn_of_few(context, layer, {name: count for name, count in counts.items() if name not in told})
    routed.clear()


@torch.no_grad()
def _between(holder: nn.Module, layer: Experts, index: int, x: Tensor, replaced: Mapping[str, Forward]) -> Tensor:
    """What the last linear of an expert reads, of tokens x that enter the expert."""
    last = layer.linears[index][-1]

    def compute(name: str, value: Tensor, weight: Weight) -> Tensor:
        if name == last:
            return value
        how = replaced.get(name)
        return functional.linear(value, weight()) if how is None else how(value)

    return run_expert(holder, layer, index, x, compute)


def _writers(passes: Passes, index: int, block: Block) -> tuple[str, ...]:
    """The linears whose outputs the resident block adds to the residual stream as they are.

    Not those that a model scales first, as Granite does by its residual_multiplier, and Qwen2-MoE its shared expert by
    a gate. With d_t what the float block adds to token t, and W_t [n, width] what these linears and layers of experts
    put out, the median over tokens of c_t = argmin ‖d_t − c_t W_t‖, c_t [n], is near 1 for the others.
    """
    if passes.plain is None or passes.beside is None or block.residual is None or block.residual.obstacle:
        return ()
    put_out: dict[str, Tensor] = {}
    module, entering = passes.beside.skeleton.module(block.name), passes.plain.get(0).clone()
    names = (*block.residual.writers, *block.residual.experts)

    def keep(name: str) -> Callable[..., None]:
        # OPT hands all tokens of a batch to its last linears as one sequence, as others do to experts
        return lambda _module, _args, output: put_out.update({name: output.float().reshape(entering.shape)})

    hooks = [
        module.get_submodule(name.removeprefix(f"{block.name}.")).register_forward_hook(keep(name)) for name in names
    ]
    try:
        left = passes.beside.run(index, 0, entering)
    finally:
        for hook in hooks:
            hook.remove()
    if not put_out:
        return ()
    added, parts = left.float() - entering.to(left.device).float(), torch.stack([*put_out.values()], -2)
    products, sums = (parts @ parts.mT).flatten(0, -3), (parts @ added.unsqueeze(-1)).flatten(0, -3)
    finite = (products.sum((1, 2)) + sums.sum((1, 2))).isfinite()
    if not bool(finite.any()):
        return ()
    found = torch.linalg.pinv(products[finite], hermitian=True) @ sums[finite]
    factors = dict(zip(put_out, found.squeeze(-1).median(0).values.tolist(), strict=True))
    return tuple(name for name in block.residual.writers if 0.8 < factors.get(name, 0.0) < 1.25)


def _values(
    source: WeightSource, passes: Passes, block: Block, shared: SharedInput
) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of what makes the values that attention adds up from this input; None if it does not."""
    found = block.values_of(shared)
    if found is None:
        return None
    name, channels = found
    linear = passes.stream.skeleton.module(name)
    stored, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    weight = stored.t() if source.context.linears[name].transposed else stored
    return weight[channels], None if bias is None else bias[channels]


def _narrows(source: WeightSource, solving: Sequence[str]) -> bool:
    """Whether one linear is solved that has half as many outputs as inputs, or fewer."""
    linears = [source.context.linears[name] for name in solving]
    return len(linears) == 1 and 2 * linears[0].out_features <= linears[0].in_features


def _lacking(passes: Passes, batch: int, walk: Lockstep, beside: Lockstep | None) -> Tensor:
    """What the residual stream of the quantized model lacks, against that of the float model, at this moment; but for
    what the experts of this block add, which compute other tokens there."""
    assert passes.plain is not None
    assert beside is not None
    device = passes.stream.skeleton.device
    lack = passes.plain.get(batch).to(device).float() - passes.quantized.get(batch).to(device).float()
    if batch in walk.written:
        lack += beside.written[batch].float() - walk.written[batch].float()
    return lack.to(passes.stream.skeleton.dtype)


def _left_out(source: WeightSource, name: str, section: GptqSection) -> Facts:
    """What records say of a linear, of an expert or the head, that is solved as it is, though the recipe asks for
    more."""
    tuned: Facts = {"tuned": False} if source.context.plan.treatments[name].weights.method == "signround" else {}
    return tuned | ({"asymmetric": 0.0} if section.asymmetric else {})


def solve_head(source: WeightSource, passes: Passes, section: GptqSection, statistics: StatisticsOf) -> Results:
    """Codes and scales of the output head, from what leaves the last block and the final norm."""
    context, stream = source.context, passes.stream
    head = context.plan.structure.head_linear
    assert head is not None
    if not context.plan.treatments[head.name].weights.solves:
        return {head.name: source.quantize(head.name, statistics, with_inputs=True)}
    hessian = Hessian(head.in_features, stream.skeleton.device)
    handle = stream.skeleton.module(head.name).register_forward_pre_hook(lambda _, args: hessian.update(args[0]))
    try:
        with stream.head():
            for batch in range(len(stream.batches)):
                for _ in stream.logits(passes.quantized.get(batch)):
                    pass
    finally:
        handle.remove()
    results = _solve_input(source, [head.name], hessian, section, statistics, {})
    results[head.name][1].update(_left_out(source, head.name, section))
    return results


def _solve_input(
    source: WeightSource,
    names: Sequence[str],
    hessian: Hessian,
    section: GptqSection,
    statistics: StatisticsOf,
    aims: Aims,
) -> Results:
    """The linears that read one input, those of one treatment at once. What was aimed at by those to be tuned
    is added to `aims`."""
    release_freed_memory()
    moments = hessian.moments()
    if not bool(torch.isfinite(moments.diagonal()).all()):
        raise ModelError(f"{names[0]}: input values are not finite during calibration.",
                         "Try model.dtype: float32; if it persists, the weights are damaged.")  # fmt: skip
    context = source.context
    _warn_of_empty(context, names, moments.diagonal() == 0)
    groups = _alike(names, context.plan.treatments, source.one_scale)
    compared = hessian.compared_moments()
    aimed = [_aimed(source, members, hessian, moments if compared is None else compared) for members in groups]
    del compared
    hessian.forget_compared()
    seen: Facts = {"tokens": hessian.tokens}
    if section.shrink:
        moments, share = shrunk(moments, hessian.tokens, section.damping)
        seen["shrunk"] = float(f"{share:.3g}")
    try:
        curvature = factored(moments, section.damping)
    except ValueError as error:
        raise ModelError(f"{names[0]}: {error}.", "Use more calibration text, or roll it back.") from error
    if curvature.damping > section.damping:
        context.emit("warning", fallback="extra_damping", modules=list(names),
                     text=f"The Hessian of {names[0]} factors only with {curvature.damping:.0%} of its "
                     f"diagonal added, not {section.damping:.0%}.")  # fmt: skip
    found: Results = {}
    for members, (target, rows, zero_rows, facts) in zip(groups, aimed, strict=True):
        treatment = context.plan.treatments[members[0]]
        facts = {"prefix": section.prefix, "damping": curvature.damping} | seen | facts
        grid = weight_grid(treatment, context.plan.structure.dtype)
        quantized, lost = solved(target, grid, curvature, section.sweeps)
        quantized, gained = _mixed(source, members, target, quantized, grid, curvature, section.sweeps)
        if gained is not None:
            facts["outputs"] = gained
            lost = relative_error(target, quantized, curvature.hessian)
        facts["error"] = six_digits(lost)
        for name, zeros, part in zip(members, zero_rows, _split(quantized.to("cpu"), rows), strict=True):
            entry = StoredLinear(part)
            own = facts | {"scale_max": six_digits(part.scale.abs().max().item()), "zero_rows": zeros}
            if treatment.scheme.observed:
                scale, zero, ranges = input_parameters(observed_of(statistics(name)), treatment)
                entry, own = with_input(entry, scale, zero), own | ranges
            found[name] = (entry, own)
        if treatment.weights.method == "signround":
            seconds = moments.diagonal().clone()
            aims |= {name: (aim, seconds) for name, aim in zip(members, target.split(rows), strict=True)}
    return found


def _warn_of_empty(context: Context, names: Sequence[str], empty: Tensor) -> None:
    """Warn of input channels of linears that held nothing but zeros, unless the stage calibrate has, of static
    inputs."""
    if not bool(empty.any()) or any(context.plan.treatments[name].scheme.observed for name in names):
        return
    if bool(empty.all()):
        text = (f"The input of {names[0]} was zero for every calibration token: its weights are rounded to nearest. "
                "Use other calibration text, or roll it back.")  # fmt: skip
    else:
        text = (f"{int(empty.sum())} of {len(empty)} input channels of {names[0]} were zero for every calibration "
                "token: their weights are rounded to nearest. Use more calibration text if they should "
                "not be.")  # fmt: skip
    context.emit("warning", fallback="constant_inputs", modules=list(names), text=text)


def _mixed(
    source: WeightSource,
    members: Sequence[str],
    target: Tensor,
    quantized: QuantizedWeight,
    grid: WeightGrid,
    curvature: Curvature,
    sweeps: int,
) -> tuple[QuantizedWeight, float | None]:
    """Codes and scales under what the outputs of each linear are to each other, where stage `curvature` found that, and
    the share of the loss that they take away, over all members."""
    # linears of one treatment in one block: all of them are mixed, or none
    known = [outputs for name in members if (outputs := read_outputs(source.context, name)) is not None]
    if not known:
        return quantized, None
    sizes = [outputs.shape[1] for outputs in known for _ in outputs]
    parts = [part for outputs in known for part in outputs]
    found, before, after = [], 0.0, 0.0
    for aim, start, own in zip(target.split(sizes), _split(quantized, sizes), parts, strict=True):
        part, lost, left = mixed_outputs(aim, start, grid, curvature, own.to(target.device), sweeps)
        found.append(part)
        before, after = before + lost, after + left
    codes, scales, zeros = zip(*found, strict=True)
    zero_point = None if quantized.zero_point is None else torch.cat(zeros)
    share = round(1 - after / before, 3) if before > 0 else 0.0
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), zero_point), share


def _aimed(
    source: WeightSource, members: Sequence[str], hessian: Hessian, compared: Tensor
) -> tuple[Tensor, list[int], list[int], Facts]:
    """What linears of one treatment are rounded from, float32 [out of all, in]; how many outputs each has, and how many
    of them are zero throughout; facts of asymmetric calibration."""
    weights = [source.weight(name).float() for name in members]
    for name, weight in zip(members, weights, strict=True):
        require_finite_weight(name, weight)
    rows = [len(weight) for weight in weights]
    zero_rows = [int((torch.count_nonzero(weight, dim=1) == 0).sum()) for weight in weights]
    whole = torch.cat(weights) if len(weights) > 1 else weights[0]
    del weights  # as large as the whole
    pulls = hessian.pulls(whole)
    if pulls is None:
        return whole, rows, zero_rows, {}
    try:
        target, damping, share = compensation(whole, compared, *pulls, hessian.held_out_share)
    except ValueError as error:
        source.context.emit("warning", fallback="not_tuned", modules=list(members),
                            text=f"{members[0]}: {error}: what came before is not made good. Use more calibration "
                            "text.")  # fmt: skip
        return whole, rows, zero_rows, {"asymmetric": 0.0}
    return target, rows, zero_rows, {"asymmetric": round(share, 3), "asymmetric_damping": damping}


def _alike(
    names: Sequence[str], treatments: Mapping[str, Treatment], one_scale: Mapping[str, tuple[str, ...]]
) -> list[list[str]]:
    """Linears that can be solved as one: of one treatment, with a scale a row or finer, or with one scale for all."""
    groups: dict[object, list[str]] = {}
    for name in names:
        treatment = treatments[name]
        key = one_scale.get(name, name) if treatment.scheme.granularity == "tensor" else treatment
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _split(quantized: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    """So many rows each; the scale of a tensor is that of every one."""
    codes, scale, zero_point = quantized
    if len(scale) == 1:
        return [QuantizedWeight(part, scale.clone(), zero_point) for part in codes.split(list(rows))]
    zeros = [None] * len(rows) if zero_point is None else zero_point.split(list(rows))
    parts = zip(codes.split(list(rows)), scale.split(list(rows)), zeros, strict=True)
    return [QuantizedWeight(*part) for part in parts]
