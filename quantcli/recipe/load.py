"""From a recipe file, a shipped recipe's name or a mapping to a validated recipe, with command-line overrides."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from quantcli.errors import RecipeError
from quantcli.recipe.document import Document, dump_yaml, mapping_document, parse_yaml, read_document
from quantcli.recipe.explain import recipe_error
from quantcli.recipe.schema import Recipe
from quantcli.recipe.shipped import expanded, shipped_names, shipped_path

_PATHS = (
    ("model", "path"),
    ("calibration", "path"),
    ("evaluate", "perplexity", "path"),
    ("evaluate", "reference"),
    ("evaluate", "throughput", "python"),
    ("output",),
)


def load_recipe(
    source: str | Path | Mapping[str, object],
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | None = None,
    device: str | None = None,
    default_output: str | None = None,
) -> Recipe:
    """Read, override and validate a recipe.

    `source` is a file, the name of a shipped recipe, or a mapping. `overrides` are `a.b.c=VALUE` with VALUE in YAML;
    `model`, `output` and `device` then set model.path, output and model.device; `default_output` stands where the
    recipe has no output. Relative paths in a user's file are
    taken from its directory; those in options, pipes and mappings from the current one, those in shipped recipes as if
    they lay in `recipes` there. The recipe
    holds absolute paths, except that a model.path which is no local path stays a hub name.

    Raises RecipeError for anything wrong, with file and line, key and remedy.
    """
    document = _open(source)
    for override in overrides:
        _override(document, override)
    for option, keys, value in (
        ("--model", ("model", "path"), model),
        ("--output", ("output",), output),
        ("--device", ("model", "device"), device),
    ):
        if value is not None:
            document.set(keys, value, option)
    if document.data.get("output") is None and default_output is not None:
        document.set(("output",), default_output, "--output")
    if document.data.get("model") is None:
        document.data["model"] = {}  # so that what is missing is model.path
    if document.data.get("quantize", ...) is None:
        del document.data["quantize"]  # null is as good as absent, and it is required
    _resolve_paths(document)
    try:
        return _as_served(Recipe.model_validate(document.data))
    except ValidationError as error:
        raise recipe_error(error, document) from None


def _as_served(recipe: Recipe) -> Recipe:
    """With the arithmetic of vLLM on a CPU, if the recipe says none and names that engine alone: it rounds an fp8 cache
    otherwise than all others."""
    evaluate, cache = recipe.evaluate, recipe.quantize.kv_cache
    perplexity = None if evaluate is None else evaluate.perplexity
    if evaluate is None or perplexity is None or "arithmetic" in perplexity.model_fields_set:
        return recipe
    if recipe.export is None or recipe.export.engines != ("vllm-cpu",) or cache is None or cache.type != "float":
        return recipe
    perplexity = perplexity.model_copy(update={"arithmetic": "vllm-cpu"})
    return recipe.model_copy(update={"evaluate": evaluate.model_copy(update={"perplexity": perplexity})})


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in. Loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _open(source: str | Path | Mapping[str, object]) -> Document:
    if isinstance(source, Mapping):
        return mapping_document(source, Path.cwd())
    path, name = expanded(source), str(source)
    try:
        _refuse_model(path, name)
        if path.is_file():
            return read_document(path, path.absolute().parent)
        if path.is_fifo():  # as <(…) of a shell, or /dev/stdin behind a pipe
            return read_document(path, Path.cwd())
    except PermissionError as error:
        raise RecipeError(f"{path}: {error.strerror}.", "Check who may read it and enter its directory.") from error
    if isinstance(source, Path) or os.sep in name or path.suffix in (".yaml", ".yml"):
        raise RecipeError(
            f"{name}: no such recipe file.", "Check the path, or name a shipped recipe: quantcli recipes list."
        )
    return read_document(shipped_path(name), Path.cwd() / "recipes")  # where its file lies in a checkout


def _refuse_model(path: Path, name: str) -> None:
    """Refuse what is often named where a recipe belongs: a run directory, or the model itself."""
    if name in shipped_names():  # a directory may be called so, too
        return
    if (path / "run.json").is_file():
        raise RecipeError(f"{name} is a run directory, not a recipe.", f"Name its recipe: {path / 'recipe.yaml'}.")
    if (path / "config.json").is_file() or (path.suffix in (".gguf", ".safetensors") and path.is_file()):
        remedy = f"A model comes behind --model, as in w8a8-dynamic --model {shlex.quote(name)} --output DIRECTORY."
        raise RecipeError(f"{name} is a model, not a recipe.", remedy)


def _override(document: Document, override: str) -> None:
    option = f"--set {override}"
    dotted_keys, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in dotted_keys.split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{option}: is no KEY=VALUE.", "Write it as --set quantize.weights.bits=4.")
    value, _ = parse_yaml(text, lambda _: option)
    document.set(keys, value, option)


def _resolve_paths(document: Document) -> None:
    mix = document.get(("calibration", "mix"))
    mixed = [("calibration", "mix", index, "path") for index in range(len(mix))] if isinstance(mix, list) else []
    tasks = document.get(("evaluate", "tasks"))
    if isinstance(tasks, list):
        mixed += [("evaluate", "tasks", i, "path") for i, task in enumerate(tasks) if isinstance(task, dict)]
    for keys in (*_PATHS, *mixed):
        text = document.get(keys)
        if not isinstance(text, str) or not text:
            continue
        base = Path.cwd() if document.from_command_line(keys) else document.base
        path = _absolute(base, text)
        if keys == ("model", "path") and not _is_local_model(text, path):
            continue
        document.get(keys[:-1])[keys[-1]] = path


def _is_local_model(text: str, path: str) -> bool:
    # A hub name is "org/name"; with more slashes it can only be a path, even one that does not exist.
    looks_local = text.startswith(("/", "./", "../", "~")) or text in (".", "..") or text.endswith(".gguf")
    return looks_local or text.rstrip("/").count("/") > 1 or Path(path).exists()


def _absolute(base: Path, text: str) -> str:
    path = base / expanded(text)
    if ".." in path.parts:
        # A link before ".." is followed first, as the system does; a link at the end keeps its name.
        path = path.resolve() if path.name == ".." else path.parent.resolve() / path.name
    return str(path)
