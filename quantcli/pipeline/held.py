"""What the formats of a recipe, or of a conversion, can hold, and what the engines that it names load: decided before
any work, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantcli.errors import RecipeError
from quantcli.formats import dense
from quantcli.formats.engines import Verdict, verdicts
from quantcli.formats.engines import refusal as engine_refusal
from quantcli.formats.table import FORMATS
from quantcli.model.checkpoint import Checkpoint
from quantcli.model.structure import Linear, Structure, rms_norms
from quantcli.quant.scheme import AttentionScheme, Scheme
from quantcli.recipe.data import PerplexitySection
from quantcli.recipe.schema import Recipe


def unheld(
    form: str,
    quantized: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    further: Iterable[str] = (),
) -> str:
    """Why the format cannot hold a model of these linears and this attention, as a sentence; empty when it can.

    `further` are names of schemes that linears may get yet.
    """
    for linear, scheme in quantized:
        if scheme.ordered and form != dense.NAME:
            return f"{form} is not written with inputs in groups out of their order, as those of {linear.name} are."
        if refusal := FORMATS[form].refusal(linear, scheme):
            return f"{form} cannot hold {linear.name} as {scheme.name}: it {refusal}."
    names = list(dict.fromkeys([*(scheme.name for _, scheme in quantized), *further]))
    if FORMATS[form].ONE_SCHEME and len(names) > 1:
        return f"{form} holds one scheme for all linears, and there are {' and '.join(names[:2])}."
    sizes = sorted({scheme.group_size for _, scheme in quantized if scheme.group_size})
    if getattr(FORMATS[form], "ONE_GROUP_SIZE", False) and len(sizes) > 1:
        return f"{form} holds groups of one size, and there are some of {sizes[0]} and of {sizes[1]}."
    if attention is not None and (refusal := FORMATS[form].attention_refusal(attention)):
        return f"{form} cannot hold {attention.name}: it {refusal}."
    return ""


def model_unheld(form: str, model: Path, structure: Structure, tensors: Iterable[str] | None = None) -> str:
    """Why the format cannot hold this model under any scheme, as a sentence; empty when it can.

    `tensors` are the names of its float checkpoint; without them they are read from its headers, if they are there.
    """
    refuses = getattr(FORMATS[form], "refuses_model", None)
    if refuses is None:
        return ""
    if tensors is None:  # of a model on the hub only the configuration is there
        tensors = Checkpoint(model).entries if any(model.glob("*.safetensors")) else ()
    reason = refuses(model, structure, tensors)
    return reason and f"{form} cannot hold {structure.architecture}: it {reason}."


def together_unheld(
    form: str, structure: Structure, quantized: Collection[str], attention: AttentionScheme | None
) -> str:
    """Why the format cannot hold these quantized linears beside what stays in float, as a sentence; empty when it
    can."""
    refuses = getattr(FORMATS[form], "refuses_together", None)
    if refuses is None:
        return ""
    matrices = {name.removesuffix(".weight") for name, shape in structure.parameters.items() if len(shape) == 2}
    matrices |= {linear.name for linear in structure.matrices()}
    reason = refuses(quantized, sorted(matrices.difference(quantized)), attention)
    return reason and f"{form} cannot hold {structure.architecture} so: it {reason}."


def split_siblings(form: str, structure: Structure, schemes: Mapping[str, Scheme]) -> str:
    """Which linears that engines join have different types in a format that names a type of each, as a sentence; empty
    if none have."""
    type_name = getattr(FORMATS[form], "type_name", None)
    if type_name is None:
        return ""
    for first, *others in (group for block in structure.blocks for group in block.fused):
        for other in others:
            one, two = (type_name(schemes[name]) if name in schemes else "FLOAT" for name in (first, other))
            if one != two:
                return f"{first} is {one} and {other} {two}, and engines that load {form} join them."
    return ""


def refuse_unheld(
    recipe: Recipe,
    model: Path,
    structure: Structure,
    quantized: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
) -> None:
    """Raise RecipeError for what a format of the recipe cannot hold, and for linears apart that its engines join."""
    section = recipe.quantize.rollback
    further = [section.to] if section.ranks and section.to != "float" else []
    schemes = {linear.name: scheme for linear, scheme in quantized}
    if recipe.smooth is not None and recipe.smooth.unties:
        structure = replace(structure, tied=False)
    for name in recipe.export.formats if recipe.export else ():
        reason = unheld(name, quantized, attention, further) or model_unheld(name, model, structure)
        if reason := reason or together_unheld(name, structure, schemes, attention):
            raise RecipeError(f"export.formats: {reason}", "Choose another format or scheme, or export: null.")
        if section.siblings == "apart":
            reason = split_siblings(name, structure, schemes)
            # a search is free to part them, and takes long; what a rank parts is known before anything is quantized
            if not reason and _typed(name) and (section.target or recipe.quantize.target):
                reason = f"engines that load {name} join linears that a search may part."
            if reason:
                raise RecipeError(f"export.formats: {reason}", "Leave out quantize.rollback.siblings: apart, or choose "
                                  "another format.")  # fmt: skip


def refuse_latents(structure: Structure, attention: AttentionScheme | None) -> None:
    """Raise RecipeError for a quantized cache of a model whose cache holds no keys and values."""
    if structure.latents and attention is not None and attention.kv != "none":
        raise RecipeError(f"quantize.kv_cache: {structure.architecture} caches latents, from which keys and values are "
                          "made, and no scales of keys and values fit those.",
                          "Remove it: the cache of this model stays in float.")  # fmt: skip


def refuse_arithmetic(section: PerplexitySection | None, attention: AttentionScheme | None) -> None:
    """Raise RecipeError for the arithmetic of vLLM on a CPU, which is that of engines but for an fp8 cache, where there
    is none."""
    if section is None or section.arithmetic != "vllm-cpu" or (attention is not None and attention.kv == "fp8"):
        return
    raise RecipeError(
        "evaluate.perplexity.arithmetic: vllm-cpu differs from engine in how an fp8 cache is rounded, and this model "
        "has none.",
        "Remove it, or quantize the cache: kv_cache: {type: float}.",
    )


def addable_biases(recipe: Recipe, structure: Structure, schemes: Mapping[str, Scheme]) -> tuple[list[str], str]:
    """The biases that a shift of the recipe may add to the architecture, by the names of parameters; and, where that is
    none of those that it lacks, why.

    `schemes` are those of quantized linears. Every format has to hold them, and engines to add them: those of RMSNorm,
    and of linears whose scheme says so.
    """
    section = recipe.smooth
    if section is None or not section.shift:
        return [], ""
    groups = [s for block in structure.blocks for s in block.groups if s.producer is not None]
    owners = dict.fromkeys(name for s in groups if s.producer for name in (s.producer.name, *s.linears))
    lacking = [name for name in owners if f"{name}.bias" not in structure.parameters]
    if not lacking or (reason := _without_added_biases(recipe)):
        return [], reason if lacking else ""
    forms = [FORMATS[name] for name in recipe.export.formats] if recipe.export else []
    norms = {norm.name for norm in rms_norms(structure) if norm.name.endswith("norm")}
    taken = {name for name, scheme in schemes.items() if all(form.takes_added_bias(scheme) for form in forms)}
    if not taken.intersection(lacking):
        return [], "engines add biases that the architecture lacks where inputs are static and of 8 bits"
    return [f"{name}.bias" for name in lacking if name in taken or name in norms], ""


def _without_added_biases(recipe: Recipe) -> str:
    """Why no linear may have a bias that the architecture lacks, in words; empty if some may."""
    assert recipe.smooth is not None
    formats = recipe.export.formats if recipe.export else ()
    if not formats:
        return "no export is made that would hold biases which the architecture lacks"
    for name in formats:
        if not hasattr(FORMATS[name], "takes_added_bias"):
            return f"{name} does not hold biases that the architecture lacks"
    if recipe.smooth.save_model:
        return "the model that smooth.save_model asks for cannot have biases that its architecture lacks"
    if recipe.quantize.rollback.target is not None or recipe.quantize.target is not None:
        return "a target needs to be free to roll every linear back, and those in float cannot have such biases"
    return ""


def shift_note(addable: Collection[str], reason: str, ranked: bool) -> list[str]:
    """What a shift means where the architecture lacks biases, as notes of the plan: by what `addable_biases` says.
    `ranked`: linears are rolled back by rank."""
    if addable:
        kept = " Linears that get one are not rolled back by rank." if ranked else ""
        return [f"A shift may add biases to norms and linears that have none, for engines that read them.{kept}"]
    return [f"Linears are smoothed without a shift where they or their norm have no bias: {reason}."] if reason else []


def siblings_note(recipe: Recipe) -> list[str]:
    """What linears that a rank parts mean to the formats of the recipe, as notes of the plan."""
    section = recipe.quantize.rollback
    typed = [name for name in (recipe.export.formats if recipe.export else ()) if _typed(name)]
    if not typed or section.siblings != "apart" or not section.level:
        return []
    return [f"If the ranking parts linears that engines of {typed[0]} join, the run ends before it quantizes."]


def _typed(form: str) -> bool:
    """Whether each linear has a type by name in the format."""
    return hasattr(FORMATS[form], "type_name")


def unloaded(
    recipe: Recipe,
    quantized: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    kept: Collection[str],
    structure: Structure,
) -> str:
    """Why an engine of `export.engines` loads none of the recipe's formats, as a sentence with its source; empty when
    each loads one. `kept` are linears in float."""
    if recipe.export is None:
        return ""
    formats, engines = recipe.export.formats, recipe.export.engines
    experts = [layer.names for block in structure.blocks for layer in block.experts]
    asked = (quantized, attention, formats, kept, experts, structure.architecture)
    reasons = (engine_refusal(engine, *asked) for engine in engines)
    return next(filter(None, reasons), "")


def engine_verdicts(
    structure: Structure,
    quantized: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    formats: Sequence[str],
    kept: Collection[str],
    *,
    biases: bool = False,
) -> list[Verdict]:
    """`formats.engines.verdicts` of a model of this structure."""
    experts = [layer.names for block in structure.blocks for layer in block.experts]
    architecture = structure.architecture
    return verdicts(quantized, attention, formats, kept, experts, biases=biases, architecture=architecture)


def refuse_unloaded(
    recipe: Recipe,
    quantized: Sequence[tuple[Linear, Scheme]],
    attention: AttentionScheme | None,
    kept: Collection[str],
    structure: Structure,
) -> None:
    """Raise RecipeError for what `unloaded` finds."""
    if reason := unloaded(recipe, quantized, attention, kept, structure):
        raise RecipeError(f"export.engines: {reason}", "Choose another scheme or format, or do not name the engine.")


def left_out_note(
    recipe: Recipe, quantized: Sequence[tuple[Linear, Scheme]], attention: AttentionScheme | None
) -> list[str]:
    """What a dense export of the recipe does not have, as notes of the plan.

    Raises RecipeError where that export is the one that is measured.
    """
    formats = recipe.export.formats if recipe.export else ()
    missing = dense.left_out((scheme for _, scheme in quantized), attention)
    if dense.NAME not in formats or not missing:
        return []
    if formats[0] == dense.NAME and recipe.evaluate is not None:
        raise RecipeError(f"export.formats: the first is measured, and dense does not have {missing}.",
                          "Name another format before it, or set evaluate: null.")  # fmt: skip
    return [f"The export dense holds weights alone, without {missing}."]
