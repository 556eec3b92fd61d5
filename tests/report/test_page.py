"""The page of a run, made from run directories that no model is needed for."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from synthetic_run import save_run

from quantcli.errors import OutputError, RecipeError
from quantcli.pipeline.report import report_paths, run_facts
from quantcli.report.charts import heat_step
from quantcli.report.comparison import compare, comparison_page
from quantcli.report.layers import grid_of, kind_of
from quantcli.report.page import _smoothing_table, flat, run_page

LIMIT = 2_000_000


def test_the_page_of_a_70b_model_is_small(tmp_path: Path) -> None:
    page = run_page(run_facts(save_run(tmp_path / "run", blocks=80)))
    assert len(page.encode()) < LIMIT
    assert len(re.findall(r'<rect [^>]*class="heat\d"><title>', page)) == 80 * 7 - 1


def test_the_page_of_a_mixture_is_small_and_shows_each_layers_worst_expert(tmp_path: Path) -> None:
    run = run_facts(save_run(tmp_path / "run", blocks=48, experts=64))
    page = run_page(run)
    assert len(page.encode()) < LIMIT
    cells = re.findall(r"<title>block 7, mlp\.experts\.\*\.up_proj: (\S+) \(W8A8 static, worst of 64\)", page)
    experts = [run["errors"]["values"][f"model.layers.7.mlp.experts.{e}.up_proj"] for e in range(64)]
    assert [float(cell) for cell in cells] == [pytest.approx(max(experts), rel=0.01)]


def test_the_page_says_what_a_reader_has_to_know(tmp_path: Path) -> None:
    page = run_page(run_facts(save_run(tmp_path / "run", blocks=3)))
    for part in (
        "quantcli run w8a8 --model x", "seed", "transformers", "5.24.0", "weights: {bits: 8}",
        "rolled back by output_error 0.0312", "output head, stays in float by default", "0.0123",
        "+1.20\u00a0%", "96.70\u00a0%", "perplexity, 95\u00a0% interval +1.12\u00a0% to +1.28\u00a0%<",
        "model.layers.1 is not smoothed.", "A note.", "32768 tokens in 64 sequences from 12 documents",
        "Because blue light <mark>scatters more.</mark>", "Because blue light <mark>is scattered.</mark>",
        "1 of 2 are equal", "as found: check", "strength 0.8 0", "delta_p.99.9", "flips.lost",
        "scales and zero points", "bits a quantized weight", "int8 products",
    ):  # fmt: skip
        assert part in page, part
    assert page.index("is not smoothed") < page.index("Outcome")
    for part in (
        "; 95\u00a0% interval +1.12\u00a0% to +1.28\u00a0%", "How predictions changed", "95.10\u00a0% ± 0.07\u00a0%",
        "1.23\u00a0%", "0.87\u00a0%", "boolq accuracy", "58.38\u00a0% to 65.49\u00a0%", "word perplexity",
        "prefill, tokens/s ↑", "2344",
        "<h2>1 missed gate, 1 warning or fallback, 1 note</h2>",
    ):  # fmt: skip
        assert part in page, part


def test_all_numbers_are_written_in_one_way(tmp_path: Path) -> None:
    """Of both pages: minus signs, no hyphens; no percent sign without a space that keeps it with its number."""
    runs = [save_run(tmp_path / name, kl=kl, increase=-0.01) for name, kl in (("one", 2e-7), ("other", 0.2))]
    facts = [run_facts(run) for run in runs]
    for page in (run_page(facts[1]), comparison_page(facts, compare(facts))):
        shown = re.sub(r"<(style|script|pre)>.*?</\1>|<code>.*?</code>", "", page, flags=re.DOTALL)
        words = html.unescape(re.sub(r"<[^>]*>", " ", shown))
        assert re.findall(r".{20}(?:\d %|\d%|(?<![\w)])-\d|\de-\d).{9}", words) == []
        assert "−1.00\u00a0%" in words


def test_missed_gates_stand_before_all_other_problems_with_bound_amount_and_the_worst_linears(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", blocks=3)
    run = run_facts(path)
    worst = max(run["errors"]["values"], key=run["errors"]["values"].__getitem__)
    first = run["problems"][0]
    assert first["kind"] == "missed gate"
    assert "kl_divergence: 0.0123 ± 0.0002 is above 0.01, by 0.0023." in first["text"]
    assert run["problems"][1]["kind"] == "worst linears"
    assert run["problems"][1]["text"].startswith(f"Largest output errors: {worst} ")
    page = run_page(run)
    assert page.index("is above 0.01") < page.index("is not smoothed") < page.index("A note.")
    kept = run_facts(save_run(tmp_path / "kept", kl=0.002))
    assert "missed gate" not in run_page(kept)
    assert {each["kind"] for each in kept["problems"]} == {"warning", "note"}
    assert "/elsewhere/" not in page  # a run directory may be moved


def test_nothing_of_a_models_text_becomes_markup(tmp_path: Path) -> None:
    text = "<script>alert(1)</script><b onclick=x>&amp;\u202e'\""
    page = run_page(run_facts(save_run(tmp_path / "run", text=text)))
    assert "<script>alert" not in page
    assert "<b onclick" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert not re.search(r"(?:src|href)=", page)
    assert "default-src &#x27;none&#x27;" in page


@pytest.mark.parametrize("missing", ["layers", "generate", "smooth", "eval-ppl", "calibrate", "check", "export"])
def test_a_page_is_made_of_what_is_there(tmp_path: Path, missing: str) -> None:
    path = save_run(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    del summary["result"]["stages"][missing]
    if missing == "eval-ppl":
        summary["result"]["perplexity"] = None
    if missing == "export":
        summary["result"] |= {"sizes": None, "exports": []}
    (path / "summary.json").write_text(json.dumps(summary))
    page = run_page(run_facts(path))
    assert ("KL divergence" in page) == (missing != "eval-ppl")
    assert ("sky blue" in page) == (missing != "generate")
    assert ("Output error by layer" in page) == (missing != "layers")
    assert ("before smoothing" in page) == (missing != "smooth")


def test_values_that_json_cannot_hold_leave_gaps(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run")
    for name in ("summary.json", "eval-ppl/results.json", "layers/errors.json"):
        keys = "value|error|increase|kl_divergence|kl_error|output_error|seconds"
        content = re.sub(rf'"({keys})": [\d.e-]+', r'"\1": null', (path / name).read_text())
        (path / name).write_text(content)
    page = run_page(run_facts(path))
    assert "undefined" in page
    assert "Output error by layer" not in page


def test_events_of_work_that_was_done_again_are_left_out(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run")

    def warned() -> list[str]:
        return [each["text"] for each in run_facts(path)["problems"] if each["kind"] == "warning"]

    def append(*events: dict[str, object]) -> None:
        with (path / "events.jsonl").open("a") as file:
            file.writelines(json.dumps({"stage": "smooth", **event}) + "\n" for event in events)

    assert warned() == ["model.layers.1 is not smoothed."]
    append({"event": "started", "resumed": True}, {"event": "warning", "text": "Two."})
    assert warned() == ["model.layers.1 is not smoothed.", "Two."]
    append({"event": "reused"}, {"event": "warning", "text": "Two."})
    assert warned() == ["model.layers.1 is not smoothed.", "Two."]
    append({"event": "started", "resumed": False}, {"event": "warning", "text": "Three."})
    assert warned() == ["Three."]


def test_linears_without_data_are_fallbacks(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run")
    name = "model.layers.0.mlp.up_proj"
    with (path / "events.jsonl").open("a") as file:
        for scheme in ("W8A8 static", "W4A16"):
            event = {"event": "linear", "stage": "quantize", "module": name, "scheme": scheme, "data_free": True}
            file.write(json.dumps(event) + "\n")
    found = [each for each in run_facts(path)["problems"] if each["kind"] == "fallback"]
    assert [each["text"] for each in found] == [f"1 linears are quantized without calibration: {name}."]


def test_a_page_goes_where_it_is_told_and_replaces_no_file_unasked(tmp_path: Path) -> None:
    path, other = save_run(tmp_path / "run"), tmp_path / "page.html"
    assert report_paths([path], None, overwrite=False)["page"] == str(path / "report.html")
    assert report_paths([path], None, overwrite=False)["run"] == "run"  # its own page is made anew
    report_paths([path], other, overwrite=False)
    assert other.read_bytes() == (path / "report.html").read_bytes()
    other.write_text("mine")
    with pytest.raises(OutputError, match=r"page\.html exists"):
        report_paths([path], other, overwrite=False)
    assert other.read_text() == "mine"
    report_paths([path], other, overwrite=True)
    assert other.read_bytes() == (path / "report.html").read_bytes()
    with pytest.raises(OutputError, match="cannot be written"):
        report_paths([path], tmp_path / "nowhere" / "page.html", overwrite=False)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no run directory"):
        report_paths([tmp_path], None, overwrite=False)
    path = save_run(tmp_path / "run")
    (path / "summary.json").unlink()
    with pytest.raises(RecipeError, match=r"no run has come to its end there\. Finish it: quantcli run"):
        report_paths([path], None, overwrite=False)


def test_kinds_of_linears_are_named_within_their_block() -> None:
    assert kind_of("model.layers.12.self_attn.q_proj", 12, 30) == "self_attn.q_proj"
    assert kind_of("model.layers.1.mlp.experts.17.up_proj", 1, 30) == "mlp.experts.*.up_proj"
    assert kind_of("transformer.h.3.attn.c_attn", 3, 12) == "attn.c_attn"
    assert kind_of("lm_head", 30, 30) == "lm_head"


def test_the_colours_of_a_map_are_even_steps_of_the_logarithm() -> None:
    steps = [heat_step(10**exponent, 1e-4, 1e-1) for exponent in (-5, -4, -3.5, -3, -2.5, -2, -1.5, -1, 0)]
    assert steps == [0, 0, 1, 3, 4, 6, 7, 8, 8]
    linears = [{"name": f"h.{i}.fc", "block": i, "scheme": "W8A16"} for i in range(3)]
    values = {"h.0.fc": 0.0, "h.1.fc": 2e-4, "h.2.fc": 0.02}
    low, high = grid_of("error", linears, values, 3).bounds()
    assert (low, high) == (pytest.approx(1e-4), pytest.approx(10**-1.5))
    assert grid_of("error", linears, {}, 3).bounds() == (1.0, 10.0)


def test_nested_numbers_have_dotted_names() -> None:
    assert dict(flat({"a": 1, "b": {"c": None, "d": {"e": "x"}}, "rows": [1, 2]})) == {
        "a": 1,
        "b.c": None,
        "b.d.e": "x",
    }


def test_groups_show_the_strength_that_was_found_and_what_it_did() -> None:
    outcome = {
        "linears": ["model.layers.0.mlp.down_proj"], "block": 0, "fold": "mlp", "kept": True, "chosen": "flex",
        "alpha": 0.55, "beta": 0.2, "ratio": None, "largest_before": 90.0, "largest_after": 9.0, "ratio_before": 41.5,
        "ratio_after": 3.25, "error_before": 0.25, "error_after": 0.125,
    }  # fmt: skip
    found = str(_smoothing_table([outcome, {**outcome, "kept": False, "cause": "no gain"}], 1))
    assert "flex, alpha 0.550, beta 0.200<" in found
    assert "as found: no gain<" in found
    assert [each in found for each in ("of the median before", "41.5", "3.25", "0.125")] == [True] * 4
