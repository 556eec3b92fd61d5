"""convert: a quantized checkpoint in another format, with the codes that it has."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantcli.errors import ModelError, OutputError, RecipeError, directory_for_file
from quantcli.formats import dense
from quantcli.formats.common import WEIGHT_SUFFIXES
from quantcli.formats.permissions import FOLDER
from quantcli.formats.sums import SUMS, read_by_engines, sums_of, write_sums
from quantcli.formats.table import FORMATS
from quantcli.model.checkpoint import clear_leftovers, file_digest
from quantcli.model.untrusted import TEMPLATES, checkpoint_entries
from quantcli.pipeline.held import model_unheld, split_siblings, together_unheld, unheld
from quantcli.pipeline.replaced import named_files, replaced_files
from quantcli.pipeline.rundir import is_run, removal_rank, room_errors
from quantcli.pipeline.sound import require_sound
from quantcli.pipeline.source import require_checkpoint
from quantcli.pipeline.standalone import open_checkpoint

if TYPE_CHECKING:
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.formats.verify import Verified
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.structure import Structure


def convert_checkpoint(
    source: Path,
    form: str,
    output: Path,
    *,
    overwrite: bool = False,
    restrict_permissions: bool = True,
    shard_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint `source`, whoever made it, in the format `form`; codes and scales stay as they are.

    It is written beside `output`, read back by other code and compared, given a fixed prompt as the source is, and then
    moved there, so that `output` holds all of it or nothing; what a killed conversion left is no checkpoint, and the
    next one clears it away. With `overwrite` the files of the checkpoint that was there are replaced
    (`pipeline.replaced`), and what has the name of a file that comes along; other files stay, and those of them that
    engines may read are named (`beside`). `restrict_permissions` gives files the modes of `formats.permissions` if
    those are the format's; `shard_bytes` bounds files of weights as in `formats.export`. Raises, before anything is
    written, RecipeError for what the format cannot hold, and ModelError for a source without codes or one that is
    damaged (`pipeline.sound`); ModelError for scales that the format does not hold, OutputError for an output that is
    in use, VerificationError where what was written is not what was read.
    """
    if form not in FORMATS:
        raise RecipeError(f"--to: there is no format {form!r}.", f"Known formats: {', '.join(FORMATS)}.")
    require_checkpoint(source)
    structure, checkpoint, weights = open_checkpoint(source, trust_remote_code=trust_remote_code)
    if checkpoint.form is None or checkpoint.form is dense:
        raise ModelError(f"{source} holds no codes.", "Name a quantized checkpoint.")
    quantized = [(checkpoint.linears[name], scheme) for name, scheme in checkpoint.schemes.items()]
    reason = unheld(form, quantized, checkpoint.attention)
    reason = reason or model_unheld(form, source, structure, checkpoint.entries)
    if reason := reason or together_unheld(form, structure, checkpoint.schemes, checkpoint.attention):
        raise RecipeError(f"--to: {reason}", "Choose another format.")
    if checkpoint.added_biases and not hasattr(FORMATS[form], "takes_added_bias"):
        reason = f"{form} does not hold biases that the architecture lacks, such as {checkpoint.added_biases[0]}."
        raise RecipeError(f"--to: {reason}", "Choose another format.")
    if reason := split_siblings(form, structure, checkpoint.schemes):
        raise RecipeError(f"--to: {reason}", "Choose another format, or quantize them alike.")
    _refuse_place(source, output, overwrite)
    require_sound(structure, checkpoint, weights, trust_remote_code=trust_remote_code)
    temporary = output.parent / f".{output.name}.{os.getpid()}.part"
    with room_errors(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(output)
            shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process of our number, as in a container
            temporary.mkdir()
        except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise OutputError(f"{output} cannot be made: {error.strerror}.", "Choose another --output.") from error
        try:
            found, score = _written(
                temporary, form, structure, checkpoint, weights, restrict_permissions, shard_bytes, trust_remote_code
            )
            written = _move(temporary, source, output, overwrite)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    beside = [file.name for file in read_by_engines(output) if file not in written]
    missing = dense.left_out(checkpoint.schemes.values(), checkpoint.attention) if form == dense.NAME else ""
    return {
        "output": str(output),
        "format": f"{checkpoint.form.NAME} → {form}",
        "schemes": dict(Counter(scheme.name for scheme in checkpoint.schemes.values())),
        "linears": found.linears,
        "other_tensors": found.other_tensors,
        "prompt": score,
        "bytes": found.nbytes,
        "zero_points": checkpoint.disputed,
        "left_out": missing or None,
        "beside": f"{', '.join(beside)}: not replaced, and engines may read it; move it elsewhere" if beside else None,
    }


def _refuse_place(source: Path, output: Path, overwrite: bool) -> None:
    place, origin = output.resolve(), source.resolve()
    if place == origin or origin in place.parents or place in origin.parents:
        raise OutputError(f"{output} and {source} are in one another.", "Choose another --output.")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file.", "Choose a directory.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if is_run(output) or not any((output / name).is_file() for name in ("config.json", SUMS)):
        raise OutputError(f"{output} holds something else than a checkpoint.", "Choose an empty or a new directory.")
    if not overwrite:
        raise OutputError(f"{output} holds a checkpoint already.", "Choose another --output, or say --overwrite.")
    replaced = replaced_files(output)
    for file in sorted(file for suffix in WEIGHT_SUFFIXES for file in output.glob(f"*{suffix}")):
        if file not in replaced:  # engines would load it beside the new weights
            raise OutputError(f"{file} is not a name of the weights of any format.", "Choose another --output.")


def _written(
    folder: Path,
    form: str,
    structure: Structure,
    checkpoint: QuantizedCheckpoint,
    weights: dict[str, str],
    restrict_permissions: bool,
    shard_bytes: int | None,
    trust_remote_code: bool,
) -> tuple[Verified, float]:
    """The checkpoint written and read back; what is known of it, and the log-likelihood of the prompt."""
    from quantcli.formats.export import Source, export_checkpoint, tied_head
    from quantcli.formats.permissions import restricted, restricts
    from quantcli.formats.reader import ReadStore
    from quantcli.formats.verify import verify_checkpoint
    from quantcli.pipeline.prompt import check_prompt

    store = ReadStore(checkpoint)
    read_as_float = cast("Checkpoint", checkpoint)
    tied = tied_head(structure, read_as_float)
    source = Source(read_as_float, weights, None, tied)
    files = export_checkpoint(folder, FORMATS[form], store, source, checkpoint.linears, shard_bytes)
    for _ in restricted(folder, files) if restrict_permissions and restricts(FORMATS[form]) else files:
        pass
    split = [name for name, linear in checkpoint.linears.items() if linear.splits_input]
    turned = [name for name, linear in checkpoint.linears.items() if linear.transposed]
    found = verify_checkpoint(folder, store, read_as_float, weights, None, form, tied, split, turned)
    return found, check_prompt(folder, form, store, source, structure, trust_remote_code=trust_remote_code)


def _move(temporary: Path, source: Path, output: Path, overwrite: bool) -> set[Path]:
    """Every file to its place, at once where nothing is there; where they are. Raises OutputError for what another
    command has put there since."""
    entries = [file for file in checkpoint_entries(temporary) if file.is_file()]
    places = {file: output / file.relative_to(temporary) for file in entries}
    if not output.exists():
        try:
            temporary.rename(output)
            return {*places.values()}
        except OSError as error:  # the system puts no directory over one that holds files
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    with _alone(output):
        _refuse_place(source, output, overwrite)
        _replace(temporary, output, places)
    return {*places.values()}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other command moves files into a directory, where the file system can tell."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(temporary: Path, output: Path, places: Mapping[Path, Path]) -> None:
    """The files to their places in a directory that is there. What they take the place of goes before, by
    `removal_rank`, and files come in the reverse order; the checksums, there throughout, mark what an interruption
    leaves as ours. They are the older ones until all of those files are gone, or name those of them that have no name
    of their own."""
    if (mode := temporary.stat().st_mode & 0o777) == FOLDER:
        output.chmod(mode)
    replaced = replaced_files(output) - {output / SUMS}
    for place in {*replaced, *places.values()}:
        if place.is_dir():
            raise directory_for_file(place)
    if not (output / SUMS).exists():
        own = {file.name: file_digest(file) for file in named_files(output)}
        write_sums(output, sums_of(temporary) | own)
    for file in sorted(replaced, key=removal_rank):
        file.unlink()
    if (output / TEMPLATES).is_dir() and not any((output / TEMPLATES).iterdir()):
        (output / TEMPLATES).rmdir()
    (temporary / SUMS).replace(output / SUMS)
    for file in sorted((file for file in places if file.name != SUMS), key=removal_rank, reverse=True):
        places[file].parent.mkdir(mode=file.parent.stat().st_mode & 0o777, exist_ok=True)
        file.replace(places[file])
