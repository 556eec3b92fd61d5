"""Runs beside each other: which are comparable, which none beats, and what differs."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import save_run

from quantcli.errors import RecipeError
from quantcli.pipeline.report import report_paths, run_facts
from quantcli.report.comparison import compare, comparison_page
from quantcli.report.scatter import Point, pareto_chart, pareto_front, unbeaten

GB = 1_000_000_000


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(i), size, loss) for i, (size, loss) in enumerate(pairs)]
    unbeaten = {
        (p.size, p.loss)
        for p in points
        if not any(o.size <= p.size and o.loss <= p.loss and (o.size, o.loss) != (p.size, p.loss) for o in points)
    }
    front = pareto_front(points)
    assert {(p.size, p.loss) for p in front} == unbeaten
    assert len(front) == len(unbeaten)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=12))
def test_equal_points_beat_each_other_not(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(i), size, loss) for i, (size, loss) in enumerate(pairs)]
    places = [(point.size, point.loss) for point in pareto_front(points)]
    found = unbeaten(points)
    assert {point.name for point in found} == {p.name for p in points if (p.size, p.loss) in places}
    assert [p.size for p in found] == sorted(p.size for p in found)


def test_a_run_that_was_repeated_is_as_good_as_the_first(tmp_path: Path) -> None:
    facts = [run_facts(save_run(tmp_path / name, bytes=4 * GB, kl=0.03)) for name in ("one", "again")]
    found = compare(facts)
    assert found["front"] == {"kl_divergence": ["one", "again"], "perplexity": ["one", "again"]}
    page = comparison_page(facts, found)
    assert page.count('class="point run best"') == 4
    assert "<b>one</b>" in page
    assert "<b>again</b>" in page


def test_a_chart_is_drawn_of_one_point_and_of_equal_ones() -> None:
    for points in ([Point("a", 1e9, 0.0)], [Point("a", 1e9, 0.01), Point("b", 1e9, 0.01)]):
        chart = pareto_chart(points, "KL divergence", logarithmic=True)
        assert chart.count("<circle") == len(points)
        assert "nan" not in chart


def _labels(chart: str, names: set[str]) -> dict[str, tuple[float, float, float, float]]:
    """Left, right, top and bottom of each name in a chart, of a wide font."""
    found = {}
    for x, y, kind, name in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" class="(label axis[ a-z]*)">([^<]+)</text>', chart
    ):
        if name in names:
            left = float(x) - (9.6 * len(name) if kind.endswith("end") else 0)
            found[name] = (left, left + 9.6 * len(name), float(y) - 12, float(y) + 4)
    return found


CROWDS = {
    "as in the documentation": [(113.1, 0.109), (163.5, 0.0475), (166.2, 0.00364)],
    "a steep front": [(100, 0.5), (101, 0.1), (102, 0.02), (103, 0.004)],
    "a flat front": [(100, 0.0104), (140, 0.0103), (180, 0.0102), (220, 0.0101)],
    "beside each other": [(100, 0.01), (100.5, 0.0101), (101, 0.0099), (101.5, 0.0102), (99, 0.01)],
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("logarithmic", [True, False])
def test_no_name_lies_on_the_front_a_point_or_another_name(crowd: str, logarithmic: bool) -> None:
    points = [Point(f"w{i}a16-gptq", size * 1e6, loss, loss / 50) for i, (size, loss) in enumerate(CROWDS[crowd])]
    chart = pareto_chart(points, "KL divergence", logarithmic=logarithmic)
    boxes = _labels(chart, {point.name for point in points})
    assert len(boxes) == len(points)
    (path,) = re.findall(r'<path d="M([^"]+)" class="line front"/>', chart)
    corners = [tuple(map(float, pair.split())) for pair in path.split("L")]
    drawn = [
        (x0 + (x1 - x0) * t / 500, y0 + (y1 - y0) * t / 500)
        for (x0, y0), (x1, y1) in pairwise(corners)
        for t in range(501)
    ]
    drawn += [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    for name, (left, right, top, bottom) in boxes.items():
        assert left >= 0, name
        assert right <= 620, name
        assert not [(x, y) for x, y in drawn if left < x < right and top < y < bottom], name
        for other, (l, r, t, b) in boxes.items():  # noqa: E741
            assert name == other or right <= l or r <= left or bottom <= t or b <= top, (name, other)


def _three(tmp_path: Path) -> list[Path]:
    return [
        save_run(tmp_path / "w8", bytes=7 * GB, kl=0.002, increase=0.001),
        save_run(tmp_path / "w4", scheme="W4A16 g128", bytes=4 * GB, kl=0.03, increase=0.02),
        save_run(tmp_path / "bad", bytes=8 * GB, kl=0.05, increase=0.04),
    ]


@pytest.mark.parametrize("loss", [17.55, 26.0, 16.95])
def test_the_name_of_the_float_model_is_beside_its_point_at_the_end_of_a_steep_line(loss: float) -> None:
    points = [Point("w8a8", 163.5e6, loss), Point("float", 269e6, 16.9, look="origin")]
    chart = pareto_chart(points, "perplexity")
    _, _, top, bottom = _labels(chart, {"float"})["float"]
    y = max(float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart))
    assert top - 8 <= y <= bottom + 8


def test_the_runs_that_none_beats_are_named(tmp_path: Path) -> None:
    found = compare([run_facts(path) for path in _three(tmp_path)])
    assert found["comparable"] == ["w8", "w4", "bad"]
    assert found["front"] == {"kl_divergence": ["w4", "w8"], "perplexity": ["w4", "w8"]}
    assert found["notes"] == []
    assert found["differences"] == {"quantize.weights.bits": [8, 4, 8]}
    row = found["runs"][1]
    assert (row["size"], row["kl_divergence"], row["schemes"]) == (4 * GB, 0.03, {"W4A16 g128": 20, "float": 2})
    assert row["measured"]["eval-ppl.flips.lost"] == 0.0123
    assert [(row["warnings"], row["missed_gates"]) for row in found["runs"]] == [(1, 0), (1, 1), (1, 1)]
    json.dumps(found, allow_nan=False)


def test_the_page_shows_the_front_and_every_run(tmp_path: Path) -> None:
    facts = [run_facts(path) for path in _three(tmp_path)]
    page = comparison_page(facts, compare(facts))
    assert len(re.findall(r'class="point run best"', page)) == 4  # two runs in each of two charts
    assert len(re.findall(r'class="point run"', page)) == 2
    assert 'class="point origin best"' in page  # smaller than none, and nothing lost
    assert "What differs in the recipes" in page
    assert page.count('class="scroll chart"') == 3
    assert "<h2>Tasks</h2>" in page
    assert page.count("60.50\u00a0% (56.87\u00a0% to 64.01\u00a0%)") == 3
    assert page.count("−1.50\u00a0% ± 0.62\u00a0%") == 3
    for name in ("w8", "w4", "bad"):
        assert f"<h3>{name}</h3>" in page


def test_runs_of_other_text_are_told_apart_and_left_out_of_the_charts(tmp_path: Path) -> None:
    paths = [*_three(tmp_path), save_run(tmp_path / "other", bytes=GB, kl=0.0001)]
    summary = json.loads((paths[-1] / "summary.json").read_text())
    summary["result"]["perplexity"]["windows"] = 3
    (paths[-1] / "summary.json").write_text(json.dumps(summary))
    another_model = save_run(tmp_path / "model", bytes=GB, kl=0.0001, float=2.9)
    unmeasured = save_run(tmp_path / "unmeasured")
    summary = json.loads((unmeasured / "summary.json").read_text())
    summary["result"]["perplexity"] = None
    (unmeasured / "summary.json").write_text(json.dumps(summary))
    found = compare([run_facts(path) for path in (*paths, another_model, unmeasured)])
    assert found["comparable"] == ["w8", "w4", "bad"]
    assert found["front"]["kl_divergence"] == ["w4", "w8"]
    assert found["notes"][0].startswith("other, model: measured on other text")
    assert found["notes"][1].startswith("unmeasured: nothing was measured")


@pytest.mark.parametrize(("key", "value"), [("stride", 512), ("batch_size", 4), ("tokens_digest", "f" * 64)])
def test_runs_with_as_many_tokens_that_are_others_are_told_apart(tmp_path: Path, key: str, value: Any) -> None:
    paths = [*_three(tmp_path), save_run(tmp_path / "other")]
    summary = json.loads((paths[-1] / "summary.json").read_text())
    summary["result"]["perplexity"][key] = value
    (paths[-1] / "summary.json").write_text(json.dumps(summary))
    found = compare([run_facts(path) for path in paths])
    assert found["comparable"] == ["w8", "w4", "bad"]
    assert found["notes"][0].startswith("other: measured on other text")


def test_directories_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    facts = [run_facts(save_run(tmp_path / parent / "run")) for parent in ("a", "b")]
    assert [row["run"] for row in compare(facts)["runs"]] == ["a/run", "b/run"]


def test_a_section_that_one_recipe_lacks_is_told_once(tmp_path: Path) -> None:
    sections = ("{samples: 8, seed: 0}", "{samples: 9, seed: 0}", "null")
    facts = []
    for index, section in enumerate(sections):
        path = save_run(tmp_path / str(index))
        (path / "recipe.yaml").write_text(f"calibration: {section}\noutput: {index}\n")
        facts.append(run_facts(path))
    wanted = {"calibration": ["given", "given", None], "calibration.samples": [8, 9, None]}
    assert compare(facts)["differences"] == wanted


def test_what_differs_is_shown_as_a_recipe_has_it(tmp_path: Path) -> None:
    paths = [save_run(tmp_path / "one"), save_run(tmp_path / "other")]
    tasks = "[{task: boolq, limit: 200, shots: null}, squad]"
    for path, keys in zip(
        paths, (f"quantize: {{q: true}}\ntasks: {tasks}\n", "quantize: {q: false}\ntasks: []\n"), strict=True
    ):
        (path / "recipe.yaml").write_text(keys)
    facts = [run_facts(path) for path in paths]
    page = comparison_page(facts, compare(facts))
    assert "<td><code>quantize.q</code></td><td>true</td><td>false</td>" in page
    assert "<td><code>tasks</code></td><td>[{task: boolq, limit: 200}, squad]</td><td>[]</td>" in page


def test_a_comparison_of_large_models_is_small(tmp_path: Path) -> None:
    facts = [run_facts(save_run(tmp_path / str(i), blocks=80)) for i in range(6)]
    assert len(comparison_page(facts, compare(facts)).encode()) < 2_000_000


def test_a_run_is_compared_with_others_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_run(tmp_path / "run")
    with pytest.raises(RecipeError, match="named twice"):
        report_paths([path, tmp_path / "x" / ".." / "run"], None, overwrite=False)
    found: dict[str, Any] = report_paths([path, save_run(tmp_path / "b")], None, overwrite=False)
    assert found["page"] == "comparison.html"
    assert (tmp_path / "comparison.html").is_file()
