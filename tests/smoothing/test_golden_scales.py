"""Scales against msModelSlim's on tiny models, and its searches under the losses that they turn out to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantcli.calibration.channel_statistics import ChannelStatistics
from quantcli.smoothing.awq import awq
from quantcli.smoothing.group import ErrorOf, Group
from quantcli.smoothing.outliers import cbq, outlier_suppression
from quantcli.smoothing.strength import flex, iterative, smoothquant

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="needs the golden results beside the checkout")

LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "ov": ("self_attn.o_proj",),
    "ud": ("mlp.down_proj",),
}
SCALES = {
    "qkv": "input_layernorm.norm_scale",
    "mlp": "post_attention_layernorm.norm_scale",
    "ov": "self_attn.o_proj.col_times",
    "ud": "mlp.down_proj.col_times",
}
NORMS = [("qkv", 0), ("mlp", 0), ("qkv", 1), ("mlp", 1)]
PAIRS = [("ov", 0), ("ov", 1), ("ud", 0), ("ud", 1)]
# Head size 16, two KV heads, each read by two query heads.
OV_CHANNELS = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).reshape(-1)


@cache
def network(model: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(GOLDEN / model / "model", attn_implementation="eager").float().eval()


@cache
def inputs(model: str) -> dict[str, list[Tensor]]:
    """What enters every linear of the float model, sample by sample: [tokens, channels]."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in network(model).named_modules():
        if isinstance(module, nn.Linear):
            seen[name] = []

            def hook(_module: nn.Module, args: tuple[Any, ...], into: list[Tensor] = seen[name]) -> None:
                into.append(args[0][0].clone())

            handles.append(module.register_forward_pre_hook(hook))
    ids = load_file(GOLDEN / model / "calibration.safetensors")
    with torch.no_grad():
        for index in range(6):
            sample = ids[f"input_ids_{index}"].view(1, -1)
            network(model)(sample, attention_mask=torch.ones_like(sample), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def group_of(model: str, what: str, layer: int, samples: int = 6) -> Group:
    names = [f"model.layers.{layer}.{name}" for name in LINEARS[what]]
    seen = inputs(model)[names[0]][:samples]
    width = seen[0].shape[-1]
    statistics = ChannelStatistics(width)
    for x in seen:
        statistics.update(x)
    return Group(
        weights=tuple(network(model).get_submodule(name).weight.detach() for name in names),
        channels=OV_CHANNELS if what == "ov" else torch.arange(width),
        minimum=statistics.minimum,
        maximum=statistics.maximum,
        mean_absolute=statistics.mean_absolute,
        centred_maximum=statistics.centred_maximum,
        spread=statistics.spread,
        tokens=torch.cat(seen),
    )


def golden(model: str, case: str, what: str, layer: int) -> Tensor:
    return load_file(GOLDEN / model / case / "scales.safetensors")[f"model.layers.{layer}.{SCALES[what]}"]


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=4e-7, atol=0)


def never(_scale: Tensor) -> float:
    raise AssertionError("the error was asked where nothing is searched")


DIRECT: list[tuple[str, str, Callable[[Group], Tensor], list[tuple[str, int]]]] = [
    (model, case, find, groups)
    for models, case, find, groups in [
        ("AB", "anti_m1", lambda g: smoothquant(g, never).scale, NORMS),
        ("AB", "v1_smooth_quant", lambda g: smoothquant(g, never).scale, NORMS),
        ("AB", "anti_m4", lambda g: iterative(g, never).scale, NORMS + PAIRS),
        ("A", "v1_iter_smooth_a05_normlinear", lambda g: iterative(g, never, alpha=0.5).scale, NORMS),
        ("AB", "v1_iter_smooth_default_adapter", lambda g: iterative(g, never).scale, NORMS),
        ("A", "anti_m5", lambda g: cbq(g, never).scale, NORMS),
        ("AB", "anti_m6_a07_b03", lambda g: flex(g, never, alpha=0.7, beta=0.3).scale, NORMS + PAIRS),
        ("AB", "v1_flex_smooth_a07_b03", lambda g: flex(g, never, alpha=0.7, beta=0.3).scale, PAIRS),
    ]
    for model in models
]


@pytest.mark.parametrize(("what", "layer"), NORMS)
def test_shifts_and_the_biases_that_they_make(what: str, layer: int) -> None:
    """z is the middle of each channel; the norm's new bias is −z / s, those of its linears are W z, of which the folds
    behind them divide rows."""
    group, block = group_of("A", what, layer), f"model.layers.{layer}"
    saved, factors = (
        load_file(GOLDEN / "A" / "v1_iter_smooth_asym" / f"{name}.safetensors") for name in ("weights", "scales")
    )
    shift = (group.maximum + group.minimum) / 2
    norm = f"{block}.{SCALES[what].removesuffix('.norm_scale')}"
    torch.testing.assert_close(saved[f"{norm}.bias"], -shift / factors[f"{norm}.norm_scale"], rtol=1e-5, atol=1e-6)
    for name, weight in zip(LINEARS[what], group.weights, strict=True):
        bias, wanted, rows = saved[f"{block}.{name}.bias"], weight @ shift, factors.get(f"{block}.{name}.row_times")
        if rows is not None:  # which are recorded up to a factor
            bias, wanted = bias / bias.norm(), wanted * rows / (wanted * rows).norm()
        torch.testing.assert_close(bias, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("model", "case", "find", "groups"), DIRECT, ids=[f"{m}-{c}" for m, c, _, _ in DIRECT])
