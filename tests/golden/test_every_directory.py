"""Every recorded checkpoint is read as the float model that was quantized, or refused by all commands for a reason that
stands here: none is read as something else.

Weights are compared with the float model's, under the factors that a smoothing case recorded; what engines add
(quant_bias, scale_bias) and scales of attention with what the tool wrote itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msmodelslim as golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_ascend_tensors import GOLDEN, recorded
from torch import Tensor

from quantcli.errors import ModelError, VerificationError
from quantcli.formats.reader import QuantizedCheckpoint
from quantcli.model.skeleton import Skeleton
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.convert import convert_checkpoint
from quantcli.pipeline.standalone import open_checkpoint
from quantcli.pipeline.verify import verify_path
from quantcli.quant.scheme import Scheme

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the recorded outputs beside the checkout")

SHIFT = r"gate_proj.bias is not zero, and the model has no such bias. Engines add none of a linear in float"
REFUSED = {
    "v1_autoround_w4a4_i20": (
        "4-bit activations are not read in this format",
        "the type 'W4A4_DYNAMIC', which quantcli",
    ),
    "v1_w4a4_mxfp4": ("microscaling formats are not read", "the type 'W4A4_MXFP4', which quantcli does not read"),
    "v1_w4a4_mxfp4_fouroversix": ("microscaling formats are not read", "the type 'W4A4_MXFP4', which quantcli"),
    "v1_w4a8_mxfp": ("microscaling formats are not read", "the type 'W4A8_MXFP', which quantcli does not read"),
    "v1_w8a8_mxfp8": ("microscaling formats are not read", "the type 'W8A8_MXFP8', which quantcli does not read"),
    "nf4_b64": ("NF4 is not read", "the type 'NF4', which quantcli does not read"),
    "v1_float_sparse": ("float weights with zeros have no codes", "the type 'W16A16S', which quantcli does not read"),
    "w8a8_tp2": ("linears that are split among devices have sums in int8", "reduce_quant_type is 'per_channel'"),
    "v1_iter_smooth_asym": ("linears in float take a shift back, for which engines give them no bias", SHIFT),
    "w8a8s_lowbit_sigma_L2": (
        "the tool wrote no weights of the two linears in float",
        r"lacks .* \(2 of 21 parameters",
    ),
}
"""Case → why it is refused, and what the error says."""

SMOOTHED = {
    "m1_w8a8": "anti_m1",
    "m2_w8a8_act3": "anti_m2",
    "m3_w4a16_g32": "anti_m3_w4a16",
    "m4_w8a8_dynamic": "anti_m4",
    "m6_w8a8": "anti_m6",
    "v1_iter_smooth_w8a8": "v1_iter_smooth",
    "v1_default_w8a8": "v1_iter_smooth_default_adapter",
}
"""Case → that which recorded the factors of rows and columns; others have their own, or none."""

CASES = [
    (model, case)
    for model, case, entry in golden.index()
    # of what failed there is nothing, and methods of outlier suppression alone recorded the model's state dictionary
    if entry["status"] == "ok" and not case.startswith("anti_")
]
IDS = [f"{model}-{case}" for model, case in CASES]


def float_weights(model: str, case: str) -> dict[str, Tensor]:
    """The weights that were quantized: the model's by factors of smoothing, or those that rotation recorded."""
    if "quarot" in case:
        return recorded(model, "v1_quarot")[0]
    weights = load_file(GOLDEN / model / "model" / "model.safetensors")
    if case == "w8a8s_lowbit_smooth":  # whose norms say by what they were divided
        saved, _ = recorded(model, case)
        for shared in (s for block in find_structure(GOLDEN / model / "model").blocks for s in block.inputs):
            norm = f"{shared.producer.name}.weight" if shared.producer is not None else ""
            for name in shared.linears if norm.endswith("norm.weight") else ():
                weights[f"{name}.weight"] = weights[f"{name}.weight"] * (weights[norm] / saved[norm])
    scales = GOLDEN / model / SMOOTHED.get(case, case) / "scales.safetensors"
    for name, factor in (load_file(scales) if scales.is_file() else {}).items():
        linear, _, kind = name.rpartition(".")
        if kind in ("row_times", "col_times"):
            weights[f"{linear}.weight"] = weights[f"{linear}.weight"] * factor.unsqueeze(
                1 if kind == "row_times" else 0
            )
    return weights


