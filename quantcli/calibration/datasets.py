"""Texts to calibrate and evaluate with: the built-in prose, local files, hub data sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from quantcli.calibration.builtin_text import builtin_documents
from quantcli.calibration.conversations import Turn, rendered, turns_of
from quantcli.calibration.tables import choose_field, hub_column, hub_split, hub_table, parquet_column
from quantcli.errors import DataError, first_line

PROMPT_FIELDS = ("prompt", "inputs_pretokenized")
"""Columns whose rows are prompts, complete by themselves; rows of other columns may be pieces of one text."""


class Document(NamedTuple):
    """One document of a data set: its text, its place in the words of a message, and whether it is one prompt.

    A conversation has turns; its text is empty until a tokenizer's template has made it, with special tokens of its
    own.
    """

    text: str
    place: str
    prompt: bool = False
    turns: tuple[Turn, ...] = ()


Loader = Callable[[Path | None, str | None, str], list[Document]]


def load_texts(
    dataset: str,
    *,
    path: Path | None = None,
    field: str | None = None,
    split: str = "train",
    subset: str | None = None,
    tokenizer: Any = None,
) -> list[str]:
    """The texts of load_documents, with its arguments and errors."""
    found = load_documents(dataset, path=path, field=field, split=split, subset=subset, tokenizer=tokenizer)
    return [document.text for document in found]


def load_documents(
    dataset: str,
    *,
    path: Path | None = None,
    field: str | None = None,
    split: str = "train",
    subset: str | None = None,
    tokenizer: Any = None,
) -> list[Document]:
    """The documents of a data set, in a fixed order, without those that are blank.

    Args:
        dataset: a key of DATASETS, or a hub name with a slash, which the `datasets` library reads.
        path: local file or directory; required for text, lines, jsonl and parquet, optional for wikitext2 and boolq,
            refused otherwise.
        field: the column that holds the text or the messages (jsonl, parquet, hub); by default the first of
            `tables.DEFAULT_FIELDS` present, in JSON lines the first that is not null in the row.
        split: for hub data sets, builtin (train, test: disjoint) and directories of wikitext2 and boolq; a file is
            read whole.
        subset: of a hub data set that has several.
        tokenizer: a transformers tokenizer, whose template makes text of conversations; without it their text is empty.

    Raises:
        DataError: the name is unknown, an option does not apply, the data is missing, unreadable or empty, a prompt is
            blank, or a conversation is none that the template takes.
    """
    if "/" in dataset:
        documents = _load_hub(dataset, path, field, split, subset)
    elif dataset in DATASETS:
        documents = DATASETS[dataset](path, field, split)
    else:
        raise _unknown(dataset)
    documents = _checked(documents, tokenizer, dataset, path)
    return [document for document in documents if document.text.strip() or document.turns]


def load_rows(
    dataset: str,
    *,
    path: Path | None = None,
    field: str | None = None,
    split: str = "train",
    subset: str | None = None,
    tokenizer: Any = None,
) -> list[str] | None:
    """The rows of a table, as they are and blank ones too: of parquet, of the hub, and of wikitext2 from either. None
    for other data sets. Arguments and errors are those of load_documents."""
    if dataset == "wikitext2":
        rows = _wikitext2_rows(path, split)
    elif dataset == "parquet":
        rows = _load_parquet(path, field, split)
    else:
        rows = _load_hub(dataset, path, field, split, subset) if "/" in dataset else None
    return None if rows is None else [row.text for row in _checked(rows, tokenizer, dataset, path)]


def _checked(documents: list[Document], tokenizer: Any, dataset: str, path: Path | None) -> list[Document]:
    """The documents with conversations rendered; refuses those that cannot be used, or that are all blank."""
    if tokenizer is not None:
        documents = [
            each._replace(text=rendered(each.turns, tokenizer, each.place)) if each.turns else each
            for each in documents
        ]
    for document in documents:
        _require_characters(document)
        if document.prompt and not document.text.strip() and not document.turns:
            raise DataError(f"{document.place}: the prompt is empty.", "Fill it, or remove the row.")
    if not any(document.text.strip() or document.turns for document in documents):
        raise DataError(f"The data set {dataset}{_at(path)} holds no text.", "Choose data that holds text.")
    return documents


def data_fingerprint(dataset: str, path: Path | None, field: str | None, split: str, subset: str | None = None) -> str:
    """SHA-256, in hexadecimal, of what decides the text that load_texts returns for the same arguments.

    That is the contents of local files (not their place), the built-in text itself, or a hub data set's name, subset
    and split; a hub data set that changes under its name is not noticed.
    """
    digest = hashlib.sha256(json.dumps([dataset, field, *([] if subset is None else [subset])]).encode())
    if "/" in dataset or (dataset in ("wikitext2", "boolq") and path is None):
        digest.update(b"split " + split.encode())
    elif dataset == "builtin":
        for document in load_texts(dataset, path=path, field=field, split=split):
            digest.update(hashlib.sha256(document.encode()).digest())
    elif dataset in DATASETS:
        for file in _local_files(dataset, path, split):
            digest.update(file.suffix.encode() + _file_digest(file))
    else:
        raise _unknown(dataset)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ data sets


def _load_builtin(path: Path | None, field: str | None, split: str) -> list[Document]:
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
    return [Document(text, f"builtin, document {number}") for number, text in enumerate(documents, start=1)]


def _load_wikitext2(path: Path | None, field: str | None, split: str) -> list[Document]:
    """One document: a file's text verbatim, or rows joined by blank lines, as the usual protocols tokenize it."""
    _refuse_field(field, "wikitext2")
    rows = _wikitext2_rows(path, split)
    if rows is not None:
        place = "Salesforce/wikitext" if path is None else str(path)
        return [Document("\n\n".join(row.text for row in rows), place)]
    assert path is not None
    return [Document(_read_text(file), str(file)) for file in _wikitext2_files(path, split)]


