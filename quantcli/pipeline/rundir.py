"""The run directory: whose it is, what lies in it, and how it stays whole when a run is killed.

Every file appears by rename, complete. A stage's folder holds `stage.json`, which names the fingerprint that the files
belong to and their digests; after a kill, files under the same fingerprint are kept and work goes on behind them.
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from quantcli.errors import OutputError, QuantcliError, RoomError
from quantcli.model.checkpoint import replacing

RECORD = "run.json"
RECIPE = "recipe.yaml"
EVENTS = "events.jsonl"
LOCK = ".lock"
STAGE_RECORD = "stage.json"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RunDirectory:
    """A directory that belongs to one run. Use `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = _read_object(path / RECORD)
        self._events: IO[str] | None = None

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name)

    def finish_stage(self, name: str, record: dict[str, Any]) -> None:
        self.record.setdefault("stages", {})[name] = record
        self.write_record()

    def write_record(self) -> None:
        write_json(self.path / RECORD, self.record)

    def write_recipe(self, text: str) -> None:
        with replacing(self.path / RECIPE) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def append_event(self, event: dict[str, Any]) -> None:
        """One line in events.jsonl. A line that a kill cut short is ended first."""
        if self._events is None:
            path = self.path / EVENTS
            torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
            self._events = path.open("a", encoding="utf-8")
            if torn:
                self._events.write("\n")
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class StageFolder:
    """The files of one stage, and the record that says what they belong to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, str] = {}

    def begin(self, fingerprint: str) -> None:
        """Make the folder ready for work under a fingerprint: files of another are removed, its own are kept."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = _read_object(self.path / STAGE_RECORD)
        self.files = dict(record.get("files", {}))
        if record.get("fingerprint") != fingerprint:
            self.clear()
            self.files = {}
        for leftover in self.path.rglob(".*.part"):
            leftover.unlink()
        self.fingerprint = fingerprint
        self._write()

    def add(self, file: Path, digest: str = "") -> None:
        """Record a finished file; its sha256 is computed where the writer did not."""
        self.files[str(file.relative_to(self.path))] = digest or file_digest(file)
        self._write()

    def clear(self) -> None:
        """Remove what the stage wrote; files of others stay."""
        for name in self.files:
            (self.path / name).unlink(missing_ok=True)
        for pattern in ("block-*.safetensors", "hidden-*/*", "hidden-*", "*.part", "model*.safetensors"):
            for file in self.path.glob(pattern):
                if file.is_file():
                    file.unlink()

    def complete(self, fingerprint: str) -> bool:
        """Whether every recorded file of this fingerprint is there with its recorded size."""
        record = _read_object(self.path / STAGE_RECORD)
        sizes = record.get("sizes")
        if record.get("fingerprint") != fingerprint or not isinstance(sizes, dict):
            return False
        paths = {name: self.path / name for name in record["files"]}
        return all(path.is_file() and path.stat().st_size == sizes.get(name) for name, path in paths.items())

    def finish(self) -> None:
        """Record that the stage is complete."""
        self._write({"sizes": {name: (self.path / name).stat().st_size for name in sorted(self.files)}})

    def _write(self, extra: dict[str, Any] | None = None) -> None:
        content = {"fingerprint": self.fingerprint, "files": dict(sorted(self.files.items())), **(extra or {})}
        write_json(self.path / STAGE_RECORD, content)


@contextmanager
def open_run(path: Path, model: Path) -> Iterator[RunDirectory]:
    """The run directory at `path`, created or taken up again, locked against a second run for the duration of the body.

    Raises OutputError when it holds something else, is or contains the model, cannot be written, or is in use.
    """
    _check_place(path, model)
    with room_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"Another run is using {path}.", "Wait for it, or choose another output.") from error
            run = RunDirectory(path)
            try:
                yield run
            finally:
                run.close()
        finally:
            lock.close()


def _check_place(path: Path, model: Path) -> None:
    resolved, origin = path.resolve(), model.resolve()
    if resolved == origin or origin in resolved.parents or resolved in origin.parents:
        raise OutputError(f"The output {path} and the model {model} are in one another.", "Choose another output.")
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"The output {path} is a file.", "Choose a directory.")
    names = {entry.name for entry in path.iterdir()} - {LOCK}
    if names and RECIPE not in names:
        raise OutputError(f"{path} holds something else ({sorted(names)[0]}).", "Choose an empty or a new directory.")


@contextmanager
def room_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write below `path` into errors that say what to do."""
    try:
        yield
    except QuantcliError:
        raise
    except MemoryError as error:
        raise RoomError("The memory is too small for one decoder block.", "Use a machine with more memory.") from error
    except OSError as error:
        place = error.filename or path
        if error.errno in _NO_ROOM:
            raise RoomError(
                f"No room is left to write {place}.", "Free some and run again; finished work is kept."
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise OutputError(f"{place} cannot be written: {error.strerror}.", "Choose another output.") from error
        raise
    except RuntimeError as error:
        # torch reports a full disk and an exhausted device as RuntimeError
        text = str(error)
        if "No space left" in text:
            raise RoomError(f"No room is left to write below {path}.", "Free some and run again.") from error
        if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
            raise RoomError(
                f"The memory is too small: {text.splitlines()[0]}.", "Use --device cpu or a larger machine."
            ) from error
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def file_digest(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
