"""Typed errors. Each says what is wrong, where, and what to do, and maps to one exit status of the command line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}


class QuantcliError(Exception):
    """Base of every error that a user can cause and mend.

    `message` says what is wrong and where (file, line, key or module); `remedy` says what to do about it. The command
    line prints both without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message} {remedy}".strip())
        self.message = message
        self.remedy = remedy


class RecipeError(QuantcliError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class OutputError(QuantcliError):
    """The output directory cannot be used: it holds something else, is the model itself, is locked or read-only."""

    exit_code = 2


class ModelError(QuantcliError):
    """The model cannot be read, understood or quantized."""

    exit_code = 3


class DataError(QuantcliError):
    """Calibration or evaluation data cannot be read, or holds too little."""

    exit_code = 3


class GateError(QuantcliError):
    """The quantized model misses a quality bound of the recipe."""

    exit_code = 4


class VerificationError(QuantcliError):
    """An exported checkpoint differs from what was quantized."""

    exit_code = 5


class RoomError(QuantcliError):
    """Disk or memory is too small."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """What an error says first, without a full stop; its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def is_of_library(error: BaseException) -> bool:
    """Whether what was raised on reading a file is for the file to answer for: whatever a library raises, also a panic
    of Rust, which is no Exception, but not exhausted memory, interruptions and exits."""
    return not isinstance(error, MemoryError) and (isinstance(error, Exception) or "Panic" in type(error).__name__)


def lacks_room(error: Exception) -> bool:
    """Whether a disk is full, as the system says it or torch."""
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or "No space left" in str(error)


def lacks_memory(error: Exception) -> bool:
    """Whether torch says that a device has no memory left."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def directory_for_file(place: Path) -> OutputError:
    """What a directory amounts to that has the name of a file."""
    return OutputError(f"{place} is a directory where a file belongs.", "Move it elsewhere and run again.")


def in_the_way(error: Exception) -> OutputError | None:
    """What an error of the system amounts to that comes of a directory with the name of a file, or of a file or a link
    with that of a directory. None for any other."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    place = Path(os.fsdecode(error.filename if error.filename2 is None else error.filename2))
    if error.errno == errno.EISDIR:
        return directory_for_file(place)
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        found = next((each for each in (place, *place.parents) if os.path.lexists(each)), place)
        return OutputError(f"{found} stands where a directory belongs.", "Move it elsewhere and run again.")
    return None


def refusal_of_the_system(error: Exception) -> QuantcliError | None:
    """What an error of the system or of torch amounts to where nobody said it better: no room, no memory, a file that
    this user may not read or write, a directory in the place of a file or the other way round, or a name that no file
    can have. None for any other."""
    text = str(error)
    if (found := in_the_way(error)) is not None:
        return found
    if lacks_room(error):
        return RoomError(f"No room is left on the disk: {text}.", "Free some, also for temporary files (TMPDIR).")
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        return ModelError(f"{error.filename}: {error.strerror}.", "Check who may read it and enter its directory.")
    if isinstance(error, RuntimeError) and "Symlink loop from" in text:  # of pathlib, before Python 3.13
        return RecipeError(f"{text.partition(' from ')[2]} is a link that leads back to itself.", "Check the path.")
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return RecipeError(f"{error.filename} is a link that leads back to itself.", "Check the path.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return RecipeError(f"{error.filename!s:.60}…: {error.strerror}.", "Check the path.")
    if lacks_memory(error):
        return RoomError(f"The memory is too small: {text.splitlines()[0]}.", "Use --device cpu or a larger machine.")
    return None
