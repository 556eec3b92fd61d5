"""The run directory: whose it is, what lies in it, and how it stays whole when a run is killed.

Every file appears by rename, complete. run.json is written first and marks the directory as a run's own. A stage's
folder holds stage.json, which names the fingerprint that its files belong to, their digests and sizes, and, until the
stage is complete, what it may write: after a kill, files under the same fingerprint are kept and work goes on behind
them; under another they are removed, and nothing else is. A file that nothing says to be a run's, in the place of one
that a stage writes, stops the run. Folders of a stage may have fingerprints of their own, which are recorded when they
are finished: those stay for as long as theirs is the same.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from itertools import chain, count
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

from quantcli.errors import (
    NO_ACCESS,
    NO_ROOM,
    OutputError,
    QuantcliError,
    RoomError,
    directory_for_file,
    in_the_way,
    lacks_memory,
    lacks_room,
)
from quantcli.model.checkpoint import file_digest, replacing
from quantcli.model.npy_names import WEIGHTS

RECORD = "run.json"
RECIPE = "recipe.yaml"
EDITED_RECIPE = "recipe.edited.yaml"
EVENTS = "events.jsonl"
SUMMARY = "summary.json"
PAGE = "report.html"
STAGE_RECORD = "stage.json"
KIND = "quantcli run"
# Where a directory itself cannot be locked: network file systems want a file that is open for writing.
_LOCK = ".lock"
_OF_FILES = ("files", "sizes")
_LEFTOVER = re.compile(r"\..+\.\d+\.part")  # the temporary names of `replacing`


def removal_rank(file: PurePath) -> int:
    """The place of a file among those that are removed together, and from the end, of those that come together: what
    engines look for first, config.json and of NumPy dictionaries the weights, lies there only beside all the rest."""
    return {"config.json": 0, WEIGHTS: 1}.get(file.name, 2)


def is_run(path: Path) -> bool:
    """Whether a directory is a run's: its run.json says so, and holds records of stages."""
    record = _read_object(path / RECORD)
    stages = record.get("stages")
    if record.get("kind") != KIND or not isinstance(stages, dict):
        return False
    return all(isinstance(stage, dict) and isinstance(stage.get("files", {}), dict) for stage in stages.values())


