"""Loads a checkpoint in vLLM on the CPU, generates, and scores windows of tokens. Run by vLLM's own Python:

    python serve.py CHECKPOINT QUESTIONS.json ANSWERS.json

QUESTIONS: {"prompts": [text, …], "windows": [[token, …], …]}
ANSWERS:   {"texts": [text, …], "nll": [nats of the scored tokens of each window], "seconds": …, "peak_memory": bytes}
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {  # before vLLM is imported
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else engines side by side are bound to the same cores
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_INT4_W4A8": "0",  # else CPUs with AMX round the inputs of 4-bit linears to 8 bits
}


def main(checkpoint: str, questions: Path, answers: Path) -> None:
    import torch
    from vllm import LLM, SamplingParams

    if torch.cpu._is_amx_tile_supported():
        # Linux kills a process that uses AMX unasked. oneDNN asks, vLLM's own kernels of experts do not.
        torch.cpu._init_amx()
    asked = json.loads(questions.read_text(encoding="utf-8"))
    started = time.perf_counter()
    engine = LLM(checkpoint, max_model_len=1024, enforce_eager=True, dtype="bfloat16", disable_log_stats=True)
    texts = engine.generate(asked["prompts"], SamplingParams(temperature=0, max_tokens=16))
    scored = engine.generate(
        [{"prompt_token_ids": window} for window in asked["windows"]],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
    )
    content = {
        "texts": [result.outputs[0].text for result in texts],
        "nll": [nll(result, window) for result, window in zip(scored, asked["windows"], strict=True)],
        "seconds": time.perf_counter() - started,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    answers.write_text(json.dumps(content), encoding="utf-8")


def nll(result: Any, window: list[int]) -> float:
    """Negative log-likelihood of the window's tokens but the first, which nothing predicts."""
    return -sum(known[token].logprob for token, known in list(zip(window, result.prompt_logprobs, strict=True))[1:])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
