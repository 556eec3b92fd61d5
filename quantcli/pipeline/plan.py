"""What a recipe would do to a model: decided from the structure alone, before weights are read and without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError, RecipeError
from quantcli.formats.engines import Verdict
from quantcli.model.structure import Linear, Structure, heads_obstacles, rotation_obstacles
from quantcli.model.untrusted import brings_code
from quantcli.pipeline.estimate import Estimate, estimate
from quantcli.pipeline.fused import refuse_split, rolled_back_along
from quantcli.pipeline.held import (
    addable_biases,
    engine_verdicts,
    left_out_note,
    refuse_arithmetic,
    refuse_latents,
    refuse_unheld,
    refuse_unloaded,
    shift_note,
    siblings_note,
)
from quantcli.pipeline.idle import idle_keys
from quantcli.pipeline.patterns import chosen_overrides, match_names
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe.quantization import ActivationsSection, QuantizeSection, WeightsSection, named_scheme
from quantcli.recipe.schema import Recipe

BYTES = {
    "bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "int32": 4, "int64": 8,
}  # fmt: skip

UNREACHED = "no input reaches it"
READ_APART = "the model reads its weight itself, stays in float"
OVERRIDDEN = "override "


@dataclass(frozen=True)
class Treatment:
    """What is done to one linear: the scheme that results, and by which methods it is found."""

    scheme: Scheme
    weights: WeightsSection
    activations: ActivationsSection

    @property
    def averages(self) -> bool:
        """Whether the range of a static input is the mean of those of samples."""
        return self.scheme.observed and self.activations.aggregation == "mean"


@dataclass(frozen=True)
class PlannedLinear:
    """One linear, and its treatment or the reason why it stays in float."""

    linear: Linear
    block: int
    treatment: Treatment | None
    reason: str = ""
    rolled_back: bool = False

    @property
    def scheme(self) -> Scheme | None:
        return self.treatment.scheme if self.treatment else None


@dataclass(frozen=True)
class Plan:
    """The decisions of a run. Sizes in bytes; `bits_per_weight` counts scales and covers only quantized linears.
    `own_code`: the model comes with code that the recipe lets run, and engines have to be told to."""

    model: Path
    structure: Structure
    linears: tuple[PlannedLinear, ...]
    attention: AttentionScheme | None
    smoothing: str | None
    notes: tuple[str, ...]
    size_before: int
    size_after: int
    bits_per_weight: float
    estimate: Estimate
    engines: tuple[Verdict, ...]
    warnings: tuple[str, ...] = ()
    own_code: bool = False

    @property
    def schemes(self) -> dict[str, tuple[int, Scheme]]:
        """Quantized linears: name → (block, scheme). The head's block is one behind the last."""
        return {p.linear.name: (p.block, p.scheme) for p in self.linears if p.scheme is not None}

    @property
    def treatments(self) -> dict[str, Treatment]:
        """Quantized linears: name → treatment."""
        return {p.linear.name: p.treatment for p in self.linears if p.treatment is not None}

    @property
    def rankable(self) -> list[str]:
        """Quantized linears that are not rolled back already."""
        return [p.linear.name for p in self.linears if p.treatment is not None and not p.rolled_back]

    @property
    def kept(self) -> dict[str, str]:
        """Linears in float: name → reason."""
        return {p.linear.name: p.reason for p in self.linears if p.scheme is None}

    @property
    def narrowed(self) -> dict[str, list[str]]:
        """Linears whose groups are smaller than the recipe names, by what is said of them."""
        found: dict[str, list[str]] = {}
        for name, each in self.treatments.items():
            asked, size = each.weights.group_size, each.scheme.group_size
            if asked and size and asked != size and "group_size" in each.weights.model_fields_set:
                found.setdefault(_narrowed_note(asked, size), []).append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "architecture": self.structure.architecture,
            "dtype": self.structure.dtype,
            "blocks": len(self.structure.blocks),
            "linears": [
                {
                    "name": p.linear.name,
                    "block": p.block,
                    "shape": [p.linear.out_features, p.linear.in_features],
                    "scheme": p.scheme.name if p.scheme else "float",
                    "reason": p.reason,
                }
                for p in self.linears
            ],
            "attention": self.attention.name if self.attention else None,
            "smoothing": self.smoothing,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "size_before": self.size_before,
            "size_after": self.size_after,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "estimate": asdict(self.estimate),
            "engines": [asdict(verdict) for verdict in self.engines],
        }


