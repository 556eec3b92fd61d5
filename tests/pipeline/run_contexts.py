"""Runs as tests look into them: the context that a stage would be given next, events, and interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from quantcli.pipeline import engine
from quantcli.pipeline.context import Context
from quantcli.pipeline.rundir import open_run
from quantcli.recipe import load_recipe

Recipe = dict[str, Any]
Event = dict[str, Any]


class Interrupted(Exception):
    pass


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """A copy with other values; two underscores go down a section: quantize__rollback__level=3."""
    copy: Recipe = json.loads(json.dumps(recipe))
    for keys, value in values.items():
        *path, last = keys.split("__")
        section = copy
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    return copy


@contextmanager
def opened(recipe: Recipe, until: str) -> Iterator[Context]:
    """The recipe run as far as stage `until`, and the context that its next stage would have."""
    loaded = load_recipe(recipe)
    result = engine.run_recipe(loaded, until=until)
    with open_run(Path(recipe["output"]), Path(recipe["model"]["path"])) as run:
        yield Context(loaded, Path(recipe["model"]["path"]), result.plan, run, "cpu", results=result.stages)


def interrupt(stage: str, number: int, *kinds: str) -> Callable[[Mapping[str, Any]], None]:
    """A listener that ends the run at the n-th event of these kinds in a stage."""
    left = [number]

    def listener(event: Mapping[str, Any]) -> None:
        if event["stage"] == stage and event["event"] in kinds:
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted

    return listener


def float_model(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """The model as transformers loads it, whole."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **settings).eval()


def read(recipe: Recipe, *parts: str) -> Any:
    """A JSON file of a run."""
    return json.loads(Path(recipe["output"]).joinpath(*parts).read_text(encoding="utf-8"))
