"""What keeps a page whole whatever stands in the texts that it shows."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from quantcli.report.markup import Markup, element, table, text
from quantcli.report.numbers import fixed, percent, ratio, seconds, short, size, tick, typeset, with_error


class _Reader(HTMLParser):
    """Tags, attributes and text, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(), st.text())
def test_text_comes_back_as_text_and_adds_no_tag(content: str, value: str) -> None:
    read = _Reader(element("p", content, title=value))
    assert read.tags == ["p"]
    assert set(read.attributes) == {"title"}
    kept = "".join("\ufffd" if (ord(c) < 32 and c not in "\t\n\r") or 127 <= ord(c) < 160 else c for c in content)
    assert read.text.replace("\r", "\n") == kept.replace("\r", "\n")
    element("p", content).encode("utf-8")


def test_halves_of_surrogates_do_not_reach_the_file() -> None:
    assert text("a\ud800b") == "a\ufffdb"


def test_markup_is_not_escaped_again() -> None:
    inner = element("b", "1 < 2")
    assert inner == "<b>1 &lt; 2</b>"
    assert element("p", inner, [" & ", inner], None) == f"<p>{inner} &amp; {inner}</p>"
    assert text(Markup("<hr>")) == "<hr>"


def test_attributes_are_named_and_left_out_as_told() -> None:
    assert element("line", x1=1.0, stroke_width=2.345, class_="grid", hidden=False, title=None) == (
        '<line x1="1" stroke-width="2.35" class="grid"/>'
    )


def test_cells_can_be_sorted_by_another_value_than_they_show() -> None:
    shown = table(("name", "bytes"), [("a", ("1 kB", 1000))], numbers=[1], sortable=True)
    assert '<td class="number" data-key="1000">1 kB</td>' in shown
    assert '<table class="sortable">' in shown
    close = table(("KL",), [[("0.003", 0.00314159265)], [("1e-9", 1e-9)], [("–", None)]], sortable=True)
    assert [f'data-key="{key}"' in close for key in ("0.00314159265", "1e-09")] == [True, True]
    assert "<td>–</td>" in close


def test_numbers_are_short_and_their_absence_is_a_dash() -> None:
    assert [short(x) for x in (0, 0.00123456, 1.5, 123456.0, 1e-7, -0.5, None, float("nan"))] == [
        "0", "0.00123", "1.50", "123456", "1.00e−7", "−0.500", "–", "–",
    ]  # fmt: skip
    assert (percent(0.0123, signed=True), percent(-0.5), percent(None)) == ("+1.23\u00a0%", "−50.00\u00a0%", "–")
    assert (percent(-0.00001, signed=True), percent(0.0, signed=True)) == ("0.00\u00a0%", "0.00\u00a0%")
    assert (fixed(8.05), fixed(-1.0), fixed(None), ratio(1.646)) == ("8.050", "−1.000", "–", "1.65\u00a0×")
    assert [tick(x) for x in (0, 0.0001, 0.005, 20, 20000, 1e6, -0.5)] == [
        "0", "1e−4", "0.005", "20", "20000", "1e6", "−0.5",
    ]  # fmt: skip
    assert (size(999), size(1_234_567), size(98_700_000_000), size(None)) == ("999 B", "1.23 MB", "98.7 GB", "–")
    assert (seconds(1.25), seconds(600), seconds(7200 * 3), seconds(None)) == ("1.2 s", "10.0 min", "6.0 h", "–")


def test_an_error_has_the_decimals_of_its_number() -> None:
    assert with_error(18.0213, 1.0372, 3) == "18.021 ± 1.037"
    assert with_error(0.00311, 0.000042) == "0.00311 ± 0.00004"
    assert (with_error(0.2, 0.0002), with_error(0.2, 0.0)) == ("0.2000 ± 0.0002", "0.200 ± 0.000")
    assert with_error(3.1e-8, 4.2e-9) == "3.10e−8 ± 4.2e−9"
    assert (with_error(1.5, None), with_error(None, None), with_error(None, 0.1)) == ("1.50", "–", "–")


def test_a_message_is_set_as_the_page_is_and_its_names_stay() -> None:
    message = "evaluate.gates.task_drop (squad-2, f1): -1.5% ± 0.2% keeps 1%, see a-1/b%c and re:.*-2"
    assert typeset(message) == (
        "evaluate.gates.task_drop (squad-2, f1): −1.5\u00a0% ± 0.2\u00a0% keeps 1\u00a0%, see a-1/b%c and re:.*-2"
    )
