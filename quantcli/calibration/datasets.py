"""Texts to calibrate and evaluate with: the built-in prose, local files, hub data sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from quantcli.calibration.builtin_text import builtin_documents
from quantcli.errors import DataError

DEFAULT_FIELDS = ("text", "prompt", "inputs_pretokenized", "content")

Loader = Callable[[Path | None, str | None, str], list[str]]


def load_texts(dataset: str, *, path: Path | None = None, field: str | None = None, split: str = "train") -> list[str]:
    """The documents of a data set, in a fixed order.

    Args:
        dataset: a key of DATASETS, or a hub name with a slash, which the `datasets` library reads.
        path: local file or directory; required for text, jsonl and parquet, optional for wikitext2, refused otherwise.
        field: the column that holds the text (jsonl, parquet, hub); by default the first of DEFAULT_FIELDS present.
        split: for hub data sets, builtin (train, test: disjoint) and directories of wikitext2; a file is read whole.

    Raises:
        DataError: the name is unknown, an option does not apply, or the data is missing, unreadable or empty.
    """
    if "/" in dataset:
        documents = _load_hub(dataset, path, field, split)
    elif dataset in DATASETS:
        documents = DATASETS[dataset](path, field, split)
    else:
        raise _unknown(dataset)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"The data set {dataset}{_at(path)} holds no text.", "Choose data that holds text.")
    return documents


def data_fingerprint(dataset: str, path: Path | None, field: str | None, split: str) -> str:
    """SHA-256, in hexadecimal, of what decides the text that load_texts returns for the same arguments.

    That is the contents of local files (not their place), the built-in text itself, or a hub data set's name and split;
    a hub data set that changes under its name is not noticed.
    """
    digest = hashlib.sha256(json.dumps([dataset, field]).encode())
    if "/" in dataset or (dataset == "wikitext2" and path is None):
        digest.update(b"split " + split.encode())
    elif dataset == "builtin":
        for document in load_texts(dataset, path=path, field=field, split=split):
            digest.update(hashlib.sha256(document.encode()).digest())
    elif dataset in DATASETS:
        for file in _wikitext2_files(_given(path, dataset), split) if dataset == "wikitext2" else _files(path, dataset):
            digest.update(file.suffix.encode() + _file_digest(file))
    else:
        raise _unknown(dataset)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ data sets


def _load_builtin(path: Path | None, field: str | None, split: str) -> list[str]:
    if path is not None:
        raise DataError(f"The data set builtin takes no path, but got {path}.", "Drop path, or set dataset: text.")
    _refuse_field(field, "builtin")
    if split not in ("train", "test"):
        raise DataError(f"The data set builtin has no split {split!r}.", "Use train or test.")
    every_third = slice(2, None, 3)
    documents = list(builtin_documents())
    if split == "test":
        documents = documents[every_third]
    else:
        del documents[every_third]
    if not documents:
        raise DataError(
            "This Python installation lacks the documentation that the data set builtin is made of.",
            "Set dataset: text and path to a file of your own.",
        )
    return documents


def _load_wikitext2(path: Path | None, field: str | None, split: str) -> list[str]:
    """One document: a file's text verbatim, or rows joined by blank lines, as the usual protocols tokenize it."""
    _refuse_field(field, "wikitext2")
    if path is None:
        rows = _hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", None, _SPLITS.get(split, (split,))[-1])
        return ["\n\n".join(rows)]
    files = _wikitext2_files(path, split)
    if files[0].suffix == ".parquet":
        return ["\n\n".join(row for file in files for row in _parquet_rows(file, "text"))]
    return [_read_text(file) for file in files]


def _load_text(path: Path | None, field: str | None, split: str) -> list[str]:
    _refuse_field(field, "text")
    return [_read_text(file) for file in _files(path, "text")]


def _load_jsonl(path: Path | None, field: str | None, split: str) -> list[str]:
    return [text for file in _files(path, "jsonl") for text in _json_rows(file, field)]


def _load_parquet(path: Path | None, field: str | None, split: str) -> list[str]:
    return [text for file in _files(path, "parquet") for text in _parquet_rows(file, field)]


def _load_hub(name: str, path: Path | None, field: str | None, split: str) -> list[str]:
    if path is not None:
        raise DataError(
            f"The hub data set {name} takes no path, but got {path}.",
            "Drop path, or set dataset to the file's kind: text, jsonl or parquet.",
        )
    return _hub_rows(name, None, field, split)


DATASETS: dict[str, Loader] = {
    "builtin": _load_builtin,
    "wikitext2": _load_wikitext2,
    "text": _load_text,
    "jsonl": _load_jsonl,
    "parquet": _load_parquet,
}

_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",), "parquet": (".parquet",)}
# Names of a split in file names; the last is the hub's.
_SPLITS = {"valid": ("valid", "validation"), "validation": ("valid", "validation")}