class RunDirectory:
    """A directory that belongs to one run. Use `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = _read_object(path / RECORD) or {"kind": KIND, "stages": {}}
        self._events: IO[str] | None = None

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.path / name, self.record["stages"].get(name, {}).get("files", {}))

    def write_record(self) -> None:
        write_json(self.path / RECORD, self.record)

    def write_recipe(self, text: str, stage: str = "") -> Path | None:
        """Write recipe.yaml, of the run or what a stage makes of it. One that was edited since it was written is kept
        beside it, as recipe.edited.yaml or, where other edits are kept already, with a number: then that file."""
        path, digest = self.path / stage / RECIPE, sha256(text.encode()).hexdigest()
        key = f"{stage} recipe".strip()
        found = file_digest(path) if path.is_file() else digest
        edited = _place_of_edits(path, found) if found not in [digest, *self._written(key)] else None
        if edited is not None:
            path.replace(edited)
        # both are ours while either may be what a kill leaves
        self.record[key] = [digest] if edited else sorted({found, digest})
        self.write_record()
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.record[key] = [digest]
        self.write_record()
        return edited

    def _written(self, key: str) -> list[str]:
        """The digests that a recipe has if nobody has edited it; a single one in runs of earlier versions."""
        known = self.record.get(key, [])
        return known if isinstance(known, list) else [known]

    def append_event(self, event: dict[str, Any]) -> None:
        """One line in events.jsonl. A line that a kill cut short is ended first."""
        if self._events is None:
            path = self.path / EVENTS
            torn = path.exists() and not _ends_with_newline(path)
            self._events = path.open("a", encoding="utf-8")
            if torn:
                self._events.write("\n")
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class StageFolder:
    """The files of one stage, and the record that says what they belong to. `recorded`: names and digests that another
    record has, for where that one is lost."""

    def __init__(self, path: Path, recorded: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.recorded = dict(recorded or {})
        self.files: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.fingerprint = ""
        self.writes: tuple[str, ...] = ()
        self.parts: dict[str, str] = {}
        self.resumed = False
        self._part: Callable[[str], str] = lambda name: ""

    def begin(self, fingerprint: str, writes: Iterable[str], part: Callable[[str], str] = lambda name: "") -> list[str]:
        """Make the folder ready for work under a fingerprint: files of another are removed, its own are kept.

        `writes` are glob patterns, relative to the folder, of all that the stage may write. A recorded file that is
        missing or has another size is forgotten, so that it is made again. `part` gives the fingerprint of a folder in
        it, by its name. The names of folders that were removed and that this stage does not write are returned.
        Raises OutputError, before anything is removed, for a file in the way that no run of the stage has written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        record, writes = self._read(), tuple(writes)
        before = set(map(_folder, record.get("files", {})))
        kept = {name: found for name, found in record.get("parts", {}).items() if found == part(name)}
        self.refuse_foreign(writes, kept)
        self.resumed = record.get("fingerprint") == fingerprint
        if not self.resumed:
            names = [*record.get("files", {}), *record.get("writes", ()), *self.recorded]
            self.remove([name for name in names if _folder(name) not in kept])
            own = {key: {n: v for n, v in record.get(key, {}).items() if _folder(n) in kept} for key in _OF_FILES}
            record = {**own, "parts": kept}
        sizes = record.get("sizes", {})
        files, written = record.get("files", {}), set(map(_folder, writes))
        lost = {name for name in files if _size(self.path / name) != sizes.get(name, -1)}
        broken = set(map(_folder, lost))
        self.parts = {name: found for name, found in record.get("parts", {}).items() if name not in broken}
        # and what is left of a folder that nobody is going to finish
        lost |= {name for name in files if _folder(name) not in {"", *self.parts, *written}}
        self.files = {name: digest for name, digest in files.items() if name not in lost}
        self.sizes = {name: sizes[name] for name in self.files}
        self.remove(lost)
        _clear_leftovers(self.path.rglob(".*.part"))
        self.fingerprint, self.writes, self._part = fingerprint, writes, part
        self._write(complete=False)
        return sorted(before - {"", *map(_folder, self.files), *written})

    def refuse_foreign(self, writes: Iterable[str], kept: Collection[str] | None = None) -> None:
        """Raise OutputError for a file with a name that the stage is going to write, which is neither recorded nor one
        that an interrupted run may have left. Of folders that are `kept`, by default all that are complete, nothing is
        written."""
        if (self.path / STAGE_RECORD).is_dir():
            raise directory_for_file(self.path / STAGE_RECORD)
        record = self._read()
        kept = record.get("parts", {}) if kept is None else kept
        own, left = {*record.get("files", {}), *self.recorded}, tuple(record.get("writes", ()))
        for pattern in writes:
            if _folder(pattern) in kept or pattern in left or (record and pattern.endswith(".jsonl")):
                continue  # earlier versions did not record a journal
            for file in sorted(self.path.glob(pattern)):
                name = file.relative_to(self.path)
                known = name.as_posix() in own or any(_matches(name, each) for each in left)
                if not known and (file.is_file() or file.is_symlink()):
                    raise OutputError(f"{file} is in the way, and no record says that a run has written it.",
                                      f"Move {file.parent} elsewhere, or choose another output.")  # fmt: skip

    def edited(self, below: str = "", *, by_content: bool = False) -> list[str]:
        """Recorded files, of names that begin so, that have another size than was recorded, or another content if
        `by_content` or if the record of sizes is lost."""
        record = self._read()
        files, sizes = record.get("files", self.recorded), record.get("sizes", {})

        def differs(name: str, digest: str) -> bool:
            file = self.path / name
            if not file.is_file():
                return False
            size = file.stat().st_size
            return size != sizes.get(name, size) or ((by_content or not record) and file_digest(file) != digest)

        return [name for name, digest in files.items() if name.startswith(below) and differs(name, digest)]

    def refuse_edited(self, below: str = "", *, by_content: bool = False) -> None:
        """Raise OutputError for the first of the files that are `edited`."""
        for name in self.edited(below, by_content=by_content):
            raise OutputError(f"{self.path / name} was changed since the run wrote it.",
                              "Move it elsewhere, or say --overwrite to replace it.")  # fmt: skip

    def begun(self, fingerprint: str) -> bool:
        """Whether an interrupted run has left finished files under this fingerprint."""
        record = self._read()
        return record.get("fingerprint") == fingerprint and bool(record.get("files"))

    def add(self, file: Path, digest: str = "") -> None:
        """Record a finished file; its sha256 is computed where the writer did not."""
        name = file.relative_to(self.path).as_posix()
        self.files[name] = digest or file_digest(file)
        self.sizes[name] = file.stat().st_size
        self._write(complete=False)

    def journal(self, name: str) -> Path:
        """A file of lines that grows as work goes on (`append_line`), to be recorded at its end. Lines of another
        fingerprint, which earlier versions did not record, are no part of this work."""
        if not self.resumed:
            (self.path / name).unlink(missing_ok=True)
        return self.path / name

    def adopt(self, file: Path) -> bool:
        """Whether a file is there already, recording it where a kill came between its last byte and its record."""
        name = file.relative_to(self.path).as_posix()
        if name not in self.files and file.is_file():
            self.add(file)
        return name in self.files

    def complete(self, fingerprint: str) -> bool:
        """Whether the stage was completed under this fingerprint and every file is there with its recorded size."""
        record = self._read()
        if record.get("fingerprint") != fingerprint or record.get("complete") is not True:
            return False
        self.fingerprint, self.files, self.sizes = fingerprint, record["files"], record["sizes"]
        self.parts = record.get("parts", {})
        return all(_size(self.path / name) == self.sizes.get(name, -1) for name in self.files)

    def changed(self) -> dict[str, str]:
        """What files of a complete stage hold now, as sha256, that were written to after its record was."""
        recorded = (self.path / STAGE_RECORD).stat().st_mtime_ns
        later = [name for name in self.files if (self.path / name).stat().st_mtime_ns > recorded]
        return {name: file_digest(self.path / name) for name in later}

    def finish_part(self, name: str) -> None:
        """Record that a folder in this one is complete."""
        self.parts[name] = self._part(name)
        self._write(complete=False)

    def finish(self) -> None:
        """Record that the stage is complete."""
        self._write(complete=True)

    def _read(self) -> dict[str, Any]:
        record = _read_object(self.path / STAGE_RECORD)
        parts = [record.get(key, {}) for key in (*_OF_FILES, "parts")]
        return record if all(isinstance(part, dict) for part in parts) else {}

    def remove(self, patterns: Iterable[str]) -> None:
        """Remove files of the stage, by name or pattern, and folders in it that are empty then.

        What `removal_rank` puts first goes first, so that no engine finds half a checkpoint.
        """
        for pattern in sorted(patterns, key=lambda pattern: removal_rank(PurePosixPath(pattern))):
            if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
                continue  # no stage writes there
            named = [self.path / pattern] if (self.path / pattern).is_file() else []
            for file in named or list(self.path.glob(pattern)):
                if file.is_file() or file.is_symlink():
                    file.unlink()
                    for folder in file.parents[: len(file.relative_to(self.path).parts) - 1]:
                        if not any(folder.iterdir()):
                            folder.rmdir()

    def _write(self, *, complete: bool) -> None:
        content: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "complete": complete,
            "files": dict(sorted(self.files.items())),
            "sizes": dict(sorted(self.sizes.items())),
        }
        if self.parts:
            content["parts"] = dict(sorted(self.parts.items()))
        if not complete:
            content["writes"] = list(self.writes)
        write_json(self.path / STAGE_RECORD, content)


