"""The modes of exported files that msModelSlim documents: nobody else changes them, and weights nobody at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from quantcli.formats.common import WEIGHT_SUFFIXES

FOLDER, WEIGHTS, OTHERS = 0o750, 0o400, 0o600


def restricts(form: ModuleType) -> bool:
    """Whether these modes are those of a format."""
    return bool(getattr(form, "RESTRICTED", False))


def restricted(folder: Path, files: Iterator[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
    """The files of an export into `folder`, each with its mode before it is handed on, and the folder with its own."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(FOLDER)
    for file, digest in files:
        file.parent.chmod(FOLDER)
        file.chmod(WEIGHTS if file.suffix in WEIGHT_SUFFIXES else OTHERS)
        yield file, digest