def make_plan(recipe: Recipe, model: Path, structure: Structure, ranked: Mapping[str, str] | None = None) -> Plan:
    """Decide the treatment of every linear. `ranked`: linears rolled back for their sensitivity → why, once known.

    Raises RecipeError for a pattern that matches nothing, a group size that cannot divide, a scheme that no chosen
    format holds or a named engine does not load, an arithmetic without effect, or a rotation that the model does not
    allow; ModelError for experts that are held in a form which is not known.
    """
    _refuse_experts(structure)
    notes: list[str] = _experts_notes(structure)
    planned = _planned(recipe, structure, ranked or {}, notes)
    _refuse_expert_schemes(recipe, structure, planned)
    attention = attention_scheme(recipe)
    quantized = [(p.linear, p.treatment.scheme) for p in planned if p.treatment is not None]
    if not quantized and attention is None and ranked is None:
        raise _nothing_left(planned)
    refuse_unheld(recipe, model, structure, quantized, attention)
    refuse_latents(structure, attention)
    refuse_arithmetic(recipe.evaluate.perplexity if recipe.evaluate else None, attention)
    excluded_from_smoothing(recipe, structure)
    _refuse_rotation(recipe, structure)
    notes += left_out_note(recipe, quantized, attention)
    schemes = {linear.name: scheme for linear, scheme in quantized}
    biases, why_none = addable_biases(recipe, structure, schemes)
    section = recipe.quantize.rollback
    notes += shift_note(biases, why_none, section.level > 0)
    notes += idle_keys(recipe, structure, schemes)
    if ranked is None and section.level:
        notes.append(
            f"After calibration {section.level} more are rolled back: those of the highest {section.ranked_by}."
        )
        notes += siblings_note(recipe)
    if ranked is None and section.target:
        notes.append("After calibration the fewest linears that meet rollback.target are rolled back.")
    if any(p.treatment is not None and _blind(p.treatment.weights) for p in planned):
        notes.append(
            "Scales are searched by the error of weights alone, which clips some that matter: add a calibration "
            "section, or set weights.method: minmax."
        )
    if section.last_linear is False and structure.head is not None and structure.tied:
        notes.append("The output head is tied to the embedding and stays in float.")
    if recipe.calibration is not None and not reads_calibration(recipe):
        notes.append("This scheme needs no calibration data; the calibration section is not used.")
    before = sum(map(prod, structure.parameters.values())) * BYTES[structure.dtype]
    stored = sum(stored_bytes(recipe, linear, scheme, structure.dtype) for linear, scheme in quantized)
    weights = sum(linear.weights for linear, _ in quantized)
    after = before - weights * BYTES[structure.dtype] + stored
    if structure.tied and recipe.smooth is not None and recipe.smooth.unties:
        after += structure.vocabulary * structure.width * BYTES[structure.dtype]
        notes.append("Rotation makes the output head, tied so far, a tensor of its own.")
    kept = [p.linear.name for p in planned if p.treatment is None]
    if recipe.quantize.target is None:  # else candidates are asked about
        refuse_unloaded(recipe, quantized, attention, kept, structure)
    if ranked is None and section.ranks and section.to != "float":  # what any of them may become
        every = _planned(recipe, structure, {linear.name: "" for linear, _ in quantized}, [])
        _refuse_expert_schemes(recipe, structure, every)
        changed = [(p.linear, p.scheme) for p in every if p.scheme is not None]
        refuse_unheld(recipe, model, structure, changed, attention)
        refuse_unloaded(recipe, changed, attention, (), structure)
    _refuse_size(recipe, after, ranked)
    formats = recipe.export.formats if recipe.export else ()
    by_method = [(p.linear, p.treatment.weights) for p in planned if p.treatment is not None]
    return Plan(
        model=model,
        structure=structure,
        linears=tuple(planned),
        attention=attention,
        smoothing=recipe.smooth.described() if recipe.smooth else None,
        notes=tuple(notes),
        size_before=before,
        size_after=after,
        bits_per_weight=8 * stored / max(1, weights),
        estimate=estimate(recipe, structure, after, by_method, _passes(recipe)),
        engines=tuple(engine_verdicts(structure, quantized, attention, formats, kept, biases=bool(biases))),
        own_code=recipe.model.trust_remote_code and brings_code(model),
    )


