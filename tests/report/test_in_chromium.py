"""The page in a real browser: it complains of nothing, asks no network, and its table can be sorted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import PROGRAM, Browser
from synthetic_run import save_run

from quantcli.pipeline.report import report_paths

NEEDS = "needs Chromium (Debian: apt-get install chromium)"
# a machine that says it is one of continuous integration has to have it, or nobody would ever see these tests run
pytestmark = pytest.mark.skipif(PROGRAM is None and os.environ.get("CI") != "true", reason=NEEDS)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None, NEEDS
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    # what a hostile model might say; a page that took it for markup would run it, and would ask for the picture
    text = "</pre><script>document.title='taken'</script><img src=http://example.invalid/x.png onerror=alert(1)>"
    one = save_run(folder / "one", blocks=8, text=text)
    other = save_run(folder / "other", blocks=8, kl=0.2, text=text)
    large = save_run(folder / "large", blocks=80)
    report_paths([one], folder / "run.html", overwrite=False)
    report_paths([large], folder / "large.html", overwrite=False)
    report_paths([one, other], folder / "comparison.html", overwrite=False)
    losses = {"w4a16-gptq": (113.1, 0.0581), "w8a8": (163.5, 0.0234), "w8a16": (166.2, 0.00311)}
    # what two decimals do not tell apart
    close = [save_run(folder / name, kl=kl) for name, kl in (("a", 0.0041), ("b", 0.0031), ("c", 0.0035))]
    report_paths(close, folder / "close.html", overwrite=False)
    three = [save_run(folder / name, bytes=int(size * 1e9), kl=kl) for name, (size, kl) in losses.items()]
    report_paths(three, folder / "charts.html", overwrite=False)
    return {name: folder / f"{name}.html" for name in ("run", "comparison", "large", "close", "charts")}


@pytest.mark.parametrize("name", ["run", "comparison", "large"])
def test_a_page_opens_without_complaint_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    assert browser.named("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    asked = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert asked == [pages[name].as_uri()]
    assert browser.evaluate("document.title") != "taken"
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.evaluate("document.querySelectorAll('svg rect, svg path').length") > 20
    assert browser.evaluate("document.compatMode") == "CSS1Compat"


@pytest.mark.parametrize("name", ["run", "comparison", "large"])
@pytest.mark.parametrize("width", [400, 1100, 1200])
def test_a_page_fits_its_window(browser: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(pages[name])
    browser.evaluate('document.querySelectorAll("details").forEach(each => { each.open = true; })')
    assert browser.evaluate("document.documentElement.clientWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_at_1100_pixels_no_table_has_to_be_scrolled(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """With tasks, speeds, missed gates and all else that a page can have."""
    browser.send("Emulation.setDeviceMetricsOverride", width=1100, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(pages[name])
    boxes = browser.evaluate("""
      document.querySelectorAll("details").forEach(each => { each.open = true; });
      [...document.querySelectorAll(".scroll")].map(box => [box.scrollWidth - box.clientWidth, box.textContent])""")
    assert len(boxes) > 5
    assert [box for box in boxes if box[0] > 0] == []


_TABLES = """
(() => {
  document.querySelectorAll("details").forEach(each => { each.open = true; });
  return [...document.querySelectorAll("table")].map(table => {
    const box = table.closest(".scroll"), right = (node) => node.getBoundingClientRect().right;
    const before = right(box);
    box.scrollLeft = 1e6;
    const cells = [...table.querySelectorAll("th, td")];
    return {
      page: before,
      last: Math.max(...cells.map(right)) - right(box),
      cut: Math.max(...cells.map(cell => cell.scrollWidth - cell.clientWidth)),
      height: Math.max(...[...table.rows].map(row => row.offsetHeight)),
      facts: table.classList.contains("facts"),
    };
  });
})()
"""


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_tables_of_a_narrow_window_scroll_in_their_boxes_to_the_last_column(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    """No cell is cut or lies over its neighbour, and none is squeezed into a column of single words."""
    browser.send("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(pages[name])
    tables = browser.evaluate(_TABLES)
    assert len(tables) > 3
    for table in tables:
        assert table["page"] <= 400
        assert table["last"] <= 1
        assert table["cut"] <= 0
        assert table["facts"] or table["height"] < 160
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400


_NAMES = """
[...document.querySelectorAll("svg")].filter(svg => svg.querySelector(".front")).map(svg => {
  const front = svg.querySelector(".front"), length = front.getTotalLength();
  const line = [...Array(501).keys()].map(i => front.getPointAtLength(length * i / 500));
  return [...svg.querySelectorAll("text")].filter(text => /w[48]a|float/.test(text.textContent)).map(text => {
    const box = text.getBBox(), right = box.x + box.width;
    const on = line.filter(p => box.x < p.x && p.x < right && box.y + 3 < p.y && p.y < box.y + box.height - 3);
    return { left: box.x, over: right - svg.viewBox.baseVal.width, on: on.length };
  });
})
"""


def test_names_in_charts_are_whole_and_off_the_line(browser: Browser, pages: dict[str, Path]) -> None:
    browser.send("Emulation.setDeviceMetricsOverride", width=1100, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(pages["charts"])
    charts = browser.evaluate(_NAMES)
    assert [len(names) for names in charts] == [3, 4]
    for name in (name for names in charts for name in names):
        assert name["left"] >= 0
        assert name["over"] <= 0
        assert name["on"] == 0


def test_light_and_dark_differ_and_text_is_readable_in_both(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    seen = []
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours = [browser.evaluate(f"getComputedStyle(document.body).{key}") for key in ("color", "backgroundColor")]
        ink, back = ([int(part) for part in colour[4:-1].split(",")] for colour in colours)
        assert abs(sum(ink) - sum(back)) > 3 * 128
        seen.append(colours)
    assert seen[0] != seen[1]


def test_a_table_is_sorted_by_the_column_that_is_clicked(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    column = """[...[...document.querySelectorAll("table.sortable")].at(-1).tBodies[0].rows]
        .map(row => Number(row.cells[2].dataset.key)).filter(value => value > 0)"""
    before = browser.evaluate(column)
    click = '[...document.querySelectorAll("table.sortable")].at(-1).tHead.rows[0].cells[2].click()'
    browser.evaluate(click)
    assert browser.evaluate(column) == sorted(before, reverse=True) != before
    browser.evaluate(click)
    assert browser.evaluate(column) == sorted(before)


def test_small_numbers_are_sorted_by_all_their_digits(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["close"])
    head = """[...document.querySelectorAll("table.sortable th")].find(each => each.textContent == "KL divergence")"""
    shown = f"""[...{head}.closest("table").tBodies[0].rows]
        .map(row => parseFloat(row.cells[{head}.cellIndex].textContent))"""
    for order in ([0.0041, 0.0035, 0.0031], [0.0031, 0.0035, 0.0041]):
        browser.evaluate(f"{head}.click()")
        assert browser.evaluate(shown) == pytest.approx(order)
