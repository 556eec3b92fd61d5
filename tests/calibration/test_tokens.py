"""Samples: equal to windows of the tokens of the whole text, however little of it was tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from quantcli.calibration.datasets import load_texts
from quantcli.calibration.tokens import _encode_start, tokenize, tokens_per_word
from quantcli.errors import DataError

TRAIN = load_texts("builtin")


def windows(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def unsplit_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer that takes the whole text as one piece, as converted SentencePiece tokenizers do."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    core.train_from_iterator([document[:500] for document in TRAIN[:40]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_packed_samples_are_the_first_windows_of_the_whole_text(tokenizer: Any) -> None:
    ids = tokenizer("\n\n".join(TRAIN)).input_ids
    result = tokenize(tokenizer, TRAIN, samples=7, sequence_length=50, packing="packed", seed=0)
    assert result.samples == windows(ids, 50)[:7]
    assert result.tokens == 350
    assert result.note == ""
    assert ids[0] == tokenizer.bos_token_id


def test_one_document_is_tokenized_verbatim(tokenizer: Any, wikitext: Path) -> None:
    text = (wikitext / "wiki.valid.tokens").read_text(encoding="utf-8")[:200_000]
    result = tokenize(tokenizer, [text], samples=64, sequence_length=128, packing="packed", seed=0)
    assert result.samples == windows(tokenizer(text).input_ids, 128)[:64]


@pytest.mark.parametrize("needed", [1, 50, 3000, 20_000])
def test_a_start_encodes_to_the_same_tokens_as_the_whole_and_stays_short(tokenizer: Any, needed: int) -> None:
    text = "\n\n".join(TRAIN)
    whole = tokenizer(text).input_ids
    start = _encode_start(tokenizer, text, needed).input_ids
    assert start[:needed] == whole[:needed]
    assert len(start) < min(len(whole), 8 * needed + 4096)


def test_a_tokenizer_that_does_not_split_gets_the_whole_text() -> None:
    tokenizer = unsplit_tokenizer()
    text = "\n\n".join(TRAIN)[:40_000]
    assert _encode_start(tokenizer, text, 50).input_ids == tokenizer(text).input_ids


def test_text_without_line_ends_is_encoded_whole(tokenizer: Any) -> None:
    text = " ".join(TRAIN).replace("\n", " ")[:40_000]
    assert _encode_start(tokenizer, text, 50).input_ids == tokenizer(text).input_ids


def test_a_seed_chooses_distinct_windows_in_order_and_repeats(tokenizer: Any) -> None:
    texts = TRAIN[:10]
    every = windows(tokenizer("\n\n".join(texts)).input_ids, 32)
    draws = [tokenize(tokenizer, texts, samples=20, sequence_length=32, packing="packed", seed=s) for s in (3, 3, 4)]
    positions = [every.index(sample) for sample in draws[0].samples]
    assert positions == sorted(set(positions))
    assert len(positions) == 20
    assert draws[0] == draws[1]
    assert draws[0].samples != draws[2].samples
    everything = tokenize(tokenizer, texts, samples=10**6, sequence_length=32, packing="packed", seed=5)
    assert everything.samples == every
    assert "fewer than the 1000000" in everything.note


def test_documents_used_counts_those_that_samples_touch(tokenizer: Any) -> None:
    texts = ["alpha beta gamma delta " * 20, " ", "one two three four five " * 20, "never reached " * 20]
    first = len(tokenizer(texts[0]).input_ids)
    for tokens, expected in ((first // 2, 1), (first + 10, 2), (10**4, 3)):
        result = tokenize(tokenizer, texts, samples=1, sequence_length=tokens, packing="packed", seed=0)
        assert result.documents_used == expected


def test_a_tokenizer_without_offsets_gives_the_same_windows() -> None:
    tokenizer = ByT5Tokenizer()  # one token a byte, in Python
    assert not tokenizer.is_fast
    texts = ["a" * 500, "b" * 500, "c" * 500]
    ids = tokenizer("\n\n".join(texts)).input_ids
    result = tokenize(tokenizer, texts, samples=3, sequence_length=250, packing="packed", seed=0)
    assert result.samples == windows(ids, 250)[:3]
    assert result.documents_used == 2


def test_short_text_is_one_short_sample_and_said_so(tokenizer: Any) -> None:
    result = tokenize(tokenizer, ["Hello there"], samples=4, sequence_length=512, packing="packed", seed=0)
    assert result.samples == [tokenizer("Hello there").input_ids]
    assert result.note == f"The calibration text fills no window of 512 tokens: its {result.tokens} are one sample."


def test_too_few_windows_are_said(tokenizer: Any) -> None:
    text = "word " * 100
    result = tokenize(tokenizer, [text], samples=1000, sequence_length=10, packing="packed", seed=0)
    expected = windows(tokenizer(text).input_ids, 10)
    assert result.samples == expected
    assert f"gives {len(expected)} windows of 10 tokens, fewer than the 1000" in result.note


@pytest.mark.parametrize("packing", ["packed", "line"])
def test_text_without_tokens_is_refused(tokenizer: Any, packing: Any) -> None:
    with pytest.raises(DataError, match="calibration text is empty"):
        tokenize(tokenizer, ["", " \n"], samples=1, sequence_length=8, packing=packing, seed=0)


def test_lines_are_truncated_documents_without_the_empty_ones(tokenizer: Any) -> None:
    texts = ["a short one", "", "a long one " * 3000, "another"]
    result = tokenize(tokenizer, texts, samples=8, sequence_length=16, packing="line", seed=0)
    assert result.samples == [tokenizer(text).input_ids[:16] for text in texts if text]
    assert result.documents_used == 3
    assert "gives 3 documents, fewer than the 8" in result.note
    shuffled = tokenize(tokenizer, texts, samples=8, sequence_length=16, packing="line", seed=2)
    assert sorted(shuffled.samples) == sorted(result.samples)
    orders = {
        str(tokenize(tokenizer, texts, samples=2, sequence_length=16, packing="line", seed=seed).samples)
        for seed in range(1, 9)
    }
    assert len(orders) > 1


def test_no_warning_about_length(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.set_verbosity_warning()  # other test files silence transformers
    assert tokenizer.model_max_length < 100
    tokenizer.deprecation_warnings.clear()
    tokenize(tokenizer, TRAIN[:3], samples=2, sequence_length=200, packing="packed", seed=0)
    assert "longer than" not in caplog.text
    tokenizer(TRAIN[0])  # the warning does come where nothing silences it
    assert "longer than" in caplog.text


def test_tokens_per_word_counts_runs_and_cjk_characters(tokenizer: Any) -> None:
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    assert tokens_per_word(tokenizer, "the quick, brown fox!") == tokens("the quick, brown fox!") / 4
    assert tokens_per_word(tokenizer, "模型量化 int8") == tokens("模型量化 int8") / 5
    assert tokens_per_word(tokenizer, "... !") == 0.0
    # Text in a script that the tokenizer never saw is cut finely.
    assert tokens_per_word(tokenizer, "модель квантуется без потерь") > 2 * tokens_per_word(tokenizer, TRAIN[0])
