"""The command line: parses, calls the pipeline, shows what comes back. Heavy imports wait until they are needed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from quantcli import __version__
from quantcli.errors import GateError, QuantcliError, RecipeError, RoomError, refusal_of_the_system

# The base of what a wrong command line raises. Some versions of typer carry a click of their own, under another name.
_CommandLineError: Any = typer.BadParameter.__mro__[2]
# How often a thread of libgomp looks for the others before it sleeps. Its own 300 000 are milliseconds, in which a
# thread that waits keeps the one it waits for from a core that both share with other programs.
_SPINS = "10000"
_IN_RUNS = ("run", "smooth", "calibrate", "sensitivity", "search", "allocate", "quantize", "export", "eval-ppl")
_BROKEN_PIPE = 141  # as the shell reports a command whose reader has gone

app = typer.Typer(
    name="quantcli",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="The shipped recipes: list, show, copy.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="Model directory, .gguf file or hub name.")]
OutputOption = Annotated[str | None, typer.Option("--output", help="Run directory.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda[:n] or npu[:n].")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files of an export that were changed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, no messages; errors only.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Every event, and a traceback for every error.")]


def _path(text: str) -> Path:
    """A path on the command line, with ~ for the home directory also where a shell leaves it, as in --output=~/x."""
    from quantcli.recipe.shipped import expanded

    if not text:
        raise RecipeError("A path on the command line is empty.", "Name one; . is the current directory.")
    return expanded(text)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantcli {__version__}")
        raise typer.Exit


@app.callback()
def _before_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a language model as a recipe says, export it for serving engines, and measure what it cost."""


