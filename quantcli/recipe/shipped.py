"""The recipes that come with quantcli, for users to read, copy and own."""

from __future__ import annotations

import difflib
from pathlib import Path

from quantcli.errors import OutputError, RecipeError


def expanded(path: str | Path) -> Path:
    """`path` with a leading ~ replaced by the home directory, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a file may still be called so
        return Path(path)


def shipped_directory() -> Path:
    """Where the shipped recipes lie: in an installed package inside it, in a source checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "shipped_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_directory().glob("*.yaml"))


def shipped_path(name: str) -> Path:
    """File of the shipped recipe `name`; raises RecipeError with the nearest names for an unknown one."""
    names = shipped_names()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        remedy = f"Did you mean {' or '.join(near)}?" if near else f"Shipped recipes: {', '.join(names)}."
        raise RecipeError(f"{name}: neither a file nor a shipped recipe.", remedy)
    return shipped_directory() / f"{name}.yaml"


def shipped_description(name: str) -> str:
    """The comment at the head of the shipped recipe `name`; its first line is the summary."""
    lines = []
    for line in shipped_path(name).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def copy_shipped(name: str, destination: str | Path) -> Path:
    """Copy the shipped recipe `name` to the file `destination`, or into it if it is a directory; returns the new file.

    Raises RecipeError for an unknown name, OutputError where the file is there already or cannot be written.
    """
    text = shipped_path(name).read_bytes()
    target = expanded(destination)
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with target.open("xb") as file:  # x: never onto a file that is there
            file.write(text)
    except FileExistsError:
        raise OutputError(f"{target}: is there already.", "Choose another name.") from None
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}).", "Choose another place.") from None
    return target