def _wikitext2_rows(path: Path | None, split: str) -> list[Document] | None:
    """A row for each line of wikitext2, from the hub or from parquet; None if it is a text."""
    if path is None:
        table = hub_table("Salesforce/wikitext", "wikitext-2-raw-v1", hub_split(split))
        return _column_documents(*hub_column(table, None, "Salesforce/wikitext"), "Salesforce/wikitext")
    files = _wikitext2_files(path, split)
    if files[0].suffix != ".parquet":
        return None
    return [row for file in files for row in _parquet_documents(file, "text")]


def _load_boolq(path: Path | None, field: str | None, split: str) -> list[Document]:
    """One prompt a question; from the hub, whose rows have no title, without `path`."""
    _refuse_field(field, "boolq")
    return [Document(boolq_prompt(row, place), place, prompt=True) for row, place in boolq_rows(path, split)]


def boolq_rows(path: Path | None, split: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of BoolQ, of a local file or from the hub, each with its place. Raises DataError as load_documents."""
    if path is None:
        for number, row in enumerate(hub_table("google/boolq", None, hub_split(split))):
            yield row, f"google/boolq, row {number}"
    else:
        for file in _boolq_files(path, split):
            yield from _json_rows(file)


def squad_rows() -> Iterator[Mapping[str, Any]]:
    """The rows of SQuAD 1.1's development set on the hub. Raises DataError if it cannot be had."""
    yield from hub_table("rajpurkar/squad", None, "validation")


def boolq_prompt(row: Mapping[str, Any], place: str) -> str:
    """The calibration prompt of a BoolQ row, as in msModelSlim's examples of calibration sets (`build_prompt`).

    Without a space after "Question:", unlike the prompt by which its precision tool scores BoolQ. A title that is
    absent, as it is in the hub's copy, is empty; the dashes stay.

    Raises:
        DataError: question or passage is missing, empty or no text; `place` says where.
    """
    for key in ("question", "passage"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            fault = "is empty or no text" if key in row else f"is missing; there is {', '.join(row) or 'none'}"
            raise DataError(
                f"{place}: the BoolQ field {key} {fault}.",
                "Mend the row; prompts that are complete already are read by dataset: jsonl.",
            )
    return f"{row.get('title') or ''} -- {row['passage']}\nQuestion:{row['question']}?\nAnswer:"


def _load_text(path: Path | None, field: str | None, split: str) -> list[Document]:
    _refuse_field(field, "text")
    return [Document(_read_text(file), str(file)) for file in _files(path, "text")]


def _load_lines(path: Path | None, field: str | None, split: str) -> list[Document]:
    """One prompt a line."""
    _refuse_field(field, "lines")
    return [
        Document(line, f"{file}:{number}", prompt=True)
        for file in _files(path, "lines")
        for number, line in enumerate(_read_text(file).split("\n"), start=1)
        if line.strip()
    ]


def _load_jsonl(path: Path | None, field: str | None, split: str) -> list[Document]:
    documents = []
    for file in _files(path, "jsonl"):
        for row, place in _json_rows(file):
            # A file that was merged from others may hold all their columns in every row, null where a row has none.
            names = row if field is not None else [name for name, value in row.items() if value is not None]
            column = choose_field(names, field, place)
            documents.append(_document(row[column], column, place))
    return documents


def _load_parquet(path: Path | None, field: str | None, split: str) -> list[Document]:
    return [document for file in _files(path, "parquet") for document in _parquet_documents(file, field)]


def _load_hub(name: str, path: Path | None, field: str | None, split: str, subset: str | None) -> list[Document]:
    if path is not None:
        raise DataError(
            f"The hub data set {name} takes no path, but got {path}.",
            "Drop path, or set dataset to the file's kind: text, lines, jsonl or parquet.",
        )
    return _column_documents(*hub_column(hub_table(name, subset, split), field, name), name)


DATASETS: dict[str, Loader] = {
    "builtin": _load_builtin,
    "wikitext2": _load_wikitext2,
    "boolq": _load_boolq,
    "text": _load_text,
    "lines": _load_lines,
    "jsonl": _load_jsonl,
    "parquet": _load_parquet,
}

_SUFFIXES = {
    "text": (".txt", ".md"),
    "lines": (".txt",),
    "jsonl": (".jsonl",),
    "parquet": (".parquet",),
    "boolq": (".jsonl",),
}
# Names of a split in file names; the last is the hub's.
_SPLITS = dict.fromkeys(("valid", "dev", "validation"), ("valid", "dev", "validation"))


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


def _boolq_files(path: Path, split: str) -> list[Path]:
    """The file itself, a directory's only file, or those of the split among several."""
    files = _files(path, "boolq")
    if len(files) == 1:
        return files
    matching = [file for file in files if set(re.split(r"[._-]", file.name)) & set(_SPLITS.get(split, (split,)))]
    if not matching:
        raise DataError(
            f"The directory {path} holds no BoolQ file of split {split}; it holds {', '.join(f.name for f in files)}.",
            "Set path to the file to use.",
        )
    return matching


def _local_files(dataset: str, path: Path | None, split: str) -> list[Path]:
    """The files that the loader of a data set on disk reads."""
    if dataset == "wikitext2":
        return _wikitext2_files(_given(path, dataset), split)
    return _boolq_files(_given(path, dataset), split) if dataset == "boolq" else _files(path, dataset)


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


def _json_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file of JSON lines, or of one JSON list, each with its place. A text in the place of an object
    is a prompt."""
    text = _read_text(file)
    if text.lstrip().startswith("["):
        items = _parsed(text, str(file), "Write one JSON list, or one JSON object a line.")
        numbered: Iterable[tuple[Any, str]] = [
            (item, f"{file}, item {number}") for number, item in enumerate(items, start=1)
        ]
    else:
        remedy = "Write one JSON object a line."
        lines = ((line, f"{file}:{number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        numbered = ((_parsed(line, place, remedy), place) for line, place in lines)
    for row, place in numbered:
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, dict):
            raise DataError(f"{place}: not a JSON object, nor a text.", "Write one JSON object a line.")
        yield row, place


def _parsed(text: str, place: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise DataError(f"{place}: no valid JSON: {reason}.", remedy) from error


def _file_digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"The file {file} cannot be read: {error.strerror}.", "Check path and permissions.") from error
    return digest.digest()


# ------------------------------------------------------------------------------------------------------ checks


def _parquet_documents(file: Path, field: str | None) -> list[Document]:
    return _column_documents(*parquet_column(file, field), str(file))


def _column_documents(column: str, values: Iterable[Any], place: str) -> list[Document]:
    """The rows of one column, without those that are null."""
    return [_document(value, column, f"{place}, row {row}") for row, value in enumerate(values) if value is not None]


def _document(value: Any, column: str, place: str) -> Document:
    if isinstance(value, list):
        return Document("", place, prompt=True, turns=turns_of(value, place))
    if not isinstance(value, str):
        raise DataError(
            f"{place}: the field holds {type(value).__name__}, not text.", "Set field to one that holds text."
        )
    return Document(value, place, prompt=column in PROMPT_FIELDS)


def _require_characters(document: Document) -> None:
    """Refuse a text with half of a surrogate pair, which JSON can say and UTF-8, and with it a tokenizer, cannot."""
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(document.text[error.start]):04x}"
        raise DataError(
            f"{document.place}: character {error.start + 1} of the text is {half}, which is half a character.",
            "Mend the row, or remove it.",
        ) from error


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