class _Interrupted(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt, which typer would turn into an exit without a word."""


def main() -> None:
    """Entry point of the command line: leaves the process with an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± or → is no reason to fail
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells ask of background commands
            signal.signal(number, _interrupt)
    status = run_command(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        status = status or _BROKEN_PIPE
    os._exit(status)  # interpreter shutdown with torch loaded takes longer than the message


def _interrupt(number: int, _frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda again, _: os._exit(128 + again))  # who asks twice will not wait
    raise _Interrupted(number)


def run_command(arguments: Sequence[str]) -> int:
    """Run a command, say what goes wrong on standard error, and return the exit status."""
    # Set before the libraries are imported: none of their progress bars, forked tokenizers, or messages beside ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    try:
        # not standalone: click would turn an interrupt into exit status 1
        return int(app(list(arguments), prog_name="quantcli", standalone_mode=False) or 0)
    except _Interrupted as error:
        _complain("Interrupted." + " The same command goes on where it stopped." * _goes_on(arguments))
        return 128 + int(error.args[0])  # 130 from the keyboard, 143 when terminated
    except BrokenPipeError:
        return _BROKEN_PIPE
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # by which typer leaves when the reader of a pipe has gone
            return _BROKEN_PIPE
        _show_traceback(arguments)
        _complain(f"Internal error: something ended the command by SystemExit: {error.code}. (--verbose shows where.)")
        return 1
    except _CommandLineError as error:
        error.show()
        return int(error.exit_code)
    except QuantcliError as error:
        _show_traceback(arguments)
        _complain(str(error))
        return error.exit_code
    except MemoryError:
        _complain("The memory is too small. Use a machine with more of it.")
        return RoomError.exit_code
    except Exception as error:
        _show_traceback(arguments)
        if (known := refusal_of_the_system(error)) is not None:
            _complain(str(known))
            return known.exit_code
        first = next(iter(str(error).splitlines()), "")
        _complain(f"Internal error: {type(error).__name__}: {first} (--verbose shows where.)")
        return 1


def _goes_on(arguments: Sequence[str]) -> bool:
    """Whether a command keeps in a run directory what it has finished."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    return command in _IN_RUNS and not any(word.startswith("--checkpoint") for word in arguments)


def _show_traceback(arguments: Sequence[str]) -> None:
    if "--verbose" in arguments:
        from quantcli.printed import printable

        sys.stderr.write(printable(traceback.format_exc()))


def _complain(text: str) -> None:
    from quantcli.printed import PlainConsole

    PlainConsole(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)


def _run(
    stage: str | None,
    recipe: str,
    overrides: list[str] | None,
    model: str | None,
    output: str | None,
    device: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    from quantcli import console
    from quantcli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), model=model, output=output, device=device)
    missed = None
    with console.progress(quiet=quiet, verbose=verbose) as listener:
        from quantcli.pipeline.engine import run_recipe
        from quantcli.pipeline.result import MissedGate

        try:
            command = _as_typed(stage or "run", recipe, overrides, model, output, device)
            result = run_recipe(loaded, until=stage, listener=listener, command=command, overwrite=overwrite)
        except MissedGate as error:
            missed, result = error, error.result
    if as_json:
        _print_json(result.to_json() | {"missed_gate": missed and str(missed)})
    elif not quiet:
        console.show_result(result)
    if missed is not None:
        raise missed


def _as_typed(command: str, recipe: str, overrides: list[str] | None, *options: str | None) -> str:
    """The command that does the same again; `options` are the values of --model, --output and --device."""
    words = ["quantcli", command, recipe]
    for change in overrides or ():
        words += ["--set", change]
    for name, value in zip(("--model", "--output", "--device"), options, strict=True):
        words += [name, value] if value else []
    return shlex.join(words)


def _stage_command(stage: str | None) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        overrides: SetOption = None,
        model: ModelOption = None,
        output: OutputOption = None,
        device: DeviceOption = None,
        overwrite: OverwriteOption = False,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        _run(stage, recipe, overrides, model, output, device, overwrite, as_json, quiet, verbose)

    return command


app.command("run", help="All stages, in order; what is up to date is skipped.")(_stage_command(None))
for _name, _help in {
    "smooth": "Move outliers of activations into weights, before anything else is found.",
    "calibrate": "Observe activations on calibration text.",
    "quantize": "Find codes and scales, after what comes before is up to date.",
    "search": "Find the fewest linears to roll back for quantize.rollback.target.",
    "allocate": "Choose the scheme of each linear for quantize.target.",
    "export": "Write the checkpoints, after what comes before is up to date.",
}.items():
    app.command(_name, help=_help)(_stage_command(_name))


@app.command("eval-ppl")
def eval_ppl(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; not needed with --checkpoint.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            parser=_path,
            metavar="PATH",
            help="Score this checkpoint, whoever made it, in the place of a run.",
        ),
    ] = None,
    overrides: SetOption = None,
    model: ModelOption = None,
    output: OutputOption = None,
    device: DeviceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Perplexity of the float model and of the export; or of any checkpoint, beside --model if that is given."""
    if checkpoint is None:
        if recipe is None:
            raise RecipeError("eval-ppl: there is no recipe.", "Name one, or a checkpoint: --checkpoint DIR.")
        _run("eval-ppl", recipe, overrides, model, output, device, overwrite, as_json, quiet, verbose)
        return
    from quantcli import console
    from quantcli.pipeline.source import require_checkpoint
    from quantcli.recipe import load_recipe

    require_checkpoint(checkpoint, scored=True)
    if model is not None:
        model = str(_path(model))
        require_checkpoint(Path(model), scored=True)
    section: dict[str, Any] = {"perplexity": {}}
    source: Any = recipe or {"model": {"path": "."}, "quantize": {}, "evaluate": section, "output": "runs"}
    loaded = load_recipe(source, overrides or (), model=str(checkpoint), output=output or "runs", device=device)
    with console.progress(quiet=quiet, verbose=verbose) as listener:
        from quantcli.pipeline.standalone import score_recipe

        found = score_recipe(loaded, model, listener)
    if as_json:
        _print_json(found)
    else:
        console.show_scores(found)
    if found["missed_gate"]:
        raise GateError(found["missed_gate"], "Try a milder scheme, or roll back more.")


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(parser=_path, metavar="CHECKPOINT", help="A quantized checkpoint, whoever made it.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format to write, as in export.formats.")],
    output: Annotated[
        Path, typer.Option("--output", parser=_path, metavar="PATH", help="Directory of the new checkpoint.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    restrict_permissions: Annotated[
        bool,
        typer.Option(
            "--restrict-permissions/--no-restrict-permissions",
            help="Whether ascend, mindie and numpy are for their owner alone, as export.restrict_permissions.",
        ),
    ] = True,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", metavar="SIZE", help="Largest size of a file of weights, as export.shard_size."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code, if it comes with some.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a quantized checkpoint in another format, with the codes that it has."""
    from quantcli import console
    from quantcli.pipeline.convert import convert_checkpoint
    from quantcli.recipe.fields import size_option

    found = convert_checkpoint(
        checkpoint,
        to,
        output,
        overwrite=overwrite,
        restrict_permissions=restrict_permissions,
        shard_bytes=None if shard_size is None else size_option("--shard-size", shard_size),
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        _print_json(found)
    else:
        console.show_facts(f"{output} is in order", found)


@app.command()
def sensitivity(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    model: ModelOption = None,
    output: OutputOption = None,
    device: DeviceOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Linears in the table and in the rollback block.")] = 20,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to sort by, as quantize.rollback.metric.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Rank the linears by how much quantization hurts them, and print a rollback block to paste."""
    from quantcli import console
    from quantcli.recipe import load_recipe

    changes = [*(overrides or ()), *([f"quantize.rollback.metric={metric}"] if metric else ())]
    loaded = load_recipe(recipe, changes, model=model, output=output, device=device)
    with console.progress(quiet=quiet, verbose=verbose) as listener:
        from quantcli.pipeline.engine import rank_linears

        found = rank_linears(loaded, listener=listener)
    if as_json:
        _print_json(found)
    else:
        console.show_sensitivity(found, top)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    model: ModelOption = None,
    output: OutputOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What would happen, without reading weights: schemes, sizes, memory, time, and engines that load the result."""
    from quantcli import console
    from quantcli.recipe import load_recipe

    # a plan writes nothing, so it needs no place to write to
    loaded = load_recipe(recipe, overrides or (), model=model, output=output, device=device, default_output="runs")
    from quantcli.pipeline.engine import plan_recipe

    found = plan_recipe(loaded)
    if as_json:
        _print_json(found.to_json())
    else:
        console.show_plan(found, verbose=verbose)


@app.command()
def verify(
    path: Annotated[
        Path,
        typer.Argument(parser=_path, metavar="RUN|CHECKPOINT", help="A run directory or an exported checkpoint."),
    ],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code, if it comes with some.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Re-read an exported checkpoint with an independent reader and check it against the store it was written from."""
    from quantcli import console
    from quantcli.pipeline.verify import verify_path

    found = verify_path(path, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(found)
    else:
        console.show_facts(f"{path} is in order", found)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=_path, metavar="RUN...", help="Run directories; several are compared.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", parser=_path, metavar="PATH", help="File to write.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the page of a run, or compare several on one page."""
    from quantcli import console
    from quantcli.pipeline.report import report_paths

    found = report_paths(runs, output, overwrite=overwrite)
    if as_json:
        _print_json(found)
    else:
        console.show_report(found)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(parser=_path, metavar="PATH", help="A model, a checkpoint or a run directory.")
    ],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what a model, a checkpoint or a run directory is."""
    from quantcli import console
    from quantcli.pipeline.inspect import inspect_path

    found = inspect_path(path)
    if as_json:
        _print_json(found)
    else:
        console.show_facts(str(path), found)


@app.command()
def schema() -> None:
    """JSON schema of a recipe, for editors."""
    from quantcli.recipe import json_schema

    _print_json(json_schema())


@recipes_app.command("list")
def list_recipes() -> None:
    """Names of the shipped recipes, and when to use each."""
    from quantcli import console
    from quantcli.recipe import shipped_description, shipped_names

    console.show_facts("Shipped recipes", {name: shipped_description(name).splitlines()[0] for name in shipped_names()})


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    from quantcli.recipe import shipped_path

    typer.echo(shipped_path(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    destination: Annotated[Path, typer.Argument(help="A file or a directory.")] = Path("."),
) -> None:
    """Copy a shipped recipe, to be edited. An existing file is not overwritten."""
    from quantcli.recipe import copy_shipped

    typer.echo(f"Wrote {copy_shipped(name, destination)}.")


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
