"""English prose that every Python installation carries, so that a first run needs no download and no data file.

The text is the language reference (pydoc_data.topics) and the docstrings of standard modules, reduced to whole
sentences. It is technical prose of one register: good enough to calibrate ranges and to compare a model with its
quantized self, no replacement for text of the domain that the model will serve. It differs between Python versions,
which the fingerprint of the data set shows.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path

# Modules of much documentation that Python 3.10 to 3.14 share; those that an installation lacks are passed over.
_MODULES = (
    "typing doctest difflib logging inspect logging.handlers unittest.mock _pyio email.message threading ipaddress "
    "configparser xml.etree.ElementTree pdb statistics smtplib unittest.case os codecs optparse http.cookiejar tarfile "
    "ssl shutil http.server urllib.request traceback xml.sax.handler re subprocess argparse socket socketserver "
    "urllib.parse email._policybase ast xmlrpc.server http.client imaplib textwrap ftplib pkgutil asyncio.tasks bdb "
    "tempfile platform wave email.charset decimal _pydecimal datetime _pydatetime random fractions heapq collections "
    "functools contextlib dataclasses enum zipfile gettext calendar mailbox csv json.decoder concurrent.futures._base "
    "asyncio.base_events asyncio.streams multiprocessing.pool pickletools pickle selectors string copy bisect abc "
    "weakref types pathlib pprint shelve sched queue html.parser fileinput filecmp getpass glob cmd code "
    "sqlite3.dbapi2 unittest.loader unittest.suite timeit trace zipapp colorsys operator reprlib"
)

_MARKUP = (
    (re.compile(r":[a-z:]+:`~?([^`]*)`"), r"\1"),  # roles: :class:`Name`
    (re.compile(r"`{1,2}([^`']*)`{1,2}_?"), r"\1"),  # literals: ``name``, `name`
    (re.compile(r"(?<![\"\w*])\*{1,2}([^*\s\"][^*\"]*?)\*{1,2}(?![\"\w*])"), r"\1"),  # emphasis: *name*
    (re.compile(r" ?\[\d+\]"), ""),  # footnotes: [1]
    (re.compile(r"^(?:[*+•-]|\d+[.)]) +"), ""),  # items of lists
)
_NOT_PROSE = re.compile(r"::=|>>>|===|---|\*\*\*|^[:@.]|\|")
_SHORTEST_PARAGRAPH = 60
_SHORTEST_DOCUMENT = 300


@lru_cache(maxsize=1)
def builtin_documents() -> tuple[str, ...]:
    """The documents, one a topic or module, in a fixed order; paragraphs, joined by blank lines, that occur only once.

    That no paragraph occurs twice keeps any two documents disjoint: the topics of the language reference repeat each
    other's sections. Empty where Python is installed without its documentation and sources.
    """
    seen: set[str] = set()
    documents = []
    for source in (*_topics(), *_module_docstrings()):
        paragraphs = []
        for block in re.split(r"\n\s*\n", source):
            paragraph = _prose(block)
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        document = "\n\n".join(paragraphs)
        if len(document) >= _SHORTEST_DOCUMENT:
            documents.append(document)
    return tuple(documents)


def _topics() -> Iterator[str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return
    yield from (topics[name] for name in sorted(topics))


def _module_docstrings() -> Iterator[str]:
    """All docstrings of a module as one text, read from its source: importing would run code, and -OO drops them."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in _MODULES.split():
        base = library.joinpath(*name.split("."))
        source = next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)
        if source is None:
            continue
        yield "\n\n".join(_docstrings(ast.parse(source.read_bytes())))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    yield ast.get_docstring(node) or ""
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(inner)


def _prose(block: str) -> str:
    """The block as one line of sentences without reST marks; empty if it is a heading, code, grammar or a table."""
    text = " ".join(block.split())
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    words = re.findall(r"\b[A-Za-z]+\b", text)
    wordy = sum(map(len, words)) >= 0.7 * len(text) and len(words) >= 8
    sentence = text[:1].isupper() and text.endswith((".", ":", "!", "?", ".)", '."'))
    if len(text) < _SHORTEST_PARAGRAPH or not wordy or not sentence or _NOT_PROSE.search(text):
        return ""
    return text
