"""A plan's treatment carried out on one linear, and the result put in the linear's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from quantcli.errors import ModelError
from quantcli.pipeline.context import Context
from quantcli.pipeline.fused import scale_groups
from quantcli.pipeline.plan import Treatment
from quantcli.pipeline.rundir import six_digits, six_digits_or_none

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    import torch
    from torch import Tensor

    from quantcli.evaluation.simulate import Replacement
    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import WeightGrid
    from quantcli.quant.observers import Observed
    from quantcli.quant.scheme import Scheme

    Facts = dict[str, Any]
    Jobs = dict[str, Future[tuple[StoredLinear, Facts]]]

Statistics = Mapping[str, "Tensor"]
"""What `InputStatistics.to_tensors` gives of a linear's input."""
StatisticsOf = Callable[[str], Statistics]


class WeightSource:
    """The float weights of a context's linears, smoothed or `original`, and what the plan makes of each."""

    def __init__(self, context: Context, *, original: bool = False) -> None:
        from quantcli.model.checkpoint import Checkpoint
        from quantcli.model.names import weight_tensors

        self.context = context
        self.checkpoint = Checkpoint(context.model) if original else context.checkpoint
        trust = context.recipe.model.trust_remote_code
        self.names = weight_tensors(
            context.model, context.plan.structure, self.checkpoint.entries, trust_remote_code=trust
        )
        self.original = original
        schemes = {name: scheme for name, (_, scheme) in context.plan.schemes.items()}
        self.one_scale = scale_groups(context.plan.structure, schemes)
        self.by_block: dict[int, list[str]] = {}
        for name, (block, _) in context.plan.schemes.items():
            self.by_block.setdefault(block, []).append(name)

    def read(self, name: str) -> Tensor:
        """The float weight [out, in] on the device."""
        weight = self.checkpoint.read([self.names[name]])[self.names[name]]
        return (weight.t().contiguous() if self.context.linears[name].transposed else weight).to(self.context.device)

    def weight(self, name: str) -> Tensor:
        """What is to be quantized: the float weight [out, in] on the device, within the bounds of smoothing."""
        weight, bounds = self.read(name), self.bounds(name)
        if bounds is None:
            return weight
        from quantcli.smoothing.clip import clamped

        return clamped(weight.float(), bounds.to(weight.device))

    def bounds(self, name: str) -> Tensor | None:
        """The bounds that smoothing found for the weight of a linear, if it clips."""
        from quantcli.pipeline.smoothed import read_clip

        section, index = self.context.recipe.smooth, self.context.linear_blocks[name]
        if section is None or not section.scales or self.original or index >= self.context.blocks:
            return None
        treatment = self.context.plan.treatments[name]
        if not section.clips(treatment.weights, treatment.activations):
            return None
        scheme, linear = treatment.scheme, self.context.linears[name]
        found = read_clip(self.context.folder("smooth"), index, name, scheme)
        shape = scheme.scale_shape(linear.out_features, linear.in_features)
        # a linear that was rolled back since to other bits or groups has bounds that were found for those it had
        return found if found is not None and tuple(found.shape) == shape else None

    def _few(self, name: str, seen: Statistics) -> bool:
        """Whether a linear is of an expert that saw too few tokens for anything to be made of them."""
        section = self.context.recipe.calibration
        return section is not None and name in self.context.expert_inputs and int(seen["count"]) < section.expert_tokens

    def submit(self, workers: ThreadPoolExecutor, index: int, statistics: StatisticsOf, with_inputs: bool) -> Jobs:
        """One job for each planned linear of a block: its stored form, and facts. `statistics` is asked for a linear
        that needs them; without `with_inputs`, static input scales are left to others."""
        # the largest first, so that no worker is left alone with it
        names = sorted(self.by_block.get(index, []), key=lambda name: -self.context.linears[name].weights)
        jobs = {name: workers.submit(self.quantize, name, statistics, with_inputs) for name in names}
        return {name: jobs[name] for name in self.by_block.get(index, [])}

    def replacements(self, index: int, statistics: StatisticsOf, dtype: torch.dtype) -> dict[str, Replacement]:
        """What takes the place of each planned linear of a block, by its full name; a `mix` has its static scales."""
        from quantcli.model.workers import linear_workers

        device, treatments = self.context.device, self.context.plan.treatments
        with linear_workers(device) as workers:
            jobs = self.submit(workers, index, statistics, with_inputs=True)
            stored = {name: job.result()[0] for name, job in jobs.items()}
        return {
            name: replacement(entry, treatments[name].scheme, dtype, device, "decode") for name, entry in stored.items()
        }

    def quantize(self, name: str, statistics: StatisticsOf, with_inputs: bool) -> tuple[StoredLinear, Facts]:
        treatment = self.context.plan.treatments[name]
        needs = treatment.weights.importance != "none" or (with_inputs and treatment.scheme.observed)
        seen = statistics(name) if needs else None
        few = seen is not None and self._few(name, seen)
        if few:
            treatment = replace(treatment, weights=treatment.weights.model_copy(update={"importance": "none"}))
        dtype = self.context.plan.structure.dtype
        weight, group = self.weight(name), self.one_scale.get(name, (name,))
        whole = None if len(group) == 1 else [weight if each == name else self.weight(each) for each in group]
        stored, facts = quantize_weight(name, weight, treatment, dtype, seen, whole)
        if few:
            facts["data_free"] = True
        if with_inputs and treatment.scheme.observed:
            assert seen is not None
            scale, zero, ranges = input_parameters(observed_of(seen), treatment)
            stored, facts = with_input(stored, scale, zero), facts | ranges
        return stored, facts