def _nothing_left(planned: Sequence[PlannedLinear]) -> RecipeError:
    """The refusal of a recipe that leaves every linear in float before any is ranked, at the key that does it."""
    if any(p.rolled_back for p in planned):
        return RecipeError("quantize.rollback.names: every linear is rolled back, so nothing would be quantized.",
                           "Narrow the patterns.")  # fmt: skip
    if any(p.reason.startswith(OVERRIDDEN) for p in planned):
        return RecipeError("quantize.overrides: every linear stays in float, so nothing would be quantized.",
                           "Narrow the patterns, or give one a scheme other than float.")  # fmt: skip
    reason = next((p.reason for p in planned), "there is none")
    return RecipeError(f"quantize: no linear would be quantized: {reason}.", "Choose another scheme, or model.")


def _refuse_rotation(recipe: Recipe, structure: Structure) -> None:
    rotation = recipe.smooth.rotation if recipe.smooth is not None else None
    for key, found in (("hidden", rotation_obstacles), ("heads", heads_obstacles)):
        obstacles = found(structure) if rotation is not None and getattr(rotation, key) else []
        if obstacles:
            raise RecipeError(
                f"smooth.rotation.{key}: {structure.architecture} cannot be rotated: {obstacles[0]}.",
                f"Set smooth.rotation.{key}: false, or rotation: null and a method that scales.",
            )


