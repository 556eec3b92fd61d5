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
from quantcli.quant.grid import QuantizedWeight
from quantcli.recipe import load_recipe

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
Recipe = dict[str, Any]

_V0_STATIC = {"bits": 8, "scope": "tensor", "method": "minmax", "aggregation": "mean", "propagation": "quantized"}
_V0_NAMES = {"w8a8": "W8A8", "w8a16": "W8A16", "w8a8_dynamic": "W8A8-dynamic"}

# Relative distance of scales of weights and of inputs, share of codes that may differ by one, distance of logits. The
# tool divides weights of 16 bits, and quantizes what it propagates, in 16 bits; here both are done in float32, so that
# scales of later inputs move by up to 5 % of theirs and their zero points by up to 4.
TOLERANCE = {
    "A": (4e-7, 4e-7, 0.0, 2e-6),
    "B": (4e-7, 4e-7, 0.0, 2e-6),
    "A_bf16": (2**-7, 0.05, 0.12, None),
    "A_fp16": (2**-9, 0.02, 0.02, None),
}
SSZ = 2e-5  # the tool keeps the earlier of two scales whose errors are equal in float32; the codes are the same


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
    if case in SMOOTHED_APART:
        return SMOOTHED_APART[case]
    if smoothing_of(model, case):
        return ""
    if "autoround" in case:
        return ""
    smoothing = ("smooth", "awq", "quarot", "float_sparse")
    if case.startswith("v1_") and any(word in case for word in smoothing):
        return "these smoothing methods and pruning have no counterpart"
    for word, reason in (
        (
            "w4a8_dynamic_g32",
            "two-stage scales of groups, which AscendV1 is not written with: vLLM-Ascend refuses them",
        ),
        ("w4a4", "4-bit activations in AscendV1 are not there yet"),
        ("mxfp", "microscaling formats are not there yet"),
        ("nf4", "NF4 has no counterpart"),
        ("tp2", "tensor-parallel scales have no counterpart"),
        ("static_hist", "defect of the tool: clipped to the extremes of the last sample"),
        ("lowbit_smooth", "the loss that chooses its smoothing strength is not known"),
    ):
        if word in case:
            return reason
    return ""


_SEARCHED = "its search differs from that of m6 and m3, whose cases are compared"
_SIGNED = "defect of the tool: the largest weight of v to o and up to down is taken with its sign"
SMOOTHED_APART = {
    "m2_w8a8_act3": "the loss that chooses the outliers is not known",
    "m6_w8a8": "the tool searches scales for v to o that query heads of one KV head do not share",
    "m3_w4a16_g32": "the tool searches for weights by row and quantizes them by group; here both are by group",
    "v1_flex_smooth": _SEARCHED,
    "v1_flex_smooth_default_adapter": _SEARCHED,
    "v1_flex_awq_ssz": _SEARCHED,
    "v1_awq": _SEARCHED,
    "v1_awq_w4": _SEARCHED,
    "v1_iter_smooth": _SIGNED,
    "v1_iter_smooth_asym": _SIGNED,
    "v1_iter_smooth_w8a8": _SIGNED,
    "v1_kv_smooth": "scales of keys against queries have no counterpart",
    "v1_quarot": "its rotation comes from another generator of random numbers",
    "v1_quarot_w8a8": "its rotation comes from another generator of random numbers",
}
_ALL_SAMPLES = {"search_samples": 6, "search_tokens": 10**6}  # every token of every sample
_SMOOTHED: dict[str, Recipe] = {
    "v1_smooth_quant": {"method": "m1"},
    "v1_smooth_quant_default_adapter": {"method": "m1"},
    "v1_iter_smooth_a05_normlinear": {"method": "m4", "alpha": 0.5, "folds": ["norm"]},
    "v1_iter_smooth_default_adapter": {"method": "m4", "folds": ["norm"]},
    "v1_default_w8a8": {"method": "m4", "folds": ["norm"]},
    "v1_iter_smooth_w8a8": {"method": "m4"},
    # its norms see the rows that the other folds have scaled: tests/smoothing compares them so
    "v1_flex_smooth_a07_b03": {"method": "m6", "alpha": 0.7, "beta": 0.3, "folds": ["attention", "mlp"]},
}