def quantize_weight(
    name: str,
    weight: Tensor,
    treatment: Treatment,
    dtype: str,
    statistics: Statistics | None,
    whole: Sequence[Tensor] | None = None,
) -> tuple[StoredLinear, dict[str, Any]]:
    """Codes and scales of a weight [out, in], on the CPU, and the facts that events.jsonl keeps of them.

    `dtype` is the model's. A method that is solved from calibration is tried as `mse` here. `whole`: the weights that
    share one scale, in an order that is the same for each of them, `weight` itself among them. Raises ModelError, with
    the module, for weights and second moments that are not finite.
    """
    import torch

    from quantcli.formats.store import StoredLinear
    from quantcli.quant.grid import QuantizedWeight, quantize_codes
    from quantcli.quant.methods import WEIGHT_METHODS, weight_error
    from quantcli.recipe.quantization import SPARSE_METHODS

    require_finite_weight(name, weight)
    section = treatment.weights
    importance = None
    if section.importance == "second_moment":
        assert statistics is not None
        importance = statistics["second_moment"].to(weight.device)
        require_finite_moments(name, importance)
    method: Callable[..., QuantizedWeight] = WEIGHT_METHODS["mse" if section.solves else section.method]
    if section.method in SPARSE_METHODS:
        method = partial(method, fraction=section.fraction, sigma_factor=section.sigma_factor)
    grid = weight_grid(treatment, dtype)
    if whole is None:
        codes, scale, zero_point = method(weight, grid, importance)
    else:
        scale, zero_point = method(torch.cat(list(whole)), grid, importance)[1:]
        codes = quantize_codes(weight, scale, zero_point, grid)
    quantized = QuantizedWeight(codes.cpu(), scale.cpu(), None if zero_point is None else zero_point.cpu())
    facts: dict[str, Any] = {"scale_max": six_digits(scale.abs().max().item())}
    facts["error"] = six_digits(weight_error(weight, QuantizedWeight(codes, scale, zero_point), importance))
    facts["zero_rows"] = int((torch.count_nonzero(weight, dim=1) == 0).sum())
    return StoredLinear(quantized), facts


