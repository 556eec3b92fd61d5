"""range_parm and static ranges against what msModelSlim found on tiny models."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from histogram_rule import search_bins
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantcli.calibration.statistics import InputStatistics
from quantcli.pipeline.treatment import observed_of
from quantcli.quant.activation import static_parameters
from quantcli.quant.observers import activation_range

GOLDEN = Path(__file__).parents[2] / ".." / "shared" / "golden"
# Reads the embedding through one norm only, so that msModelSlim's quantized linears before it do not matter.
FIRST = "model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="needs the golden results beside the checkout")


def samples(model: str) -> list[Tensor]:
    ids = load_file(GOLDEN / model / "calibration.safetensors")
    return [ids[f"input_ids_{index}"].view(1, -1) for index in range(6)]


@cache
def inputs(model: str) -> dict[str, list[Tensor]]:
    """What enters every linear of the float model, sample by sample."""
    network = AutoModelForCausalLM.from_pretrained(GOLDEN / model / "model", attn_implementation="eager").eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            seen[name] = []

            def hook(_module: nn.Module, args: tuple[Any, ...], _into: list[Tensor] = seen[name]) -> None:
                _into.append(args[0].clone())

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for ids in samples(model):
            network(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return seen


def gathered(batches: list[Tensor]) -> InputStatistics:
    result = InputStatistics(batches[0].shape[-1])
    for batch in batches:
        result.update(batch)
    return result


@pytest.mark.parametrize("model", ["A", "B"])
def test_range_parm_of_every_linear(model: str) -> None:
    meta = json.loads((GOLDEN / model / "w8a8_act1_mm0" / "meta.json").read_text())
    found = {name: gathered(batches).range_parm for name, batches in inputs(model).items()}
    assert found.keys() == meta["range_parm"].keys()
    assert len(found) == 15
    for name, expected in meta["range_parm"].items():
        assert found[name] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("model", ["A", "B"])
def test_mean_of_sample_extremes_gives_their_static_scale(model: str) -> None:
    stored = load_file(GOLDEN / model / "w8a8_act1_mm0" / "weights.safetensors")
    observed = observed_of(gathered(inputs(model)[FIRST]).to_tensors())
    scale, zero = static_parameters(*activation_range(observed, "minmax", symmetric=False, aggregation="mean"), False)
    torch.testing.assert_close(scale, stored[f"{FIRST}.input_scale"], rtol=4e-7, atol=0)
    assert zero.tolist() == stored[f"{FIRST}.input_offset"].tolist()


def merged_histogram(batches: list[Tensor], bins: int = 2048, upsample: int = 128) -> tuple[Tensor, float, float]:
    """Their histogram (that of older torch), with its defects: values are counted between the extremes truncated to
    whole numbers, and merged by spreading old bins evenly over finer ones. Counts, minimum, maximum."""
    low, high = float(batches[0].amin()), float(batches[0].amax())
    histogram = torch.histc(batches[0], bins, min=int(low), max=int(high))
    for x in batches[1:]:
        fine = (high - low) / (bins * upsample)
        new_low, new_high = min(low, float(x.amin())), max(high, float(x.amax()))
        merged = math.ceil((new_high - new_low) / (bins * fine))
        start = round((low - new_low) / fine)
        new_high = new_low + merged * bins * fine
        new = torch.histc(x, bins, min=int(new_low), max=int(new_high))
        if (new_low, new_high) == (low, high):
            histogram = histogram + new
        else:
            spread = torch.zeros(bins * merged, dtype=torch.float64)
            spread[start : start + bins * upsample] = histogram.repeat_interleave(upsample) / upsample
            histogram = new + spread.view(bins, merged).sum(1).float()
        low, high = new_low, new_high
    return histogram, low, high


@pytest.mark.parametrize("model", ["A", "B"])
def test_the_search_in_their_histogram_finds_their_range(model: str) -> None:
    stored = load_file(GOLDEN / model / "w8a8_act2_mm0" / "weights.safetensors")
    histogram, low, high = merged_histogram(inputs(model)[FIRST])
    first, last = search_bins(histogram.double())
    width = (high - low) / len(histogram)
    scale, zero = static_parameters(low + width * first, low + width * (last + 1), False)
    torch.testing.assert_close(scale, stored[f"{FIRST}.input_scale"], rtol=1e-6, atol=0)
    assert zero.tolist() == stored[f"{FIRST}.input_offset"].tolist()
