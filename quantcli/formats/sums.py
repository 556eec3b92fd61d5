"""The checksums of a checkpoint's files, beside them in the form of coreutils: `sha256sum -c SHA256SUMS`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from quantcli.errors import ModelError, VerificationError
from quantcli.model.checkpoint import file_digest, replacing
from quantcli.model.untrusted import MAXIMUM_JSON_BYTES, TEMPLATES, checkpoint_entries, read_regular

SUMS = "SHA256SUMS"
_LINE = re.compile(rf"([0-9a-f]{{64}})  ((?:{TEMPLATES}/)?[^/\0\n]+)\n")
_READ_BY_ENGINES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npy", ".json", ".jinja", ".model", ".py"}


def write_sums(folder: Path, digests: Mapping[str, str]) -> Path:
    """Write the file; `digests` maps names in the folder to sha256."""
    with replacing(folder / SUMS) as temporary:
        temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())), "utf-8")
    return folder / SUMS


def check_sums(folder: Path) -> int | None:
    """How many files are as SHA256SUMS says; None where there is none.

    Raises VerificationError for one that is missing, changed, or not named though an engine may read it.
    """
    if not (folder / SUMS).exists():
        return None
    try:
        digests, lines = _read(folder)
    except (ModelError, UnicodeDecodeError) as error:
        raise VerificationError(f"{folder / SUMS} cannot be read: {error}.", "Export it again.") from error
    if len(digests) != lines or not digests:
        raise VerificationError(f"{folder / SUMS} is damaged.", "Export it again.")
    check_digests(folder, digests, "Copy it again from where it was exported.")
    check_strangers(folder, {*digests, SUMS})
    return len(digests)


def summed_files(folder: Path) -> list[Path]:
    """The files of a checkpoint by its SHA256SUMS, as far as that can be read; none where there is none."""
    return [folder / name for name in sums_of(folder) if (folder / name).is_file()]


def sums_of(folder: Path) -> dict[str, str]:
    """Names → sha256 by the SHA256SUMS of a folder, as far as that can be read."""
    try:
        return _read(folder)[0]
    except (ModelError, UnicodeDecodeError):
        return {}


def _read(folder: Path) -> tuple[dict[str, str], int]:
    """Names → sha256, and the number of lines, also of those that say nothing."""
    lines = read_regular(folder / SUMS, MAXIMUM_JSON_BYTES).decode("utf-8").splitlines(keepends=True)
    found = [_LINE.fullmatch(line) for line in lines]
    return {match[2]: match[1] for match in found if match is not None}, len(lines)


def check_digests(folder: Path, digests: Mapping[str, str], remedy: str = "") -> None:
    """Raise VerificationError unless every file, by its name relative to the folder, has its recorded sha256. Without
    `remedy` the folder is one of a run, which can export it again."""
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            raise VerificationError(f"{file} is missing.", remedy or "Run the recipe again to export it.")
        if file_digest(file) != digest:
            raise VerificationError(
                f"{file} is not what was exported.", remedy or "Move it elsewhere and run the recipe again."
            )


def check_strangers(folder: Path, names: Collection[str]) -> None:
    """Raise VerificationError for a file that an engine may read and that is none of `names`."""
    for file in read_by_engines(folder):
        if file.relative_to(folder).as_posix() not in names:
            raise VerificationError(f"{file} was not exported, and engines may read it.", "Move it elsewhere.")


def read_by_engines(folder: Path) -> list[Path]:
    """What of a checkpoint's folder an engine may read."""
    return [file for file in checkpoint_entries(folder) if file.suffix in _READ_BY_ENGINES]
