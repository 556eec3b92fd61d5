"""Whole evaluations by each protocol against slow loops over transformers, and against lm-evaluation-harness itself."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_protocols import ARTICLE
from torch import Tensor

from quantcli.calibration.datasets import data_fingerprint
from quantcli.errors import DataError
from quantcli.evaluation.protocols import EvaluationText, wikitext_pages
from quantcli.pipeline.samples import windows_of
from quantcli.pipeline.source import locate_model
from quantcli.pipeline.standalone import score_recipe
from quantcli.recipe import load_recipe
from quantcli.recipe.data import PerplexitySection
from quantcli.recipe.schema import ModelSection

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"
SCRIPT = ROOT.parent / "shared" / "bench" / "perplexity.py"
WIKITEXT_2 = ROOT.parent / "shared" / "data" / "wikitext-2" / "wiki.test.tokens"
WIKITEXT = ARTICLE + ARTICLE.replace("Boulter", "Smith").replace("actor", "tall old actor ( of sorts )")


def measured(model: Path, text: Path, **section: Any) -> dict[str, Any]:
    """What `eval-ppl --checkpoint` finds of a float model."""
    section = {"dataset": "text", "path": str(text), "windows": None, **section}
    recipe = {"model": {"path": str(model)}, "quantize": {}, "evaluate": {"perplexity": section}, "output": "unused"}
    return score_recipe(load_recipe(recipe))


@torch.inference_mode()
def log_probabilities(model: Path, ids: list[int]) -> Tensor:
    """Float64 [tokens, vocabulary]: what each token says of the next."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    return loaded(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [7, 20, 31, 45])
