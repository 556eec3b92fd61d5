"""Groups of linears as smoothing methods see them, made from a plan and a checkpoint, and what came of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quantcli.model.structure import Producer, SharedInput, biased
from quantcli.pipeline.context import Context
from quantcli.pipeline.estimate import JUDGED_WEIGHTS
from quantcli.pipeline.plan import excluded_from_smoothing
from quantcli.pipeline.rundir import six_digits
from quantcli.recipe.smoothing import SmoothSection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.folding import Change, Fold
    from quantcli.pipeline.plan import Treatment
    from quantcli.pipeline.seen import Seen
    from quantcli.smoothing.group import Found, Group
    from quantcli.smoothing.objective import Target, Targets

FoldKind = Literal["norm", "attention", "mlp"]


def fold_kind(producer: Producer) -> FoldKind:
    """What absorbs a scale, as recipes name it."""
    if producer.kind == "norm":
        return "norm"
    return "attention" if producer.attention else "mlp"


def folds_taken(section: SmoothSection) -> tuple[FoldKind, ...]:
    """The kinds of fold that the recipe names, or that its method takes."""
    if section.folds is not None:
        return section.folds
    if section.method == "auto":
        return ("norm", "attention", "mlp")
    from quantcli.smoothing.methods import SMOOTHING_METHODS

    kinds = SMOOTHING_METHODS[section.method].kinds
    return ("norm", "attention", "mlp") if "linear" in kinds else ("norm",)


FITTED = 128
"""Tokens that `auto` moves a scale downhill by, about."""

Cause = Literal["no gain", "no token", "few tokens", "not finite", "obstacle", "check"]
"""Why a group stays as it is: no scale was better; no token reached it, or too few that expert; what entered it was not
finite; something else reads what its producer makes; the fold changed what the block computes."""


@dataclass(frozen=True)
class Outcome:
    """What came of one group. `fold` is None if it stays as it is; `cause` says why, and `reason` in words where that
    was not by choice."""

    shared: SharedInput
    facts: dict[str, Any]
    fold: Fold | None
    cause: Cause = "no gain"
    reason: str = ""

    def checked(self, difference: float, tolerance: float) -> Outcome:
        """The outcome, undone if the fold changed what the block adds by more than `tolerance`."""
        facts = {**self.facts, "difference": six_digits(difference)}
        if difference <= tolerance:
            return replace(self, facts=facts)
        reason = f"the fold would change the output of the block by {difference:.2g} of what it adds"
        return Outcome(self.shared, facts, None, "check", reason)

    def to_json(self) -> dict[str, Any]:
        assert self.shared.producer is not None
        return {
            "input": self.shared.name,
            "linears": list(self.shared.linears),
            "producer": self.shared.producer.name,
            "fold": fold_kind(self.shared.producer),
            "kept": self.fold is not None,
            "cause": self.cause if self.fold is None else "",
            "reason": self.reason,
            **self.facts,
        }


def _fitted(lengths: Sequence[int]) -> Tensor:
    """Which of the kept tokens of samples, of these lengths, a descent looks at: bool [all], neither all nor none.

    A text's first token, massive in many models, is one of them in every other sample, and judges in the rest.
    """
    import torch

    count = sum(lengths)
    every = max(2, count // FITTED)
    chosen = torch.cat([torch.arange(length) % every == i % 2 for i, length in enumerate(lengths)])
    one_sided = bool(chosen.all()) or not bool(chosen.any())  # by samples of a token or none, as rare experts see them
    return torch.arange(count) % every == 0 if one_sided else chosen


def _whole(group: Group, seen: Seen) -> Group:
    """The group with statistics of all samples, as far as `auto` reads them; others hold no samples apart."""
    import torch

    if not seen.apart.count:
        return group
    one, other = seen.apart, seen.rest
    counts = one.count + other.count
    extremes = [each for each in (one.sample_extremes, other.sample_extremes) if each is not None]
    return replace(
        group,
        minimum=torch.minimum(one.minimum, other.minimum),
        maximum=torch.maximum(one.maximum, other.maximum),
        mean_absolute=(one.mean_absolute * one.count + other.mean_absolute * other.count) / counts,
        sample_extremes=torch.cat(extremes, 1) if extremes else None,
    )


def _shifted(group: Group, shift: Tensor) -> Group:
    """The group with x − z in the place of its input x. Of |x − z| the mean is that of the kept tokens."""
    tokens, extremes = group.tokens - shift, group.sample_extremes
    return replace(
        group,
        minimum=group.minimum - shift,
        maximum=group.maximum - shift,
        mean_absolute=tokens.abs().mean(0),
        tokens=tokens,
        fitted=None if group.fitted is None else group.fitted - shift,
        sample_extremes=None if extremes is None else extremes - shift,
        shift=shift,
    )


class _Tried(NamedTuple):
    """What a method found; the scale as it will be stored; the ranges of the inputs and the output error with it."""

    found: Found
    scale: Tensor
    largest: Tensor
    error: float


class GroupSource:
    """Finds the scale of one group after the other, with the float weights of a checkpoint, which has zeros for the
    biases that shifts may add."""

    def __init__(self, context: Context, checkpoint: Checkpoint) -> None:
        from quantcli.model.folding import added_biases
        from quantcli.pipeline.smoothed import added_names, changeable_tensors

        self.context = context
        self.checkpoint = checkpoint
        self.structure = biased(context.plan.structure, added_biases(checkpoint))
        self.names = changeable_tensors(context.recipe, checkpoint, context.plan.structure) | added_names(checkpoint)
        self.excluded = excluded_from_smoothing(context.recipe, context.plan.structure)
        self.targets: dict[Treatment, Target] = {}
        layers = [experts for block in context.plan.structure.blocks for experts in block.experts]
        self.inner = {name for experts in layers for name in experts.leaving}

    def folds(self, shared: SharedInput) -> bool:
        """Whether an input is to be scaled: with a producer, a quantized reader, and nothing that is excluded."""
        section, producer = self.context.recipe.smooth, shared.producer
        assert section is not None
        if not section.scales or producer is None or fold_kind(producer) not in folds_taken(section):
            return False
        planned = any(name in self.context.plan.treatments for name in shared.linears)
        return planned and not {*shared.linears, producer.name} & self.excluded.keys()

    def clipped(self, shared: SharedInput) -> list[str]:
        """The readers of an input whose weights are to be clipped."""
        section, treatments = self.context.recipe.smooth, self.context.plan.treatments
        assert section is not None
        planned = [name for name in shared.linears if name in treatments and name not in self.excluded]
        return [name for name in planned if section.clips(treatments[name].weights, treatments[name].activations)]

    def clips(self, shared: SharedInput, seen: Seen, folds: list[Fold]) -> dict[str, Tensor]:
        """Bounds of the weights that are to be clipped among the readers of an input, with the block's folds in them,
        by the names that they are stored under. Inside an expert that saw too few tokens there are none."""
        import torch

        from quantcli.model.folding import fold_changes
        from quantcli.pipeline.smoothed import clip_name

        treatments = self.context.plan.treatments
        names = self.clipped(shared)
        if not names or not seen.tokens or seen.count < self._least(shared):
            return {}
        tokens = torch.cat(seen.tokens)
        for fold in folds:
            if fold.linears == shared.linears:
                if fold.shift is not None:
                    tokens = tokens - fold.shift.to(tokens.device)
                tokens = tokens / fold.scale.to(tokens.device)
        changes = fold_changes(self.structure, folds, self._read)
        found = {}
        for name in names:
            target, change = self._target(name), changes.get(f"{name}.weight")
            assert target is not None
            found[clip_name(name, treatments[name].scheme)] = target.bounds(self._weight(name, change).float(), tokens)
        return found

    def smooth(self, shared: SharedInput, seen: Seen, *, shifting: bool = True) -> Outcome:
        """The scale that the recipe's method finds for the linears of an input, under the scheme that the plan has for
        each, and the output error before and after. A shift that the recipe asks for is taken where it does not make
        that error larger; without `shifting` none is tried."""
        from quantcli.model.folding import Fold
        from quantcli.smoothing.group import largest_input
        from quantcli.smoothing.objective import output_error

        producer = shared.producer
        assert producer is not None
        left = partial(Outcome, shared, {"chosen": "none"}, None)
        if producer.obstacle:
            return left("obstacle", producer.obstacle)
        if not seen.rest.count or not any(len(part) for part in seen.tokens):
            return left("no token", "no token reached it in some part of the calibration text")
        if seen.count < (least := self._least(shared)):
            return left("few tokens", f"{seen.count} tokens reached it, and calibration.expert_tokens asks for {least}")
        if lost := seen.rest.non_finite + seen.apart.non_finite:
            return left("not finite", f"{lost} of its input values are not finite")
        judged = self._judged(shared, seen)
        group = self._group(shared, seen, judged)
        whole = _whole(group, seen)
        targets = [self._target(name) for name in judged]
        chosen = self._tried(producer, group, whole, targets)
        middle = self._shift(shared, whole) if shifting else None
        shift: Tensor | None = None
        section = self.context.recipe.smooth
        assert section is not None
        facts: dict[str, Any] = {"chosen": section.method}
        if middle is not None:
            moved = self._tried(producer, _shifted(group, middle), _shifted(whole, middle), targets)
            if moved.error <= chosen.error:
                chosen, shift = moved, middle
            facts["shifted"] = shift is not None
        found, scale, after, error = chosen
        facts |= {key: value if isinstance(value, str) else six_digits(value) for key, value in found.facts.items()}
        before = output_error(whole, targets, "token")(scale.new_ones(len(scale)))
        for key, large, loss in (("before", largest_input(whole), before), ("after", after, error)):
            median = large.median()
            facts[f"largest_{key}"] = six_digits(float(large.max()))
            facts[f"ratio_{key}"] = six_digits(float(large.max() / median)) if median > 0 else None
            facts[f"error_{key}"] = six_digits(loss)
        if shift is None and bool((scale == 1).all()):
            return Outcome(shared, facts, None)
        if shift is not None:
            shift = self._stored_shift(producer, shift, scale).cpu()
        return Outcome(shared, facts, Fold(producer, shared.linears, scale.cpu(), shift))

    def _tried(self, producer: Producer, group: Group, whole: Group, targets: Targets) -> _Tried:
        from quantcli.smoothing.group import largest_input
        from quantcli.smoothing.objective import output_error

        found = self._find(group, whole, targets)
        scale = self._stored_scale(producer, found.scale)
        error = output_error(whole, targets, "token")(scale)
        return _Tried(found, scale, largest_input(whole) / scale, error)

    def _least(self, shared: SharedInput) -> int:
        """Tokens that have to be seen of an input: of one inside an expert as many as calibration asks of experts."""
        section = self.context.recipe.calibration
        return section.expert_tokens if section is not None and shared.name in self.inner else 1

    def _judged(self, shared: SharedInput, seen: Seen) -> list[str]:
        """The linears by whose outputs scales are judged: all; of experts, those that saw the most tokens, as many as
        JUDGED_WEIGHTS have room for, and one at least."""
        judged, room = [name for name in shared.linears if name not in seen.routed], JUDGED_WEIGHTS
        quantized = [name for name in shared.linears if name in seen.routed and name in self.context.plan.treatments]
        for place, name in enumerate(sorted(quantized, key=lambda name: -seen.routed[name])):
            room -= self.context.linears[name].weights
            if place and room < 0:
                break
            judged.append(name)
        return judged

    def _group(self, shared: SharedInput, seen: Seen, judged: list[str]) -> Group:
        import torch

        from quantcli.smoothing.group import Group

        assert shared.producer is not None
        section = self.context.recipe.smooth
        assert section is not None
        tokens, fitted, statistics = torch.cat(seen.tokens), None, seen.rest
        if section.method == "auto" and len(tokens) > 1:  # what is fitted to tokens is judged by others
            chosen = _fitted([len(part) for part in seen.tokens]).to(tokens.device)
            tokens, fitted = tokens[~chosen], tokens[chosen]
        weights = tuple(self._weight(name).float() for name in judged)
        others = [self._weight(name).abs().amax(0).float() for name in shared.linears if name not in judged]
        return Group(
            weights=weights,
            channels=torch.tensor(shared.producer.channels(shared.width), device=tokens.device),
            minimum=statistics.minimum,
            maximum=statistics.maximum,
            mean_absolute=statistics.mean_absolute,
            centred_maximum=statistics.centred_maximum,
            spread=statistics.spread,
            tokens=tokens,
            fitted=fitted,
            sample_extremes=statistics.sample_extremes,
            beyond=torch.stack(others).amax(0) if others else None,
            ranges=tuple(self._range(name, shared.width) for name in judged),
            moments=None if seen.moments is None else seen.moments.moments(),
            counted=0 if seen.moments is None else seen.moments.tokens,
        )

    def _range(self, linear: str, width: int) -> int | None:
        """How many input channels of a linear share a scale; None if it stays in float."""
        target = self._target(linear)
        return None if target is None else target.group_size or width

    def _weight(self, linear: str, change: Change | None = None) -> Tensor:
        """The float weight [out, in], as it is or changed. Raises ModelError for values that are not finite."""
        from quantcli.pipeline.treatment import require_finite_weight

        tensor = self._read(f"{linear}.weight")
        require_finite_weight(linear, tensor)
        tensor = tensor if change is None else change(tensor)
        return (tensor.t().contiguous() if self.context.linears[linear].transposed else tensor).to(self.context.device)

    def _stored_dtype(self, parameter: str) -> torch.dtype:
        """The dtype that an export holds a parameter in: that of the checkpoint's file, or the recipe's."""
        import torch

        from quantcli.model.writer import DTYPE_NAMES

        if (dtype := self.context.recipe.model.dtype) != "auto":
            found: torch.dtype = getattr(torch, dtype)
            return found
        names = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        return names[self.checkpoint.entries[self.names[parameter]].dtype]

    def _read(self, parameter: str) -> Tensor:
        name = self.names[parameter]
        return self.checkpoint.read([name])[name]

    def _target(self, linear: str) -> Target | None:
        """How the plan quantizes a linear, None if it stays in float; one and the same of linears treated alike."""
        from quantcli.pipeline.treatment import weight_grid
        from quantcli.quant.grid import dequantize
        from quantcli.quant.minmax import minmax
        from quantcli.smoothing.objective import Target

        section, treatment = self.context.recipe.smooth, self.context.plan.treatments.get(linear)
        assert section is not None
        if treatment is None:
            return None
        if treatment not in self.targets:
            scheme = treatment.scheme
            grid = weight_grid(treatment, self.context.plan.structure.dtype)
            kind: Literal["none", "static", "dynamic"] = "static" if scheme.observed else "none"
            self.targets[treatment] = Target(
                weight=lambda weight: dequantize(minmax(weight, grid, None)),
                bits=scheme.bits,
                group_size=scheme.group_size,
                one_scale=scheme.granularity == "tensor",
                clipped=section.clips(treatment.weights, treatment.activations),
                activations="dynamic" if scheme.activations == "dynamic" else kind,
                averaged=treatment.averages,
                activation_bits=scheme.activation_bits,
                symmetric=scheme.activations_symmetric,
                type=scheme.type,
            )
        return self.targets[treatment]

    def _find(self, group: Group, whole: Group, targets: Targets) -> Found:
        from quantcli.smoothing.auto import auto
        from quantcli.smoothing.methods import SMOOTHING_METHODS
        from quantcli.smoothing.objective import output_error

        section = self.context.recipe.smooth
        assert section is not None
        if section.method == "auto":
            return auto(group, whole, targets)
        find: Callable[..., Found] = SMOOTHING_METHODS[section.method].find
        if section.alpha is not None:
            find = partial(find, alpha=section.alpha)
        if section.beta is not None:
            find = partial(find, beta=section.beta)
        return find(group, output_error(group, targets, "mean" if section.method == "awq" else "joint"))

    def _stored_scale(self, producer: Producer, scale: Tensor) -> Tensor:
        """The scale that the producer gives away exactly, as it will be stored: norms are rounded, linears are not."""
        import torch

        from quantcli.model.folding import exact_scale

        if producer.kind == "linear":
            return scale
        weight = self._read(f"{producer.name}.weight").to(scale.device)
        whole = scale.new_ones(len(weight))
        channels = torch.tensor(producer.channels(len(scale)), device=scale.device)
        whole[channels] = scale
        stored = self._stored_dtype(f"{producer.name}.weight")
        return exact_scale(weight, whole, producer.weight_offset, stored)[channels].to(scale)

    def _stored_shift(self, producer: Producer, shift: Tensor, scale: Tensor) -> Tensor:
        """The shift that the bias of a norm gives away exactly, likewise."""
        import torch

        from quantcli.model.folding import exact_shift

        if producer.kind == "linear":
            return shift
        channels = torch.tensor(producer.channels(len(scale)), device=scale.device)
        bias = self._read(f"{producer.name}.bias").to(scale.device)[channels]
        return exact_shift(bias, shift, scale, self._stored_dtype(f"{producer.name}.bias"))

    def _shift(self, shared: SharedInput, group: Group) -> Tensor | None:
        """The middle of each channel, if the recipe shifts and every bias that would take it exists or may be added.
        What a product with another activation passes on is scaled by it, and cannot be shifted."""
        from quantcli.smoothing.group import shared_maximum

        section = self.context.recipe.smooth
        assert section is not None
        assert shared.producer is not None
        owners = (shared.producer.name, *shared.linears)
        if not section.shift or fold_kind(shared.producer) == "mlp":
            return None
        if any(f"{name}.bias" not in self.structure.parameters for name in owners):
            return None
        high = shared_maximum(group.maximum, group.channels)
        low = -shared_maximum(-group.minimum, group.channels)
        return (high + low) / 2
