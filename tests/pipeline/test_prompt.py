"""The logits of a fixed prompt are the same from an export, as it is read, and from the store it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_exports import Export, export_tiny

from quantcli.errors import VerificationError
from quantcli.formats import ascend, awq, compressed_tensors, gptq
from quantcli.formats.store import StoredLinear
from quantcli.pipeline.prompt import check_prompt
from quantcli.quant.grid import QuantizedWeight
from quantcli.quant.scheme import AttentionScheme, Scheme

GROUPS = Scheme(4, granularity="group", group_size=32, float16_scales=True)
ASYM = Scheme(4, symmetric=False, granularity="group", group_size=32, float16_scales=True)
STATIC = Scheme(8, activations="static", activations_symmetric=False)
FP8 = Scheme(8, granularity="tensor", activations="static", type="float")
FP8_DYNAMIC = Scheme(8, activations="dynamic", type="float")
CASES: dict[str, tuple[str, Scheme, dict[str, Any]]] = {
    "static": ("compressed-tensors", STATIC, {}),
    "static, one scale a tensor": ("compressed-tensors", Scheme(8, granularity="tensor", activations="dynamic"), {}),
    "W4A8": ("compressed-tensors", Scheme(4, activations="dynamic"), {"cast": "bfloat16"}),
    "packed, fp8 cache": ("compressed-tensors", ASYM, {"attention": AttentionScheme(kv="fp8")}),
    "ascend static": ("ascend", STATIC, {"dtype": torch.bfloat16}),
    "ascend, one scale a tensor": ("ascend", Scheme(8, granularity="tensor", activations="dynamic"), {}),
    "ascend dynamic": ("ascend", Scheme(8, activations="dynamic"), {"dtype": torch.float16}),
    "ascend mix": ("ascend", Scheme(8, activations="mix"), {"dtype": torch.bfloat16}),
    "ascend weights, tied": ("ascend", Scheme(8, symmetric=False), {"family": "llama-tied"}),
    "ascend W4A8": ("ascend", Scheme(4, activations="dynamic"), {"dtype": torch.bfloat16}),
    "numpy static": ("numpy", STATIC, {"dtype": torch.bfloat16}),
    "numpy, weights": ("numpy", Scheme(8, symmetric=False), {"dtype": torch.bfloat16}),
    "mindie cache": ("mindie", STATIC, {"attention": AttentionScheme(kv="int8"), "dtype": torch.float16}),
    "ascend cache": ("ascend", Scheme(8), {"attention": AttentionScheme(kv="int8", kv_symmetric=False)}),
    "ascend heads": ("ascend", Scheme(8), {"attention": AttentionScheme(heads=True), "dtype": torch.bfloat16}),
    "gptq": ("gptq", ASYM, {"dtype": torch.bfloat16}),
    "awq": ("awq", GROUPS, {"dtype": torch.float16, "kept": ["model.layers.1.mlp.down_proj"]}),
    "modelopt": ("modelopt", FP8, {"dtype": torch.bfloat16, "attention": AttentionScheme(kv="fp8")}),
    "modelopt dynamic": ("modelopt", FP8_DYNAMIC, {"dtype": torch.float16, "kept": ["model.layers.1.mlp.down_proj"]}),
    "dense": ("dense", STATIC, {"dtype": torch.bfloat16, "attention": AttentionScheme(kv="fp8")}),
    "experts": ("compressed-tensors", GROUPS, {"family": "mixtral"}),
}


def checked(made: Export) -> float:
    return check_prompt(made.folder, made.form, made.store, made.source, made.structure)


@pytest.mark.parametrize("case", CASES)
def test_export_and_store_agree(case: str, tmp_path: Path) -> None:
    form, scheme, changes = CASES[case]
    score = checked(export_tiny(tmp_path, scheme, form=form, **changes))
    assert -20 < score < 0


def half_up(stored: StoredLinear) -> StoredLinear:
    codes, scale, zero = stored.weight
    return StoredLinear(QuantizedWeight(codes, scale * 1.5, zero), stored.input_scale, stored.input_zero_point)


def no_zero_point(stored: StoredLinear) -> StoredLinear:
    return StoredLinear(QuantizedWeight(*stored.weight[:2], None), stored.input_scale, None)


@pytest.mark.parametrize("misread", [half_up, no_zero_point])
@pytest.mark.parametrize(
    ("module", "scheme"), [(compressed_tensors, ASYM), (ascend, STATIC), (gptq, ASYM), (awq, ASYM)]
)
def test_a_reader_that_misreads_is_found(
    module: Any,
    scheme: Scheme,
    misread: Callable[[StoredLinear], StoredLinear],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files are right, and verification of the tensors says so: only the evaluation would be wrong."""
    made = export_tiny(tmp_path, scheme, form=module.NAME, dtype=torch.bfloat16)
    made.verify()
    checked(made)
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *a, **k: misread(decode(*a, **k)))
    made.verify()
    with pytest.raises(VerificationError, match="on a fixed prompt its logits differ"):
        checked(made)
