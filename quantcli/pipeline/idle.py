"""Keys of a recipe that come to nothing on a model, as notes of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantcli.model.structure import Structure
from quantcli.quant.scheme import Scheme
from quantcli.recipe.data import CalibrationSection
from quantcli.recipe.quantization import QuantizeSection
from quantcli.recipe.schema import Recipe


def idle_keys(recipe: Recipe, structure: Structure, schemes: Mapping[str, Scheme]) -> list[str]:
    """A note on each key that nothing makes use of. `schemes` are those of the quantized linears by name."""
    return [
        *_of_activations(recipe.quantize),
        *_of_weights(recipe.quantize, schemes),
        *_of_rollback(recipe.quantize, structure, schemes),
        *_of_experts(recipe, structure),
        *_of_phase(recipe, schemes),
    ]


def _of_activations(quantize: QuantizeSection) -> Iterator[str]:
    written = quantize.activations.model_fields_set
    quantized = any("bits" in (each.activations or {}) and each.scheme is None for each in quantize.overrides)
    if written and "bits" not in written and not quantized:
        yield "quantize.activations has no effect: its bits are 16 where the recipe does not say 8 or 4."


def _of_weights(quantize: QuantizeSection, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    signed = (s.symmetric and s.type == "int" and (s.bits < 8 or s.granularity == "group") for s in schemes.values())
    if not quantize.weights.full_range and quantize.target is None and not any(signed):
        yield "quantize.weights.full_range has no effect: only symmetric scales below 8 bits or of groups are negative."


def _of_rollback(quantize: QuantizeSection, structure: Structure, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    section = quantize.rollback
    if section.to != "float" and not section.names and not section.ranks:
        yield "quantize.rollback.to has no effect: neither names, level nor target roll anything back."
    if section.metric is not None and not section.ranks:
        yield "quantize.rollback.metric has no effect on a run without level or target."
    if section.siblings == "apart" and not section.ranks and quantize.target is None:
        fused = (group for block in structure.blocks for group in block.fused)
        if all(len({schemes.get(name) for name in group}) == 1 for group in fused):
            yield "quantize.rollback.siblings has no effect: nothing in the recipe parts linears that engines fuse."


def _of_experts(recipe: Recipe, structure: Structure) -> Iterator[str]:
    if recipe.calibration is None or any(block.experts for block in structure.blocks):
        return
    for key in ("expert_tokens", "route_all_experts"):
        if getattr(recipe.calibration, key) != CalibrationSection.model_fields[key].default:
            yield f"calibration.{key} has no effect: this model has no experts."


def _of_phase(recipe: Recipe, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    section = recipe.evaluate.perplexity if recipe.evaluate else None
    mixed = recipe.quantize.rollback.to == "W8A8-mix" or any(s.activations == "mix" for s in schemes.values())
    if section is not None and section.phase == "decode" and not mixed:
        yield "evaluate.perplexity.phase: decode has no effect: no activations have scope mix."