def smoothing_of(model: str, case: str) -> Recipe | None:
    """The section `smooth` that asks for the same; None if the case smooths nothing."""
    if case in _SMOOTHED:
        return _SMOOTHED[case]
    config = meta_of(model, case).get("anti_outlier_config")
    if not config:
        return None
    section: Recipe = {"method": config["anti_method"], **_ALL_SAMPLES}
    if "a07_b03" in case:
        section |= {"alpha": 0.7, "beta": 0.3}
    return section | {"clip": False} if config["anti_method"] == "m3" else section


def only_smoothed(model: str, case: str, entry: dict[str, Any]) -> bool:
    """Whether the case smooths, quantizes nothing, and is compared."""
    return not left_out(model, case, entry) and (GOLDEN / model / case / "scales.safetensors").is_file()


def recipe_of(model: str, case: str) -> Recipe:
    """The section `quantize` that asks for the same."""
    meta = meta_of(model, case)
    if smoothing_of(model, case) and not _quantizes(meta):  # the scheme that searches are for
        config = meta.get("anti_outlier_config") or {}
        weights = {"bits": config.get("w_bit", 8), "symmetric": not case.endswith("asym")}
        if weights["bits"] == 4 and weights["symmetric"]:
            weights["full_range"] = False
        inputs = {"bits": 16} if config.get("a_bit") == 16 else {"bits": 8, "scope": "tensor", "symmetric": False}
        return {"weights": weights, "activations": inputs}
    return _v1(meta, case) if meta["api"] == "v1" else _v0(meta, case)


def _quantizes(meta: dict[str, Any]) -> bool:
    """Whether the case does more than to smooth."""
    processes = ((meta.get("config") or {}).get("spec") or {}).get("process", [])
    return bool(meta.get("quant_config") or meta.get("quant_type")) or any("linear" in p["type"] for p in processes)


