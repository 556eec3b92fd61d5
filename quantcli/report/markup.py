"""HTML and SVG as values. Text is escaped unless it is markup that was made here, so none can slip in unescaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

_VOID = {"meta", "rect", "line", "circle", "path"}
# Control characters that HTML forbids, and halves of surrogate pairs, which UTF-8 cannot hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Markup(str):
    """A piece of HTML or SVG that is safe as it stands."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as text: escaped, with U+FFFD in the place of characters that a page cannot hold. Markup stays."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def element(tag: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. Children are text, markup, or iterables of them; None is left out. Attributes that are None or False
    are left out, `class_` is class and `stroke_width` is stroke-width; numbers are rounded to two decimals."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inner = joined(children)
    if tag in _VOID and not inner:
        return Markup(f"<{tag}{shown}/>")
    return Markup(f"<{tag}{shown}>{inner}</{tag}>")


def joined(children: Iterable[Any]) -> Markup:
    """Children of an element, one after the other."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, (str, int, float)):
            parts.append(text(child))
        else:
            parts.append(joined(child))
    return Markup("".join(parts))


def table(
    headings: Iterable[Any], rows: Iterable[Iterable[Any]], *, numbers: Iterable[int] = (), sortable: bool = False
) -> Markup:
    """A table with a heading row. Columns `numbers` are set right; a cell may be (shown, value to sort by)."""
    right = set(numbers)

    def cell(column: int, content: Any) -> Markup:
        key = None
        if isinstance(content, tuple):
            content, key = content
        key = repr(key) if isinstance(key, float) else key  # whole, since attributes are rounded for drawings
        return element("td", content, class_="number" if column in right else None, data_key=key)

    head = element("tr", [element("th", h, class_="number" if i in right else None) for i, h in enumerate(headings)])
    body = [element("tr", [cell(i, c) for i, c in enumerate(row)]) for row in rows]
    kind = "sortable" if sortable else None
    return element(
        "div", element("table", element("thead", head), element("tbody", body), class_=kind), class_="scroll"
    )


def facts(rows: Iterable[tuple[Any, Any]]) -> Markup:
    """A table of two columns: what, and its value."""
    body = [element("tr", element("th", label, scope="row"), element("td", value)) for label, value in rows]
    return element("div", element("table", element("tbody", body), class_="facts"), class_="scroll")


def folded(summary: Any, *content: Any) -> Markup:
    """What is shown when a reader asks for it."""
    return element("details", element("summary", summary), content)


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return value
