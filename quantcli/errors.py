"""Typed errors. Each says what is wrong, where, and what to do, and maps to one exit status of the command line."""

from __future__ import annotations


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