def _v0(meta: dict[str, Any], case: str) -> Recipe:
    config = dict(meta["quant_config"])
    chain = dict(meta["quant_config_chain"] or [])
    weights: Recipe = {
        "bits": config["w_bit"],
        "symmetric": config.get("w_sym", True),
        "granularity": "tensor" if config.get("mm_tensor", True) else "channel",
        "method": config.get("w_method", "MinMax").lower(),
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
    if meta["quant_type"]:  # a default of the tool
        inputs = {"bits": 8, "scope": "token"} if meta["quant_type"] == "w8a8" else {"bits": 16}
        return {"weights": {"bits": 8}, "activations": inputs}
    process = meta["config"]["spec"]["process"][-1]
    learned = process["type"] == "autoround_quant"
    config = process["strategies"][0]["qconfig"] if learned else process["qconfig"]
    if process["type"] == "dynamic_cache":
        return {"weights": {"bits": 16}, "kv_cache": {"symmetric": config["symmetric"]}}
    weights = {"bits": 4 if config["weight"]["dtype"] == "int4" else 8, "method": config["weight"]["method"]}
    if config["weight"]["dtype"] == "fp8_e4m3":
        weights["type"] = "float"
    if learned:
        weights["method"] = "signround"
    if weights["bits"] == 4:
        weights["full_range"] = False
    section: Recipe = {"weights": weights, "rollback": {"siblings": "apart"}}
    if weights["method"] == "gptq":  # theirs, too, aims at the calibration samples and at no others
        section["gptq"] = {"shrink": False}
    act = config.get("act")
    if act is None:
        return section
    scope = {"per_token": "token", "per_tensor": "tensor", "pd_mix": "mix"}[act["scope"]]
    section["activations"] = {"bits": 4 if act["dtype"] == "int4" else 8, "scope": scope}
    if "type" in weights:
        section["activations"]["type"] = weights["type"]
    if learned:
        section["signround"] = {"iterations": process["iters"]}
    if scope != "token":
        aggregation = act.get("ext", {}).get("aggregation_type", "max")
        section["activations"] |= {
            "symmetric": act["symmetric"],
            "aggregation": aggregation,
            "propagation": "quantized",
        }
    return section


def samples_of(case: str) -> slice:
    """The calibration samples that the tool looks at: of caches v1 keeps the extremes of the last one alone."""
    return slice(-1, None) if case.startswith("v1_kvcache") else slice(None)


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


def recipe_with_model(
    model: str, case: str, root: Path, samples: slice = slice(None), gptq: Recipe | None = None
) -> Recipe:
    """The whole recipe of the case, on the samples that the tool looks at; with GPTQ of this section in the place of
    its weight method if that is asked for."""
    folder, text = model_with_tokens(model, meta_of(model, case).get("calibration") or "calibration", root)
    output = root / "runs" / f"{model}-{case}"
    smooth = smoothing_of(model, case)
    if smooth and smooth["method"] == "m3":
        samples = slice(1)  # the first one tells mean |x| and the error
    if samples != slice(None):
        chosen = output.with_suffix(".jsonl")
        chosen.parent.mkdir(exist_ok=True)
        chosen.write_text("\n".join(text.read_text().splitlines()[samples]) + "\n")
        text = chosen
    count = len(text.read_text().splitlines())
    whole = {
        "model": {"path": str(folder), "sanity_check": "off"},
        "calibration": {"dataset": "jsonl", "path": str(text), "samples": 6, "sequence_length": 128},
        "quantize": recipe_of(model, case),
        "export": None,
        "output": str(output),
    }
    if gptq is not None:
        whole["quantize"]["weights"]["method"] = "gptq"
        whole["quantize"]["gptq"] = gptq
        whole["quantize"].pop("signround", None)
        whole["output"] += "-".join(["-gptq", *gptq])
    if smooth:
        whole["calibration"] |= {"samples": count}
        whole["smooth"] = smooth
    return whole


@contextmanager
def quantized(
    model: str, case: str, root: Path, samples: slice = slice(None), gptq: Recipe | None = None
) -> Iterator[tuple[Context, Store]]:
    """The case run by this program; the context and its store."""
    recipe = load_recipe(recipe_with_model(model, case, root, samples, gptq))
    result = engine.run_recipe(recipe, until="quantize")
    with open_run(Path(recipe.output), Path(recipe.model.path)) as run:
        context = Context(recipe, Path(recipe.model.path), result.plan, run, "cpu", results=result.stages)
        yield context, Store(context.folder("quantize"))


def smoothed_scales(model: str, case: str, root: Path) -> dict[str, Tensor]:
    """The scales that this program finds for the case, by the first linear that takes them."""
    recipe = load_recipe(recipe_with_model(model, case, root))
    engine.run_recipe(recipe, until="smooth")
    found: dict[str, Tensor] = {}
    for file in sorted((Path(recipe.output) / "smooth").glob("block-*.safetensors")):
        found |= load_file(file)
    return {name.removesuffix(".scale"): scale for name, scale in found.items()}


@cache
def input_moments(model: str) -> dict[str, Tensor]:
    """E[x xᵀ] of the input of every linear of the recorded model over its calibration samples, float32."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(GOLDEN / model / "model", dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            inputs = seen.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        for tokens in load_file(GOLDEN / model / "calibration.safetensors").values():
            whole(tokens.view(1, -1), use_cache=False)
    joined = {name: torch.cat(inputs).double() for name, inputs in seen.items()}
    return {name: (x.t() @ x / len(x)).float() for name, x in joined.items()}


def float_logits(model: str) -> list[tuple[Tensor, Tensor]]:
    """Each calibration sample of the recorded model, and its logits [tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(GOLDEN / model / "model", dtype=torch.float32).eval()
    samples = load_file(GOLDEN / model / "calibration.safetensors").values()
    with torch.inference_mode():
        return [(tokens, whole(tokens.view(1, -1), use_cache=False).logits[0]) for tokens in samples]


class MovedInputs(Store):
    """A store whose static input scales are multiplied by 1 + e."""

    def __init__(self, folder: Path, e: float) -> None:
        super().__init__(folder)
        self.e = e

    def read(self, name: str) -> StoredLinear:
        stored = super().read(name)
        scale = stored.input_scale
        return replace(stored, input_scale=None if scale is None else scale * (1 + self.e))


class OtherWeights(Store):
    """A store with codes and scales of another tool in the place of its own."""

    def __init__(self, folder: Path, weights: dict[str, QuantizedWeight]) -> None:
        super().__init__(folder)
        self.weights = weights

    def read(self, name: str) -> StoredLinear:
        return replace(super().read(name), weight=self.weights[name])


def simulated_logits(context: Context, store: Store, tokens: Tensor, phase: Phase = "decode") -> Tensor:
    """Logits [tokens, vocabulary] of the simulated model."""
    text = EvaluationText("standard", [tokens.flatten().tolist()], tokens.numel(), None, "")
    model = TrialModel(context, store, None, text, phase)
    (hidden,) = model.hidden(frozenset())
    with model.stream.head(), torch.inference_mode():
        return torch.cat([logits[0] for _, logits in model.logits(hidden, ())])
