"""Speed and memory of one checkpoint in vLLM. Run as a script by the Python of an environment that has vLLM, which
need not have quantcli:

    python in_vllm.py ASKED.json ANSWERED.json

ASKED     {"checkpoint": directory, "dtype": …, "prompts": [[token, …], …] of one length, "new_tokens": …, "repeats": …,
           "eager": …, "cache": bytes of keys and values, "trust_remote_code": …}
ANSWERED  {"prefill": [seconds, …], "whole": [seconds, …], "peak_memory": bytes or null, "load_seconds": …,
           "device": "cpu" or the name of a GPU}

`prefill` is the time of all prompts together up to their first new token, `whole` that up to their last; both `repeats`
times in turn, behind one of each that does not count. `peak_memory` is of the process that holds the model, or on a GPU
what the device has in use beyond what it had before.

Every time is told as it is taken, so that whoever started it knows whether it hangs. When that process is gone it ends,
with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # else a CPU with AMX rounds the inputs of 4-bit linears to 8 bits, which is not the scheme that was evaluated
    "VLLM_CPU_INT4_W4A8": "0",
}
"""What is set where the caller's environment does not say otherwise."""


def main(asked: Path, answered: Path) -> None:
    """Answers what is asked, in a file that is there only when all of it has been measured."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]  # modules beside this are not vLLM's
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.getpgrp() == os.getpid():  # a group of its own, which holds nobody else
        threading.Thread(target=_end_behind, args=(os.getppid(),), daemon=True).start()
    content = measured(json.loads(asked.read_text(encoding="utf-8")))
    answered.write_text(json.dumps(content), encoding="utf-8")


def _end_behind(parent: int) -> None:
    """Ends the whole group when the parent is gone: what holds a GPU's memory would outlive a run that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory of one engine."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if torch.cpu._is_amx_tile_supported():
        # Linux kills a process that uses AMX unasked. oneDNN asks, vLLM's own kernels of experts do not.
        torch.cpu._init_amx()
    before = _device_memory()
    started = time.perf_counter()
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    longest = len(asked["prompts"][0])
    engine = LLM(
        asked["checkpoint"],
        dtype=asked["dtype"],
        max_model_len=longest + asked["new_tokens"],
        max_num_seqs=len(prompts),
        # a batch that is computed at once, so that no token is generated before the last prompt is read
        max_num_batched_tokens=max(2048, len(prompts) * longest),
        enable_prefix_caching=False,  # the prompts are the same every time
        kv_cache_memory_bytes=asked["cache"],
        enforce_eager=asked["eager"],
        skip_tokenizer_init=True,
        trust_remote_code=asked["trust_remote_code"],
        disable_log_stats=True,
        seed=0,
    )
    load_seconds = time.perf_counter() - started

    def seconds(tokens: int) -> float:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        found = engine.generate(prompts, wanted, use_tqdm=False)
        taken = time.perf_counter() - begun
        assert all(len(each.outputs[0].token_ids) == tokens for each in found)
        print(f"{tokens} tokens behind each prompt in {taken:.3f} s", flush=True)
        return taken

    def pair() -> tuple[float, float]:
        return seconds(1), seconds(asked["new_tokens"])

    pair()
    pairs = [pair() for _ in range(asked["repeats"])]
    after = _device_memory()
    on_cpu = bool(current_platform.is_cpu())
    on_device = None if before is None or after is None else after - before
    return {
        "prefill": [prefill for prefill, _ in pairs],
        "whole": [whole for _, whole in pairs],
        "peak_memory": _resident_peak() if on_cpu else on_device,
        "load_seconds": load_seconds,
        "device": "cpu" if on_cpu else current_platform.get_device_name(),
    }


def _resident_peak() -> int | None:
    """The most memory that this process or one below it, which holds the model, ever had resident, in bytes."""
    import psutil

    own = psutil.Process()
    found = []
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            found += [int(kibibytes) << 10 for kibibytes in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)]
    return max(found, default=None)


def _device_memory() -> int | None:
    """Bytes in use on the first GPU, by whomever; None where nothing tells."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        with contextlib.suppress(Exception):  # a driver without NVML is no reason to lose the times
            from vllm.utils.import_utils import import_pynvml

            nvml = import_pynvml()
            nvml.nvmlInit()
            handle = nvml.nvmlDeviceGetHandleByIndex(current_platform.device_id_to_physical_device_id(0))
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