def tolerance(case: str, scheme: Scheme) -> float:
    """The largest ‖W − Wq‖ / ‖W‖ of a linear that these models have under it; a wrong reading is beyond 0.9."""
    chosen = "gptq" in case or "autoround" in case  # by the error of the output, not of the weight
    if scheme.sparse:
        return 0.45
    if scheme.bits == 4:
        return 0.37 if chosen and scheme.group_size is None else 0.2 if scheme.group_size is None else 0.15
    return 0.12 if scheme.granularity == "tensor" else 0.045 if chosen else 0.025


def directory(place: Path, model: str, case: str) -> tuple[Path, dict[str, Tensor]]:
    tensors, description = recorded(model, case)
    rebuilt = golden.meta_of(model, case).get("float_linears_omitted") or []
    tensors |= {name: tensor for name, tensor in float_weights(model, case).items() if name in rebuilt}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("optional/")}  # another file's
    place.mkdir()
    shutil.copy(GOLDEN / model / "model" / "config.json", place)
    (place / "quant_model_description.json").write_text(json.dumps(description))
    save_file({name: t.contiguous() for name, t in tensors.items()}, place / "quant_model_weight.safetensors")
    return place, tensors


def evaluated(folder: Path) -> None:
    """As far as eval-ppl goes before it reads text."""
    structure, checkpoint, _ = open_checkpoint(folder)
    Skeleton(folder, structure, checkpoint=checkpoint)


@pytest.mark.parametrize(("model", "case"), CASES, ids=IDS)
def test_it_is_read_as_what_was_quantized_or_refused(model: str, case: str, tmp_path: Path) -> None:
    folder, tensors = directory(tmp_path / "made", model, case)
    if case in REFUSED:
        reason, match = REFUSED[case]
        assert reason
        for use in (
            lambda: verify_path(folder),
            lambda: convert_checkpoint(folder, "dense", tmp_path / "out"),
            lambda: evaluated(folder),
        ):
            with pytest.raises((ModelError, VerificationError), match=match) as caught:
                use()
            assert "Download" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    _, checkpoint, weights = open_checkpoint(folder)
    originals = float_weights(model, case)
    codes = {
        name.removesuffix(".weight") for name, t in tensors.items() if t.dtype in (torch.int8, torch.float8_e4m3fn)
    }
    assert checkpoint.schemes.keys() == {name for name in codes if f"{name}.weight" in tensors}
    for linear, name in weights.items():
        found, wanted = checkpoint.read([name])[name].double(), originals[name].double()
        error = float((found - wanted).norm() / wanted.norm())
        scheme = checkpoint.schemes.get(linear)
        assert error <= (0 if scheme is None else tolerance(case, scheme)), linear
        if scheme is not None:
            of_the_tool(checkpoint, linear, tensors)
    for name in checkpoint.entries.keys() - set(weights.values()):
        assert torch.equal(checkpoint.read([name])[name], tensors[name]), name
    scales = {name: t for name, t in tensors.items() if ".kv_cache_" in name or ".fa_" in name}
    assert bool(scales) == (checkpoint.attention is not None) == bool(checkpoint.attention_modules)
    read = [part for module in checkpoint.attention_modules for part in checkpoint.read_attention(module).values()]
    assert all(any(torch.equal(part, tensor) for tensor in scales.values()) for part in read)


def of_the_tool(checkpoint: QuantizedCheckpoint, linear: str, tensors: dict[str, Tensor]) -> None:
    """What engines add to the products is what belongs to the scales and codes that were read."""
    stored, bias = checkpoint.read_linear(linear), tensors.get(f"{linear}.bias")
    if f"{linear}.quant_bias" in tensors:
        assert stored.input_scale is not None
        offset = 0 if stored.input_zero_point is None else int(stored.input_zero_point)
        wanted = -offset * stored.weight.codes.sum(1, dtype=torch.int64).double()
        if bias is not None:
            wanted += bias.double() / (stored.input_scale.double() * stored.weight.scale.double().view(-1))
        assert float((tensors[f"{linear}.quant_bias"] - wanted).abs().max()) <= 1
    if f"{linear}.scale_bias" in tensors:  # the tool makes it from values of few bits
        sums = tensors[f"{linear}.scale_bias"].double()
        name = checkpoint.weights[linear]
        wanted = 8 * checkpoint.read([name])[name].double().unflatten(1, (sums.shape[1], -1)).sum(2)
        assert float((sums - wanted).norm() / wanted.norm()) < 4e-3


def test_the_tables_name_recorded_cases() -> None:
    assert REFUSED.keys() | SMOOTHED.keys() <= {case for _, case in CASES}
    assert set(SMOOTHED.values()) <= {case for _, case, _ in golden.index()}
