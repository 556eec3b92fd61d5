"""msModelSlim's recorded cases as recipes of ours, and their tensors as codes and scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantcli.evaluation.protocols import EvaluationText
from quantcli.formats.store import Store, StoredLinear
from quantcli.pipeline import engine
from quantcli.pipeline.context import Context
from quantcli.pipeline.rundir import open_run
from quantcli.pipeline.treatment import Phase
from quantcli.pipeline.trial import TrialModel
from quantcli.recipe import load_recipe

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
Recipe = dict[str, Any]

_V0_STATIC = {"bits": 8, "scope": "tensor", "method": "minmax", "aggregation": "mean", "propagation": "quantized"}
_V0_NAMES = {"w8a8": "W8A8", "w8a16": "W8A16", "w8a8_dynamic": "W8A8-dynamic"}


def meta_of(model: str, case: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / model / case / "meta.json").read_text(encoding="utf-8"))
    for key, value in content.items():
        if isinstance(value, dict) and "same_as_case" in value:
            content[key] = meta_of(model, value["same_as_case"]).get(key)
    return content


def index() -> list[tuple[str, str, dict[str, Any]]]:
    """(model, case, entry of the index)"""
    if not GOLDEN.is_dir():
        return []
    content = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
    return [(model, case, entry) for model, cases in content.items() for case, entry in cases.items()]


def tensors_of(model: str, case: str) -> dict[str, Tensor]:
    """The tensors that the tool saved, those of other cases that they are equal to included."""
    folder = GOLDEN / model / case
    found = load_file(folder / "weights.safetensors") if (folder / "weights.safetensors").is_file() else {}
    for other, names in (meta_of(model, case).get("tensors_from") or {}).items():
        elsewhere = tensors_of(model, other)
        found |= {name: elsewhere[name] for name in names}
    return found


def left_out(model: str, case: str, entry: dict[str, Any]) -> str:
    """Why a case is not compared; empty if it is."""
    if entry["status"] != "ok":
        return "the tool failed"
    if case.startswith(("anti_", "m1_", "m2_", "m3_", "m4_", "m6_")):
        return "outlier suppression is not there yet"
    smoothing = ("smooth", "awq", "quarot", "float_sparse", "autoround")
    if case.startswith("v1_") and (any(word in case for word in smoothing) or case == "v1_default_w8a8"):
        return "smoothing, rotation, pruning and learned rounding are not there yet"
    for word, reason in (
        ("gptq", "gptq is not there yet"),
        ("hqq", "hqq is not there yet"),
        ("ssz", "ssz is not there yet"),
        ("w4a8", "W4A8_DYNAMIC is not written yet"),
        ("w4a4", "4-bit activations in AscendV1 are not there yet"),
        ("mxfp", "microscaling formats are not there yet"),
        ("fp8_dynamic", "fp8 linears are not there yet"),
        ("nf4", "NF4 has no counterpart"),
        ("tp2", "tensor-parallel scales have no counterpart"),
        ("static_hist", "defect of the tool: clipped to the extremes of the last sample"),
        ("lowbit_smooth", "the loss that chooses its smoothing strength is not known"),
    ):
        if word in case:
            return reason
    return ""


def recipe_of(model: str, case: str) -> Recipe:
    """The section `quantize` that asks for the same."""
    meta = meta_of(model, case)
    return _v1(meta, case) if meta["api"] == "v1" else _v0(meta, case)


def _v0(meta: dict[str, Any], case: str) -> Recipe:
    config = dict(meta["quant_config"])
    chain = dict(meta["quant_config_chain"] or [])
    weights: Recipe = {
        "bits": config["w_bit"],
        "symmetric": config.get("w_sym", True),
        "granularity": "tensor" if config.get("mm_tensor", True) else "channel",
    }
    if weights["bits"] == 4:
        weights["full_range"] = False
    if "g32" in case or "g64" in case:
        weights |= {"granularity": "group", "group_size": config["group_size"]}
    activations: Recipe = {"bits": 16}
    if config["a_bit"] == 8:
        activations = dict(_V0_STATIC)
        if config.get("is_dynamic"):
            activations = {"bits": 8, "scope": "token"}
        elif config.get("pdmix"):
            activations["scope"] = "mix"
    if case.startswith("w8a8s"):
        method = "co_sparse" if config.get("co_sparse") else "low_bit_sigma" if config.get("use_sigma") else "low_bit"
        weights |= {"bits": 8, "method": method, "symmetric": True}
        if method != "low_bit_sigma":
            weights["fraction"] = config["fraction"]
    # The sparse engine ranks by the largest input of the first batch, which is no metric here: its choice is named.
    chosen = [name for name in meta["rollback_names"] if name != "lm_head"] if "sigma_L2" in case else []
    rollback: Recipe = {
        "names": [*(config.get("disable_names") or []), *chosen],
        "disable_level": "L0" if chosen else meta["disable_level"],
        "siblings": "apart",
    }
    if config.get("disable_last_linear") is False:
        rollback["last_linear"] = False
    section: Recipe = {"weights": weights, "activations": activations, "rollback": rollback}
    if meta.get("mix_cfg"):
        section["overrides"] = [
            {"match": pattern, "scheme": _V0_NAMES[name]} | ({"activations": {**_V0_STATIC}} if name == "w8a8" else {})
            for pattern, name in meta["mix_cfg"].items()
        ]
    if "kv_quant" in chain:
        section["kv_cache"] = {"symmetric": chain["kv_quant"]["kv_sym"], "observe": "projection"}
    if "fa_quant" in chain:
        section["attention"] = {}
    return section


def _v1(meta: dict[str, Any], case: str) -> Recipe:
    if case == "v1_default_w8a16":
        return {"weights": {"bits": 8}}
    (process,) = meta["config"]["spec"]["process"]
    config = process["qconfig"]
    if process["type"] == "dynamic_cache":
        return {"weights": {"bits": 16}, "kv_cache": {"symmetric": config["symmetric"]}}
    section: Recipe = {"weights": {"bits": 8}, "rollback": {"siblings": "apart"}}
    act = config["act"]
    scope = {"per_token": "token", "per_tensor": "tensor", "pd_mix": "mix"}[act["scope"]]
    section["activations"] = {"bits": 8, "scope": scope}
    if scope != "token":
        aggregation = act.get("ext", {}).get("aggregation_type", "max")
        section["activations"] |= {
            "symmetric": act["symmetric"],
            "aggregation": aggregation,
            "propagation": "quantized",
        }
    return section


@cache
def model_with_tokens(model: str, calibration: str, root: Path) -> tuple[Path, Path]:
    """The recorded model with a tokenizer that reads <7> as token 7, and its calibration samples as such text."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = root / f"{model}-{calibration}"
    shutil.copytree(GOLDEN / model / "model", folder)
    words = {f"<{number}>": number for number in range(128)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    # found before any rule of the model family's own tokenizer cuts the text
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    samples = load_file(GOLDEN / model / f"{calibration}.safetensors")
    ordered = sorted((key for key in samples if key.startswith("input_ids")), key=lambda key: int(key.split("_")[-1]))
    texts = ["".join(f"<{number}>" for number in samples[key].flatten().tolist()) for key in ordered]
    lines = [json.dumps({"prompt": text}) for text in texts]
    (root / f"{model}-{calibration}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, root / f"{model}-{calibration}.jsonl"


@contextmanager
def quantized(model: str, case: str, root: Path, samples: slice = slice(None)) -> Iterator[tuple[Context, Store]]:
    """The case run by this program; the context and its store."""
    meta = meta_of(model, case)
    folder, text = model_with_tokens(model, meta.get("calibration") or "calibration", root)
    output = root / "runs" / f"{model}-{case}"
    if samples != slice(None):
        chosen = output.with_suffix(".jsonl")
        chosen.parent.mkdir(exist_ok=True)
        chosen.write_text("\n".join(text.read_text().splitlines()[samples]) + "\n")
        text = chosen
    recipe = load_recipe(
        {
            "model": {"path": str(folder), "sanity_check": "off"},
            "calibration": {"dataset": "jsonl", "path": str(text), "samples": 6, "sequence_length": 128},
            "quantize": recipe_of(model, case),
            "export": None,
            "output": str(output),
        }
    )
    result = engine.run_recipe(recipe, until="quantize")
    with open_run(output, folder) as run:
        context = Context(recipe, folder, result.plan, run, "cpu", results=result.stages)
        yield context, Store(output / "quantize")


class MovedInputs(Store):
    """A store whose static input scales are multiplied by 1 + e."""

    def __init__(self, folder: Path, e: float) -> None:
        super().__init__(folder)
        self.e = e

    def read(self, name: str) -> StoredLinear:
        stored = super().read(name)
        scale = stored.input_scale
        return replace(stored, input_scale=None if scale is None else scale * (1 + self.e))


def simulated_logits(context: Context, store: Store, tokens: Tensor, phase: Phase = "decode") -> Tensor:
    """Logits [tokens, vocabulary] of the simulated model."""
    text = EvaluationText("standard", [tokens.flatten().tolist()], tokens.numel(), None, "")
    model = TrialModel(context, store, None, text, phase)
    (hidden,) = model.hidden(frozenset())
    with model.stream.head(), torch.inference_mode():
        return torch.cat([logits[0] for _, logits in model.logits(hidden, ())])
