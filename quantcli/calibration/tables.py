"""Columns of tables: parquet files, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantcli.calibration.conversations import CONVERSATION_FIELDS
from quantcli.errors import DataError, first_line
from quantcli.model.hub import hub_asked

DEFAULT_FIELDS = ("text", "prompt", "inputs_pretokenized", "content", *CONVERSATION_FIELDS)

_VALIDATION = dict.fromkeys(("valid", "dev"), "validation")
"""Names of a split in files → its name on the hub."""


def choose_field(present: Iterable[str], field: str | None, place: str) -> str:
    """The column to read: `field`, or without it the first of DEFAULT_FIELDS. Raises DataError if it is not there."""
    names = list(present)
    wanted = DEFAULT_FIELDS if field is None else (field,)
    for name in wanted:
        if name in names:
            return name
    raise DataError(
        f"{place}: no field {' or '.join(wanted)}; there is {', '.join(names) or 'none'}.",
        "Set field to the one that holds the text.",
    )


def parquet_column(file: Path, field: str | None) -> tuple[str, list[Any]]:
    """The name of the column that `choose_field` chooses, and its values. Raises DataError for what is no parquet."""
    try:
        from pyarrow import parquet  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise DataError(f"Reading {file} needs pyarrow.", "Install it: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
        column = choose_field(table.schema_arrow.names, field, str(file))
        return column, table.read(columns=[column]).column(column).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"The file {file} cannot be read as parquet: {first_line(error)}.", "Check path.") from error


def hub_table(name: str, config: str | None, split: str) -> Any:
    """A data set of the hub, as the datasets library has it. Raises DataError if it cannot be had."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"Reading the hub data set {name} needs the datasets library.",
            'Install it: pip install "quantcli[hub]", or set path to a local copy.',
        ) from error
    with hub_asked() as obstacle:
        try:
            return load_dataset(name, config, split=split)
        except Exception as error:  # whatever network, cache, hub and data set reader raise
            reason = f"{obstacle}, and no earlier copy is here" if obstacle else first_line(error)
            raise DataError(
                f"The hub data set {name}, split {split}, cannot be read: {reason}.",
                "Check name, split and network, or set path to a local copy.",
            ) from error


def hub_column(table: Any, field: str | None, name: str) -> tuple[str, Iterable[Any]]:
    """As `parquet_column`, of the hub data set `name`."""
    column = choose_field(table.column_names, field, name)
    return column, table[column]


def hub_split(split: str) -> str:
    """The hub's name of a split that files may call otherwise."""
    return _VALIDATION.get(split, split)
