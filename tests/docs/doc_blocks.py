"""README.md, ARCHITECTURE.md and docs/ as data: fenced blocks, commands, tables, headings and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "SmolLM2-135M-Instruct"  # the model of the examples
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Command:
    """A command of a shell block, the output shown, and the exit status that `$ echo $?` behind it shows."""

    words: list[str]
    redirect: str | None = None
    output: list[str] = field(default_factory=list)
    status: int = 0


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(document: Path, language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return [body for tag, body in _FENCE.findall(document.read_text(encoding="utf-8")) if tag == language]


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return _FENCE.sub("", document.read_text(encoding="utf-8"))


def commands(document: Path) -> list[Command]:
    """The commands of all bash and console blocks, in order."""
    found: list[Command] = []
    for tag, body in _FENCE.findall(document.read_text(encoding="utf-8")):
        if tag == "bash":
            found += [_command(line) for line in body.splitlines() if line and not line.startswith("#")]
        elif tag == "console":
            found += _session(body)
    return found


def _session(body: str) -> Iterator[Command]:
    current: Command | None = None
    expects_status = False
    for line in body.splitlines():
        if expects_status:
            assert current is not None
            current.status = int(line)
            expects_status = False
        elif line == "$ echo $?":
            expects_status = True
        elif line.startswith("$ "):
            if current is not None:
                yield current
            current = _command(line[2:])
        elif current is not None:
            current.output.append(line)
    if current is not None:
        yield current


def _command(line: str) -> Command:
    words = shlex.split(line)
    if ">" in words:
        return Command(words[: words.index(">")], words[words.index(">") + 1])
    return Command(words)


def section(document: str, heading: str) -> str:
    """The text below a heading, up to the next of its level or above."""
    text = text_of(document)
    match = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert match is not None, f"{document} has no heading {heading!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in a text, without headings."""
    found: list[list[str]] = []
    body = False
    for line in text.splitlines():
        if not line.startswith("|"):
            body = False
        elif re.fullmatch(r"[|\- :]+", line):
            body = True
        elif body:
            found.append([cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def codes(cell: str) -> list[str]:
    """The contents of `backticks`."""
    return re.findall(r"`([^`]+)`", cell)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(document: Path) -> list[str]:
    """Link targets of a document, blocks left out."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(document))
