"""Data sets: what is read, in which order, and what unusable data is answered with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow
import pytest
from pyarrow import parquet

from quantcli.calibration.builtin_text import builtin_documents
from quantcli.calibration.datasets import DATASETS, data_fingerprint, load_documents, load_texts
from quantcli.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def write_parquet(file: Path, **columns: list[object]) -> Path:
    parquet.write_table(pyarrow.table(columns), file)
    return file


# ---------------------------------------------------------------------------------------------------- builtin


def test_builtin_holds_enough_prose_for_calibration_and_evaluation() -> None:
    train, test = (load_texts("builtin", split=split) for split in ("train", "test"))
    assert sum(map(len, train)) > 300_000  # 64 samples of 512 tokens are some 150 000 characters
    assert sum(map(len, test)) > 150_000
    text = "\n".join(train + test)
    assert sum(character.isalpha() or character == " " for character in text) > 0.9 * len(text)
    assert all(mark not in text for mark in (">>>", "::=", "****", "====", "``", "\n    "))


def test_builtin_splits_share_no_paragraph_and_cover_everything() -> None:
    train, test = (load_texts("builtin", split=split) for split in ("train", "test"))
    train_paragraphs, test_paragraphs = ({p for d in split for p in d.split("\n\n")} for split in (train, test))
    assert not train_paragraphs & test_paragraphs
    assert sorted(train + test) == sorted(builtin_documents())


def test_builtin_is_the_same_in_another_process_without_docstrings() -> None:
    script = """from quantcli.calibration.datasets import data_fingerprint as fingerprint
