"""Files that strangers made: regular ones only, of bounded size, and JSON that says one thing.

A model directory may come from anywhere. Nothing of it is opened that can block or never ends (pipes, sockets,
devices), no more of a file is held than its kind can need, and JSON with a key twice is refused, of which one reader
takes the first value and the next the last. Links are followed: the hub's cache, and users, keep files elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from quantcli.errors import ModelError

MAXIMUM_JSON_BYTES = 64 << 20
"""The index of a model of 200 000 tensors has 20 MB, the largest tokenizers 35."""
MAXIMUM_JSON_VALUES = 4 << 20
"""Objects, lists and commas of a JSON file, which bound what it takes in memory: about 300 bytes each at most."""
_READ_WHOLE = re.compile(
    r".*(config|token|vocab|merges|template|processor).*\.(json|txt)|.*\.(jinja|model|tiktoken|py)"
)


TEMPLATES = "additional_chat_templates"
"""The folder of chat templates beside the first, as transformers has it."""


def checkpoint_entries(directory: Path) -> list[Path]:
    """What lies in the directory of a checkpoint, and in the folder of its further chat templates."""
    return [*sorted(directory.iterdir()), *sorted((directory / TEMPLATES).glob("*.jinja"))]


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ModelError for any other, with the place."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("it is no regular file")
            with open(handle, "rb", closefd=False) as file:
                content = file.read(limit + 1)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if len(content) > limit:
        raise ModelError(f"{path} is larger than {limit / 2**20:.0f} MB, which no model needs.",
                         "Do not use this checkpoint.")  # fmt: skip
    return content


def parse_object(content: bytes, place: str) -> dict[str, Any]:
    """A JSON object from bytes whose number is bounded. Raises ModelError for other JSON, and for a key twice."""
    values = sum(map(content.count, (b",", b"[", b"{")))  # those inside of strings are counted in vain
    if values > MAXIMUM_JSON_VALUES:
        raise ModelError(f"{place} holds {values} values, which no model needs.", "Do not use this checkpoint.")
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{place} cannot be read as JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{place} does not hold a JSON object.")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return found


def brings_code(directory: Path) -> bool:
    """Whether a model's configuration, or its tokenizer's, names Python code that lies beside it."""
    files = [directory / name for name in ("config.json", "tokenizer_config.json")]
    return any("auto_map" in parse_object(read_regular(f, MAXIMUM_JSON_BYTES), str(f)) for f in files if f.is_file())


def check_texts(directory: Path) -> None:
    """Raise ModelError for a file beside the weights that transformers may read whole and that is not regular or is
    larger than MAXIMUM_JSON_BYTES. Folders are left alone, and so are links to nothing."""
    for file in checkpoint_entries(directory):
        if not _READ_WHOLE.fullmatch(file.name):
            continue
        try:
            status = file.stat()
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{file} is no regular file.", "Put the file itself there, or remove it.")
        if status.st_size > MAXIMUM_JSON_BYTES:
            raise ModelError(f"{file} is larger than {MAXIMUM_JSON_BYTES >> 20} MB, which no model needs.",
                             "Do not use this checkpoint.")  # fmt: skip


def check_links(files: list[Path], directory: Path) -> None:
    """Raise ModelError for a link among the files of a model that leaves it, since what it leads to would be copied.

    Inside the model directory links may lead anywhere, and in the hub's cache to the blobs beside the snapshots:
    models--X/snapshots/REVISION/FILE → models--X/blobs/HASH.
    """
    root = directory.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in files:
        target = file.resolve()
        if not any(place in target.parents for place in allowed):
            raise ModelError(f"{file} leads out of the model, to {target}, and would be copied into the export.",
                             "Put the file itself there if it belongs to the model.")  # fmt: skip