# ------------------------------------------------------------------------------------------------------ local files


def _given(path: Path | None, dataset: str) -> Path:
    if path is None:
        raise DataError(f"The data set {dataset} needs a path.", "Set path to a local file or directory.")
    if not path.exists():
        raise DataError(f"The path {path} of the data set {dataset} does not exist.", "Correct path.")
    return path


def _files(path: Path | None, dataset: str) -> list[Path]:
    """The file itself, or a directory's files of the data set's kind, sorted by name."""
    path = _given(path, dataset)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES[dataset] and file.is_file())
    if not files:
        kinds = " or ".join(_SUFFIXES[dataset])
        raise DataError(f"The directory {path} holds no {kinds} file.", "Set path to a file, or to another directory.")
    return files


def _wikitext2_files(path: Path, split: str) -> list[Path]:
    """The file itself, or the directory's file of the split: one text, or all shards of a parquet."""
    path = _given(path, "wikitext2")
    if not path.is_dir():
        return [path]
    names = _SPLITS.get(split, (split,))
    matching = sorted(
        file for file in path.iterdir() if file.is_file() and set(re.split(r"[._-]", file.name)) & set(names)
    )
    for suffix in (".tokens", ".raw", ".txt", ".parquet"):
        files = [file for file in matching if file.suffix == suffix]
        if len(files) > 1 and suffix != ".parquet":
            listed = ", ".join(file.name for file in files)
            raise DataError(f"The directory {path} holds several files of split {split}: {listed}.", "Set path to one.")
        if files:
            return files
    present = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise DataError(
        f"The directory {path} holds no wikitext2 file of split {split} (wiki.{split}.tokens); it holds {present}.",
        "Set path to the file to use.",
    )


def _read_text(file: Path) -> str:
    """A UTF-8 file's text with line ends as newlines, without a byte order mark."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"The file {file} cannot be read: {error.strerror}.", "Check path and permissions.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{line}: byte {error.start} is not UTF-8.",
            "Convert the file to UTF-8, or name another kind of data.",
        ) from error
    if not text.strip():
        raise DataError(f"The file {file} is empty.", "Fill it, remove it, or set path to another.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(file: Path, field: str | None) -> Iterator[str]:
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{place}: no valid JSON: {reason}.", "Write one JSON object a line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a JSON object.", "Write one JSON object a line.")
        yield _text(row[_choose_field(row, field, place)], place)


def _parquet_rows(file: Path, field: str | None) -> list[str]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise DataError(f"Reading {file} needs pyarrow.", "Install it: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        column = _choose_field(table.schema_arrow.names, field, str(file))
        values = table.read(columns=[column]).column(column).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"The file {file} cannot be read as parquet: {_first_line(error)}.", "Check path.") from error
    return [_text(value, f"{file}, row {row}") for row, value in enumerate(values) if value is not None]


def _file_digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"The file {file} cannot be read: {error.strerror}.", "Check path and permissions.") from error
    return digest.digest()


# ------------------------------------------------------------------------------------------------------ the hub


def _hub_rows(name: str, config: str | None, field: str | None, split: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"Reading the hub data set {name} needs the datasets library.",
            'Install it: pip install "quantcli[hub]", or set path to a local copy.',
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # whatever network, cache, hub and data set reader raise
        raise DataError(
            f"The hub data set {name}, split {split}, cannot be read: {_first_line(error)}.",
            "Check name, split and network, or set path to a local copy.",
        ) from error
    column = _choose_field(rows.column_names, field, name)
    return [_text(value, f"{name}, row {row}") for row, value in enumerate(rows[column]) if value is not None]


# ------------------------------------------------------------------------------------------------------ checks


def _choose_field(present: Iterable[str], field: str | None, place: str) -> str:
    names = list(present)
    wanted = DEFAULT_FIELDS if field is None else (field,)
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"{place}: no field {' or '.join(wanted)}; there is {', '.join(names) or 'none'}.",
        "Set field to the one that holds the text.",
    )


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{place}: the field holds {type(value).__name__}, not text.", "Set field to one that holds text."
        )
    return value


def _refuse_field(field: str | None, dataset: str) -> None:
    if field is not None:
        raise DataError(f"The data set {dataset} has no fields, but field is {field!r}.", "Drop field.")


def _unknown(dataset: str) -> DataError:
    nearest = get_close_matches(dataset, DATASETS, n=1)
    hint = f"Did you mean {nearest[0]}? " if nearest else ""
    return DataError(
        f"There is no data set {dataset!r}.", f"{hint}Use {', '.join(DATASETS)} or a hub name with a slash."
    )


def _at(path: Path | None) -> str:
    return "" if path is None else f" at {path}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
