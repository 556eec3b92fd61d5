"""Run directories as a run leaves them, of any size, without a model: what the page is made from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

WIDTH, INNER, VOCABULARY = 8192, 28672, 128256
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (1024, WIDTH),
    "self_attn.v_proj": (1024, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
VERSIONS = {"quantcli": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "compressed-tensors": "0.20.1"}


def save_run(path: Path, *, blocks: int = 3, scheme: str = "W8A8 static", experts: int = 0, **changes: Any) -> Path:
    """A finished run of a model of the shape of Llama 70B, with `blocks` blocks; of mixtures with `experts` in each.

    `changes`: `kl`, `increase`, `bytes` and `text` (which every name and text of the model's becomes part of).
    """
    text = changes.get("text", "")
    names = _linears(blocks, experts)
    error = {name: 10 ** (-4 + 2 * math.sin(i) ** 2 + block / blocks) for i, (name, block, _) in enumerate(names)}
    linears = [
        {"name": name, "block": block, "shape": list(shape), "scheme": scheme, "reason": ""}
        for name, block, shape in names
    ]
    del error[names[2][0]]
    linears[2] |= {"scheme": "float", "reason": f"rolled back by output_error 0.0312{text}"}
    linears.append(_float("lm_head", blocks, (VOCABULARY, WIDTH), "output head, stays in float by default"))
    whole = sum(math.prod(shape) for _, _, shape in names)
    outer = 2 * VOCABULARY * WIDTH * 2
    size = changes.get("bytes", outer + whole)
    plan = {
        "model": f"/models/llama-70b{text}", "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "blocks": blocks,
        "linears": linears, "attention": None, "smoothing": "auto", "notes": [f"A note{text}."],
        "size_before": outer + 2 * whole, "size_after": size, "bits_per_weight": 8.01, "estimate": {},
        "engines": [{"engine": "vLLM on a GPU", "loads": True, "note": "int8 products"}],
    }  # fmt: skip
    stages = ("check", "smooth", "calibrate", "quantize", "export", "eval-ppl", "eval-tasks", "layers", "generate",
              "throughput")  # fmt: skip
    records = {name: {"fingerprint": "0" * 64, "seconds": 61.5, "peak_memory": 9 << 30, "versions": VERSIONS}
               for name in stages}  # fmt: skip
    increase, kl = changes.get("increase", 0.012), changes.get("kl", 0.0123)
    scores = {
        "protocol": "standard", "description": "windows", "sequence_length": 2048, "checkpoint": "compressed-tensors",
        "tokens": 327_520, "windows": 160, "float_model": {"value": changes.get("float", 2.86), "error": 0.02},
        "quantized": {"value": 2.86 * (1 + increase), "error": 0.02},
        "increase": increase, "increase_error": 0.0004, "increase_interval": [increase - 8e-4, increase + 8e-4],
        "kl_divergence": kl, "kl_error": 0.0002, "agreement": 0.967, "agreement_error": 0.0011,
        "top5_agreement": 0.951, "top5_error": 0.0007, "kl": _percentiles(kl, kl / 3, 0.0),
        "delta_p": _percentiles(-0.0012, 0.03, -0.4) | {"error": 0.0003, "rms": 0.021},
        "flips": {"lost": 0.0123, "gained": 0.0087}, "nll_correlation": 0.997,
        "per_text": {name: {"float_model": {"value": value, "error": 0.02},
                            "quantized": {"value": value * (1 + increase), "error": 0.02}}
                     for name, value in (("word_perplexity", 6.1), ("byte_perplexity", 1.4), ("bits_per_byte", 0.5))},
    }  # fmt: skip
    parts = {"codes": whole, "scales and zero points": whole >> 8, "embeddings": outer // 2, "output head": outer // 2}
    sizes = {
        "float": {"bytes": outer + 2 * whole,
                  "parts": {"float linears": 2 * whole, "embeddings": outer // 2, "output head": outer // 2}},
        "compressed-tensors": {"bytes": size, "parts": parts, "ratio": round((outer + 2 * whole) / size, 4),
                               "bits_per_weight": 8.03, "bits_per_parameter": 8.4},
    }  # fmt: skip
    result = {
        "stages": records, "size_before": outer + 2 * whole, "size_after": size, "peak_memory": 9 << 30,
        "exports": ["/elsewhere/export/compressed-tensors"], "perplexity": scores, "experts": None, "allocation": None,
        "smoothing": {"methods": {"strength 0.8 0": 4 * blocks - 1}, "left": {"check": 1}, "rotated": []},
        "sizes": sizes, "tasks": _tasks(), "throughput": _throughput(), "gates": _gates(kl),
    }  # fmt: skip
    _write(path / "run.json", {"kind": "quantcli run", "stages": records, "model": plan["model"], "seed": 0,
                               "device": "cuda", "versions": VERSIONS})  # fmt: skip
    _write(path / "summary.json", {"command": f"quantcli run w8a8 --model x{text}", "plan": plan, "result": result})
    _write(path / "eval-ppl" / "results.json", scores | {"per_window": [[2047, 1.0, 1.0, 1.0]] * 160})
    _write(path / "eval-tasks" / "results.json", result["tasks"])
    _write(path / "throughput" / "results.json", result["throughput"])
    worst = sorted(error.items(), key=lambda item: -item[1])[:5]
    _write(path / "gates" / "gates.json", {"gates": result["gates"], "fallbacks": {"not_smoothed": 1},
                                           "worst_linears": worst, "worst_by": "output error"})  # fmt: skip
    errors = [{"name": name, "output_error": value} for name, value in error.items()]
    _write(path / "layers" / "errors.json", {"tokens": 512, "linears": errors})
    _write(path / "generate" / "generated.json", _generated(text))
    for block in range(blocks):
        _write(path / "smooth" / f"block-{block:05d}.json", _outcomes(block))
    _write(path / "check" / "sanity.json", {"tokens": 512, "tokens_per_word": 1.3, "perplexity": 3.1})
    bits = "4" if "W4" in scheme else "8"
    (path / "recipe.yaml").write_text(
        f"version: 1\nquantize:\n  weights: {{bits: {bits}}}\noutput: {path.name}{text}\n"
    )
    events = [{"event": "plan", "stage": ""}, {"event": "started", "stage": "smooth"},
              {"event": "tokens", "stage": "smooth", "tokens": 32768, "samples": 64, "documents": 12},
              {"event": "warning", "stage": "smooth", "text": f"model.layers.1 is not smoothed{text}."},
              {"event": "started", "stage": "quantize"}]  # fmt: skip
    events += [{"event": "linear", "stage": "quantize", "module": name, "scheme": scheme, "scale_max": 0.0123,
                "input_min": -12.5, "input_max": 9.25, "range_parm": 4.5} for name, _, _ in names]  # fmt: skip
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def _linears(blocks: int, experts: int) -> list[tuple[str, int, tuple[int, int]]]:
    found = []
    for block in range(blocks):
        for kind, shape in SHAPES.items():
            if experts and kind.startswith("mlp."):
                leaf = kind.removeprefix("mlp.")
                found += [(f"model.layers.{block}.mlp.experts.{e}.{leaf}", block, shape) for e in range(experts)]
            else:
                found.append((f"model.layers.{block}.{kind}", block, shape))
    return found


def _float(name: str, block: int, shape: tuple[int, int], reason: str) -> dict[str, Any]:
    return {"name": name, "block": block, "shape": list(shape), "scheme": "float", "reason": reason}


def _outcomes(block: int) -> list[dict[str, Any]]:
    return [
        {
            "input": f"model.layers.{block}.{group[0]}", "linears": [f"model.layers.{block}.{kind}" for kind in group],
            "producer": f"model.layers.{block}.norm", "fold": "norm", "kept": block != 1,
            "cause": "" if block != 1 else "check", "reason": "", "chosen": "strength 0.8 0",
            "largest_before": 40.0 + 5 * block, "largest_after": 2.0 + block / 9,
            "error_before": 0.02, "error_after": 0.003,
        }
        for group in GROUPS
    ]  # fmt: skip


def _generated(text: str) -> dict[str, Any]:
    same = {"text": f"Because blue light scatters more.{text}", "tokens": [1, 2, 3]}
    other = {"text": f"Because blue light is scattered.{text}", "tokens": [1, 2, 4]}
    return {
        "max_new_tokens": 32, "skipped": "", "chat_template": True,
        "prompts": [{"prompt": f"Why is the sky blue?{text}", "float": same, "quantized": other},
                    {"prompt": "Once more?", "float": same, "quantized": same}],
    }  # fmt: skip


def _percentiles(mean: float, middle: float, least: float) -> dict[str, float]:
    """As `with_distributions` names them; values that grow with the percentile."""
    shares = (0, 0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)
    return {"mean": mean} | {f"{share:g}": least + (middle - least) * (share / 50) ** 2 for share in shares}


def _tasks() -> dict[str, Any]:
    """What eval-tasks writes: a task that is compared question by question, and one that has aggregates alone."""
    accuracy = {
        "float_model": {"value": 0.62, "error": 0.0181, "interval": [0.5838, 0.6549]},
        "quantized": {"value": 0.605, "error": 0.0183, "interval": [0.5687, 0.6401]},
        "change": -0.015, "change_error": 0.0062, "change_interval": [-0.0272, -0.0028],
        "flips": {"lost": 0.022, "gained": 0.007},
    }  # fmt: skip
    aggregates = {"word_perplexity,none": 8.25, "bits_per_byte,none": 0.57}
    return {
        "tasks": {
            "boolq": {"description": "BoolQ", "questions": 720, "metrics": {"accuracy": accuracy}, "same_answer": 0.97},
            "lm-eval/wikitext": {"description": "wikitext",
                                 "lm_eval": {"float_model": aggregates, "quantized": aggregates}},
        }
    }  # fmt: skip


def _throughput() -> dict[str, Any]:
    def served(prefill: float, decode: float, memory: int) -> dict[str, Any]:
        rates = {name: {"low": value * 0.96, "median": value, "high": value * 1.03}
                 for name, value in (("prefill", prefill), ("decode", decode))}  # fmt: skip
        return rates | {"first_token": 0.23, "peak_memory": memory, "samples": [{"prefill": [0.2], "whole": [2.9]}]}

    return {
        "engine": "vLLM", "version": "0.32.0", "device": "a processor, 2 cores", "environment": {},
        "checkpoint": "compressed-tensors", "dtype": "bfloat16", "prompt_tokens": 512, "new_tokens": 64, "batch": 1,
        "repeats": 5, "rounds": 2, "eager": False, "float_model": served(2196.0, 22.5, 142 << 30),
        "quantized": served(2344.0, 32.9, 75 << 30),
        "change": {"prefill": 0.0674, "decode": 0.4622, "peak_memory": -0.4718},
    }  # fmt: skip


def _gates(kl: float) -> list[dict[str, Any]]:
    """One that is kept, and one that is missed unless the divergence is small."""
    rows = (("agreement", 0.9, 0.967, True, 0.0011), ("kl_divergence", 0.01, kl, False, 0.0002))
    return [
        {"name": name, "bound": bound, "value": value, "least": least, "error": error, "reason": "",
         "passed": value >= bound if least else value <= bound}
        for name, bound, value, least, error in rows
    ]  # fmt: skip


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
