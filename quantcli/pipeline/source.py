"""Where the model of a recipe lies: a directory, a .gguf file that is converted once, or a name on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, OutputError, RecipeError, first_line, is_of_library, refusal_of_the_system
from quantcli.formats.table import quantized_as
from quantcli.model.checkpoint import Checkpoint, read_json
from quantcli.model.float_weights import require_floats
from quantcli.model.hub import hub_asked
from quantcli.model.structure import Structure
from quantcli.model.structure_cache import cache_directory, find_structure
from quantcli.model.untrusted import check_texts, checkpoint_entries
from quantcli.pipeline.rundir import is_run, room_errors
from quantcli.recipe.data import CalibrationSection, PerplexitySection
from quantcli.recipe.schema import ModelSection

if TYPE_CHECKING:
    from quantcli.pipeline.context import Listener

_OF_TOKENIZER = re.compile(r"token|vocab|merges|\.model$")
CONFIGURATION_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*"]


def locate_model(section: ModelSection, *, weights: bool = True, listener: Listener | None = None) -> Path:
    """A local model directory. With `weights=False` a hub model is fetched without them, which is enough for a plan.

    A .gguf file is converted once into $XDG_CACHE_HOME/quantcli/models, keyed by its size, time and first megabyte.
    Raises ModelError when there is no such model.
    """
    path = Path(section.path)
    local = path.is_absolute()  # a relative path that a recipe still has is a name on the hub
    if local and path.is_dir():
        return path
    if local and path.is_file():
        if path.suffix == ".gguf":
            return _converted(path, "bfloat16" if section.dtype == "auto" else section.dtype, listener)
        raise ModelError(f"{path} is neither a model directory nor a .gguf file.", "Name the directory that it is in.")
    if local or path.suffix == ".gguf" or section.path.count("/") != 1:
        named = " A name on the hub is ORG/NAME." if not local and path.suffix != ".gguf" else ""
        raise ModelError(
            f"There is no model at {path}.",
            f"Check model.path or --model; in a recipe relative paths start at its file.{named}",
        )
    return _from_hub(section.path, section.revision, weights, listener)


def float_structure(directory: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> Structure:
    """The structure of a float model. Raises ModelError for one that is quantized, also if nothing but its tensors says
    so, which are looked at where they are there and whole: a plan is made without, and a run refuses damage."""
    if (method := quantized_as(directory)) is not None:
        how = " docs/troubleshooting.md shows how FP8 blocks become one." if method == "fp8" else ""
        raise ModelError(f"{directory} is already quantized ({method}).", f"Start from the float model.{how}")
    structure = find_structure(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        checkpoint = Checkpoint(directory)
    except ModelError:
        return structure
    require_floats(directory, structure, checkpoint, trust_remote_code=trust_remote_code)
    return structure


def require_checkpoint(path: Path, *, scored: bool = False) -> None:
    """Raise ModelError unless a path from the command line is a directory with a config.json; what is only to be
    `scored` may be a file, or a name on the hub."""
    if path.is_file() and not scored:
        raise ModelError(f"{path} is a file, not the directory of a checkpoint.", where_checkpoints_are(path))
    if path.is_dir() and not (path / "config.json").is_file():
        kind = "a run directory" if is_run(path) else "a directory without a config.json"
        raise ModelError(f"{path} is {kind}, not a checkpoint.", where_checkpoints_are(path))
    named = scored and not path.is_absolute() and str(path).count("/") == 1
    if not path.exists() and not named:
        raise ModelError(f"There is no checkpoint at {path}.", "Check the path.")


def where_checkpoints_are(path: Path) -> str:
    """What to name in the place of a path that is no checkpoint."""
    if path.is_file():
        if (path.parent / "config.json").is_file():
            return f"Name the directory that it is in: {path.parent}."
        if path.suffix == ".gguf":
            return "A .gguf file alone is read as a float model: quantcli eval-ppl --checkpoint scores it."
        return "Name the directory that it is in, with its config.json."
    found = sorted({*path.glob("*/config.json"), *path.glob("export/*/config.json")})
    if found:
        return f"Name one of its checkpoints: {', '.join(str(file.parent) for file in found[:8])}."
    return "Name a directory with weights and their config.json."


def _converted(file: Path, dtype: str, listener: Listener | None) -> Path:
    status = file.stat()
    with file.open("rb") as opened:
        key = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns} {dtype}".encode() + opened.read(1 << 20))
    if (cache := cache_directory()) is None:
        raise OutputError("There is no home directory, where .gguf files are converted to.",
                          "Set XDG_CACHE_HOME to a directory that you may write to.")  # fmt: skip
    cache = cache / "models"
    destination = cache / f"{file.stem}-{key.hexdigest()[:16]}"
    if not destination.is_dir():
        if listener is not None:
            listener({"event": "note", "stage": "", "text": f"{file.name} is converted once, to {destination}."})
        import torch

        from quantcli.model.gguf import convert_gguf

        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cache} cannot be made, where .gguf files are converted to: {error.strerror}.",
                              "Set XDG_CACHE_HOME to a directory that you may write to.") from error  # fmt: skip
        with room_errors(cache):
            convert_gguf(file, destination, getattr(torch, dtype))
    return destination


def _from_hub(name: str, revision: str | None, weights: bool, listener: Listener | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = CONFIGURATION_FILES + (["*.safetensors"] if weights else [])
    with hub_asked() as obstacle:
        if listener is not None and not obstacle:
            listener({"event": "note", "stage": "", "text": f"What is not there yet of {name} comes from the hub."})
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        except Exception as error:  # of the hub, the network, the library's HTTP client and its cache
            if isinstance(error, MemoryError) or refusal_of_the_system(error) is not None:
                raise
            said = f"the hub does not give it: {first_line(error)}"
            if obstacle:
                said = f"{obstacle}, nor is all of it in the hub's cache"
            remedy = "Check the name, the network, and `hf auth login` for gated and private models."
            raise ModelError(f"There is no directory {name}, and {said}.", remedy) from error


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    check_texts(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except BaseException as error:
        if not is_of_library(error):
            raise
        first = first_line(error)
        if not any(_OF_TOKENIZER.search(file.name) for file in directory.iterdir()):
            first = "there is no file of one"
        raise ModelError(f"{directory} has no usable tokenizer: {first}.",
                         "Put the tokenizer's files beside the weights.") from error  # fmt: skip


def model_identity(directory: Path) -> dict[str, object]:
    """What tells one state of a model directory from another: names, sizes and times of its files.

    Times stand in for contents, as with make: hashing the weights of a 70B model would cost minutes on every run.
    """
    files = [file for file in checkpoint_entries(directory) if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(directory).as_posix(): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def known_positions(model: Path) -> int | None:
    """The longest sequence that config.json says the model was made for, if it says so."""
    config = read_json(model / "config.json")
    for section in (config, config.get("text_config")):
        for key in ("max_position_embeddings", "n_positions", "seq_length"):
            if isinstance(section, dict) and type(section.get(key)) is int and section[key] > 0:
                return int(section[key])
    return None


def beyond_positions(model: Path, key: str, section: CalibrationSection | PerplexitySection) -> RecipeError | None:
    """What is wrong with sequences that are longer than the model has positions for; None if they are not."""
    longest = known_positions(model)
    # windows of protocol lm-eval hold one token more: the last that is predicted
    extra = int(isinstance(section, PerplexitySection) and section.protocol == "lm-eval")
    if longest is None or section.sequence_length <= longest - extra:
        return None
    return RecipeError(
        f"{key}.sequence_length: is {section.sequence_length}, and the model has {longest} positions.",
        f"Set it to {longest - extra} or less.",
    )


def require_positions(model: Path, key: str, section: CalibrationSection | PerplexitySection) -> None:
    """Raise RecipeError for such sequences."""
    if (error := beyond_positions(model, key, section)) is not None:
        raise error


def require_known_tokens(samples: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Raise ModelError for token ids that the model has no embedding for."""
    highest = max(max(sample) for sample in samples)
    if highest >= vocabulary:
        raise ModelError(f"The tokenizer gives token {highest}, and the model knows {vocabulary}.",
                         "The tokenizer belongs to another model.")  # fmt: skip