@contextmanager
def open_run(path: Path, model: Path) -> Iterator[RunDirectory]:
    """The run directory at `path`, created or taken up again, locked against a second run for the duration of the body.

    Raises OutputError when it holds something else, is or contains the model, cannot be written, or is in use.
    """
    with room_errors(path):
        check_place(path, model)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise OutputError(f"{path} cannot be made: {error.strerror}.", "Choose another output.") from error
        with _locked(path):
            _clear_leftovers(path.iterdir())
            run = RunDirectory(path)
            run.write_record()
            try:
                yield run
            finally:
                run.close()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The directory itself is locked, not a file in it that somebody could delete. The lock ends with the process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            os.close(handle)
            handle = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"Another run is using {path}.", "Wait for it, or choose another output.") from error
    try:
        yield
    finally:
        os.close(handle)


def check_place(path: Path, model: Path) -> None:
    """Raise OutputError unless a run may write at `path`: nothing is there, an empty directory, or a run of ours."""
    resolved, origin = path.resolve(), model.resolve()
    if resolved == origin or origin in resolved.parents or resolved in origin.parents:
        raise OutputError(f"The output {path} and the model {model} are in one another.", "Choose another output.")
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"The output {path} is a file.", "Choose a directory.")
    names = sorted(name for name in os.listdir(path) if name != _LOCK and not _LEFTOVER.fullmatch(name))
    if names and not is_run(path):
        what = f"something else ({names[0]})" if RECORD not in names else f"a {RECORD} that is foreign or damaged"
        raise OutputError(f"{path} holds {what}.", "Choose an empty or a new directory.")
    for file in (path / name for name in (RECIPE, EDITED_RECIPE, EVENTS, SUMMARY, PAGE)):
        if file.is_dir():  # some are written when all work is done
            raise directory_for_file(file)


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
        if lacks_room(error):
            raise RoomError(
                f"No room is left to write {place}.", "Free some and run again; finished work is kept."
            ) from error
        if error.errno in NO_ACCESS:
            raise OutputError(f"{place}: {error.strerror}.", "Choose another output.") from error
        if (found := in_the_way(error)) is not None:
            raise found from error
        raise
    except RuntimeError as error:
        # torch reports a full disk and an exhausted device as RuntimeError
        if lacks_room(error):
            raise RoomError(f"No room is left to write below {path}.", "Free some and run again.") from error
        if lacks_memory(error):
            raise RoomError(
                f"The memory is too small: {str(error).splitlines()[0]}.", "Use --device cpu or a larger machine."
            ) from error
        raise


