"""The samples that a calibration section asks for, and what identifies their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BOS, tiny_tokenizer
from tokenizers import processors
from transformers import ByT5Tokenizer

from quantcli.calibration.datasets import load_texts
from quantcli.errors import DataError, RecipeError
from quantcli.pipeline.batches import beginning, calibration_tokens, data_identity, texts_of
from quantcli.pipeline.samples import windows_of
from quantcli.recipe.data import CalibrationSection, PerplexitySection


def section(**keys: Any) -> CalibrationSection:
    return CalibrationSection.model_validate(keys)


def ids(text: str) -> list[int]:
    """ByT5's tokens: bytes + 3, and 1 at the end."""
    return [*(byte + 3 for byte in text.encode()), 1]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = {
        "prompts": [{"prompt": f"prompt {i}"} for i in range(20)],
        "pieces": [{"text": f"piece {i}"} for i in range(20)],
        "boolq": [{"question": f"question {i}", "passage": "p"} for i in range(20)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.mark.parametrize("kind", ["jsonl", "boolq"])
def test_prompts_are_a_sample_each_unless_packing_is_asked_for(files: Path, kind: str) -> None:
    file = str(files / ("prompts.jsonl" if kind == "jsonl" else "boolq.jsonl"))
    texts = load_texts(kind, path=Path(file))
    keys: dict[str, Any] = {"dataset": kind, "path": file, "samples": 9, "sequence_length": 64}
    found = calibration_tokens(section(**keys), ByT5Tokenizer())
    assert found.samples == [ids(text) for text in texts[:9]]
    packed = calibration_tokens(section(**keys, packing="packed"), ByT5Tokenizer())
    whole = ids("\n\n".join(texts))
    assert packed.samples == [whole[64 * i : 64 * i + 64] for i in range(min(9, len(whole) // 64))]


def test_pieces_of_text_are_packed_unless_lines_are_asked_for(files: Path) -> None:
    keys: dict[str, Any] = {"dataset": "jsonl", "path": str(files / "pieces.jsonl"), "samples": 8}
    packed = calibration_tokens(section(**keys, sequence_length=10), ByT5Tokenizer())
    whole = ids("\n\n".join(load_texts("jsonl", path=files / "pieces.jsonl")))
    assert packed.samples == [whole[10 * i : 10 * i + 10] for i in range(8)]
    lines = calibration_tokens(section(**keys, sequence_length=20, packing="line"), ByT5Tokenizer())
    assert lines.samples == [ids(f"piece {i}") for i in range(8)]


def test_each_source_of_a_mix_is_packed_as_its_text_asks(files: Path) -> None:
    mix = [
        {"dataset": "jsonl", "path": str(files / "prompts.jsonl"), "share": 3},
        {"dataset": "jsonl", "path": str(files / "pieces.jsonl"), "share": 1},
    ]
    found = calibration_tokens(section(mix=mix, samples=8, sequence_length=20), ByT5Tokenizer(), 20)
    whole = ids("\n\n".join(load_texts("jsonl", path=files / "pieces.jsonl")))
    prompts = [ids(f"prompt {i}") for i in range(6)]
    assert found.samples == [prompts[0], prompts[1], whole[:20], *prompts[2:4], prompts[4], whole[20:40], prompts[5]]
    assert found.notes == ()
    short = calibration_tokens(section(mix=mix, samples=80, sequence_length=20), ByT5Tokenizer(), 400)
    assert short.notes[0] == (
        f"calibration.mix[0] ({files / 'prompts.jsonl'}) gives 20 documents, fewer than the 60 asked for."
    )
    assert "evaluate.perplexity.sequence_length (400)" in short.notes[-1]
    assert texts_of(section(mix=mix)) == [f"{kind} {i}" for kind in ("prompt", "piece") for i in range(20)]


def test_the_identity_covers_every_source_by_content_and_not_by_place(files: Path, tmp_path: Path) -> None:
    def identity(first: Path, share: float = 1.0, **keys: Any) -> dict[str, Any]:
        mix = [{"dataset": "jsonl", "path": str(first), "share": share}, {"dataset": "builtin"}]
        return data_identity(section(mix=mix, **keys))

    original = identity(files / "prompts.jsonl")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((files / "prompts.jsonl").read_bytes())
    assert identity(copy) == original
    assert str(tmp_path) not in json.dumps(original)
    assert original["text"] == [
        data_identity(section(dataset="jsonl", path=str(copy)))["text"],
        data_identity(section())["text"],
    ]
    copy.write_bytes(copy.read_bytes() + b"\n")
    for other in (identity(copy), identity(files / "prompts.jsonl", 2.0), identity(files / "prompts.jsonl", seed=1)):
        assert other != original
    assert data_identity(section(drop_outliers=0.1)) != data_identity(section())
    assert isinstance(data_identity(PerplexitySection())["text"], str)


def test_an_empty_prompt_in_a_mix_is_named_with_its_line(files: Path) -> None:
    (files / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    mixed = section(mix=[{"dataset": "builtin"}, {"dataset": "jsonl", "path": str(files / "bad.jsonl")}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the prompt is empty"):
        calibration_tokens(mixed, ByT5Tokenizer())


@pytest.mark.parametrize(("wanted", "begun"), [(None, [BOS]), (True, [BOS]), (False, [])])
def test_sequences_begin_as_the_tokenizer_begins_texts(tmp_path: Path, wanted: bool | None, begun: list[int]) -> None:
    tokenizer, text = tiny_tokenizer(), "The hill is as high as the river is deep. " * 9
    (tmp_path / "t.txt").write_text(text)
    found = calibration_tokens(
        section(dataset="text", path=str(tmp_path / "t.txt"), samples=4, sequence_length=10, bos=wanted), tokenizer
    )
    whole = tokenizer(text).input_ids
    text_ids, own = whole[len(begun) :], 10 - len(begun)
    assert found.samples == [[*begun, *text_ids[own * i : own * i + own]] for i in range(4)]
    scored = windows_of(
        PerplexitySection(dataset="text", path=str(tmp_path / "t.txt"), sequence_length=10, windows=4, bos=wanted),
        tokenizer,
    )
    assert scored.windows == found.samples
    assert scored.tokens == 36
    assert ("each starts with 1," in scored.description) == bool(begun)


def test_windows_that_overlap_begin_so_and_score_each_token_once(tmp_path: Path) -> None:
    tokenizer, text = tiny_tokenizer(), "The hill is as high as the river is deep. " * 9
    (tmp_path / "t.txt").write_text(text)
    keys = {"dataset": "text", "path": str(tmp_path / "t.txt"), "sequence_length": 10, "windows": None}
    found = windows_of(PerplexitySection.model_validate({**keys, "stride": 4}), tokenizer)
    scored = [token for window, first in zip(found.windows, found.first, strict=True) for token in window[first:]]
    assert scored == tokenizer(text).input_ids[1 : 1 + len(scored)]
    assert len(scored) == found.tokens == 9 + 4 * (len(found.windows) - 1)
    assert {window[0] for window in found.windows} == {BOS}


def test_a_tokenizer_that_begins_with_nothing_is_asked_for_its_bos(tmp_path: Path) -> None:
    assert beginning(ByT5Tokenizer(), None, "calibration.bos") == []
    with pytest.raises(RecipeError, match=r"calibration\.bos: is true, and the tokenizer has no BOS token"):
        beginning(ByT5Tokenizer(), True, "calibration.bos")
    silent = tiny_tokenizer()
    silent.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert beginning(silent, None, "calibration.bos") == []
    assert beginning(silent, True, "calibration.bos") == [BOS]


def test_a_short_text_is_one_sample_that_begins_so(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The hill")
    tokenizer = tiny_tokenizer()
    found = calibration_tokens(
        section(dataset="text", path=str(tmp_path / "t.txt"), samples=4, sequence_length=100), tokenizer
    )
    assert found.samples == [tokenizer("The hill").input_ids]


def test_bos_is_of_protocol_standard() -> None:
    with pytest.raises(ValueError, match="bos"):
        PerplexitySection(protocol="lm-eval", bos=True)
