"""throughput: speed and memory of the float and of the exported model in a serving engine, taking turns."""

from __future__ import annotations

import time
from typing import Any

from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.throughput import (
    cache_size,
    compared,
    engine_of,
    machine,
    serve,
    served_dtype,
    served_format,
    settings,
    summarized,
)
from quantcli.recipe.comparison import ThroughputSection
from quantcli.recipe.schema import Recipe

RESULTS = "results.json"
MODELS = ("float", "quantized")


def _section(recipe: Recipe) -> ThroughputSection:
    assert recipe.evaluate is not None
    assert recipe.evaluate.throughput is not None
    return recipe.evaluate.throughput


def _identity(context: Context) -> dict[str, Any]:
    section = _section(context.recipe)
    engine = engine_of(section)
    return {
        "throughput": section.model_dump(mode="json", exclude={"python", "timeout"}),
        "dtype": context.recipe.model.dtype,
        "engine": [engine.version, engine.cpu],
        "machine": machine(),
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes results.json: rates and memory of both models, and their changes; beside it the engine's messages.

    A process of the engine holds one model and ends before the next begins. The models take turns, the second round in
    the other order, so that neither always meets the machine as the other left it.
    """
    from quantcli.model.skeleton import load_config

    section, trust = _section(context.recipe), context.recipe.model.trust_remote_code
    engine = engine_of(section)
    form = served_format(context.recipe, context.plan, engine)
    dtype = served_dtype(context.recipe, context.plan)
    room = cache_size(load_config(context.model, trust_remote_code=trust), section)
    prompts = _prompts(context, section)
    places = dict(zip(MODELS, (context.model, context.folder("export") / form), strict=True))
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    logs = {name: folder.path / f"vllm-{name}.log" for name in MODELS}
    for log in logs.values():
        log.unlink(missing_ok=True)
    for index in range(section.rounds):
        for name in MODELS if index % 2 == 0 else reversed(MODELS):
            started = time.perf_counter()
            answer = serve(
                engine,
                section,
                places[name],
                prompts,
                logs[name],
                dtype=dtype,
                cache_bytes=room,
                trust_remote_code=trust,
            )
            answers[name].append(answer)
            context.emit(
                "served",
                model=name,
                number=sum(map(len, answers.values())),
                of=2 * section.rounds,
                seconds=round(time.perf_counter() - started, 3),
            )
    before, after = (summarized(answers[name], section) for name in MODELS)
    device = answers["float"][0]["device"]
    content = {
        "engine": "vLLM",
        "version": engine.version,
        "device": machine() if device == "cpu" else device,
        "environment": settings(),
        "checkpoint": form,
        "dtype": dtype,
        **section.model_dump(include={"prompt_tokens", "new_tokens", "batch", "repeats", "rounds", "eager"}),
        "float_model": before,
        "quantized": after,
        "change": compared(before, after),
    }
    for log in logs.values():
        folder.add(log)
    write_json(folder.path / RESULTS, content)
    folder.add(folder.path / RESULTS)


def _prompts(context: Context, section: ThroughputSection) -> list[list[int]]:
    """Tokens of built-in text, over and over where it is too short, so that a mixture routes them as text."""
    from quantcli.calibration.datasets import load_texts

    text = "\n\n".join(load_texts("builtin", split="test"))
    tokens: list[int] = context.tokenizer()(text, verbose=False).input_ids
    length = section.prompt_tokens
    return [
        [tokens[place % len(tokens)] for place in range(number * length, (number + 1) * length)]
        for number in range(section.batch)
    ]


STAGE = Stage(
    "throughput",
    ("export",),
    lambda recipe: recipe.evaluate is not None and recipe.evaluate.throughput is not None and recipe.export is not None,
    _identity,
    run,
    lambda _: (RESULTS, "vllm-*.log"),
    guards=("check", "verify"),
    title="Measuring speed in vLLM",
    asked_by="evaluate.throughput",
)