def _refuse_size(recipe: Recipe, after: int, ranked: Mapping[str, str] | None) -> None:
    target = recipe.quantize.rollback.target
    if ranked is None and target is not None and target.size is not None and after > target.size * 1e9:
        raise RecipeError(
            f"quantize.rollback.target.size: {target.size:g} GB is less than the {after / 1e9:.4g} GB "
            "of a checkpoint with nothing rolled back.",
            "Allow more, or quantize to fewer bits.",
        )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether anything of the quantization itself is found from activations."""
    section = recipe.quantize
    treatments = [section.treatment(None), *map(section.treatment, section.overrides)]
    if section.rollback.to != "float":
        treatments.append(named_scheme(section.rollback.to))
    observed = any(t and (t[1].observed or t[0].weighed(recipe.calibration is not None)) for t in treatments)
    return observed or section.rollback.ranks or section.kv_cache is not None or section.attention is not None


def _passes(recipe: Recipe) -> int:
    """How often the calibration samples run through the model to decide something."""
    section = recipe.quantize
    solving = section.solves * (1 + section.gptq.asymmetric)
    distilling = 0 if section.distill is None else 1 + 4 * section.distill.passes
    return needs_calibration(recipe) + (recipe.smooth is not None and recipe.smooth.scales) + solving + distilling


def reads_calibration(recipe: Recipe) -> bool:
    """Whether any stage that decides something runs the calibration samples."""
    return _passes(recipe) > 0 or recipe.quantize.target is not None


def attention_scheme(recipe: Recipe) -> AttentionScheme | None:
    """What the recipe quantizes inside attention, if anything."""
    cache, heads = recipe.quantize.kv_cache, recipe.quantize.attention
    if heads is not None:
        return AttentionScheme(heads=True)
    if cache is not None:
        return AttentionScheme("int8" if cache.type == "int" else "fp8", cache.symmetric)
    return None


def excluded_from_smoothing(recipe: Recipe, structure: Structure) -> dict[str, str]:
    """Linears and norms that `smooth.exclude` names → the pattern. Raises RecipeError for one that matches nothing."""
    if recipe.smooth is None:
        return {}
    names = [linear.name for linear in structure.linears()]
    for block in structure.blocks:
        names += [i.producer.name for i in block.groups if i.producer is not None and i.producer.kind == "norm"]
    return match_names(recipe.smooth.exclude, list(dict.fromkeys(names)), "smooth.exclude", "linear or norm")


def _planned(recipe: Recipe, structure: Structure, ranked: Mapping[str, str], notes: list[str]) -> list[PlannedLinear]:
    """Every linear in the order of the model, the head last, each with its treatment or the reason to stay in float."""
    section = recipe.quantize
    places = {linear.name: (linear, i) for i, block in enumerate(structure.blocks) for linear in block.linears}
    if structure.head is not None:
        head = Linear(structure.head, structure.width, structure.vocabulary)
        places[structure.head] = (head, len(structure.blocks))
    names = list(places)
    fixed = _always_float(recipe, structure)
    chosen = chosen_overrides(section.overrides, names, fixed, notes)
    rolled_back = {
        name: f"rolled back by {pattern}"
        for name, pattern in match_names(section.rollback.names, names, "quantize.rollback.names").items()
    } | dict(ranked)
    if section.rollback.siblings == "together":
        rolled_back |= rolled_back_along(structure, rolled_back, notes)
    replacement = named_scheme(section.rollback.to)
    pairs: dict[str, tuple[WeightsSection, ActivationsSection]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        override = chosen.get(name)
        pair = replacement if name in rolled_back else section.treatment(override)
        if name in fixed:
            pair, reasons[name] = None, fixed[name]
        elif name in rolled_back:
            reasons[name] = rolled_back[name] + (f", to {section.rollback.to}" if replacement else "")
        elif override is not None:
            reasons[name] = f"{OVERRIDDEN}{override.match}"
        elif pair is None:
            reasons[name] = "weights.bits is 16"
        if pair is not None:
            pairs[name] = pair
    unseen = unobservable(structure) if needs_calibration(recipe) or section.solves else {}
    for name in [name for name in unseen if name in pairs]:
        del pairs[name]
        reasons[name] = unseen[name]
    treatments = _treatments(recipe, pairs, {name: linear for name, (linear, _) in places.items()}, notes)
    refuse_split(recipe, structure.blocks, treatments)
    return [
        PlannedLinear(*places[name], treatments.get(name), reasons.get(name, ""), name in rolled_back) for name in names
    ]


def _always_float(recipe: Recipe, structure: Structure) -> dict[str, str]:
    """Linears that no pattern reaches: of weights read otherwise, routers, the head unless last_linear is false."""
    fixed = {each.name: READ_APART for each in structure.linears() if each.read_apart}
    fixed |= {name: "router of experts, stays in float" for block in structure.blocks for name in block.routers}
    if structure.head is None:
        return fixed
    if structure.tied:
        return fixed | {structure.head: "output head, tied to the embedding"}
    if recipe.quantize.rollback.last_linear is False:
        return fixed
    said = "rollback.last_linear" if recipe.quantize.rollback.last_linear else "by default"
    return fixed | {structure.head: f"output head, stays in float {said}"}


def unobservable(structure: Structure) -> dict[str, str]:
    """Linears that a forward pass does not reach, so that nothing can be found from their input."""
    reached = {name for block in structure.blocks for shared in block.inputs for name in shared.linears}
    reached |= {name for block in structure.blocks for experts in block.experts for name in experts.names}
    return {linear.name: UNREACHED for linear in structure.linears() if linear.name not in reached}


def _treatments(
    recipe: Recipe,
    pairs: Mapping[str, tuple[WeightsSection, ActivationsSection]],
    linears: Mapping[str, Linear],
    notes: list[str],
) -> dict[str, Treatment]:
    """Sections of the recipe as treatments; linears of one treatment get one group size, which divides all of them."""
    from quantcli.formats.table import FORMATS

    calibrated = recipe.calibration is not None
    pairs = {name: (_settled(weights, calibrated), activations) for name, (weights, activations) in pairs.items()}
    halves = any(FORMATS[name].FLOAT16_SCALES for name in (recipe.export.formats if recipe.export else ()))
    widths: dict[int, set[int]] = {}
    for name, (weights, _) in pairs.items():
        if weights.group_size is not None:
            widths.setdefault(weights.group_size, set()).add(linears[name].in_features)
    quantize = recipe.quantize
    sizes = {
        asked: dividing_group_size(found, asked, _place_of_group(quantize, asked)) for asked, found in widths.items()
    }
    for asked, size in sizes.items():
        if size != asked:
            notes.append(_narrowed_note(asked, size))
    made: dict[tuple[WeightsSection, ActivationsSection], Treatment] = {}
    for pair in pairs.values():
        if pair not in made:
            group = sizes[pair[0].group_size] if pair[0].group_size is not None else None
            made[pair] = Treatment(_scheme(*pair, group, halves), *pair)
    return {name: made[pair] for name, pair in pairs.items()}


def _narrowed_note(asked: int, size: int) -> str:
    return f"Group size {asked} does not divide every input width; {size} is used, the largest power of two that does."


def _settled(weights: WeightsSection, calibrated: bool) -> WeightsSection:
    """With the importance that `auto` stands for."""
    return weights.model_copy(update={"importance": "second_moment" if weights.weighed(calibrated) else "none"})


def _blind(weights: WeightsSection) -> bool:
    """Whether few bits are searched without knowing the inputs, where the plain range measured better."""
    return weights.method == "mse" and weights.importance == "none" and weights.type == "int" and weights.bits < 8


_MODES = {"tensor": "static", "token": "dynamic", "mix": "mix"}


def _scheme(
    weights: WeightsSection, activations: ActivationsSection, group_size: int | None, float16_scales: bool
) -> Scheme:
    mode = "none" if activations.bits == 16 else _MODES[activations.scope]
    return Scheme(
        bits=weights.bits,
        symmetric=weights.symmetric,
        granularity=weights.granularity,
        group_size=group_size,
        activations=mode,  # type: ignore[arg-type]
        activations_symmetric=activations.symmetric if mode != "none" else True,
        sparse=weights.sparse,
        activation_bits=8 if mode == "none" else activations.bits,
        float16_scales=float16_scales,
        type=weights.type,
    )


def dividing_group_size(widths: Collection[int], requested: int, place: str = "quantize.weights.group_size") -> int:
    """The group size that fits every input width: `requested` if it divides them all, otherwise the largest power of
    two that is at most `requested`, at least 16, and divides them all. Raises RecipeError, for the key `place`, when
    there is none."""
    if all(width % requested == 0 for width in widths):
        return requested
    size = 1 << (requested.bit_length() - 1)
    while size >= 16:
        if all(width % size == 0 for width in widths):
            return size
        size //= 2
    wrong = f"no power of two from 16 to {requested} divides the input widths {sorted(widths)}"
    if requested < 16:
        wrong = f"{requested} does not divide the input widths {sorted(widths)}"
    raise RecipeError(f"{place}: {wrong}.", "Use granularity: channel.")


def _place_of_group(section: QuantizeSection, size: int) -> str:
    """The key that asks for groups of a size."""
    for index, override in enumerate(section.overrides):
        found = section.treatment(override)
        own = override.scheme is not None or "group_size" in (override.weights or {})
        if found is not None and found[0].group_size == size and (own or section.weights.group_size != size):
            key = ".weights.group_size" if "group_size" in (override.weights or {}) else ""
            return f"quantize.overrides[{index}]{key}"
    if section.weights.group_size == size:
        return "quantize.weights.group_size"
    return "quantize.rollback.to"


def _experts_notes(structure: Structure) -> list[str]:
    counts = {block.name: sum(len(experts.linears) for experts in block.experts) for block in structure.blocks}
    layers = [count for count in counts.values() if count]
    if not layers:
        return []
    each = str(layers[0]) if len(set(layers)) == 1 else f"{min(layers)} to {max(layers)}"
    return [f"{each} experts in each of {len(layers)} layers are quantized one by one; routers stay in float."]


def _refuse_experts(structure: Structure) -> None:
    for experts in (experts for block in structure.blocks for experts in block.experts):
        if not experts.linears:
            raise ModelError(f"{experts.name} holds the weights of many experts in a form that is not known.",
                             "Models whose experts transformers saves one by one are supported.")  # fmt: skip


def _refuse_expert_schemes(recipe: Recipe, structure: Structure, planned: Sequence[PlannedLinear]) -> None:
    names = {name for block in structure.blocks for experts in block.experts for name in experts.names}
    rollback = recipe.quantize.rollback
    of_outputs = rollback.ranked_by in ("output_error", "block_error", "kl_divergence")
    if rollback.ranks and not of_outputs and any(p.treatment and p.linear.name in names for p in planned):
        raise RecipeError(f"quantize.rollback.metric: the inputs of experts are not ranked by {rollback.ranked_by}.",
                          "Set metric: output_error, block_error or kl_divergence.")  # fmt: skip
    for p in planned:
        treatment = p.treatment if p.linear.name in names else None
        if treatment is not None and treatment.scheme.observed:
            dynamic = "W8A8-fp8" if treatment.scheme.type == "float" else "W8A8-dynamic"
            raise RecipeError(f"quantize: {p.linear.name} is of an expert; engines have no static scales for those.",
                              "Give experts a scale for every token, as by "
                              f'overrides: [{{match: "*.experts.*", scheme: {dynamic}}}].')  # fmt: skip


def stored_bytes(recipe: Recipe, linear: Linear, scheme: Scheme, dtype: str) -> int:
    """Bytes in the first format; without an export, as compressed-tensors would hold them."""
    from quantcli.formats.table import FORMATS

    form = FORMATS[recipe.export.formats[0] if recipe.export else "compressed-tensors"]
    return sum(BYTES[kind] * prod(shape) for kind, shape in form.layout(linear, scheme, dtype).values())