def input_parameters(observed: Observed, treatment: Treatment) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Scale float32 [1] and zero point int8 [1] (None if symmetric) of a static input, and facts about its range."""
    from quantcli.quant.activation import static_parameters
    from quantcli.quant.observers import activation_range

    section = treatment.activations
    low, high = activation_range(
        observed,
        section.method,
        symmetric=section.symmetric,
        aggregation=section.aggregation,
        percentile=section.percentile,
    )
    scale, zero = static_parameters(low, high, section.symmetric, section.type)
    range_parm = six_digits_or_none(observed.range_parm)
    facts = {"input_min": six_digits(low), "input_max": six_digits(high), "range_parm": range_parm}
    return scale, None if section.symmetric else zero, facts


def observed_of(statistics: Statistics) -> Observed:
    """What the calibrate stage stored of an input, as the range methods take it."""
    from quantcli.quant.observers import Observed

    return Observed(
        statistics["sample_minimum"],
        statistics["sample_maximum"],
        statistics.get("value_counts"),
        float(statistics["range_parm"]),
    )


def require_finite_weight(name: str, weight: Tensor) -> None:
    """Raise ModelError, with the linear, for a weight that holds NaN or infinity."""
    import torch

    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ModelError(f"{name}.weight holds values that are not finite.", "The checkpoint is damaged; get it again.")


def require_finite_moments(name: str, moments: Tensor) -> None:
    """Raise ModelError, with the linear, for second moments of its input that float32 does not hold."""
    import torch

    if not torch.isfinite(moments).all():
        raise ModelError(f"{name}: input values of a channel are so large that their squares are not finite.",
                         "The weights before it are damaged; get the checkpoint again, or roll it back.")  # fmt: skip


def with_input(stored: StoredLinear, scale: Tensor, zero_point: Tensor | None) -> StoredLinear:
    from quantcli.formats.store import StoredLinear

    return StoredLinear(stored.weight, scale.cpu(), None if zero_point is None else zero_point.cpu())


Phase = Literal["prefill", "decode"]
Arithmetic = Literal["engine", "transformers", "vllm-cpu"]


def replacement(
    stored: StoredLinear,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device | str,
    phase: Phase,
    arithmetic: Arithmetic = "engine",
) -> Replacement:
    """What `evaluation.simulate.simulated` puts in the place of a linear: products of codes, the dequantized weight, or
    with the arithmetic of transformers a product of floats that were rounded.

    Of inputs with activations `mix`, prompts (`prefill`) have dynamic scales, decoding static ones.
    """
    from quantcli.evaluation.fake_quantized import fake_quantized
    from quantcli.evaluation.simulate import QuantizedProduct

    if scheme.activations == "none":
        return dequantized(stored, dtype, device)
    static = scheme.activations == "static" or (scheme.activations == "mix" and phase == "decode")
    parts = (stored.input_scale, stored.input_zero_point) if static else (None, None)
    scale, zero_point = (None if part is None else part.to(device) for part in parts)
    inputs = scale, zero_point, scheme.activation_bits, not scheme.token_zero_points
    if arithmetic == "transformers":
        return fake_quantized(stored.weight.to(device), dtype, *inputs)
    codes, weight_scale = stored.weight.codes.to(device), stored.weight.scale.float().to(device)
    return QuantizedProduct(codes, weight_scale, *inputs)


def graded_inputs(scheme: Scheme, scale: Tensor | None, zero_point: Tensor | None) -> dict[str, Any]:
    """How `quant.straight_through` rounds the inputs of a linear, as its keywords. A `mix` has its static scale."""
    static = scheme.activations in ("static", "mix")
    return {
        "input_bits": None if scheme.activations == "none" else scheme.activation_bits,
        "input_symmetric": not scheme.token_zero_points,
        "input_scale": scale if static else None,
        "input_zero_point": zero_point if static else None,
    }


def dequantized(stored: StoredLinear, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The weight [out, in] that the codes stand for."""
    from quantcli.quant.grid import dequantize

    return dequantize(stored.weight.to(device), dtype)


def weight_grid(treatment: Treatment, dtype: str) -> WeightGrid:
    """The grid of a weight, with scales in the dtype that is stored; `dtype` is the model\'s."""
    import torch

    from quantcli.quant.grid import WeightGrid

    scheme = treatment.scheme
    scale_dtype = getattr(torch, scheme.scale_dtype(dtype))
    signed = treatment.weights.full_range
    return WeightGrid(
        scheme.bits,
        scheme.symmetric,
        scheme.granularity,
        scheme.group_size,
        scale_dtype,
        signed,
        scheme.smallest_scale(dtype),
        scheme.type,
    )