print(fingerprint("builtin", None, None, "train"))"""
    found = subprocess.run(
        [sys.executable, "-OO", "-c", script],
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == data_fingerprint("builtin", None, None, "train")


# ---------------------------------------------------------------------------------------------------- files


def test_text_directory_is_read_sorted_by_name_and_without_other_files(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second\r\n", "a.md": "first", "c.txt": "third", "d.json": "no"}.items():
        (tmp_path / name).write_bytes(text.encode())
    assert load_texts("text", path=tmp_path) == ["first", "second\n", "third"]


def test_wikitext2_file_is_one_document_verbatim(wikitext: Path) -> None:
    expected = (wikitext / "wiki.test.tokens").read_text(encoding="utf-8")
    assert load_texts("wikitext2", path=wikitext / "wiki.test.tokens", split="train") == [expected]
    assert load_texts("wikitext2", path=wikitext, split="test") == [expected]
    with pytest.raises(DataError, match=r"no wikitext2 file of split train .*it holds wiki\.test\.tokens, wiki\.valid"):
        load_texts("wikitext2", path=wikitext, split="train")


def test_wikitext2_parquet_shards_are_joined_in_order_with_empty_rows_kept(tmp_path: Path) -> None:
    write_parquet(tmp_path / "validation-00001-of-00002.parquet", text=["c"])
    write_parquet(tmp_path / "validation-00000-of-00002.parquet", text=["a", "", "b"])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", text=["no"])
    for split in ("valid", "validation"):
        assert load_texts("wikitext2", path=tmp_path, split=split) == ["a\n\n\n\nb\n\nc"]


def test_wikitext2_directory_with_two_files_of_a_split_is_refused(tmp_path: Path) -> None:
    for name in ("wiki.test.tokens", "other.test.tokens"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"several files of split test: other\.test\.tokens, wiki\.test\.tokens"):
        load_texts("wikitext2", path=tmp_path, split="test")


@pytest.mark.parametrize("field", ["text", "prompt", "inputs_pretokenized", "content"])
def test_jsonl_finds_the_usual_fields(tmp_path: Path, field: str) -> None:
    file = tmp_path / "data.jsonl"
    rows = [{field: "one\u2028line", "id": 1}, {field: "two"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert load_texts("jsonl", path=file) == ["one\u2028line", "two"]


def test_mixed_calibration_prompts_are_read() -> None:
    file = SHARED / "mix_calib.jsonl"
    if not file.is_file():
        pytest.skip("no calibration prompts beside the checkout")
    expected = [json.loads(line)["inputs_pretokenized"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert load_texts("jsonl", path=file) == expected


def test_rows_may_hold_either_prompt_column_or_both_with_one_null(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    rows = [{"inputs_pretokenized": "a"}, {"prompt": "b"}, {"prompt": None, "inputs_pretokenized": "c", "text": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    documents = load_documents("jsonl", path=file)
    assert [document.text for document in documents] == ["a", "b", "c"]
    assert [document.place for document in documents] == [f"{file}:{line}" for line in (1, 2, 3)]


def test_rows_of_prompt_columns_are_prompts_and_others_are_not(tmp_path: Path) -> None:
    for column, expected in (("prompt", True), ("inputs_pretokenized", True), ("text", False), ("body", False)):
        (tmp_path / "data.jsonl").write_text(json.dumps({column: "a"}))
        write_parquet(tmp_path / "data.parquet", **{column: ["a"]})
        for kind in ("jsonl", "parquet"):
            (document,) = load_documents(kind, path=tmp_path / f"data.{kind}", field=column)
            assert document.prompt is expected
    assert not any(document.prompt for document in load_documents("builtin"))


def test_blank_rows_of_text_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("a", " ", "b")))
    assert load_texts("jsonl", path=file) == ["a", "b"]


def test_boolq_prompts_are_those_of_the_guide_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "dev.jsonl"
    rows = [
        {"question": "is it so", "title": "Ähre -- x", "answer": True, "passage": " It is.\n"},
        {"question": "and here?", "title": "", "answer": False, "passage": "No."},
        {"question": "without title", "answer": False, "passage": "As on the hub."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = [
        "Ähre -- x --  It is.\n\nQuestion:is it so?\nAnswer:",
        " -- No.\nQuestion:and here??\nAnswer:",
        " -- As on the hub.\nQuestion:without title?\nAnswer:",
    ]
    documents = load_documents("boolq", path=file)
    assert [document.text for document in documents] == expected
    assert all(document.prompt for document in documents)


def test_boolq_file_of_the_reference_is_read_whole() -> None:
    if not (SHARED / "boolq").is_dir():
        pytest.skip("no BoolQ beside the checkout")
    texts = load_texts("boolq", path=SHARED / "boolq")
    assert len(texts) == 700
    assert texts[0].startswith(
        " -- This is a list of diplomatic missions in the United States. At present, 177 nations "
    )
    assert texts[0].endswith(
        "see List of current Permanent Representatives to the United Nations."
        "\nQuestion:does the us have embassies for other countries?\nAnswer:"
    )


def test_boolq_directory_with_several_files_is_read_by_split(tmp_path: Path) -> None:
    for name in ("dev", "train"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "passage": "p"}))
    for split, name in (("train", "train"), ("validation", "dev"), ("dev", "dev")):
        assert load_texts("boolq", path=tmp_path, split=split) == [f" -- p\nQuestion:{name}?\nAnswer:"]
    prints = {split: data_fingerprint("boolq", tmp_path, None, split) for split in ("train", "dev", "validation")}
    assert prints["dev"] == prints["validation"] != prints["train"]
    assert prints["dev"] == data_fingerprint("boolq", tmp_path / "dev.jsonl", None, "train")
    with pytest.raises(DataError, match=r"no BoolQ file of split test; it holds dev\.jsonl, train\.jsonl"):
        load_texts("boolq", path=tmp_path, split="test")


def test_parquet_reads_the_named_column_and_passes_over_nulls(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "data.parquet", text=["no", "no", "no"], body=["a", None, "b"])
    assert load_texts("parquet", path=file, field="body") == ["a", "b"]


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 1}', r":2: the field holds int"),
        (b'{"text": "a"', r":2: no valid JSON"),
        (b'["a"]', r":2: not a JSON object"),
        (b'{"words": "a", "id": 3}', r":2: no field text or prompt .*there is words, id"),
        (b'{"text": "\xff"}', r":2: byte 27 is not UTF-8"),
    ],
)
def test_bad_jsonl_line_is_named_with_its_place(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"data.jsonl{message}") as caught:
        load_texts("jsonl", path=file)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("dataset", "line", "message"),
    [
        ("jsonl", {"prompt": " \n"}, "the prompt is empty"),
        ("jsonl", {"inputs_pretokenized": ""}, "the prompt is empty"),
        ("boolq", {"question": "q", "passage": " "}, "the BoolQ field passage is empty"),
        ("boolq", {"question": None, "passage": "p"}, "the BoolQ field question is empty or no text"),
        ("boolq", {"prompt": "p"}, "the BoolQ field question is missing; there is prompt"),
    ],
)
def test_empty_and_incomplete_prompts_are_named_with_their_place(
    tmp_path: Path, dataset: str, line: dict[str, object], message: str
) -> None:
    file = tmp_path / "data.jsonl"
    fine = {"prompt": "a"} if dataset == "jsonl" else {"question": "q", "passage": "p"}
    file.write_text(f"{json.dumps(fine)}\n\n{json.dumps(line)}\n")
    with pytest.raises(DataError, match=f"data.jsonl:3: {message}") as caught:
        load_texts(dataset, path=file)
    assert caught.value.remedy


@pytest.mark.parametrize("dataset", ["text", "jsonl", "parquet", "wikitext2", "boolq"])
def test_missing_path_and_empty_data_are_refused(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_texts(dataset, path=tmp_path / "absent")
    with pytest.raises(DataError, match="holds no"):
        load_texts(dataset, path=tmp_path)
    empty = tmp_path / "empty.file"
    empty.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"is empty|cannot be read as parquet"):
        load_texts(dataset, path=empty)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "builtin", "path": Path("x")}, "takes no path"),
        ({"dataset": "builtin", "split": "validation"}, "no split 'validation'"),
        ({"dataset": "builtin", "field": "text"}, "no fields"),
        ({"dataset": "text"}, "needs a path"),
        ({"dataset": "wikitext"}, "no data set 'wikitext'.*Did you mean wikitext2"),
        ({"dataset": "owner/name", "path": Path("x")}, "takes no path"),
        ({"dataset": "owner/name"}, "owner/name, split train, cannot be read"),
        ({"dataset": "wikitext2", "split": "valid"}, "Salesforce/wikitext, split validation, cannot be read"),
        ({"dataset": "boolq", "split": "dev"}, "google/boolq, split validation, cannot be read"),
        ({"dataset": "boolq", "field": "question"}, "boolq has no fields"),
    ],
)
def test_options_that_do_not_apply_and_an_absent_hub_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_texts(**arguments)  # type: ignore[arg-type]
    assert caught.value.remedy


def test_every_line_of_a_file_of_lines_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("中国的首都在哪里？\r\n\r\n请做一首诗歌：\r\n".encode("utf-8-sig"))
    (tmp_path / "a.txt").write_text("one\u2028line\n  \n two", encoding="utf-8")
    found = load_documents("lines", path=tmp_path)
    assert [document.text for document in found] == ["one\u2028line", " two", "中国的首都在哪里？", "请做一首诗歌："]
    assert [document.place.rpartition("/")[2] for document in found] == ["a.txt:1", "a.txt:3", "b.txt:1", "b.txt:3"]
    assert all(document.prompt for document in found)


def test_a_json_list_is_read_like_lines_and_its_texts_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"  # as msModelSlim's calibration sets of large models
    file.write_text(json.dumps(["中国的首都在哪里？", {"text": "a"}, {"prompt": "b"}], indent=2))
    documents = load_documents("jsonl", path=file)
    assert [(document.text, document.prompt) for document in documents] == [
        ("中国的首都在哪里？", True),
        ("a", False),
        ("b", True),
    ]
    assert documents[1].place == f"{file}, item 2"
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"one"\n"two"\n')
    assert load_texts("jsonl", path=lines) == ["one", "two"]
    for content, message in (
        ("[1]", "item 1: not a JSON object"),
        ('["a"', "no valid JSON"),
        ("[" * 10**5, "no valid"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            load_texts("jsonl", path=file)


@pytest.mark.parametrize("dataset", ["jsonl", "boolq"])
def test_half_a_character_is_an_error_that_names_its_line(tmp_path: Path, dataset: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"text": "a", "question": "q", "passage": "p"}\n{"text": "a\\ud83d", "question": "q\\ud83d", "passage": ""}'
    )
    if dataset == "boolq":
        file.write_text(file.read_text().replace('"passage": ""', '"passage": "p"'))
    with pytest.raises(DataError, match=r"data.jsonl:2: character \d+ of the text is \\ud83d"):
        load_texts(dataset, path=file)
    file.write_text('{"text": "\\ud83d\\ude00"}')
    assert load_texts("jsonl", path=file) == ["\U0001f600"]


def test_a_subset_of_a_hub_data_set_is_asked_for_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Table(dict[str, list[str]]):
        column_names = ("text",)

    def load_dataset(name: str, config: str | None, *, split: str) -> Table:
        asked.append((name, config, split))
        return Table(text=["a"])

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert load_texts("owner/name", split="validation", subset="en") == ["a"]
    assert load_texts("owner/name") == ["a"]
    assert asked == [("owner/name", "en", "validation"), ("owner/name", None, "train")]
    prints = {data_fingerprint("owner/name", None, None, "train", subset) for subset in (None, "en", "de")}
    assert len(prints) == 3


def test_missing_column_and_column_of_numbers_are_refused(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "data.parquet", words=["a"], text=[1])
    with pytest.raises(DataError, match="no field body; there is words, text"):
        load_texts("parquet", path=file, field="body")
    with pytest.raises(DataError, match="row 0: the field holds int"):
        load_texts("parquet", path=file)


# ---------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_follows_contents_and_not_place(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for directory in ("one", "two"):
        (tmp_path / directory / "a.txt").write_text("some text")
    first = data_fingerprint("text", tmp_path / "one", None, "train")
    assert first == data_fingerprint("text", tmp_path / "two" / "a.txt", None, "test")
    (tmp_path / "two" / "b.txt").write_text("more")
    assert first != data_fingerprint("text", tmp_path / "two", None, "train")
    (tmp_path / "one" / "a.txt").write_text("same text")
    assert first != data_fingerprint("text", tmp_path / "one", None, "train")


def test_fingerprint_tells_data_sets_splits_and_fields_apart(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.tokens"
    file.write_text("x")
    (tmp_path / "wiki.valid.tokens").write_text("y")
    prints = [
        data_fingerprint("builtin", None, None, "train"),
        data_fingerprint("builtin", None, None, "test"),
        data_fingerprint("owner/name", None, None, "train"),
        data_fingerprint("owner/name", None, None, "test"),
        data_fingerprint("owner/name", None, "body", "test"),
        data_fingerprint("wikitext2", None, None, "test"),
        data_fingerprint("wikitext2", tmp_path, None, "valid"),
        data_fingerprint("wikitext2", tmp_path, None, "test"),
        data_fingerprint("boolq", None, None, "train"),
        data_fingerprint("boolq", file, None, "train"),
        data_fingerprint("text", file, None, "test"),
        data_fingerprint("jsonl", file, "body", "test"),
    ]
    assert len(set(prints)) == len(prints)
    assert data_fingerprint("wikitext2", file, None, "train") == prints[7]


def test_every_data_set_of_the_table_has_a_fingerprint_for_what_it_loads(tmp_path: Path) -> None:
    for dataset in DATASETS:
        file = None if dataset == "builtin" else tmp_path / f"data.{dataset}"
        if dataset == "parquet":
            write_parquet(tmp_path / "data.parquet", text=["a b"])
        elif file is not None:
            file.write_text('{"text": "a b", "question": "c", "passage": "d"}')
        assert load_texts(dataset, path=file)
        assert len(data_fingerprint(dataset, file, None, "train")) == 64
    with pytest.raises(DataError, match="no data set 'txt'"):
        data_fingerprint("txt", None, None, "train")