def _clear_leftovers(files: Iterable[Path]) -> None:
    """Remove the temporary files of `replacing` among these."""
    for file in list(files):
        if _LEFTOVER.fullmatch(file.name) and not file.is_dir():
            file.unlink()


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def six_digits(value: float) -> float:
    """A number as records have it."""
    return float(f"{value:.6g}")


def six_digits_or_none(value: float | None) -> float | None:
    """The same; JSON has no infinity."""
    return six_digits(value) if value is not None and math.isfinite(value) else None


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add a JSON object to a file of one a line. A line that a kill cut short is ended first."""
    torn = path.exists() and not _ends_with_newline(path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(content) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `append_line` added, without a last line that a killed run left unfinished; nothing if there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def current_events(run: Path, stages: Iterable[str]) -> list[dict[str, Any]]:
    """The events of the work that the files of `stages` come from, and those of the plan, in the order of `stages`:
    events of work that was done again since are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in read_lines(run / EVENTS):
        stage = event.get("stage", "")
        if (event["event"] == "started" and not event.get("resumed")) or event["event"] == "plan":
            found[stage] = []
        found.setdefault(stage, []).append(event)
    return [event for stage in ("", *stages) for event in found.get(stage, ())]


def _folder(name: str) -> str:
    """The folder in a stage's own that a file or pattern is in; empty if it is in none."""
    return name.rpartition("/")[0].partition("/")[0]


def _place_of_edits(recipe: Path, digest: str) -> Path:
    """Where a recipe that was edited goes: the first name that no other edits have."""
    first = recipe.with_name(EDITED_RECIPE)
    names = chain([first], (first.with_stem(f"{first.stem}-{number}") for number in count(2)))
    return next(file for file in names if not os.path.lexists(file) or (file.is_file() and file_digest(file) == digest))


def _matches(name: PurePath, pattern: str) -> bool:
    """Whether all of a relative name matches a pattern; `match` alone looks at its end."""
    return len(name.parts) == len(PurePosixPath(pattern).parts) and name.match(pattern)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) == 0 or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