def test_windows_that_overlap_score_each_token_once(tiny_llama: Path, prose: Path, stride: int, bos: bool) -> None:
    length = 31
    ids = transformers.AutoTokenizer.from_pretrained(tiny_llama)(prose.read_text()).input_ids
    total, count, seen = 0.0, 0, 0
    begin = [ids.pop(0)] if bos else []
    own = length - len(begin)
    for start in range(0, len(ids) - own + 1, stride):
        logp = log_probabilities(tiny_llama, begin + ids[start : start + own])
        for position in range(0 if bos else 1, own):
            if start + position >= seen:
                total -= logp[len(begin) + position - 1, ids[start + position]].item()
                count += 1
        seen = start + own
    found = measured(tiny_llama, prose, sequence_length=length, stride=stride, bos=None if bos else False)
    assert found["tokens"] == count
    assert found["begin"] == begin
    assert found["quantized"]["value"] == pytest.approx(math.exp(total / count), rel=1e-6)
    if stride < length:
        assert count > len(ids) - length
        assert f"every {stride} tokens" in found["description"]


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL.exists() and SCRIPT.exists()), reason="needs models/ and ../shared")
def test_the_packaged_model_has_the_perplexity_of_an_independent_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window runs alone in both. The script's own sums of logarithms, in float32, are off by 1e-5: they are
    taken in float64 here."""
    plain = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, *rest, **named: plain(logits.double(), *rest, **named)
    )
    spec = importlib.util.spec_from_file_location("independent", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = locate_model(ModelSection(path=str(MODEL)))
    text = tmp_path / "text.txt"
    text.write_text(WIKITEXT_2.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    assert ids.shape[1] >= 3 * script.WINDOW
    for dtype, windows, bound in (("float32", 3, 1e-6), ("bfloat16", 3, 1e-6)):
        monkeypatch.setattr(script, "WINDOWS", windows)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        wanted = script.perplexity(loaded, ids)
        own = shutil.copytree(model, tmp_path / dtype)
        loaded.save_pretrained(own)
        found = measured(own, text, windows=windows, sequence_length=script.WINDOW)
        print(f"{dtype}: {found['quantized']['value']:.5f}, independently {wanted:.5f}")
        assert found["tokens"] == windows * (script.WINDOW - 1)
        assert found["quantized"]["value"] == pytest.approx(wanted, rel=bound)


@pytest.fixture(scope="module")
def padded_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a pad token that occurs in text."""
    model = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("padded") / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(tokenizer(" sheep").input_ids)[-1]
    tokenizer.save_pretrained(model)
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_golden_stick_is_its_slow_self(padded_llama: Path, tmp_path: Path, batch: int) -> None:
    """Chunks of one token less than the length, padded to it; logits and labels shifted; loss · mask summed over a
    batch and divided by the sum of its mask; the mean over full batches; exp."""
    text = tmp_path / "text.txt"
    numbers = ["one", "two", "three", "four", "five"]
    text.write_text(
        " \n = Sheep = \n \n"
        + " \n \n".join(f"The {a} sheep @-@ dog saw {b} sheep ." for a in numbers for b in numbers)
    )
    length = 26
    tokenizer = transformers.AutoTokenizer.from_pretrained(padded_llama)
    pad = tokenizer.pad_token_id
    ids: list[int] = []
    for a in numbers:
        for b in numbers:
            # every other paragraph keeps what stood before the next blank line
            ids += tokenizer(
                f"The {a} sheep-dog saw {b} sheep" + (" ." if (a, b) == ("five", "five") else ".")
            ).input_ids
    chunks = [[*ids[i : i + length - 1], pad] for i in range(0, len(ids) - length + 2, length - 1)]
    means = []
    for begin in range(0, len(chunks) - batch + 1, batch):
        numerator = denominator = 0.0
        for chunk in chunks[begin : begin + batch]:
            logp = log_probabilities(padded_llama, chunk)[:-1]
            labels = torch.tensor(chunk[1:])
            mask = (labels != pad).double()
            losses = -logp.gather(1, labels[:, None])[:, 0]
            numerator += float((losses * mask).sum())
            denominator += float(mask.sum())
        means.append(numerator / (denominator + 1e-12))
    assert len(chunks) % 3  # so that a batch is left out
    assert sum(chunk[1:].count(pad) for chunk in chunks) > len(chunks)  # some are in the text
    found = measured(padded_llama, text, protocol="golden-stick", sequence_length=length, batch_size=batch)
    assert found["quantized"]["value"] == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-6)
    other = measured(padded_llama, text, protocol="golden-stick", sequence_length=length, batch_size=5 - batch)
    assert other["quantized"]["value"] != found["quantized"]["value"]
    kept = chunks[: len(chunks) // batch * batch]
    assert found["windows"] == len(kept)
    assert found["batch_size"] == batch
    # the last token of each chunk is the padding, which is no prediction here
    in_text = sum(chunk[1:-1].count(pad) for chunk in kept)
    assert found["masked"] == {"token": pad, "predictions": in_text}
    data = found["data"]
    assert (data["dataset"], data["file"], data["split"]) == ("text", "text.txt", None)
    assert data["digest"] == data_fingerprint("text", text, None, "test")
    assert f"over batches of {batch} " in found["description"]
    more = len(chunks) + 1
    with pytest.raises(DataError, match=f"{len(chunks)} windows are fewer than a batch of {more}"):
        measured(padded_llama, text, protocol="golden-stick", sequence_length=length, batch_size=more)


def write_rows(path: Path, rows: list[str]) -> Path:
    from pyarrow import parquet, table  # type: ignore[import-untyped,unused-ignore]

    parquet.write_table(table({"text": rows}), path)
    return path


def windows_by(model: Path, file: Path, **section: Any) -> EvaluationText:
    keys = {"path": str(file), "windows": None, **section}
    return windows_of(PerplexitySection(**keys), transformers.AutoTokenizer.from_pretrained(model))


@pytest.mark.parametrize("dataset", ["parquet", "wikitext2"])
def test_golden_stick_takes_rows_of_a_table_as_they_are(tiny_llama: Path, tmp_path: Path, dataset: str) -> None:
    file = write_rows(tmp_path / "test.parquet", ["", " = Title = \n", "", "A sheep @-@ dog .", " \n", "x"])
    found = windows_by(tiny_llama, file, dataset=dataset, protocol="golden-stick", sequence_length=4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    ids = tokenizer("\n\n = Title = \n\n\n\n\nA sheep @-@ dog .\n\n \n\n\nx").input_ids
    assert [token for window in found.windows for token in window] == ids[: len(ids) // 3 * 3]
    assert "rows joined by blank lines" in found.description


def test_lm_eval_finds_the_articles_of_the_text_in_the_table_of_the_hub(tiny_llama: Path, tmp_path: Path) -> None:
    """The hub's rows are the file's lines with their ends, but for blank lines, which are empty."""
    text = tmp_path / "wiki.test.tokens"
    text.write_text(WIKITEXT)
    lines = text.read_text().splitlines(keepends=True)
    assert " \n" in lines
    table = write_rows(tmp_path / "rows.parquet", [line if line.strip() else "" for line in lines])
    by_text, by_table = (
        windows_by(tiny_llama, file, dataset="wikitext2", protocol="lm-eval", sequence_length=24)
        for file in (text, table)
    )
    assert len(by_text.words) == 2
    assert by_table == by_text
    assert by_table.digest() == by_text.digest()
    assert by_table.begin == [transformers.AutoTokenizer.from_pretrained(tiny_llama).bos_token_id]


def test_articles_of_wikitext_begin_at_headings_of_the_first_level() -> None:
    pages = wikitext_pages(WIKITEXT)
    assert [page.split("\n")[0] for page in pages] == [" = Robert Boulter = ", " = Robert Smith = "]
    assert " \n" + "\n".join(pages) == WIKITEXT  # blanks before the first are no article
    assert wikitext_pages("before \n = A = \n = = B = = \n") == ["before ", " = A = \n = = B = = \n"]


def test_lm_eval_predicts_every_token_of_every_document(tiny_llama: Path, tmp_path: Path) -> None:
    documents = [
        "One sheep saw two old sheep of the hill, and three more.",
        "Four.",
        "Five old sheep saw\nthe hill. " * 5,
    ]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    length, total, count = 16, 0.0, 0
    for text in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        for begin in range(1, len(ids), length):
            end = min(begin + length, len(ids))
            start = max(0, end - 1 - length)
            logp = log_probabilities(tiny_llama, ids[start : end - 1])
            total -= sum(logp[position - 1 - start, ids[position]].item() for position in range(begin, end))
            count += end - begin
    section = {"dataset": "jsonl", "protocol": "lm-eval", "sequence_length": length}
    found = measured(tiny_llama, file, **section)
    words = sum(len(re.split(r"\s+", text)) for text in documents)
    size = sum(len(text.encode()) for text in documents)
    assert found["tokens"] == count
    assert found["quantized"]["value"] == pytest.approx(math.exp(total / count), rel=1e-6)
    numbers = {name: pair["quantized"]["value"] for name, pair in found["per_text"].items()}
    assert numbers == pytest.approx(
        {
            "word_perplexity": math.exp(total / words),
            "byte_perplexity": math.exp(total / size),
            "bits_per_byte": total / size / math.log(2),
        },
        rel=1e-6,
    )
    assert all(pair["quantized"]["error"] > 0 for pair in found["per_text"].values())
    some = measured(tiny_llama, file, **section, windows=1)  # the first document, of two windows, is always taken
    assert "the first 1 of 3" in some["description"]


@pytest.mark.parametrize("wikitext", [True, False])
def test_lm_eval_finds_the_same(tiny_llama: Path, tmp_path: Path, wikitext: bool) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    pages = wikitext_pages(WIKITEXT)
    data, tasks = tmp_path / "pages.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    tasks.mkdir()
    (tasks / "rules.py").write_text(
        "from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer\n"
    )
    rules = "!function rules.wikitext_detokenizer\nprocess_results: !function rules.process_results"
    (tasks / "local.yaml").write_text(
        "task: local_pages\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        f"doc_to_target: {rules if wikitext else repr('{{page}}')}\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    lm = HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", max_length=24, batch_size=1)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=["local_pages"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["local_pages"]

    text = tmp_path / "wiki.test.tokens"
    text.write_text(WIKITEXT)
    source = {"dataset": "wikitext2"} if wikitext else {"dataset": "jsonl", "field": "page"}
    found = measured(tiny_llama, text if wikitext else data, protocol="lm-eval", sequence_length=24, **source)
    for name, pair in found["per_text"].items():
        assert pair["quantized"]["value"] == pytest.approx(results[f"{name},none"], rel=1e-5), name