def test_scales_without_a_search(
    model: str, case: str, find: Callable[[Group], Tensor], groups: list[tuple[str, int]]
) -> None:
    for what, layer in groups:
        agree(find(group_of(model, what, layer)), golden(model, case, what, layer))


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize("layer", [0, 1])
def test_norm_groups_see_the_rows_that_earlier_folds_scaled(model: str, layer: int) -> None:
    """The tool's v1 folds up to down and v to o first; Wmax before the norms is that of the scaled rows."""
    case = "v1_flex_smooth_a07_b03"
    for what, producer in (("ov", 2), ("ud", 1)):
        pair = flex(group_of(model, what, layer), never, alpha=0.7, beta=0.3).scale
        given = torch.empty(32 if what == "ov" else 160)
        given[group_of(model, what, layer).channels] = pair
        reader = "qkv" if what == "ov" else "mlp"
        group = group_of(model, reader, layer)
        weights = list(group.weights)
        weights[producer] = weights[producer] / given.view(-1, 1)
        found = flex(replace(group, weights=tuple(weights)), never, alpha=0.7, beta=0.3)
        agree(found.scale, golden(model, case, reader, layer))


def rounded(values: Tensor, bits: int, symmetric: bool, per_row: bool) -> Tensor:
    """Values on the integer grid of their own range, which holds 0; one scale a row or one for all."""
    high = 2 ** (bits - 1) - 1
    rows = values if per_row else values.reshape(1, -1)
    if symmetric:
        scale = rows.abs().amax(1, keepdim=True) / high
        zero = torch.zeros_like(scale)
    else:
        least, most = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        scale = (most - least) / (2**bits - 1)
        zero = (-least / scale).round() - high - 1
    codes = (rows / scale + zero).round().clamp(-high - 1, high)
    return ((codes - zero) * scale).view_as(values)


def weight_only_loss(group: Group, bits: int, symmetric: bool) -> ErrorOf:
    """Sum over the linears of the mean squared output error, float inputs."""

    def error(scale: Tensor) -> float:
        x = group.tokens / scale
        differences = (x @ rounded(w * scale, bits, symmetric, True).T - group.tokens @ w.T for w in group.weights)
        return sum(float(d.double().square().mean()) for d in differences)

    return error


def int8_loss(group: Group) -> ErrorOf:
    """|| all outputs' error ||² / || all outputs ||², inputs asymmetric with the range that all of x / s has."""
    outputs = [group.tokens @ w.T for w in group.weights]
    whole = sum(float(y.double().square().sum()) for y in outputs)

    def error(scale: Tensor) -> float:
        x = rounded(group.tokens / scale, 8, False, False)
        pairs = zip(group.weights, outputs, strict=True)
        return (
            sum(float((x @ rounded(w * scale, 8, True, True).T - y).double().square().sum()) for w, y in pairs) / whole
        )

    return error


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize(
    ("case", "bits", "symmetric"),
    [("anti_m3_w8a16", 8, True), ("anti_m3_w4a16", 4, True), ("anti_m3_w4a16_asym", 4, False)],
)
def test_awq_finds_the_ratios_on_the_first_sample(model: str, case: str, bits: int, symmetric: bool) -> None:
    for what, layer in NORMS:
        group = group_of(model, what, layer, samples=1)
        agree(awq(group, weight_only_loss(group, bits, symmetric)).scale, golden(model, case, what, layer))


FOUND = {  # in the order of NORMS + PAIRS
    "A": [(0.65, 0.2), (0.75, 0.1), (0.65, 0.2), (0.65, 0), (0.75, 0.05), (0.75, 0.25), (0.85, 0.25), (0.7, 0.3)],
    "B": [(0.7, 0.25), (0.75, 0), (0.65, 0.15), (0.7, 0.4), (0.8, 0.2), (0.7, 0.05), (0.75, 0.25), (0.75, 0.25)],
}


@pytest.mark.parametrize("model", ["A", "B"])
def test_flex_finds_the_exponents_on_all_samples(model: str) -> None:
    """v to o: the tool tries scales that query heads of one KV head do not share, and folds shared ones."""
    for (what, layer), exponents in zip(NORMS + PAIRS, FOUND[model], strict=True):
        group = group_of(model, what, layer)
        apart = replace(group, channels=torch.arange(len(group.channels)))
        facts = flex(apart, int8_loss(group)).facts
        assert (facts["alpha"], facts["beta"]) == pytest.approx(exponents, abs=1e-9), (what, layer)
        if model == "A":
            found = flex(group, never, alpha=exponents[0], beta=exponents[1])
            agree(found.scale, golden(model, "anti_m6", what, layer))


@pytest.mark.parametrize(("what", "layer"), NORMS)
def test_outlier_suppression_offers_what_was_chosen(what: str, layer: int) -> None:
    """Its loss is not known: one that knows the answer stands for it, so that candidates and factors are compared."""
    theirs = golden("A", "anti_m2", what, layer)
    found = outlier_suppression(group_of("A", what, layer), lambda s: float((s / theirs).log().abs().sum()))
    agree(found.scale, theirs)
    assert found.facts["channels"] == int(((theirs - 1).abs() > 1e-6).sum())
